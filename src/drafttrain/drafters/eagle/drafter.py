"""The base of EAGLE-1 and EAGLE-3: the rollout that both are trained by, embedding, proposer and folder.

B = sequences, T = positions, D = hidden, F = width of the target features, X = input width of the layer's projections,
C, M: see `core.batches`, H = heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, ReadSlots
from drafttrain.core.few_sizes import is_compiled_by_size
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.target_rows import RowsAsked
from drafttrain.drafters import Drafter
from drafttrain.drafters.eagle.folder import save_folder
from drafttrain.drafters.eagle.layer import compute_dtype
from drafttrain.drafters.eagle.model import EagleModel
from drafttrain.drafters.eagle.proposer import EagleProposer
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.recomputing import run_part
from drafttrain.losses.align import read_slots
from drafttrain.target_model import Target
from drafttrain.target_model.packed_attention import Columns


class EagleDrafter(Drafter):
    """A drafter of one layer over (embedding of the next token, target feature). Subclasses implement `EagleModel`."""

    config: dict[str, Any]
    own: dict[str, Any]
    """Settings of training and drafting, stored in config.json under `drafttrain`; engines ignore them."""
    recomputes = True
    compiles = True
    adapted_in: ClassVar[tuple[str, ...]] = ("fc", "layers", "midlayer", "block")
    reads_slots: ClassVar[bool] = True
    fc: nn.Linear
    _parts: TargetParts

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return embedded_BTD: the rows of the target's matrix, which engines share with these layers without its factor."""
        return self._parts.embedding_rows(tokens_BT, dtype=compute_dtype(self.fc.weight))

    def embed_at(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Return embedded_BTD, which most kinds read alike at every position."""
        return self.embed(tokens_BT)

    def rows_asked(self) -> list[RowsAsked]:
        """Return the rows of every step of the rollout."""
        return [self._rows_of(self.own["num_steps"])]

    def slots(self, batch: DraftBatch, *, num_steps: int) -> ReadSlots:
        """Return the slots whose states are read: in training those of the trained rows, else all."""
        if not self.training:
            return ReadSlots.all(batch.positions_BT)
        slots = read_slots(batch, self._rows_of(num_steps))
        by_size = is_compiled_by_size(self.fc.weight.device, compute_dtype(self.fc.weight))
        return slots.padded(batch.tokens_BT.numel()) if by_size else slots

    def _rows_of(self, num_steps: int) -> RowsAsked:
        return RowsAsked(tuple(range(1, num_steps + 1)), self.lag)

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile the layer except for its attention, which is a kernel already."""
        model = cast(EagleModel, self)
        self.__dict__["entering"] = compiled(model.entering)
        model.layer.__dict__["finish"] = compiled(model.layer.finish)

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer of chains and dynamic trees."""
        return EagleProposer(cast(EagleModel, self), target, listener)

    def trained_as(self, own: dict[str, Any]) -> Self:
        """Return this drafter in training mode, with these training settings."""
        self.config["drafttrain"] = self.own = own
        self.draft = own["draft"]
        return self.train()

    def save(self, folder: Path) -> None:
        """Write the folder with the weight names that serving engines load."""
        save_folder(folder, self.config, self)


def rollout(
    model: EagleModel,
    batch: DraftBatch,
    features_BTF: Tensor,
    *,
    num_steps: int,
    slots: ReadSlots,
    drafted: Callable[[Tensor, int], Tensor] | None = None,
    recompute: bool = False,
) -> dict[int, Tensor]:
    """Return the layer's states of depths 1..num_steps at the slots that are read; 0 elsewhere.

    The training-time test: the drafter is trained on its own states, as it will meet them at inference.

    Step k = 0, 1, ... embeds the token k + 1 places ahead at position t + k, and reads the state of step k - 1 at the same
    slot. It attends to the keys of step 0 up to its slot, within its document, and to the keys of later steps at its own
    slot only: exactly the cache of a chain of k draft tokens after slot t.

    Args:
        drafted: Returns tokens_1M from states_1MD of a depth. From step 1 on they are embedded in place of the data's.
        recompute: Store the state, key and value of each step only, and compute the rest again in the backward pass.

    Source: Li et al. 2025, EAGLE-3, arXiv 2503.01840, 3.2.
    """
    layer = model.layer
    positions_1C = slots.columns(batch.positions_BT)
    positions_1M = slots.queries(positions_1C)

    def first(features_1CF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return state_1MD, and the keys and values of all columns."""
        embedded_1CD = model.embed_at(_ahead(batch, slots, 1), positions_1C)
        inputs_1CX, residual_1CD = model.entering(embedded_1CD, model.fused(features_1CF))
        keys_1GCd, values_1GCd = layer.keys_and_values(inputs_1CX, positions_1C)
        # From here on the layer computes only the slots that are read.
        inputs_1MX, residual_1MD = slots.queries(inputs_1CX), slots.queries(residual_1CD)
        columns = Columns(keys_1GCd, values_1GCd, slots.documents)
        attended_1HMd = columns.attend(layer.queries(inputs_1MX, positions_1M), [])
        return layer.finish(attended_1HMd, residual_1MD), keys_1GCd, values_1GCd

    def later(tokens_1M: Tensor, step: int, *before: tuple[Tensor, Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """Return the function from a state to that of the next depth, and to its slots' own key and value."""

        def run(state_1MD: Tensor) -> tuple[Tensor, ...]:
            embedded_1MD = model.embed_at(tokens_1M, positions_1M + step)
            inputs_1MX, residual_1MD = model.entering(embedded_1MD, model.fed_back(state_1MD))
            own = layer.keys_and_values(inputs_1MX, positions_1M + step)
            query_1HMd = layer.queries(inputs_1MX, positions_1M + step)
            return layer.finish(columns.attend(query_1HMd, [*before, own]), residual_1MD), *own

        return run

    state_1MD, keys_1GCd, values_1GCd = run_part(first, slots.columns(features_BTF), recompute=recompute)
    columns = Columns(keys_1GCd, values_1GCd, slots.documents)
    states = {1: state_1MD}
    own: list[tuple[Tensor, Tensor]] = []
    for step in range(1, num_steps):
        of_data_1M = slots.queries(_ahead(batch, slots, step + 1))
        tokens_1M = of_data_1M if drafted is None else drafted(states[step], step)
        states[step + 1], key_1GMd, value_1GMd = run_part(
            later(tokens_1M, step, *own), states[step], recompute=recompute
        )
        own.append((key_1GMd, value_1GMd))
    return {depth: slots.spread(state_1MD, batch.tokens_BT) for depth, state_1MD in states.items()}


def _ahead(batch: DraftBatch, slots: ReadSlots, places: int) -> Tensor:
    """Return the token `places` ahead of each column. No trained row reads beyond its document's end."""
    return slots.columns(batch.tokens_BT.flatten().roll(-places).view_as(batch.tokens_BT))
