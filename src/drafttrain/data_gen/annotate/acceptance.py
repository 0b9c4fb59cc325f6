"""Labels of the acceptance head: the probability that a token that the drafter draws along a text is accepted.

B = sequences, T = positions, N = rows (draft tokens), V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.probability import draw, sampling_probs, without_padding
from drafttrain.core.random import stream
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record, Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.data_gen.annotate import AnnotateSettings, Frozen, annotators
from drafttrain.data_gen.packing import pack
from drafttrain.heads.rows import HeadRows


@dataclass(kw_only=True)
class AcceptanceLabelSettings(AnnotateSettings):
    """min(1, p(Y) / q(Y)) of tokens Y that the drafter draws along the texts."""

    temperature: float = setting(
        1.0, help="Sampling of both models, on which acceptance depends. 0: greedy, labels are 0 or 1.", ge=0
    )
    mixing: float = setting(
        0.15,
        help="Share of the positions where the drafter reads the text's token and nothing is trained.",
        ge=0,
        le=1,
    )


@annotators.register("acceptance", AcceptanceLabelSettings)
class AcceptanceLabels:
    """Two forwards of the drafter and one of the target for a batch of texts.

    One forward of each gives the distributions along the text X; at every place a token Y is drawn from the drafter's and
    labelled. The drafter's second forward reads Z, which is X at a share of the places and Y at the others; its states where
    Z = Y are the features. A label belongs to the prefix X while its state saw the prefix Z: the published approximation, which
    saves a target call for each row.

    EAGLE reads each token with the target's feature of the token before it. A first draft token is read with a feature that the
    drafter predicted itself, so the features come from its second step, as in decoding.

    Source: Huang et al. 2024, SpecDec++, arXiv 2405.19715, 3.2.
    """

    for_head: ClassVar[str] = "acceptance"

    def __init__(self, settings: AcceptanceLabelSettings, frozen: Frozen) -> None:
        self.settings = settings
        self.sampling = Sampling(settings.temperature)
        self.target, self.drafter, self.seed = frozen.target, frozen.drafter, frozen.seed

    @torch.no_grad()
    def label(self, records: Sequence[Record]) -> list[HeadRows]:
        """Return the rows of each record."""
        batch, places = pack(records, width=max(len(record.tokens) for record in records), weight_of_step=1.0)
        batch = batch.to(self.target.device)
        seen = self.target.read(batch.tokens_BT, batch.positions_BT, self._needs() | TargetNeeds(final=True))
        target_rows = self.target.rows_of(seen)
        drafted = self._draft(replace(batch, target=seen, num_depths=1))
        reading = 1 + drafted.lag
        read_BT = batch.tokens_BT.clone()
        found: list[tuple[Tensor, Tensor, int]] = []
        for record, (row, column) in zip(records, places, strict=True):
            # Y at i is drawn by the row that sees the tokens before i, and read by the row of token i.
            trained = torch.tensor(record.loss_mask)
            trained[:reading] = False
            position_N = trained.nonzero()[:, 0].to(self.target.device) + column
            start = row * batch.tokens_BT.shape[1]
            chances = self._chances(
                target_rows.at(start + position_N - 1), drafted, start + position_N - 1 - drafted.lag
            )
            drawn_N, labels_N = self._drawn(*chances, id=record.id)
            original_N = (
                torch.rand(len(drawn_N), generator=stream(self.seed, "mixing", record.id)) < self.settings.mixing
            )
            read_N, ours_N = mixed(drawn_N, batch.tokens_BT[row, position_N].cpu(), original_N)
            read_BT[row, position_N] = read_N.to(read_BT.device)
            found.append((position_N[ours_N.to(position_N.device)], labels_N[ours_N], row))
        states_BTD = self._states(replace(batch, tokens_BT=read_BT, num_depths=reading), reading)
        return [
            HeadRows(states_BTD[row, position_N - 2 * drafted.lag].float().cpu(), labels_N)
            for position_N, labels_N, row in found
        ]

    def _needs(self) -> TargetNeeds:
        return self.drafter.needs()

    def _draft(self, batch: DraftBatch) -> DraftOutput:
        if self.drafter.deepest is not None:
            raise CheckpointError(
                f"head.drafter: a {self.drafter.kind} drafter proposes several tokens from one state, so draft tokens have no "
                "state of their own; the acceptance head needs a drafter that drafts token by token"
            )
        drafted: DraftOutput = self.drafter(batch)
        return drafted

    def _chances(self, target_logits_NV: Tensor, drafted: DraftOutput, drafter_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sampling distributions of both models over the target's vocabulary; padding has probability 0."""
        num_tokens = self.target.num_tokens
        target_NV = sampling_probs(without_padding(target_logits_NV, num_tokens=num_tokens), self.sampling)
        drafter_logits_NW = drafted.head(drafted.states_BTD[1].flatten(0, 1)[drafter_N], 1)
        vocabulary = DraftVocabulary(drafted.vocabulary, num_tokens=num_tokens)
        drafter_NV = vocabulary.probs(drafter_logits_NW, self.sampling, size=target_NV.shape[1])
        return target_NV.cpu(), drafter_NV.cpu()

    def _drawn(self, target_NV: Tensor, drafter_NV: Tensor, *, id: str) -> tuple[Tensor, Tensor]:
        """Return a token drawn from the drafter for every row, and its label."""
        generator = stream(self.seed, "drafted", id)
        drawn_N = torch.tensor([draw(probs_V, generator) for probs_V in drafter_NV], dtype=torch.long)
        return drawn_N, acceptance_labels(target_NV, drafter_NV, drawn_N)

    def _states(self, batch: DraftBatch, depth: int) -> Tensor:
        """Return the drafter's states at the depth at which it reads its own tokens."""
        if self._needs() != TargetNeeds():
            batch = replace(batch, target=self.target.read(batch.tokens_BT, batch.positions_BT, self._needs()))
        return self._draft(batch).states_BTD[depth]


def acceptance_labels(target_NV: Tensor, drafter_NV: Tensor, drawn_N: Tensor) -> Tensor:
    """Return min(1, p(Y) / q(Y)), the probability that a token Y drawn from q is accepted."""
    target_N, drafter_N = (probs_NV.gather(1, drawn_N[:, None])[:, 0] for probs_NV in (target_NV, drafter_NV))
    return (target_N / drafter_N).clamp(max=1.0).float()


def mixed(drawn_N: Tensor, written_N: Tensor, original_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that the drafter reads, and where they are its own draws.

    Args:
        drawn_N: Tokens that the drafter drew.
        written_N: Tokens of the text, read where `original_N`; they count as drawn where both are equal.
    """
    read_N = torch.where(original_N, written_N, drawn_N)
    return read_N, read_N == drawn_N
