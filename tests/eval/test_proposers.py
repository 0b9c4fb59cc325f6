"""Every proposer that needs no training: greedy identity, coupling, the ledger, and what it remembers.

Each runs in a tree and in a chain, after true logits and after random ones (its state is then adversarial).

N = nodes, V = vocabulary
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from drafttrain.core.proposals import Context, NodeKind, Proposal, Verdict
from drafttrain.core.target_rows import TargetOutput
from drafttrain.core.texts import Prompt
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.eval.proposers import Surroundings, is_warm, label_of, make, proposers
from drafttrain.eval.proposers.aded import Aded, AdedSettings, TreeSearch, TrigramTable
from drafttrain.eval.proposers.jacobi import Jacobi
from drafttrain.eval.proposers.lookahead import Lookahead, LookaheadSettings, NgramPool
from drafttrain.eval.proposers.ngram import Ngram, NgramSettings
from drafttrain.eval.proposers.ngram_counts import NgramCounts
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.proposers.rasd import RasdSettings
from drafttrain.eval.proposers.token_recycling import TokenRecycling, TokenRecyclingSettings, best_paths
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import decode, greedy, noisy, small_target

TREE = TreeLength(TreeSettings(num_draft_tokens=16, depth=4, width=4))
PROMPTS = [Prompt(str(i), [1 + i % 7, 2, 3 + i % 5, *([4, 1 + i % 7, 2] if i % 2 else [])]) for i in range(8)]
DRAWN = ("rasd", "rapid", "swift", "ffn_slice", "early_exit", "del")
FIXED_ONLY = [name for name in proposers.names() if name not in DRAWN]


@pytest.fixture(scope="module")
def target() -> Target:
    return small_target()


@pytest.fixture(scope="module")
def plain(target: Target) -> Callable[[float], list[Any]]:
    """Return plain decoding at a temperature, once for all tests."""
    found: dict[float, list[Any]] = {}

    def decoded(temperature: float) -> list[Any]:
        if temperature not in found:
            found[temperature] = decode(target, NoDraft(), prompts=PROMPTS, temperature=temperature, new=64)
        return found[temperature]

    return decoded


def proposer_of(settings: Any, target: Target) -> Any:
    return make(settings, Surroundings(target, CausalLMDrafter(noisy(target.model, 0.15))))


class Misled:
    """Gives a proposer random logits in place of the target's."""

    def __init__(self, proposer: Any) -> None:
        self._proposer = proposer
        self._generator = torch.Generator().manual_seed(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proposer, name)

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        wrong = []
        for output in seen:
            assert output.logits_BTV is not None
            logits_BTV = torch.randn(output.logits_BTV.shape, generator=self._generator, dtype=torch.float64)
            wrong.append(TargetOutput(logits_BTV, output.hidden_BTD, output.final_BTD))
        self._proposer.observe(verdicts, wrong)


def tokens_of(found: Sequence[Any]) -> list[list[int]]:
    return [list(one.tokens) for one in found]


@pytest.mark.parametrize(
    ("name", "misled"),
    [*((name, False) for name in FIXED_ONLY), *((name, True) for name in ("jacobi", "lookahead", "token_recycling"))],
)
def test_greedy_output_is_that_of_plain_decoding(name, misled, target, plain):
    proposer = proposer_of(proposers.entry(name).settings(), target)
    found = decode(target, Misled(proposer) if misled else proposer, prompts=PROMPTS, policy=TREE, new=64)
    assert tokens_of(found) == tokens_of(plain(0.0))
    for one in found:
        assert sum(part.num_emitted for part in one.rounds) == len(one.tokens)
        assert all(part.start + part.max_depth + 1 <= 64 for part in one.rounds), "nothing is drafted past the end"
        assert all(part.num_draft_tokens <= 16 for part in one.rounds)


@pytest.mark.parametrize("name", FIXED_ONLY)
def test_fixed_proposals_do_not_change_a_sampled_text(name, target, plain):
    """Each emitted token is one draw from the target's row at one number of the verdict's stream, whatever was drafted."""
    proposer = proposer_of(proposers.entry(name).settings(), target)
    found = decode(target, proposer, prompts=PROMPTS, policy=TREE, temperature=1.0, new=64)
    assert tokens_of(found) == tokens_of(plain(1.0))
    assert name == "none" or sum(len(one.rounds) for one in found) < sum(len(one.tokens) for one in found)


def test_control_a_chain_that_claims_to_be_sampled_changes_the_text(target, plain):
    class Claims(Ngram):
        def propose(self, *arguments: Any) -> list[Proposal]:
            return [self._sampled(one) for one in super().propose(*arguments)]

        def _sampled(self, one: Proposal) -> Proposal:
            count = one.num_draft_tokens
            return Proposal(
                one.tokens_N,
                one.parents_N,
                one.depths_N,
                torch.tensor([0] + [NodeKind.SAMPLED.value] * count),
                q_rows_RV=torch.full((max(count, 1), 8), 1 / 8, dtype=torch.float64),
                q_row_N=torch.tensor([*range(count), -1]),
            )

    found = decode(target, Claims(), prompts=PROMPTS, temperature=1.0, new=64)
    assert tokens_of(found) != tokens_of(plain(1.0))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [FixedLength(), TREE, TreeLength(TreeSettings(80, 6, 8))])
@pytest.mark.parametrize("misled", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", FIXED_ONLY)
def test_the_same_for_a_larger_target_in_chains_and_trees(name, temperature, misled, policy):
    target = Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")
    prompts = [Prompt(str(i), [*range(1 + i, 4 + 5 * i)]) for i in range(8)]
    options: dict[str, Any] = {"prompts": prompts, "temperature": temperature, "new": 64}
    proposer = proposer_of(proposers.entry(name).settings(), target)
    found = decode(target, Misled(proposer) if misled else proposer, policy=policy, **options)
    assert tokens_of(found) == tokens_of(decode(target, NoDraft(), **options))


@pytest.mark.parametrize("name", FIXED_ONLY)
def test_together_and_alone_are_the_same_rounds_and_the_ledger_counts_them(name, target):
    settings, options = proposers.entry(name).settings(), {"policy": TREE, "temperature": 1.0, "new": 24}
    together = decode(target, proposer_of(settings, target), prompts=PROMPTS[:3], **options)
    ledger = Ledger()
    one_proposer = proposer_of(settings, target)
    alone = [
        decode(target, one_proposer, prompts=[prompt], listener=ledger.append, **options)[0] for prompt in PROMPTS[:3]
    ]
    assert [one.rounds for one in together] == [one.rounds for one in alone], "a cold state is one of the text"
    rounds = [part for one in alone for part in one.rounds]
    assert ledger.calls("target") == len(rounds)
    assert sum(event.shape.num_tokens for event in ledger.rounds("target")) == sum(
        1 + part.num_draft_tokens for part in rounds
    )


# ---------------------------------------------------------------- prompt lookup, Jacobi, lookahead


def fixed_point(target: Target, prompt: Sequence[int], count: int) -> tuple[list[int], int]:
    """Return the fixed point of Jacobi's iteration on a block, begun with copies of the last token, and its passes."""
    block = [prompt[-1]] * count
    for passes in itertools.count(1):
        rows_NV = target.model(torch.tensor([[*prompt, *block]])).logits[0, len(prompt) - 1 : -1]
        iterated = rows_NV.argmax(dim=-1).tolist()
        if iterated == block:
            return block, passes
        block = iterated
    raise AssertionError


@pytest.fixture(scope="module")
def larger() -> Target:
    """Its texts repeat less."""
    return Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")


class Shifted(Jacobi):
    """Control: guesses are one place too early."""

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        super().observe(verdicts, seen)
        for text in self._texts:
            text._guess = text._guess[1:]


@pytest.mark.parametrize("count", [4, 10])
def test_jacobis_fixed_point_is_the_greedy_text_in_at_most_one_pass_more_than_tokens(count, larger):
    late = 0
    for prompt in PROMPTS[:5]:
        block, passes = fixed_point(larger, prompt.tokens, count)
        assert block == greedy(larger, prompt, count)
        assert passes <= count + 1
        # The loop commits the solved part in every pass.
        options: dict[str, Any] = {"prompts": [prompt], "policy": TreeLength(TreeSettings(10, 10, 2)), "new": count}
        (found,) = decode(larger, Jacobi(), **options)
        assert list(found.tokens) == block
        assert len(found.rounds) <= min(passes, count)
        (control,) = decode(larger, Shifted(), **options)
        assert list(control.tokens) == block, "other guesses, the same text"
        late += len(control.rounds) > passes
    assert late or count == 4


def test_the_window_of_lookahead_iterates_as_without_a_tree(larger):
    """Each new token is the target's argmax after the text, the oldest tokens up to its place, and its own later ones."""
    settings = LookaheadSettings(window=3, level=3, guesses=2)
    proposer = Lookahead(settings)
    checked = 0

    class Watched(Lookahead):
        def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
            nonlocal checked
            (text,) = self._texts
            before, read = [list(tokens) for tokens in text._window], list(text._context.tokens)
            super().observe(verdicts, seen)
            (verdict,) = verdicts
            root = read[: len(read) - len(verdict.tokens)]
            for place in range(3):
                path = [*(tokens[0] for tokens in before[: place + 1]), *before[place][1:]]
                wanted = int(larger.model(torch.tensor([[*root, *path]])).logits[0, -1].argmax())
                if text._window[place] != before[place]:
                    assert text._window[place][-1] == wanted
                    checked += 1

    proposer = Watched(settings)
    found = decode(larger, proposer, prompts=PROMPTS[1:2], policy=TreeLength(TreeSettings(24, 6, 4)), new=12)
    assert checked > len(found[0].rounds)


def test_a_pool_has_the_latest_different_ngrams():
    pool = NgramPool(2)
    for tokens in ([1, 2, 3], [1, 4, 5], [1, 2, 3], [7, 2, 3]):
        pool.add(tokens)
    assert pool.after(1) == [(2, 3), (4, 5)]
    pool.add([1, 9, 9])
    assert pool.after(1) == [(9, 9), (2, 3)]
    assert pool.after(8) == []


# ---------------------------------------------------------------- Token Recycling, ADED


def test_the_tree_of_token_recycling_has_80_nodes_whose_parents_come_first():
    paths = best_paths(80, 8)
    assert len(set(paths)) == 80
    assert all(path[:-1] in {(), *paths[:place]} for place, path in enumerate(paths))
    assert [sum(len(path) == depth for path in paths) for depth in range(1, 8)] == [8, 23, 25, 17, 6, 1, 0]


def rounds_of(target: Target, proposer: Any, prompts: Sequence[Prompt]) -> int:
    """Return the rounds of prompts that are decoded one after the other."""
    found = [decode(target, proposer, prompts=[prompt], policy=TREE, new=24)[0] for prompt in prompts]
    return sum(len(one.rounds) for one in found)


@pytest.mark.parametrize("kind", [TokenRecycling, Aded])
def test_a_warm_state_helps_the_next_prompt_and_can_be_forgotten(kind, target):
    settings = type(kind().settings)
    cold, warm = kind(settings()), kind(settings(warm=True))
    prompt = PROMPTS[:1]
    first = rounds_of(target, cold, prompt)
    assert rounds_of(target, cold, prompt) == first, "a cold state is reset"
    assert rounds_of(target, warm, prompt) == first
    assert rounds_of(target, warm, prompt) < first
    warm.forget()
    assert rounds_of(target, warm, prompt) == first
    assert [is_warm(one) for one in (settings(), settings(warm=True))] == [False, True]
    assert is_warm(RasdSettings(retrieval=settings(warm=True)))


def test_the_last_accepted_node_of_a_token_decides_its_successors():
    from drafttrain.core.proposals import Budget, fixed_tree

    text = TokenRecycling(TokenRecyclingSettings(successors=1)).start(Context("0", [5], 1))
    # Token 6 occurs in nodes 1 (accepted), 2 (rejected) and 3 (rejected, last).
    proposal = fixed_tree(5, [(6, 0), (6, 1), (6, 2)])
    logits_NV = torch.eye(8)[[1, 2, 3, 4]]
    text.learn(Verdict([0, 1], [6, 2], "reject", proposal), logits_NV)
    assert text._table == {5: [1], 6: [2]}
    text.learn(Verdict([0], [1], "reject", proposal), logits_NV)
    assert text._table == {5: [1], 6: [4]}
    assert text.draft(Budget(9, 3, 2), torch.Generator()).tokens_N.tolist() == [5, 1]


def test_rows_of_trigrams_are_counts_of_corpus_and_text_normalized():
    corpus, text = NgramCounts(), NgramCounts()
    corpus.add([1, 2, 3, 1, 2, 3, 1, 2, 4])
    text.add([0, 1, 2, 4], weight=4.0)
    table = TrigramTable(corpus, text, successors=12)
    assert table.row((1, 2)) == [(4, 5 / 7), (3, 2 / 7)]
    assert table.row((9, 2)) == table.row((2,)) == [(4, 5 / 7), (3, 2 / 7)], "unseen: the last token alone"
    assert table.row((9, 9)) == []
    # In two pieces the counts are those of the whole text.
    pieces = NgramCounts()
    pieces.add([0, 1], start=0)
    pieces.add([0, 1, 2, 4], start=2)
    whole = NgramCounts()
    whole.add([0, 1, 2, 4])
    assert pieces.following == whole.following


def test_the_search_tries_likelier_paths_more_often():
    import random

    from drafttrain.core.proposals import Budget
    from drafttrain.eval.proposers.token_tree import TokenTree

    corpus = NgramCounts()
    corpus.add([1, 2] * 30 + [1, 3] * 10 + [1, 4])
    table = TrigramTable(corpus, NgramCounts(), successors=12)
    search = TreeSearch(table, (9, 1), depth=3, random_stream=random.Random(0))
    search.run(150)
    tree = TokenTree(1, Budget(5, 3, 2))
    search.grow(tree)
    proposal = tree.proposal()
    assert proposal.num_draft_tokens == 5
    assert proposal.tokens_N.tolist()[:2] == [1, 2]
    assert search._nodes[0].visits == 150
    children = [search._nodes[child] for child in search._nodes[0].children or []]
    assert [child.pair[-1] for child in children] == [2, 3, 4]
    assert children[0].visits > children[1].visits > children[2].visits
    assert sum(child.visits for child in children) == 150


def test_aded_uses_the_streams_of_proposers_only(target):
    """Other seeds of the engine draft other trees, but the greedy text is the same: the search decides nothing else."""
    settings = AdedSettings(simulations=10)
    drafted = []
    for seed in range(3):
        (one,) = decode(target, Aded(settings), prompts=PROMPTS[:1], policy=TREE, new=24, seed=seed)
        drafted.append([part.num_draft_tokens for part in one.rounds])
        assert list(one.tokens) == list(decode(target, NoDraft(), prompts=PROMPTS[:1], new=24)[0].tokens)
    (again,) = decode(target, Aded(settings), prompts=PROMPTS[:1], policy=TREE, new=24, seed=0)
    assert [part.num_draft_tokens for part in again.rounds] == drafted[0]


def test_labels_name_the_settings_that_differ():
    assert label_of(RasdSettings()) == "rasd"
    assert label_of(RasdSettings(retrieval=NgramSettings(min_ngram=2))) == "rasd, retrieval ngram, min_ngram 2"
    assert label_of(TokenRecyclingSettings(warm=True)) == "token_recycling, warm True"


def texts() -> Iterator[str]:
    yield "to be or not to be, that is the question. "


def test_aded_counts_a_corpus(target, tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(texts()), encoding="utf-8")
    proposer = proposer_of(AdedSettings(corpus=str(tmp_path / "corpus.txt")), target)
    ids = target.tokenizer("to be", add_special_tokens=False).input_ids
    text = proposer.start(Context("0", ids[:3], 3))
    from drafttrain.core.proposals import Budget

    drafted = text.draft(Budget(9, 3, 3), torch.Generator().manual_seed(0)).tokens_N.tolist()
    assert drafted[:2] == ids[2:4]
