"""The sorted drafter: a causal LM whose first layers, with the shared final norm and head, are drafters too.

B = sequences, T = positions, D = hidden
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from drafttrain.core.batches import Beside, DraftBatch, DraftOutput
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.flops import BatchShape, Products, parameters_of
from drafttrain.core.foreign import read_json
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.decoding import PLAIN_MODELS
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.drafters.sorted_lm.proposer import RoutedProposer
from drafttrain.drafters.sorted_lm.routed_lm import RoutedLM
from drafttrain.drafters.sorted_lm.thresholds import DraftCosts, chosen_thresholds, exit_rows
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks, final_norm
from drafttrain.target_model.documents import document_states
from drafttrain.target_model.logits import head_of
from drafttrain.target_model.matrix_products import head_parameters

FILE = "exits.json"
"""The exits and the thresholds, next to config.json. Other loaders of the folder ignore this file."""


@dataclass
class SortedLMSettings(CausalLMSettings):
    """A separate causal LM that drafts after some of its layers too: one drafter, several sizes."""

    exits: list[int] = setting(
        [1],
        help="Layers after which it may draft, ascending, below its number of layers; the last layer is one more exit. Their losses are "
        "added.",
        ge=1,
    )
    thresholds: list[float] | None = setting(
        None,
        help="Of each exit and of the last layer: a token is drafted from the first exit whose largest probability is at least this; if "
        "none is, drafting stops. 0: always; above 1: never. null: chosen on the validation prompts after training.",
        ge=0,
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = super().check()
        if self.tokenizer is not None:
            problems.append("tokenizer: a sorted_lm has the target's: remove it, or use kind causal_lm")
        if not self.exits or self.exits != sorted(set(self.exits)):
            problems.append(f"exits: at least one layer, ascending, each once, got {self.exits}")
        elif self.init != "checkpoint" and self.exits[-1] >= self.num_layers:
            problems.append(f"exits: must be below num_layers {self.num_layers}, got {self.exits[-1]}")
        if self.thresholds is not None and len(self.thresholds) != len(self.exits) + 1:
            problems.append(
                f"thresholds: {len(self.exits) + 1} are needed, one for each of exits {self.exits} and one for the last layer, got "
                f"{len(self.thresholds)}"
            )
        return problems


@drafters.register("sorted_lm", SortedLMSettings)
class SortedLMDrafter(CausalLMDrafter):
    """A causal LM that is trained at several exits, and chooses one for each draft token. Lag 0, depth 1.

    Its drafts, in validation and in the logged loss, are those of the last layer; the exits are trained beside them.

    Sources: Kavehzadeh et al. 2024, S2D, arXiv 2407.01955; Valipour et al. 2023, SortedNet, arXiv 2309.00255.
    """

    kind = "sorted_lm"
    drafts_trees = False
    serving: ClassVar[str] = """\
No serving engine chooses an exit for each token; these figures are from the embedded evaluator. The folder is a plain language
model too, with exits.json beside it: `drafttrain extract DRAFTER OUT --layers N` writes its first layers as a drafter of kind
causal_lm, which engines load.

    drafttrain eval DRAFTER --target TARGET"""

    exits: tuple[int, ...] = ()
    """Layers after which it drafts, besides the last one."""
    given: tuple[float, ...] | None = None
    """The thresholds of the recipe; None: calibrated."""
    thresholds: Mapping[str, Sequence[float]] = {}
    """The calibrated thresholds by the fingerprint of the target."""

    @classmethod
    def _of(cls, model: Any, settings: Any, other: Any = None) -> Self:
        drafter = super()._of(model, settings, other)
        drafter._choose(settings.exits, settings.thresholds, name="drafter.exits")
        return drafter

    def _choose(self, exits: Sequence[int], given: Sequence[float] | None, *, name: str) -> None:
        """Set the exits.

        Raises:
            CheckpointError: The model has no such layers, or is not one that can be drafted with layer by layer.
        """
        if problems := list(exit_problems(self.model.config, exits, name=type(self.model).__name__)):
            raise CheckpointError(f"{name}: {'; '.join(problems)}")
        self.exits = tuple(exits)
        self.given = None if given is None else tuple(given)

    @property
    def replayable(self) -> bool:
        """Drafts are not always those of the last layer."""
        return False

    def thresholds_for(self, target: Target) -> Sequence[float]:
        """Return the thresholds: of the recipe, calibrated for this target, or for the one it was trained for; else 0 everywhere."""
        if self.given is not None:
            return self.given
        of_first = next(iter(self.thresholds.values()), (0.0,) * (len(self.exits) + 1))
        return self.thresholds.get(target.fingerprint, of_first)

    def _of_target_ids(self, batch: DraftBatch) -> DraftOutput:
        states_BTD, streams = document_states(
            self.model, batch.tokens_BT, batch.positions_BT, hidden=self.exits, documents=batch.packed_documents
        )
        head, norm = head_of(self.model), final_norm(self.model)
        of_exits = [DraftOutput({1: norm(streams[layer])}, head, self.lag) for layer in self.exits]
        beside = tuple(Beside(drafted, None, batch.target_rows) for drafted in of_exits)
        return DraftOutput({1: states_BTD}, head, self.lag, beside=beside)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of all blocks, and of the head at every exit for each trained label."""
        *trunk, head = super().products(shape)
        yield from trunk
        yield from [head] * (len(self.exits) + 1)

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer that chooses an exit for each token."""
        lm = RoutedLM(
            self.model,
            exits=self.exits,
            thresholds=self.thresholds_for(target),
            num_tokens=target.num_tokens,
            listener=listener,
        )
        return RoutedProposer(
            lm,
            rows=int(self.model.get_output_embeddings().weight.shape[0]),
            target_vocab_size=target.vocab_size,
            num_tokens=target.num_tokens,
            draft=self.draft,
        )

    def calibrate(self, target: Target, batches: Iterable[DraftBatch]) -> Mapping[str, Any]:
        """Return the file with the thresholds that draft fastest for this target, by parameters that are read."""
        if self.given is not None:
            return {}
        self.eval()
        whole = parameters_of(*blocks(target.model)) + head_parameters(target.model)
        of_layers = [parameters_of(block) / whole for block in blocks(self.model)]
        stops = [*self.exits, len(of_layers)]
        costs = DraftCosts([sum(of_layers[:stop]) for stop in stops], head_parameters(self.model) / whole)
        chosen, rate = chosen_thresholds(exit_rows(self, target, batches), costs)
        say(
            f"thresholds of exits {stops} for {target.name}: {chosen}, estimated {rate:.2f} tokens per cost of a "
            "target call"
        )
        self.thresholds = {**self.thresholds, target.fingerprint: chosen}
        return {FILE: self._file()}

    def _file(self) -> dict[str, Any]:
        thresholds = {target: list(values) for target, values in self.thresholds.items()}
        return {"exits": list(self.exits), "given": self.given and list(self.given), "thresholds": thresholds}

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder, and the exits."""
        super().save(folder)
        write_json(folder / FILE, self._file())

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Self:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The exits are damaged, or have no place in this model.
        """
        drafter, path = cls._of_folder(folder, target, dtype), folder / FILE
        held = read_json(path)
        exits, given, thresholds = (held.get(name) for name in ("exits", "given", "thresholds"))
        if not (
            isinstance(exits, list) and exits and all(type(one) is int and one >= 1 for one in exits)
        ) or exits != sorted(set(exits)):
            raise CheckpointError(f"{path}: exits must be layers, ascending, got {exits!r:.60}")
        lists = [
            *([] if given is None else [given]),
            *(thresholds.values() if isinstance(thresholds, dict) else [None]),
        ]
        wrong = [one for one in lists if not _are_thresholds(one, count=len(exits) + 1)]
        if wrong:
            raise CheckpointError(
                f"{path}: thresholds must be {len(exits) + 1} numbers from 0, for each of exits {exits} and the last layer, got {wrong[0]!r:.60}"
            )
        drafter._choose(exits, given, name=f"{path}: exits")
        assert isinstance(thresholds, dict), "checked above"
        drafter.thresholds = thresholds
        return drafter


def exit_problems(config: Any, exits: Sequence[int], *, name: str | None = None) -> Iterator[str]:
    """Yield why a model cannot have these exits.

    Args:
        name: Of its class; None: as its configuration says.
    """
    for one in [name] if name is not None else config.architectures or ():
        if one not in PLAIN_MODELS:
            yield f"exits need a drafter that is a {', '.join(PLAIN_MODELS)}, got {one}"
    if exits[-1] >= config.num_hidden_layers:
        yield f"exits must be below the drafter's {config.num_hidden_layers} layers, got {exits[-1]}"


def _are_thresholds(values: Any, *, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(one) in (int, float) and one >= 0 for one in values)
    )
