"""How often the host waits for the device: a micro-batch of training, a round of decoding, a token of generation.

A waiting host asks the device for nothing, and the device stands still until it does again. Ceilings may only go down.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance.lossless import LosslessSettings
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.length.tree import TreeSettings
from drafttrain.target_model import Target
from tests.cuda.happenings import Happenings
from tests.cuda.kinds import CHAINS_ONLY, KINDS, ON_TEXTS, loss_settings
from tests.cuda.models import PROMPTS, engine, new_drafter, texts
from tests.cuda.steps import trained, with_target

pytestmark = pytest.mark.pretended_cuda


@dataclass(frozen=True)
class Ceiling:
    """Times that the host waits, and copies out of memory that is not pinned."""

    waits: float
    copies: float


MICRO_BATCH = Ceiling(0.5, 0)
"""Of training: of a step of two, the norm of its gradient alone is read off the device."""

CHAIN = {
    "causal_lm": Ceiling(7.25, 13.7),
    "sorted_lm": Ceiling(7.5, 22.5),
    "matformer": Ceiling(7.5, 13.7),
    "medusa": Ceiling(4.7, 3.5),
    "medusa2": Ceiling(4.7, 3.5),
    "kangaroo": Ceiling(6, 31),
    "early_exit": Ceiling(6.8, 31),
    "consistency": Ceiling(4, 5),
    "consistency_whole": Ceiling(4, 5),
    "lexical_units": Ceiling(5.2, 5.2),
    "hamburger": Ceiling(6, 6.2),
    "eagle": Ceiling(6, 15),
    "eagle3": Ceiling(6, 15),
    "eagle3_cut": Ceiling(6, 15),
    "dflash": Ceiling(3, 5),
    "dspark": Ceiling(6.5, 9.7),
    "jetspec": Ceiling(3.3, 5),
    "p_eagle": Ceiling(3, 4),
    "p_eagle_own": Ceiling(3, 4),
    "domino": Ceiling(6.5, 10),
    "xpress": Ceiling(3.3, 6),
    "dflash2": Ceiling(6.5, 9.7),
    "mtp": Ceiling(6, 15),
    "chimera": Ceiling(6, 10),
    "hidden_transfer": Ceiling(3.5, 4.3),
}
"""A round of two sequences with four draft tokens each."""

TREE = {
    "causal_lm": Ceiling(9, 15.7),
    "matformer": Ceiling(6.5, 10.7),
    "medusa": Ceiling(4.7, 3.5),
    "medusa2": Ceiling(4.7, 3.5),
    "eagle": Ceiling(8, 12),
    "eagle3": Ceiling(8, 12),
    "eagle3_cut": Ceiling(8, 12),
    "dflash": Ceiling(3, 5),
    "dspark": Ceiling(6.5, 9.7),
    "jetspec": Ceiling(3.3, 5),
    "p_eagle": Ceiling(3, 4),
    "p_eagle_own": Ceiling(3, 4),
    "domino": Ceiling(5.5, 8.5),
    "xpress": Ceiling(6.5, 9.7),
    "dflash2": Ceiling(6.5, 9.7),
    "mtp": Ceiling(8, 12),
    "chimera": Ceiling(6, 9.7),
    "hidden_transfer": Ceiling(3.8, 4.6),
}
"""A round of two sequences with trees of twelve nodes in three levels."""

GOAL = Ceiling(2, 0)
GENERATION = Ceiling(1, 2)
"""A token of four texts that are written together."""


def check(counted: Counter[tuple[str, str]], copied: Counter[tuple[str, str]], times: int, ceiling: Ceiling) -> None:
    """Require that it waits and copies no more than this a time, and show where it does."""
    lines = [
        f"  {number / times:6.2f}  {what}  at {place}"
        for counts in (counted, copied)
        for (what, place), number in counts.most_common()
    ]
    found = Ceiling(sum(counted.values()) / times, sum(copied.values()) / times)
    assert found.waits <= ceiling.waits, "\n".join([f"{found} is more than {ceiling}", *lines])
    assert found.copies <= ceiling.copies, "\n".join([f"{found} is more than {ceiling}", *lines])


def difference(first: Happenings, second: Happenings) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Return what the second had more than the first: what both have is of their beginning and end."""
    counted, copied = Counter(second.waits), Counter(second.copies)
    counted.subtract(first.waits)
    copied.subtract(first.copies)
    return +counted, +copied


def taken(cuda: Happenings) -> Happenings:
    """Return what was counted, and begin again."""
    found = Happenings(waits=Counter(cuda.waits), copies=Counter(cuda.copies))
    cuda.clear()
    return found


@pytest.mark.parametrize("name", ON_TEXTS)
def test_a_micro_batch_waits_no_more_than_this(name: str, target: Target, tmp_path: Path, cuda: Happenings) -> None:
    short, long, micro_batches = 1, 3, 2
    # What is looked up once about a target is none of a micro-batch's.
    with_target(target, new_drafter(name, target))
    found = []
    for steps in (short, long):
        drafter = new_drafter(name, target)
        cuda.clear()
        trained(drafter, target, loss_settings(name), tmp_path / str(steps), max_steps=steps)
        found.append(taken(cuda))
    check(*difference(*found), (long - short) * micro_batches, MICRO_BATCH)


def rounds(target: Target, drafter: Drafter, length: Any, max_new_tokens: int) -> int:
    """Decode two prompts together and return in how many rounds."""
    ledger = Ledger()
    options = {"length": length, "rule": LosslessSettings(), "sampling": Sampling(), "listener": ledger.append}
    with drafter.adapting(target) as served:
        loop = engine(served, drafter.proposer(served, ledger.append), max_new_tokens=max_new_tokens, **options)
        return max(len(one.rounds) for one in loop.generate(PROMPTS))


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_round_waits_no_more_than_this(
    name: str, tree: bool, target: Target, drafter_of: Any, cuda: Happenings
) -> None:
    if tree and name in CHAINS_ONLY:
        pytest.skip("it drafts no trees")
    length = TreeSettings(num_draft_tokens=12, depth=3, width=3) if tree else FixedLengthSettings(4)
    drafter = drafter_of(name)
    found, times = [], []
    for max_new_tokens in (6, 16):
        cuda.clear()
        times.append(rounds(target, drafter, length, max_new_tokens))
        found.append(taken(cuda))
    check(*difference(*found), times[1] - times[0], (TREE if tree else CHAIN).get(name, GOAL))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_token_of_generation_waits_no_more_than_this(temperature: float, target: Target, cuda: Happenings) -> None:
    tasks = [Task(one.id, one.tokens, Sampling(temperature)) for one in texts((9, 9, 9, 9))]
    found = []
    for max_new_tokens in (2, 6):
        cuda.clear()
        continuations(tasks, target, max_new_tokens=max_new_tokens, seed=0)
        found.append(taken(cuda))
    check(*difference(*found), 4, GENERATION)
