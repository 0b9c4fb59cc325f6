"""Folders of known but unsupported kinds: one sentence that names the kind, instead of a line for every tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from drafttrain.importers import Given
from drafttrain.importers.domino import is_domino
from drafttrain.importers.naming import unwrapped

SPECULATORS = "speculators_model_type"
DFLASH = "a DFlash drafter"
KINDS = {
    "dflash": DFLASH,
    "dflash2": "a DFlash2 drafter",
    "dspark": "a DSpark drafter",
}
KINDS |= {"mtp": "layers of multi-token prediction", "xpress": "an XPress drafter"}
"""Kinds by their names in speculators."""

QUANTIZED = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|g_idx|absmax|quant_map)$")


def why_unsupported(given: Given) -> str | None:
    """Return which unsupported kind a folder is, with the field or tensor that shows it; None: it may be supported."""
    given = unwrapped(given)
    for find, what in MARKS.items():
        if what == DFLASH and is_domino(given):
            continue
        if (mark := find(given)) is not None:
            return f"{mark}: {what}, which is not supported yet"
    kind = given.config.get(SPECULATORS)
    if kind in (None, "eagle3", "peagle"):
        return None
    what = KINDS.get(kind, "a drafter of an unknown kind") if isinstance(kind, str) else "not the name of a kind"
    return f"config.json: {SPECULATORS} is {kind!r}: {what}, which is not supported yet; in this format only 'eagle3' and 'peagle' are"


def _tensor(pattern: str) -> Callable[[Given], str | None]:
    """Return a function that finds a tensor by its name."""
    form = re.compile(pattern)

    def find(given: Given) -> str | None:
        name = next((name for name in sorted(given.tensors) if form.search(name)), None)
        return None if name is None else f"{given.files[name]}: {name}"

    return find


def _architecture(pattern: str) -> Callable[[Given], str | None]:
    """Return a function that finds a class by its name in config.json."""
    form = re.compile(pattern)

    def find(given: Given) -> str | None:
        name = next((name for name in sorted(given.architectures) if form.search(name)), None)
        ours = given.config.get(SPECULATORS) is not None
        return None if name is None or ours else f"config.json: architectures names {name}"

    return find


def _field(key: str) -> Callable[[Given], str | None]:
    """Return a function that finds a field of config.json that is not null."""
    return lambda given: None if given.config.get(key) is None else f"config.json: {key}"


MARKS: Mapping[Callable[[Given], str | None], str] = {
    _architecture("DFlash"): DFLASH,
    _field("dflash_config"): DFLASH,
    _architecture("DSpark"): "a DSpark drafter",
    _tensor(r"^markov_head\."): "a DSpark drafter",
    _architecture("MLPSpeculator"): "an MLP speculator",
    _architecture("LSTMSpeculator"): "an LSTM speculator",
    _architecture("MTP"): "layers of multi-token prediction",
    _field("hydra_num_heads"): "Hydra heads",
    _tensor(QUANTIZED.pattern): "quantized weights",
    _tensor(r"\.lora_[AB]\."): "a LoRA adapter (merge it into its model first)",
}
"""The mark of a kind, and the kind."""
