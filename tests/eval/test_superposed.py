"""Superposed Decoding: its drafts are those of a plain computation without a cache, and its settings fit the drafter.

V = vocabulary, D = hidden
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.config.load import load_recipe, load_sections
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.proposals import Budget, Context, Proposal, Verdict
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.evaluate import choose_drafts
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.eval.proposers import Surroundings, make
from drafttrain.eval.proposers.ngram_counts import NgramCounts, share_after
from drafttrain.eval.proposers.superposed import Draft, Superposed, SuperposedSettings, Superposition
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import decode, greedy, noisy, small_target

PROMPTS = [Prompt(str(i), [1 + i % 7, 2, 3 + i % 5, *([4, 1 + i % 7, 2] if i % 2 else [])]) for i in range(4)]
TREE = TreeLength(TreeSettings(num_draft_tokens=12, depth=4, width=3))
MILD = SuperposedSettings(temperature=1.0, candidates=5, ngram_weight=0.0)
COUNTED = SuperposedSettings(temperature=1.0, candidates=5, penalty=3.0)


@pytest.fixture(scope="module")
def target() -> Target:
    return small_target()


@pytest.fixture(scope="module")
def model(target: Target) -> Any:
    return noisy(target.model, 0.3)


def share_by_search(text: Sequence[int], context: Sequence[int], token: int) -> float:
    """Return the share of a token after a context, by reading the text."""
    size = len(context)
    after = [text[end] for end in range(size, len(text)) if list(text[end - size : end]) == list(context)]
    return after.count(token) / len(after) if after else 0.0


def score(text: Sequence[int], path: Sequence[int], token: int, log_p: float, settings: SuperposedSettings) -> float:
    """Return what a token adds to a draft's score; -inf: no n-gram of the text continues with it."""
    if not settings.ngram_weight:
        return log_p
    before = [*text, *path]
    shares = [
        share_by_search(text, before[len(before) - size :], token)
        for size in range(1, min(len(before), len(settings.context_weights)) + 1)
    ]
    share = sum(weight * one for weight, one in zip(settings.context_weights, shares, strict=False))
    own = (1 - settings.ngram_weight) * log_p
    return own + settings.ngram_weight * math.log(share) if share else -math.inf


def by_plain_calls(
    model: Any, text: Sequence[int], settings: SuperposedSettings, *, levels: int, uniform: bool = False
) -> list[tuple[int, ...]]:
    """Return the drafts of a text by calls without a cache, best first. No token ends a text."""
    table_VD = model.get_input_embeddings().weight
    read_TD = table_VD[torch.tensor(list(text))]
    found: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for _ in range(levels):
        with torch.no_grad():
            logits_V = model(inputs_embeds=read_TD[None]).logits[0, -1] / settings.temperature
        tokens = logits_V.argsort(descending=True)[: settings.candidates].tolist()
        log_p = torch.log(logits_V.softmax(-1)[tokens] / logits_V.softmax(-1)[tokens].sum()).tolist()
        longer = []
        for before, path in found:
            scores = [score(text, path, token, one, settings) for token, one in zip(tokens, log_p, strict=True)]
            if max(scores) == -math.inf:
                scores = [(1 - settings.ngram_weight) * one - settings.penalty for one in log_p]
            longer += [(before + one, (*path, token)) for token, one in zip(tokens, scores, strict=True)]
        found = sorted(longer, key=lambda one: -one[0])[: settings.drafts]
        found = [one for one in found if one[0] > -math.inf]
        weights = torch.tensor([one for one, _ in found], dtype=torch.float64).exp()
        if uniform:
            weights = torch.ones_like(weights)
        newest_KD = table_VD[[path[-1] for _, path in found]]
        read_TD = torch.cat([read_TD, (weights / weights.sum())[None] @ newest_KD])
    return [path for _, path in found]


def paths_of(one: Proposal) -> set[tuple[int, ...]]:
    """Return the tokens from the root to each leaf."""
    tokens, parents = one.tokens_N.tolist(), one.parents_N.tolist()
    paths: list[tuple[int, ...]] = []
    for node, parent in enumerate(parents):
        paths.append((*paths[parent], tokens[node]) if node else ())
    return {path for node, path in enumerate(paths) if node not in parents}


class Watched(Superposed):
    """Compares the proposals of every round with those of plain calls."""

    compared = equal = 0
    uniform = False

    def propose(self, budgets: Sequence[Budget], *arguments: Any) -> list[Proposal]:
        found = super().propose(budgets, *arguments)
        for context, budget, one in zip(self._contexts, budgets, found, strict=True):
            count = min(self.settings.drafts, budget.width, budget.nodes)
            if not count:
                continue
            levels = min(budget.depth, budget.nodes // count)
            wanted = by_plain_calls(self._plain, context.tokens, self.settings, levels=levels, uniform=self.uniform)
            self.compared += 1
            self.equal += paths_of(one) == {*wanted[:count]}
        return found


class KeepsSuperposed(Watched):
    """Control: of a round with an accepted token the mean stays in the cache, as if it were that token."""

    def observe(self, verdicts: Sequence[Verdict], seen: Any) -> None:
        read = [length - kept for length, kept in zip(self._lm.lengths, self._lm.kept, strict=True)]
        accepted = [verdict.num_accepted for verdict in verdicts]
        pending = zip(self._pending, accepted, read, strict=True)
        self._lm.keep([range(min(own + more, count)) for own, more, count in pending])


def watched(kind: type[Watched], model: Any, target: Target, settings: SuperposedSettings, **options: Any) -> Any:
    proposer = kind(model, settings, num_tokens=8)
    proposer._plain = model
    found = decode(target, proposer, prompts=PROMPTS, policy=TREE, new=14, stop_tokens=(), **options)
    assert [one.tokens for one in found] == [greedy(target, prompt, 14) for prompt in PROMPTS]
    assert any(part.num_accepted for one in found for part in one.rounds)
    return proposer


@pytest.mark.parametrize("settings", [MILD, COUNTED])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_drafts_are_those_of_calls_without_a_cache(settings, attention, model, target):
    """The two attentions are those of the two classes that read a drafter's text."""
    model.set_attn_implementation(attention)
    proposer = watched(Watched, model, target, settings)
    model.set_attn_implementation("sdpa")
    assert proposer.equal == proposer.compared > 10


def test_control_a_mean_in_the_cache_and_equal_weights_draft_something_else(model, target):
    for kind in (KeepsSuperposed, type("Equal", (Watched,), {"uniform": True})):
        proposer = watched(kind, model, target, MILD)
        assert proposer.equal < proposer.compared


def test_one_draft_without_ngrams_is_the_drafters_own_greedy_chain(model, target):
    policy = FixedLength(FixedLengthSettings(4))
    chains = ChainProposer(model, target_vocab_size=8)
    one = Superposed(model, SuperposedSettings(drafts=1, ngram_weight=0), num_tokens=8)
    several = Superposed(model, SuperposedSettings(ngram_weight=0), num_tokens=8)
    rounds = [
        [part for found in decode(target, proposer, prompts=PROMPTS, policy=policy, new=24) for part in found.rounds]
        for proposer in (chains, one, several)
    ]
    assert rounds[0] == rounds[1] == rounds[2], "where siblings are not allowed there is one draft"
    wider = decode(target, several, prompts=PROMPTS, policy=TREE, new=24)
    assert [part for found in wider for part in found.rounds] != rounds[0]


def test_a_round_calls_the_drafter_once_a_level_whatever_the_number_of_drafts(model, target):
    ledger = Ledger()
    proposer = Superposed(model, MILD, num_tokens=8, listener=ledger.append)
    (found,) = decode(target, proposer, prompts=PROMPTS[:1], policy=TREE, new=21, listener=ledger.append)
    for forwards, one in zip(ledger.by_round(), found.rounds, strict=True):
        drafting = [event.shape.num_tokens for event in forwards if event.model == "drafter"]
        assert len(drafting) == one.max_depth
        assert drafting[1:] == [1] * (one.max_depth - 1) or not drafting
    assert max(one.num_draft_tokens for one in found.rounds) > 4, "several drafts"


def test_it_drafts_with_layers_in_parallel_where_the_evaluation_does():
    deep = Target(random_llama(num_layers=6).double(), byte_tokenizer(), name="tiny", fingerprint="")
    drafter, accepted = CausalLMDrafter(deep.model), []
    for size in (1, 4):
        choose_drafts([drafter], EvalSettings(layer_parallel_size=size))
        proposer = make(MILD, Surroundings(deep, drafter))
        found = decode(deep, proposer, prompts=PROMPTS, policy=TREE, new=24, stop_tokens=())
        assert [one.tokens for one in found] == [greedy(deep, prompt, 24) for prompt in PROMPTS]
        accepted.append([part.num_accepted for one in found for part in one.rounds])
        # An ordinary call drafts the first token, with the target's own weights.
        assert all(one.num_accepted >= min(1, one.num_draft_tokens) for text in found for one in text.rounds)
    assert accepted[0] != accepted[1]


def test_scores_and_ends_by_hand():
    counts = NgramCounts(longest=2)
    counts.add([5, 1, 2, 5, 1, 3])
    assert [share_after([counts, counts], (5, 1), token) for token in (2, 3, 4)] == [0.5, 0.5, 0.0]
    assert share_after([counts], (9,), 1) == 0.0
    settings = SuperposedSettings(
        drafts=2, candidates=3, temperature=1.0, ngram_weight=0.5, context_weights=[0.2, 0.4], penalty=7.0
    )
    probs_V = torch.tensor([0.1, 0.0, 0.3, 0.0, 0.6]).clamp_min(1e-9)
    one = Superposition([5, 1], [counts], settings, count=2, levels=3, ends=[3])
    one.extend(probs_V.log())
    # After 5 1 came 2 and 3, each in half of the cases; 4 and 0 never: they are no continuation.
    assert [draft.tokens for draft in one.alive] == [(2,)]
    assert one.alive[0].score == pytest.approx(0.5 * math.log(0.3) + 0.5 * math.log(0.2 * 0.5 + 0.4 * 0.5))
    assert one.newest[1].tolist() == [1.0]
    one.alive = [Draft((4,), -1.0), Draft((2,), -2.0)]
    one.extend(probs_V.log())
    # No n-gram goes on after 4; after 2 only 5 did, which is not among the candidates.
    assert [draft.tokens for draft in one.alive] == [(4, 4), (4, 2)]
    assert one.alive[0].score == pytest.approx(-1.0 + 0.5 * math.log(0.6) - 7.0)
    plain = Superposition([5, 1], [], settings, count=2, levels=2, ends=[4])
    plain.extend(probs_V.log())
    assert ([draft.tokens for draft in plain.ended], [draft.tokens for draft in plain.alive]) == ([(4,)], [(2,), (0,)])
    weights_K: Tensor = plain.newest[1]
    assert weights_K.tolist() == pytest.approx([0.75, 0.25])


def test_a_corpus_is_counted(model, target, tmp_path):
    (tmp_path / "corpus.txt").write_text("to be or not to be", encoding="utf-8")
    settings = SuperposedSettings(corpus=str(tmp_path / "corpus.txt"), temperature=1.0, candidates=8)
    proposer = make(settings, Surroundings(target, CausalLMDrafter(model)))
    assert isinstance(proposer, Superposed)
    ids = target.tokenizer("to be", add_special_tokens=False).input_ids
    assert proposer._corpus.following[tuple(ids[:2])][ids[2]] == 2.0


def test_no_draft_goes_on_after_the_end_of_a_text(model, target):
    proposer = Superposed(model, MILD, num_tokens=8, ends=range(8))
    proposer.begin([Context("0", [1, 2, 3], 3)], [])
    (one,) = proposer.propose([Budget(12, 4, 3)], Sampling(), [torch.Generator()], lambda step: True)
    assert one.depths_N.tolist() == [0, 1, 1, 1]


def test_a_drafter_without_a_language_model_in_the_targets_tokens_is_refused(target):
    message = r"eval\.beside: superposed reads text with the drafter's own language model"
    for recipe, more in (("tiny_kangaroo", []), ("tiny_eagle", []), ("demo", ["drafter.tokenizer=other"])):
        for value in ("{kind: superposed}", "{kind: rasd, drafter: {kind: superposed}}"):
            with pytest.raises(RecipeError, match=message):
                load_recipe(recipe, [f"eval.beside=[{value}]", *more])
    load_recipe("demo", ["eval.beside=[{kind: superposed}]"])
    entry = drafters.entry("eagle")
    drafter = entry.component.create(entry.settings(), target=target, tokenizer=target.tokenizer)
    with pytest.raises(CheckpointError, match=r"superposed: needs a drafter with a language model .* eagle has none"):
        make(SuperposedSettings(), Surroundings(target, drafter))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{kind: superposed, context_weights: [0.0]}", "context_weights: all are 0"),
        ("{kind: superposed, corpus: nowhere.txt}", "corpus: nowhere.txt: no such file"),
        ("{kind: superposed, ngram_weight: 0, corpus: nowhere.txt}", "corpus: is not used with ngram_weight 0"),
        ("{kind: superposed, temperature: 0}", "temperature"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(value, problem):
    with pytest.raises(RecipeError) as error:
        load_sections(["eval"], [f"eval.beside=[{value}]"])
    assert problem in str(error.value)
