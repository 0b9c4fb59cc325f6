"""Labels from mistakes that a person marked: 1 before the first mistake, 0 in it, none after it.

N = rows (draft tokens), D = hidden
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.core.texts import Record
from drafttrain.data_gen.annotate import Frozen, JudgeLabelSettings, annotators
from drafttrain.data_gen.annotate.states import states_of
from drafttrain.data_gen.names import problem_of
from drafttrain.data_gen.plain_ids import front_of, plain_ids
from drafttrain.heads.rows import HeadRows


@dataclass(kw_only=True)
class MarkedSettings(JudgeLabelSettings):
    """Answers with marked mistakes: the JSON lines of the recipe's source, with `errors` added."""

    path: str = setting(
        help="JSON lines: id, prompt, completion, and errors: [[start, end], ...] in characters of the completion; [] for none."
    )


@annotators.register("marked", MarkedSettings)
class Marked:
    """Label 1 for tokens that end before the first marked mistake, 0 for tokens of that mistake, none after it.

    Source: Bachmann et al. 2025, Judge Decoding, arXiv 2501.19309, 4.1.
    """

    for_head: ClassVar[str] = "judge"

    def __init__(self, settings: MarkedSettings, frozen: Frozen) -> None:
        self.frozen = frozen
        self.path = Path(settings.path).expanduser()
        self.items = _read(self.path)

    def label(self, records: Sequence[Record]) -> list[HeadRows]:
        """Return the rows of each record."""
        found = []
        for record, states_TD in zip(records, states_of(records, self.frozen), strict=True):
            places, labels = self._labels(record)
            found.append(HeadRows(states_TD[places], torch.tensor(labels)))
        return found

    def _labels(self, record: Record) -> tuple[list[int], list[float]]:
        """Return the labelled tokens' places in the record, and their labels."""
        id = record.id if record.id in self.items else problem_of(record.id)
        if id not in self.items:
            raise DataError(f"{self.path}: no line has id {id!r}, which data.sources has")
        completion, errors = self.items[id]
        tokenizer = self.frozen.target.tokenizer
        front = front_of(tokenizer, completion)
        coded = tokenizer(front + completion, add_special_tokens=False, return_offsets_mapping=True)
        skipped = len(plain_ids(tokenizer, front))
        ids, offsets = list(coded.input_ids)[skipped:], coded.offset_mapping[skipped:]
        first = list(record.loss_mask).index(True)
        shown = list(record.tokens[first : first + len(ids)])
        if shown != ids[: len(shown)]:
            raise DataError(f"{self.path}: id {id!r}: its completion differs from the one in data.sources")
        labels = labels_of([(a - len(front), b - len(front)) for a, b in offsets[: len(shown)]], errors)
        return list(range(first, first + len(labels))), labels


def labels_of(offsets: Sequence[tuple[int, int]], errors: Sequence[tuple[int, int]]) -> list[float]:
    """Return the labels of the first tokens of a completion, up to the end of the first mistake.

    Args:
        offsets: Where each token begins and ends.
        errors: Where each mistake begins and ends.
    """
    if not errors:
        return [1.0] * len(offsets)
    start, end = min(errors)
    before = [(a, b) for a, b in offsets if b <= start]
    inside = [(a, b) for a, b in offsets if b > start and a < end]
    return [1.0] * len(before) + [0.0] * len(inside)


def _read(path: Path) -> dict[str, tuple[str, list[tuple[int, int]]]]:
    """Return completion and mistakes by id.

    Raises:
        DataError: Lists the lines that cannot be used.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file of marked answers (JSON lines)")
    items: dict[str, tuple[str, list[tuple[int, int]]]] = {}
    problems = []
    # Split at \n only: an id or a text may hold other line separators.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
            if str(value["id"]) in items:
                problems.append(f"  line {number}: id {str(value['id'])!r} occurs twice")
            completion, errors = value["completion"], [(int(a), int(b)) for a, b in value["errors"]]
            wrong = [span for span in errors if not 0 <= span[0] < span[1] <= len(completion)]
            if wrong:
                problems.append(
                    f"  line {number}: errors: {list(wrong[0])} is not a span of its {len(completion)} characters"
                )
            items[str(value["id"])] = (completion, errors)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"  line {number}: must have id, completion and errors: {error!r}")
    if problems:
        raise DataError(f"{path}: {len(problems)} lines cannot be used\n" + "\n".join(problems[:20]))
    return items
