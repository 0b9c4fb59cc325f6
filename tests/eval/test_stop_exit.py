"""The stop-and-exit controller: identities of its decoding, labels against brute force, its file, and what is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from drafttrain.commands.stop_exit import check_target, split
from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.eval.stop_exit.classifier import Classifiers, load_classifiers, train_classifiers
from drafttrain.eval.stop_exit.completer import Completer, Completion
from drafttrain.eval.stop_exit.controllers import NEVER, ByChance, FixedLayer, Thresholds, Whole
from drafttrain.eval.stop_exit.frontier import measure, rates
from drafttrain.eval.stop_exit.labels import Action, LabelledRows, joined, label
from drafttrain.eval.stop_exit.lines import Case, Lines, cases_of
from drafttrain.eval.stop_exit.shown import heading
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.anatomy import blocks, final_norm
from drafttrain.target_model.segments import SegmentedLM, check_segments
from tests.cli.test_cli import call
from tests.conftest import byte_tokenizer, random_llama

LAYERS, NEW = [1, 2, 4], 10
CASES = [Case(str(i), list(range(20 + i, 26 + 2 * i)), [1]) for i in range(6)]


def target_of(model: Any, fingerprint: str = "tiny") -> Target:
    return Target(model.double(), byte_tokenizer(), name="tiny", fingerprint=fingerprint)


@pytest.fixture(scope="module")
def target() -> Target:
    return target_of(random_llama(num_layers=5))


@pytest.fixture(scope="module")
def lines(target: Target) -> Lines:
    """Lines with many ends, so that a random model's texts have some."""
    found = Lines(target)
    found.ends_V[torch.arange(1, 257, 6)] = True
    return found


@pytest.fixture(scope="module")
def completer(target: Target, lines: Lines) -> Completer:
    return Completer(target, lines, layers=LAYERS, max_tokens=NEW)


@pytest.fixture(scope="module")
def classifiers(target: Target, lines: Lines) -> Classifiers:
    rows = joined([label(target, lines, text, layers=LAYERS) for text in own_texts(target)])
    return train_classifiers(rows, width=0, steps=20, lr=1e-2, seed=0)


@torch.no_grad()
def greedy(target: Target, lines: Lines, context: list[int], limit: int = NEW) -> list[int]:
    """The whole model reads the whole text again for every token."""
    tokens: list[int] = []
    while len(tokens) < limit:
        tokens.append(int(target.model(torch.tensor([[*context, *tokens]])).logits[0, -1].argmax()))
        if tokens[-1] in target.eos_token_ids or bool(lines.ends_V[tokens[-1]]):
            break
    return tokens


def own_texts(target: Target, length: int = 60) -> list[list[int]]:
    """Texts of the target itself, in which some tokens are others, so that some completions are right."""
    drawn = torch.Generator().manual_seed(3)
    found = []
    for start in range(3):
        tokens = torch.tensor([list(range(40 + start, 60 + start))])
        out = target.model.generate(tokens, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0)
        changed_T = torch.rand(out.shape[1], generator=drawn) < 0.15
        found.append(torch.where(changed_T, torch.randint(1, 257, out.shape, generator=drawn), out)[0].tolist())
    return found


def completions(completer: Completer, controller: Any) -> list[Completion]:
    return [completer.complete(case, controller) for case in CASES]


def texts(found: list[Completion]) -> list[list[int]]:
    return [list(one.tokens) for one in found]


def test_a_controller_that_never_acts_is_the_whole_target(target, lines, completer, classifiers):
    expected = [greedy(target, lines, list(case.context)) for case in CASES]
    assert len({len(one) for one in expected}) > 1  # some lines end
    for controller in (Whole(), Thresholds(classifiers, NEVER, NEVER)):
        found = completions(completer, controller)
        assert texts(found) == expected
        assert all(one.layer_passes == one.layer_rows == 5 * len(one.tokens) for one in found)
    # The control: a controller that acts writes other texts.
    assert texts(completions(completer, FixedLayer(2))) != expected


def test_exit_at_0_leaves_after_the_first_layer_always(completer, classifiers):
    found = completions(completer, Thresholds(classifiers, 0.0, NEVER))
    assert texts(found) == texts(completions(completer, FixedLayer(LAYERS[0])))
    for one in found:
        assert one.decisions[LAYERS[0]][Action.EXIT] == len(one.tokens)
        assert one.layer_passes == one.layer_rows == LAYERS[0] * len(one.tokens)


def test_stop_at_0_writes_nothing(completer, classifiers):
    for one in completions(completer, Thresholds(classifiers, 0.0, 0.0)):
        assert (list(one.tokens), one.stopped_at, one.layer_passes) == ([], LAYERS[0], LAYERS[0])


class Oracle(Whole):
    """Exits exactly where the shared head's token is the whole target's; inverted: exactly where it is not."""

    def __init__(self, target: Target, expected: list[int], *, inverted: bool = False) -> None:
        self.target, self.expected, self.inverted = target, list(expected), inverted
        self.place = 0

    def decide(self, layer: int, normed_D: torch.Tensor) -> Action:
        if layer == LAYERS[0]:
            self.place += 1
        right = int(self.target.model.lm_head(normed_D).argmax()) == self.expected[self.place - 1]
        return Action.EXIT if right != self.inverted else Action.GO_ON


def test_right_exits_change_no_token_since_skipped_blocks_are_run_later(target, lines, completer):
    expected = [greedy(target, lines, list(case.context)) for case in CASES]
    found = [completer.complete(case, Oracle(target, text)) for case, text in zip(CASES, expected, strict=True)]
    assert texts(found) == expected
    exits = sum(one.decisions[layer][Action.EXIT] for one in found for layer in LAYERS)
    assert 0 < exits < sum(map(len, expected))
    assert any(one.layer_passes < one.layer_rows for one in found)  # rows that caught up in one call
    wrong = [
        completer.complete(case, Oracle(target, [*text, *[0] * NEW], inverted=True))
        for case, text in zip(CASES, expected, strict=True)
    ]
    assert texts(wrong) != expected


def test_tokens_that_left_early_have_the_keys_and_values_of_the_whole_model(target):
    text, leave = list(range(30, 44)), [2, 1, 0, 3, 1, 0, 0, 2, 3]
    lm = SegmentedLM(target.model, boundaries=LAYERS, name="target")
    lm.start(text[:5])
    for token, last in zip(text[5:], leave, strict=True):
        lm.add(token)
        states = [lm.run(number) for number in range(last + 1)]
    with torch.no_grad():
        expected = target.model(torch.tensor([text])).logits[0, -1]
        without = target.model(torch.tensor([[*text[:-3], text[-1]]])).logits[0, -1]
    assert torch.allclose(states[-1], expected, atol=1e-9)
    assert not torch.allclose(states[-1], without, atol=1e-3)


def idle_behind(target: Target, layer: int) -> Target:
    """The target with blocks that do nothing from a layer on."""
    model = copy.deepcopy(target.model)
    for block in blocks(model)[layer:]:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    return target_of(model)


def test_every_exit_before_blocks_that_do_nothing_is_right(target, lines):
    idle = idle_behind(target, 2)
    completer = Completer(idle, lines, layers=LAYERS, max_tokens=NEW)
    whole = texts(completions(completer, Whole()))
    assert texts(completions(completer, FixedLayer(2))) == whole
    assert texts(completions(completer, FixedLayer(1))) != whole
    rows = joined([label(idle, lines, text, layers=LAYERS) for text in own_texts(idle)])
    assert all(int((rows.labels_N[layer] == Action.GO_ON).sum()) == 0 for layer in (2, 4))
    assert int((rows.labels_N[1] == Action.GO_ON).sum()) > 0


def brute_force(target: Target, lines: Lines, text: list[int], layer: int) -> list[int]:
    found = []
    for place in range(16, len(text)):
        rest = next((at for at in range(place + 1, len(text)) if bool(lines.ends_V[text[at]])), None)
        if rest is None:
            continue
        completion = greedy(target, lines, text[: place + 1], limit=rest - place + 1)
        if completion != text[place + 1 : rest + 1]:
            found.append(Action.STOP)
            continue
        with torch.no_grad():
            states = target.model(torch.tensor([text[: place + 1]]), output_hidden_states=True).hidden_states
            token = int(target.model.lm_head(final_norm(target.model)(states[layer][0, -1])).argmax())
        found.append(Action.EXIT if token == completion[0] else Action.GO_ON)
    return found


def test_labels_are_those_of_completions_that_are_written(target, lines):
    target, lines = idle_behind(target, 3), Lines(target)
    (text, *_) = own_texts(target, length=30)
    lines.ends_V[text[20::5]] = True
    found = label(target, lines, text, layers=LAYERS)
    for layer in LAYERS:
        assert found.labels_N[layer].tolist() == brute_force(target, lines, text, layer)
    seen = {int(value) for layer in LAYERS for value in found.labels_N[layer]}
    assert seen == set(Action)
    # The controls: another layer, and another token in a line that was right.
    assert found.labels_N[1].tolist() != brute_force(target, lines, text, 4)
    place = 17 + next(row for row, value in enumerate(found.labels_N[1]) if value != Action.STOP)
    changed = [*text[:place], (text[place] + 1) % 256, *text[place + 1 :]]
    assert found.labels_N[1].tolist() != brute_force(target, lines, changed, 1)


def test_classifiers_learn_labels_that_states_decide(target, lines):
    torch.manual_seed(0)
    states_ND = torch.randn(600, 8)
    labels_N = torch.where(states_ND[:, 1] > 1, Action.STOP, (states_ND[:, 0] > 0).long())
    for width in (0, 16):
        one = train_classifiers(LabelledRows({2: states_ND}, {2: labels_N}), width=width, steps=200, lr=3e-2, seed=0)
        found_N = one.by_layer["2"](states_ND).argmax(dim=-1)
        assert float((found_N == labels_N).double().mean()) > 0.9


def test_training_leaves_the_target_as_it_was_and_is_repeatable(target, lines, classifiers):
    before = target.weights_digest()
    rows = joined([label(target, lines, text, layers=LAYERS) for text in own_texts(target)])
    again = train_classifiers(rows, width=0, steps=20, lr=1e-2, seed=0)
    other = train_classifiers(rows, width=0, steps=20, lr=1e-2, seed=1)
    assert target.weights_digest() == before
    same = [torch.equal(a, b) for a, b in zip(again.parameters(), classifiers.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(next(again.parameters()), next(other.parameters()))


def test_a_stored_controller_decides_the_same(tmp_path, target, completer, classifiers):
    classifiers.save(tmp_path, target)
    stored = load_classifiers(tmp_path, target)
    middle = Thresholds(classifiers, 0.5, 0.9), Thresholds(stored, 0.5, 0.9)
    first, second = (completions(completer, one) for one in middle)
    assert [(one.tokens, one.decisions) for one in first] == [(one.tokens, one.decisions) for one in second]
    with pytest.raises(CheckpointError, match=r"made for the target tiny \(tiny\), not tiny \(other\)"):
        load_classifiers(tmp_path, target_of(target.model, "other"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"kind": "judge"}))
    with pytest.raises(CheckpointError, match="kind must be 'stop_exit', got 'judge'"):
        load_classifiers(tmp_path, target)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "stop_exit"}))
    with pytest.raises(CheckpointError, match="not the configuration of a controller"):
        load_classifiers(tmp_path, target)
    with pytest.raises(CheckpointError, match="no such file"):
        load_classifiers(tmp_path / "none", target)


def test_the_frontier_is_lossy_and_chance_has_the_rates_of_the_controller(target, lines, completer, classifiers):
    expected = [greedy(target, lines, list(case.context)) for case in CASES]
    # Half of the lines are what the target writes.
    cases = [
        Case(one.id, one.context, text if i % 2 else [3])
        for i, (one, text) in enumerate(zip(CASES, expected, strict=True))
    ]
    held = joined([label(target, lines, text, layers=LAYERS) for text in own_texts(target)])
    found = measure(
        completer,
        cases,
        lines,
        classifiers,
        exit=[0.0, NEVER],
        stop=[0.0, NEVER],
        held=held,
        target="tiny",
        num_layers=5,
    )
    assert found.exactness == "lossy"
    assert heading(found).startswith("LOSSY")
    assert (found.whole.accepted.value, found.whole.layer_passes.value, found.whole.passes_per_token.value) == (
        0.5,
        1,
        5,
    )
    assert len(found.steps) == 3  # not the one that never acts
    leaves, stops, both = (step.controller for step in found.steps)
    assert leaves.accepted.value == found.fixed[0].accepted.value
    assert (leaves.passes_per_token.value, leaves.stops) == (1, {1: 0, 2: 0, 4: 0})
    assert stops.finished.value == both.finished.value == stops.accepted.value == 0
    assert stops.stops == {1: 6, 2: 0, 4: 0}
    assert stops.accepted_less_whole.value == -0.5
    # At a rate of 0 or 1 chance is the controller.
    for step in found.steps:
        assert step.random.exits == step.controller.exits
        assert step.random.stops == step.controller.stops
        assert step.accepted_less_random.value == 0
    drawn = completions(completer, ByChance({1: (0.1, 0.4), 2: (0.0, 0.5)}))
    again = completions(completer, ByChance({1: (0.1, 0.4), 2: (0.0, 0.5)}))
    assert texts(drawn) == texts(again)
    assert rates(drawn)[4] == (0, 0)


def test_what_follows_a_line_end_in_its_token_is_no_part_of_the_line():
    target = Target.load(TargetSettings(model="builtin:target"))
    lines = Lines(target)
    plain, indented, name = (target.tokenizer.encode(text)[0] for text in ("\n", "\n        x", "name"))
    assert plain != indented
    assert lines.are_same([name, plain], [name, indented])
    assert not lines.are_same([name, plain], [name, name])
    text = target.tokenizer.encode("x = 1\n" * 12 + "total = sum(values)\n    return total\n")
    for case in cases_of([("a", text)], lines, number=8, context_tokens=16, max_tokens=8, seed=0):
        assert bool(lines.ends_V[case.truth[-1]])
        assert not lines.ends_V[case.truth[:-1]].any()
        assert target.tokenizer.decode(case.truth).strip()
    with pytest.raises(DataError, match="places to complete a line were found, 999 are asked for"):
        cases_of([("a", text)], lines, number=999, context_tokens=16, max_tokens=8, seed=0)


def test_texts_are_split_by_document():
    texts = [(str(i), [0] * 10) for i in range(5)]
    assert [len(side) for side in split(texts, 0.6)] == [3, 2]
    assert [len(side) for side in split(texts, 0.01)] == [1, 4]
    assert [len(side) for side in split(texts, 0.99)] == [4, 1]
    with pytest.raises(DataError, match="two at least"):
        split(texts[:1], 0.5)


def test_targets_that_cannot_be_left_are_refused(target):
    with pytest.raises(CheckpointError, match=r"layers must be ascending numbers of 1..4 \(5 layers\), got \[5\]"):
        check_segments(target.model, [5], name="tiny")
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=257, hidden_size=32, n_layer=3, n_head=2))
    with pytest.raises(CheckpointError, match="cannot be run in two parts at block 1: it takes no position_ids"):
        check_target(Target(bloom, byte_tokenizer(), name="bloom", fingerprint=""), [1])
    headless = copy.deepcopy(target.model)
    headless.lm_head = None
    with pytest.raises(CheckpointError, match="LlamaForCausalLM has no output matrix that exits could share"):
        check_target(Target(headless, byte_tokenizer(), name="headless", fingerprint=""), [1])


def test_the_command_trains_stores_measures_and_reads_back(tiny_folder, tmp_path):
    texts = tmp_path / "texts.jsonl"
    code = "def f(x):\n    return x + 1\n" * 6
    texts.write_text("".join(json.dumps({"text": code}) + "\n" for _ in range(4)))
    few = ("num_cases=3", "max_tokens=6", "context_tokens=32", "steps=5", "num_windows=4", "exit=[0.5]", "stop=[0.9]")
    common = (str(tiny_folder), f"stop_exit.texts={texts}", *(f"stop_exit.{one}" for one in few))
    out, _ = call("stop-exit", *common, "--out", str(tmp_path / "a"))
    assert "LOSSY: stop-and-exit controller" in out
    call("stop-exit", *common, "--controller", str(tmp_path / "a" / "controller"), "--out", str(tmp_path / "b"))
    first, second = (json.loads((tmp_path / one / "stop_exit.json").read_text()) for one in "ab")
    assert first["exactness"] == "lossy"
    assert {**first, "provenance": 0} == {**second, "provenance": 0}
    assert (tmp_path / "a" / "stop_exit.png").stat().st_size > 5000
    assert not (tmp_path / "b" / "controller").exists()
    _, refused = call("stop-exit", str(tiny_folder), "stop_exit.texts=none.jsonl", code=1)
    assert "no such file, nor builtin:held_out: none.jsonl" in refused
    texts.write_text('{"code": 1}\n{"text": ""}\n')
    _, refused = call("stop-exit", str(tiny_folder), f"stop_exit.texts={texts}", code=1)
    assert "2 lines are not texts" in refused
    _, refused = call("stop-exit", str(tiny_folder), "stop_exit.exit=[2]", "stop_exit.stop=[2]", code=2)
    assert "all thresholds are above 1" in refused
    _, refused = call("stop-exit", "a", "b", code=2)
    assert "give one target, got 2 names" in refused
