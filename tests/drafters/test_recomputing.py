"""Activations computed again in the backward pass: the same loss and gradients, every layer of every step run twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import RecipeError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.drafts_itself import DraftsItself
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss, with_plan
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.training.test_compiled import KINDS

STACKS = [
    # The layers that hidden_transfer runs again are the target's: its own test counts them.
    *((kind, of_kind, loss) for kind, of_kind, loss in KINDS if kind not in ("medusa", "hidden_transfer")),
    ("mtp", {"init": "random", "num_steps": 3, "feed": "own"}, "forward_kl"),
    ("eagle", {"num_steps": 3}, "lk_hybrid"),
]
TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12, 40, 41], [20, 21, 22, 23, 24, 25]]


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama(num_layers=4), byte_tokenizer(), name="tiny", fingerprint="")


def step_of(drafter: Drafter, target: Target, loss: str) -> tuple[float, dict[str, Tensor], int, int]:
    """Return the loss, its gradients, how often a layer's first product ran, and the bytes that the forward kept."""
    records = [Record(str(n), text, [n > 1 for n in range(len(text))]) for n, text in enumerate(TEXTS)]
    made = losses.build(losses.entry(loss).settings(**({"scope": "batch"} if loss == "tvdpp" else {})))
    batch = with_plan(drafter, made, replace(pack(records, width=16, weight_of_step=1.0)[0], num_steps=2))
    needs = drafter.needs() | TargetNeeds(final=True)
    seen = target.read(batch.tokens_BT, batch.positions_BT, needs, documents=batch.packed_documents)
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _, __, ___, name=name: ran.append(name))
        for name, module in drafter.named_modules()
        if name.endswith(".q_proj")
    ]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def drafted(batch: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return drafter(batch)

    total = batch_loss(drafted, made, batch, vocab_size=target.num_tokens).total
    drafter.zero_grad()
    total.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: p.grad.clone() for name, p in drafter.named_parameters() if p.grad is not None}
    return float(total.detach()), gradients, len(ran), sum(kept.values())


@pytest.mark.parametrize(("kind", "of_kind", "loss"), STACKS)
def test_the_loss_and_its_gradients_are_the_same_and_each_layer_runs_again(
    kind: str, of_kind: dict[str, Any], loss: str, target: Target
):
    torch.manual_seed(0)
    entry: Any = drafters.entry(kind)
    drafter = entry.component.create(entry.settings(**of_kind), target=target, tokenizer=target.tokenizer).train()
    drafter.fit_vocabulary(lambda: np.arange(257))
    for parameter in drafter.parameters():
        # What starts at zero would hide the gradients of what comes before it.
        parameter.data += 0.02 * torch.randn_like(parameter)
    # The first forward of a model tries what it can do.
    step_of(drafter, target, loss)
    plain, gradients, once, kept = step_of(drafter, target, loss)
    drafter.recompute_activations()
    again, recomputed, twice, fewer = step_of(drafter, target, loss)
    assert again == plain
    assert recomputed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-7)
    assert once
    assert twice == 2 * once
    assert fewer < kept


def test_every_kind_with_layers_or_steps_can():
    kinds = {name: drafters.entry(name).component for name in drafters.names()}
    trained = {
        name: kind for name, kind in kinds.items() if kind.__module__.startswith("drafttrain.") and not kind.searched
    }
    cannot = {name for name, kind in trained.items() if not kind.recomputes and not issubclass(kind, DraftsItself)}
    assert cannot == {"medusa", "early_exit"}, (
        "a head is one block, whose inputs are what it would store; a tuned target is tuned during the forward only"
    )
    with pytest.raises(RecipeError, match="drafter medusa has no stack of layers"):
        load_recipe("tiny_medusa", ["train.activation_checkpointing=true"])
