"""Folders of known but unsupported kinds: one sentence that names the kind, instead of a line for every tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from drafttrain.drafters.dspark.dspark import DSpark
from drafttrain.importers import Given
from drafttrain.importers.dflash2 import ARCHITECTURES as DFLASH2
from drafttrain.importers.domino import is_domino
from drafttrain.importers.naming import unwrapped

SPECULATORS = "speculators_model_type"
READ = ("eagle3", "peagle", "dflash", "dspark")
"""The kinds of that format that are supported."""
KINDS = {
    "dflash2": "a DFlash2 drafter",
    "mtp": "layers of multi-token prediction",
    "xpress": "an XPress drafter",
}
"""Kinds by their names in speculators."""

QUANTIZED = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|g_idx|absmax|quant_map)$")


def why_unsupported(given: Given) -> str | None:
    """Return which unsupported kind a folder is, with the field or tensor that shows it; None: it may be supported."""
    given = unwrapped(given)
    for find, what in MARKS.items():
        if (mark := find(given)) is not None:
            return f"{mark}: {what}, which is not supported yet"
    kind = given.config.get(SPECULATORS)
    if kind in (None, *READ):
        return None
    what = KINDS.get(kind, "a drafter of an unknown kind") if isinstance(kind, str) else "not the name of a kind"
    return f"config.json: {SPECULATORS} is {kind!r}: {what}, which is not supported yet; in this format only {', '.join(map(repr, READ))} are"


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


def _markov_head_elsewhere(given: Given) -> str | None:
    """Return a tensor of a Markov head in a folder that is neither DeepSpec's nor speculators'."""
    known = DSpark.architecture in given.architectures or given.config.get(SPECULATORS) == "dspark"
    return None if known else _tensor(r"^markov_head\.")(given)


def _domino_elsewhere(given: Given) -> str | None:
    """Return an architecture of Domino in a folder without its projector in `dflash_config`."""
    return None if is_domino(given) else _architecture("Domino")(given)


MARKS: Mapping[Callable[[Given], str | None], str] = {
    _architecture(rf"^(?!({'|'.join(DFLASH2)})$).*DFlash2"): "a DFlash2 drafter of another layout",
    _architecture(rf"^(?!{DSpark.architecture}$).*DSpark"): "a DSpark drafter of another layout",
    _domino_elsewhere: "a Domino drafter of another layout",
    _markov_head_elsewhere: "a DSpark drafter of another layout",
    _architecture("MLPSpeculator"): "an MLP speculator",
    _architecture("LSTMSpeculator"): "an LSTM speculator",
    _architecture("MTP"): "layers of multi-token prediction",
    _field("hydra_num_heads"): "Hydra heads",
    _tensor(QUANTIZED.pattern): "quantized weights",
    _tensor(r"\.lora_[AB]\."): "a LoRA adapter (merge it into its model first)",
}
"""The mark of a kind, and the kind."""
