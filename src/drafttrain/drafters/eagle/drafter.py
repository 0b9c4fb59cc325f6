"""The base of EAGLE-1 and EAGLE-3: embedding, proposer and folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, ReadSlots
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.target_rows import RowsAsked
from drafttrain.drafters import Drafter
from drafttrain.drafters.eagle.folder import save_folder
from drafttrain.drafters.eagle.layer import compute_dtype
from drafttrain.drafters.eagle.proposer import EagleProposer
from drafttrain.drafters.eagle.rollout import EagleModel
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.losses.align import read_slots
from drafttrain.target_model import Target


class EagleDrafter(Drafter):
    """A drafter of one layer over (embedding of the next token, target feature). Subclasses implement `EagleModel`."""

    config: dict[str, Any]
    own: dict[str, Any]
    """Settings of training and drafting, stored in config.json under `drafttrain`; engines ignore them."""
    compiles = True
    reads_slots: ClassVar[bool] = True
    fc: nn.Linear
    _parts: TargetParts

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return embedded_BTD."""
        return self._parts.embed(tokens_BT, dtype=compute_dtype(self.fc.weight))

    def rows_asked(self) -> list[RowsAsked]:
        """Return the rows of every step of the rollout."""
        return [self._rows_of(self.own["num_steps"])]

    def slots(self, batch: DraftBatch, *, num_steps: int) -> ReadSlots:
        """Return the slots whose states are read: in training those of the trained rows, else all."""
        return read_slots(batch, self._rows_of(num_steps)) if self.training else ReadSlots.all(batch.positions_BT)

    def _rows_of(self, num_steps: int) -> RowsAsked:
        return RowsAsked(tuple(range(1, num_steps + 1)), self.lag)

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile the layer except for its attention, which is a kernel already."""
        model = cast(EagleModel, self)
        self.__dict__["entering"] = compiled(model.entering)
        model.layer.__dict__["finish"] = compiled(model.layer.finish)

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer of chains and dynamic trees."""
        return EagleProposer(
            cast(EagleModel, self),
            vocab_size=target.vocab_size,
            num_tokens=target.num_tokens,
            device=target.device,
            listener=listener,
            greedy=self.draft == "greedy",
        )

    def trained_as(self, own: dict[str, Any]) -> Self:
        """Return this drafter in training mode, with these training settings."""
        self.config["drafttrain"] = self.own = own
        self.draft = own["draft"]
        return self.train()

    def save(self, folder: Path) -> None:
        """Write the folder with the weight names that serving engines load."""
        save_folder(folder, self.config, self)
