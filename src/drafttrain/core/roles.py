"""The roles of decoding, as Protocols: what a component must offer, and nothing of how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from drafttrain.core.generations import ForwardEvent, Generation
from drafttrain.core.proposals import Budget, Context, DraftStep, Exactness, LayerState, More, Proposal, Verdict
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Proposer(Protocol):
    """A drafter, or a training-free method, at inference. Owns its cache; serves a list of sequences."""

    needs: TargetNeeds
    """What it wants to see of the target for committed tokens."""

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start on new sequences whose prompts the target has read up to, not including, the last token."""
        ...

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one tree a sequence; budget 0 gives the root alone. `more` is asked before each further draft token."""
        ...

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Keep or roll back the cache. The contexts already hold the emitted tokens."""
        ...

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences, in this order: the others are finished."""
        ...


class FirstBlocks(Protocol):
    """The target's first blocks, which run on their own in the cache that the target's call then continues from."""

    def split_at(self, layer: int) -> None:
        """Let blocks 0..layer-1 be run on their own from now on."""
        ...

    def run_first_blocks(self, tokens: Sequence[Sequence[int]]) -> list[LayerState]:
        """Read new tokens of every sequence; return the states that enter block `layer`."""
        ...


@runtime_checkable
class DraftsInTarget(Protocol):
    """A proposer that drafts with the target's own first blocks; its proposals say where the target continues."""

    def share(self, blocks: FirstBlocks) -> None:
        """Take the blocks of the target that verifies, before `begin`."""
        ...


@runtime_checkable
class DraftsWithOwnCache(Protocol):
    """A proposer with a language model of its own, which may not be able to read several sequences together."""

    def why_alone(self, longest: int) -> str | None:
        """Return why sequences of up to so many tokens are read one at a time; None: they can be read together."""
        ...


class AcceptanceRule(Protocol):
    """Which draft tokens are kept. A pure function; may own frozen head weights, never a language model."""

    exactness: ClassVar[Exactness]

    @property
    def needs(self) -> TargetNeeds:
        """The state of the nodes that it is handed: one layer, or the final state, or none."""
        ...

    def __call__(
        self,
        proposal: Proposal,
        target_probs_NV: Tensor,
        node_hidden_ND: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[list[int], int]:
        """Return (accepted path from the root, the token after it)."""
        ...


class LengthPolicy(Protocol):
    """How many tokens to draft, and when to stop drafting."""

    def budget(self, context: Context) -> Budget:
        """Return the most that the next round may draft."""
        ...

    def more(self, step: DraftStep) -> bool | More:
        """Tell whether to draft another token; LAST: this one, and none after it."""
        ...

    def observe(self, verdict: Verdict) -> None:
        """Learn from a round."""
        ...


@runtime_checkable
class CostAware(Protocol):
    """A length policy that weighs tokens against time: it is shown a few outputs before the first that counts."""

    def calibrate(self, generations: Sequence[Generation]) -> None:
        """Learn from their times what a draft token and a target call cost."""
        ...


ForwardListener = Callable[[ForwardEvent], None]
