"""drafttrain data inspect, drafttrain data check."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app
from tests.data_gen.chats import GENERATION, chat_tokenizer
from tests.data_gen.four_templates import TEMPLATES

GOOD = {"messages": [{"role": "user", "content": "q <b>"}, {"role": "assistant", "content": "naïve 😀"}]}
OTHER = {
    "messages": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}],
    "finish_reason": "length",
}
BAD = {"messages": [{"role": "mage", "content": "q"}]}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer(GENERATION).save_pretrained(folder)
    return folder


def run(command: str, folder: Path, tokenizer: Path, values: list[Any], *options: str) -> Any:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    sources = f"data.sources=[{{kind: jsonl, path: {path}}}]"
    words = ["data", command, "demo", sources, "data.generate=null", f"target.tokenizer={tokenizer}"]
    return CliRunner().invoke(app, [*words, "data.max_length=128", *options, "--runs", str(folder / "runs")])


def test_inspect_marks_trained_tokens_and_gives_reasons(tmp_path, tokenizer_folder):
    done = run("inspect", tmp_path, tokenizer_folder, [GOOD, BAD, OTHER])
    assert done.exit_code == 0, done.output
    asked = "<|im_start|>user\nq <b><|im_end|>\n<|im_start|>assistant\n"
    assert f"{asked}‹naïve 😀<|im_end|>›\n" in done.stdout
    assert "d.jsonl:2: quarantined: messages.0: unknown role 'mage'" in done.stderr
    assert "unfinished: finish_reason is 'length'" in done.stdout
    assert not (tmp_path / "runs").exists()
    skipped = run("inspect", tmp_path, tokenizer_folder, [GOOD, BAD, OTHER], "--skip", "2", "--number", "1")
    assert "d.jsonl:3" in skipped.stdout
    assert "d.jsonl:1" not in skipped.stdout


def test_the_page_holds_every_token_with_its_mark_and_runs_nothing(tmp_path, tokenizer_folder):
    page = tmp_path / "page.html"
    assert run("inspect", tmp_path, tokenizer_folder, [GOOD], "--html", str(page)).exit_code == 0
    text = page.read_text(encoding="utf-8")
    tokens = re.findall(r'<(mark|span) title="token (\d+): [\d, ]+">(.*?)</\1>', text, flags=re.DOTALL)
    marked = "".join(word for kind, _, word in tokens if kind == "mark")
    assert marked == "naïve 😀&lt;|im_end|&gt;"
    assert "".join(word for _, _, word in tokens).startswith("&lt;|im_start|&gt;user\nq &lt;b&gt;&lt;|im_end|&gt;")
    assert "<b>" not in text
    assert "<script" not in text


def test_check_exits_with_three_and_writes_its_findings(tmp_path, tokenizer_folder):
    found = tmp_path / "found.jsonl"
    done = run("check", tmp_path, tokenizer_folder, [GOOD, BAD, OTHER, GOOD], "--out", str(found))
    assert done.exit_code == 3, done.output
    assert "3 of 4 items have faults" in done.stderr
    listed = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
    assert [(one["kind"], one["where"].rpartition(":")[2]) for one in listed] == [
        ("quarantined", "2"),
        ("unfinished", "3"),
        ("duplicate", "4"),
    ]
    assert all(f"{one['where']}: {one['what']}" in done.stdout for one in listed)
    clean = run("check", tmp_path, tokenizer_folder, [GOOD])
    assert (clean.exit_code, "1 items: nothing found" in clean.stderr) == (0, True)


def test_what_only_other_programs_do_differently_is_shown_and_no_fault(tmp_path):
    thinking = TEMPLATES["thinking"]
    thinking.tokenizer().save_pretrained(tmp_path / "tokenizer")
    twice = {"messages": [*GOOD["messages"], *OTHER["messages"]], "chat_template_kwargs": thinking.arguments}
    done = run("check", tmp_path, tmp_path / "tokenizer", [twice])
    assert (done.exit_code, "1 items: no faults" in done.stderr) == (0, True)
    assert "rewrites earlier turns: 2 records instead of one" in done.stdout


def test_a_server_that_is_not_there_is_an_error_of_one_line(tmp_path, tokenizer_folder):
    done = run("check", tmp_path, tokenizer_folder, [GOOD], "--server", "http://127.0.0.1:9", "--model", "m")
    assert done.exit_code == 1
    assert "http://127.0.0.1:9/tokenize: no answer" in done.stderr
