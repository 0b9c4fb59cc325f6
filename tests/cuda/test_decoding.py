"""Decoding on one GPU: every kind in chains and trees, every length policy, rule and proposer that is registered."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import pytest

from drafttrain.core.registry import Registry
from drafttrain.core.texts import Sampling
from drafttrain.drafters import Drafter, drafters
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.acceptance.lossless import LosslessSettings
from drafttrain.eval.cascade import cascades, span_judges
from drafttrain.eval.cascade.frontier import decoder_of
from drafttrain.eval.cascade.kinds.spec_reason import SpecReasonSettings
from drafttrain.eval.cascade.router import Pair
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length import length_policies
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.length.tree import TreeSettings
from drafttrain.eval.proposers import Surroundings, make, proposers
from drafttrain.eval.proposers.jacobi import Jacobi
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.target_model import Target
from tests.cuda.kinds import KINDS, SEARCHED
from tests.cuda.models import MAX_NEW_TOKENS, PROMPTS, engine, head_folder, packed

pytestmark = pytest.mark.pretended_cuda

SAMPLED = Sampling(1.0, 0.9, 50)


@pytest.fixture(scope="session")
def heads_of(tmp_path_factory: pytest.TempPathFactory, target: Target) -> dict[str, str]:
    """The folders of untrained heads, by what they are trained for."""
    folder = tmp_path_factory.mktemp("heads")
    hidden_size = target.model.config.hidden_size
    return {kind: head_folder(kind, folder, hidden_size=hidden_size) for kind in ("acceptance", "judge")}


def decode(target: Target, drafter: Drafter | None, proposer: Any = None, **options: Any) -> None:
    """Decode two prompts together; all must come to their end."""
    ledger = Ledger()
    options = {"length": FixedLengthSettings(2), "rule": LosslessSettings(), "sampling": Sampling()} | options
    with nullcontext(target) if drafter is None else drafter.adapting(target) as served:
        if drafter is not None:
            proposer = drafter.proposer(served, ledger.append)
        loop = engine(served, proposer, listener=ledger.append, **options)
        if hasattr(loop.policy, "calibrate"):
            loop.policy.calibrate(loop.generate(PROMPTS[:1]))
        generations = loop.generate(PROMPTS)
    assert [len(one.tokens) for one in generations] == [MAX_NEW_TOKENS] * 2
    assert ledger.calls("target") > 0


def component_of(name: str) -> Any:
    return drafters.entry((KINDS | SEARCHED)[name].drafter["kind"]).component


def of_registry(registry: Registry, heads_of: dict[str, str], head: str, name: str) -> Any:
    """Return a member's settings, with a head where it reads one."""
    settings = registry.entry(name).settings
    reads_head = "head" in {field.name for field in fields(settings)}
    return settings(head=heads_of[head]) if reads_head else settings()


@pytest.mark.parametrize("name", [*KINDS, *SEARCHED])
def test_every_kind_drafts_chains_at_a_temperature(name: str, target: Target, drafter_of: Any) -> None:
    decode(target, drafter_of(name), sampling=SAMPLED)


@pytest.mark.parametrize("name", [name for name in (*KINDS, *SEARCHED) if component_of(name).drafts_trees])
def test_every_kind_but_those_of_chains_drafts_trees(name: str, target: Target, drafter_of: Any) -> None:
    decode(target, drafter_of(name), length=TreeSettings(num_draft_tokens=6, depth=2, width=2))


@pytest.mark.parametrize("name", length_policies.names())
def test_every_length_policy(name: str, target: Target, drafter_of: Any, heads_of: dict[str, str]) -> None:
    length = of_registry(length_policies, heads_of, "acceptance", name)
    kind = "dspark" if length.reads_confidence else "causal_lm"
    decode(target, drafter_of(kind), length=length, sampling=Sampling() if name == "tree" else SAMPLED)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", acceptance_rules.names())
def test_every_rule(name: str, temperature: float, target: Target, drafter_of: Any, heads_of: dict[str, str]) -> None:
    rule = of_registry(acceptance_rules, heads_of, "judge", name)
    if name == "jacobi_exit":
        decode(target, None, Jacobi(), rule=rule, sampling=Sampling(temperature))
    else:
        decode(target, drafter_of("causal_lm"), rule=rule, sampling=Sampling(temperature))


@pytest.mark.parametrize("name", proposers.names())
def test_every_proposer_that_needs_no_training(name: str, target: Target, drafter_of: Any) -> None:
    made_of = Surroundings(target, drafter_of("causal_lm"))
    decode(target, None, make(proposers.entry(name).settings(), made_of))


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", cascades.names())
def test_every_cascade(name: str, sampling: Sampling, target: Target, drafter_of: Any) -> None:
    pair = Pair(target, drafter_of("causal_lm").language_model, sampling, MAX_NEW_TOKENS, stop_tokens=())
    cascade = decoder_of(cascades.entry(name).settings(), pair)
    assert [len(cascade.generate(prompt).tokens) for prompt in PROMPTS] == [MAX_NEW_TOKENS] * 2


@pytest.mark.parametrize("draft", [None, FixedLengthSettings(2)], ids=["plain", "drafted"])
@pytest.mark.parametrize("name", span_judges.names())
def test_every_judge_of_spans(name: str, draft: Any, target: Target, drafter_of: Any) -> None:
    settings = SpecReasonSettings(9.5, span_judges.entry(name).settings(), step_tokens=2)
    pair = Pair(target, drafter_of("causal_lm").language_model, SAMPLED, 4, draft=draft, stop_tokens=())
    assert decoder_of(settings, pair).generate(PROMPTS[0]).num_by_large == 4


@pytest.mark.parametrize("name", [*KINDS, *SEARCHED])
def test_every_kind_is_replayed(name: str, target: Target, drafter_of: Any) -> None:
    texts = [Text(one.id, list(one.tokens), [7, 8, 9, 10]) for one in PROMPTS]
    for sampling in (Sampling(), SAMPLED):
        rows = replay_rows(target, drafter_of(name), texts, sampling, num_depths=2)
        assert all(1 <= expected_rounds(row, 2) <= 4 for row in rows)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("medusa")])
def test_medusa_is_calibrated(name: str, target: Target, drafter_of: Any) -> None:
    found = drafter_of(name).calibrate(target, [packed().to(target.device)])
    assert found["medusa_tree.json"]["paths"]


def test_thresholds_of_exits_are_calibrated(target: Target, drafter_of: Any) -> None:
    found = drafter_of("sorted_lm").calibrate(target, [packed().to(target.device)])
    assert len(found["exits.json"]["thresholds"][target.fingerprint]) == 2
