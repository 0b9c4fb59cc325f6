"""The part of its target that a drafter starts from, where training texts decide: layers by ablation, experts by routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Record
from drafttrain.drafters.causal_lm.ablation import layers_by_ablation
from drafttrain.drafters.causal_lm.cut_settings import are_layers
from drafttrain.drafters.causal_lm.dense import dense_config, routing_shares
from drafttrain.drafters.start_choice import StartChoice
from drafttrain.target_model import Target

CHOSEN = ("layers", "shares")
"""Settings of the cut that texts may decide."""


@dataclass(frozen=True)
class CutChoice(StartChoice):
    """What `cut.layers: ablation` and `cut.experts` leave open.

    Args:
        given: `CausalLMSettings`.
    """

    given: Any
    name: ClassVar[str] = "the part of the target that the drafter starts from"

    @property
    def num_texts(self) -> int:
        """Of the settings."""
        return int(self.given.cut.texts)

    def choose(self, target: Target, records: Sequence[Record]) -> Mapping[str, Any]:
        """Return the layers with the figures of the ablation, and the share of every expert."""
        cut, found = self.given.cut, dict[str, Any]()
        if cut.layers == "ablation":
            found |= layers_by_ablation(target, records, self.given.num_layers)
        if cut.measures_routing:
            dense_config(target.model, cut)
            found["shares"] = routing_shares(target, records)
            held = [sum(sorted(own)[-cut.experts :]) / sum(own) for own in found["shares"] if own]
            say(
                f"experts: the {cut.experts} that are routed to most have {min(held):.0%} to {max(held):.0%} of the gates of their layer, "
                f"on {len(records)} texts"
            )
        return found

    def settings(self, choice: Mapping[str, Any]) -> Any:
        """Return the settings with what was chosen.

        Raises:
            CheckpointError: It is not what these settings leave open.
        """
        chosen = {name: choice[name] for name in CHOSEN if name in choice}
        layers, shares = chosen.get("layers"), chosen.get("shares")
        cut, count = replace(self.given.cut, **chosen), self.given.num_layers
        if self.given.cut.layers == "ablation" and (not are_layers(layers) or cut.problems(num_layers=count)):
            raise CheckpointError(
                f"choice.json: layers must be {count} different whole numbers, ascending, got {layers!r:.60}: remove the file"
            )
        if self.given.cut.measures_routing and not (
            isinstance(shares, list) and all(isinstance(own, list | None) for own in shares)
        ):
            raise CheckpointError(
                f"choice.json: shares must be a list of numbers for each layer, got {shares!r:.60}: remove the file"
            )
        return replace(self.given, cut=cut)
