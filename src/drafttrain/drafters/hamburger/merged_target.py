"""The target that is served: it reads its answers in segments, and one cache entry stands for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from drafttrain.core.images import Image
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetRows
from drafttrain.drafters.hamburger.merged_lm import MergedLM, ReadingParts
from drafttrain.target_model import Target
from drafttrain.target_model.logits import LiveRows


class MergedTarget(Target):
    """A tuned target with the embedder and the stop head that it reads segments with. `MergedLM` defines its distribution."""

    generates: ClassVar[bool] = False

    def __init__(self, target: Target, parts: ReadingParts) -> None:
        # Not by Target.__init__: it freezes the model's weights, which in training are the copy that is trained.
        self.model = target.model
        self.tokenizer = target.tokenizer
        self.name = f"{target.name} in segments"
        self.fingerprint = target.fingerprint
        self.vision = None
        self._parts = parts

    def decoder(self, *, name: str = "target", listener: ForwardListener | None = None) -> MergedLM:
        """Return its model with one cache entry a segment."""
        return MergedLM(self.model, self._parts, name=name, listener=listener)

    def answer_rows(self, prompt: Sequence[int], answer: Sequence[int], *, images: Sequence[Image] = ()) -> TargetRows:
        """Return its distribution before each token of an answer, read token by token: a segment ends where the stop head says."""
        lm, states = self.decoder(), []
        lm.begin([prompt[:-1]], images=[images])
        for token in [prompt[-1], *answer[:-1]]:
            (seen,) = lm.forward([[token]], needs=TargetNeeds(final=True))
            lm.keep([[0]])
            assert seen.final_BTD is not None, "asked for"
            states.append(seen.final_BTD)
        return LiveRows(self.model, torch.cat(states, dim=1))

    def logits_after(
        self, prompt: Sequence[int], answer: Sequence[int], *, together: int, images: Sequence[Image] = ()
    ) -> Tensor:
        """Return logits_V after a text. Its calls have a row for each beginning of a segment, whatever was read together."""
        rows = self.answer_rows(prompt, [*answer, 0], images=images)
        logits_V: Tensor = rows.at(torch.tensor([len(answer)], device=self.device))[0]
        return logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))
