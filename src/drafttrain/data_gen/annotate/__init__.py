"""Annotators, one file a kind: from texts to labelled draft tokens, which a head is trained on.

N = rows (draft tokens), D = hidden
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from drafttrain.core.registry import Registry
from drafttrain.core.settings import setting
from drafttrain.core.texts import Record
from drafttrain.drafters import Drafter
from drafttrain.heads.rows import HeadRows
from drafttrain.target_model import Target

annotators = Registry("annotator", "drafttrain.data_gen.annotate")


@dataclass(kw_only=True)
class AnnotateSettings:
    """Settings of all annotators."""

    held_out: float = setting(
        0.2, help="Share of the texts that are not trained on; the head is measured on them.", gt=0, lt=1
    )

    @property
    def min_share(self) -> float:
        """Share of the tokens that each label must have."""
        return 0.0


@dataclass(kw_only=True)
class JudgeLabelSettings(AnnotateSettings):
    """Settings of all annotators for a judge."""

    min_share: float = setting(
        0.1,
        help="Each label must have at least this share of the tokens: a judge learns nothing from one class alone.",
        ge=0,
        lt=0.5,
    )


@dataclass(frozen=True)
class Frozen:
    """The models that an annotator reads; both stay frozen."""

    target: Target
    drafter: Drafter
    seed: int
    layer: int = -1
    """The target's hidden state that a judge reads."""


class Annotator(Protocol):
    """Labels the draft tokens of texts. Built as `annotators.build(settings, frozen)`.

    `for_head` is the kind of head that its labels train.
    """

    for_head: ClassVar[str]

    def label(self, records: Sequence[Record]) -> list[HeadRows]:
        """Return the rows of each record: a pure function of the record, the models and the seed."""
        ...
