"""Two stages of a training: text alone, then a share of records with images that rises to all.

Source: Lin et al. 2025, Speculative Decoding Reimagined for Multimodal Large Language Models (MSD), arXiv 2505.14260. Its
coin for each record is drawn here without variance: exactly the expected number of records has images up to every position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.sampler import Sampler


@dataclass
class CurriculumSettings:
    """First text, then more and more records with images."""

    text_share: float = setting(
        0.5,
        help="Share of the trained records that come first and have no images; after them the share of records with images rises "
        "linearly from 0 to 1.",
        ge=0,
        lt=1,
    )


def share_with_images(place: float, *, text_share: float) -> float:
    """Return the share of records with images at a place of the training, 0 to 1."""
    return min(1.0, max(0.0, (place - text_share) / (1 - text_share)))


class CurriculumSampler(Sampler):
    """Sources of text and sources of images, each mixed by their weights; the curriculum says which are next.

    Args:
        with_images: By source, whether its records have images.
        num_records: Records of the whole training; after them all have images.

    Raises:
        DataError: All sources have images, or none has.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        with_images: Sequence[bool],
        settings: CurriculumSettings,
        num_records: int,
    ) -> None:
        super().__init__(sizes, weights, seed=seed)
        self._kinds = [
            [i for i, seen in enumerate(with_images) if seen is kind and weights[i]] for kind in (False, True)
        ]
        if not all(self._kinds):
            which = "no source has" if not self._kinds[1] else "all sources have"
            raise DataError(
                f"data.curriculum: {which} images: it needs a source of text and one of records with images"
            )
        self._samplers = [
            Sampler([sizes[i] for i in kind], [weights[i] for i in kind], seed=seed) for kind in self._kinds
        ]
        self._begin, self._total = settings.text_share * num_records, num_records

    def turn(self, position: int) -> tuple[int, int]:
        """Return (source, how many records of this source are read before this position)."""
        before = self.num_with_images(position)
        seen = self.num_with_images(position + 1) > before
        source, count = self._samplers[seen].turn(before if seen else position - before)
        return self._kinds[seen][source], count

    def num_with_images(self, position: int) -> int:
        """Return how many of the records before a position have images: the integral of the share, rounded down."""
        rising = min(position, self._total) - self._begin
        after = max(0, position - self._total)
        return int(max(0.0, rising) ** 2 / (2 * (self._total - self._begin))) + after
