"""RAPID: what its drafter reads, that its output is the target's, and its lossy mixed target in closed form.

V = vocabulary
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from drafttrain.config.load import load_recipe, load_sections
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.proposals import Context, Exactness, Proposal
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.acceptance.mixed_target import MixedTarget, MixedTargetSettings
from drafttrain.eval.evaluate import choose_draft
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.eval.proposers import Surroundings, make
from drafttrain.eval.proposers.rapid import Rapid, RapidSettings, shortened
from drafttrain.eval.retrieval.bm25 import Bm25, Bm25Settings
from drafttrain.eval.retrieval.embeddings import Embeddings, EmbeddingsSettings
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer
from tests.eval.decoding import chi_square, decode, greedy, noisy, small_target
from tests.eval.test_verification import EXACT, case, distance, emitted_distribution

SHORT = RapidSettings(context_tokens=7, chunk_tokens=2, query_tokens=2, first_tokens=1)
CHAIN, TREE = FixedLength(FixedLengthSettings(3)), TreeLength(TreeSettings(num_draft_tokens=9, depth=3, width=3))
PROMPTS = [Prompt(str(i), [1 + i % 7, 2, 6, 4, 4, 1, 7, 3 + i % 5, 5, 2, 1, 1 + i % 6, 6]) for i in range(4)]


@pytest.fixture(scope="module")
def target() -> Target:
    return small_target()


def rapid(target: Target, settings: RapidSettings = SHORT, *, noise: float = 0.15, **more: Any) -> Any:
    return make(settings, Surroundings(target, CausalLMDrafter(noisy(target.model, noise)), **more))


# ---------------------------------------------------------------- what the drafter reads


class Known:
    """Scores that are given."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.given = list(scores)

    def scores(self, chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[float]:
        self.asked = [list(chunk) for chunk in chunks], list(query)
        return self.given


def test_the_best_chunks_are_read_in_the_order_of_the_text_between_its_start_and_its_end():
    text = list(range(10))
    known = Known([1.0, 3.0, -math.inf, 2.0])
    assert shortened(text, SHORT, known) == [0, 3, 4, 7, 8, 9]
    assert known.asked == ([[1, 2], [3, 4], [5, 6], [7]], [8, 9])
    assert shortened(text, replace(SHORT, context_tokens=5), known) == [0, 3, 4, 8, 9]
    assert shortened(text, SHORT, Known([-math.inf] * 4)) == [0, 8, 9], (
        "what has nothing to do with the query is left out"
    )
    assert shortened(text, SHORT, Known([1.0] * 4)) == [0, 1, 2, 3, 4, 8, 9], "of equal ones the first"
    assert shortened(text[:7], SHORT, Known([])) == text[:7], "a short prompt is read whole"


def by_hand(chunks: Sequence[Sequence[int]], query: Sequence[int], *, k1: float, b: float) -> list[float]:
    """Return BM25 as Lucene computes it."""
    mean = sum(map(len, chunks)) / len(chunks)
    scores = []
    for chunk in chunks:
        score = 0.0
        for token in query:
            holding = sum(token in one for one in chunks)
            rarity = math.log(1 + (len(chunks) - holding + 0.5) / (holding + 0.5))
            times = list(chunk).count(token)
            score += rarity * times / (times + k1 * (1 - b + b * len(chunk) / mean))
        scores.append(score)
    return scores


def test_bm25_is_that_of_the_formula_and_leaves_out_chunks_that_share_nothing(target):
    chunks, query = [[1, 2, 3, 1], [4, 5], [1, 1, 9], [7, 7, 7]], [1, 5, 5, 3]
    for k1, b in ((1.5, 0.75), (0.9, 0.4)):
        found = Bm25(Bm25Settings(k1, b), target).scores(chunks, query)
        wanted = by_hand(chunks, query, k1=k1, b=b)
        assert found[:3] == pytest.approx(wanted[:3], rel=1e-5)
        assert (found[3], wanted[3]) == (-math.inf, 0.0)
    assert Bm25(Bm25Settings(), target).scores(chunks, [99]) == [-math.inf] * 4
    control = by_hand(chunks, query, k1=1.5, b=0.0)
    assert Bm25(Bm25Settings(), target).scores(chunks, query)[:3] != pytest.approx(control[:3], rel=1e-2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=257, initializer_range=0.5, **sizes)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    return folder


def test_embeddings_pick_the_text_of_the_query_and_leave_out_what_is_far_from_it(encoder, target):
    ids = [target.tokenizer(text).input_ids for text in ("who wrote it", "a house", "it is mine, who")]
    near = Embeddings(EmbeddingsSettings(str(encoder), min_similarity=-1), target)
    cosines = near.scores(ids, ids[0])
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert max(cosines[1:]) < 0.999
    alone = [float(near.embedded([text])[0] @ near.embedded(["who wrote it"])[0]) for text in ("a house",)]
    assert cosines[1] == pytest.approx(alone[0], abs=1e-5), "texts of other lengths in the call change nothing"
    least = (cosines[1] + cosines[2]) / 2
    some = Embeddings(EmbeddingsSettings(str(encoder), min_similarity=least), target).scores(ids, ids[0])
    assert [one > -math.inf for one in some] == [one >= least for one in cosines] != [True] * 3
    (encoder / "1_Pooling").mkdir()
    (encoder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}', encoding="utf-8")
    first = Embeddings(EmbeddingsSettings(str(encoder), min_similarity=-1), target).scores(ids, ids[0])
    assert first[0] == pytest.approx(1, abs=1e-5)
    assert first[1] != pytest.approx(cosines[1], abs=1e-4)


def test_a_folder_that_is_no_encoder_is_refused_in_a_sentence(encoder, target, tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Embeddings(EmbeddingsSettings(str(tmp_path)), target)
    for path in encoder.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(CheckpointError, match="retriever embeddings: model: "):
        Embeddings(EmbeddingsSettings(str(tmp_path)), target)


def test_without_the_library_the_message_says_what_to_install(target, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(CheckpointError, match=r"pip install 'drafttrain\[retrieval\]'"):
        rapid(target)


# ---------------------------------------------------------------- lossless, on another context


class Watched(Rapid):
    """Compares the drafts of every round with those of a fresh drafter after the shorter text."""

    compared = equal = 0
    whole = False

    def propose(self, budgets: Any, *arguments: Any) -> list[Proposal]:
        found = super().propose(budgets, *arguments)
        for own, context, budget, one in zip(self._own, self._contexts, budgets, found, strict=True):
            text = context.tokens if self.whole else self._wanted(context)
            assert self.whole or own.tokens == text
            fresh = self._drafter.proposer(self._target)
            fresh.begin([Context("", list(text), len(text))], [])
            (wanted,) = fresh.propose([budget], Sampling(), [torch.Generator()], lambda step: True)
            self.compared += 1
            self.equal += one.tokens_N.tolist() == wanted.tokens_N.tolist()
        return found

    def _wanted(self, context: Context) -> list[int]:
        prompt, rest = context.tokens[: context.num_prompt_tokens], context.tokens[context.num_prompt_tokens :]
        return [*shortened(prompt, self.settings, self._retriever), *rest]


class WatchedOnTheWholeText(Watched):
    """Control."""

    whole = True


@pytest.mark.parametrize(("kind", "policy"), [(Watched, CHAIN), (Watched, TREE), (WatchedOnTheWholeText, TREE)])
def test_greedy_output_is_the_targets_and_the_cache_that_of_a_fresh_prefill(kind, policy, target):
    drafter = CausalLMDrafter(noisy(target.model, 0.15))
    proposer = kind(drafter.proposer(target), Bm25(Bm25Settings(), target), SHORT)
    proposer._drafter, proposer._target = drafter, target
    found = decode(target, proposer, prompts=PROMPTS, policy=policy, new=16, stop_tokens=())
    assert [one.tokens for one in found] == [greedy(target, prompt, 16) for prompt in PROMPTS]
    assert any(part.num_accepted for one in found for part in one.rounds)
    assert proposer.compared > 12
    assert (proposer.equal == proposer.compared) is not proposer.whole


def test_the_targets_own_weights_draft_after_the_shorter_text(target):
    settings = replace(SHORT, model="target")
    assert not settings.reads_drafter
    ledger = Ledger()
    proposer = make(settings, Surroundings(target, None, ledger.append))
    found = decode(target, proposer, prompts=PROMPTS[:1], policy=CHAIN, new=16, stop_tokens=(), listener=ledger.append)
    assert [one.tokens for one in found] == [greedy(target, PROMPTS[0], 16)]
    whole = make(replace(settings, context_tokens=99), Surroundings(target))
    (sure,) = decode(target, whole, prompts=PROMPTS[:1], policy=CHAIN, new=16, stop_tokens=())
    assert len(sure.rounds) == 4, "after the same text it is never wrong"
    assert len(found[0].rounds) > 4
    # The ledger: the drafter reads the shorter prompt, then as many calls as it drafts tokens.
    prefills = {event.model: event.shape.num_tokens for event in ledger.events if event.prefill}
    read = shortened(PROMPTS[0].tokens, settings, Bm25(Bm25Settings(), target))
    assert prefills == {"target": 12, "drafter": len(read) - 1}
    assert len(read) < 8
    assert ledger.calls("drafter") == sum(one.num_draft_tokens for one in found[0].rounds)
    assert ledger.calls("target") == len(found[0].rounds)


ONE_TOKEN = RapidSettings(context_tokens=2, chunk_tokens=1, query_tokens=1, first_tokens=0)


class ClaimsTheWholeText(Rapid):
    """Control: its q is that of a drafter that read the whole text."""

    def propose(self, *arguments: Any) -> list[Proposal]:
        found = super().propose(*arguments)
        return [
            replace(one, q_rows_RV=self._rows(one, context)) for one, context in zip(found, self._contexts, strict=True)
        ]

    def _rows(self, one: Proposal, context: Context) -> Tensor | None:
        if not one.num_draft_tokens:
            return one.q_rows_RV
        text = torch.tensor([[*context.tokens[:-1], *one.tokens_N.tolist()]])
        with torch.no_grad():
            return self._model(text).logits[0, -one.num_draft_tokens - 1 : -1].softmax(-1)


def p_value(kind: type[Rapid], *, samples: int) -> float:
    target = small_target()
    model = noisy(target.model, 0.15)
    proposer = kind(CausalLMDrafter(model).proposer(target), Bm25(Bm25Settings(), target), ONE_TOKEN)
    proposer._model = model
    return chi_square(target.model, proposer, 1.0, samples=samples)


def test_sampled_output_has_the_targets_distribution():
    assert p_value(Rapid, samples=600) > 1e-3


@pytest.mark.slow
def test_control_rows_of_q_of_another_text():
    assert p_value(ClaimsTheWholeText, samples=2000) < 1e-3


# ---------------------------------------------------------------- the mixed target


def moved_by_hand(p: Tensor, q: Tensor, *, margin: float, floor: float) -> list[float]:
    masses = []
    for own, other in zip(p.tolist(), q.tolist(), strict=True):
        step = own - other if other >= floor * float(q.max()) else 0.0
        masses.append(own * math.exp(-margin * step))
    return [mass / sum(masses) for mass in masses]


def emitted_by_hand(p: Tensor, q: Tensor, moved: Sequence[float]) -> list[float]:
    """Return the distribution of the token at a drafted position: accepted, or drawn after a rejection."""
    accepted = [min(own, other) for own, other in zip(q.tolist(), moved, strict=True)]
    excess = [max(own - other, own - new, 0.0) for own, other, new in zip(p.tolist(), q.tolist(), moved, strict=True)]
    left = 1 - sum(accepted)
    total = sum(excess)
    return [
        one + left * (more / total if total else own)
        for one, more, own in zip(accepted, excess, p.tolist(), strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_output_of_the_mixed_target_is_that_of_the_closed_form_and_at_margin_0_the_targets(seed):
    p, q = case(5, 1, seed)
    for margin, floor in ((10.0, 0.1), (3.0, 0.5), (0.0, 0.1)):
        rule = MixedTarget(MixedTargetSettings(margin, floor))
        moved = moved_by_hand(p[0], q[0], margin=margin, floor=floor)
        assert rule.moved(p[0], q[0]).tolist() == pytest.approx(moved, abs=1e-12)
        found = emitted_distribution(p, q, depth=1, moved=rule.moved)
        first = [sum(chance for path, chance in found.items() if path[0] == token) for token in range(5)]
        assert first == pytest.approx(emitted_by_hand(p[0], q[0], moved), abs=1e-12)
        lossless = margin == 0 or seed == 4  # p = q there
        assert (distance(found, p) < EXACT) is lossless, "LOSSY above margin 0"


@pytest.mark.parametrize("seed", range(4))
def test_at_margin_0_two_draft_tokens_have_the_targets_distribution(seed):
    p, q = case(3, 2, seed)
    assert distance(emitted_distribution(p, q, depth=2, moved=MixedTarget(MixedTargetSettings(0.0)).moved), p) < EXACT
    control = MixedTarget(MixedTargetSettings(0.5)).moved
    assert distance(emitted_distribution(p, q, depth=2, moved=control), p) > 1e-3


def test_at_margin_0_the_sampled_text_is_that_of_the_lossless_rule_and_a_margin_accepts_more(target):
    def sampled(**options: Any) -> tuple[list[Any], float]:
        found = decode(target, rapid(target), prompts=PROMPTS, policy=CHAIN, temperature=1.0, new=40, **options)
        return [one.tokens for one in found], sum(part.num_accepted for one in found for part in one.rounds)

    lossless, accepted = sampled()
    assert sampled(rule=MixedTarget(MixedTargetSettings(margin=0))) == (lossless, accepted)
    text, more = sampled(rule=MixedTarget())
    assert text != lossless
    assert more > accepted
    assert MixedTarget.exactness is Exactness.LOSSY


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["eval.beside=[{kind: rapid, context_tokens: 500}]"], "context_tokens: 500 has no room for a chunk"),
        (["eval.beside=[{kind: rapid, retriever: {kind: bm52}}]"], "unknown retriever 'bm52'. Did you mean 'bm25'?"),
        (["eval.beside=[{kind: rapid, retriever: {kind: embeddings}}]"], "model: the encoder's folder"),
        (["eval.rule={kind: mixed_target}"], "leave 0 out of temperatures"),
        (["eval.rule={kind: mixed_target}", "eval.temperatures=[1]", "eval.also=[{kind: tree}]"], "is a tree"),
        (
            ["eval.rule={kind: mixed_target}", "eval.temperatures=[1]", "eval.across_tokenizers=strings"],
            "set across_tokenizers: tokens",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(overrides, problem):
    with pytest.raises(RecipeError) as error:
        load_sections(["eval"], overrides)
    assert problem in str(error.value)
    load_sections(["eval"], ["eval.rule={kind: mixed_target}", "eval.temperatures=[1]", "eval.beside=[{kind: rapid}]"])


def test_a_drafter_that_reads_the_targets_states_or_draws_nothing_is_refused(target):
    with pytest.raises(RecipeError, match=r"eval\.beside: rapid reads text with the drafter's own language model"):
        load_recipe("tiny_eagle", ["eval.beside=[{kind: rapid}]"])
    load_recipe("tiny_eagle", ["eval.beside=[{kind: rapid, model: target}]"])
    with pytest.raises(RecipeError, match=r"eval\.rule: mixed_target .* drafter\.draft greedy draws none"):
        load_recipe("demo", ["eval.rule={kind: mixed_target}", "eval.temperatures=[1]", "drafter.draft=greedy"])
    settings = EvalSettings(rule=MixedTargetSettings(), temperatures=[1.0])
    assert choose_draft(CausalLMDrafter(target.model), settings)
    with pytest.raises(CheckpointError, match="this drafter's draft: greedy draws none"):
        choose_draft(CausalLMDrafter(target.model, draft="greedy"), settings)
    entry = drafters.entry("eagle")
    drafter = entry.component.create(entry.settings(), target=target, tokenizer=target.tokenizer)
    with pytest.raises(CheckpointError, match=r"rapid: needs a drafter with a language model .* eagle has none"):
        make(RapidSettings(), Surroundings(target, drafter))
