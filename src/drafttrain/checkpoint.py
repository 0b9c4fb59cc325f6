"""The drafter folder: the files that a serving stack loads, and drafttrain.json, which names its kind and its target."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.foreign import check_folder, read_json
from drafttrain.drafters import Drafter, drafters
from drafttrain.target_model import Target

ABOUT = "drafttrain.json"


OWN_TOKENIZER = (
    "its tokenizer is its own, and engines pass it the target's token ids. Decode with drafttrain eval, or with transformers' "
    "generate(assistant_model=..., tokenizer=..., assistant_tokenizer=...), which read the format hf"
)
"""Why formats and engines refuse such a drafter."""


@dataclass(frozen=True)
class About:
    """The contents of drafttrain.json."""

    kind: str
    target: str
    target_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    trained_steps: int
    draft: str = "sampled"
    """How it drafts at temperature > 0: sampled or greedy."""
    own_tokenizer: bool = False
    """The tokenizer in its folder is the drafter's own, another one than the target's."""


def write_about(folder: Path, about: About) -> None:
    """Write drafttrain.json into a drafter folder. Other loaders ignore it."""
    write_json(folder / ABOUT, asdict(about))


def read_about(folder: Path) -> About | None:
    """Return the contents of drafttrain.json; None: a plain Hugging Face model from another project.

    Raises:
        CheckpointError: The file is damaged, or fields have wrong types.
    """
    path = folder / ABOUT
    if not path.exists():
        return None
    held, known = read_json(path), {field.name: field for field in fields(About)}
    problems = [
        f"{name} must be a {type_name}, got {held[name]!r:.60}" if name in held else f"{name} is missing"
        for name, field in known.items()
        if (type_name := str(field.type)) != type(held.get(name)).__name__
        and (name in held or field.default is MISSING)
    ]
    if held.get("draft", "sampled") not in ("sampled", "greedy"):
        problems.append(f"draft must be sampled or greedy, got {held['draft']!r:.60}")
    if problems:
        raise CheckpointError(f"{path}: not a description of a drafter: {'; '.join(problems)}")
    return About(**{name: value for name, value in held.items() if name in known})


def read_drafter(folder: Path, target: Target, *, dtype: str | None = None) -> Drafter:
    """Return the drafter of a folder, ready to propose for `target`.

    Args:
        dtype: Type of its weights; None: the target's, as in serving engines.

    Raises:
        CheckpointError: The folder is missing, damaged, of an unknown kind, or made for another tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json here: not a drafter folder")
    check_folder(folder)
    about = read_about(folder)
    if about is not None:
        _check_target(folder, about, target)
    kind = about.kind if about else "causal_lm"
    if kind not in drafters.names():
        raise CheckpointError(
            f"{folder}: {drafters.unknown(kind)}. If a plugin has this kind, give its run folder, whose recipe names the plugin"
        )
    component: Any = drafters.entry(kind).component
    drafter: Drafter = component.load(folder, target, dtype or str(target.model.dtype).removeprefix("torch."))
    if about is not None:
        drafter.draft = about.draft
    return drafter


def _check_target(folder: Path, about: About, target: Target) -> None:
    if about.tokenizer_fingerprint != target.tokenizer_fingerprint:
        raise CheckpointError(
            f"{folder} was trained for {about.target} (vocabulary {about.vocab_size}), this target, {target.name}, has "
            f"another tokenizer (vocabulary {target.vocab_size}). Train a drafter for this target, or use the target it "
            "was made for."
        )
    if about.target_fingerprint not in ("", target.fingerprint):
        say(f"note: {folder} was trained for {about.target}, whose weights differ from those of {target.name}")
