"""Whether a word looks random, or written by a person."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

RUN = re.compile(r"[A-Za-z0-9]+")


def entropy(word: str) -> float:
    """Return the entropy of a word's characters, in bits a character."""
    return -sum(n / len(word) * math.log2(n / len(word)) for n in Counter(word).values())


def has_random_run(word: str, *, length: int) -> bool:
    """Return whether a run of letters and digits has this length and is neither a word nor a number.

    Such a run mixes letters with digits, or switches between small and capital letters more often than camelCase.
    """
    return any(_is_random(run) for run in RUN.findall(word[:4096]) if len(run) >= length)


def _is_random(run: str) -> bool:
    if len(set(run)) < 5:
        return False
    digits = sum(map(str.isdigit, run))
    if 2 <= digits < len(run) or (digits == 1 and len(run) >= 12):
        return entropy(run[:256]) > 2.2
    switches = sum(one.isupper() != other.isupper() for one, other in pairwise(run))
    return len(run) >= 16 and digits < len(run) and 3 * switches > len(run)


def is_high_entropy(word: str) -> bool:
    """Return whether a word of at least 20 characters mixes small letters, capitals and digits like a random one."""
    kinds = (str.isdigit, str.islower, str.isupper)
    mixed = all(sum(map(kind, word[:256])) >= 2 for kind in kinds)
    return len(word) >= 20 and mixed and entropy(word[:256]) > 3.5
