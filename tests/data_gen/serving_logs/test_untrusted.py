"""Any line is used or quarantined with its reason, and no private content reaches the disk."""

import copy
import json
import random
import string
import tracemalloc

import pytest

from drafttrain.core.errors import DataError
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.training_data import prepare
from tests.data_gen.serving_logs.log_lines import chat, chat_encoder, completion, ids, read, write

MAX_LINE_MB = 0.25


def with_distribution(rng: random.Random) -> dict:
    tokens = ids("good")
    rows = [{f"token_id:{token}": -0.1, f"token_id:{token + 1}": -rng.uniform(3, 9)} for token in tokens]
    own = [f"token_id:{token}" for token in tokens]
    logged = {"tokens": own, "token_logprobs": [-0.1] * len(own), "top_logprobs": rows}
    rounds = {"drafted": [tokens[:2], 3], "accepted": [2, 0]}
    return completion(f"p{rng.random()}", "good", logprobs=logged, token_ids=tokens, speculative=rounds)


def places(value, path=()):
    """Yield the place of every part of a value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*path, key))


def hostile(rng: random.Random) -> bytes:
    """Return a good line after one mutation."""
    good = rng.choice([with_distribution, lambda r: chat(f"q{r.random()}", f"a{r.random()}")])(rng)
    junk = [
        None, True, -1, 10**30, 1e308, float("nan"), float("-inf"), "", "\x00", "\ud800", "x" * rng.choice([10, 5000, 300_000]),
        [], {}, [[[]]], {"a": {"b": []}}, "token_id:99999999999", [70_000], [-1], ["a"], "<|end|>", 3.5, "\u202e", "\ufffd",
    ]  # fmt: skip
    kind = rng.randrange(9)
    if kind < 4:
        for _ in range(rng.randint(1, 3)):
            path = rng.choice([path for path in places(good) if path])
            part = good
            try:
                for key in path[:-1]:
                    part = part[key]
                part[path[-1]] = copy.deepcopy(rng.choice(junk))
            except (TypeError, KeyError, IndexError):
                continue
    line = json.dumps(good).encode()
    if kind == 4:
        return line[: rng.randrange(len(line))]
    if kind == 5:
        spot = rng.randrange(len(line))
        return (line[:spot] + rng.randbytes(rng.randint(1, 9)) + line[spot:]).replace(b"\n", b"?")
    if kind == 6:
        opening, depth = rng.choice([b"[", b'{"a":', b'{"response":']), rng.choice([40, 2000, 50_000])
        return opening * depth
    if kind == 7:
        form = rng.choice(
            ["Generated response {} : output: '{}", "Received request {}: prompt: '{}', prompt_token_ids: [1", "{}{}"]
        )
        return form.format(rng.random(), "".join(rng.choices(string.printable[:90], k=50))).encode()
    if kind == 8 and rng.random() < 0.02:
        return b'"' + b"y" * int(MAX_LINE_MB * 2**20 + rng.randrange(100)) + b'"'
    return line


def account(tmp_path, num_lines: int) -> None:
    rng = random.Random(0)
    path = tmp_path / "hostile.jsonl"
    with path.open("wb") as file:
        for _ in range(num_lines):
            file.write((hostile(rng) or b"{") + b"\n")
    encoder = chat_encoder(max_length=64)
    records, kinds = read(path, encoder=encoder, max_line_mb=MAX_LINE_MB)
    assert len(records) + len(kinds) == num_lines
    assert min(len(records), len(kinds)) > num_lines // 10
    assert {
        "not_json",
        "too_deep",
        "encoding",
        "wrong_type",
        "not_a_record",
        "control_characters",
        "speculative",
    } <= set(kinds)
    for record in records:
        assert all(0 <= token < 257 for token in record.tokens)
        assert 1 <= len(record.tokens) <= 64
        assert any(record.loss_mask)


def test_every_hostile_line_is_used_or_quarantined(tmp_path):
    account(tmp_path, 400)


@pytest.mark.slow
def test_ten_thousand_hostile_lines_are_used_or_quarantined_within_bounded_memory(tmp_path):
    tracemalloc.start()
    account(tmp_path, 10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Twenty times the longest line, beyond the records and the table of near duplicates.
    assert peak < 150 * 2**20


def test_a_line_over_the_limit_is_never_held_in_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b'{"prompt": "' + b"x" * 2**20)
        file.write(b'"}\n')
    with path.open("ab") as file:
        file.write(json.dumps(completion("a", "b")).encode() + b"\n")
    tracemalloc.start()
    records, kinds = read(path, max_line_mb=1.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(records), kinds) == (1, ["too_long"])
    assert peak < 16 * 2**20


@pytest.mark.long
def test_unanswered_requests_are_forgotten_before_they_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("drafttrain.data_gen.serving_logs.vllm.MAX_WAITING_BYTES", 4 * 2**20)
    path = tmp_path / "a.log"
    with path.open("w") as file:
        for number in range(200):
            ids = ", ".join(["12345"] * 5_000)
            file.write(
                f"[1] Received request r{number}: prompt: '{'x' * 2**16}', params: p, prompt_token_ids: [{ids}]\n"
            )
    tracemalloc.start()
    records, kinds = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (records, kinds) == ([], [])
    # One line while it is read, and the waiting requests; all requests would take 60.
    assert peak < 25 * 2**20


def test_a_last_line_that_is_still_written_waits(tmp_path):
    path = write(tmp_path / "a.jsonl", [completion("a", "b")])
    with path.open("ab") as file:
        file.write(b'{"request": {"pro')
    records, kinds = read(path)
    assert (len(records), kinds) == (1, [])


SECRETS = {
    "e-mail": "bob.smith+x@mail.example.org",
    "phone": "+49 170 123-4567",
    "key": "sk-abcDEF0123456789abcdef",
    "own": "Rumpelstilzchen",
}


def hide_name(text: str) -> str:
    """The user's own redaction of a test."""
    return text.replace(SECRETS["own"], "[name]")


def fails(text: str) -> str:
    raise KeyError(text)


@pytest.mark.parametrize("name", SECRETS)
def test_private_content_reaches_no_file_and_no_record(tmp_path, name):
    secret = SECRETS[name]
    asked, answered = completion(f"I am {secret}.", " Hello."), completion("Who?", f" It is {secret}. Bye.")
    served = completion("Who now?", f" It is {secret}. Bye.", token_ids=ids(f" It is {secret}. Bye."))
    only_ids = completion("Who?", "", token_ids=ids(secret), prompt_token_ids=ids("Who?"))
    only_ids["response"]["choices"][0] |= {"message": {"content": None}}
    broken = completion(f"{secret}", "x") | {"response": {"choices": secret}}
    lines = [asked, answered, served, only_ids, broken, chat(secret, "ok") | {"id": secret}, chat("q", "a")]
    path = write(tmp_path / "log.jsonl", lines)
    settings = ServingLogsSettings(path=str(path), redact_with=f"{__name__}.hide_name", near_duplicates=None)
    data = prepare(
        DataSettings(sources=[settings]),
        tmp_path / "d",
        tokenizer=chat_encoder().tokenizer,
        tokenizer_fingerprint="x",
        seed=0,
    )
    tokenizer = chat_encoder().tokenizer
    texts = [tokenizer.decode(record.tokens) for record in data.stores[0]]
    label = {"own": "[name]"}.get(name, f"[{name}]")
    assert texts[0] == f"I am {label}. Hello."
    assert texts[1] == "Who? It is "  # The target did not write the rest after a placeholder.
    assert texts[2] == "Who now? It is "
    assert len(texts) == 5
    assert data.stores[0].meta["set_aside_by"] == {"redacted": 1, "wrong_type": 1}
    for file in (tmp_path / "d").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
    assert any(secret in tokenizer.decode(record.tokens) for record in read(path, redact=False)[0])


def test_text_that_only_looks_like_numbers_stays(tmp_path):
    answer = " On 2026-11-25 at 12:30:05, 3.14159 and 1,234,567 were 99 % of 10.0.0.1; 5 + 7 = 12."
    (record,), _ = read(write(tmp_path / "a.jsonl", [completion("When?", answer)]))
    assert chat_encoder().tokenizer.decode(record.tokens) == "When?" + answer


def test_a_failing_redaction_keeps_nothing_and_a_missing_one_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [completion("a", "b")])
    assert read(path, redact_with=f"{__name__}.fails") == ([], ["redaction"])
    with pytest.raises(DataError, match=r"redact_with: no\.such: cannot be imported"):
        read(path, redact_with="no.such")


def test_duplicates_exact_and_near_are_quarantined_and_a_common_system_prompt_makes_none(tmp_path):
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "the",
        "mat",
        "and",
        "looked",
        "at",
        "the",
        "dog",
        "for",
        "a",
        "long",
        "while",
        "before",
        "it",
        "went",
        "away",
        "again",
        "to",
        "sleep",
    ]
    system = {"role": "system", "content": " ".join(words * 20)}

    def line(question: str, answer: list[str]) -> dict:
        asked = chat(question, " ".join(answer))
        asked["request"]["messages"].insert(0, system)
        return asked

    other = [
        "rain",
        "fell",
        "all",
        "day",
        "over",
        "the",
        "quiet",
        "hills",
        "while",
        "the",
        "old",
        "man",
        "read",
        "his",
        "paper",
        "by",
        "the",
        "fire",
        "and",
        "slept",
    ]
    lines = [line("q", words * 2), line("q", words * 2), line("q", [*words * 2, "now"]), line("q", other)]
    path = write(tmp_path / "a.jsonl", lines)
    encoder = chat_encoder(max_length=4096)
    assert [len(part) for part in read(path, encoder=encoder)] == [2, 2]
    assert read(path, encoder=encoder)[1] == ["duplicate", "near_duplicate"]
    assert read(path, encoder=encoder, near_duplicates=None)[1] == ["duplicate"]
    assert read(path, encoder=encoder, remembered=1)[1] == ["duplicate", "near_duplicate"]


def test_an_exchange_without_a_record_makes_no_later_one_a_duplicate(tmp_path):
    wrong = completion("a", "b") | {}
    wrong["response"] |= {"usage": {"prompt_tokens": 99, "completion_tokens": 1}}
    records, kinds = read(write(tmp_path / "a.jsonl", [wrong, completion("a", "b")]))
    assert (len(records), kinds) == (1, ["retokenised"])
