"""drafttrain stop-exit: train a controller that exits early or stops a code completion, and measure its frontier. LOSSY."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drafttrain.config.load import load_sections
from drafttrain.core.console import progress, say
from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.files import write_json
from drafttrain.data_gen.plain_ids import plain_ids
from drafttrain.data_gen.sources.jsonl import lines as json_lines
from drafttrain.data_gen.stdlib_text import documents
from drafttrain.eval.page import write_picture
from drafttrain.eval.stop_exit.classifier import Classifiers, load_classifiers, train_classifiers
from drafttrain.eval.stop_exit.completer import Completer
from drafttrain.eval.stop_exit.frontier import StopExitFrontier, measure
from drafttrain.eval.stop_exit.labels import LabelledRows, joined, label, windows
from drafttrain.eval.stop_exit.lines import Lines, cases_of
from drafttrain.eval.stop_exit.settings import StopExitSettings
from drafttrain.eval.stop_exit.shown import draw, show
from drafttrain.eval.typed_json import to_json
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.logits import check_logits
from drafttrain.target_model.segments import check_segments

BUILTIN = "builtin:held_out"
CONTROLLER = "controller"

Texts = Sequence[tuple[str, Sequence[int]]]


def stop_exit(target: str, overrides: Sequence[str], *, controller: Path | None, out: Path) -> StopExitFrontier:
    """Train the controller (or read one), complete lines, print the tables; write stop_exit.json, stop_exit.png and the controller.

    Args:
        target: A folder, a hub id, builtin:target.
        overrides: Of the sections stop_exit and target.
        controller: A folder that an earlier call wrote; None: train one.
        out: Folder of the files.

    Raises:
        RecipeError: An override is wrong.
        CheckpointError: The target cannot be left between its blocks, or the controller is another target's.
        DataError: The texts are none, or too few.
    """
    quiet_libraries()
    of_target, settings = load_sections(["target"], overrides, further={"stop_exit": StopExitSettings})
    loaded = Target.load(replace(of_target, model=target))
    known = None if controller is None else load_classifiers(controller, loaded)
    layers = known.chosen if known else settings.layers or list(range(1, len(blocks(loaded.model))))
    check_target(loaded, layers)
    frontier, classifiers = frontier_of(loaded, settings, layers, known)
    show(frontier)
    out.mkdir(parents=True, exist_ok=True)
    if known is None:
        classifiers.save(out / CONTROLLER, loaded)
    write_json(out / "stop_exit.json", to_json(frontier))
    write_picture(out / "stop_exit.png", lambda axes: draw(axes, frontier), columns=1, height=3.6)
    say(f"written: {out / 'stop_exit.json'}, {out / 'stop_exit.png'}" + ("" if known else f", {out / CONTROLLER}"))
    return frontier


def check_target(target: Target, layers: Sequence[int]) -> None:
    """Refuse a target that cannot be left early.

    Raises:
        CheckpointError: Its head does not read the state after its final norm, or its blocks cannot be run in parts.
    """
    if target.model.get_output_embeddings() is None:
        raise CheckpointError(
            f"{target.name}: {type(target.model).__name__} has no output matrix that exits could share"
        )
    check_logits(target.model)
    check_segments(target.model, layers, name=target.name)


def frontier_of(
    target: Target, settings: StopExitSettings, layers: Sequence[int], known: Classifiers | None = None
) -> tuple[StopExitFrontier, Classifiers]:
    """Return the frontier and its classifiers, which are trained if none are given."""
    target.check_length(settings.context_tokens + settings.max_tokens, what="stop_exit.context_tokens + max_tokens")
    lines = Lines(target)
    fitted_on, measured = split(read_texts(settings.texts, target), settings.fit_share)
    cases = cases_of(
        measured,
        lines,
        number=settings.num_cases,
        context_tokens=settings.context_tokens,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
    )

    def labelled(texts: Texts, number: int, what: str) -> LabelledRows:
        chosen = list(windows(texts, length=settings.context_tokens + settings.max_tokens, number=number))
        with progress(f"labelling {what}", total=len(chosen), unit="texts") as bar:
            parts = []
            for one in chosen:
                parts.append(label(target, lines, one, layers=layers))
                bar.advance(1)
        if not sum(map(len, parts)):
            raise DataError(f"{settings.texts}: no line ends in the texts {what}: give longer ones")
        return joined(parts)

    held = labelled(measured, max(1, settings.num_windows // 4), "to measure")
    classifiers = known or train_classifiers(
        labelled(fitted_on, settings.num_windows, "to fit"),
        width=settings.width,
        steps=settings.steps,
        lr=settings.lr,
        seed=settings.seed,
    ).to(target.device)
    completer = Completer(target, lines, layers=layers, max_tokens=settings.max_tokens, seed=settings.seed)
    frontier = measure(
        completer,
        cases,
        lines,
        classifiers,
        exit=settings.exit,
        stop=settings.stop,
        held=held,
        target=target.name,
        num_layers=len(blocks(target.model)),
    )
    return frontier, classifiers


def split(texts: Texts, share: float) -> tuple[Texts, Texts]:
    """Return the first texts, up to this share of all tokens, and the others; each side has one at least.

    Raises:
        DataError: There are fewer than two texts.
    """
    if len(texts) < 2:
        raise DataError(f"{len(texts)} texts: two at least are needed, to fit on and to measure")
    wanted, seen, first = share * sum(len(tokens) for _, tokens in texts), 0, 0
    for _, tokens in texts[:-1]:
        if first and seen + len(tokens) > wanted:
            break
        seen, first = seen + len(tokens), first + 1
    return texts[:first], texts[first:]


def read_texts(name: str, target: Target) -> Texts:
    """Return (id, tokens) of every text of a file of JSON lines, or of the built-in ones.

    Raises:
        DataError: There is no such file; or with every line that has no text.
    """
    if name == BUILTIN:
        return [(id, plain_ids(target.tokenizer, text)) for id, text in documents("held_out")]
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"stop_exit.texts: no such file, nor {BUILTIN}: {name}")
    found, problems = list[tuple[str, Sequence[int]]](), []
    for number, item in json_lines(path):
        text = item.value.get("text") if not item.problem else None
        if not isinstance(text, str) or not text:
            problems.append(f"  line {number}: {item.problem or 'needs a key text with code'}")
        else:
            found.append((str(item.value.get("id", number)), plain_ids(target.tokenizer, text)))
    if problems:
        raise DataError(f"{path}: {len(problems)} lines are not texts\n" + "\n".join(problems[:20]))
    return found
