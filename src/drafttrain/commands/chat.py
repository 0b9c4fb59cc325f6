"""drafttrain chat: answers that stream, an interactive chat, and the speed with and without the drafter."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.commands.named_drafters import evaluated_on, folders_of, length_of
from drafttrain.config.load import load_sections
from drafttrain.core.console import complain, say, table
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.generations import Generation
from drafttrain.core.marked_text import MarkedOutput
from drafttrain.core.texts import Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.arms import Arm
from drafttrain.eval.conversation import Conversation, chat_prompt, check_can_chat
from drafttrain.eval.evaluate import choose_drafts
from drafttrain.eval.fastest_length import fastest_length, known_lengths
from drafttrain.eval.interval import number
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.result import Piece
from drafttrain.eval.settings import EvalSettings, length_label
from drafttrain.eval.speed import Speed, measure, tokens_a_round
from drafttrain.pipeline.preflight import check_drafters
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.target_model import Target
from drafttrain.target_model.tokenizer import load_target_tokenizer

QUESTIONS = "builtin:chat"
COMMANDS = "/new starts another chat, /quit leaves, Ctrl-C stops an answer"


@dataclass(frozen=True)
class Opened:
    """A drafter and its target, loaded."""

    drafter: Drafter
    target: Target
    """With the adapters that the drafter was exported with."""
    settings: EvalSettings

    @property
    def setting(self) -> str:
        """How it decodes, in words."""
        temperature = self.settings.temperatures[0]
        sampling = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        device = self.target.device.type
        count = torch.get_num_threads()
        where = f"{count} thread{'s' if count > 1 else ''}" if device == "cpu" else device
        return f"{sampling}, {str(self.target.model.dtype).removeprefix('torch.')}, {where}"


def overrides(
    *, temperature: float, max_new_tokens: int, length: str | None, draft_tokens: int | None, dtype: str | None
) -> list[str]:
    """Return the options as overrides of the sections target and eval, which check them."""
    given = [f"eval.temperatures=[{temperature}]", f"eval.max_new_tokens={max_new_tokens}"]
    if dtype is not None:
        given.append(f"target.dtype={dtype}")
    if length is not None and length.startswith("{"):
        given.append(f"eval.length={length}")
    elif length is not None or draft_tokens is not None:
        given.append(f"eval.length.kind={length or 'fixed'}")
    if draft_tokens is not None:
        given.append(f"eval.length.num_draft_tokens={draft_tokens}")
    return given


def open_drafter(name: str, target: str | None, given: Sequence[str]) -> Opened:
    """Load a drafter and its target.

    Args:
        name: A drafter folder, a run folder, a hub id, or a builtin one.
        target: The target; None: the drafter's own.
        given: Overrides of the sections target and eval; without a length, the one that is fastest here is used.
    """
    quiet_libraries()
    folder = folders_of([name])[0]
    of_target, settings = load_sections(["target", "eval"], given)
    of_target = evaluated_on(of_target, folder, named=name, target=target, overrides=given)
    check_drafters(of_target, [str(folder)])
    check_can_chat(load_target_tokenizer(of_target), name=str(of_target.model))
    loaded = Target.load(of_target)
    drafter = read_drafter(folder, loaded)
    choose_drafts([drafter], settings)
    opened = Opened(drafter, drafter.adapted(loaded), settings)
    why = ""
    if not any(one.startswith("eval.length") for one in given):
        opened, why = _with_fastest(opened, folder)
    size = sum(parameter.numel() for parameter in drafter.parameters()) / 1e6
    policy = length_label(opened.settings.length)
    say(f"{name} ({drafter.kind}, {size:.1f} M parameters) drafts for {target}: {policy}{why}")
    say(opened.setting)
    return opened


def _with_fastest(opened: Opened, folder: Path) -> tuple[Opened, str]:
    """Return the drafter with the length that is fastest here, of those that it was evaluated with, and why it is taken."""
    settings = opened.settings
    known = known_lengths(folder, temperature=settings.temperatures[0])
    if known is None:
        return opened, ""
    if known.times_hold_for(opened.target):
        length, why = length_of(known.fastest), "the fastest of its evaluation"
    else:
        prompt = read_prompts(QUESTIONS, opened.target.tokenizer, prompt_tokens=None)[0]
        lengths = [(length_of(one), value) for one, value in known.block_efficiencies]
        best = fastest_length(lengths, opened.drafter, opened.target, prompt, settings)
        length = best.length
        why = f"the fastest here, by its evaluation {best.predicted_speedup:.2f} times as fast as plain decoding"
    return replace(opened, settings=replace(settings, length=length)), f", {why}"


def answer(opened: Opened, questions: Sequence[str], *, system: str | None, marks: bool) -> None:
    """Answer questions, each in a chat of its own."""
    arm, output = _arm(opened), _output(marks=marks)
    for question in questions:
        output.write(f"> {question}\n")
        _answer(Conversation(arm, system), question, output)


def interactive(opened: Opened, *, system: str | None, marks: bool) -> None:
    """Chat until /quit or the end of stdin, which has a question a line if it is not a terminal."""
    arm, output = _arm(opened), _output(marks=marks)
    chat, asks = Conversation(arm, system), sys.stdin.isatty()
    if asks:
        say(COMMANDS)
    for question in _typed() if asks else _piped():
        if question == "/quit":
            return
        if question == "/new":
            chat = Conversation(arm, system)
            continue
        if not asks:
            output.write(f"> {question}\n")
        try:
            _answer(chat, question, output)
        except KeyboardInterrupt:
            if not asks:
                raise
            output.write("\n")
        except DrafttrainError as error:
            complain(str(error))


def measure_speed(
    opened: Opened, questions: Sequence[str], *, system: str | None, within_seconds: float | None = None
) -> None:
    """Print a table of speeds and one line with the speed-up.

    Args:
        questions: Each a chat of its own; none: the built-in ones.
        within_seconds: As of `eval.speed.measure`.
    """
    target = opened.target
    if questions:
        chats = [chat_prompt([{"role": "user", "content": one}], target, system=system) for one in questions]
        prompts = [replace(one, id=str(place)) for place, one in enumerate(chats)]
    else:
        prompts = read_prompts(QUESTIONS, target.tokenizer, prompt_tokens=None)
    found = measure(opened.drafter, target, prompts, opened.settings, within_seconds=within_seconds)
    table(_speeds(found, opened), columns=("decoding", "tokens/s", "tokens a target call"))
    print(verdict(found, setting=f"{found.speedup.num_prompts} prompts, {opened.setting}"))


def verdict(speed: Speed, *, setting: str) -> str:
    """Return the line that a measurement ends with."""
    text = (
        f"speed-up {speed.speedup.text()}: {_rate(speed.with_drafter)} tokens/s with the drafter, "
        f"{_rate(speed.without_drafter)} without ({setting})"
    )
    if speed.parity is None:
        return text
    return f"{text}, outputs identical {speed.parity.short().removeprefix('exact ').removeprefix('identical ')}"


def _speeds(speed: Speed, opened: Opened) -> list[list[str]]:
    rows = [["plain decoding, same engine", number(speed.plain, 1), "1.00"]]
    if speed.transformers_generate is not None:
        rows.append(["transformers' generate", number(speed.transformers_generate, 1), "1.00"])
    drafted = f"with the drafter, {length_label(opened.settings.length)}"
    return [*rows, [drafted, number(speed.with_drafter, 1), number(speed.block_efficiency)]]


def _arm(opened: Opened) -> Arm:
    settings = opened.settings
    sampling = Sampling(settings.temperatures[0])
    arm = Arm.create("chat", opened.drafter, opened.target, sampling, settings, length=settings.length)
    if arm.measuring:
        arm.warm_up(read_prompts(QUESTIONS, opened.target.tokenizer, prompt_tokens=None))
    return arm


def _output(*, marks: bool) -> MarkedOutput:
    output = MarkedOutput(marks=marks)
    say(f"accepted draft tokens are {output.marks.legend}")
    return output


def _answer(chat: Conversation, question: str, output: MarkedOutput) -> None:
    def show(piece: Piece) -> None:
        output.write(piece.text, marked=piece.drafted)

    generation = chat.ask(question, show)
    output.write("\n")
    say(_summary(generation))


def _summary(one: Generation) -> str:
    drafted = sum(part.num_accepted for part in one.rounds)
    count = len(one.tokens)
    return (
        f"{count} tokens in {one.seconds:.1f} s: {_rate(count / one.seconds)} tokens/s, {tokens_a_round([one]):.2f} a target call, "
        f"{drafted / count:.0%} accepted draft tokens"
    )


def _rate(per_second: float) -> str:
    """Return tokens per second with two digits at least."""
    return number(per_second, 0 if per_second >= 10 else 1)


def _typed() -> Iterator[str]:
    """Yield what is typed on the terminal; Ctrl-C drops a line, Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and remembers them
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if line:
            yield line


def _piped() -> Iterator[str]:
    """Yield the lines of stdin that are not empty."""
    yield from filter(None, map(str.strip, sys.stdin))
