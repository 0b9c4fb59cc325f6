"""Streamed answers: the same tokens as without a listener, whole characters, marks on accepted draft tokens alone, turns."""

from __future__ import annotations

from typing import Any

import pytest

from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.answer_text import INCOMPLETE, AnswerText
from drafttrain.eval.arms import Arm
from drafttrain.eval.conversation import Conversation, chat_prompt
from drafttrain.eval.engine import Engine
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.eval.proposers.ngram import Ngram
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.result import Piece
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, V, decode, noisy

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TEXT = "naïve café: 日本語 and 🙂🙃!"


class Numbers:
    """A tokenizer that shows every token by its number."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(f"{token}," for token in tokens)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")


@pytest.fixture
def chat_target(target) -> Target:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return Target(target.model, tokenizer, name="tiny", fingerprint="")


def nearly_right(target: Target) -> ChainProposer:
    return ChainProposer(noisy(target.model, 0.02), target_vocab_size=V)


def engine_of(target: Target, proposer: Any, **options: Any) -> Engine:
    settings: dict[str, Any] = {
        "rule": Lossless(),
        "policy": FixedLength(),
        "sampling": Sampling(0.0),
        "max_new_tokens": 24,
    }
    return Engine(target, proposer, **(settings | options))


def conversation(target: Target, **options: Any) -> Conversation:
    engine = engine_of(target, nearly_right(target), **options)
    return Conversation(Arm("chat", engine, Ledger(), None, target, PLAIN))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("proposer", [nearly_right, lambda target: Ngram()])
@pytest.mark.parametrize("policy", [FixedLength(), TreeLength(TreeSettings(9, 3, 3))])
def test_rounds_hold_exactly_the_tokens_of_the_output(target, proposer, policy, temperature):
    heard: dict[str, list[int]] = {prompt.id: [] for prompt in PROMPTS}

    def listen(context: Any, round: Any) -> None:
        new = context.tokens[context.num_prompt_tokens + round.start :]
        assert len(new) == round.num_emitted
        heard[context.id] += new

    engine = engine_of(target, proposer(target), policy=policy, sampling=Sampling(temperature))
    found = engine.generate(PROMPTS, on_round=listen)
    alone = decode(target, proposer(target), policy=policy, temperature=temperature, new=24)
    assert [heard[one.id] for one in found] == [one.tokens for one in found] == [one.tokens for one in alone]
    assert any(len(one.rounds) < len(one.tokens) for one in found) or proposer is not nearly_right


def shown(tokens_and_rounds: Any, *, shift: int = 0) -> list[tuple[str, bool]]:
    """Return (token, marked) of an output, as its marks show them; with a shift, marks that are wrong by so many tokens."""
    context, rounds = tokens_and_rounds
    text, pieces = AnswerText(Numbers()), []
    for one in rounds:
        part = type(context)(context.id, context.tokens[: context.num_prompt_tokens + one.start + one.num_emitted], 0)
        part.num_prompt_tokens = context.num_prompt_tokens
        wrong = type(one)(**(vars(one) | {"num_accepted": one.num_accepted + shift}))
        pieces += text.of_round(part, wrong)
    return [(token, piece.drafted) for piece in pieces for token in piece.text.rstrip(",").split(",")]


@pytest.mark.parametrize("stop", [None, 7])
def test_marks_are_on_accepted_draft_tokens_alone(target, stop):
    contexts: dict[str, Any] = {}
    engine = engine_of(target, nearly_right(target), stop_tokens=None)
    plain = engine.generate(PROMPTS)
    stops = () if stop is None else (plain[0].tokens[stop],)
    engine = engine_of(target, nearly_right(target), stop_tokens=stops)
    found = engine.generate(PROMPTS, on_round=lambda context, round: contexts.update({context.id: context}))
    differs = 0
    for one in found:
        wanted = [
            (str(token), place < part.num_accepted)
            for part in one.rounds
            for place, token in enumerate(one.tokens[part.start : part.start + part.num_emitted])
        ]
        assert shown((contexts[one.id], one.rounds)) == wanted
        assert sum(marked for _, marked in wanted) == sum(part.num_accepted for part in one.rounds)
        differs += shown((contexts[one.id], one.rounds), shift=1) != wanted
    assert differs, "control: marks that are off by one token must differ"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_character_of_several_tokens_comes_with_the_last_of_them(size):
    tokenizer, answer = byte_tokenizer(), AnswerText(byte_tokenizer())
    tokens = tokenizer(TEXT).input_ids
    assert len(tokens) > len(TEXT)
    groups = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    parts = [answer.add(group) for group in groups]
    assert "".join(parts) == TEXT == answer.text
    assert not any(INCOMPLETE in part for part in parts)
    assert answer.rest() == ""
    # Control: tokens decoded group by group are no whole characters.
    assert INCOMPLETE in "".join(tokenizer.decode(group) for group in groups)


def test_bytes_that_are_no_character_come_at_the_end():
    tokenizer, answer = byte_tokenizer(), AnswerText(byte_tokenizer())
    tokens = [*tokenizer("ab").input_ids, *tokenizer("é").input_ids[:1]]
    assert answer.add(tokens) == "ab"
    assert answer.rest() == INCOMPLETE
    assert answer.text == tokenizer.decode(tokens)


def test_special_tokens_have_no_text():
    answer = AnswerText(byte_tokenizer())
    assert answer.add([*byte_tokenizer()("ok").input_ids, 0]) == "ok"


def test_an_answer_and_its_pieces_are_the_engines_own(chat_target):
    chat, pieces = conversation(chat_target), list[Piece]()
    generation = chat.ask("why?", pieces.append)
    prompt = chat_prompt([{"role": "user", "content": "why?"}], chat_target)
    (alone,) = engine_of(chat_target, nearly_right(chat_target)).generate([prompt])
    assert generation.tokens == alone.tokens
    text = chat_target.tokenizer.decode(alone.tokens, skip_special_tokens=True)
    assert "".join(piece.text for piece in pieces) == text
    assert any(piece.drafted for piece in pieces)
    assert chat.turns == [{"role": "user", "content": "why?"}, {"role": "assistant", "content": text}]


def test_the_next_question_is_read_with_the_turns_before_it(chat_target):
    chat = conversation(chat_target, max_new_tokens=4)
    chat.system = "be brief"
    first = chat.ask("one", lambda piece: None)
    second = chat.ask("two", lambda piece: None)
    assert chat_target.tokenizer.decode(first.prompt_tokens) == "<system>be brief\n<user>one\n<assistant>"
    answer = chat.turns[1]["content"]
    text = f"<system>be brief\n<user>one\n<assistant>{answer}\n<user>two\n<assistant>"
    assert chat_target.tokenizer.decode(second.prompt_tokens) == text
    assert first.id != second.id, "each answer has random streams of its own"


def test_an_answer_that_is_stopped_stays_and_the_next_one_is_unharmed(chat_target):
    chat, pieces = conversation(chat_target), list[Piece]()

    def stop(piece: Piece) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("one", stop)
    assert chat.turns[1]["content"] == "".join(piece.text for piece in pieces)
    second = chat.ask("two", lambda piece: None)
    (fresh,) = engine_of(chat_target, nearly_right(chat_target)).generate([Prompt("fresh", second.prompt_tokens)])
    assert second.tokens == fresh.tokens


def test_a_question_that_cannot_be_answered_is_no_turn(target, chat_target, monkeypatch):
    monkeypatch.setattr("drafttrain.target_model.target.position_limit", lambda model: 512)
    with pytest.raises(DataError, match="no chat template"):
        conversation(target).ask("why?", lambda piece: None)
    chat = conversation(chat_target)
    with pytest.raises(CheckpointError, match="512 positions"):
        chat.ask("why? " * 200, lambda piece: None)
    assert chat.turns == []
