"""Confidences of draft tokens as chances of acceptance: the files of `drafttrain calibrate`, and the policies that read them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.core.proposals import Budget, Context, DraftStep
from drafttrain.core.recalibration import ChanceMap, read_map
from drafttrain.heads.folder import differing_models
from drafttrain.heads.token_head import MadeFor
from drafttrain.target_model import Target

LARGEST_PROBABILITY = "largest probability"
"""Of the drafter's distribution at temperature 1."""
CONFIDENCE_HEAD = "confidence head"
"""The drafter's own prediction (`dspark`)."""
ACCEPTANCE_HEAD = "acceptance head"
"""The prediction of a head that was trained beside the drafter."""

CALIBRATION_HELP = (
    "File of `drafttrain calibrate`, which makes its confidence a chance of acceptance; null: it is taken as it is."
)


@runtime_checkable
class HasConfidence(Protocol):
    """A length policy of chains that decides by a confidence."""

    confidence: ClassVar[str]
    """Which one."""

    def budget(self, context: Context) -> Budget:
        """Return the largest draft of the next round."""
        ...

    def noted(self, step: DraftStep) -> tuple[int, float] | None:
        """Return (depth of a draft token, the confidence in it as it is); None: this step has none."""
        ...


class Recalibration:
    """Maps confidences by a file, which is read at the first use.

    Args:
        path: None: they stay as they are.
        of: The confidence that it must be for.
    """

    def __init__(self, path: str | None, *, of: str) -> None:
        self._path = path
        self._of = of

    @cached_property
    def _map(self) -> ChanceMap:
        path = Path(str(self._path)).expanduser()
        held = read_json(path)
        if held.get("confidence") != self._of:
            raise CheckpointError(
                f"{path}: is for the confidence {held.get('confidence')!r:.60}, and this length policy decides by {self._of!r}. Run "
                "drafttrain calibrate with the same eval.length"
            )
        try:
            return read_map(held.get("map"))
        except ValueError as error:
            raise CheckpointError(f"{path}: map: {error}") from error

    def each(self, confidences: Sequence[float]) -> list[float]:
        """Return the chance of each confidence."""
        if self._path is None or not confidences:
            return list(confidences)
        found: list[float] = self._map(confidences).tolist()
        return found

    def one(self, confidence: float) -> float:
        """Return the chance of one."""
        return self.each([confidence])[0]


def check_calibration(path: Path, *, target: Target, drafter: Path) -> None:
    """Refuse a file that was fitted on other models: its chances mean nothing for these.

    Raises:
        CheckpointError: With every model that differs; or the file does not name its models.
    """
    held: Any = read_json(path).get("made_for")
    try:
        made = MadeFor(**held)
    except TypeError as error:
        raise CheckpointError(
            f"{path}: not a file of drafttrain calibrate: made_for must name its target and drafter, got {held!r:.60}"
        ) from error
    if others := differing_models(made, target=target, drafter=drafter):
        raise CheckpointError(
            f"{path}: was fitted for {' and '.join(others)}. Run drafttrain calibrate for these models"
        )
