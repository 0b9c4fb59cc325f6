"""drafttrain chat: questions from arguments, stdin and a terminal; Ctrl-C; the length of the evaluation; the speed."""

from __future__ import annotations

import builtins
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.commands import chat as command
from drafttrain.core.marked_text import MarkedOutput
from drafttrain.core.provenance import processor
from drafttrain.eval.fastest_length import Fastest, fastest_of, known_lengths
from drafttrain.eval.interval import Interval
from drafttrain.eval.parity import Divergence, Parity
from drafttrain.eval.result import AtTemperature, EvaluatedDrafter, Speedup
from drafttrain.eval.speed import Speed
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import noisy
from tests.eval.results import figures, result
from tests.eval.test_conversation import CHAT

LINE = re.compile(
    r"speed-up \d+\.\d\d \[\S+, \S+\] \(not reliable, n = 2\): [\d.]+ tokens/s with the drafter, [\d.]+ without "
    r"\(2 prompts, greedy, float64, 1 thread\), outputs identical 2/2\n$"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Return a drafter that is nearly right, and its target, which has a chat template."""
    tokenizer, model = byte_tokenizer(), random_llama()
    tokenizer.chat_template = CHAT
    drafter, target = (str(tmp_path_factory.mktemp(name)) for name in ("drafter", "target"))
    for folder, weights in ((drafter, noisy(model, 0.02)), (target, model)):
        weights.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return drafter, target


def call(folders: tuple[str, str], *arguments: str, code: int = 0, stdin: str = "") -> tuple[str, str]:
    """Run the command; return stdout and stderr."""
    drafter, target = folders
    given = ["chat", drafter, "--target", target, "--dtype", "float64", "--max-new-tokens", "12", *arguments]
    found = CliRunner().invoke(app, given, input=stdin)
    assert found.exit_code == code, (found.stdout, found.stderr, found.exception)
    return found.stdout, found.stderr


def without_marks(text: str) -> str:
    return text.replace("‹", "").replace("›", "")


def test_each_prompt_is_answered_in_a_chat_of_its_own_and_accepted_draft_tokens_are_marked(folders):
    stdout, stderr = call(folders, "why?", "why?")
    first, second = stdout.split("> why?\n")[1:]
    assert first == second
    assert "‹" in first
    assert "accepted draft tokens are between ‹ and ›" in stderr
    assert "greedy, float64" in stderr
    assert len(re.findall(r"12 tokens in .* accepted draft tokens", stderr)) == 2
    assert call(folders, "why?", "--no-marks")[0] == without_marks(f"> why?\n{first}")


def test_a_target_without_a_chat_template_is_refused_before_its_weights_are_read(folders, tmp_path):
    drafter, target = folders
    for name in (drafter, target):
        shutil.copytree(name, tmp_path / Path(name).name)
        (tmp_path / Path(name).name / "chat_template.jinja").unlink()
    base = (str(tmp_path / Path(drafter).name), str(tmp_path / Path(target).name))
    (Path(base[1]) / "model.safetensors").write_text("no weights")
    _, stderr = call(base, "why?", code=1)
    assert stderr.strip() == f"{base[1]}: its tokenizer has no chat template, so it cannot chat. Use a chat model"
    # The control: with its template the weights are read.
    shutil.copy(Path(target) / "chat_template.jinja", base[1])
    assert "no chat template" not in call(base, "why?", code=1)[1]


def test_stdin_has_a_question_a_line_and_turns_are_kept(folders):
    stdout, _ = call(folders, stdin="why?\n\nwhy?\n/new\nwhy?\n/quit\nnever\n")
    first, second, third = stdout.split("> why?\n")[1:]
    assert first == third
    assert first != second, "the second question has the first answer before it"
    assert "never" not in stdout


def test_the_length_is_chosen_by_the_command_or_by_the_evaluation_and_rounds_timed_here(folders):
    texts = [call(folders, "why?", "--no-marks")[0]]
    for arguments, words in (
        (("--length", "tree", "--draft-tokens", "9"), "tree 9"),
        (("--length", "{kind: tree, num_draft_tokens: 8, depth: 2}"), "tree 8, depth 2"),
    ):
        stdout, stderr = call(folders, "why?", "--no-marks", *arguments)
        assert f": {words}\n" in stderr
        texts.append(stdout)
    assert len(set(texts)) == 1, "no length changes a greedy answer"
    path = Path(folders[0]) / "eval.json"
    tree = figures(
        length={"kind": "tree", "num_draft_tokens": 6, "depth": 3, "width": 2},
        speedup=Speedup(1.7, 1.6, 1.8, 8, baseline=""),
    )
    about = EvaluatedDrafter(path.parent.name, "causal_lm", 1, None, None, "the/target")
    made = result({"drafter": figures(), "drafter (tree 6)": tree}, about=about)
    provenance = replace(made.provenance, machine=replace(made.provenance.machine, processor=processor()))
    here = replace(made, target=replace(made.target, dtype="float64"), provenance=provenance)
    elsewhere = replace(here, target=replace(made.target, dtype="bfloat16"))
    try:
        here.write(path)
        assert ": tree 6, depth 3, width 2, the fastest of its evaluation\n" in call(folders, "why?")[1]
        elsewhere.write(path)
        chosen = r": (fixed 5|tree 6, .*), the fastest here, by its evaluation [\d.]+ times as fast as plain"
        assert re.search(chosen, call(folders, "why?")[1])
        assert ": fixed 3\n" in call(folders, "why?", "--draft-tokens", "3", "--max-new-tokens", "1")[1]
    finally:
        path.unlink()


def test_the_fastest_length_has_the_most_tokens_a_second_not_the_most_a_round():
    known = [("tree 12", 2.4), ("chain of 2", 1.6)]
    assert fastest_of(known, [1.2, 1.1], plain_seconds=1.0) == Fastest("tree 12", pytest.approx(2.0))
    assert fastest_of(known, [2.4, 1.28], plain_seconds=1.0) == Fastest("chain of 2", pytest.approx(1.25))


def test_known_lengths_are_the_judged_drafters_own_lossless_ones_and_of_the_nearest_temperature(tmp_path):
    def at(value: float, count: int, **changes: object) -> object:
        length = {"kind": "fixed", "num_draft_tokens": count}
        speedup = Speedup(3 - value, 1, 2, 8, baseline="")
        return figures(length=length, block_efficiency=Interval(value, 1, 2, 8), speedup=speedup, **changes)

    replay = {"1": Interval(1.3, 1, 2, 8), "2": Interval(1.5, 1, 2, 8)}
    arms = {
        "drafter": at(1.2, 1, replay=replay),
        "start": at(1.9, 2),
        "drafter (fixed 3)": at(1.4, 3),
        "drafter (fixed 4)": at(1.8, 4, exactness="lossy"),
    }
    cold = result(arms)
    hot = AtTemperature(1.0, cold.temperatures[0].plain, {"drafter": at(1.1, 7)}, {})
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    assert known_lengths(drafter, temperature=0.0) is None
    replace(cold, temperatures=[*cold.temperatures, hot]).write(tmp_path / "eval.json")
    found = [known_lengths(drafter, temperature=t) for t in (0.0, 0.7)]
    # A chain that was evaluated is not taken from replay.
    assert [[(one["num_draft_tokens"], value) for one, value in known.block_efficiencies] for known in found] == [
        [(1, 1.2), (3, 1.4), (2, 1.5)],
        [(7, 1.1)],
    ]
    assert [known.fastest["num_draft_tokens"] for known in found] == [1, 7]
    # The run's start was evaluated beside it, with one length.
    (tmp_path / "start").mkdir()
    both = {**cold.drafters, "start": replace(cold.drafters["drafter"], folder="start")}
    replace(cold, drafters=both).write(tmp_path / "eval.json")
    start = known_lengths(tmp_path / "start", temperature=0.0)
    assert start.fastest["num_draft_tokens"] == 2
    assert [value for _, value in start.block_efficiencies] == [1.9]


def test_measure_ends_with_the_speed_up_and_its_interval(folders):
    stdout, _ = call(folders, "--measure", "why?", "how?")
    assert LINE.search(stdout), stdout
    assert all(name in stdout for name in ("plain decoding, same engine", "transformers' generate", "with the drafter"))


def test_a_measurement_ends_after_the_question_in_which_its_time_is_over(folders):
    questions = [f"{number}?" for number in range(6)]
    for within, count in (("0", 4), ("1e9", 6)):
        stdout, _ = call(folders, "--measure", "--within", within, *questions)
        assert f"({count} prompts, " in stdout.splitlines()[-1]


def test_the_last_line_says_how_outputs_differ():
    gap = Divergence("a", 3, 1, 2, 0.01, 0.5, True)
    speed = Speed(
        Speedup(1.93, 1.71, 2.14, 12, baseline=""), 77.2, 38.0, 40.0, 2.5, Parity(False, 12, 11, 1, 0, [gap], "")
    )
    assert command.verdict(speed, setting="12 prompts") == (
        "speed-up 1.93 [1.71, 2.14]: 77 tokens/s with the drafter, 40 without (12 prompts), "
        "outputs identical 11/12, near ties 1/12, unexplained 0"
    )
    slow = replace(speed, parity=None, with_drafter=2.895)
    assert command.verdict(slow, setting="x").endswith("2.9 tokens/s with the drafter, 1.5 without (x)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", "tre", "why?"), "tre"),
        (("--draft-tokens", "0", "why?"), "num_draft_tokens"),
        (("--temperature", "-1", "why?"), "temperatures"),
        (("--dtype", "float7", "why?"), "float7"),
    ],
)
def test_options_that_are_wrong_are_named(folders, arguments, message):
    assert message in call(folders, *arguments, code=2)[1]


@pytest.fixture
def typed(monkeypatch, folders) -> Callable[..., None]:
    """A function that chats on a terminal, with these lines typed; an exception is raised where it stands."""
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())

    def chat(*lines: str | BaseException) -> None:
        left = iter([*lines, EOFError()])

        def answer(prompt: str) -> str:
            line = next(left)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", answer)
        given = command.overrides(temperature=0, max_new_tokens=12, length=None, draft_tokens=None, dtype="float64")
        command.interactive(command.open_drafter(*folders, given), system=None, marks=False)

    return chat


def test_ctrl_c_stops_an_answer_and_the_prompt_returns(typed, monkeypatch, capsys):
    # A process in the background ignores the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _stop_an_answer(typed, monkeypatch, capsys)
    finally:
        signal.signal(signal.SIGINT, handler)


def _stop_an_answer(typed, monkeypatch, capsys) -> None:
    typed("why?", "/quit")
    whole = capsys.readouterr().out
    original, count = MarkedOutput.write, 0

    def write(self: MarkedOutput, text: str, *, marked: bool = False) -> None:
        nonlocal count
        original(self, text, marked=marked)
        count += 1
        if count == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MarkedOutput, "write", write)
    typed("why?", "/new", "why?", "/quit", "never")
    cut, again, *rest = capsys.readouterr().out.split("\n")
    assert whole.startswith(cut)
    assert 0 < len(cut) < len(whole.strip("\n"))
    assert "\n".join([again, *rest]) == whole


def test_ctrl_c_and_the_end_of_input_at_the_prompt(typed, capsys):
    typed("", KeyboardInterrupt(), "why?")
    assert capsys.readouterr().out.strip()


def test_a_chat_that_is_too_long_goes_on_with_another_question(typed, monkeypatch, capsys):
    monkeypatch.setattr("drafttrain.target_model.target.position_limit", lambda model: 512)
    typed("why? " * 200, "why?", "/quit")
    found = capsys.readouterr()
    assert "512 positions" in found.err.replace("\n", " ")
    assert found.out.strip()
