"""Tokens of two tokenizers are the same if they spell the same bytes, and a text of one is read in the tokens of the other."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model import other_tokenizer
from drafttrain.target_model.other_tokenizer import Joint, OtherTokenizer, Reading
from drafttrain.target_model.spelling import Spelling
from drafttrain.target_model.token_bytes import token_bytes
from tests.small_tokenizers import END, byte_level, letters, sentence_pieces

BPE = byte_level(["Ġ t", "h e", "Ġt he", "c a", "ca t"])
PIECES = sentence_pieces(["▁", "t", "h", "e", "c", "a", "▁t", "he", "▁the", "ca", "▁c", "é"])


ENCODE = Spelling.encode


def ids(tokenizer, *tokens: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(tokens))


def test_a_token_spells_the_same_bytes_in_every_form():
    spelled, pieces = (token_bytes(one, name="it") for one in (BPE, PIECES))
    assert spelled[ids(BPE, "Ġthe")[0]] == pieces[ids(PIECES, "▁the")[0]] == b" the"
    assert spelled[ids(BPE, "Ã")[0]] == pieces[ids(PIECES, "<0xC3>")[0]] == b"\xc3"
    assert pieces[ids(PIECES, "é")[0]] == "é".encode()
    assert ids(BPE, END)[0] not in spelled
    # In the alphabet of byte-level BPE every byte is a token.
    assert {spelled[one] for one in range(256)} == {bytes([byte]) for byte in range(256)}


def test_shared_tokens_are_those_that_spell_the_same_each_once():
    other = OtherTokenizer(PIECES, BPE)
    pairs = dict(zip(other.target_R.tolist(), other.own_R.tolist(), strict=True))
    for theirs, ours in (("▁the", "Ġthe"), ("ca", "ca"), ("t", "t"), ("<0xC3>", "Ã"), ("</s>", END)):
        assert pairs[ids(PIECES, theirs)[0]] == ids(BPE, ours)[0]
    # A letter has a token of its own, so the lone byte beside it is not shared; neither is what the drafter lacks.
    assert not {*ids(PIECES, "<0x74>", "é", "▁c")} & pairs.keys()
    assert len(set(pairs.values())) == len(pairs)
    assert other.target_R.tolist() == sorted(other.target_R.tolist())


def test_a_text_is_read_in_the_drafters_own_tokens():
    other = OtherTokenizer(PIECES, BPE)
    made = other.read(PIECES("the cat").input_ids)
    assert PIECES.convert_ids_to_tokens(PIECES("the cat").input_ids) == ["▁the", "▁", "ca", "t"]
    assert BPE.convert_ids_to_tokens(made.ids) == ["t", "he", "Ġ", "cat"]
    # "▁the" ends where "he" does; "ca" ends inside "cat".
    assert made.after_T == [2, 3, -1, 4]
    assert made.complete


def test_behind_bytes_that_are_no_text_no_token_is_where_the_targets_is():
    """They are read as U+FFFD, three bytes in place of one: later ends would be those of other tokens."""
    other = OtherTokenizer(BPE, PIECES)
    made = other.read(ids(BPE, "c", "ÿ", "t", "h", "e", "c", "a"))
    assert PIECES.convert_ids_to_tokens(made.ids)[:4] == ["▁c", "<0xEF>", "<0xBF>", "<0xBD>"]
    assert made.after_T == [1, -1, -1, -1, -1, -1, -1]


def test_a_text_that_ends_inside_a_character_is_read_up_to_it():
    other = OtherTokenizer(BPE, PIECES)
    text = BPE("caé").input_ids
    made = other.read(text[:-1])
    assert (PIECES.convert_ids_to_tokens(made.ids), made.complete) == (["▁", "ca"], False)
    whole = other.read(text)
    assert (PIECES.convert_ids_to_tokens(whole.ids), whole.complete) == (["▁", "ca", "é"], True)
    # Its first byte ends inside the character, which is one token there.
    assert whole.after_T == [2, -1, 3]


def test_special_tokens_are_read_as_the_drafters_and_unknown_ones_as_text():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    user, end = ids(tokenizer, "<|user|>", END)
    other = OtherTokenizer(tokenizer, PIECES)
    made = other.read([user, *tokenizer("t").input_ids, end])
    assert PIECES.decode(made.ids, skip_special_tokens=False) == "<|user|>t</s>"
    assert made.ids[-1] == PIECES.eos_token_id
    # Where both have it, it is one token.
    same = OtherTokenizer(tokenizer, tokenizer).read([user, end])
    assert (same.ids, same.after_T) == ([user, end], [1, 2])


def test_an_empty_text_starts_with_the_end_of_text():
    made = OtherTokenizer(BPE, PIECES).read([])
    assert made.ids == [PIECES.eos_token_id]


LONG = "the cat ate the heat, a cat and the  tea\nthe cat he ate ca the é the cat the 12 the cat ca"


def grown(other: OtherTokenizer, tokens: list[int]) -> list[Reading]:
    """Return the readings of a text that grows by one, two, three tokens ... in turns."""
    found, known, end = [], None, 1
    while end <= len(tokens):
        known = other.read(tokens[:end], known)
        found.append(known)
        end += 1 + len(found) % 3
    return found


@pytest.mark.parametrize(("target", "own"), [(BPE, PIECES), (PIECES, BPE), (BPE, byte_level(["c a", "Ġ ca", "h e"]))])
def test_a_text_that_grows_is_read_as_from_its_beginning(target, own, monkeypatch):
    other = OtherTokenizer(target, own)
    tokens = [*target(LONG).input_ids, target.eos_token_id, *target(LONG).input_ids]
    found = grown(other, tokens)
    wanted = [other.read(tokens[: len(one.after_T)]) for one in found]
    assert found == wanted
    # No more than some words are encoded again.
    encoded: list[str] = []
    monkeypatch.setattr(type(other._own), "encode", lambda self, text: encoded.append(text) or ENCODE(self, text))
    grown(other, tokens)
    assert max(map(len, encoded)) < len(LONG) / 2


def test_control_a_text_that_grows_from_any_token(monkeypatch):
    monkeypatch.setattr(other_tokenizer, "_begins_word", lambda text, place: 0 < place < len(text))
    other = OtherTokenizer(BPE, PIECES)
    tokens = BPE(LONG).input_ids
    assert any(one.ids != other.read(tokens[: len(one.after_T)]).ids for one in grown(other, tokens))


def test_a_tokenizer_with_tokens_of_two_words_has_no_joints():
    own = byte_level(["Ġ c", "e Ġc"])
    assert OtherTokenizer(BPE, own).read(BPE("the cat").input_ids).joint is None
    assert OtherTokenizer(BPE, PIECES).read(BPE("the cat").input_ids).joint == Joint(2, 1, begins=False)


def test_tokenizers_that_share_too_few_tokens_are_refused():
    many, few = sentence_pieces([chr(0x4E00 + number) for number in range(400)] + ["t", "h"]), letters(["t", "h"])
    with pytest.raises(
        CheckpointError, match=r"the drafter: its tokenizer has 3 of the target's 659 tokens, fewer than 1%"
    ):
        OtherTokenizer(many, few).check()
    OtherTokenizer(BPE, few).check()


def test_a_tokenizer_whose_tokens_spell_an_unknown_text_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(CheckpointError, match="the drafter: its tokenizer's decoder has the steps WordPiece"):
        OtherTokenizer(BPE, words)
