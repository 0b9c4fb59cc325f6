"""A dense model made of a mixture of experts: each block gets one feed-forward block, made of the experts that it routes most to.

T = tokens, K = experts of a token, E = experts of a block, F = neurons of an expert, W = neurons of the dense block, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.drafters.causal_lm.cut import settings_that_differ
from drafttrain.drafters.causal_lm.cut_settings import CutSettings
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.block_range import replaced_forwards
from drafttrain.target_model.documents import probe
from drafttrain.target_model.logits import TOLERANCE
from drafttrain.target_model.number_type import refuse_quantized

DENSE_KINDS = {"mixtral": "mistral", "qwen3_moe": "qwen3"}
"""By model type of a mixture of experts, the type of the same model with dense feed-forward blocks."""
OF_EXPERTS = ("model_type", "architectures", "intermediate_size", "transformers_version")
"""Config fields that are not those of the mixture."""


@dataclass(frozen=True)
class FeedForward:
    """A gate/up/down block."""

    gate_WD: Tensor
    up_WD: Tensor
    down_DW: Tensor

    def widened(self, width: int) -> FeedForward:
        """Return the same function with more neurons, whose weights are 0."""
        more = width - len(self.gate_WD)
        pad = torch.nn.functional.pad
        return FeedForward(
            pad(self.gate_WD, (0, 0, 0, more)), pad(self.up_WD, (0, 0, 0, more)), pad(self.down_DW, (0, more))
        )


def dense_from(model: Any, cut: CutSettings) -> Any:
    """Return a dense causal LM with all blocks of a mixture of experts. Attention, norms, embedding and head are its own.

    Side by side, the block computes sum_e s_e E_e(x) over the chosen experts, s_e their mean gates, scaled to the sum of all gates. It is
    the mixture itself where gates are constant and no expert is left out, or where all experts are the same. Averaged, it has the
    weighted mean of their weights, which is the mixture in the second case only.

    Raises:
        CheckpointError: The model is no mixture of a known kind, its gates are of another form, or the dense model differs elsewhere.
    """
    assert cut.experts is not None, "the caller checks it"
    assert cut.shares is not None, "the run measures the shares before it makes the drafter"
    config = dense_config(model, cut)
    check_shares(model, cut.shares, experts=cut.experts)
    fresh = _built(config, model)
    made = [
        _joined(block.mlp, shares_E, cut) if is_sparse(block) else _of(block.mlp)
        for block, shares_E in zip(_blocks(model), cut.shares, strict=True)
    ]
    weights = {name: tensor.detach().float() for name, tensor in model.state_dict().items() if ".mlp." not in name}
    found = fresh.load_state_dict(weights, strict=False)
    missing = [name for name in found.missing_keys if ".mlp." not in name]
    with torch.no_grad():
        for block, one in zip(_blocks(fresh), made, strict=True):
            wide = one.widened(config.intermediate_size)
            block.mlp.gate_proj.weight.copy_(wide.gate_WD)
            block.mlp.up_proj.weight.copy_(wide.up_WD)
            block.mlp.down_proj.weight.copy_(wide.down_DW)
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} has no place in it" for name in found.unexpected_keys]
    if problems := problems or _differences(model, fresh):
        raise CheckpointError(
            f"drafter.cut.experts: a dense {config.model_type} does not work as this {model.config.model_type} does outside its experts: "
            f"{'; '.join(problems[:3])}. Leave experts out"
        )
    return fresh


def dense_config(model: Any, cut: CutSettings) -> Any:
    """Return the configuration of the dense model; a dense block is as wide as the widest one.

    Raises:
        CheckpointError: The model is no mixture of a known kind, has fewer experts, or is quantized.
    """
    from transformers import CONFIG_MAPPING

    refuse_quantized(model, "drafter.cut.experts")
    given = model.config
    if given.model_type not in DENSE_KINDS or not any(map(is_sparse, _blocks(model))):
        raise CheckpointError(
            f"drafter.cut.experts: the target must be a mixture of experts of type {' or '.join(DENSE_KINDS)}, this one is a "
            f"{given.model_type}{'' if given.model_type not in DENSE_KINDS else ' without experts'}: leave it out"
        )
    assert cut.experts is not None, "the caller checks it"
    widths = []
    for block in _blocks(model):
        if is_sparse(block):
            total, width = len(block.mlp.experts.down_proj), block.mlp.experts.down_proj.shape[-1]
            if cut.experts > total:
                raise CheckpointError(f"drafter.cut.experts must be 1..{total} for this target, got {cut.experts}")
            widths.append(width * (cut.experts if cut.join == "side_by_side" else 1))
        else:
            widths.append(block.mlp.gate_proj.weight.shape[0])
    kind: Any = CONFIG_MAPPING[DENSE_KINDS[given.model_type]]
    own = kind().to_dict()
    fields = {name: value for name, value in given.to_dict().items() if name in own and name not in OF_EXPERTS}
    return kind(**fields, intermediate_size=max(widths))


def _blocks(model: Any) -> list[Any]:
    return list(blocks(model))


def is_sparse(block: Any) -> bool:
    """Return whether a block routes each token to some of its experts."""
    return hasattr(block.mlp, "experts") and hasattr(block.mlp, "gate")


def check_shares(model: Any, shares: Sequence[Sequence[float]], *, experts: int) -> None:
    """Refuse shares that are not those of this model's experts.

    Raises:
        CheckpointError: Naming the first block that differs, or that routes to fewer experts than are asked for.
    """
    counts = [len(block.mlp.experts.down_proj) if is_sparse(block) else 0 for block in _blocks(model)]
    if len(shares) != len(counts):
        raise CheckpointError(
            f"drafter.cut.shares: one list for each of {len(counts)} layers is needed, got {len(shares)}"
        )
    for number, (own, count) in enumerate(zip(shares, counts, strict=True)):
        if len(own) != count:
            raise CheckpointError(f"drafter.cut.shares: layer {number} has {count} experts, got {len(own)} shares")
        if count and not any(own):
            raise CheckpointError(f"drafter.cut.shares: layer {number} has no share above 0")


@torch.no_grad()
def routing_shares(target: Target, records: Sequence[Record]) -> list[list[float]]:
    """Return, by block, the mean gate of each expert over all tokens of some texts; empty for a dense block.

    Raises:
        CheckpointError: A gate does not return (logits, scores_TK, experts_TK).
    """
    # Otherwise its short forwards would be counted.
    probe(target.model)
    sums: dict[int, Tensor] = {}
    handles = []

    def note(number: int, count: int) -> Callable[..., None]:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            if not (isinstance(output, tuple) and len(output) == 3 and output[1].shape == output[2].shape):
                raise CheckpointError(
                    "drafter.cut.experts: the gates of this target return no (logits, scores, experts)"
                )
            _, scores_TK, experts_TK = output
            # Every token's gates in double precision: sums of many small numbers.
            own_E = scores_TK.new_zeros(count, dtype=torch.float64)
            own_E.index_add_(0, experts_TK.flatten(), scores_TK.flatten().double())
            sums[number] = sums.get(number, 0) + own_E.cpu()

        return hook

    stack = _blocks(target.model)
    for number, block in enumerate(stack):
        if is_sparse(block):
            hook = note(number, len(block.mlp.experts.down_proj))
            handles.append(block.mlp.gate.register_forward_hook(hook))
    try:
        for record in records:
            tokens_1T = torch.tensor(record.tokens, dtype=torch.long)[None]
            target.read(tokens_1T, torch.arange(tokens_1T.shape[1])[None], TargetNeeds(final=True))
    finally:
        for handle in handles:
            handle.remove()
    num_tokens = sum(len(record.tokens) for record in records)
    return [(sums[number] / num_tokens).tolist() if number in sums else [] for number in range(len(stack))]


def _joined(mlp: Any, shares: Sequence[float], cut: CutSettings) -> FeedForward:
    """Return the chosen experts as one block. Experts of equal share: the first."""
    share_E = torch.tensor(shares, dtype=torch.float32)
    chosen_K = share_E.argsort(descending=True, stable=True)[: cut.experts].sort().values
    part_K = share_E[chosen_K] / share_E[chosen_K].sum()
    experts = mlp.experts
    chosen_K = chosen_K.to(experts.down_proj.device)
    gate_up_KFD = experts.gate_up_proj.detach()[chosen_K].float()
    gate_KFD, up_KFD = gate_up_KFD.chunk(2, dim=1)
    down_KDF = experts.down_proj.detach()[chosen_K].float()
    weight_K11 = part_K.to(down_KDF.device)[:, None, None]
    total = float(share_E.sum())
    if cut.join == "averaged":
        gate_FD, up_FD, down_DF = ((weight_K11 * one).sum(dim=0) for one in (gate_KFD, up_KFD, down_KDF))
        return FeedForward(gate_FD, up_FD, total * down_DF)
    down_DW = (total * weight_K11 * down_KDF).transpose(0, 1).flatten(1)
    return FeedForward(gate_KFD.flatten(0, 1), up_KFD.flatten(0, 1), down_DW)


def _of(mlp: Any) -> FeedForward:
    return FeedForward(*(getattr(mlp, name).weight.detach().float() for name in ("gate_proj", "up_proj", "down_proj")))


def _built(config: Any, model: Any) -> Any:
    from transformers import AutoModelForCausalLM

    device = model.get_input_embeddings().weight.device
    built = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=model.config._attn_implementation
    )
    return built.eval().to(device)


@torch.no_grad()
def _differences(model: Any, fresh: Any) -> list[str]:
    """Return how the dense model differs from the mixture, if both have the same feed-forward blocks."""
    found = [
        problem
        for number, (block, own) in enumerate(zip(_blocks(model), _blocks(fresh), strict=True))
        for problem in settings_that_differ(block.self_attn, own.self_attn, old=number, new=number, width=None)
    ]

    def through(mlp: Any) -> Callable[..., Tensor]:
        return lambda states, *_, **__: mlp(states.float()).to(states.dtype)

    pairs = zip(_blocks(model), _blocks(fresh), strict=True)
    tokens_BT = torch.arange(1, 9, device=model.get_input_embeddings().weight.device)[None] % model.config.vocab_size
    with replaced_forwards({block.mlp: through(own.mlp) for block, own in pairs}):
        wanted_BTV = model(input_ids=tokens_BT, use_cache=False).logits.float()
    difference = float((fresh(input_ids=tokens_BT, use_cache=False).logits - wanted_BTV).abs().max())
    largest = float(wanted_BTV.abs().max())
    if difference > TOLERANCE[model.dtype] * largest:
        found.append(f"its logits differ by {difference / largest:.1%} of the largest logit")
    return found
