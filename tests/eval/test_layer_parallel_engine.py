"""Drafting with layers in parallel: greedy identity, the output's distribution, and a cache that is calibrated in every round."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Proposal
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import chain_draft
from drafttrain.drafters.causal_lm.decoding import DecodingLM
from drafttrain.drafters.causal_lm.layer_parallel import LayerParallelLM
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.engine import Engine
from drafttrain.eval.evaluate import choose_drafts, evaluate
from drafttrain.eval.fastest_length import known_lengths
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.length.rsd_s import RsdS, RsdSSettings
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.eval.pipelined import Pipelined
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.table import drafting_in_words
from drafttrain.serving.draft_length import best_length
from drafttrain.serving.promise import promise_of
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.other_tokenizer import OtherTokenizer
from tests.conftest import byte_tokenizer, random_llama
from tests.drafters.eagle_models import eagle_drafter
from tests.eval.decoding import PROMPTS, V, decode, greedy
from tests.eval.test_own_tokenizer_engine import OWN, TARGET
from tests.eval.test_pipelined import Scripted
from tests.eval.test_verification import Script, outcomes

NEW = 24
POLICIES = {
    "chain": FixedLength(FixedLengthSettings(4)),
    "tree": TreeLength(TreeSettings(8, depth=4, width=2)),
    "sampled tree": RsdS(RsdSSettings(3, depth=4)),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama(num_layers=6).double(), byte_tokenizer(), name="tiny", fingerprint="")


def parallel(model: Any, size: int = 4, **options: Any) -> ChainProposer:
    return ChainProposer(model, **{"target_vocab_size": V} | options, layer_parallel_size=size)


@pytest.mark.parametrize(("policy", "size"), [("tree", 2), ("chain", 4)])
def test_greedy_output_is_the_targets_own(target: Target, policy: str, size: int) -> None:
    """The drafter is the target itself: what is rejected, is because its layers ran in parallel."""
    wanted = [greedy(target, prompt, NEW) for prompt in PROMPTS]
    accepted = {}
    for count in (1, size):
        found = decode(target, parallel(target.model, count), policy=POLICIES[policy], new=NEW, stop_tokens=())
        assert [one.tokens for one in found] == wanted
        accepted[count] = sum(one.num_accepted for text in found for one in text.rounds)
    # Its first draft token of a round is always right, because an ordinary call drafts it.
    assert all(one.num_accepted >= min(1, one.num_draft_tokens) for text in found for one in text.rounds)
    assert accepted[size] < accepted[1]


def test_pearls_schedule_and_a_drafter_with_its_own_tokenizer_are_lossless_with_it(target: Target) -> None:
    ahead = Pipelined(parallel(target.model), max_new_tokens=NEW)
    found = decode(target, ahead, policy=POLICIES["chain"], new=NEW, stop_tokens=())
    assert [one.tokens for one in found] == [greedy(target, prompt, NEW) for prompt in PROMPTS]
    letters = Target(random_llama(vocab_size=4, num_layers=1).double(), TARGET, name="letters", fingerprint="")
    model = random_llama(vocab_size=5, num_layers=4, seed=2).double()
    drafter = CausalLMDrafter(model, other=OtherTokenizer(TARGET, OWN)).eval()
    choose_drafts([drafter], EvalSettings(layer_parallel_size=2))
    prompts = [Prompt("0", [1, 2]), Prompt("1", [2, 1, 2])]
    found = decode(letters, drafter.proposer(letters), prompts=prompts, new=12, stop_tokens=())
    assert [one.tokens for one in found] == [greedy(letters, prompt, 12) for prompt in prompts]
    assert sum(one.num_draft_tokens for text in found for one in text.rounds) > 12


# ---------------------------------------------------------------- calibration


def keys_and_values(lm: DecodingLM, row: int) -> list[Tensor]:
    end = max(lm.lengths)
    return [states[row] for layer in lm._layers for states in layer.columns.first(end)]


@torch.no_grad()
def worst_of_cache(
    target: Target, monkeypatch: pytest.MonkeyPatch, *, policy: str, schedule: Callable[[ChainProposer], Any]
) -> float:
    """Return the largest difference of the cache after the first call of each round from that of a fresh prefill of the text."""
    proposer, worst = parallel(target.model, 2), [0.0]
    forward, rounds = LayerParallelLM.forward, []

    def compared(lm: LayerParallelLM, *given: Any, prefill: bool = False, **options: Any) -> Any:
        first = lm.lengths == lm.kept
        seen = forward(lm, *given, prefill=prefill, **options)
        if first and not prefill:
            rounds.append(lm.lengths)
            for row, context in enumerate(proposer._contexts):
                length = lm.lengths[row]
                assert length == len(context.tokens) or not given[0][row]
                fresh = DecodingLM(target.model, name="fresh")
                fresh.begin([context.tokens[:length]])
                pairs = zip(keys_and_values(lm, row), keys_and_values(fresh, 0), strict=True)
                worst.extend(float((ours[:, :length] - alone).abs().max()) for ours, alone in pairs)
        return seen

    monkeypatch.setattr(LayerParallelLM, "forward", compared)
    found = decode(
        target,
        schedule(proposer),
        policy=POLICIES[policy],
        new=20,
        temperature=0.0 if policy == "tree" else 1.0,
        stop_tokens=(),
    )
    monkeypatch.setattr(LayerParallelLM, "forward", forward)
    accepted = {one.num_accepted for text in found for one in text.rounds}
    assert max(accepted) > 1
    assert len(rounds) > 3
    return max(worst)


@pytest.mark.parametrize(
    ("policy", "schedule"),
    [
        *((name, lambda proposer: proposer) for name in POLICIES),
        ("chain", lambda proposer: Pipelined(proposer, max_new_tokens=20)),
    ],
)
def test_after_the_first_call_of_a_round_the_cache_is_that_of_a_fresh_prefill(
    target: Target, policy: str, schedule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worst_of_cache(target, monkeypatch, policy=policy, schedule=schedule) < 1e-12
    # Control: what draft tokens wrote stays where they were accepted.
    monkeypatch.setattr(LayerParallelLM, "keep", DecodingLM.keep)
    monkeypatch.setattr(LayerParallelLM, "cut", DecodingLM.cut)
    assert worst_of_cache(target, monkeypatch, policy=policy, schedule=schedule) > 1e-3


def test_calibration_costs_no_further_call(target: Target) -> None:
    """The first call of a round reads the accepted tokens and the root; each further one reads a draft token."""
    ledger = Ledger()
    proposer = parallel(target.model, listener=ledger.append)
    (text,) = decode(
        target, proposer, prompts=PROMPTS[2:], policy=POLICIES["chain"], new=NEW, listener=ledger.append, stop_tokens=()
    )
    assert ledger.calls("drafter") == sum(one.num_draft_tokens for one in text.rounds)
    by_round = [[e.shape.num_tokens for e in events if e.model == "drafter"] for events in ledger.by_round()]
    for before, read in zip(text.rounds, by_round[1:], strict=False):
        assert read == ([before.num_emitted, *[1] * (len(read) - 1)] if read else [])
    assert any(read[0] > 2 for read in by_round if read)


# ---------------------------------------------------------------- the distribution of the output


class OrdinaryRows(ChainProposer):
    """The control: tokens are drawn with layers in parallel, and verified with the distributions of ordinary calls."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.ordinary = DecodingLM(model, name="ordinary")

    def propose(self, *given: Any) -> list[Proposal]:
        proposals = super().propose(*given)
        for row, (context, one) in enumerate(zip(self._contexts, proposals, strict=True)):
            if one.q_rows_RV is not None:
                self.ordinary.begin([context.tokens[:-1]])
                (seen,) = self.ordinary.forward([one.tokens_N[:-1].tolist()])
                assert seen.logits_BTV is not None
                proposals[row] = replace(one, q_rows_RV=seen.logits_BTV[0].softmax(-1))
        return proposals


def distance(kind: type[ChainProposer], *, new: int = 3) -> float:
    """Return the total variation between the loop's output and the target's distribution, over all draws and decisions."""
    target = Target(
        random_llama(num_layers=1, vocab_size=2, hidden_size=16).double(), byte_tokenizer(), name="two", fingerprint=""
    )
    target.__dict__["num_tokens"] = 2
    model = random_llama(num_layers=4, vocab_size=2, hidden_size=16, seed=3).double()
    proposer, rule = kind(model, target_vocab_size=2, layer_parallel_size=2), Scripted()
    engine = Engine(
        target,
        proposer,
        rule=rule,  # type: ignore[arg-type]
        policy=FixedLength(FixedLengthSettings(2)),
        sampling=Sampling(1.0),
        max_new_tokens=new,
        stop_tokens=(),
    )

    def run(script: Script) -> tuple[int, ...]:
        rule.script = script
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chain_draft, "draw_each", lambda probs_NR, _: [script.draw(row_R) for row_R in probs_NR])
            (found,) = engine.generate([Prompt("", [0, 1])])
        return tuple(found.tokens)

    emitted = outcomes(run)
    assert len(emitted) == 2**new
    total = 0.0
    for text in itertools.product(range(2), repeat=new):
        with torch.no_grad():
            logits_TV = target.model(torch.tensor([[0, 1, *text]])).logits[0, 1:-1]
        own = float(logits_TV.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum().exp())
        total += abs(own - emitted[text]) / 2
    return total


@pytest.mark.long
def test_the_distribution_of_all_draws_is_the_targets() -> None:
    assert distance(ChainProposer) < 1e-12
    assert distance(OrdinaryRows) > 1e-3


# ---------------------------------------------------------------- the evaluation


def test_an_evaluation_says_how_was_drafted_and_promises_engines_nothing(
    save_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_llama(num_layers=4)
    target = Target.load(TargetSettings(model=str(folder)))
    prompts = [replace(prompt, tokens=list(prompt.tokens)[:6]) for prompt in PROMPTS]
    settings = EvalSettings(max_new_tokens=12, temperatures=[0.0], replay_lengths=[1, 2], speed_prompts=0)
    found = evaluate({"drafter": folder}, target, prompts, replace(settings, layer_parallel_size=2))
    ordinary = replace(found, settings={**found.settings, "layer_parallel_size": 1})
    (figures,) = (part.drafters["drafter"] for part in found.temperatures)
    assert figures.parity is not None
    assert figures.parity.lossless
    # Replay is about the drafter's own forward, which runs layer by layer.
    assert (figures.alpha, figures.replay) == (None, {})
    assert "layer_parallel_size 2" in drafting_in_words(found)
    assert promise_of(found, temperature=0.0, num_draft_tokens=5) is None
    assert "layer_parallel_size" not in drafting_in_words(ordinary)
    assert promise_of(ordinary, temperature=0.0, num_draft_tokens=5) is not None
    with pytest.raises(CheckpointError, match=r"that replay can compute.*eval\.layer_parallel_size: 1"):
        best_length(found)
    for one, known in ((found, False), (ordinary, True)):
        one.write(tmp_path / "eval.json")
        assert (known_lengths(tmp_path, temperature=0.0) is not None) == known


def test_drafters_without_a_language_model_of_their_own_are_refused_by_name() -> None:
    target = Target(random_llama(num_layers=4).double(), byte_tokenizer(), name="tiny", fingerprint="")
    drafters: Sequence[Any] = [eagle_drafter("eagle3", target)]
    with pytest.raises(CheckpointError, match=r"eval\.layer_parallel_size: 2 .*not for drafter\.kind eagle3"):
        choose_drafts(drafters, EvalSettings(layer_parallel_size=2))
    choose_drafts(drafters, EvalSettings())
