"""Sorted drafters: exits share all weights, are trained together, route token by token, and stay lossless."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError
from drafttrain.core.generations import ForwardEvent
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.causal_lm.cut import sub_model
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.sorted_lm.module import FILE, SortedLMDrafter, SortedLMSettings
from drafttrain.drafters.sorted_lm.routed_lm import RoutedLM
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.losses.ce import CrossEntropy, CrossEntropySettings
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer
from tests.drafters.test_causal_lm_decoding import model, texts
from tests.eval.decoding import PROMPTS, chi_square, decode, greedy, small_target

LAYERS, EXITS = 4, (1, 2)
LOGITS = TargetNeeds(logits=True)


def drafter_of(made: Any, thresholds: Sequence[float] | None = None) -> SortedLMDrafter:
    drafter = SortedLMDrafter(made)
    drafter._choose(EXITS, thresholds, name="exits")
    return drafter.eval()


def batch_of(records: Sequence[Sequence[int]]) -> DraftBatch:
    made = [Record(str(i), list(text), [True] * len(text)) for i, text in enumerate(records)]
    return pack(made, width=sum(map(len, records)), weight_of_step=1.0)[0]


def step_of(drafter: CausalLMDrafter, batch: DraftBatch) -> Tensor:
    return batch_loss(drafter, CrossEntropy(CrossEntropySettings()), batch, vocab_size=50).total


def test_the_exits_are_the_first_layers_of_one_model_and_nothing_is_stored_twice(tmp_path: Path) -> None:
    made = model(num_hidden_layers=LAYERS, dtype=torch.float32)
    drafter, plain = drafter_of(made), CausalLMDrafter(made)
    assert {name: id(weight) for name, weight in drafter.state_dict(keep_vars=True).items()} == {
        name: id(weight) for name, weight in plain.state_dict(keep_vars=True).items()
    }
    drawn = batch_of(texts([9, 5], 3))
    with torch.no_grad():
        drafted = drafter(drawn)
        for layers, one in zip(EXITS, drafted.beside, strict=True):
            part = sub_model(made, num_layers=layers)
            names = {name for name, _ in part.named_parameters()}
            assert names < {name for name, _ in made.named_parameters()}
            wanted_BTV = CausalLMDrafter(part)(drawn).logits_BTV(1)
            torch.testing.assert_close(one.drafted.logits_BTV(1), wanted_BTV, rtol=1e-5, atol=1e-5)
            # The control: another exit.
            assert (drafted.logits_BTV(1) - wanted_BTV).norm() > 0.1 * wanted_BTV.norm()
        torch.testing.assert_close(drafted.logits_BTV(1), plain(drawn).logits_BTV(1))
    drafter.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors", FILE}


def test_the_loss_is_the_sum_of_the_losses_of_all_exits_and_its_gradient_too() -> None:
    made = model(num_hidden_layers=LAYERS, dtype=torch.float32)
    batch = batch_of(texts([12, 7], 4))
    parts = [sub_model(made, num_layers=layers) for layers in (*EXITS, LAYERS)]
    totals = [step_of(CausalLMDrafter(part), batch) for part in parts]
    total = step_of(drafter_of(made), batch)
    torch.testing.assert_close(total, torch.stack(totals).sum())
    assert total > 1.5 * totals[-1], "the last layer alone has another loss"
    total.backward()
    for one in totals:
        one.backward()
    for layer, others in ((0, parts), (1, parts[1:]), (3, parts[2:])):
        found = made.model.layers[layer].mlp.up_proj.weight.grad
        wanted = torch.stack([part.model.layers[layer].mlp.up_proj.weight.grad for part in others]).sum(0)
        assert (found - wanted).norm() < 1e-4 * wanted.norm()
        # The control: the loss of the last layer alone.
        assert (
            layer == 3 or (others[-1].model.layers[layer].mlp.up_proj.weight.grad - wanted).norm() > 0.1 * wanted.norm()
        )


def routed(made: Any, thresholds: Sequence[float], listener: Any = None) -> RoutedLM:
    return RoutedLM(made, exits=EXITS, thresholds=thresholds, num_tokens=50, listener=listener)


class Reading:
    """Reads texts with exits, and holds each distribution beside one that is computed from the beginning of the text."""

    def __init__(self, made: Any, thresholds: Sequence[float]) -> None:
        self.events = list[ForwardEvent]()
        self.alone = {layers: sub_model(made, num_layers=layers).double() for layers in (*EXITS, LAYERS)}
        self.lm = routed(made, thresholds, self.events.append)
        self.texts = texts([5, 9, 0], 0)
        self.worst, self.layers = 0.0, list[int]()
        self.lm.begin(self.texts)

    @torch.no_grad()
    def read(self, tokens: list[list[int]]) -> None:
        before = len(self.events)
        found = self.lm.forward(tokens, needs=LOGITS)
        ran = [event.shape.num_sequences for event in self.events[before:]]
        for number, (text, new) in enumerate(zip(self.texts, tokens, strict=True)):
            text += new
            logits_BTV = found[number].logits_BTV
            if not new or logits_BTV is None:
                continue
            wanted = {layers: part(torch.tensor([text])).logits[0, -1] for layers, part in self.alone.items()}
            distances = {
                layers: float((logits_BTV[0, -1] - wanted_V).norm() / wanted_V.norm())
                for layers, wanted_V in wanted.items()
            }
            chosen = min(distances, key=lambda layers: distances[layers])
            self.layers.append(chosen)
            self.worst = max(self.worst, distances[chosen])
        assert ran[0] == sum(map(bool, tokens))

    def keep(self, counts: list[int]) -> None:
        kept = self.lm.kept
        self.lm.keep([range(count) for count in counts])
        self.texts = [text[: old + count] for text, old, count in zip(self.texts, kept, counts, strict=True)]
        assert self.lm.lengths == [len(text) for text in self.texts]

    def drop(self, keep: list[int]) -> None:
        self.lm.drop(keep)
        self.texts = [self.texts[number] for number in keep]


def rounds(reading: Reading) -> None:
    """Draft, reject, accept, finish a sequence, and draft again."""
    for number, (sizes, kept) in enumerate([([2, 2, 2], [2, 3, 1]), ([1, 3, 1], [1, 0, 3]), ([2, 1, 1], [4, 2, 1])]):
        reading.read(texts(sizes, number))
        for again in range(2):
            reading.read(texts([1, 1, 1], 10 * number + again + 1))
        reading.keep(kept)
    reading.drop([0, 2])
    for again in range(4):
        reading.read(texts([1, 1], 40 + again))


BYTES = (0.13, 0.19, 0.1)
"""The same, of a model of bytes."""
MIXED = (0.12, 0.16, 0.0)
"""Thresholds of exits of a random model, between its largest probabilities."""


def test_logits_of_mixed_exits_are_those_of_reading_the_text_from_its_beginning() -> None:
    reading = Reading(model(num_hidden_layers=LAYERS, initializer_range=0.15), MIXED)
    rounds(reading)
    assert reading.worst < 1e-6
    assert {*reading.layers} == {*EXITS, LAYERS}, "all exits draft here"


def test_layers_that_do_not_read_the_tokens_that_they_missed_give_other_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: the later layers read zeros in the place of what they missed."""
    stored = RoutedLM._taken
    monkeypatch.setattr(
        RoutedLM,
        "_taken",
        lambda self, *given: [torch.cat([0 * rows_ND[:-1], rows_ND[-1:]]) for rows_ND in stored(self, *given)],
    )
    reading = Reading(model(num_hidden_layers=LAYERS, initializer_range=0.15), MIXED)
    rounds(reading)
    assert reading.worst > 1e-2


@pytest.mark.parametrize(("thresholds", "layers"), [((0, 0, 0), 1), ((2, 0, 0), 2), ((2, 2, 0), 4), ((2, 2, 2), 4)])
def test_a_threshold_of_0_always_drafts_and_one_above_1_never(thresholds: tuple[float, ...], layers: int) -> None:
    reading = Reading(model(num_hidden_layers=LAYERS, initializer_range=0.15), thresholds)
    rounds(reading)
    assert {*reading.layers} == {layers}
    assert reading.worst < 1e-6
    assert all(reading.lm.unsure) == (thresholds[-1] > 1)
    # An exit that never drafts runs no head; layers after the one that drafts never run.
    ran = {(event.shape.num_layers, bool(event.shape.head_rows)) for event in reading.events if not event.prefill}
    wanted = {1: {(1, True)}, 2: {(1, False), (1, True)}, 4: {(1, False), (2, True)}}
    assert ran == wanted[layers]


@pytest.fixture(scope="module")
def target() -> Target:
    made = model(num_hidden_layers=2, vocab_size=257)
    return Target(made, byte_tokenizer(), name="tiny", fingerprint="tiny")


@pytest.mark.parametrize(("thresholds", "batched"), [((0.0, 0.0, 0.0), True), (BYTES, True), (BYTES, False)])
def test_greedy_output_is_the_targets_own(target: Target, batched: bool, thresholds: tuple[float, ...]) -> None:
    proposer = drafter_of(model(num_hidden_layers=LAYERS, vocab_size=257), thresholds).proposer(target)
    wanted = [greedy(target, prompt, 24) for prompt in PROMPTS]
    groups = [PROMPTS] if batched else [[prompt] for prompt in PROMPTS]
    found = [one for group in groups for one in decode(target, proposer, prompts=group, new=24, stop_tokens=())]
    assert [one.tokens for one in found] == wanted


@pytest.mark.parametrize("spoiled", [False, True])
def test_sampled_output_has_the_targets_distribution(spoiled: bool) -> None:
    """Control: rows of q that belong to other tokens."""
    small = small_target()
    made = model(num_hidden_layers=LAYERS, vocab_size=8, initializer_range=0.6)
    proposer: Any = drafter_of(made, (0.5, 0.6, 0.2)).proposer(small)
    if spoiled:
        propose = proposer.propose

        def with_other_rows(*arguments: Any) -> Any:
            found = propose(*arguments)
            return [
                one if one.q_rows_RV is None else replace(one, q_rows_RV=one.q_rows_RV.roll(1, dims=-1))
                for one in found
            ]

        proposer.propose = with_other_rows
    p_value = chi_square(small.model, proposer, 1.0, samples=500, target=small)
    assert (p_value < 1e-3) == spoiled


def test_drafting_stops_where_no_exit_is_confident(target: Target) -> None:
    made = model(num_hidden_layers=LAYERS, vocab_size=257)
    drafted = {}
    for last in (0.0, BYTES[-1], 2.0):
        proposer = drafter_of(made, (2.0, 2.0, last)).proposer(target)
        policy = FixedLength(FixedLengthSettings(4))
        found = decode(target, proposer, policy=policy, new=12, stop_tokens=())
        drafted[last] = sum(one.num_draft_tokens for g in found for one in g.rounds)
    assert drafted[0.0] > drafted[BYTES[-1]] > drafted[2.0] == 0


def test_what_cannot_draft_is_refused(target: Target, tmp_path: Path) -> None:
    drafter = drafter_of(model(num_hidden_layers=LAYERS, vocab_size=257))
    with pytest.raises(CheckpointError, match="sorted_lm drafts chains only"):
        decode(target, drafter.proposer(target), policy=TreeLength(TreeSettings(depth=2, width=2)))
    changed = model(num_hidden_layers=LAYERS, vocab_size=257, hidden_act="gelu")
    with pytest.raises(CheckpointError, match="activation, or a changed module"):
        drafter_of(changed).proposer(target)
    with pytest.raises(CheckpointError, match="exits must be below the drafter's 2 layers, got 2"):
        drafter_of(model(num_hidden_layers=2))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"exits": [2, 1]}, r"exits: at least one layer, ascending, each once, got \[2, 1\]"),
        ({"exits": []}, "exits: at least one layer"),
        ({"exits": [2], "num_layers": 2}, "exits: must be below num_layers 2, got 2"),
        ({"thresholds": [0.5]}, "thresholds: 2 are needed"),
        ({"tokenizer": "other"}, "tokenizer: a sorted_lm has the target's"),
    ]
    for given, why in cases:
        assert re.search(why, "; ".join(SortedLMSettings(**given).check())), why
    assert not SortedLMSettings(num_layers=3, exits=[1, 2], thresholds=[0, 0.5, 2]).check()


def test_the_folder_reads_back_and_damaged_ones_are_refused(target: Target, tmp_path: Path) -> None:
    settings = SortedLMSettings(num_layers=3, exits=[1, 2], hidden_size=32, num_heads=1)
    drafter = SortedLMDrafter.create(settings, target=target, tokenizer=target.tokenizer).eval()
    drafter.thresholds = {"other": [0.5, 0.5, 0.0], "tiny": [0.25, 0.5, 0.125]}
    drafter.save(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    again = SortedLMDrafter.load(tmp_path, target)
    assert again.exits == (1, 2)
    assert list(again.thresholds_for(target)) == [0.25, 0.5, 0.125]
    unknown = Target(target.model, target.tokenizer, name="x", fingerprint="x")
    assert list(again.thresholds_for(unknown)) == [0.5, 0.5, 0.0], "those of the first target"
    written = (tmp_path / FILE).read_text()
    for old, new, why in (
        ("0.125", "-0.125", "thresholds must be 3 numbers from 0"),
        ('"exits": [', '"exits": [9, ', "exits must be layers, ascending"),
    ):
        assert old in written
        (tmp_path / FILE).write_text(written.replace(old, new))
        with pytest.raises(CheckpointError, match=why):
            SortedLMDrafter.load(tmp_path, target)
    (tmp_path / FILE).write_text(written.replace("2", "3"))
    with pytest.raises(CheckpointError, match="exits must be below the drafter's 3 layers, got 3"):
        SortedLMDrafter.load(tmp_path, target)


@pytest.mark.slow
def test_sorted_training_makes_every_exit_better_and_costs_the_last_one_little() -> None:
    """Beside the same model trained at its last layer alone, both on the text that they are trained on."""
    torch.manual_seed(0)
    table_VV = torch.softmax(3 * torch.randn(16, 16), dim=-1)
    tokens = torch.zeros(16, 65, dtype=torch.long)
    for place in range(64):
        tokens[:, place + 1] = torch.multinomial(table_VV[tokens[:, place]], 1)[:, 0]
    batch = batch_of(tokens[:8].tolist())
    losses = {}
    for name, kind in (("sorted", SortedLMDrafter), ("plain", CausalLMDrafter)):
        made = model(num_hidden_layers=3, vocab_size=16, dtype=torch.float32, initializer_range=0.1)
        drafter = kind(made)
        if isinstance(drafter, SortedLMDrafter):
            drafter._choose(EXITS, None, name="exits")
        optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            step_of(drafter, batch).backward()
            optimizer.step()
        with torch.no_grad():
            parts = [CausalLMDrafter(sub_model(made, num_layers=layers)) for layers in (1, 2, 3)]
            losses[name] = [float(step_of(part, batch)) / 512 for part in parts]
    assert losses["sorted"][0] < losses["plain"][0] - 0.03
    assert losses["sorted"][1] < losses["plain"][1]
    assert losses["sorted"][2] < losses["plain"][2] + 0.1
