"""Confidences of draft tokens: noted as they are, paired with verdicts, and mapped by length policies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.proposals import DraftStep
from drafttrain.core.recalibration import Isotonic, Scaled
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.length.batch_schedule import BatchSchedule, BatchScheduleSettings
from drafttrain.eval.length.confidence import Confidence, ConfidenceSettings
from drafttrain.eval.length.cumulative_reject import CumulativeReject, CumulativeRejectSettings
from drafttrain.eval.length.predicted_acceptance import PredictedAcceptance, PredictedAcceptanceSettings
from drafttrain.eval.noted_confidence import NotedConfidence
from drafttrain.eval.recalibrated import (
    ACCEPTANCE_HEAD,
    CONFIDENCE_HEAD,
    LARGEST_PROBABILITY,
    check_calibration,
)
from drafttrain.eval.settings import length_label
from drafttrain.target_model import Target
from drafttrain.target_model.folders import fingerprint_of
from tests.eval.decoding import PROMPTS, V, decode, greedy, noisy
from tests.eval.test_adaptive_length import known_head
from tests.eval.test_engine import target as target

CONSTANT = {"of 0": Isotonic([0.0], [0.0]), "of 1": Isotonic([0.0], [1.0]), "identity": Scaled(1.0, 0.0)}


def written(folder: Path, chances: Any, *, of: str = LARGEST_PROBABILITY) -> str:
    path = folder / f"{of}.json"
    write_json(path, {"confidence": of, "map": chances.as_json()})
    return str(path)


def proposer_of(target: Target) -> ChainProposer:
    return ChainProposer(noisy(target.model, 0.02), target_vocab_size=V)


def noted(target: Target, prompts: Any, temperature: float) -> tuple[NotedConfidence, Any]:
    policy = NotedConfidence(Confidence(ConfidenceSettings(max_tokens=4)))
    found = decode(
        target, proposer_of(target), prompts=prompts, temperature=temperature, policy=policy, new=24, stop_tokens=()
    )
    return policy, found


@torch.no_grad()
def test_pairs_are_the_confidences_and_verdicts_of_the_tested_tokens(target: Target) -> None:
    """Against the drafter's model itself: greedily a token is accepted if it is the target's argmax."""
    policy, found = noted(target, PROMPTS[:1], 0.0)
    model, wanted = noisy(target.model, 0.02), []
    text = [*PROMPTS[0].tokens, *found[0].tokens]
    for one in found[0].rounds:
        begins = len(PROMPTS[0].tokens) + one.start
        drafted = text[:begins]
        for _ in range(one.num_draft_tokens):
            row_V = model(torch.tensor([drafted])).logits[0, -1].softmax(dim=-1)
            right = int(target.model(torch.tensor([drafted])).logits[0, -1].argmax())
            wanted.append((float(row_V.max()), int(row_V.argmax()) == right))
            drafted = [*drafted, int(row_V.argmax())]
            if not wanted[-1][1]:
                break
    assert [accepted for _, accepted in policy.pairs] == [accepted for _, accepted in wanted]
    torch.testing.assert_close(
        torch.tensor([chance for chance, _ in policy.pairs]), torch.tensor([chance for chance, _ in wanted])
    )
    assert {accepted for _, accepted in policy.pairs} == {False, True}
    assert len({round(chance, 3) for chance, _ in policy.pairs}) > 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_the_pairs_of_its_sequences(target: Target, temperature: float) -> None:
    together, found = noted(target, PROMPTS, temperature)
    alone = [noted(target, [prompt], temperature)[0].pairs for prompt in PROMPTS]

    def rounded(pairs: Any) -> list[tuple[float, bool]]:
        return sorted((round(chance, 4), accepted) for chance, accepted in pairs)

    assert rounded(together.pairs) == rounded([pair for pairs in alone for pair in pairs])
    rounds = [one for generation in found for one in generation.rounds]
    assert sum(accepted for _, accepted in together.pairs) == sum(one.num_accepted for one in rounds)
    assert {one.num_draft_tokens for one in rounds if one.start < 19} == {4}, "no round is cut short"


@pytest.mark.parametrize("name", CONSTANT)
def test_a_policy_decides_by_the_mapped_confidence(target: Target, tmp_path: Path, name: str) -> None:
    confidences = sorted(chance for chance, _ in noted(target, PROMPTS[:1], 0.0)[0].pairs)
    threshold = confidences[len(confidences) // 2]

    def rounds(calibration: str | None) -> list[int]:
        settings = ConfidenceSettings(threshold=threshold, min_tokens=2, max_tokens=5, calibration=calibration)
        found = decode(
            target, proposer_of(target), prompts=PROMPTS[:1], policy=Confidence(settings), new=24, stop_tokens=()
        )
        assert found[0].tokens == greedy(target, PROMPTS[0], 24), "the output is the target's own"
        return [one.num_draft_tokens for one in found[0].rounds if one.start < 18]

    drafted = rounds(written(tmp_path, CONSTANT[name]))
    if name == "identity":
        assert drafted == rounds(None)
        assert len({*drafted}) > 1
    else:
        assert {*drafted} == {2 if name == "of 0" else 5}


def step(depth: int, *, logit: float = 0.0) -> DraftStep:
    score = torch.tensor(logit)
    return DraftStep(0, depth, torch.zeros(4), hidden_D=score[None], token=1, confidence=score)


def test_every_policy_with_a_confidence_reads_a_calibration(tmp_path: Path) -> None:
    """A confidence of 1/2 is mapped to 0.9: products and thresholds are those of 0.9."""
    raised = Isotonic([0.0], [0.9])
    head = written(tmp_path, raised, of=CONFIDENCE_HEAD)
    plain, mapped = (
        PredictedAcceptance(PredictedAcceptanceSettings(threshold=0.8, of="prefix", min_tokens=0, calibration=one))
        for one in (None, head)
    )
    assert [plain.more(step(1)), mapped.more(step(1)), mapped.more(step(2)), mapped.more(step(3))] == [
        *(False, True, True, False)
    ]
    scheduled = {}
    for one in (None, head):
        policy = BatchSchedule(BatchScheduleSettings(token_cost=0.3, calibration=one))
        for depth in (1, 2, 3):
            policy.more(step(depth))
        scheduled[one] = policy.schedule(1)
    assert scheduled[None] == [1]
    assert scheduled[head] == [3]
    (tmp_path / "head").mkdir()
    folder = known_head(tmp_path / "head")
    of_head = written(tmp_path, raised, of=ACCEPTANCE_HEAD)
    for calibration, wanted in ((None, 0.25), (of_head, 0.81)):
        rule = CumulativeReject(CumulativeRejectSettings(head=folder, calibration=calibration))
        assert rule.noted(step(1)) is None
        assert rule.noted(step(2)) == (1, 0.5)
        alive = [rule.survival.after(step(depth)) for depth in (1, 2, 3)]
        assert alive[-1] == pytest.approx(wanted)


def test_a_file_for_something_else_is_refused(target: Target, tmp_path: Path) -> None:
    wrong = written(tmp_path, CONSTANT["identity"], of=CONFIDENCE_HEAD)
    policy = Confidence(ConfidenceSettings(min_tokens=0, calibration=wrong))
    with pytest.raises(
        CheckpointError, match=r"is for the confidence 'confidence head', and this length policy decides by 'largest"
    ):
        policy.more(step(1))
    write_json(Path(wrong), {"confidence": LARGEST_PROBABILITY, "map": {"method": "isotonic", "starts": [0]}})
    with pytest.raises(CheckpointError, match="map: starts and chances must be lists"):
        Confidence(ConfidenceSettings(min_tokens=0, calibration=wrong)).more(step(1))
    with pytest.raises(CheckpointError, match="no such file"):
        Confidence(ConfidenceSettings(min_tokens=0, calibration=str(tmp_path / "none.json"))).more(step(1))


def test_a_file_for_other_models_is_refused(tiny_target: Target, save_llama: Any, tmp_path: Path) -> None:
    drafter, path = save_llama(seed=3, num_layers=1), tmp_path / "made.json"
    made = {"target": "t", "target_fingerprint": tiny_target.fingerprint, "drafter": "d"}
    write_json(path, {"made_for": made | {"drafter_fingerprint": fingerprint_of(drafter)}})
    check_calibration(path, target=tiny_target, drafter=drafter)
    other = save_llama(seed=4, num_layers=1)
    with pytest.raises(CheckpointError, match=r"fitted for the drafter d .* Run drafttrain calibrate"):
        check_calibration(path, target=tiny_target, drafter=other)
    write_json(path, {"confidence": LARGEST_PROBABILITY})
    with pytest.raises(CheckpointError, match="not a file of drafttrain calibrate"):
        check_calibration(path, target=tiny_target, drafter=drafter)


def test_a_calibrated_policy_has_a_label_of_its_own() -> None:
    settings = ConfidenceSettings(threshold=0.6)
    assert length_label(settings) == "confidence 0.6"
    assert length_label(replace(settings, calibration="x.json")) == "confidence 0.6, calibrated"
