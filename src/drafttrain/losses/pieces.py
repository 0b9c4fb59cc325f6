"""Pieces of a loss: the rows of all depths that predict the same span of tokens, so that the target's head runs once for each token.

N = rows, U = target positions of a piece, V = the target's vocabulary, R = the drafter's vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.loss_rows import LossRows
from drafttrain.core.piece_size import PieceSize
from drafttrain.core.probability import likeliest, log_total
from drafttrain.core.target_rows import (
    AlignedRows,
    NamedRows,
    NamedTargetRows,
    PartialTargetRows,
    PartOfRows,
    RowIndex,
)
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.losses import Loss
from drafttrain.losses.buckets import in_buckets, known_acceptance

ACCEPTANCE = "acceptance rate"

PIECE_BYTES = PieceSize(on_cpu=24 * 2**20, elsewhere=256 * 2**20)
"""Logits of the target that exist at once."""

LEAST_ROWS = PieceSize(on_cpu=256, elsewhere=1)
"""Rows of a piece however wide they are: a CPU copies the whole matrix for each product, so a product of few rows is slow."""

BAND_BYTES = PieceSize(on_cpu=2 * 2**20, elsewhere=256 * 2**20)
"""Logits that the arithmetic of a loss reads at once.

On a CPU larger tensors do not fit its caches and are mapped again each time: elementwise arithmetic takes four times as long.
"""


@dataclass(frozen=True)
class Part:
    """Rows of one depth in a piece."""

    depth: int
    rows: slice
    """Which of the N rows of their term."""
    term: int = 0
    """0: the drafts; else a term that is trained beside them."""


@dataclass(frozen=True)
class Piece:
    """A span of target positions, and the rows of each depth whose token is predicted at one of them."""

    positions: slice
    """Which of the positions that the term's rows read (`AlignedRows.read_U`)."""
    parts: tuple[Part, ...]
    term: int = 0


NO_ROWS = Piece(slice(0, 0), ())


def pieces(terms: Sequence[AlignedRows], size: int) -> list[Piece]:
    """Return the rows of all terms in pieces of at most `size` positions of the target.

    One term reads all positions that any term reads. The rows of a depth are sorted by position, so a span of positions is a
    span of every depth.
    """
    found = _Depths.of(terms)
    whole = max(range(len(terms)), key=lambda term: len(terms[term].read_on_host))
    read_U = terms[whole].read_on_host
    edges = read_U[::size].contiguous()
    ends = {one: _places(one.targets(terms), edges) for one in found}
    made = []
    for number, border in enumerate(range(0, len(read_U), size)):
        parts = []
        for one in found:
            low, high = (one.start + place for place in ends[one][number : number + 2])
            if low < high:
                parts.append(Part(one.depth, slice(low, high), one.term))
        made.append(Piece(slice(border, border + size), tuple(parts), whole))
    return made


@dataclass(frozen=True)
class _Depths:
    """The rows of one depth of a term."""

    term: int
    depth: int
    start: int
    count: int

    @classmethod
    def of(cls, terms: Sequence[AlignedRows]) -> list[_Depths]:
        """Return the depths that have rows."""
        found = []
        for term, rows in enumerate(terms):
            first = 0
            for depth, count in rows.counts.items():
                found += [cls(term, depth, first, count)] if count else []
                first += count
        return found

    def targets(self, terms: Sequence[AlignedRows]) -> Tensor:
        return terms[self.term].targets_on_host[self.start : self.start + self.count]


def _places(targets_N: Tensor, edges: Tensor) -> list[int]:
    """Return the index of each border position among those of one depth, then their number."""
    places: list[int] = torch.searchsorted(targets_N, edges).tolist()
    return [*places, len(targets_N)]


@dataclass(frozen=True)
class TargetPiece:
    """The target's rows of a piece, cut to the drafter's vocabulary, in the type of its head."""

    positions_U: Tensor
    logits_UR: Tensor
    learnable_U: Tensor | None
    """Whether the target's likeliest token is in the drafter's vocabulary; None: everywhere."""
    log_mass_U: Tensor | None
    """Logarithm of the target's mass in the drafter's vocabulary; None: it is 1, or it is not needed."""

    @cached_property
    def log_p_UR(self) -> Tensor:
        """Its log-probabilities, renormalised on the drafter's vocabulary; in the place of the logits where those are as wide."""
        logits_UR = self.logits_UR.to(torch.promote_types(self.logits_UR.dtype, torch.float32))
        parts = bands(logits_UR)
        if len(parts) == 1:
            return logits_UR.log_softmax(dim=-1)
        for rows in parts:
            logits_UR[rows] = logits_UR[rows].log_softmax(dim=-1)
        return logits_UR


class RowValues:
    """The inputs of a loss for the rows of a micro-batch, and the values that it returns for each.

    Args:
        vocab_size: Ids that target, drafter and tokenizer share; logits are cut to these, so padding has no mass.
        measured: Compute the acceptance rate too.
    """

    def __init__(
        self,
        loss: Loss,
        drafted: DraftOutput,
        rows: AlignedRows,
        batch: DraftBatch,
        *,
        vocab_size: int,
        measured: bool,
    ) -> None:
        self.loss = loss
        self.rows = rows
        self.vocab_size = vocab_size
        self.measured = measured
        self._vocabulary_R = drafted.vocabulary
        readable_BT = drafted.readable_BT
        self._readable_N = None if readable_BT is None else readable_BT.flatten()[rows.drafter_N]
        reads_target = loss.reads_target(batch.step)
        self._target = batch.target_rows if reads_target else None
        assert self._target is not None or not reads_target, "the module reads the target before the loss"
        self._named = isinstance(self._target, NamedTargetRows) and drafted.vocabulary is None

    @cached_property
    def _draft_id_V(self) -> Tensor | None:
        if self._vocabulary_R is None:
            return None
        return DraftVocabulary(self._vocabulary_R, num_tokens=self.vocab_size).places(size=self.vocab_size)

    @cached_property
    def labels_N(self) -> Tensor:
        """The label of every row in the drafter's own ids; -1 for a token that it lacks."""
        return self.rows.tokens_N if self._draft_id_V is None else self._draft_id_V[self.rows.tokens_N]

    @property
    def columns(self) -> int:
        """The width of the widest logits."""
        if self._vocabulary_R is not None and (self._target is None or self._partial is not None):
            return len(self._vocabulary_R)
        return self.vocab_size

    @property
    def _partial(self) -> PartialTargetRows | None:
        """The target's rows, if they can be computed for the drafter's own vocabulary only."""
        rows = self._target
        if self._vocabulary_R is None or not isinstance(rows, PartialTargetRows):
            return None
        return rows if rows.num_tokens == self.vocab_size else None

    @property
    def reads_target(self) -> bool:
        """Whether the target's whole rows are needed."""
        return self._target is not None and not self._named

    def can_share_target(self, other: RowValues) -> bool:
        """Return whether both can read the same rows of the target, if both read any."""
        same = self._target is other._target and self._vocabulary_R is other._vocabulary_R
        return same or not (self.reads_target and other.reads_target)

    @torch.no_grad()
    def target_at(self, positions_U: Tensor) -> TargetPiece:
        """Return the target's rows at the positions of a piece: the one place where its head runs for a loss."""
        assert self._target is not None
        if self._vocabulary_R is None or self._draft_id_V is None:
            return TargetPiece(positions_U, self._target.at(positions_U)[:, : self.vocab_size], None, None)
        if self._partial is not None:
            seen = self._partial.of_tokens(positions_U, self._vocabulary_R)
        else:
            seen = self._part_of(self._target.at(positions_U)[:, : self.vocab_size], self._vocabulary_R)
        log_mass_U = log_total(seen.logits_NR) - seen.log_total_N if self.measured else None
        return TargetPiece(positions_U, seen.logits_NR, self._draft_id_V[seen.likeliest_N] >= 0, log_mass_U)

    def _part_of(self, logits_UV: Tensor, ids_R: Tensor) -> PartOfRows:
        total_U = log_total(logits_UV) if self.measured else torch.empty(0)
        return PartOfRows(logits_UV[:, ids_R], likeliest(logits_UV), total_U)

    def learnable(self, part: Part, target: TargetPiece | None) -> Tensor | None:
        """Return which rows a drafter with its own vocabulary can learn; None: all.

        A row can be learned if the target's likeliest token is in the vocabulary; without a target, if the label is. With its own
        tokenizer the drafter must have read the text before it, too.
        """
        if self._vocabulary_R is None:
            return None
        if target is None or not self.reads_target:
            drafted_N = self.labels_N[part.rows] >= 0
        else:
            assert target.learnable_U is not None
            drafted_N = self._at(part, target, target.learnable_U)
        return drafted_N if self._readable_N is None else drafted_N & self._readable_N[part.rows]

    def of(
        self,
        part: Part,
        target: TargetPiece | None,
        drafter_logits_NR: Tensor,
        confidence_N: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the named values of some rows, with their acceptance rate where it is measured.

        Losses are computed without autocast, which would sum products of probabilities in bfloat16.
        """
        with torch.autocast(drafter_logits_NR.device.type, enabled=False):
            rows, named = self._loss_rows(part, target, drafter_logits_NR, confidence_N)
            values = dict(self.loss.per_row(rows))
            if self._target is not None and self.measured:
                with torch.no_grad():
                    rate_N = known_acceptance(rows) if named else self._acceptance(part, target, rows)
                    values[ACCEPTANCE] = rate_N if self._readable_N is None else rate_N * self._readable_N[part.rows]
        return values

    def combined(self, named: Mapping[str, Tensor], index: RowIndex, learnable_N: Tensor | None) -> Tensor:
        """Return the loss of rows, float32; 0 for those that cannot be learned."""
        with torch.autocast(index.sequence_N.device.type, enabled=False):
            loss_N = self.loss.combine(named, replace(index, learnable_N=learnable_N)).float()
        return loss_N if learnable_N is None else torch.where(learnable_N, loss_N, 0.0)

    def weighted(self, loss_N: Tensor, factors: Mapping[int, float]) -> Tensor:
        """Return the loss of all rows times their factors.

        Args:
            factors: Of depths; 1 for others.
        """
        if any(factors.get(depth, 1.0) != 1.0 for depth in self.rows.counts):
            device, counts = loss_N.device, self.rows.counts
            of_depth = [torch.full((count,), factors.get(depth, 1.0), device=device) for depth, count in counts.items()]
            loss_N = loss_N * torch.cat(of_depth)
        return loss_N if self.rows.scale_N is None else loss_N * self.rows.scale_N

    def _loss_rows(
        self, part: Part, target: TargetPiece | None, drafter_logits_NR: Tensor, confidence_N: Tensor | None
    ) -> tuple[LossRows, NamedRows | None]:
        rows = self.rows
        log_p_NR = self._at(part, target, target.log_p_UR) if target is not None and self.reads_target else None
        made = LossRows(
            drafter_logits_NV=drafter_logits_NR,
            target_logits_NV=log_p_NR,
            tokens_N=self.labels_N[part.rows],
            seed_N=rows.seed_N[part.rows],
            confidence_N=confidence_N,
            target_is_normalised=True,
        )
        if not self._named:
            return made, None
        assert isinstance(self._target, NamedTargetRows)
        named = self._target.named(rows.target_N[part.rows])
        return in_buckets(made, named), named

    def _acceptance(self, part: Part, target: TargetPiece | None, rows: LossRows) -> Tensor:
        if target is None or target.log_mass_U is None:
            return rows.acceptance_N.detach()
        # Not renormalised: a target token outside the drafter's vocabulary is never accepted.
        mass_N1 = self._at(part, target, target.log_mass_U).exp()[:, None]
        return torch.minimum(rows.p_NV * mass_N1, rows.q_NV).sum(dim=-1)

    def _at(self, part: Part, target: TargetPiece, of_position_U: Tensor) -> Tensor:
        """Return the values at a piece's positions for the rows of a part."""
        if part.rows.stop - part.rows.start == len(target.positions_U):
            return of_position_U
        places_N = torch.searchsorted(target.positions_U, self.rows.target_N[part.rows])
        return of_position_U.index_select(0, places_N)


def target_of(terms: Sequence[RowValues], piece: Piece) -> TargetPiece | None:
    """Return the target's rows of a piece, for all terms that read them; None: no term needs whole rows."""
    reading = [values for values in terms if values.reads_target]
    return reading[0].target_at(terms[piece.term].rows.read_U[piece.positions]) if reading else None


def connected_zero(drafted: DraftOutput, depth: int) -> Tensor:
    """Return a zero whose backward pass goes through the states and the head of a depth without trained rows here.

    Every rank must run the same backward pass.
    """
    logits_1R = drafted.head(drafted.states_BTD[depth].flatten(0, 1)[:1], depth).float()
    # Tokens that a head excludes have logits of -inf.
    return 0.0 * logits_1R.nan_to_num(nan=math.nan, neginf=0.0).sum()


def piece_size(rows: AlignedRows, *, columns: int, chunk_rows: int | None) -> int:
    """Return the positions of a piece."""
    device = rows.tokens_N.device
    return chunk_rows or max(LEAST_ROWS.on(device), PIECE_BYTES.on(device) // (4 * columns))


def bands(logits_nV: Tensor) -> list[slice]:
    """Return spans of rows that the arithmetic of a loss reads at once; one where there are no rows."""
    count, columns = logits_nV.shape
    size = max(1, BAND_BYTES.on(logits_nV.device) // (4 * columns))
    return [slice(start, min(start + size, count)) for start in range(0, max(count, 1), size)]
