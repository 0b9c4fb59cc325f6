"""drafttrain cascade: a frontier of quality against cost for two models that share a text. LOSSY."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drafttrain.checkpoint import read_drafter
from drafttrain.commands.named_drafters import folders_of
from drafttrain.commands.named_prompts import prompts_named_twice
from drafttrain.config.load import load_sections
from drafttrain.core.console import say
from drafttrain.core.errors import RecipeError
from drafttrain.core.files import write_json
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.checkers import checkers
from drafttrain.eval.cascade.frontier import Frontier, measure
from drafttrain.eval.cascade.router import Pair
from drafttrain.eval.cascade.settings import FrontierSettings
from drafttrain.eval.cascade.shown import draw, show
from drafttrain.eval.page import write_picture
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers.language_model import language_model_of
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.typed_json import to_json
from drafttrain.pipeline.evaluating import check_lengths
from drafttrain.pipeline.preflight import check_drafters
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.target_model import Target


def cascade(
    target: str, small: str, overrides: Sequence[str], *, prompts: str | None = None, out: Path | None = None
) -> Frontier:
    """Measure a frontier, print its table, and write cascade.json and frontier.png.

    Args:
        target: The large model: a folder, a hub id, builtin:target.
        small: The small model: a folder, a hub id, a drafter of kind causal_lm.
        overrides: Of the sections cascade, eval and target.
        prompts: A file of prompts; None: `eval.prompts`.
        out: Folder of the files; None: they are not written.

    Raises:
        RecipeError: An override is wrong, or the small model does not read the target's tokens.
    """
    quiet_libraries()
    if problems := prompts_named_twice(prompts, overrides):
        raise RecipeError("arguments", problems)
    of_prompts = [] if prompts is None else [f"eval.prompts={prompts}"]
    of_target, settings, wanted = load_sections(
        ["target", "eval"], [*overrides, *of_prompts], further={"cascade": FrontierSettings}
    )
    (folder,) = folders_of([small])
    of_target = replace(of_target, model=target)
    check_drafters(of_target, [str(folder)])
    loaded = Target.load(of_target)
    model = language_model_of(read_drafter(folder, loaded), "cascade")
    frontier = frontier_of(loaded, model, settings, wanted, small=small)
    show(frontier)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "cascade.json", to_json(frontier))
        write_picture(out / "frontier.png", lambda axes: draw(axes, frontier), columns=1, height=3.6)
        say(f"written: {out / 'cascade.json'}, {out / 'frontier.png'}")
    return frontier


def frontier_of(
    target: Target, small_model: object, settings: EvalSettings, wanted: FrontierSettings, *, small: str
) -> Frontier:
    """Measure the frontier of two loaded models on the prompts of the settings, at their first temperature."""
    found = read_prompts(
        settings.prompts, target.tokenizer, prompt_tokens=settings.prompt_tokens, limit=settings.num_prompts
    )
    check_lengths(target, found, settings)
    temperature = settings.temperatures[0]
    sampling = Sampling() if temperature == 0 else Sampling(temperature, settings.top_p, settings.top_k)
    pair = Pair(target, small_model, sampling, settings.max_new_tokens, settings.seed, wanted.draft)
    checker = checkers.build(settings.checker) if settings.checker else None
    return measure(pair, found, wanted, checker=checker, small=small)
