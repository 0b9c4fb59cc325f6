"""Lexical Unit Decoding: the target itself is tuned to predict several tokens of its text at look-ahead tokens.

B = sequences, T = positions, N = slots, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from drafttrain.core.altered_text import AlteredText
from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.flops import BatchShape, Products, matrix
from drafttrain.core.foreign import read_json
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.lexical_units.proposer import LookAheadProposer
from drafttrain.drafters.lexical_units.units import LexicalUnits
from drafttrain.drafters.text_notes import TextNotes
from drafttrain.drafters.tuned_target import TunedTarget, TuningSettings, tuning_in
from drafttrain.target_model import Target
from drafttrain.target_model.matrix_products import head_parameters


@dataclass
class LexicalUnitsSettings:
    """The target tuned to predict several tokens at look-ahead tokens of the same call. It drafts for itself."""

    look_ahead_token_id: int = setting(
        help="Id of the look-ahead token: one that no text has. Adapters learn what it means; its embedding stays.",
        ge=0,
    )
    tune: TuningSettings = setting(TuningSettings(), help="How the target is tuned.")
    ahead: int = setting(4, help="Look-ahead tokens after every node: draft tokens of a round at most.", ge=1)
    threshold: float = setting(
        0.8, help="A token continues its unit if the target gives it at least this probability.", gt=0, le=1
    )
    text_weight: float = setting(
        1.0, help="Weight of the recipe's loss, on the texts as they are, beside that of the units.", gt=0
    )
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: a draw at each look-ahead token, or its argmax."
    )


@drafters.register("lexical_units", LexicalUnitsSettings)
class LexicalUnitDrafter(Drafter):
    """The tuned target, which drafts for itself. Lag 0: depth 1 is its own distribution.

    L = text_weight * (the recipe's loss) + cross-entropy at the look-ahead tokens of one unit of each text.

    Source: Sun et al. 2024, Lexical Unit Decoding, arXiv 2405.15208.
    """

    kind = "lexical_units"
    lag = 0
    needs_target = True
    drafts_trees = False
    serving: ClassVar[str] = """\
TARGET must be the tuned one: the target with adapter/ of this folder (peft's format), or target/. Any engine serves it without
drafts. No serving engine reads look-ahead tokens beside draft tokens: `drafttrain eval DRAFTER --target TARGET` does. The authors
published no code."""

    def __init__(self, *, ahead: int, token: int, draft: str = "sampled", text_weight: float = 1.0) -> None:
        super().__init__()
        self.ahead = ahead
        self.token = token
        self.draft = draft
        self.text_weight = text_weight
        self.weights: Any = None
        """Those of `tuned`, in training."""

    @classmethod
    def create(cls, settings: LexicalUnitsSettings, *, target: Target | None, tokenizer: Any) -> LexicalUnitDrafter:
        """Return the target as it is, with weights to tune it."""
        if target is None:
            raise CheckpointError(
                "drafter.kind is 'lexical_units' but target.model is null: the target itself is tuned"
            )
        _check_token(settings.look_ahead_token_id, target, "drafter.look_ahead_token_id")
        made = cls(
            ahead=settings.ahead,
            token=settings.look_ahead_token_id,
            draft=settings.draft,
            text_weight=settings.text_weight,
        )
        made.tuned = TunedTarget(target, settings.tune.lora, key="drafter.tune.lora")
        made.weights = made.tuned.weights
        return made

    @classmethod
    def tuned_by(cls, settings: LexicalUnitsSettings) -> str | None:
        """Return the key of the tuning."""
        return "tune"

    @classmethod
    def notes(cls, settings: LexicalUnitsSettings) -> TextNotes | None:
        """Return the units of the texts."""
        return LexicalUnits(settings.threshold, settings.ahead, settings.look_ahead_token_id)

    @property
    def deepest(self) -> int:
        """One draft token a look-ahead token."""
        return self.ahead

    @property
    def replayable(self) -> bool:
        """A forward reads no look-ahead tokens after every position."""
        return False

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the tuned target's states of the texts, with the loss of the units in training."""
        tuned = self._tuned
        final_BTD, _ = tuned.read(batch)
        drafted = DraftOutput({1: final_BTD}, tuned.head, self.lag)
        if not self.training:
            return drafted
        assert batch.altered is not None, "the run attaches the units"
        altered_BTD, _ = tuned.read(replace(batch, tokens_BT=batch.altered.tokens_BT))
        extra_loss = self._of_units(altered_BTD, batch.tokens_BT, batch.altered)
        return replace(drafted, depth_weights={1: self.text_weight}, extra_loss=extra_loss)

    def _of_units(self, altered_BTD: Tensor, tokens_BT: Tensor, altered: AlteredText) -> Tensor:
        """Return the weighted sum over the look-ahead tokens of -log p(the token after the place)."""
        logits_NV = self._tuned.head(altered_BTD.flatten(0, 1).index_select(0, altered.slots_N), 1)
        labels_N = tokens_BT.flatten().index_select(0, altered.slots_N + 1)
        size = self._tuned.target.num_tokens
        loss_N = cross_entropy(logits_NV[:, :size].float(), labels_N, reduction="none")
        return (altered.weights_N * loss_N).sum()

    @property
    def _tuned(self) -> TunedTarget:
        assert self.tuned is not None, "only a drafter in training has a forward"
        return self.tuned

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of two passes through the target, and of its head at the labels."""
        for _ in range(2):
            yield from self._tuned.products(shape)
        yield matrix(head_parameters(self._tuned.target.model), shape.rows(1), gradients=1)

    @property
    def device(self) -> torch.device:
        """Where its weights are; a loaded one has none."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer: its drafts are read off the verifying call."""
        sizes = {"vocab_size": target.vocab_size, "num_tokens": target.num_tokens}
        return LookAheadProposer(ahead=self.ahead, token=self.token, draft=self.draft, **sizes)

    def save(self, folder: Path) -> None:
        """Write what the target was tuned to; model.safetensors is empty."""
        config = {"model_type": self.kind, "ahead": self.ahead, "look_ahead_token_id": self.token}
        write_json(folder / "config.json", config)
        save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
        self._tuned.save(folder)

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> LexicalUnitDrafter:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The numbers are damaged, or of another target.
        """
        path = folder / "config.json"
        config = read_json(path)
        ahead, token = config.get("ahead"), config.get("look_ahead_token_id")
        if type(ahead) is not int or ahead < 1 or type(token) is not int:
            raise CheckpointError(
                f"{path}: ahead must be a number of at least 1 and look_ahead_token_id one of a token, got {ahead!r:.60} and {token!r:.60}"
            )
        _check_token(token, target, f"{path}: look_ahead_token_id")
        made = cls(ahead=ahead, token=token)
        made.tuning = tuning_in(folder)
        return made.eval()


def _check_token(token: int, target: Target, key: str) -> None:
    if not 0 <= token < target.vocab_size:
        raise CheckpointError(f"{key}: must be in 0..{target.vocab_size - 1} for {target.name}, got {token}")
