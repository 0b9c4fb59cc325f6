"""drafttrain extract: a smaller drafter out of a nested one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from drafttrain.checkpoint import read_about
from drafttrain.commands.named_drafters import folders_of
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import check_folder
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.cut import sub_model
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.export.folder import read_config
from drafttrain.export.hf import export_hf
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.target_model.loading import load_causal_lm
from drafttrain.target_model.tokenizer import load_tokenizer


def extract(drafter: str, out: Path, *, num_layers: int | None, widths: Sequence[int] | None) -> None:
    """Write the first layers of a drafter, and the first feed-forward neurons of each, as a drafter of kind causal_lm.

    Args:
        num_layers: None: all.
        widths: One for all layers, or one for each; None: all neurons.

    Raises:
        CheckpointError: The drafter is no language model, or has fewer layers or neurons.
    """
    quiet_libraries()
    (source,) = folders_of([drafter])
    check_folder(source)
    about = read_about(source)
    if about is None or not issubclass(drafters.entry(about.kind).component, CausalLMDrafter):
        what = "a plain model, not a drafter folder" if about is None else f"of kind {about.kind}"
        raise CheckpointError(
            f"{source}: sub-models are extracted from a drafter that is a language model, this one is {what}"
        )
    if out.exists():
        raise CheckpointError(f"{out}: exists already. Choose another folder")
    model = load_causal_lm(source)
    count = model.config.num_hidden_layers if num_layers is None else num_layers
    sub = sub_model(
        model,
        num_layers=num_layers,
        widths=list(widths) * count if widths is not None and len(widths) == 1 else widths,
    )
    with TemporaryDirectory() as weights:
        sub.save_pretrained(weights)
        made = replace(about, kind="causal_lm")
        export_hf(Path(weights), out, tokenizer=load_tokenizer(source), about=made, dtype=read_config(source)["dtype"])
    parameters = [sum(weight.numel() for weight in one.parameters()) for one in (model, sub)]
    say(f"{out}: {parameters[1]:,} of {parameters[0]:,} parameters, a drafter of kind causal_lm")
