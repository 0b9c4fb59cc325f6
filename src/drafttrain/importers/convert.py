"""Convert a folder trained elsewhere to a drafter folder: recognise, rename, check, write, read back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.checkpoint import ABOUT, About, read_about, write_about
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import folder_beside, write_json
from drafttrain.core.foreign import READ, on_one_screen, own_files
from drafttrain.core.tensors import read_tensors
from drafttrain.drafters.medusa.folder import TREE
from drafttrain.drafters.tuned_target import ADAPTER, WHOLE
from drafttrain.export.layout import layout_problems
from drafttrain.importers import Given, Imported, Importer, importers
from drafttrain.importers.reading import read_given
from drafttrain.importers.target import TargetFiles
from drafttrain.importers.unsupported import why_unsupported
from drafttrain.target_model.tokenizer import check_same_tokenizer, load_tokenizer, num_ids, tokenizer_fingerprint

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")

COPIED = ("generation_config.json", TREE, ADAPTER, WHOLE)
"""Further files that a drafter folder reads; without the tuning of its target, it is another drafter."""


def import_folder(source: Path, out: Path, *, target: str | None = None) -> Imported:
    """Write the drafter folder of a folder trained elsewhere; return the files, with notes on what was changed.

    Args:
        target: The target that it was made for; None: the one that the folder names.

    Raises:
        CheckpointError: Lists all problems.
    """
    _check_place(source, out)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    own_files(source, suffixes=READ)
    given = read_given(source)
    layout = layout_of(given)
    about = read_about(source)
    named = target or (about.target if about else None) or layout.target_of(given)
    if not named:
        raise CheckpointError(f"{source}: names no target: give --target")
    stand = TargetFiles.named(named)
    made = converted(given, layout, stand)
    with folder_beside(out) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in made.files.tensors.items()},
            temporary / "model.safetensors",
            metadata={"format": "pt"},
        )
        dtype = next(str(t.dtype).removeprefix("torch.") for t in made.files.tensors.values() if t.is_floating_point())
        write_json(temporary / "config.json", {**made.files.config, "dtype": dtype})
        for name in COPIED:
            if (source / name).exists():
                copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
                copy(source / name, temporary / name)
        stand.tokenizer.save_pretrained(temporary)
        draft = made.files.config.get("drafttrain_draft") or made.files.config.get("drafttrain", {}).get("draft")
        write_about(
            temporary,
            About(
                kind=made.files.kind,
                target=named,
                target_fingerprint=stand.fingerprint,
                tokenizer_fingerprint=tokenizer_fingerprint(stand.tokenizer),
                vocab_size=num_ids(stand.tokenizer),
                trained_steps=0,
                draft=draft or "sampled",
            ),
        )
        _read_back(temporary / "model.safetensors", made.files.tensors)
    return made


def layout_of(given: Given) -> Importer:
    """Return the layout of a folder.

    Raises:
        CheckpointError: It has no known layout or the marks of several, or is a drafter folder already.
    """
    if "drafttrain" in given.config:
        raise CheckpointError(
            f"{given.folder}: is already a drafter folder: continue training with drafter.checkpoint, or evaluate it"
        )
    if reason := why_unsupported(given):
        raise CheckpointError(f"{given.folder}: {reason}")
    layouts: dict[str, Importer] = {name: importers.entry(name).component() for name in importers.names()}
    found = {name: layout.claim for name, layout in layouts.items() if layout.recognises(given)}
    able = [name for name, claim in found.items() if claim == max(found.values())]
    if len(able) == 1:
        return layouts[able[0]]
    known = [f"{name}: {layout.known_by}" for name, layout in layouts.items()]
    what = f"has the marks of {' and '.join(able)}" if able else "has no known layout"
    raise CheckpointError("\n  ".join([f"{given.folder}: {what}. Layouts are recognised by:", *known]))


def converted(given: Given, layout: Importer, target: TargetFiles) -> Imported:
    """Return the drafter's files.

    Raises:
        CheckpointError: Lists all problems of the folder, each with its file and key.
    """
    made = layout.convert(given, target)
    problems = list(dict.fromkeys([*_tokenizer_problems(given, layout, target), *made.problems]))
    if not problems and made.files.kind != "causal_lm":
        problems = layout_problems(made.files, target.config)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(
            "\n  ".join([f"{given.folder}: cannot be imported for {target.name}: {count}", *on_one_screen(problems)])
        )
    made.notes[:0] = given.notes
    about = read_about(given.folder)
    if about is not None and about.target_fingerprint not in ("", target.fingerprint):
        made.notes.append(f"was trained for {about.target}, whose weights differ from {target.name}")
    return made


def _tokenizer_problems(given: Given, layout: Importer, target: TargetFiles) -> list[str]:
    """Return how the folder's tokenizer differs from the target's; only a causal LM must have one."""
    if layout.holds != "causal_lm" and not any((given.folder / name).is_file() for name in TOKENIZERS):
        return []
    try:
        check_same_tokenizer(target.tokenizer, load_tokenizer(given.folder), drafter=str(given.folder))
    except CheckpointError as error:
        return [str(error)]
    return []


def _check_place(source: Path, out: Path) -> None:
    """Check that nothing but a drafter folder would be overwritten."""
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise CheckpointError(f"{out}: is, or contains, the folder to import: give another --out")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / ABOUT).is_file())):
        raise CheckpointError(f"{out}: exists and is no drafter folder: give another --out")


def _read_back(path: Path, tensors: Mapping[str, Tensor]) -> None:
    held = read_tensors(path)
    wrong = [name for name, tensor in tensors.items() if not torch.equal(held[name], tensor)]
    if wrong or held.keys() != tensors.keys():
        raise CheckpointError(f"{path}: {len(wrong)} tensors read back differ from what was written: {wrong[:5]}")
