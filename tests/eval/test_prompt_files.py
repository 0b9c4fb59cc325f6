"""Evaluation prompts from several files: each with its domain, its number and its own names of keys."""

import gzip
import json
from pathlib import Path

import pytest

from drafttrain.config.load import load_sections
from drafttrain.core.errors import DataError, RecipeError
from drafttrain.eval.prompts import PromptFile, name_of, read_prompts
from tests.data_gen.chats import chat_tokenizer
from tests.data_gen.test_formats import PLAIN


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the forms of MT-bench, GSM8K and HumanEval."""
    monkeypatch.chdir(tmp_path)
    asked = [{"question_id": 81 + i, "category": "ab"[i // 4], "turns": [f"q{i}", "more"]} for i in range(8)]
    Path("question.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    Path("test.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": "2+2?", "answer": "4"}\n')
    task = {
        "task_id": "HumanEval/0",
        "prompt": "def f():",
        "entry_point": "f",
        "canonical_solution": "  pass",
        "test": "",
    }
    Path("HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(task).encode()))


def read(*chosen: PromptFile, **more):
    return read_prompts(list(chosen), chat_tokenizer(PLAIN), prompt_tokens=None, **more)


def text(prompt):
    return chat_tokenizer(PLAIN).decode(list(prompt.tokens))


def test_every_file_gives_its_share_under_its_domain(files):
    mt = PromptFile(path="question.jsonl", number=4)
    code = PromptFile(path="HumanEval.jsonl.gz", domain="code", chat=True)
    found = read(mt, PromptFile(path="test.jsonl", domain="math"), code)
    assert [(one.id, one.domain, text(one)) for one in found] == [
        ("question:81", "a", "<user>q0|<assistant>"),
        ("math:1", "math", "<user>1+1?|<assistant>"),
        ("code:HumanEval/0", "code", "<user>def f():|<assistant>"),
        ("question:83", "a", "<user>q2|<assistant>"),
        ("math:2", "math", "<user>2+2?|<assistant>"),
        ("question:85", "b", "<user>q4|<assistant>"),
        ("question:87", "b", "<user>q6|<assistant>"),
    ]
    assert [one.answer for one in found if one.domain == "math"] == ["2", "4"]
    assert [one.id for one in read(mt, code, limit=2)] == ["question:81", "code:HumanEval/0"]
    assert "question:81" not in [one.id for one in read(mt, code, dropped=["question:81"])]


def test_text_is_a_message_only_where_the_file_says_so(files):
    (raw,) = read(PromptFile(path="HumanEval.jsonl.gz"))
    assert (raw.domain, text(raw)) == ("HumanEval", "def f():")


def test_one_file_keeps_its_ids_and_finds_its_categories(files):
    found = read_prompts("question.jsonl", chat_tokenizer(PLAIN), prompt_tokens=None)
    assert [one.id for one in found] == [str(81 + i) for i in range(8)]
    assert {one.domain for one in found} == {"a", "b"}


def test_two_files_of_one_name_have_ids_of_their_own(files):
    same = [PromptFile(path="test.jsonl"), PromptFile(path="test.jsonl")]
    assert [one.id for one in read(*same)] == ["test:1", "test#1:1", "test:2", "test#1:2"]


def test_a_key_under_another_name_is_named_where_it_is_missing(files):
    Path("odd.jsonl").write_text('{"problem": "why?", "topic": "c"}\n{"riddle": "who?"}\n')
    with pytest.raises(DataError, match=r"(?s)1 lines.*line 2: .*rename names 'problem', 'topic', which it lacks"):
        read(PromptFile(path="odd.jsonl", rename={"question": "problem", "domain": "topic"}))
    Path("odd.jsonl").write_text('{"problem": "why?", "topic": "c"}\n')
    (found,) = read(PromptFile(path="odd.jsonl", rename={"question": "problem", "domain": "topic"}))
    assert (found.domain, text(found)) == ("c", "<user>why?|<assistant>")


def test_a_recipe_names_one_file_or_several():
    (one,) = load_sections(["eval"], ["eval.prompts=a.jsonl"])
    (several,) = load_sections(["eval"], ["eval.prompts=[{path: a.jsonl, domain: math, number: 3}, {path: b.jsonl}]"])
    assert one.prompts == "a.jsonl"
    assert several.prompts == [PromptFile(path="a.jsonl", domain="math", number=3), PromptFile(path="b.jsonl")]
    assert name_of(several.prompts) == "a.jsonl, b.jsonl"
    assert several.as_dict()["prompts"][0]["domain"] == "math"
    for wrong, problem in (
        ("[{path: a.jsonl, number: 0}]", "number: must be >= 1"),
        ("[{pth: a.jsonl}]", "Did you mean 'path'"),
        ("[]", "at least one file is needed"),
        ("{path: a.jsonl}", "must be text or"),
    ):
        with pytest.raises(RecipeError, match=problem):
            load_sections(["eval"], [f"eval.prompts={wrong}"])


def test_benchmarks_are_read_as_they_are_distributed(shared_folder):
    data = shared_folder / "data"
    found = read(
        PromptFile(path=str(data / "mt_bench" / "question.jsonl")),
        PromptFile(path=str(data / "gsm8k" / "test.jsonl"), domain="gsm8k", number=20),
        PromptFile(path=str(data / "human_eval" / "HumanEval.jsonl.gz"), domain="code", number=20, chat=True),
    )
    assert len(found) == 120
    domains = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
    assert {one.domain for one in found} == {*domains, "gsm8k", "code"}
    assert all(text(one).startswith("<user>") for one in found)
