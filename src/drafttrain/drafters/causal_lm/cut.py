"""A model cut from a larger one: embedding, head, some blocks, some feed-forward neurons.

A drafter has some blocks of its target and their strongest neurons; a sub-model of a nested drafter has the first of both.

F = feed-forward width
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.block_range import replaced_forwards

BLOCK_NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "cross_attention_layers", "hybrid_layer_ids")
"""Config fields that list blocks by number. Any other list as long as the stack has one entry per block."""
FIRST_BLOCKS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
"""Config fields that count blocks from the first one."""
NOT_OF_BLOCKS = ("_token_id", "_multipliers", "_limit")
"""Suffixes of config lists that may happen to have as many entries as there are blocks, but are not by block."""
AT_ITS_PLACE = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "num_hidden_layers")
"""Suffixes of attributes in which a module stores its block's number, or the number of blocks."""
TOLERANCE = 1e-4
"""Largest difference of float32 logits, relative to the largest logit, that rounding explains."""


def cut_from(model: Any, layers: Sequence[int], *, width: int | None) -> Any:
    """Return a drafter made of some of the target's blocks. It computes exactly what they compute in the target.

    Args:
        layers: Numbers of the blocks, ascending.
        width: Feed-forward neurons to keep, the strongest of each block; None: all.

    Raises:
        CheckpointError: Its feed-forward block is not gate/up/down, or its configuration cannot describe these blocks alone.
    """
    return _of_blocks(
        model,
        layers,
        widths=None if width is None else [width] * len(layers),
        neurons=_strongest,
        what="drafter.init: target",
        instead="Use init: scratch or checkpoint, other layers, or another num_layers",
    )


def sub_model(model: Any, *, num_layers: int | None = None, widths: Sequence[int] | None = None) -> Any:
    """Return the model of the first blocks, with the first feed-forward neurons of each.

    A configuration has one width for all blocks: narrower ones are filled with neurons whose output weights are 0.

    Args:
        num_layers: None: all.
        widths: By block, its neurons; None: all.

    Raises:
        CheckpointError: The model has fewer blocks or neurons, or its configuration cannot describe these blocks alone.
    """
    total = len(blocks(model))
    count = total if num_layers is None else num_layers
    if not 1 <= count <= total:
        raise CheckpointError(f"its first layers must be 1..{total} for this drafter, got {count}")
    if widths is not None and len(widths) != count:
        raise CheckpointError(f"widths: one for each of {count} layers is needed, got {len(widths)}")
    instead = "Extract other sizes"
    return _of_blocks(model, range(count), widths=widths, neurons=_first_ones, what="its sub-model", instead=instead)


def _of_blocks(
    model: Any,
    kept: Sequence[int],
    *,
    widths: Sequence[int] | None,
    neurons: Callable[[Any, int], Tensor],
    what: str,
    instead: str,
) -> Any:
    total, width = len(blocks(model)), None if widths is None else max(widths)
    try:
        whole = copy.deepcopy(model).float().eval()
        if width is not None:
            assert widths is not None
            for index, own in zip(kept, widths, strict=True):
                _narrow(blocks(whole)[index], own, width, neurons)
        # Built from the configuration: what is trained is then exactly what loading the folder builds.
        fresh = type(model)(cut_config(model.config, kept, total=total, width=width)).float().eval()
        loaded = fresh.load_state_dict(_renumbered(whole, kept), strict=False)
        problems = [f"{name} is missing" for name in loaded.missing_keys]
        problems += [f"{name} has no place in it" for name in loaded.unexpected_keys]
        problems = problems or _differences(whole, fresh, kept, width=width)
    except CheckpointError:
        raise
    except Exception as error:  # third-party configurations, blocks and quantized weights raise anything
        problems = [" ".join(str(error).split())[:300]]
    if problems:
        raise CheckpointError(
            f"{what}: blocks {', '.join(map(str, kept))} of {type(model).__name__} do not work as a model of their own: "
            f"{'; '.join(problems[:3])}. {instead}"
        )
    return fresh.requires_grad_(True)


def cut_config(config: Any, kept: Sequence[int], *, total: int, width: int | None) -> Any:
    """Return the configuration of a model of these blocks alone: entries by block move with their block."""
    from transformers import PreTrainedConfig

    fields: dict[str, Any] = copy.deepcopy(config.to_dict())
    text = config.get_text_config()
    own = fields if text is config else next(fields[name] for name in fields if getattr(config, name, None) is text)
    names = {name: text.attribute_map.get(name, name) for name in ("num_hidden_layers", "intermediate_size")}
    of_all_models = PreTrainedConfig().to_dict()
    for name, value in own.items():
        if name not in of_all_models and not name.endswith(NOT_OF_BLOCKS):
            own[name] = _of_kept(name, value, kept, total=total)
    if "attention_types" in own and "attention_layers" in own:
        # GPT-Neo stores it twice: by block, and as patterns with repetitions.
        own["attention_types"] = [[[kind], 1] for kind in own["attention_layers"]]
    own[names["num_hidden_layers"]] = len(kept)
    if width is not None:
        own[names["intermediate_size"]] = width
    return type(config).from_dict(fields)


def _of_kept(name: str, value: Any, kept: Sequence[int], *, total: int) -> Any:
    if name in BLOCK_NUMBERS and isinstance(value, list | tuple):
        return [new for new, old in enumerate(kept) if old in value]
    if name in FIRST_BLOCKS and isinstance(value, int):
        return sum(old < value for old in kept)
    if isinstance(value, list | tuple) and len(value) == total:
        return [value[old] for old in kept]
    if isinstance(value, dict) and value and {*map(str, value)} <= {*map(str, range(total))}:
        new = {str(old): new for new, old in enumerate(kept)}
        return {type(key)(new[str(key)]): one for key, one in value.items() if str(key) in new}
    return value


def _renumbered(whole: Any, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return the weights of the chosen blocks under their new numbers, and all weights outside the blocks."""
    stack = blocks(whole)
    prefix = next(name for name, module in whole.named_modules() if module is stack) + "."
    new = {str(old): str(place) for place, old in enumerate(kept)}
    renumbered = {}
    for name, tensor in whole.state_dict().items():
        number, dot, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            renumbered[name] = tensor
        elif number in new:
            renumbered[prefix + new[number] + dot + rest] = tensor
    return renumbered


@torch.no_grad()
def _differences(whole: Any, fresh: Any, kept: Sequence[int], *, width: int | None) -> list[str]:
    """Return how the cut model differs from the target with all other blocks skipped."""
    found = [
        problem
        for new, old in enumerate(kept)
        for problem in settings_that_differ(blocks(whole)[old], blocks(fresh)[new], old=old, new=new, width=width)
    ]
    size = int(whole.get_input_embeddings().weight.shape[0])
    tokens_BT = torch.arange(1, 9)[None] % size
    tokens_BT = tokens_BT.to(whole.get_input_embeddings().weight.device)
    with without_blocks(whole, [index for index in range(len(blocks(whole))) if index not in kept]):
        wanted_BTV = whole(input_ids=tokens_BT, use_cache=False).logits
    fresh.to(tokens_BT.device)
    difference = float((fresh(input_ids=tokens_BT, use_cache=False).logits - wanted_BTV).abs().max())
    if difference > TOLERANCE * float(wanted_BTV.abs().max()):
        found.append(f"its logits differ by {difference / float(wanted_BTV.abs().max()):.1%} of the largest logit")
    return found


def without_blocks(model: Any, left_out: Collection[int]) -> AbstractContextManager[None]:
    """Within this context these blocks return their input. They are still computed: their output has the form of others'."""
    return replaced_forwards({block: _passing(block.forward) for i, block in enumerate(blocks(model)) if i in left_out})


def _passing(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that skips the block: it returns its input, in the type of the block's own output."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = own(hidden_states, *args, **kwargs)
        return type(output)([hidden_states, *output[1:]]) if isinstance(output, tuple | list) else hidden_states

    return forward


def settings_that_differ(block: nn.Module, cut: nn.Module, *, old: int, new: int, width: int | None) -> list[str]:
    """Return which attributes differ at a block's new place, such as a window that a short text does not reach."""
    pairs = zip(block.named_modules(), cut.modules(), strict=True)
    return [
        f"block {old} has {f'{path}.' if path else ''}{name} {value!r}, at position {new} it has {there!r}"
        for (path, module), other in pairs
        for name, value in _plain(module).items()
        if (there := vars(other).get(name)) != value
        and not name.endswith(AT_ITS_PLACE)
        and (width is None or there != width)
    ]


def _plain(module: nn.Module) -> Mapping[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, plain) and name[0] != "_"}


def _narrow(layer: Any, own: int, width: int, neurons: Callable[[Any, int], Tensor]) -> None:
    """Keep `own` feed-forward neurons, and fill up to `width` with neurons whose output weights are 0."""
    mlp = getattr(layer, "mlp", None)
    if mlp is None or not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
        raise CheckpointError("drafter.intermediate_size: this target has no gate/up/down feed-forward block to narrow")
    full = mlp.gate_proj.weight.shape[0]
    if not 1 <= own <= full:
        raise CheckpointError(f"drafter.intermediate_size, or the neurons of a sub-model, must be 1..{full}, got {own}")
    with torch.no_grad():
        kept = neurons(mlp, width)
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            linear = getattr(mlp, name)
            linear.weight = torch.nn.Parameter(linear.weight.index_select(dim, kept).clone())
            if linear.bias is not None and dim == 0:
                linear.bias = torch.nn.Parameter(linear.bias[kept].clone())
        mlp.down_proj.weight[:, own:] = 0


def _strongest(mlp: Any, width: int) -> Tensor:
    """Return the neurons with the largest product of weight norms, in their order."""
    strength_F = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
    return strength_F.topk(width).indices.sort().values


def _first_ones(mlp: Any, width: int) -> Tensor:
    return torch.arange(width, device=mlp.gate_proj.weight.device)
