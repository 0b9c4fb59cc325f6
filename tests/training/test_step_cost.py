"""At the real sizes of a recipe for an 8 B model: what a step keeps, runs and needs, by tensors without numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from drafttrain.config.bundled import find_recipe
from drafttrain.config.load import load_recipe
from drafttrain.drafters import drafters
from drafttrain.losses import losses
from drafttrain.target_model import Target
from drafttrain.target_model.packed_attention import Columns
from drafttrain.training.step_cost import Counted, StepCost, Trained, step_cost
from tests.training.squares import Squares

ROWS, WIDTH = 2, 2048


class Sized(Target):
    @property
    def num_tokens(self) -> int:
        return self.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:  # type: ignore[override]
        return ()


def build(name: str = "eagle3_llama3.1_8b", *, blocks: int = 3, **of_drafter: Any) -> Trained:
    """Return what a recipe for Llama-3.1-8B trains, on a target of fewer layers of the same sizes."""
    recipe = load_recipe(name)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    target = Sized(model, None, name="", fingerprint="")
    component: Any = drafters.entry(recipe.drafter.kind).component
    drafter = component.create(replace(recipe.drafter, **of_drafter), target=target, tokenizer=None)
    return Trained(drafter, losses.build(recipe.loss), target, target.vocab_size, recipe.train)


def cost_of(name: str, **settings: Any) -> StepCost:
    """Return the cost of a micro-batch of the recipe."""
    recipe = load_recipe(name)
    rows, width = recipe.train.records_per_device, recipe.data.max_length
    return step_cost(lambda: build(name, **settings), rows=rows, width=width, accumulates=True)


def in_header(name: str) -> float:
    """Return the peak in the header of the recipe, in bytes."""
    peak = re.search(r"at the peak of a step +([\d.]+) GB", find_recipe(name).read_text(encoding="utf-8"))
    assert peak is not None
    return float(peak[1]) * 1e9


@pytest.fixture(scope="module", autouse=True)
def linear_of_torch() -> Iterator[None]:
    """Let torch multiply: ZeRO-3, once it ran in a process, leaves a function of its own there, which keeps other tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
        yield


@pytest.fixture(scope="module")
def counted(linear_of_torch: None) -> Iterator[tuple[StepCost, Squares]]:
    with Squares(WIDTH) as squares:
        cost = cost_of("eagle3_llama3.1_8b", num_steps=5)
    return cost, squares


@pytest.mark.long
def test_five_steps_keep_at_most_5_gb(counted: Any) -> None:
    cost, _ = counted
    assert 3e9 < cost.kept <= 5e9


def test_no_scores_exist(counted: Any) -> None:
    _, squares = counted
    assert not squares.found


def test_operations_are_those_that_are_needed(counted: Any) -> None:
    cost, _ = counted
    assert cost.needed <= cost.executed <= 1.1 * cost.needed


def test_memory_is_the_figure_in_the_header_of_the_recipe(counted: Any) -> None:
    """Of 29 layers more the target's own weights, 0.44 GB each, are all that comes on top."""
    cost, _ = counted
    assert cost.trained_bytes == pytest.approx(424_689_664 * 12, rel=1e-3)
    assert cost.memory + 29 * 2 * 218_112_000 == pytest.approx(in_header("eagle3_llama3.1_8b"), rel=0.02)


@pytest.mark.parametrize(
    ("name", "parameters"), [("medusa_llama3.1_8b", 2_168_471_552), ("kangaroo_llama3.1_8b", 67_117_056)]
)
def test_other_kinds_run_what_is_needed_and_take_what_their_headers_say(name, parameters):
    with Squares(WIDTH) as squares:
        cost = cost_of(name)
    assert not squares.found
    assert cost.needed <= cost.executed <= 1.01 * cost.needed
    assert cost.trained == parameters
    assert cost.trained_bytes == pytest.approx(12 * parameters, rel=1e-6)
    assert cost.memory + 29 * 2 * 218_112_000 == pytest.approx(in_header(name), rel=0.01)


@pytest.mark.slow
def test_pieces_are_those_of_the_device_whose_cost_is_counted() -> None:
    """A GPU has larger pieces of scores, which exist at once, and fewer of them, each up to the columns of its last block."""
    sizes: dict[str, Any] = {"num_layers": 1, "taps": [1], "anchors": 64, "mask_token_id": 0}
    made = lambda: build("dflash_qwen3_8b", **sizes)  # noqa: E731
    gpu, cpu = (step_cost(made, rows=1, width=512, device_type=device) for device in ("cuda", "cpu"))
    assert gpu.peak > cpu.peak
    assert cpu.needed == gpu.needed <= cpu.executed < gpu.executed


def test_prompts_are_neither_needed_nor_run() -> None:
    whole, half = (step_cost(lambda: build(num_steps=1), rows=1, width=256, prompt=prompt) for prompt in (0, 128))
    assert half.executed <= 1.1 * half.needed < 0.8 * whole.needed


def test_control_dense_attention_has_scores_and_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = step_cost(lambda: build(num_steps=1), rows=ROWS, width=WIDTH)

    def dense(self: Columns, query: Tensor, own: Any = (), *, scale: float | None = None) -> Tensor:
        keys, values = (x.unflatten(0, query.shape[::2]).transpose(1, 2) for x in (self.keys_NGd, self.values_NGd))
        groups = query.shape[1] // keys.shape[1]
        return (query @ keys.repeat_interleave(groups, 1).mT).softmax(-1) @ values.repeat_interleave(groups, 1)

    monkeypatch.setattr(Columns, "attend", dense)
    with Squares(WIDTH) as squares:
        cost = step_cost(lambda: build(num_steps=1), rows=ROWS, width=WIDTH)
    assert squares.found
    assert cost.kept > plain.kept + ROWS * 32 * WIDTH**2 * 2
    assert cost.executed > plain.executed


def test_memory_is_counted_until_it_is_let_go_of() -> None:
    with Counted() as counted:
        kept = torch.zeros(1000)
        for _ in range(5):
            kept = kept + torch.ones(1000)
        product = torch.ones(8, 4) @ torch.ones(4, 2)
    assert counted.peak == 3 * 4000
    assert counted.now == 4000 + product.numel() * 4
    assert counted.flops == 2 * 8 * 4 * 2
