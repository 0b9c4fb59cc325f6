"""The dataclasses that travel between rooms.

B = sequences, T = positions, V = vocabulary, D = hidden, K = draft depth, N = rows (trained positions, or nodes of a tree)

Indices. `hidden_BTD[i]`, i = 0..n, is the residual stream ENTERING block i (0 the embedding, n after the last block, BEFORE
the final norm); `final_BTD` is the state after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from drafttrain.core.flops import BatchShape, shape_of

if TYPE_CHECKING:
    from torch import Tensor

    from drafttrain.core.device_time import Span
    from drafttrain.core.packed_documents import PackedDocuments, ReadSlots


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; the same rule is used on target and drafter rows."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""


@dataclass(frozen=True)
class LoggedLaw:
    """What a log says of the target's law at the labels of a record, in their order: some tokens by name, the rest by its mass.

    K = tokens named at most
    """

    ids_NK: Any
    """int32 array; -1 where a row names fewer tokens."""
    log_probs_NK: Any
    """float32 array; -inf there. What the row's probabilities lack to 1 is the tail."""


@dataclass(frozen=True)
class Record:
    """One text with what is to be learned of it."""

    id: str
    tokens: Sequence[int]
    loss_mask: Sequence[bool]
    """True where the token is a training label."""
    domain: str = ""
    sampling: Sampling | None = None
    """How the target drew the labelled tokens; None: it did not."""
    drawn_by: str = ""
    """Fingerprint or version of the model that drew them."""
    refused: Sequence[int] | None = None
    """Positions where the target refused the drafter's token (serving logs); None: not known."""
    num_rounds: int | None = None
    """Rounds of speculation that wrote the labelled tokens (serving logs); None: not known."""
    cache: str = ""
    """Where what the target knows of this record is stored; empty: nowhere."""
    law: LoggedLaw | None = None
    """What a serving log says of the target's law; None: nothing."""


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class TargetNeeds:
    """What is asked of the target; nothing else is computed or stored."""

    logits: bool = False
    hidden: tuple[int, ...] = ()
    """States by the block that they enter; n or -1: after the last block, before the final norm."""
    final: bool = False

    def __or__(self, other: TargetNeeds) -> TargetNeeds:
        hidden = tuple(sorted({*self.hidden, *other.hidden}))
        return TargetNeeds(self.logits or other.logits, hidden, self.final or other.final)


@dataclass(frozen=True)
class TargetOutput:
    """What the frozen target knows about a batch: only what was asked for."""

    logits_BTV: Tensor | None = None
    hidden_BTD: Mapping[int, Tensor] = field(default_factory=dict)
    final_BTD: Tensor | None = None

    def has(self, needs: TargetNeeds) -> bool:
        """Tell whether everything that is needed is here."""
        return (
            (self.logits_BTV is not None or not needs.logits)
            and (self.final_BTD is not None or not needs.final)
            and set(needs.hidden) <= set(self.hidden_BTD)
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> TargetOutput:
        """Return the same of changed tensors: moved, pinned."""
        return TargetOutput(
            logits_BTV=None if self.logits_BTV is None else change(self.logits_BTV),
            hidden_BTD={index: change(state) for index, state in self.hidden_BTD.items()},
            final_BTD=None if self.final_BTD is None else change(self.final_BTD),
        )

    def to(self, device: Any) -> TargetOutput:
        """Return the same on `device`."""
        return self.each(lambda tensor: tensor.to(device))


class TargetRows(Protocol):
    """The target's law at chosen positions of a batch, from a live model or from a cache."""

    def at(self, index_N: Tensor) -> Tensor:
        """Return logits_NV (or log-probabilities) of the token AFTER each flat position b * T + t."""
        ...


@dataclass(frozen=True)
class NamedRows:
    """Rows of a law of which K tokens are known by name."""

    ids_NK: Tensor
    """-1 where a row names fewer tokens."""
    log_probs_NK: Tensor
    """-inf there."""

    @property
    def tail_N(self) -> Tensor:
        """The mass of all tokens that are not named."""
        return (1 - self.log_probs_NK.double().exp().sum(dim=-1)).clamp_min(0).to(self.log_probs_NK.dtype)


@runtime_checkable
class NamedTargetRows(Protocol):
    """A law of which only some tokens are known by name, as serving logs have it."""

    def named(self, index_N: Tensor) -> NamedRows:
        """Return what is known of the law of the token AFTER each flat position b * T + t."""
        ...


@runtime_checkable
class StoredTargetRows(Protocol):
    """A law that comes with its batch, and goes where the batch goes."""

    def each(self, change: Callable[[Tensor], Tensor]) -> TargetRows:
        """Return the same of changed tensors: moved, pinned."""
        ...


@dataclass(frozen=True)
class RowIndex:
    """Where loss rows come from; the same order as the rows."""

    sequence_N: Tensor
    depth_N: Tensor
    block_N: Tensor
    """Rows of one block are the successive depths of one draft: of one root, or of one window of a chain."""
    step: int = 0
    deepest: int = 0
    """The largest depth that there can be, known without asking the device; 0: not known."""
    learnable_N: Tensor | None = None
    """Rows that count; None: all. The others have loss 0, and no part in means or blocks."""

    def each(self, change: Callable[[Tensor], Tensor]) -> RowIndex:
        """Return the same of changed tensors: moved, pinned, cut."""
        return replace(
            self,
            sequence_N=change(self.sequence_N),
            depth_N=change(self.depth_N),
            block_N=change(self.block_N),
            learnable_N=None if self.learnable_N is None else change(self.learnable_N),
        )

    def part(self, chosen: slice) -> RowIndex:
        """Return the index of some rows."""
        return self.each(lambda tensor: tensor[chosen])


@dataclass(frozen=True)
class RowsAsked:
    """Which rows of a batch are asked for: what `losses.align` needs to know of a drafter and a loss."""

    depths: tuple[int, ...]
    lag: int
    block_length: int = 1
    """Rows of a drafter of depth 1 that form one block."""


@dataclass(frozen=True)
class AlignedRows:
    """The N trained rows of a batch, depth by depth: where the drafter, the target and the label of each are."""

    drafter_N: Tensor
    """Flat position b * T + t of the drafter's state."""
    target_N: Tensor
    """Flat position of the target's state whose law is over the same token."""
    tokens_N: Tensor
    """The label."""
    seed_N: Tensor
    """A number of the row that does not depend on its micro-batch."""
    index: RowIndex
    counts: Mapping[int, int]
    """Rows of each depth of the drafter, in their order."""
    targets_on_host: Tensor
    """`target_N` on the CPU, wherever the batch is: pieces are cut by it without asking the device."""

    def each(self, change: Callable[[Tensor], Tensor]) -> AlignedRows:
        """Return the same of changed tensors: moved, pinned."""
        return replace(
            self,
            drafter_N=change(self.drafter_N),
            target_N=change(self.target_N),
            tokens_N=change(self.tokens_N),
            seed_N=change(self.seed_N),
            index=self.index.each(change),
        )


def _once(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a change that gives the same tensor the same result: what two hold is not copied twice."""
    done: dict[int, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = change(tensor)
        return done[id(tensor)]

    return changed


@dataclass(frozen=True)
class Plan:
    """What the host knows of a batch before it is sent to a device, so that nobody has to ask the device and wait."""

    shape: BatchShape
    documents: PackedDocuments
    rows: Mapping[RowsAsked, AlignedRows] = field(default_factory=dict)
    slots: Mapping[RowsAsked, ReadSlots] = field(default_factory=dict)
    """What these rows need of a drafter."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Plan:
        """Return the same of changed tensors: moved, pinned."""
        return replace(
            self,
            documents=self.documents.each(change),
            rows={asked: found.each(change) for asked, found in self.rows.items()},
            slots={asked: found.each(change) for asked, found in self.slots.items()},
        )


@dataclass(frozen=True)
class DraftBatch:
    """A micro-batch of packed records.

    A row holds several documents; `positions_BT` restarts at 0 with each, and attention must not cross them.
    """

    tokens_BT: Tensor
    loss_mask_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    """Number of the record within the optimiser step, equal for all its tokens; -1 is padding."""
    weight_of_step: float
    """Trained positions of all micro-batches of this optimiser step on all ranks."""
    step: int = 0
    """Optimiser step, from 0."""
    record_ids: Sequence[str] = ()
    """Ids of the records, by their number in `documents_BT` less the smallest one."""
    target: TargetOutput | None = None
    target_rows: TargetRows | None = None
    num_depths: int = 0
    """Depths that are asked of a drafter that can roll out any number; 0: as many as it trains."""
    plan: Plan | None = None
    """Of exactly these tokens, masks and documents (`losses.align.planned`)."""

    @property
    def shape(self) -> BatchShape:
        """How much there is to compute, padding left out."""
        return shape_of(self) if self.plan is None else self.plan.shape

    @property
    def num_tokens(self) -> int:
        """Tokens that are read, padding left out."""
        return self.shape.positions

    @property
    def packed_documents(self) -> PackedDocuments | None:
        """Where they lie, if the plan says so."""
        return None if self.plan is None else self.plan.documents

    @property
    def seed_BT(self) -> Tensor:
        """A number of each token that step, document and position give, for draws that packing and resuming must not change."""
        return (self.step * 1_000_003 + self.documents_BT) * (1 << 26) + self.positions_BT

    def each(self, change: Callable[[Tensor], Tensor]) -> DraftBatch:
        """Return the batch of changed tensors (moved, pinned): its own, its plan's, and what it holds of the target."""
        change = _once(change)
        plan, rows = self.plan, self.target_rows
        return replace(
            self,
            tokens_BT=change(self.tokens_BT),
            loss_mask_BT=change(self.loss_mask_BT),
            positions_BT=change(self.positions_BT),
            documents_BT=change(self.documents_BT),
            plan=plan and plan.each(change),
            target=self.target and self.target.each(change),
            target_rows=rows.each(change) if isinstance(rows, StoredTargetRows) else rows,
        )

    def to(self, device: Any) -> DraftBatch:
        """Return the batch on `device`."""
        return self.each(lambda tensor: tensor.to(device))


class Head(Protocol):
    """Turns a drafter's states into logits: `head(states_ND, depth) -> logits_NV`."""

    def __call__(self, states_ND: Tensor, depth: int) -> Tensor: ...


@dataclass(frozen=True)
class DraftOutput:
    """What a drafter says of a batch: by depth d = 1..K, states whose row t is the law of token t + d + lag.

    States, not logits: a pointwise loss runs the head in chunks, so that no logits tensor need exist.
    """

    states_BTD: Mapping[int, Tensor]
    head: Head
    lag: int
    depth_weights: Mapping[int, float] = field(default_factory=dict)
    """Factor on the loss of a depth; 1 where it is not named."""
    extra_loss: Tensor | None = None
    """What the drafter adds to the loss of the step by itself: a sum over trained positions, like the sum of loss_N."""
    vocabulary: Tensor | None = None
    """The target's id of each of the drafter's tokens, ascending; None: the vocabularies are the same."""
    beside: Beside | None = None

    def logits_BTV(self, depth: int) -> Tensor:
        """Return the whole logits of one depth."""
        return self.head(self.states_BTD[depth], depth)


@dataclass(frozen=True)
class Beside:
    """States that are trained beside a drafter's drafts, by a loss of their own; the loss of the step has its sum over rows.

    Where the drafts are compared with the same rows of the target, its head runs once for both.
    """

    drafted: DraftOutput
    loss: Any
    """A `losses.Loss`."""
    target_rows: TargetRows


@dataclass(frozen=True)
class LossRows:
    """What a loss may look at: N rows of drafter and target logits over one vocabulary."""

    drafter_logits_NV: Tensor
    target_logits_NV: Tensor | None
    """None when the loss asked for no target. Log-probabilities are logits too."""
    tokens_N: Tensor
    """The label: the token that the data has there; -1 where the drafter's vocabulary lacks it."""
    seed_N: Tensor | None = None
    """A number of the row, the same whatever micro-batch it is in, for losses that draw."""
    target_is_normalised: bool = False
    """`target_logits_NV` are log-probabilities, float32 or wider."""

    @cached_property
    def log_p_NV(self) -> Tensor:
        """The target's log-probabilities, float32 or wider, without gradient; computed once for all who ask."""
        assert self.target_logits_NV is not None, "the loss says needs_target, so its rows have the target's"
        given_NV = self.target_logits_NV.detach()
        return given_NV if self.target_is_normalised else _log_softmax(given_NV)

    @cached_property
    def p_NV(self) -> Tensor:
        """The target's probabilities."""
        return self.log_p_NV.exp()

    @cached_property
    def log_q_NV(self) -> Tensor:
        """The drafter's log-probabilities, float32 or wider, differentiable in its logits; computed once for all who ask."""
        return _log_softmax(self.drafter_logits_NV)

    @cached_property
    def fixed_log_q_NV(self) -> Tensor:
        """The drafter's log-probabilities without gradient, for values whose slope is known (`with_slope`)."""
        return _log_softmax(self.drafter_logits_NV.detach())

    @cached_property
    def q_NV(self) -> Tensor:
        """The drafter's probabilities, without gradient."""
        return self.fixed_log_q_NV.exp()

    @cached_property
    def acceptance_N(self) -> Tensor:
        """The acceptance rate of each row, sum_x min(p, q) = 1 - TVD; differentiable in the drafter's logits."""
        import torch

        if self._in_one_kernel is not None:
            return self._in_one_kernel[1]
        p_NV, q_NV = self.p_NV, self.q_NV
        # min(p, q) grows with q where q is less; where both are equal, half: the sign is 1, 0 or -1.
        return self.with_slope(
            torch.minimum(p_NV, q_NV).sum(dim=-1), lambda: (p_NV - q_NV).sign_().add_(1).mul_(q_NV).mul_(0.5)
        )

    @cached_property
    def forward_kl_N(self) -> Tensor:
        """KL(p || q) of each row, nats; differentiable in the drafter's logits."""
        from drafttrain.core.divergences import kl_divergence

        if self._in_one_kernel is not None:
            return self._in_one_kernel[0]
        p_NV = self.p_NV
        return self.with_slope(kl_divergence(p_NV, self.log_p_NV, self.fixed_log_q_NV), lambda: -p_NV)

    @cached_property
    def _in_one_kernel(self) -> tuple[Tensor, Tensor] | None:
        """Divergence and acceptance rate from one kernel; None: where there is none for these rows."""
        from drafttrain.core.kernels import has_kernel

        if not has_kernel(self.drafter_logits_NV):
            return None
        from drafttrain.core.divergence_kernel import forward_kl_and_overlap

        return forward_kl_and_overlap(self.drafter_logits_NV, self.log_p_NV)

    def with_slope(self, value_N: Tensor, slope: Callable[[], Tensor]) -> Tensor:
        """Return a function of `fixed_log_q_NV` whose slope is known, differentiable in the drafter's logits.

        Args:
            slope: See `core.slopes.with_slope`; it may hold tensors of these rows, but not the rows.
        """
        from drafttrain.core.slopes import with_slope

        return with_slope(self.drafter_logits_NV, self.q_NV, value_N, slope)


def _log_softmax(logits_NV: Tensor) -> Tensor:
    import torch

    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(dim=-1)


# ---------------------------------------------------------------- decoding


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    id: str
    tokens: Sequence[int]
    domain: str = ""
    answer: str = ""
    """The right answer, where a checker compares with one."""


class Exactness(Enum):
    """What an acceptance rule keeps of the target's output."""

    DISTRIBUTION = "distribution"
    GREEDY = "greedy"
    LOSSY = "lossy"


class NodeKind(Enum):
    """How a draft token came about; values are stored in `Proposal.kinds_N`."""

    ROOT = 0
    SAMPLED = 1
    FIXED = 2


class DrawLaw(Enum):
    """How the SAMPLED children of one parent were drawn."""

    IID = "iid"
    WITHOUT_REPLACEMENT = "without_replacement"


@dataclass
class Context:
    """One sequence being decoded. The engine appends to `tokens`; proposers and policies only read."""

    id: str
    tokens: list[int]
    num_prompt_tokens: int


@dataclass(frozen=True)
class Budget:
    """How much may be drafted in one round, the root not counted: a chain where `width` is 1, else a tree."""

    nodes: int
    depth: int
    width: int = 1
    """Children of a node at most."""
    states: bool = False
    """The policy reads `DraftStep.hidden_D`, which costs a drafter some time to hand out."""

    def within(self, depth: int) -> Budget:
        """Return the budget cut to a depth; the nodes to what a tree of this depth and width can hold."""
        depth = min(self.depth, depth)
        full = sum(self.width**level for level in range(1, depth + 1))
        return Budget(min(self.nodes, full), depth, self.width, self.states)


class More(Enum):
    """An answer of a stopping rule between yes and no."""

    LAST = "last"
    """Draft this token, whose law is there already, and stop without reading it: the next law costs a forward, this one none."""


@dataclass(frozen=True)
class DraftStep:
    """What a stopping rule may look at. The token is there only if it is already in the tree (the filtration rule)."""

    sequence: int
    depth: int
    logits_V: Tensor
    """The drafter's logits of the draft token that would be next."""
    hidden_D: Tensor | None = None
    """The drafter's last hidden state where it read the newest token of the branch."""
    token: int | None = None
    """That newest token: at depth 1 the root, then a draft token that is in the tree."""

    @cached_property
    def q_row_V(self) -> Tensor:
        """The drafter's law at temperature 1, whatever the sampling: at temperature 0 a one-hot law would say nothing."""
        return self.logits_V.float().softmax(dim=-1)


@dataclass(frozen=True)
class LayerState:
    """The target continues from block `layer` with these rows instead of running its first blocks again."""

    layer: int
    hidden_ND: Tensor


@dataclass(frozen=True)
class Proposal:
    """A tree of draft tokens; node 0 is the root, the last committed token. parents_N[i] < i, parents_N[0] = -1.

    Siblings are listed in the order in which they were drawn.
    """

    tokens_N: Tensor
    parents_N: Tensor
    depths_N: Tensor
    kinds_N: Tensor
    """NodeKind values. SAMPLED: drawn from a row of q; FIXED: deterministic given the committed text."""
    q_rows_RV: Tensor | None = None
    """Laws over the TARGET's vocabulary that SAMPLED children were drawn from."""
    q_row_N: Tensor | None = None
    """By node, the row of q_rows_RV its CHILDREN were drawn from; -1: no sampled children."""
    draw: DrawLaw = DrawLaw.IID
    resume: LayerState | None = None

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens: all nodes but the root."""
        return len(self.tokens_N) - 1


def chain(tokens: Sequence[int], *, kind: NodeKind, q_rows_RV: Tensor | None = None) -> Proposal:
    """Return the chain proposal of a root and the draft tokens behind it.

    Args:
        tokens: The root, then the draft tokens.
        q_rows_RV: SAMPLED: the law of each draft token, in order.
    """
    import torch

    count = len(tokens)
    sampled = kind is NodeKind.SAMPLED
    return Proposal(
        tokens_N=torch.tensor(tokens),
        parents_N=torch.arange(-1, count - 1),
        depths_N=torch.arange(count),
        kinds_N=torch.tensor([NodeKind.ROOT.value] + [kind.value] * (count - 1)),
        q_rows_RV=q_rows_RV if sampled else None,
        q_row_N=torch.tensor([*range(count - 1), -1]) if sampled else None,
    )


def fixed_chain(root: int, drafted: Sequence[int]) -> Proposal:
    """Return a FIXED chain behind the root."""
    return chain([root, *drafted], kind=NodeKind.FIXED)


def fixed_tree(root: int, nodes: Sequence[tuple[int, int]]) -> Proposal:
    """Return a FIXED tree under the root.

    Args:
        nodes: (token, parent) of node 1, 2, ...; the parent is a smaller node number, 0 the root. Siblings in draft order.
    """
    import torch

    depths = [0]
    for number, (_, parent) in enumerate(nodes, start=1):
        assert 0 <= parent < number, "a node comes after its parent"
        depths.append(depths[parent] + 1)
    return Proposal(
        tokens_N=torch.tensor([root, *(token for token, _ in nodes)]),
        parents_N=torch.tensor([-1, *(parent for _, parent in nodes)]),
        depths_N=torch.tensor(depths),
        kinds_N=torch.tensor([NodeKind.ROOT.value] + [NodeKind.FIXED.value] * len(nodes)),
    )


@dataclass(frozen=True)
class Verdict:
    """What became of one proposal."""

    path: Sequence[int]
    """Accepted nodes from the root (always 0) down."""
    tokens: Sequence[int]
    """Tokens emitted: the accepted draft tokens, then the target's own (absent when cut by EOS or length)."""
    num_draft_tokens: int
    max_depth: int
    """Depth of the deepest node that was drafted."""
    reason: str
    """reject, leaf, eos or length."""

    @property
    def num_accepted(self) -> int:
        """Draft tokens kept."""
        return len(self.path) - 1


@dataclass(frozen=True)
class ForwardEvent:
    """One forward of one model: an entry of the evaluator's ledger."""

    model: str
    num_tokens: int
    """Query tokens over all sequences."""
    context: int
    """Cached tokens over all sequences before the call."""
    num_sequences: int
    num_layers: int
    bytes_read: int
    """Weights, shared ones each time they are read, and cache."""
    span: Span
    """When the device was at it."""
    prefill: bool = False
    """Reads a prompt, before the first round."""
    plain_bytes: int = 0
    """What a plain call would have read here: one token a sequence, after the same cached tokens."""

    @property
    def seconds(self) -> float:
        """How long the device was at it; waits for the device, so ask when the decoding is over."""
        return self.span.seconds


# ---------------------------------------------------------------- what decoding leaves behind


@dataclass(frozen=True)
class Round:
    """One proposal, one target call, one verdict, in counts."""

    start: int
    """Tokens of the generation before this round: the round's first emitted token is `tokens[start]`."""
    num_draft_tokens: int
    """Nodes drafted, the root not counted."""
    max_depth: int
    """Depth of the deepest node that was drafted; for a chain, the same number."""
    num_accepted: int
    """Draft tokens kept, counted after the cut by EOS or length."""
    num_emitted: int
    """Tokens committed: `num_accepted + 1`, or `num_accepted` when an accepted EOS ended the text."""
    reason: str
    """reject, leaf, eos or length."""


@dataclass(frozen=True)
class Generation:
    """One prompt's output and how it came about."""

    id: str
    domain: str
    prompt_tokens: Sequence[int]
    tokens: Sequence[int]
    """The new tokens, an ending EOS included; the same as all rounds' emitted tokens in order."""
    rounds: Sequence[Round]
    prefill_seconds: float
    """Reading the prompt, target and drafter; this sequence's share when several are decoded together."""
    draft_seconds: float
    """Proposing and keeping the proposer's cache; this sequence's share."""
    verify_seconds: float
    """Target calls of the rounds, their verdicts, keeping the target's cache; this sequence's share."""
    seconds: float
    """From before the prefill to the end, everything; this sequence's share. Decoding alone: less `prefill_seconds`."""
