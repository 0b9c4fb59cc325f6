"""Cascades: at their ends they are one model token for token; caches, costs, routers and judges in exact cases.

V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.probability import draw
from drafttrain.core.proposals import Context
from drafttrain.core.random import stream
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.acceptance.rollback import Rollback
from drafttrain.eval.cascade import cascades
from drafttrain.eval.cascade.boundary import SENTENCE, Marks
from drafttrain.eval.cascade.engine import CascadeEngine, entropy_bits
from drafttrain.eval.cascade.frontier import decoder_of
from drafttrain.eval.cascade.judges.digit import Digit, DigitSettings
from drafttrain.eval.cascade.judges.likelihood import Likelihood, LikelihoodSettings
from drafttrain.eval.cascade.kinds.bild import BildSettings
from drafttrain.eval.cascade.kinds.entropy import Entropy, EntropySettings
from drafttrain.eval.cascade.kinds.foreal import Foreal, ForealSettings
from drafttrain.eval.cascade.kinds.random import RandomSettings
from drafttrain.eval.cascade.kinds.spec_reason import SpecReasonSettings
from drafttrain.eval.cascade.router import Pair, Router
from drafttrain.eval.cascade.spans import CascadeGeneration, Span, Unit, Writer, Written
from drafttrain.eval.cascade.text_reader import TextReader
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, V, chi_square, decode, greedy, noisy, small_target

NEW = 24
FIXED = FixedLengthSettings(3)
MARKS = [chr(code) for code in range(ord("a"), ord("z"))]
"""Random bytes seldom end a sentence; these marks end one every few tokens."""

TO_LARGE: dict[str, Any] = {
    "random": RandomSettings(1.0, 3),
    "entropy": EntropySettings(0.0),
    "foreal": ForealSettings(1.0, None, MARKS),
    "spec_reason": SpecReasonSettings(9.1, LikelihoodSettings(), MARKS, 6),
    "spec_reason, digit": SpecReasonSettings(9.1, marks=MARKS, step_tokens=6),
    "bild": BildSettings(1.01, None),
}
TO_SMALL: dict[str, Any] = {
    "random": RandomSettings(0.0, 3),
    "entropy": EntropySettings(None),
    "foreal": ForealSettings(0.0, 5, MARKS),
    "spec_reason": SpecReasonSettings(0.0, LikelihoodSettings(), MARKS, 6),
    "spec_reason, digit": SpecReasonSettings(0.0, marks=MARKS, step_tokens=6),
}
BETWEEN: dict[str, Any] = {
    "random": RandomSettings(0.5, 3),
    "entropy": EntropySettings(7.0, window=2, dwell=2),
    "foreal": ForealSettings(0.5, 2, MARKS),
    "spec_reason": SpecReasonSettings(0.25, LikelihoodSettings(), MARKS, 6),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")


@pytest.fixture(scope="module")
def small() -> Any:
    return random_llama(seed=4, num_layers=1).double()


def pair_of(target: Target, small: Any, temperature: float = 0.0, **options: Any) -> Pair:
    return Pair(target, small, Sampling(temperature), NEW, **{"stop_tokens": ()} | options)


def written(settings: Any, pair: Pair, prompts: Sequence[Prompt] = PROMPTS) -> list[CascadeGeneration]:
    decoder = decoder_of(settings, pair)
    return [decoder.generate(prompt) for prompt in prompts]


def texts(settings: Any, pair: Pair, prompts: Sequence[Prompt] = PROMPTS) -> list[list[int]]:
    return [list(one.tokens) for one in written(settings, pair, prompts)]


def test_every_kind_is_tried():
    assert set(cascades.names()) == {settings.kind for settings in TO_LARGE.values()}


# ---------------------------------------------------------------- the ends


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", TO_LARGE)
def test_at_one_end_it_is_plain_decoding_of_the_large_model(target, small, name, temperature):
    plain = decode(target, NoDraft(), new=NEW, temperature=temperature, stop_tokens=())
    found = written(TO_LARGE[name], pair_of(target, small, temperature))
    assert [list(one.tokens) for one in found] == [list(one.tokens) for one in plain]
    assert all(one.num_by_large == NEW and one.num_switches == 0 for one in found)


@pytest.mark.parametrize("name", TO_SMALL)
def test_at_the_other_end_it_is_the_small_model(target, small, name):
    alone = Target(small, byte_tokenizer(), name="small", fingerprint="")
    found = written(TO_SMALL[name], pair_of(target, small))
    assert [list(one.tokens) for one in found] == [greedy(alone, prompt, NEW) for prompt in PROMPTS]
    assert all(one.num_by_large == 0 for one in found)


@pytest.mark.parametrize("name", ["random", "spec_reason"])
def test_sampled_texts_of_the_small_model_are_its_own_draws(target, small, name):
    """The stream of drafts draws them, so that a step that is written again does not repeat the random numbers of the first."""
    by_hand = []
    for prompt in PROMPTS[:2]:
        text, generator = list(prompt.tokens), stream(0, "draft", prompt.id)
        for _ in range(NEW):
            with torch.no_grad():
                text.append(draw(small(torch.tensor([text])).logits[0, -1].softmax(-1), generator))
        by_hand.append(text[len(prompt.tokens) :])
    assert texts(TO_SMALL[name], pair_of(target, small, 1.0), PROMPTS[:2]) == by_hand


@pytest.mark.parametrize("name", BETWEEN)
def test_between_the_ends_both_write(target, small, name):
    pair = pair_of(target, noisy(target.model, 0.02) if name == "spec_reason" else small)
    found = written(BETWEEN[name], pair)
    assert 0 < sum(one.num_by_large for one in found) < len(PROMPTS) * NEW
    assert all(len(one.tokens) == NEW for one in found)
    ends = [texts(of[name], pair) for of in (TO_LARGE, TO_SMALL)]
    assert [list(one.tokens) for one in found] not in ends


def test_a_text_ends_at_a_stop_token(target, small):
    own = texts(BETWEEN["random"], pair_of(target, small))[0]
    stop = own[NEW // 2]
    (ended,) = texts(BETWEEN["random"], pair_of(target, small, stop_tokens=(stop,)), PROMPTS[:1])
    assert ended == own[: own.index(stop) + 1]


# ---------------------------------------------------------------- what each token follows


def by_hand(target: Target, small: Any, prompt: Prompt, writers: Sequence[Writer]) -> list[int]:
    """Write greedily without caches, each token by this model."""
    text = list(prompt.tokens)
    for writer in writers:
        model = target.model if writer is Writer.LARGE else small
        with torch.no_grad():
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt.tokens) :]


class Given(Router):
    """Writers that are known."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = writers

    def begin(self, generator: torch.Generator) -> None:
        self._left = list(self.writers)

    def next(self) -> Span:
        return Span(self._left.pop(0), Unit(1))


TURNS = [Writer.LARGE if place // 5 % 2 else Writer.SMALL for place in range(NEW)]


def test_each_token_follows_the_whole_text_and_a_switch_reads_what_the_other_wrote(target, small):
    engine = CascadeEngine(pair_of(target, small), Given(TURNS))
    for prompt in PROMPTS:
        found = engine.generate(prompt)
        assert list(found.tokens) == by_hand(target, small, prompt, TURNS)
        assert found.num_switches == 4
        assert found.num_by_large == TURNS.count(Writer.LARGE)
        read = {
            model: [e.shape.num_tokens for e in found.forwards if e.model == model] for model in ("target", "drafter")
        }
        # The prompt without its last token; one token a call; at a switch those that the other wrote, in the call that writes next.
        assert read["drafter"] == [len(prompt.tokens) - 1, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1, 6, 1, 1, 1]
        assert read["target"] == [len(prompt.tokens) - 1, 6, 1, 1, 1, 1, 6, 1, 1, 1, 1]


def test_control_a_cache_without_the_others_tokens_is_noticed(target, small, monkeypatch):
    """A reader that takes the other's tokens for read gives another text."""
    honest = TextReader._unread

    def skips(self: TextReader, *, keep: int) -> list[int]:
        return honest(self, keep=keep)[-1:]

    monkeypatch.setattr(TextReader, "_unread", skips)
    found = CascadeEngine(pair_of(target, small), Given(TURNS)).generate(PROMPTS[1])
    assert list(found.tokens) != by_hand(target, small, PROMPTS[1], TURNS)


# ---------------------------------------------------------------- routers


def test_entropy_switches_by_the_rolling_mean_and_after_the_dwell_time():
    router = Entropy(EntropySettings(2.0, window=2, dwell=3))
    router.begin(torch.Generator())
    entropies = [0, 0, 0, 1, 1, 4, 5, 0, 0, 0]
    writers = []
    for entropy in entropies:
        span = router.next()
        writers.append(span.writer)
        router.observe(Written(span.writer, 0, [1], False, [entropy]))
    # Unknown at first: the large model. After 3 tokens the mean is 0; the mean of (1, 4) is at least 2; then it stays for 3.
    large, small = Writer.LARGE, Writer.SMALL
    assert writers == [large] * 3 + [small] * 3 + [large] * 3 + [small]


def test_the_entropy_is_that_of_the_row_in_bits_whatever_the_sampling(target):
    for sampling in (Sampling(), Sampling(0.5)):
        reader = TextReader(CachedLM(target.model, name="target"), sampling, num_tokens=V)
        reader.begin(Context("a", [5, 6, 7], 3))
        with torch.no_grad():
            p_V = target.model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
        assert entropy_bits(reader.next()) == pytest.approx(float(-(p_V * p_V.log2()).sum()))


def test_foreal_leads_sentences_with_their_first_tokens():
    router = Foreal(ForealSettings(1.0, 2, ["."]))
    router.begin(torch.Generator())
    spans = []
    for complete in (False, True, True, False, False, True):
        spans.append((router.next().writer, router.next().unit.tokens))
        router.observe(Written(spans[-1][0], 0, [1], complete))
    lead, rest = (Writer.LARGE, 2), (Writer.SMALL, None)
    assert spans == [lead, rest, lead, lead, rest, rest]


def test_a_mark_that_the_small_model_completes_ends_the_sentence_that_was_led(target, small):
    """Against a slow loop that decodes the whole sentence after every token."""
    lead, large, tokenizer = 2, Writer.LARGE, byte_tokenizer()

    def plain(prompt: Prompt, mark: str) -> list[int]:
        text, sentence = list(prompt.tokens), list[int]()
        for _ in range(NEW):
            model = target.model if len(sentence) < lead else small
            with torch.no_grad():
                sentence.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
            text.append(sentence[-1])
            if mark in tokenizer.decode(sentence, skip_special_tokens=True):
                sentence = []
        return text[len(prompt.tokens) :]

    num_led_again = 0
    for prompt in PROMPTS:
        # The last token of the lead and the small model's first one.
        mark = tokenizer.decode(by_hand(target, small, prompt, [large, large, Writer.SMALL])[1:])
        if len(mark) != 2:
            continue
        (found,) = written(ForealSettings(1.0, lead, [mark]), pair_of(target, small), [prompt])
        assert list(found.tokens) == plain(prompt, mark)
        num_led_again += found.num_by_large > lead
    assert num_led_again


def test_foreal_leads_with_probability_rho():
    router = Foreal(ForealSettings(0.3, 2, ["."]))
    router.begin(torch.Generator().manual_seed(0))
    led = 0
    for _ in range(2000):
        led += router.next().writer is Writer.LARGE
        router.observe(Written(Writer.SMALL, 0, [1], True))
    assert led / 2000 == pytest.approx(0.3, abs=0.05)


def test_a_mark_ends_a_unit_at_the_token_that_completes_it():
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab\n\nc. d", add_special_tokens=False)["input_ids"]
    step, sentence = Marks(tokenizer, ["\n\n"]), Marks(tokenizer, SENTENCE)
    assert [step.completed_by_last(ids[:end]) for end in range(1, len(ids) + 1)] == [False] * 3 + [True] + [False] * 4
    ends = [sentence.completed_by_last(ids[:end]) for end in range(1, len(ids) + 1)]
    assert ends == [False, False, True, True, False, True, False, False]
    assert not Marks(tokenizer, []).completed_by_last(ids)


# ---------------------------------------------------------------- SpecReason


def reader_after(target: Target, tokens: Sequence[int]) -> TextReader:
    reader = TextReader(CachedLM(target.model, name="target"), Sampling(), num_tokens=V)
    reader.begin(Context("a", list(tokens), 3))
    return reader


def test_a_score_leaves_no_trace_in_the_cache(target):
    """The cache afterwards is that of a call that read the text alone, and a second score does not change a bit of it."""
    text = list(range(5, 17))
    asked, plain = reader_after(target, text), reader_after(target, text)
    for reader in (asked, plain):
        reader.catch_up()
        reader._text.tokens += [40, 41]
    digit = Digit(DigitSettings(), byte_tokenizer())
    score = digit.score(Written(Writer.SMALL, 12, [40, 41], False), asked)
    assert 0 <= score <= 9
    plain.after([])
    assert asked.lm.lengths == asked.lm.kept == plain.lm.kept == [14]
    for one, other in zip(asked.lm.cache.hf.layers, plain.lm.cache.hf.layers, strict=True):
        assert one.keys.shape == other.keys.shape
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-12)
    before = [layer.keys.clone() for layer in asked.lm.cache.hf.layers]
    digit.score(Written(Writer.SMALL, 12, [40, 41], False), asked)
    assert all(torch.equal(one, layer.keys) for one, layer in zip(before, asked.lm.cache.hf.layers, strict=True))
    with torch.no_grad():
        own_V = target.model(torch.tensor([[*text, 40, 41]])).logits[0, -1]
    torch.testing.assert_close(asked.next().log_probs_at_one()[0], own_V.log_softmax(-1))


def test_control_a_kept_question_is_noticed(target, monkeypatch):
    digit, reader = Digit(DigitSettings(), byte_tokenizer()), reader_after(target, range(5, 17))
    monkeypatch.setattr(reader.lm, "keep", lambda nodes: reader.lm.cache.commit())
    digit.score(Written(Writer.SMALL, 10, [15, 16], False), reader)
    assert reader.lm.kept == [12 + len(digit.question)]


def test_the_digit_is_the_models_own(target):
    text = list(range(5, 17))
    digit = Digit(DigitSettings(), byte_tokenizer())
    with torch.no_grad():
        row_V = target.model(torch.tensor([[*text, *digit.question]])).logits[0, -1]
    chances_10 = row_V[list(digit.digits)].softmax(-1)
    span = Written(Writer.SMALL, 10, text[10:], False)
    assert digit.score(span, reader_after(target, text)) == float(chances_10.argmax())
    expected = Digit(DigitSettings(by="expected"), byte_tokenizer()).score(span, reader_after(target, text))
    assert expected == pytest.approx(float((chances_10 * torch.arange(10)).sum()))
    assert byte_tokenizer().decode(digit.digits) == "0123456789"


def test_a_tokenizer_without_digits_behind_the_question_is_refused():
    class OneToken:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    with pytest.raises(DataError, match=r"judge\.question: .* no digit as one token"):
        _ = Digit(DigitSettings(), OneToken()).digits


def test_the_likelihood_is_that_of_the_steps_tokens(target):
    text = list(range(5, 17))
    with torch.no_grad():
        log_p_NV = target.model(torch.tensor([text])).logits[0].log_softmax(-1)
    own_N = log_p_NV[9:11].gather(1, torch.tensor(text[10:])[:, None])[:, 0]
    span = Written(Writer.SMALL, 10, text[10:], False)
    for of, wanted in (("mean", own_N.mean()), ("least", own_N.min())):
        for read in (False, True):
            reader = reader_after(target, text)
            if read:
                reader.catch_up()
            score = Likelihood(LikelihoodSettings(of), None).score(span, reader)  # type: ignore[arg-type]
            assert score == pytest.approx(9 * float(wanted.exp()))


def test_a_step_that_is_taken_back_is_not_in_the_text_of_either_model(target, small):
    """With the scores known, every token is that of its writer after the text as it stands."""
    scores = [9.0, 0.0, 0.0, 9.0, 0.0, 9.0]

    class Scored(Router):
        def begin(self, generator: torch.Generator) -> None:
            self._left = list(scores)

        def next(self) -> Span:
            return Span(Writer.SMALL, Unit(4))

        def judged(self, written: Written, large: TextReader) -> float:
            large.after([1, 2, 3])
            return self._left.pop(0)

        def stays(self, score: float) -> bool:
            return score > 5

    writers = [Writer.SMALL if score > 5 else Writer.LARGE for score in scores for _ in range(4)]
    for draft in (None, FIXED):
        engine = CascadeEngine(pair_of(target, small, draft=draft), Scored())
        for prompt in PROMPTS:
            found = engine.generate(prompt)
            assert list(found.tokens) == by_hand(target, small, prompt, writers)
            assert list(found.scores) == scores
            assert found.num_taken_back == 12


# ---------------------------------------------------------------- drafts inside


@pytest.mark.parametrize("settings", [RandomSettings(0.5, 8), ForealSettings(0.5, 8, MARKS), BETWEEN["spec_reason"]])
def test_drafts_for_the_large_model_change_no_greedy_token(target, settings):
    near = noisy(target.model, 0.02)
    plain = written(settings, pair_of(target, near))
    drafted = written(settings, pair_of(target, near, draft=FIXED))
    assert [one.tokens for one in drafted] == [one.tokens for one in plain]
    for one, other in zip(drafted, plain, strict=True):
        assert one.scores == pytest.approx(other.scores)

    def calls(found: Sequence[CascadeGeneration]) -> int:
        return sum(event.model == "target" for one in found for event in one.forwards)

    assert calls(drafted) < calls(plain)


@pytest.mark.long
def test_drafted_spans_have_the_large_models_distribution():
    """The large model alone with drafts: the first tokens against the enumerated distribution. With a lossy rule inside it fails."""
    target = small_target()
    near = noisy(target.model, 0.3)
    pair = Pair(target, near, Sampling(1.0), 4, draft=FixedLengthSettings(2), stop_tokens=())

    class AsEngine:
        def __init__(self, rule: Any = None) -> None:
            self.decoder = CascadeEngine(pair, Given([Writer.LARGE] * 4))
            if rule is not None:
                self.decoder._drafted.engine.rule = rule

        def generate(self, prompts: Sequence[Prompt]) -> list[CascadeGeneration]:
            return [self.decoder.generate(prompt) for prompt in prompts]

    def p_value(rule: Any = None) -> float:
        return chi_square(target.model, NoDraft(), 1.0, samples=400, engine=AsEngine(rule))

    assert p_value() > 1e-3
    assert p_value(Rollback()) < 1e-3


def test_what_cannot_be_drafted_is_refused(target, small):
    for settings in (EntropySettings(), BildSettings()):
        with pytest.raises(CheckpointError, match=r"cascade\.draft"):
            decoder_of(settings, pair_of(target, small, draft=FIXED))


def test_an_empty_prompt_is_refused(target, small):
    with pytest.raises(ValueError, match="at least one token"):
        decoder_of(BETWEEN["random"], pair_of(target, small)).generate(Prompt("empty", []))


def test_a_small_model_with_a_padded_vocabulary_writes_no_padding(target):
    padded = random_llama(seed=2, num_layers=1, vocab_size=300).double()
    pair = replace(pair_of(target, padded, 1.0), max_new_tokens=60)
    assert max(token for text in texts(TO_SMALL["random"], pair) for token in text) < V
