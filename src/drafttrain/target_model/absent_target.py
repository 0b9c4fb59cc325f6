"""A target without its blocks, for training from cached outputs. The whole target is loaded only to compute missing ones.

B = sequences, T = positions
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from drafttrain.core.batches import PackedDocuments
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.images import PlacedImages
from drafttrain.core.memory import return_memory
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.tensors import TensorFiles
from drafttrain.target_model.device import pick_device
from drafttrain.target_model.folders import fingerprint_of, resolve_folder
from drafttrain.target_model.logits import check_logits
from drafttrain.target_model.meta_model import load_tensors, meta_model, outer_modules, stored_tensors
from drafttrain.target_model.number_type import number_type
from drafttrain.target_model.settings import TargetSettings
from drafttrain.target_model.target import Target
from drafttrain.target_model.tokenizer import load_target_tokenizer


def target_folder(settings: TargetSettings) -> Path:
    """Return the folder of the target.

    Raises:
        CheckpointError: There is no target, or no such folder.
    """
    if settings.model is None:
        raise CheckpointError("target.model is null: this step needs a target")
    return resolve_folder(settings.model, revision=settings.revision)


def bare_model(settings: TargetSettings) -> Any:
    """Return the target's model on the meta device, without weights."""
    return meta_model(
        target_folder(settings),
        dtype=number_type(settings),
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        device=pick_device(settings.device),
    )


def outer_model(settings: TargetSettings) -> Any:
    """Return the target's model with only the weights of embedding, final norm and head."""
    model, files = bare_model(settings), TensorFiles(target_folder(settings))
    load_tensors(model, stored_tensors(*outer_modules(model)), files, device=pick_device(settings.device))
    return model


class AbsentTarget(Target):
    """Configuration, embedding, final norm and head. The blocks have no weights."""

    def __init__(self, settings: TargetSettings, model: Any, tokenizer: Any, *, fingerprint: str) -> None:
        super().__init__(model, tokenizer, name=str(settings.model), fingerprint=fingerprint)
        self._settings = settings
        self._whole: Target | None = None

    @classmethod
    def load(cls, settings: TargetSettings) -> AbsentTarget:
        """Load everything outside a target's blocks from its folder."""
        model, fingerprint = outer_model(settings), fingerprint_of(target_folder(settings))
        check_logits(model)
        return cls(settings, model, load_target_tokenizer(settings), fingerprint=fingerprint)

    @contextmanager
    def for_own_share(self) -> Iterator[Target]:
        """Yield the whole target. It stays in memory until `release`."""
        if self._whole is None:
            say(f"{self.name}: loaded with its blocks, to compute outputs that are not cached yet")
            self._whole = Target.load(self._settings)
        yield self._whole

    def release(self) -> None:
        """Release the whole target."""
        if self._whole is None:
            return
        say(f"{self.name}: blocks released, training reads cached outputs")
        self._whole = None
        return_memory()

    def read(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        needs: TargetNeeds,
        *,
        documents: PackedDocuments | None = None,
        images: Sequence[PlacedImages] = (),
    ) -> TargetOutput:
        """Refuse to run without blocks.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(
            f"{self.name}: is not loaded (train.target_placement: absent), and its outputs on this text are not cached. "
            "Use train.target_placement: sharded or replicated"
        )
