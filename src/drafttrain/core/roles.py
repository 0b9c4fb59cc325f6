"""The roles of decoding, as Protocols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from drafttrain.core.generations import ForwardEvent, Generation
from drafttrain.core.proposals import Budget, Context, DraftStep, Exactness, LayerState, More, Proposal, Verdict
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from drafttrain.core.target_probs import TargetProbs


class Proposer(Protocol):
    """A drafter, or a training-free method, at inference. It owns its cache and drafts for a list of sequences."""

    needs: TargetNeeds
    """What it reads from the target for committed tokens; asked before each of the target's calls."""

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start new sequences. The target has read their prompts without the last token."""
        ...

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one tree per sequence; budget 0 gives only the root. Call `more` before each further draft token."""
        ...

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Update the cache to the committed text. The contexts already contain the emitted tokens.

        Args:
            seen: The states that it needs, of the accepted nodes; and the logits of ALL nodes, also of rejected ones.
        """
        ...

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences, in this order: the others are finished."""
        ...


class FirstBlocks(Protocol):
    """The target's first blocks, run on their own. The target's call then continues from the same cache."""

    def split_at(self, layer: int) -> None:
        """From now on, allow running blocks 0..layer-1 on their own."""
        ...

    def move_split(self, layer: int) -> None:
        """Between rounds, split at another block that `split_at` has tried."""
        ...

    def run_first_blocks(self, tokens: Sequence[Sequence[int]], *, passed: Sequence[int] = ()) -> list[LayerState]:
        """Read new tokens of every sequence; return the states that enter block `layer`, and earlier blocks if asked for."""
        ...


@runtime_checkable
class DraftsInTarget(Protocol):
    """A proposer that drafts with the target's own blocks, on its cache.

    Proposals of one that runs the first blocks (`FirstBlocks`) contain the state to continue from.
    """

    def share(self, target: Any) -> None:
        """Store the verifying target's `CachedLM`, and set its `rows_beside` to add rows to its calls. Called before `begin`."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """A proposer with a state that lives across prompts."""

    def forget(self) -> None:
        """Return to the state before the first prompt."""
        ...


@runtime_checkable
class DraftsWithOwnCache(Protocol):
    """A proposer with its own language model, which may not be able to read several sequences at once."""

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return why sequences of up to `longest` tokens must be read one at a time; None: they can be batched."""
        ...


@runtime_checkable
class DraftsAhead(DraftsWithOwnCache, Proposer, Protocol):
    """A proposer that needs nothing of the target, so it can draft after text that is not committed yet."""

    def continue_from(self, texts: Sequence[Sequence[int]], drafted: Sequence[Proposal]) -> None:
        """Continue from these texts instead of observing verdicts.

        Args:
            drafted: The proposals of the last round.
        """
        ...


class AcceptanceRule(Protocol):
    """Decides which draft tokens are accepted. A pure function; it may own frozen head weights, but no language model."""

    exactness: ClassVar[Exactness]

    @property
    def needs(self) -> TargetNeeds:
        """The target states of the nodes that it reads: of one layer, the final ones, or none."""
        ...

    def __call__(
        self,
        proposal: Proposal,
        target_probs: TargetProbs,
        node_hidden_ND: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[list[int], int | None]:
        """Return (accepted path from the root, the token after it); no token after an unread leaf."""
        ...


class LengthPolicy(Protocol):
    """Decides how many tokens to draft, and when to stop."""

    def budget(self, context: Context) -> Budget:
        """Return the largest draft of the next round."""
        ...

    def more(self, step: DraftStep) -> bool | More:
        """Return whether to draft another token; LAST: this one, and none after it."""
        ...

    def observe(self, verdict: Verdict) -> None:
        """Update from the verdict of a round."""
        ...


@runtime_checkable
class SchedulesBatch(Protocol):
    """A length policy that decides for all sequences of a round together, once their chains are drawn, what is verified.

    Whether a token is verified must not depend on it, nor on a later token of its chain, whose distribution depends on it.
    """

    def schedule(self, num_sequences: int) -> Sequence[int]:
        """Return the number of draft tokens of each sequence that are verified, at most those that it drafted."""
        ...


@runtime_checkable
class BudgetsBatch(Protocol):
    """A length policy that decides for all sequences of a round together, before they are drafted, what may be drafted."""

    def budgets(self, contexts: Sequence[Context]) -> Sequence[Budget]:
        """Return the largest draft of each sequence in the next round."""
        ...


@runtime_checkable
class CostAware(Protocol):
    """A length policy, or a proposer, that measures before it decides. It is calibrated on a few outputs before the measured ones."""

    def calibrate(self, generations: Sequence[Generation], events: Sequence[ForwardEvent] = ()) -> None:
        """Estimate what it needs from these outputs and the calls of both models that wrote them."""
        ...


ForwardListener = Callable[[ForwardEvent], None]
