"""Nested widths: slices of one model are trained together, extracted, and draft for the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Prompt
from drafttrain.drafters.causal_lm.cut import sub_model
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.matformer.module import MatFormerDrafter, MatFormerSettings
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.proposers import Surroundings, make
from drafttrain.eval.proposers.ffn_slice import FFNSliceSettings
from drafttrain.losses.forward_kl import ForwardKL, ForwardKLSettings
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from drafttrain.target_model.first_neurons import gated_mlps, run, with_first_neurons
from drafttrain.target_model.logits import LiveRows
from tests.conftest import byte_tokenizer, random_llama
from tests.drafters.test_causal_lm_decoding import model, texts
from tests.drafters.test_sorted_lm import batch_of, step_of
from tests.eval.decoding import PROMPTS, chi_square, decode, greedy

SHARES = (0.25, 0.5)
LAYERS = 3


def drafter_of(made: Any, **settings: Any) -> MatFormerDrafter:
    drafter = MatFormerDrafter(made)
    drafter.shares = SHARES
    for name, value in settings.items():
        setattr(drafter, name, value)
    return drafter.train()


def plain(**options: Any) -> Any:
    return model(num_hidden_layers=LAYERS, dtype=torch.float32, **options)


@torch.no_grad()
def logits(made: Any, text: list[int]) -> Tensor:
    found_BTV: Tensor = made(torch.tensor([text])).logits
    return found_BTV


def masked(mlp: Any, width: int) -> Any:
    """A forward that computes all neurons, and multiplies those after the first ones by 0."""

    def forward(hidden_states: Tensor) -> Tensor:
        inner_BTF = mlp.act_fn(mlp.gate_proj(hidden_states)) * mlp.up_proj(hidden_states)
        found_BTD: Tensor = mlp.down_proj(inner_BTF * (torch.arange(inner_BTF.shape[-1]) < width))
        return found_BTD

    return forward


@pytest.mark.parametrize("widths", [[12, 12, 12], [48, 48, 48], [12, 48, 24]])
def test_an_extracted_sub_model_is_the_whole_one_with_its_other_neurons_masked(widths: list[int]) -> None:
    made, text = plain(), texts([11], 0)[0]
    with with_first_neurons(gated_mlps(made), widths):
        sliced = logits(made, text)
    extracted = sub_model(made, widths=widths)
    assert extracted.config.intermediate_size == max(widths)
    if len(set(widths)) == 1:
        assert torch.equal(logits(extracted, text), sliced), "bit for bit"
    # Mix'n'Match fills narrow layers with zeros, and masks compute all neurons: other sums of the same numbers.
    torch.testing.assert_close(logits(extracted, text), sliced, rtol=1e-4, atol=1e-4)
    for mlp, width in zip(gated_mlps(made), widths, strict=True):
        mlp.__dict__["forward"] = masked(mlp, width)
    torch.testing.assert_close(logits(made, text), sliced, rtol=1e-4, atol=1e-4)
    for mlp in gated_mlps(made):
        del mlp.__dict__["forward"]
    # At full width the slice is the plain model; else, the control, it is not.
    same = (logits(made, text) - sliced).norm() < 1e-5 * sliced.norm()
    assert bool(same) == (widths == [48, 48, 48])
    others = sub_model(made, widths=[24] * LAYERS)
    assert (logits(others, text) - sliced).norm() > 1e-2 * sliced.norm()


def test_neurons_that_do_not_run_have_no_gradient() -> None:
    made, batch = plain(), batch_of(texts([12, 7], 4))
    with with_first_neurons(gated_mlps(made), [12] * LAYERS):
        step_of(CausalLMDrafter(made), batch).backward()
    for mlp in gated_mlps(made):
        for gradient in (mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad, mlp.down_proj.weight.grad.T):
            assert not gradient[12:].any()
            assert gradient[:12].norm() > 0
    # The control: the whole model.
    made.zero_grad()
    step_of(CausalLMDrafter(made), batch).backward()
    assert all(mlp.gate_proj.weight.grad[12:].any() for mlp in gated_mlps(made))


def test_the_loss_is_the_sum_of_those_of_all_widths() -> None:
    made, batch = plain(), batch_of(texts([12, 7], 4))
    parts = [sub_model(made, widths=[width] * LAYERS) for width in (12, 24, 48)]
    totals = [step_of(CausalLMDrafter(part), batch) for part in parts]
    total = step_of(drafter_of(made), batch)
    torch.testing.assert_close(total, torch.stack(totals).sum())
    # In validation only the whole model runs.
    torch.testing.assert_close(step_of(drafter_of(made).eval(), batch), totals[-1])
    assert total > 2 * totals[-1]
    total.backward()
    wanted = made.model.layers[0].self_attn.q_proj.weight.grad
    made.zero_grad()
    drafter = drafter_of(made)
    drafter.recompute_activations()
    step_of(drafter, batch).backward()
    found = made.model.layers[0].self_attn.q_proj.weight.grad
    assert (found - wanted).norm() < 1e-5 * wanted.norm(), "recomputed layers run the neurons that they ran"


def test_one_width_a_step_is_drawn_by_the_number_of_the_step() -> None:
    made, batch = plain(), batch_of(texts([12, 7], 4))
    parts = [sub_model(made, widths=[width] * LAYERS) for width in (12, 24, 48)]
    totals = [float(step_of(CausalLMDrafter(part), batch).detach()) for part in parts]
    drafter = drafter_of(made, one_a_step=True)
    drawn = [float(step_of(drafter, replace(batch, step=step)).detach()) for step in range(24)]
    again = [float(step_of(drafter, replace(batch, step=step)).detach()) for step in range(24)]
    assert drawn == again
    found = [min(range(3), key=lambda number: abs(totals[number] - one)) for one in drawn]
    assert {*found} == {0, 1, 2}
    assert max(abs(totals[number] - one) for number, one in zip(found, drawn, strict=True)) < 1e-3


def test_distillation_adds_the_divergence_from_the_whole_model() -> None:
    made, batch = plain(), batch_of(texts([12, 7], 4))
    without, with_it = (float(step_of(drafter_of(made, distill=weight), batch).detach()) for weight in (0.0, 0.5))
    whole_BTD = CausalLMDrafter(made)(batch).states_BTD[1].detach()
    rows = replace(batch, target_rows=LiveRows(made, whole_BTD))
    parts = [CausalLMDrafter(sub_model(made, widths=[width] * LAYERS)) for width in (12, 24)]
    kl = [float(batch_loss(part, ForwardKL(ForwardKLSettings()), rows, vocab_size=50).total.detach()) for part in parts]
    assert min(kl) > 0.1
    assert abs(with_it - without - 0.5 * sum(kl)) < 1e-3 * sum(kl)


def slice_of(target: Target, listener: Any = None, **settings: Any) -> Any:
    return make(FFNSliceSettings(**settings), Surroundings(target, None, listener))


@pytest.fixture(scope="module")
def target() -> Target:
    made = random_llama(num_layers=LAYERS).double()
    return Target(made, byte_tokenizer(), name="tiny", fingerprint="")


@pytest.mark.parametrize("keys", ["shared", "own"])
def test_greedy_output_of_a_slice_is_the_targets_own(target: Target, keys: str) -> None:
    ledger = Ledger()
    found = decode(
        target, slice_of(target, ledger.append, share=0.5, keys=keys), new=24, stop_tokens=(), listener=ledger.append
    )
    assert [one.tokens for one in found] == [greedy(target, prompt, 24) for prompt in PROMPTS]
    assert any(one.num_accepted for g in found for one in g.rounds)
    # A draft call reads fewer weights than a target call.
    name = "drafter" if keys == "own" else "target with its first neurons"
    drafts = [event.work.weight_bytes for event in ledger.events if event.model == name and not event.prefill]
    calls = [event.work.weight_bytes for event in ledger.events if event.model == "target" and not event.prefill]
    left_out = sum(3 * mlp.gate_proj.weight.numel() * 8 // 2 for mlp in gated_mlps(target.model))
    assert {*drafts} == {max(calls) - left_out}


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", [False, True])
def test_sampled_output_of_a_slice_with_shared_keys_has_the_targets_distribution(spoiled: bool) -> None:
    """Control: rows of q that belong to other tokens."""
    made = random_llama(num_layers=LAYERS, vocab_size=8, hidden_size=16).double()
    small = Target(made, byte_tokenizer(), name="small", fingerprint="")
    proposer = slice_of(small, share=0.5)
    if spoiled:
        propose = proposer.propose

        def with_other_rows(*arguments: Any) -> Any:
            found = propose(*arguments)
            return [
                one if one.q_rows_RV is None else replace(one, q_rows_RV=one.q_rows_RV.roll(1, dims=-1))
                for one in found
            ]

        proposer.propose = with_other_rows
    assert (chi_square(made, proposer, 1.0, samples=1000, target=small) < 1e-3) == spoiled


def test_shared_keys_change_the_drafts_and_not_the_output(target: Target) -> None:
    prompts = [Prompt(str(i), [1 + i, 2, 3 + i, 4, 5, 6 + i]) for i in range(6)]
    found = {
        keys: decode(target, slice_of(target, share=0.5, keys=keys), prompts=prompts, new=24, stop_tokens=())
        for keys in ("shared", "own")
    }
    texts_of = {keys: [one.tokens for one in some] for keys, some in found.items()}
    assert texts_of["shared"] == texts_of["own"]
    drafts = {keys: [[one.num_accepted for one in g.rounds] for g in some] for keys, some in found.items()}
    assert drafts["shared"] != drafts["own"]


def test_what_has_no_nested_widths_is_refused(target: Target) -> None:
    with pytest.raises(CheckpointError, match=r"0\.3 of .* feed-forward neurons is not a whole number"):
        slice_of(target, share=0.3)
    with pytest.raises(CheckpointError, match="widths: one for each of 3 layers is needed, got 2"):
        sub_model(plain(), widths=[12, 12])
    with pytest.raises(CheckpointError, match=r"layers must be 1\.\.3 for this drafter, got 4"):
        sub_model(plain(), num_layers=4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"widths": [0.5, 0.25]}, "widths: at least one share, ascending"),
        ({"widths": []}, "widths: at least one share"),
        ({"one_a_step": True, "distill": 0.5}, "distill: the whole model does not run"),
        ({"tokenizer": "x"}, "tokenizer: a matformer"),
    ]
    for given, why in cases:
        assert why in "; ".join(MatFormerSettings(**given).check())
    assert not MatFormerSettings().check()
    quantized = plain()
    quantized.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(
        CheckpointError, match=r"first feed-forward neurons: the weights are quantized \(bitsandbytes\)"
    ):
        gated_mlps(quantized)
    mlp = gated_mlps(plain())[0]
    states = torch.randn(1, 3, 32)
    assert torch.equal(run(mlp, 48, states), mlp(states))
