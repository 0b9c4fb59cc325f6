"""The target: one frozen Hugging Face causal LM behind one small interface.

B = sequences, T = positions, V = vocabulary, D = hidden, N = rows
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from drafttrain.core import digests
from drafttrain.core.console import say_once
from drafttrain.core.errors import CheckpointError, DrafttrainError
from drafttrain.core.foreign import check_folder
from drafttrain.core.packed_documents import PackedDocuments
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetNeeds, TargetOutput, TargetRows
from drafttrain.core.tensors import check_finite, check_number_types
from drafttrain.target_model.anatomy import position_limit
from drafttrain.target_model.attention import refuse_attention
from drafttrain.target_model.documents import document_states
from drafttrain.target_model.ends import end_ids, say_ends
from drafttrain.target_model.logits import head_logits
from drafttrain.target_model.model_folder import check_causal_lm, check_model_files, in_one_line, no_folder
from drafttrain.target_model.number_type import type_on_gpu
from drafttrain.target_model.sizes import refuse_sizes
from drafttrain.target_model.weights_digest import weights_digest
from drafttrain.target_model.wrapped import language_model_inside, loader_of

BUILTIN = "builtin:"
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")
"""Files of a model of the hub that are fetched."""
TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
    ),
    *("*.model", "chat_template.*", "additional_chat_templates/*.jinja"),
)


@dataclass
class TargetSettings:
    """The frozen model whose output must be kept."""

    model: str | None = setting(
        "builtin:target",
        help="A local folder, a hub id, builtin:target, or recipe:NAME, what that recipe makes; null: no target, only a tokenizer.",
    )
    tokenizer: str | None = setting(None, help="Folder or hub id of the tokenizer; null: the model's own.")
    revision: str | None = setting(None, help="Branch, tag or commit of a hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64", "stored"] = setting(
        "auto",
        help="Type of the target's weights in memory. auto: on CUDA, above a billion weights, the half type that they are stored "
        "in, or bfloat16; else float32. stored: as in its files. A run keeps what it began with.",
    )
    device: str = setting("auto", help="cpu, cuda, cuda:1 ...; auto: cuda where there is one.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = setting("sdpa", help="Attention of transformers.")
    trust_remote_code: bool = setting(False, help="Run code that comes with the model.")

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.model is None and self.tokenizer is None:
            return ["model: null needs a tokenizer: set target.tokenizer"]
        return []


def resolve_folder(name: str, *, revision: str | None = None) -> Path:
    """Return the local folder of a builtin name, a path or a hub id (which is fetched).

    Raises:
        CheckpointError: There is no such folder, and no such id in the hub or its cache.
    """
    if name.startswith(BUILTIN):
        folder = Path(str(resources.files("drafttrain") / "builtin" / name.removeprefix(BUILTIN)))
        if folder.is_dir():
            return folder
        known = sorted(f"{BUILTIN}{path.name}" for path in folder.parent.glob("*") if path.is_dir())
        raise CheckpointError(f"{name}: no such builtin. Available: {', '.join(known) or 'none'}")
    folder = Path(os.path.expanduser(name))  # where a user is unknown, the name stays
    if folder.is_dir():
        return folder
    if reason := no_folder(name):
        raise CheckpointError(f"{name}: {reason}")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name}: neither a local folder nor a hub id that could be fetched ({type(error).__name__})"
        ) from error


def cached_folder(name: str, *, revision: str | None = None) -> Path | None:
    """Return the local folder of a name without asking the hub; None: a hub id that was not fetched.

    Raises:
        CheckpointError: There is no such folder, and the name is no hub id.
    """
    local = name.startswith((BUILTIN, ".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
    if local:
        return resolve_folder(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS), local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def fingerprint_of(folder: Path) -> str:
    """Return a short digest of a model folder: its configuration and its weights (`core.digests` says which bytes of them)."""
    check_model_files(folder)
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in [folder / "config.json", *files]:
        digest.update(f"{path.name}:{digests.weights_digest(path)}\n".encode())
    return digest.hexdigest()[:16]


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder that decide how text and chats become ids."""
    return sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a short digest of the map from tokens to ids."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def num_ids(tokenizer: Any) -> int:
    """Return how many ids a tokenizer can produce, from 0."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_same_tokenizer(target_tokenizer: Any, drafter_tokenizer: Any, *, drafter: str) -> None:
    """Refuse a drafter whose tokenizer differs from the target's in one token, naming it.

    Raises:
        CheckpointError: With the first tokens that differ.
    """
    ours, theirs = target_tokenizer.get_vocab(), drafter_tokenizer.get_vocab()
    different = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: ours.get(token, theirs.get(token)),
    )
    if different:
        shown = ", ".join(
            f"{t!r} (target {ours.get(t, 'none')}, drafter {theirs.get(t, 'none')})" for t in different[:5]
        )
        raise CheckpointError(
            f"{drafter}: its tokenizer differs from the target's in {len(different)} of {len(ours)} tokens: {shown}. "
            "Use a drafter with the target's own tokenizer."
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder."""
    from transformers import AutoTokenizer

    check_folder(folder)
    if not tokenizer_files(folder):
        raise CheckpointError(
            f"{folder}: no tokenizer here (no tokenizer.json): give its folder, as target.tokenizer of a target"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exceptions, and what the content of a broken file leads to
        raise CheckpointError(f"{folder}: no tokenizer could be read here: {in_one_line(error)}") from error


def load_causal_lm(
    folder: Path, *, dtype: str = "float32", attention: str | None = "sdpa", trust_remote_code: bool = False
) -> Any:
    """Return the causal LM of a folder, from safetensors only.

    Args:
        attention: Of transformers; None: the quickest that the model and this machine have.

    Raises:
        CheckpointError: There is none, or not with this attention.
    """
    check_causal_lm(folder, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = loader_of(folder, trust_remote_code=trust_remote_code).from_pretrained(
            str(folder),
            dtype="auto" if dtype == "stored" else getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # what the content of a folder, or the code that comes with it, leads transformers to
        refuse_attention(folder, attention, trust_remote_code=trust_remote_code)
        refuse_sizes(folder, trust_remote_code=trust_remote_code)
        raise CheckpointError(f"{folder}: no causal LM could be read here: {in_one_line(error)}") from error
    model, report = loaded
    model = language_model_inside(model, folder)
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing from the file: {', '.join(missing[:5])}")
    if unread := sorted(report["unexpected_keys"]):
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        say_once(f"{folder}: weights that the model has no place for are not read: {', '.join(unread[:3])}{more}")
    if getattr(model.config, "quantization_config", None) is None:
        check_finite(model.state_dict(), where=str(folder))
        check_number_types(folder)
    return model


def pick_device(name: str) -> torch.device:
    """Return the device that a setting names; auto is cuda where there is one.

    Raises:
        DrafttrainError: There is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DrafttrainError(f"device {name!r}: must be cpu, cuda, cuda:1 ..., or auto") from error
    if device.type == "cuda" and (device.index or 0) >= count:
        there = ", ".join(f"cuda:{number}" for number in range(count)) or "none"
        raise DrafttrainError(
            f"device {name}: no such CUDA device here, there is {there}: choose one of them, cpu or auto"
        )
    return device


def kind_of_device(name: str) -> str:
    """Return the kind of device that a setting names, cuda or cpu, whether or not it is here; auto is cuda where there is one."""
    return pick_device("auto").type if name == "auto" else name.partition(":")[0]


def number_type(settings: TargetSettings) -> str:
    """Return the type that the settings name, and where they say auto what that is here."""
    if settings.dtype != "auto" or settings.model is None:
        return settings.dtype
    if kind_of_device(settings.device) != "cuda":
        return "float32"
    return type_on_gpu(resolve_folder(settings.model, revision=settings.revision))


class LiveRows:
    """The target's law from its final states: the head runs only on the rows that are asked for."""

    def __init__(self, model: Any, final_BTD: Tensor) -> None:
        self._model = model
        self._final_BTD = final_BTD

    def each(self, change: Callable[[Tensor], Tensor]) -> LiveRows:
        """Return the same of changed tensors: moved, pinned."""
        return LiveRows(self._model, change(self._final_BTD))

    def at(self, index_N: Tensor) -> Tensor:
        """Return logits_NV of the token after each flat position."""
        with torch.no_grad():
            final_RD = self._final_BTD.flatten(0, 1)
            final_ND = final_RD.index_select(0, index_N.to(final_RD.device))
            # Stored states may have another type than the head.
            return head_logits(self._model, final_ND.to(self._model.dtype)).to(index_N.device)


class Target:
    """A frozen causal LM, its tokenizer, and their fingerprints."""

    spread: ClassVar[bool] = False
    """Its weights are spread over the processes, which must all run it together."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, fingerprint: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, settings: TargetSettings) -> Target:
        """Read a target from its folder or hub id."""
        if settings.model is None:
            raise CheckpointError("target.model is null: this step needs a target")
        folder, device = resolve_folder(settings.model, revision=settings.revision), pick_device(settings.device)
        model = load_causal_lm(
            folder,
            dtype=number_type(settings),
            attention=settings.attention,
            trust_remote_code=settings.trust_remote_code,
        )
        model.to(device)
        return cls(model, load_target_tokenizer(settings), name=settings.model, fingerprint=fingerprint_of(folder))

    @property
    def device(self) -> torch.device:
        """Where the target runs."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def check_length(self, length: int, *, what: str) -> None:
        """Refuse texts that are longer than the positions that the target has embeddings for.

        Raises:
            CheckpointError: Naming `what` to shorten.
        """
        limit = position_limit(self.model)
        if limit is not None and length > limit:
            raise CheckpointError(f"{what}: {length} tokens are more than the {limit} positions of {self.name}")

    @property
    def vocab_size(self) -> int:
        """Rows of the target's head, padding included."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def num_tokens(self) -> int:
        """Ids that the tokenizer can produce; ids from here to `vocab_size` are padding."""
        return min(self.vocab_size, num_ids(self.tokenizer))

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Digest of the tokenizer's map."""
        return tokenizer_fingerprint(self.tokenizer)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: all that generation config, configuration and tokenizer name, as engines stop."""
        say_ends(self.model, self.tokenizer, name=self.name)
        return end_ids(self.model, self.tokenizer)

    @torch.no_grad()
    def read(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        needs: TargetNeeds,
        *,
        documents: PackedDocuments | None = None,
    ) -> TargetOutput:
        """Return what the target knows of packed rows: a document sees nothing of the others in its row.

        Args:
            documents: Where they lie, if it is known: see `document_states`.
        """
        final_BTD, hidden_BTD = document_states(
            self.model,
            tokens_BT.to(self.device),
            positions_BT.to(self.device),
            hidden=needs.hidden,
            documents=documents and documents.each(lambda tensor: tensor.to(self.device)),
        )
        return TargetOutput(
            logits_BTV=head_logits(self.model, final_BTD) if needs.logits else None,
            hidden_BTD=hidden_BTD,
            final_BTD=final_BTD if needs.final else None,
        )

    def rows_of(self, seen: TargetOutput) -> TargetRows:
        """Return the law over a batch whose final states were read."""
        assert seen.final_BTD is not None, "read the batch with TargetNeeds(final=True)"
        return LiveRows(self.model, seen.final_BTD)

    @contextmanager
    def at_work(self) -> Iterator[Target]:
        """Yield the target that runs on this process's own share of a work, whatever the others have to do.

        Every process of the run must enter, also one without a share.
        """
        yield self

    def rest(self) -> None:
        """Let go of what only `at_work` needs: training begins."""

    def weights_digest(self) -> str:
        """Return the digest of the weights in memory, to prove that they stayed frozen."""
        return weights_digest(self.model)


def load_target_tokenizer(settings: TargetSettings) -> Any:
    """Return the tokenizer that the settings name, without reading any weights."""
    return load_tokenizer(tokenizer_folder(settings), trust_remote_code=settings.trust_remote_code)


def tokenizer_folder(settings: TargetSettings) -> Path:
    """Return the folder of the tokenizer that the settings name."""
    name = settings.tokenizer or settings.model
    assert name is not None, "TargetSettings.check asks for one of them"
    return resolve_folder(name, revision=settings.revision if settings.tokenizer is None else None)
