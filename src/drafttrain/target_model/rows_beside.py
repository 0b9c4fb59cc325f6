"""Rows of a proposer in the verifying call: after the nodes of each sequence, entering at some inner block.

B = sequences, N = nodes and rows of a call (the longest sequence's), M = nodes of all sequences, D = hidden
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from drafttrain.core.target_rows import TargetOutput
from drafttrain.target_model.anatomy import blocks, final_norm
from drafttrain.target_model.ragged_cache import Tree


class RowsBeside(Protocol):
    """What a proposer adds to the verifying call: a chain of rows after every node, of which no node knows, and which is never kept."""

    @property
    def layers(self) -> Sequence[int]:
        """The block that each row of a chain enters, not falling: what it was before nobody reads. `n`: after the last block."""
        ...

    def entering(self, row: int, states_MD: Tensor) -> Tensor:
        """Return what enters the block as the row of this number, from the states of the nodes there."""
        ...

    def receive(self, seen: Sequence[TargetOutput]) -> None:
        """Store the outputs at the rows of each sequence: node by node, as many of each as `layers`. Empty: the call had no rows."""
        ...


def read_with_rows(
    read: Callable[..., list[TargetOutput]],
    model: Any,
    added: RowsBeside,
    tokens: Sequence[Sequence[int]],
    parents: Sequence[Tree],
) -> list[TargetOutput]:
    """Return the outputs at the nodes of a call that has these rows too.

    Args:
        read: Reads tokens as trees.
    """
    sizes, count = [len(nodes) for nodes in tokens], len(added.layers)
    chains = [
        [node if not row else size + node * count + row - 1 for node in range(size) for row in range(count)]
        for size in sizes
    ]
    # Tokens of rows are read by blocks whose outputs nobody reads.
    whole = [[*nodes, *[0] * len(chain)] for nodes, chain in zip(tokens, chains, strict=True)]
    trees = [[*own, *chain] for own, chain in zip(parents, chains, strict=True)]
    with _entering(model, added, sizes, width=max(map(len, whole))):
        seen = read(whole, parents=trees)
    added.receive([_part(one, slice(size, None)) for one, size in zip(seen, sizes, strict=True)])
    return [_part(one, slice(size)) for one, size in zip(seen, sizes, strict=True)]


def _part(output: TargetOutput, rows: slice) -> TargetOutput:
    return output.each(lambda states: states[:, rows])


@contextlib.contextmanager
def _entering(model: Any, added: RowsBeside, sizes: Sequence[int], *, width: int) -> Iterator[None]:
    """Within this context the rows enter their blocks: before, their states are replaced."""
    stack, device, count = blocks(model), model.device, len(added.layers)
    nodes = [(sequence * width, size, node) for sequence, size in enumerate(sizes) for node in range(size)]
    # One copy to the device for both.
    places = [[first + node, first + size + node * count] for first, size, node in nodes]
    node_M, first_row_M = torch.tensor(places).T.to(device)

    def at(block: int) -> Any:
        rows = [row for row, layer in enumerate(added.layers) if layer == block]

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            states_BND: Tensor = args[0] if args else kwargs["hidden_states"]
            flat_RD = states_BND.flatten(0, 1)
            states_MD, changed_RD = flat_RD.index_select(0, node_M.to(flat_RD.device)), flat_RD.clone()
            for row in rows:
                changed_RD[first_row_M.to(flat_RD.device) + row] = added.entering(row, states_MD)
            changed_BND = changed_RD.view_as(states_BND)
            return ((changed_BND, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed_BND})

        return hook

    handles = [
        (stack[block] if block < len(stack) else final_norm(model)).register_forward_pre_hook(
            at(block), with_kwargs=True
        )
        for block in sorted(set(added.layers))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
