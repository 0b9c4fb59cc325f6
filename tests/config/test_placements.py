"""A drafter's class says where it can be trained: other placements are refused by key."""

from __future__ import annotations

import pytest

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import RecipeError


@pytest.mark.parametrize(
    ("recipe", "other", "override", "said"),
    [
        (
            "tiny_matformer",
            "tiny_eagle3",
            "train.deepspeed={stage: 3}",
            r"drafter\.kind matformer reads parts of weights",
        ),
        (
            "tiny_hidden_transfer",
            "tiny_eagle3",
            "train.device=cpu",
            r"train\.device: cpu: hidden_transfer trains inside the target",
        ),
    ],
)
def test_a_placement_that_a_kind_cannot_have_is_refused(recipe: str, other: str, override: str, said: str):
    load_recipe(other, [override])
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe, [override])
