"""Lexical Unit Decoding: the target itself is tuned to predict several tokens of its text at look-ahead tokens.

B = sequences, T = positions, N = slots, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from drafttrain.core.altered_text import AlteredText
from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import one_of, read_json
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.drafters import drafters
from drafttrain.drafters.drafter import DRAFTS
from drafttrain.drafters.drafts_itself import DraftsItself, DraftsItselfSettings
from drafttrain.drafters.lexical_units.proposer import LookAheadProposer
from drafttrain.drafters.lexical_units.units import LexicalUnits
from drafttrain.drafters.text_notes import TextNotes
from drafttrain.drafters.tuned_target import tuning_in
from drafttrain.target_model import Target


@dataclass(kw_only=True)
class LexicalUnitsSettings(DraftsItselfSettings):
    """The target tuned to predict several tokens at look-ahead tokens of the same call. It drafts for itself."""

    look_ahead_token_id: int = setting(
        help="Id of the look-ahead token: one that no text has. Adapters learn what it means; its embedding stays.",
        ge=0,
    )
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
class LexicalUnitDrafter(DraftsItself):
    """The tuned target, which drafts for itself.

    L = text_weight * (the recipe's loss) + cross-entropy at the look-ahead tokens of one unit of each text.

    Source: Sun et al. 2024, Lexical Unit Decoding, arXiv 2405.15208.
    """

    kind = "lexical_units"
    why_alone = "has look-ahead tokens beside its own nodes only"
    serving: ClassVar[str] = """\
TARGET must be the tuned one: the target with adapter/ of this folder (peft's format), or target/. Any engine serves it without
drafts. No serving engine reads look-ahead tokens beside draft tokens: `drafttrain eval DRAFTER --target TARGET` does. The authors
published no code."""

    def __init__(self, *, ahead: int, token: int, draft: str = "sampled", text_weight: float = 1.0) -> None:
        super().__init__()
        self.ahead = self.rows_beside = ahead
        self.token = token
        self.draft = draft
        self.text_weight = text_weight

    @classmethod
    def create(cls, settings: LexicalUnitsSettings, *, target: Target | None, tokenizer: Any) -> LexicalUnitDrafter:
        """Return the target as it is, with weights to tune it."""
        token = settings.look_ahead_token_id
        made = cls(ahead=settings.ahead, token=token, draft=settings.draft, text_weight=settings.text_weight)
        made.tune(target, settings)
        _check_token(token, made.in_training.target, "drafter.look_ahead_token_id")
        return made

    @classmethod
    def notes(cls, settings: LexicalUnitsSettings) -> TextNotes | None:
        """Return the units of the texts."""
        return LexicalUnits(settings.threshold, settings.ahead, settings.look_ahead_token_id)

    @property
    def deepest(self) -> int:
        """One draft token a look-ahead token."""
        return self.ahead

    def loss_of_altered(
        self, final_BTD: Tensor, altered_BTD: Tensor, tokens_BT: Tensor, altered: AlteredText
    ) -> Tensor:
        """Return -log p(the token after a look-ahead token)."""
        labels_N = tokens_BT.flatten().index_select(0, altered.slots_N + 1)
        loss_N = cross_entropy(self.logits_at(altered_BTD, altered.slots_N), labels_N, reduction="none")
        return (altered.weights_N * loss_N).sum()

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer: its drafts are read off the verifying call."""
        sizes = {"vocab_size": target.vocab_size, "num_tokens": target.num_tokens}
        return LookAheadProposer(ahead=self.ahead, token=self.token, draft=self.draft, **sizes)

    def numbers(self) -> Mapping[str, int | str]:
        """Return how many look-ahead tokens there are, which, and how they draft."""
        return {"ahead": self.ahead, "look_ahead_token_id": self.token, "draft": self.draft}

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
        made = cls(ahead=ahead, token=token, draft=one_of(config, "draft", DRAFTS, path=path))
        made.tuning = tuning_in(folder)
        return made.eval()


def _check_token(token: int, target: Target, key: str) -> None:
    if not 0 <= token < target.vocab_size:
        raise CheckpointError(f"{key}: must be in 0..{target.vocab_size - 1} for {target.name}, got {token}")
