"""The command line: arguments in, exit code out. What a command does is in `drafttrain.commands` and `drafttrain.config`."""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from drafttrain.core.console import complain, say, stderr, table
from drafttrain.core.errors import DrafttrainError, Interrupted, RecipeError

if TYPE_CHECKING:
    from drafttrain.config.recipe import Recipe

app = typer.Typer(
    name="drafttrain",
    help="Train the drafters of speculative decoding, export them, and prove what they yield.\n\n"
    "One YAML recipe describes a run. Start with: drafttrain fit demo",
    epilog="Exit codes: 0 done, 1 failed, 2 recipe or arguments wrong, 3 gate not met, "
    "75 interrupted: run the same command to continue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipe_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
engines_app = typer.Typer(help="Install and list the serving engines that prove an export.", no_args_is_help=True)
app.add_typer(engines_app, name="engines")

RecipeOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, the name of a bundled recipe, or a run folder.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="Values that replace the recipe's: train.lr=3e-4 data.sources.0.path=logs.jsonl",
        show_default=False,
    ),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Shrink the recipe to some 20 steps through every stage.")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RUNS = Path("runs")
OVERRIDE = re.compile(r"^[A-Za-z_][\w-]*(\.[\w-]+)*=")


@app.command()
def fit(
    recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, runs: Runs = RUNS, debug: Debug = False
) -> None:
    """Do all of a recipe: generate data, train, export, evaluate. Run again, it continues; what is done is skipped."""
    with exit_codes(debug=debug):
        loaded, run_folder = _recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=runs)
        _relaunch(loaded)
        from drafttrain.commands.fit import fit

        fit(loaded, run_folder)


@app.command()
def gen(
    recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, runs: Runs = RUNS, debug: Debug = False
) -> None:
    """Only generate the data of a recipe with its target."""
    with exit_codes(debug=debug):
        loaded, run_folder = _recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=runs)
        _relaunch(loaded)
        from drafttrain.commands.gen import gen

        gen(loaded, run_folder)


@app.command()
def online(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [SECTION.KEY=VALUE]... | status RUN | rollback RUN [ROUTE]",
            help="A recipe with a section online; or how far a run is; or the version before the one that is served.",
            show_default=False,
        ),
    ],
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Learn from serving logs as they grow, and publish what is better, until it is told to stop; run again, it continues."""
    with exit_codes(debug=debug):
        word, *rest = what
        if word in ("status", "rollback"):
            if not 1 <= len(rest) <= (2 if word == "rollback" else 1):
                raise RecipeError("arguments", [f"drafttrain online {word} RUN: give a run folder"])
            from drafttrain.commands.online import rollback, show_status

            if word == "status":
                show_status(Path(rest[0]))
            else:
                rollback(Path(rest[0]), route=rest[1] if len(rest) > 1 else None)
            return
        loaded, run_folder = _recipe_and_run_folder(word, rest, smoke=smoke, runs=runs)
        from drafttrain.commands.online import learn_online

        learn_online(loaded, run_folder)


@app.command()
def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE | DRAFTER",
            help="A recipe or its run folder; with --to, a drafter folder too.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="Write this format (vllm, speculators, sglang, gguf, openvino) beside the drafter folder.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Serve it in an engine that reads the format, and compare count for count.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="MODEL", help="The target of a drafter folder.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where the format goes; left out: DRAFTER.FORMAT.", show_default=False
        ),
    ] = None,
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Write the drafter folder of a trained run, evaluate its files, and hold them against the gate; or, with --to, write a format."""
    with exit_codes(debug=debug):
        _first_alone()
        from drafttrain.config.bundled import is_recipe

        _check_export(what, to or [], verify=verify, target=target, out=out)
        from drafttrain.commands.export import convert_drafter, convert_run, export_run

        if to and not is_recipe(what):
            convert_drafter(what, to, overrides or [], target=target, verify=verify, out=out)
            return
        loaded, run_folder = _recipe_and_run_folder(what, overrides, smoke=smoke, runs=runs)
        if to:
            convert_run(loaded, run_folder, to, verify=verify, out=out)
        else:
            export_run(loaded, run_folder)


@app.command(name="import")
def import_drafter(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="EAGLE-3, EAGLE-1, Medusa, speculators, or a plain causal LM.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="MODEL", help="What it was made for; left out: what it says itself.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The drafter folder; left out: FOLDER.drafter.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a drafter folder of one that somebody else trained: train on from it, evaluate it, export it."""
    with exit_codes(debug=debug):
        from drafttrain.commands.import_drafter import import_drafter

        import_drafter(folder, target=target, out=out)


@app.command(name="serve-config")
def serve_config(
    drafter: Annotated[
        Path,
        typer.Argument(
            metavar="DRAFTER",
            help="A drafter folder, evaluated before, or its run folder.",
            show_default=False,
        ),
    ],
    engine: Annotated[str, typer.Option("--engine", metavar="ENGINE", help="The serving engine.")] = "vllm",
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="MODEL", help="Its target; left out: what it was made for.", show_default=False
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Print the command that serves a drafter, with the draft length that its evaluation found best."""
    with exit_codes(debug=debug):
        from drafttrain.commands.serve_config import serve_command

        typer.echo(serve_command(drafter, engine, target=target))


@engines_app.command()
def install(
    names: Annotated[list[str], typer.Argument(metavar="ENGINE...", help="Serving engines.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Make the environment of a serving engine, in the user's cache, outside of any project."""
    with exit_codes(debug=debug):
        from drafttrain.environments.environment import install as make
        from drafttrain.environments.known import environments_of

        for environment in environments_of(names):
            say(f"{environment.name}: ready in {make(environment)}")


@engines_app.command(name="list")
def list_engines() -> None:
    """List the serving engines that can prove an export, and where their environments are."""
    from drafttrain.serving.engines import table_rows

    table(table_rows(), columns=["engine", "pins", "kinds", "formats", "where"])


@app.command(name="eval")
def evaluate(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE | DRAFTER [DRAFTER] [SECTION.KEY=VALUE]...",
            help="A recipe or its run folder; or one drafter (a folder, a hub id, builtin:drafter), or two to compare "
            "pairwise; with --server, the drafter that is served, or its run folder. Then overrides; of drafters: eval.key=value "
            "and target.key=value.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="MODEL", help="The target of drafters.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where eval.json and report.html of drafters, or server.json, go; left out: the first one's folder.",
            show_default=False,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="Decode nothing here: let this live server do it, and set its counters beside what the drafter's "
            "evaluation promised.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", metavar="ENGINE", help="What --server is.")] = "vllm",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="The target as --server calls it; left out: it is told by its folder or name.",
            show_default=False,
        ),
    ] = None,
    api_key_variable: Annotated[
        str | None,
        typer.Option(
            "--api-key-variable",
            metavar="NAME",
            help="Environment variable with the key of --server.",
            show_default=False,
        ),
    ] = None,
    require: Annotated[
        bool, typer.Option("--require", help="Exit with 3 if --server keeps less than was promised.")
    ] = False,
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Evaluate exported drafters, or how one is served: a table on stdout, JSON beside it."""
    with exit_codes(debug=debug):
        _first_alone()
        from drafttrain.config.bundled import is_recipe

        named, overrides = _apart(what or [])
        if server is not None:
            _check_served(named, server, smoke=smoke)
            from drafttrain.commands.check_server import LiveQuestion, evaluate_server

            question = LiveQuestion(server, engine, model, api_key_variable)
            drafter = Path(named[0]) if named else None
            evaluate_server(drafter, question, overrides, target=target, out=out, require=require)
            return
        _check_no_server(model, api_key_variable, require=require)
        from drafttrain.commands.evaluate import evaluate_drafters, evaluate_recipe

        if len(named) == 1 and target is None and out is None and is_recipe(named[0]):
            loaded, run_folder = _recipe_and_run_folder(named[0], overrides, smoke=smoke, runs=runs)
            evaluate_recipe(loaded, run_folder)
            return
        _check_drafters(named, smoke=smoke)
        evaluate_drafters(named, target, overrides, out=out)


@recipe_app.command(name="list")
def list_recipes() -> None:
    """List the recipes that come with drafttrain."""
    from drafttrain.config.bundled import bundled_folder, bundled_recipes

    table([[one.name, one.title] for one in bundled_recipes()], columns=["recipe", "what it trains"])
    say(f"in {bundled_folder()}")


@app.command()
def record(
    upstream: Annotated[
        str,
        typer.Option(
            "--upstream", metavar="URL", help="The server, such as http://127.0.0.1:8000.", show_default=False
        ),
    ],
    port: Annotated[
        int, typer.Option("--port", metavar="N", help="Where clients ask from now on; 0: a free port.", min=0)
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the records.", show_default=False)],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than loopback open it to others.")
    ] = "127.0.0.1",
    logprobs: Annotated[
        int,
        typer.Option(
            "--logprobs", metavar="K", help="Ask for the K largest log-probabilities; clients do not see them.", min=0
        ),
    ] = 0,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Ask for token ids, as vLLM gives them; clients do not see them.")
    ] = False,
    redact: Annotated[
        bool,
        typer.Option(
            "--redact/--no-redact",
            help="Take out keys, passwords, e-mail addresses, and telephone, card and account numbers before writing.",
        ),
    ] = True,
    redact_with: Annotated[
        str | None,
        typer.Option("--redact-with", metavar="NAME", help="Your function (text) -> text, by its dotted name."),
    ] = None,
    rotate_mb: Annotated[
        int, typer.Option("--rotate-mb", metavar="MB", help="Size of a file of records.", min=1)
    ] = 256,
    record_mb: Annotated[
        int,
        typer.Option(
            "--record-mb", metavar="MB", help="Longest request and answer, unpacked, that are recorded.", min=1
        ),
    ] = 32,
    max_clients: Annotated[
        int, typer.Option("--max-clients", metavar="N", help="Connections at once; more are answered with 503.", min=1)
    ] = 8192,
    request_seconds: Annotated[
        float,
        typer.Option(
            "--request-seconds", metavar="S", help="Longest time for the head of a request, and pause in its body."
        ),
    ] = 60.0,
    grace_seconds: Annotated[
        float, typer.Option("--grace-seconds", metavar="S", help="After SIGTERM all is ended within this time.")
    ] = 30.0,
    debug: Debug = False,
) -> None:
    """Stand before a server with the OpenAI protocol and record what it answers, for {kind: serving_logs, path: DIR}."""
    with exit_codes(debug=debug):
        from drafttrain.recorder.proxy import record as serve
        from drafttrain.recorder.settings import RecorderSettings

        serve(
            RecorderSettings(
                upstream=upstream,
                out=out,
                port=port,
                host=host,
                logprobs=logprobs,
                token_ids=token_ids,
                redact=redact,
                redact_with=redact_with,
                rotate_bytes=rotate_mb * 2**20,
                record_bytes=record_mb * 2**20,
                max_clients=max_clients,
                request_seconds=request_seconds,
                grace_seconds=grace_seconds,
            )
        )


@recipe_app.command()
def show(recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, debug: Debug = False) -> None:
    """Print a recipe with every default visible and every key explained."""
    with exit_codes(debug=debug):
        from drafttrain.config.dump import dump_recipe
        from drafttrain.config.load import load_recipe

        typer.echo(dump_recipe(load_recipe(recipe, overrides or [], smoke=smoke), comments=True), nl=False)


@recipe_app.command()
def copy(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The name of a bundled recipe.", show_default=False)],
    to: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where to; left out: here.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Copy a bundled recipe, comments and all, to change it."""
    with exit_codes(debug=debug):
        from drafttrain.config.bundled import copy_recipe

        say(f"written: {copy_recipe(recipe, to)}")


@recipe_app.command()
def check(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [SECTION.KEY=VALUE]...",
            help="YAML files, or names of bundled recipes; then values that replace those of each of them.",
        ),
    ],
    debug: Debug = False,
) -> None:
    """Check recipes without loading a model: ok, or every problem with its line."""
    with exit_codes(debug=debug):
        from drafttrain.config.load import load_recipe
        from drafttrain.pipeline.preflight import check_parts

        recipes, overrides = _apart(what)
        if not recipes:
            raise RecipeError("arguments", ["a recipe is wanted before the values that replace its own"])
        wrong = 0
        for recipe in recipes:
            try:
                check_parts(load_recipe(recipe, overrides), fetch=False, data=False)
                typer.echo(f"{recipe}: ok")
            except RecipeError as error:
                wrong += 1
                complain(str(error))
        if wrong:
            raise typer.Exit(RecipeError.exit_code)


@recipe_app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from drafttrain.config.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


@contextmanager
def exit_codes(*, debug: bool) -> Iterator[None]:
    """Turn errors that a user can cause into a message and their exit code, and a request to stop into 75."""
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except DrafttrainError as error:
        if debug:
            stderr.print_exception()
        complain(str(error))
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if debug:
            stderr.print_exception()
        # A name that is too long is itself the error.
        where = f"{str(error.filename)[:200]}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}")
        raise typer.Exit(DrafttrainError.exit_code) from error
    except KeyboardInterrupt as error:
        say("interrupted: run the same command to continue")
        raise typer.Exit(Interrupted.exit_code) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> None:
    """Run the command line; DeepSpeed's launcher adds a word of its own, which the environment says too."""
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank=")]
    app()


def _relaunch(recipe: "Recipe") -> None:
    """Leave the work to several processes where the recipe wants them."""
    from drafttrain.distributed import launch

    if (count := launch.processes_wanted(recipe)) > 1:
        raise typer.Exit(launch.relaunch(count, max_restarts=recipe.train.max_restarts))


def _first_alone() -> None:
    """Leave what one process does to the first of those that a launcher started."""
    from drafttrain.distributed.world import is_first

    if not is_first():
        raise typer.Exit(0)


def _stop(number: int, frame: FrameType | None) -> None:
    """Stop as Ctrl-C does: no handler of ordinary errors may swallow it."""
    raise KeyboardInterrupt


def _apart(words: list[str]) -> tuple[list[str], list[str]]:
    """Return what is named, and what is overridden."""
    return [word for word in words if not OVERRIDE.match(word)], [word for word in words if OVERRIDE.match(word)]


def _recipe_and_run_folder(name: str, overrides: list[str] | None, *, smoke: bool, runs: Path) -> tuple["Recipe", Path]:
    """Return the recipe and where its run lives: a run folder that was named (and not renamed), or `runs/<name>`."""
    from drafttrain.config.load import load_recipe

    recipe = load_recipe(name, overrides or [], smoke=smoke)
    renamed = smoke or any(override.startswith("name=") for override in overrides or [])
    return recipe, Path(name) if Path(name).is_dir() and not renamed else runs / recipe.name


def _check_export(what: str, to: list[str], *, verify: bool, target: str | None, out: Path | None) -> None:
    """Refuse what `export` cannot mean."""
    from drafttrain.config.bundled import is_recipe

    problems = []
    if not to and (verify or target or out):
        problems.append("--verify, --target and --out are for a format: give --to FORMAT")
    if to and out and len(to) > 1:
        problems.append("--out takes one format: give --to once")
    if is_recipe(what) and target:
        problems.append(f"{what}: a recipe says its target itself: leave --target out")
    if problems:
        raise RecipeError("arguments", problems)


def _check_served(named: list[str], server: str, *, smoke: bool) -> None:
    """Refuse what `eval --server` cannot mean."""
    problems = []
    if smoke:
        problems.append("--smoke shrinks a recipe: it means nothing for a server")
    if len(named) > 1:
        problems.append(f"--server: one drafter is served, got {len(named)}")
    problems += [f"{name}: no such folder" for name in named[:1] if not Path(name).is_dir()]
    # What may be a password is not repeated.
    if "@" in server or "?" in server:
        problems.append("--server: holds a name or a key; name an environment variable in --api-key-variable")
    elif not server.startswith(("http://", "https://")):
        problems.append(f"--server: must begin with http:// or https://, got {server!r}")
    if problems:
        raise RecipeError("arguments", problems)


def _check_no_server(model: str | None, api_key_variable: str | None, *, require: bool) -> None:
    if model is not None or api_key_variable is not None or require:
        raise RecipeError("arguments", ["--model, --api-key-variable and --require are for --server URL"])


def _check_drafters(named: list[str], *, smoke: bool) -> None:
    """Refuse what `eval` of drafters cannot mean."""
    from drafttrain.config.bundled import is_recipe

    problems = []
    if smoke:
        problems.append("--smoke shrinks a recipe: it means nothing for drafters")
    if not 1 <= len(named) <= 2:
        problems.append(f"a recipe, one drafter or two are wanted, got {len(named)}")
    problems += [
        f"{name}: a recipe is evaluated alone, without --target and --out" for name in named if is_recipe(name)
    ]
    if problems:
        raise RecipeError("arguments", problems)


if __name__ == "__main__":
    main()
