"""Names and texts from outside appear as plain text in pages, pictures, tables, cards and JSON; the two tables."""

from __future__ import annotations

import base64
import json
import re
import sys
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from xml.etree import ElementTree

import pytest

from drafttrain.checkpoint import About, write_about
from drafttrain.core.console import say, table
from drafttrain.core.printable import printable
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import MedusaSettings
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.page import label, picture
from drafttrain.eval.report import PHASES, write_report
from drafttrain.eval.result import Piece, Result
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.table import CARRIES_OVER, THIS_MACHINE, show
from drafttrain.export.markdown import block, code, plain
from drafttrain.online.report import _efficiency
from drafttrain.serving.card import model_card
from drafttrain.target_model import Target
from drafttrain.training import step_clock
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS
from tests.marks import long

NAMES = [
    "cost $5, was $9",
    r"$\frac{1}{$",
    r"a\$b$c",
    "$$",
    "half \udcff\ud800",
    "_hidden",
    "__",
    "\x00\x1b[31mred\x07",
    "--><script>alert(1)</script><!--",
    "]]>&amp;<b>",
    "a|b`c``d",
    "two\nlines\ttab",
    "名前 🚀 \u202e",
    "x" * 3000,
    "{{ 7 * 7 }}{% raw %}",
    "[red]not[/] markup[/x]",
    " ",
    "",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One evaluation of two drafters, `A` and `B`."""
    target = Target(random_llama().double(), byte_tokenizer(), name="T", fingerprint="")
    folder = tmp_path_factory.mktemp("report") / "drafter"
    folder.mkdir()
    Medusa.create(MedusaSettings(num_heads=2), target=target, tokenizer=target.tokenizer).save(folder)
    write_about(folder, About("medusa", "T", "", target.tokenizer_fingerprint, target.vocab_size, 0))
    settings = EvalSettings(max_new_tokens=8, temperatures=[0.0], speed_prompts=1, replay_lengths=[1, 2])
    return evaluate({"A": folder, "B": folder}, target, PROMPTS[:2], settings)


def renamed(result: Result, name: str) -> Result:
    """Return a result in which a drafter, its comparison, the target and all texts have this name."""
    (part,) = result.temperatures
    samples = [
        replace(sample, prompt=name, pieces=[Piece(name, drafted=True)]) for sample in part.drafters["A"].samples
    ]
    part = replace(
        part,
        drafters={name: replace(part.drafters["A"], samples=samples), "B": part.drafters["B"]},
        comparisons={f"{name} - B": part.comparisons["A - B"]},
    )
    return replace(
        result,
        target=replace(result.target, name=name),
        drafters={name: replace(result.drafters["A"], target=name), "B": result.drafters["B"]},
        temperatures=[part],
    )


def pictures(page: str) -> list[str]:
    """Return the pictures of a page; each must be well-formed."""
    found = [
        base64.b64decode(data).decode("utf-8") for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    ]
    for one in found:
        ElementTree.fromstring(one)
    return found


@pytest.mark.parametrize(
    "name", [long(name) if place % 3 else name for place, name in enumerate(NAMES)], ids=lambda name: repr(name[:12])
)
def test_a_report_shows_any_name_as_it_is(result, name, tmp_path):
    path = tmp_path / "report.html"
    write_report(tmp_path, renamed(result, name), title=name, command=name)
    page = path.read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "\x1b" not in page
    assert ("{{ 7 * 7 }}" in page) == ("{{" in name)
    drawn = pictures(page)
    assert len(drawn) == 3
    if name.startswith("_") or "$" in name:
        # A picture has its texts in comments beside their outlines.
        for one, after in zip(drawn, (", temperature 0", ", temperature 0", " - B"), strict=True):
            assert f"{name.replace('$', chr(92) + '$')}{after}" in one or f"{name}{after}" in one


@pytest.mark.parametrize(
    ("row", "title"),
    [({"mfu": "0.31"}, "utilization (MFU)"), ({"mfu": ""}, "needed TFLOP/s"), ({"step_ms": ""}, None)],
)
def test_a_report_plots_the_time_of_a_step_by_phase(result, row, title, tmp_path):
    """A run of an earlier version has no times, and no such plot."""
    assert set(PHASES) == set(step_clock.PHASES) - {"other"}
    whole = {"step": "2", "loss": "1.5", "step_ms": "9.0", "step_flops": "1000000"}
    whole |= dict.fromkeys((f"{phase}_ms" for phase in PHASES), "1.0") | row
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("\n".join([",".join(whole), ",".join(whole.values()), ",".join(whole.values())]) + "\n")
    write_report(tmp_path, result, title="T", command="")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    drawn = pictures(page)
    assert len(drawn) == 4
    assert ("time of a step" in drawn[0]) == (title is not None)
    assert (title or "loss") in drawn[0]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:12]))
def test_tables_json_and_cards_take_any_name(result, name, tmp_path, capsys):
    found = renamed(result, name)
    show(found)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    found.write(tmp_path / "eval.json")
    assert next(iter(json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["drafters"])) == name
    card = model_card(name, found, drafter=name, recipe=f"name: {name}", command=name)
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {6}, "no cell is cut in two"
    assert sum(line.startswith("# ") for line in card.splitlines()) == 1
    card.encode("utf-8")


def test_counts_and_times_are_shown_in_two_tables(result, tmp_path, capsys):
    """The figures that depend on the machine are in the second table only: on stdout, in the report and in the card."""
    show(result)
    card = model_card("N", result, drafter="A", recipe="", command="")
    write_report(tmp_path, result, title="T", command="")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = [(capsys.readouterr().out, THIS_MACHINE), (card, "measured times"), (page, THIS_MACHINE)]
    for text, second in shown:
        counted, timed = text[text.index(CARRIES_OVER) :].split(second, 1)
        assert all(name in counted for name in ("block efficiency", "alpha", "MBSU"))
        assert "tokens/s" not in counted
        assert "tokens/s" in timed
    assert shown[0][0].count("exact 2/2") == 2
    assert "transformers' generate, first 1 prompts" in shown[0][0]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_outputs_of_any_encoding_are_written(encoding, monkeypatch):
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding=encoding, errors="strict"))
    table([[name, 1] for name in NAMES], columns=["name", "n"], title="±€🚀")
    sys.stdout.flush()
    assert b"$$" in written.getvalue()
    assert b"\x1b" not in written.getvalue()
    for name in NAMES:
        say(name)


def test_printable_characters_stay_and_the_others_are_escaped():
    assert printable("a\tb\nc é 🚀") == "a\tb\nc é 🚀"
    assert printable("\x1b[0m\x00\udcff") == "\\x1b[0m\\x00\\udcff"
    assert printable("é€", encoding="latin-1") == "é\\u20ac"
    assert label("_a$b") == r" _a\$b"
    assert len(label("x" * 500)) == 60


def test_markdown_stays_text():
    assert code("a`b``c") == "```a`b``c```"
    assert code("`") == "`` ` ``"
    assert plain("a|b <i>\n[x](y)") == r"a\|b \<i\> \[x\](y)"
    assert block("x: ```\n", "yaml") == "````yaml\nx: ```\n````"


def test_an_online_report_shows_any_name_of_a_route():
    figures = {"block_efficiency": 1.5, "candidate": 1.6, "promoted": True, "drift_p_value": 0.5}
    for some in (NAMES[:4], ["_hidden", *NAMES[6:9]], NAMES[9:13], NAMES[13:]):
        rows = [
            {"route": name, "requests": n, "served_block_efficiency": 1.4} | figures for name in some for n in (1, 2)
        ]
        (drawn,) = pictures(f'"{picture(lambda axes, rows=rows: _efficiency(axes, rows), columns=2)}"')
        assert (" _hidden" in drawn) == ("_hidden" in some)
