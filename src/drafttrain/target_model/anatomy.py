"""The parts of a Hugging Face causal LM: trunk, blocks, final norm. And hooks that read its hidden states.

B = sequences, T = positions, D = hidden
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds

BLOCK_PATHS = ("layers", "h", "blocks", "decoder.layers")
NORM_PATHS = (
    *("norm", "ln_f", "final_layer_norm", "decoder.final_layer_norm"),
    *("final_layernorm", "final_norm", "norm_f", "embedding_norm", "layer_norm", "layernorm"),
)


def trunk(model: Any) -> nn.Module:
    """Return the model without its head; its `last_hidden_state` is the state after the final norm."""
    base: nn.Module = model.base_model
    # Llama 4 looks for its trunk under a wrong name, so its `base_model` is the model itself.
    return base if base is not model else model.get_submodule("model")


def blocks(model: Any) -> nn.ModuleList:
    """Return the decoder blocks in order."""
    return _first(trunk(model), BLOCK_PATHS, model, "decoder blocks")


def stack_holder(model: Any) -> nn.Module:
    """Return the module that contains the blocks: the trunk, or its decoder. The first output is the final state."""
    stack = blocks(model)
    return next(module for module in trunk(model).modules() if any(child is stack for child in module.children()))


def are_alike(stack: nn.ModuleList) -> bool:
    """Return whether all blocks have weights of the same names and shapes, and the same kind of attention."""
    shapes = {tuple((name, tuple(p.shape)) for name, p in block.named_parameters()) for block in stack}
    kinds = {getattr(part, "sliding_window", None) for block in stack for part in block.children()}
    return len(shapes) == 1 and len(kinds) == 1


@contextlib.contextmanager
def only_first_block(model: Any) -> Iterator[int]:
    """Within this context the model has its first block alone; yield how many it has otherwise."""
    stack, holder = blocks(model), stack_holder(model)
    name = next(name for name, child in holder.named_children() if child is stack)
    setattr(holder, name, stack[:1])
    try:
        yield len(stack)
    finally:
        setattr(holder, name, stack)


def final_norm(model: Any) -> nn.Module:
    """Return the norm between the last block and the head."""
    return _first(trunk(model), NORM_PATHS, model, "a final norm")


@contextlib.contextmanager
def taps(model: Any, needs: TargetNeeds) -> Iterator[dict[int | str, Tensor]]:
    """Yield a dict that a forward fills: i -> state entering block i, and 'final' -> state after the final norm.

    It uses hooks, because in transformers 5 the last of `hidden_states` is already normed.
    """
    seen: dict[int | str, Tensor] = {}
    handles = []
    stack = blocks(model) if needs.hidden else ()

    def entering(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = args[0] if args else kwargs["hidden_states"]
            if state.ndim != 3:
                raise CheckpointError(
                    f"{type(model).__name__}: its blocks have {state.shape[-2]} residual streams, one is expected: drafters "
                    "that read its hidden states cannot be trained"
                )
            seen[index] = state

        return hook

    for index in needs.hidden:
        if not -1 <= index <= len(stack):
            raise CheckpointError(
                f"hidden state {index} does not exist: 0..{len(stack)} are allowed, and -1 for the last"
            )
        module = stack[index] if 0 <= index < len(stack) else final_norm(model)
        handles.append(module.register_forward_pre_hook(entering(index), with_kwargs=True))
    if needs.final:
        # Not the norm's output: OPT may have a projection after it, or no norm.
        holder = stack_holder(model)
        handles.append(holder.register_forward_hook(lambda *hooked: seen.__setitem__("final", hooked[2][0])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(module: nn.Module, paths: tuple[str, ...], model: Any, what: str) -> Any:
    for path in paths:
        with contextlib.suppress(AttributeError):
            return module.get_submodule(path)
    raise CheckpointError(f"{type(model).__name__}: {what} not found under any of {', '.join(paths)}")
