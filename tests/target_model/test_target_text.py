"""A draft in a drafter's own tokens becomes the target's tokens of the same text, and joins the text before it."""

from __future__ import annotations

import random

import pytest
from tokenizers import normalizers

from drafttrain.target_model.other_tokenizer import OtherTokenizer
from drafttrain.target_model.target_text import TargetText
from tests.small_tokenizers import END, byte_level, letters, sentence_pieces

BPE = byte_level(["Ġ t", "h e", "Ġt he", "c a", "ca t"])
PIECES = sentence_pieces(["▁", "t", "h", "e", "c", "a", "▁t", "he", "▁the", "ca", "▁c", "é"])
TEXTS = ["the cat ate the heat", "a  cat, café the", "cat\nthe éa the thecat"]


def after(other: OtherTokenizer, text: list[int], drafted: list[str]) -> list[str]:
    """Return the target's tokens of a draft."""
    target = other._target.tokenizer
    return list(target.convert_ids_to_tokens(other.target_text.after(text, ids(other.own, *drafted))))


def ids(tokenizer, *tokens: str) -> list[int]:
    return list(tokenizer.convert_tokens_to_ids(list(tokens)))


def spelled(tokenizer, tokens: list[int], other: OtherTokenizer) -> bytes:
    side = other._target if tokenizer is other._target.tokenizer else other._own
    return b"".join(side.pieces(tokens, begins=False))


@pytest.mark.parametrize(("target", "own"), [(BPE, PIECES), (PIECES, BPE)])
def test_a_draft_of_the_rest_of_a_text_becomes_the_targets_tokens_of_that_rest(target, own):
    other, compared = OtherTokenizer(target, own), 0
    for text in TEXTS:
        tokens = target(text).input_ids
        whole = other.read(tokens).ids
        for cut in range(1, len(tokens)):
            made = other.read(tokens[:cut])
            if made.complete and whole[: len(made.ids)] == made.ids:
                assert other.target_text.after(tokens[:cut], whole[len(made.ids) :]) == tokens[cut:]
                compared += 1
    assert compared > 15


def rest_is_spelled(target, own) -> bool:
    """Return whether random drafts after random tokens become tokens that spell the same bytes."""
    other, dice = OtherTokenizer(target, own), random.Random(0)
    written = [
        [one for one in range(len(tokenizer.get_vocab())) if one not in tokenizer.all_special_ids]
        for tokenizer in (target, own)
    ]
    for _ in range(300):
        text = dice.choices(written[0], k=dice.randrange(1, 20))
        if not other.read(text).complete:
            continue
        drafted = dice.choices(written[1], k=dice.randrange(1, 6))
        wanted = spelled(own, drafted, other)
        found = spelled(target, other.target_text.after(text, drafted), other)
        if found != wanted[: whole_bytes(wanted)]:
            return False
    return True


def whole_bytes(text: bytes) -> int:
    """Return how many bytes come before the first that are no character."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(text)


@pytest.mark.parametrize(("target", "own"), [(BPE, PIECES), (PIECES, BPE)])
def test_the_targets_tokens_spell_what_was_drafted(target, own):
    assert rest_is_spelled(target, own)


def test_control_a_draft_that_is_encoded_as_if_it_began_a_text(monkeypatch):
    monkeypatch.setattr(TargetText, "_end", lambda self, text: (b"", True))
    assert not rest_is_spelled(PIECES, BPE)


def test_where_the_last_token_would_join_the_draft_the_longest_tokens_follow():
    other = OtherTokenizer(letters(["a", "b", "c", "ab", "bc", "ca"]), letters(["a", "b", "c"]))
    target = other._target.tokenizer
    a, c = ids(target, "a", "c")
    assert target.convert_ids_to_tokens(target("abca").input_ids) == ["ab", "ca"]
    # The text before is "a" already: "bc" does not end where "ab" does, "a" ends where "ca" does.
    assert after(other, [a], ["b", "c", "a"]) == ["bc", "a"]
    # "ca" of "a", "c" + "ab": the tokenizer's tokens go on where it ends.
    assert after(other, [a, c], ["a", "a", "b"]) == ["a", "ab"]


def test_a_space_is_put_before_the_first_word_only():
    other = OtherTokenizer(PIECES, BPE)
    the = ids(PIECES, "▁the")
    assert after(other, the, ["he"]) == ["he"]
    assert after(other, the, ["Ġt", "he", "cat"]) == ["▁the", "ca", "t"]
    assert after(other, [PIECES.eos_token_id], ["t", "he"]) == ["▁the"]


def test_bytes_that_are_no_character_end_a_draft():
    other = OtherTokenizer(PIECES, BPE)
    start = ids(PIECES, "▁c")
    assert after(other, start, ["cat", "Ã"]) == ["ca", "t"]
    assert after(other, start, ["Ã"]) == []
    assert after(other, start, ["Ã", "©", "t"]) == ["é", "t"]
    assert after(other, start, ["ca", "ÿ", "t"]) == ["ca"]


def test_special_tokens_are_the_targets_and_an_unknown_one_ends_a_draft():
    own = byte_level(["h e"])
    own.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    other = OtherTokenizer(PIECES, own)
    start = ids(PIECES, "▁the")
    assert after(other, start, ["h", END, "t"]) == ["h", "</s>", "▁t"]
    assert after(other, start, ["h", "<|user|>", "t"]) == ["h"]


def test_text_that_the_targets_tokenizer_changes_ends_a_draft():
    lower = letters(["t", "h", "e", "he", "T"])
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    other = OtherTokenizer(lower, letters(["t", "h", "e", "T"]))
    (t,) = ids(lower, "t")
    assert after(other, [t], ["h", "e"]) == ["he"]
    assert after(other, [t], ["h", "T", "e"]) == ["h"]
    # Changed text before the draft does not stop it: its bytes are taken as they are.
    assert after(other, ids(lower, "T"), ["h", "e"]) == ["he"]


def test_tokens_without_a_row_in_the_target_are_not_proposed():
    tokenizer = letters(["a", "b", "ab"])
    rows = {tokenizer.convert_tokens_to_ids("ab"): "ab"}
    other = OtherTokenizer(tokenizer, letters(["a", "b"]), target_rows=min(rows))
    assert after(other, ids(tokenizer, "b"), ["b", "a", "b"]) == ["b"]
