"""EAGLE for targets that read images (MSD): at an image position the drafter reads the projector's embedding itself.

A text slot t combines the target's feature of token t with the embedding of token t + 1, as in EAGLE. A visual slot t reads what
entered the target's first block at t: there is no fusion and no shift. The stream that enters block 0 holds these embeddings bit
for bit.

Source: Lin et al. 2025, Speculative Decoding Reimagined for Multimodal Large Language Models (MSD), arXiv 2505.14260.

B = sequences, T = positions, D = hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.core.proposals import Context, Verdict
from drafttrain.core.target_rows import TargetOutput
from drafttrain.drafters.eagle.proposer import EagleProposer

EMBEDDED = 0
"""The residual stream that enters block 0."""


def with_visual_rows(seen: TargetOutput, visual_BT: Tensor | None) -> TargetOutput:
    """Return a target's outputs in which the stream entering block 0 is 0 at text positions, as `joined` expects.

    Args:
        visual_BT: Where an image is; None: nowhere.
    """
    embedded_BTD = seen.hidden_BTD[EMBEDDED]
    if visual_BT is None:
        kept_BTD = torch.zeros_like(embedded_BTD)
    else:
        kept_BTD = embedded_BTD.where(visual_BT.to(embedded_BTD.device)[..., None], 0)
    return replace(seen, hidden_BTD={**seen.hidden_BTD, EMBEDDED: kept_BTD})


def joined(text_BTD: Tensor, visual_BTD: Tensor) -> Tensor:
    """Return the visual rows where they are not 0, else those of text."""
    return visual_BTD.where(visual_BTD.any(dim=-1, keepdim=True), text_BTD)


class VisualEagleProposer(EagleProposer):
    """Prompts may have images; all later tokens are text."""

    visual_id: int

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Read all slots of the prompts except the last."""
        places = [torch.tensor([context.tokens[:-1]]) == self.visual_id for context in contexts]
        marked = [
            with_visual_rows(one, visual_BT) if one.hidden_BTD else one
            for one, visual_BT in zip(seen, places, strict=True)
        ]
        super().begin(contexts, marked)

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Store the target's features of the accepted path, which is text."""
        super().observe(verdicts, [with_visual_rows(one, None) if one.hidden_BTD else one for one in seen])
