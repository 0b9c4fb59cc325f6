"""How checkpoints name a next-token-prediction layer, and how their engines run it.

Where engines differ, the layer is trained for one of them: `engine`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from drafttrain.core.errors import CheckpointError

Side = Literal["before_norm", "after_norm"]
"""A state before or after the norm that is applied to it for the head."""

Engine = Literal["vllm", "transformers"]

BLOCK = "block."
"""Own names of the decoder layer's tensors begin with it; in checkpoints they have no such prefix."""


@dataclass(frozen=True)
class Layout:
    """One way to store and to run the layer."""

    name: str
    prefix: str
    """Of the tensors of layer `{index}`."""
    parts: Mapping[str, str]
    """Name in the checkpoint by own name, for everything outside the decoder layer."""
    after_blocks: bool
    """The index continues that of the target's blocks; else it starts at 0."""
    hidden_first: bool
    """The projection reads [hidden ; embedding], not [embedding ; hidden]."""
    feature: Side
    """The target's last state that is read first: before or after its final norm."""
    fed_back: Side
    """The layer's own state that is read from the second draft token on: before or after the layer's last norm."""
    zero_first: bool
    """The embedding of slot 0 is zero."""
    copies: tuple[str, ...] = ()
    """Copies of the target's embedding and head, which the layer shares."""

    def index_for(self, num_blocks: int) -> int:
        """Return the index of the first layer."""
        return num_blocks if self.after_blocks else 0

    def prefix_for(self, num_blocks: int) -> str:
        """Return the prefix of the first layer's tensors."""
        return self.prefix.format(index=self.index_for(num_blocks))

    def stored(self, own: str) -> str:
        """Return the name in the checkpoint, without prefix, of one of the drafter's tensors."""
        if own.startswith(BLOCK):
            return own.removeprefix(BLOCK)
        name, _, kind = own.rpartition(".")
        return f"{self.parts[name]}.{kind}"

    def own(self, stored: str) -> str:
        """Return the drafter's name for a tensor in the checkpoint, without prefix."""
        name, _, kind = stored.rpartition(".")
        own = {theirs: ours for ours, theirs in self.parts.items()}
        return f"{own[name]}.{kind}" if name in own else f"{BLOCK}{stored}"


MIMO = Layout(
    name="mimo",
    prefix="model.mtp_layers.{index}.",
    parts={
        "embedding_norm": "token_layernorm",
        "hidden_norm": "hidden_layernorm",
        "fc": "input_proj",
        "norm": "final_layernorm",
    },
    after_blocks=False,
    hidden_first=True,
    feature="before_norm",
    fed_back="after_norm",
    zero_first=True,
)
"""vLLM 0.32.0, models/mimo.py and mimo_mtp.py."""

DEEPSEEK = Layout(
    name="deepseek",
    prefix="model.layers.{index}.",
    parts={"embedding_norm": "enorm", "hidden_norm": "hnorm", "fc": "eh_proj", "norm": "shared_head.norm"},
    after_blocks=True,
    hidden_first=False,
    feature="after_norm",
    fed_back="after_norm",
    zero_first=True,
    copies=("embed_tokens.weight", "shared_head.head.weight"),
)
"""vLLM 0.32.0, models/deepseek_mtp.py."""

LAYOUTS = {layout.name: layout for layout in (MIMO, DEEPSEEK)}

UNSUPPORTED = {"mtp.fc.weight": "Qwen3-Next", "mtp.layers.0.eh_proj.weight": "nested"}
"""Tensors of layouts that are known and not trained here."""


def layout_named(name: str, engine: Engine) -> Layout:
    """Return a layout as an engine runs it.

    Raises:
        CheckpointError: The engine does not run this layout.
    """
    layout = LAYOUTS[name]
    if engine == "vllm":
        return layout
    if layout is not DEEPSEEK:
        raise CheckpointError(f"drafter.engine: transformers does not run the {name} layout: only vllm does")
    # transformers 5.23.0, modeling_layers.MtpLayer: the same, except that no embedding is zeroed.
    return replace(layout, zero_first=False)


def layout_in(names: Iterable[str], num_blocks: int, *, where: str) -> Layout:
    """Return the layout of the layer in a checkpoint with these tensors.

    Raises:
        CheckpointError: There is no layer, more than one, or one of a layout that is not supported.
    """
    held = set(names)
    fc = {layout.name: f"{layout.prefix}{layout.parts['fc']}.weight" for layout in LAYOUTS.values()}
    first = {name: key.format(index=LAYOUTS[name].index_for(num_blocks)) for name, key in fc.items()}
    found = [name for name, key in first.items() if key in held]
    if not found:
        for key, what in UNSUPPORTED.items():
            if key in held:
                raise CheckpointError(
                    f"{where}: its next-token-prediction layer has the {what} layout ({key}): not supported"
                )
        looked_for = " and ".join(f"{key} ({name})" for name, key in first.items())
        raise CheckpointError(
            f"{where}: no next-token-prediction layer in its files: looked for {looked_for}. Give a target that has one, or "
            "set drafter.init: random"
        )
    layout = LAYOUTS[found[0]]
    second = fc[layout.name].format(index=layout.index_for(num_blocks) + 1)
    if second in held:
        raise CheckpointError(
            f"{where}: has several next-token-prediction layers ({first[layout.name]} and {second}): one layer that is applied "
            "to its own output is trained here"
        )
    return layout
