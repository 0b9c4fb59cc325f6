"""The layer as decoding runs it gives the module's logits: chains, trees, batches with drops, caches that grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drafttrain.drafters import keys_and_values
from drafttrain.drafters.decoding_layer import TurnTable
from drafttrain.drafters.eagle.cache import EagleCache
from drafttrain.drafters.eagle.decoding import DecodingEagle
from drafttrain.drafters.tree_draft import DraftNode
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer
from tests.drafters.eagle_models import chain_logits, eagle_drafter, eagle_target

CHAIN = [(0,), (0, 0), (0, 0, 0)]
TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 1, 0), (2, 0, 0), (2, 0, 1)]
"""Nodes by their place among siblings, level by level."""
ROUNDS = [(5, 9, 1), (1, 1, 1), (3, 0, 2), (4, 2, 6)]
"""By round, how many slots each sequence reads; sequences without any draft nothing in that round."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows in nearly every call."""
    monkeypatch.setattr(keys_and_values, "COLUMNS_AT_ONCE", 2)


def models(dtype: torch.dtype = torch.float64, kind: str = "eagle3", **settings: Any) -> tuple[Any, Target]:
    target = eagle_target(num_layers=3, vocab_size=40, hidden_size=32)
    target = Target(target.model.to(dtype), byte_tokenizer(), name="tiny", fingerprint="")
    return eagle_drafter(kind, target, **settings).to(dtype), target


def texts(count: int) -> list[list[int]]:
    return torch.randint(1, 40, (count, 26), generator=torch.Generator().manual_seed(3)).tolist()


def token_of(path: tuple[int, ...]) -> int:
    return 1 + sum((place + 1) * 5**level for level, place in enumerate(path)) % 39


class Comparison:
    """Reads texts and drafts with `DecodingEagle`, and every row again with the modules."""

    def __init__(self, drafter: Any, target: Target, count: int) -> None:
        self.drafter, self.target = drafter, target
        self.decoding = DecodingEagle(drafter, device=torch.device("cpu"))
        self.decoding.begin(count)
        self.texts = texts(count)
        positions = torch.arange(26)[None]
        self.features = [
            drafter.features(target.read(torch.tensor([text]), positions, drafter.needs()))[0] for text in self.texts
        ]
        self.worst = 0.0

    def round(self, sizes: tuple[int, ...], nodes: list[tuple[int, ...]]) -> None:
        lengths = self.decoding.cache.lengths
        features = [one[n : n + size] for one, n, size in zip(self.features, lengths, sizes, strict=True)]
        tokens = [text[n + 1 : n + 1 + size] for text, n, size in zip(self.texts, lengths, sizes, strict=True)]
        states = self.decoding.read_slots(tokens, torch.nn.utils.rnn.pad_sequence(features, batch_first=True))
        read: list[dict[tuple[int, ...], Any]] = [{} for _ in sizes]
        for row, size in enumerate(sizes):
            if size:
                self.compare(row, (), states[row, size - 1])
                read[row][()] = -1, states[row, size - 1]
        for level in range(1, max(map(len, nodes)) + 1):
            of_level = [path for path in nodes if len(path) == level]
            # In a tree each sequence reads another number of nodes.
            fewer = [row if len(nodes) > len(CHAIN) else 0 for row in range(len(sizes))]
            wanted = [of_level[: len(of_level) - fewer[row]] if known else [] for row, known in enumerate(read)]
            frontiers = [
                [DraftNode(token_of(path), level, *read[row][path[:-1]]) for path in paths if path[:-1] in read[row]]
                for row, paths in enumerate(wanted)
            ]
            states = self.decoding.read_drafts(frontiers)
            for row, paths in enumerate(wanted):
                for place, path in enumerate(path for path in paths if path[:-1] in read[row]):
                    self.compare(row, path, states[row, place])
                    read[row][path] = len(read[row]) - 1, states[row, place]
        self.decoding.forget_drafts()

    def compare(self, row: int, path: tuple[int, ...], state_D: torch.Tensor) -> None:
        length = self.decoding.cache.lengths[row]
        tokens = self.texts[row][: length + 1] + [token_of(path[:level]) for level in range(1, len(path) + 1)]
        wanted = chain_logits(self.drafter, self.target, tokens, length - 1, len(path) + 1)[-1].double()
        found = self.decoding.head(state_D[None])[0].double()
        self.worst = max(self.worst, float((found - wanted).abs().max() / wanted.abs().max()))


@torch.no_grad()
def difference(drafter: Any, target: Target, nodes: list[tuple[int, ...]], *, count: int = 3) -> float:
    """Return the largest difference of a logit, relative to the largest one of its row."""
    compared = Comparison(drafter, target, count)
    for number, sizes in enumerate(ROUNDS):
        if number == 2 and count == 3:
            compared.decoding.drop([0, 2])
            compared.texts, compared.features = compared.texts[::2], compared.features[::2]
            count = 2
        compared.round(tuple(sizes[-count:]), nodes)
    return compared.worst


@pytest.mark.parametrize("nodes", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("count", [1, 3])
def test_decoding_gives_the_logits_of_the_modules(nodes: list[tuple[int, ...]], count: int) -> None:
    drafter, target = models(num_kv_heads=2, num_heads=4)
    assert difference(drafter, target, nodes, count=count) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("eagle", {}), ("eagle3", {"norm_output": True, "norm_before_residual": True, "fc_norm": True})],
)
def test_every_variant_of_the_layer(kind: str, settings: Any) -> None:
    drafter, target = models(kind=kind, **settings)
    assert difference(drafter, target, TREE) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_differ_by_rounding(dtype: torch.dtype) -> None:
    drafter, target = models(dtype, scale=0.1)
    assert 0 < difference(drafter, target, TREE) < TOLERANCE[dtype]


def test_a_draft_token_at_the_position_of_its_parent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    at = TurnTable.at
    late = lambda self, positions, **options: at(self, (positions - positions % 3 // 2).clamp(min=0), **options)  # noqa: E731
    monkeypatch.setattr(TurnTable, "at", late)
    assert difference(*models(), CHAIN) > 1e-4


def test_a_draft_token_that_attends_to_other_branches_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EagleCache, "allowed_on_paths", lambda self, paths, *, width: None)
    assert difference(*models(), CHAIN, count=1) < TOLERANCE[torch.float64]
    assert difference(*models(), TREE, count=1) > 1e-4


def test_a_column_that_was_not_copied_when_the_cache_grew_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = keys_and_values.KeysAndValues.reserve

    def losing(self: Any, columns: int, *, like: Any) -> None:
        before = self._states and self._states[0].shape[2]
        reserve(self, columns, like=like)
        if before and self._states[0].shape[2] > before:
            self._states[0][:, :, before - 1] = 0

    monkeypatch.setattr(keys_and_values.KeysAndValues, "reserve", losing)
    assert difference(*models(), CHAIN, count=1) > 1e-4
