"""A target of nested widths drafts with the first neurons of its feed-forward blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from drafttrain.core.errors import CheckpointError
from drafttrain.core.roles import Proposer
from drafttrain.core.settings import setting
from drafttrain.drafters.causal_lm.cut import sub_model
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.drafters.layer_skip.proposer import LayerSkipProposer
from drafttrain.eval.proposers import Surroundings, proposers
from drafttrain.target_model.first_neurons import check_gated, gated_mlps, neurons_at
from drafttrain.target_model.sublayers import Skipped


@dataclass
class FFNSliceSettings:
    """The target with the first neurons of its feed-forward blocks (MatFormer)."""

    nodes_come_first: ClassVar[bool] = True

    share: float = setting(0.25, help="Share of the neurons: one that the target was trained with.", gt=0, lt=1)
    keys: Literal["shared", "own"] = setting(
        "shared",
        help="shared: read the target's keys and values of committed tokens, which a slice only approximates. own: its own, in a cache of "
        "its own, so acceptance is that of the extracted sub-model.",
    )


@proposers.register("ffn_slice", FFNSliceSettings)
class FFNSlice:
    """Makes the proposer of a slice.

    Source: Devvrit et al. 2023, MatFormer, arXiv 2310.07707, 4.1.2 (speculative decoding, shared attention cache).
    """

    @classmethod
    def create(cls, settings: FFNSliceSettings, surroundings: Surroundings) -> Proposer:
        """Return the proposer for this target.

        Raises:
            CheckpointError: The target's feed-forward blocks are not gated, or the share is not a whole number of neurons.
        """
        target = surroundings.target
        check_gated(target.model)
        widths = neurons_at(gated_mlps(target.model), settings.share)
        if settings.keys == "shared":
            if len(set(widths)) > 1:
                raise CheckpointError(
                    f"eval.beside: ffn_slice: blocks of {target.name} have {sorted(set(widths))} neurons at share {settings.share:g}: use keys: own"
                )
            return LayerSkipProposer(target, Skipped(first_neurons=widths[0]))
        model = sub_model(target.model, widths=widths).to(target.device, target.model.dtype).eval()
        sizes = {"target_vocab_size": target.vocab_size, "num_tokens": target.num_tokens}
        return ChainProposer(model, listener=surroundings.listener, **sizes)
