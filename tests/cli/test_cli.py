"""The command line: exit codes, messages without tracebacks, quick help, and output that fits where it goes."""

import json
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.cli.app import OVERRIDE, exit_codes
from drafttrain.config.bundled import bundled_folder, bundled_recipes
from drafttrain.core import console
from drafttrain.core.errors import CheckpointError, GateError, RecipeError

BAD = "name: bad\nloss: {kind: tvdp}\ntrain:\n  learning_rate: 1\n"


def call(*arguments: str, code: int = 0) -> tuple[str, str]:
    """Run a command in this process; return stdout and stderr with the lines that rich wrapped."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result.stdout, result.stderr


@pytest.fixture
def bad_recipe(tmp_path: Path) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    return str(path)


def test_help_is_there_within_a_second_of_processor_time():
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    took = []
    for _ in range(3):
        before = spent()
        done = subprocess.run([sys.executable, "-m", "drafttrain", "--help"], capture_output=True, check=True)
        took.append(spent() - before)
    assert min(took) < 1.0
    assert b"fit" in done.stdout
    assert b"Exit codes" in done.stdout


@pytest.mark.parametrize(
    "command", ["fit", "gen", "plan", "sweep", "export", "eval", "compare", "recipe", "engines", "serve-config"]
)
def test_every_command_explains_itself(command):
    assert "Usage" in call(command, "--help")[0]


def test_list_shows_every_bundled_recipe_with_its_first_line():
    stdout, _ = call("recipe", "list")
    for recipe in bundled_recipes():
        assert recipe.name in stdout
        assert recipe.title
        assert recipe.title in stdout


def test_every_bundled_recipe_passes_its_check():
    paths = [str(recipe.path) for recipe in bundled_recipes()]
    assert paths
    stdout, _ = call("recipe", "check", *paths)
    assert stdout.count(": ok") == len(paths)


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_every_bundled_recipe_trains_under_any_stage_but_that_of_online_learning(stage):
    draws = [str(recipe.path) for recipe in bundled_recipes() if "on_policy:" in recipe.path.read_text()]
    searched = [str(recipe.path) for recipe in bundled_recipes() if "kind: layer_skip" in recipe.path.read_text()]
    paths = [str(recipe.path) for recipe in bundled_recipes() if recipe.name != "online"]
    paths = [path for path in paths if path not in searched]
    _, stderr = call("recipe", "check", *searched, f"train.deepspeed.stage={stage}", code=2)
    assert stderr.count("has no weights to train") == len(searched) > 0
    if stage == 3:
        sliced = [str(recipe.path) for recipe in bundled_recipes() if "kind: matformer" in recipe.path.read_text()]
        paths = [path for path in paths if path not in (*draws, *sliced)]
        _, stderr = call("recipe", "check", *draws, "train.devices=2", "train.deepspeed.stage=3", code=2)
        assert stderr.count("partitioned over processes writes no text") == len(draws) > 0
        _, stderr = call("recipe", "check", *sliced, "train.devices=2", "train.deepspeed.stage=3", code=2)
        assert stderr.count("reads parts of weights") == len(sliced) > 0
    stdout, _ = call("recipe", "check", *paths, "train.devices=2", f"train.deepspeed.stage={stage}")
    assert stdout.count(": ok") == len(paths)
    _, stderr = call("recipe", "check", "online", f"train.deepspeed.stage={stage}", code=2)
    assert "online learning runs in one process" in stderr
    _, stderr = call("recipe", "check", f"train.deepspeed.stage={stage}", code=2)
    assert "give a recipe before" in stderr


def test_check_tells_the_problems_of_every_file(bad_recipe):
    good = str(bundled_recipes()[0].path)
    stdout, stderr = call("recipe", "check", bad_recipe, good, "no_such_recipe", code=2)
    assert f"{good}: ok" in stdout
    assert f"{bad_recipe}: 4 problems\n  line 1: drafter: missing." in stderr
    assert "line 4: train.learning_rate: unknown key. Keys here: pretrain, max_steps" in stderr
    assert "neither a file nor a bundled recipe" in stderr
    assert "Traceback" not in stderr


def test_a_wrong_recipe_ends_every_command_before_anything_is_loaded(bad_recipe, tmp_path):
    for command in ("fit", "gen", "export", "eval"):
        _, stderr = call(command, bad_recipe, "--runs", str(tmp_path / "runs"), code=2)
        assert "Did you mean 'tvdpp'?" in stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("rank", "local_rank", "speaks"), [("0", "0", True), ("1", "1", False), ("2", "0", True), ("3", "1", False)]
)
def test_of_several_processes_one_on_each_machine_names_what_is_wrong_with_the_recipe(
    bad_recipe, monkeypatch, capsys, rank, local_rank, speaks
):
    launched = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (launched | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    _, stderr = call("fit", bad_recipe, code=2)
    assert ("Did you mean 'tvdpp'?" in stderr) == speaks
    assert speaks or not stderr
    # Other errors may be those of one process alone.
    with pytest.raises(typer.Exit), exit_codes(debug=False):
        raise CheckpointError("a disk is full")
    assert "a disk is full" in capsys.readouterr().err
    monkeypatch.delenv("MASTER_PORT")
    assert "MASTER_PORT" in call("eval", "demo", code=2)[1], "which process this is, is not known"


def test_debug_shows_the_traceback(bad_recipe):
    assert "RecipeError" not in call("fit", bad_recipe, code=2)[1]
    assert "RecipeError" in call("fit", bad_recipe, "--debug", code=2)[1]


def test_wrong_arguments_exit_with_2(tmp_path):
    assert "No such option" in call("fit", "demo", "--lr", "3", code=2)[1]
    assert "no such folder" in call("eval", str(tmp_path / "a"), "--target", "x", code=2)[1]
    assert "drafttrain compare compares drafters" in call("eval", "a", "b", code=2)[1]
    assert "no such folder" in call("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--target", "x", code=2)[1]
    assert "give 1 to 26 drafters, got 0" in call("compare", code=2)[1]
    for words in (("serve-config",), ("online", "status"), ("online", "rollback"), ("import",)):
        assert "a: no such folder" in call(*words, str(tmp_path / "a"), code=2)[1]
    twice = call("compare", "a", "a", "--prompts", "b.jsonl", "eval.prompts=c.jsonl", code=2)[1]
    assert "a: named twice" in twice
    assert "both name prompts" in twice
    assert "without --target and --out" in call("eval", "demo", "--out", str(tmp_path), code=2)[1]


def test_eval_takes_builtin_drafters_settings_of_the_target_and_a_place_for_its_files(tmp_path):
    few = ["eval.num_prompts=1", "eval.max_new_tokens=3", "eval.temperatures=[0]", "eval.speed_prompts=0"]
    words = ["builtin:drafter", "target.dtype=bfloat16", "target.device=cpu", *few]
    stdout, _ = call("eval", *words, "--out", str(tmp_path / "out"))
    assert "block efficiency" in stdout
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["target"]["name"] == "builtin:target"
    assert (tmp_path / "out" / "report.html").is_file()
    refused = call("compare", "builtin:nothing", "./nowhere", code=2)[1]
    assert "builtin:nothing: no such builtin" in refused
    assert "./nowhere: no such folder" in refused


def test_show_prints_what_loads_again(tmp_path):
    name = bundled_recipes()[0].name
    stdout, _ = call("recipe", "show", name, "seed=7", "train.lr=1e-4")
    assert "# Peak learning rate." in stdout
    shown = tmp_path / "shown.yaml"
    shown.write_text(stdout)
    again, _ = call("recipe", "show", str(shown))
    assert again == stdout
    assert "seed: 7" in stdout


def test_copy_writes_the_file_and_never_over_another(tmp_path):
    recipe = bundled_recipes()[0]
    to = tmp_path / "mine.yaml"
    call("recipe", "copy", recipe.name, str(to))
    assert to.read_text() == recipe.path.read_text()
    assert "exists already" in call("recipe", "copy", recipe.name, str(to), code=2)[1]


def test_schema_is_json():
    stdout, _ = call("recipe", "schema")
    assert json.loads(stdout)["title"] == "drafttrain recipe"


def test_overrides_are_told_from_paths():
    assert all(map(OVERRIDE.match, ["eval.max_new_tokens=3", "seed=1", "data.sources.0.path=/a/b=c"]))
    assert not any(map(OVERRIDE.match, ["runs/demo/drafter", "./a=b", "/x/y=z", "demo"]))


def test_errors_become_their_exit_codes(capsys):
    def code_of(error: BaseException) -> int:
        with pytest.raises(typer.Exit) as caught, exit_codes(debug=False):
            raise error
        return caught.value.exit_code

    assert code_of(GateError("block_efficiency 1.9 is below 2.0 by 0.1")) == 3
    assert "below 2.0 by 0.1" in capsys.readouterr().err
    assert code_of(RecipeError("x.yaml", ["line 1: [odd] text"])) == 2
    assert "line 1: [odd] text" in capsys.readouterr().err
    assert code_of(KeyboardInterrupt()) == 75
    assert "run the same command to continue" in capsys.readouterr().err


def test_files_that_cannot_be_made_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    _, stderr = call("fit", "demo", "--runs", str(tmp_path / "file" / "runs"), code=1)
    assert "Not a directory" in stderr
    assert "Traceback" not in stderr


def test_weights_that_do_not_fit_on_the_disk_are_one_sentence(tmp_path):
    code = """
        import resource, sys
        from pathlib import Path
        import torch
        import typer
        from safetensors.torch import save_file
        from drafttrain.cli.app import exit_codes
        from drafttrain.core.files import folder_beside

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with exit_codes(debug=False), folder_beside(Path(sys.argv[1])) as folder:
                save_file({"x": torch.zeros(10_000)}, folder / "model.safetensors")
        except typer.Exit as stop:
            sys.exit(stop.exit_code)
    """
    run = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "drafter")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), exit_codes(debug=False):
        raise ZeroDivisionError


def test_the_handler_of_sigterm_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with exit_codes(debug=False):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_exits_with_75(number):
    # A process that was started in the background of a shell ignores SIGINT, and so do its children.
    code = """
        import signal
        import time
        from drafttrain.cli.app import app, exit_codes

        signal.signal(signal.SIGINT, signal.default_int_handler)

        @app.command()
        def wait() -> None:
            with exit_codes(debug=False):
                print("ready", flush=True)
                time.sleep(60)

        app(["wait"])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "run the same command to continue" in stderr
    assert "Traceback" not in stderr


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_LINE_SECONDS", 0.0)
    with console.progress("generating", 300, "tokens") as bar:
        bar.advance(100)
        time.sleep(0.01)
        bar.note("[3 prompts]")
        bar.advance(200)
    out, err = capsys.readouterr()
    assert out == ""
    assert "generating: 100/300 tokens (33%)" in err
    assert re.search(r"generating: done after 0:\d\d  300/300 tokens \(100%\)", err)
    assert "tokens/s" in err
    assert err.rstrip().endswith("[3 prompts]")
    assert "\x1b" not in err


def test_progress_tells_when_it_was_stopped(capsys):
    def one_step() -> None:
        with console.progress("training", None, "steps") as bar:
            bar.advance()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        one_step()
    assert re.search(r"training: stopped after 0:\d\d  1 steps", capsys.readouterr().err)


def test_what_an_earlier_run_did_does_not_count_in_the_rate():
    bar = console.Progress("training", 1000, "steps")
    bar.advance(900)
    time.sleep(0.02)
    bar.advance(1)
    assert bar.rate is not None
    assert bar.rate < 100


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console.say("hello")
    with console.progress("training", 2, "steps") as bar:
        bar.advance()
    console.table([["a", 1]], columns=["name", "value"])
    assert capsys.readouterr() == ("", "")


def test_tables_go_to_stdout_with_numbers_to_the_right(capsys):
    console.table([["tvdpp", 2.5], ["ce", "12.25 [12, 13]"]], columns=["loss", "block efficiency"], title="Demo")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "Demo",
        "loss   block efficiency",
        "-----  ----------------",
        "tvdpp               2.5",
        "ce       12.25 [12, 13]",
    ]
    assert err == ""


def test_the_recipes_are_where_the_checkout_has_them():
    assert (bundled_folder() / "demo.yaml").is_file()
