"""Layers by ablation: what changes the target's distribution least is removed first, and a run chooses once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Record
from drafttrain.drafters.causal_lm.ablation import Ablation, removed_one_by_one
from drafttrain.drafters.causal_lm.cut import cut_from
from drafttrain.drafters.causal_lm.cut_choice import CutChoice
from drafttrain.drafters.causal_lm.cut_settings import CutSettings
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama

LAYERS = 5


def silenced(model: Any, *numbers: int) -> Any:
    """Return the model, of which these layers add 0 to the stream."""
    with torch.no_grad():
        for number in numbers:
            model.model.layers[number].self_attn.o_proj.weight.zero_()
            model.model.layers[number].mlp.down_proj.weight.zero_()
    return model


def target_of(*without: int) -> Target:
    model = silenced(random_llama(num_layers=LAYERS), *without)
    return Target(model, byte_tokenizer(), name="tiny", fingerprint="")


def records(*lengths: int) -> list[Record]:
    draws = torch.Generator().manual_seed(5)
    texts = [torch.randint(1, 257, (length,), generator=draws).tolist() for length in lengths]
    return [Record(str(i), text, [j > 3 for j in range(len(text))]) for i, text in enumerate(texts)]


def chosen(target: Target, count: int, texts: list[Record]) -> Any:
    settings = CausalLMSettings(init="target", num_layers=count, cut=CutSettings(layers="ablation"))
    choice = CausalLMDrafter.start_choice(settings)
    assert choice is not None
    return choice.choose(target, texts), choice


def test_layers_that_do_nothing_are_removed_first() -> None:
    found, choice = chosen(target_of(0, 3), 3, records(20, 14))
    assert found["layers"] == [1, 2, 4]
    assert {one["layer"] for one in found["removed"]} == {0, 3}
    assert abs(found["kl"]) < 1e-6
    # The control: evenly spaced layers, 0, 2 and 4, leave one out that does something.
    assert found["kl_of_evenly_spaced"] > 0.01
    settings = choice.settings(found)
    assert settings == replace(choice.given, cut=CutSettings(layers=[1, 2, 4]))
    target = target_of(0, 3)
    drafter = CausalLMDrafter.create(settings, target=target, tokenizer=target.tokenizer)
    tokens = torch.randint(257, (1, 11))
    torch.testing.assert_close(drafter.model(tokens).logits, target.model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_divergence_is_that_of_the_cut_model_on_the_labels() -> None:
    target, texts = target_of(), records(20, 14)
    small, total, count = cut_from(target.model, [0, 2, 4], width=None), 0.0, 0
    with torch.no_grad():
        for text in texts:
            tokens = torch.tensor([text.tokens])
            log_p, log_q = (
                torch.log_softmax(model(tokens).logits[0].double(), dim=-1) for model in (target.model, small)
            )
            rows = [place - 1 for place, label in enumerate(text.loss_mask) if label]
            total += float((log_p.exp() * (log_p - log_q)).sum(dim=-1)[rows].sum())
            count += len(rows)
    ablation = Ablation(target, texts)
    assert ablation.divergence([1, 3]) == pytest.approx(total / count, rel=1e-4)
    assert ablation.divergence([]) == 0.0
    assert ablation.divergence([1, 2]) != pytest.approx(total / count, rel=1e-2), "the control: other layers"


def test_each_removal_is_the_cheapest_one() -> None:
    class Additive(Ablation):
        """Costs that add up, so that greedy removal is the best set: compared with all sets."""

        def __init__(self, costs: list[float]) -> None:
            self.costs = costs

        def divergence(self, left_out: Collection[int]) -> float:
            return sum(self.costs[block] for block in left_out)

    costs = Additive([0.4, 0.1, 0.3, 0.1, 0.9])
    removed = [block for block, _ in removed_one_by_one(costs, LAYERS, 2)]
    assert removed == [1, 3, 2], "of equal ones the first"
    assert {*removed} == {*min(combinations(range(LAYERS), 3), key=costs.divergence)}
    assert not list(removed_one_by_one(costs, LAYERS, LAYERS))


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no training text has a label"):
        Ablation(target_of(), [Record("0", [1, 2], [True, False])])
    with pytest.raises(CheckpointError, match=r"num_layers must be 1\.\.5 for this target, got 9"):
        chosen(target_of(), 9, records(20))
    assert CausalLMDrafter.start_choice(CausalLMSettings(init="target")) is None
    assert isinstance(
        CausalLMDrafter.start_choice(CausalLMSettings(init="target", cut=CutSettings(layers="ablation"))),
        CutChoice,
    )
