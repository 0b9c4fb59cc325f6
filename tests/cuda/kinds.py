"""Tiny settings of every kind of drafter. What is registered and not named here is made as its defaults say, so it is tried too."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drafttrain.config.load import read_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.config.searched import is_searched, searched_kinds
from drafttrain.drafters import drafters


@dataclass(frozen=True)
class Kind:
    """One way to train: a drafter, its loss, and what it reads of its data."""

    drafter: dict[str, Any]
    loss: dict[str, Any] | None = field(default_factory=lambda: {"kind": "forward_kl"})
    data: dict[str, Any] = field(default_factory=dict)


GENERATED = {
    "generate": {
        "prompts": {"kind": "text", "path": "TEXT"},
        "prompt_tokens": 6,
        "num_records": 8,
        "max_new_tokens": 12,
        "temperatures": [0.0, 0.7],
        "batch_size": 4,
    },
    "sources": [{"kind": "generated"}],
}

KINDS: dict[str, Kind] = {
    "causal_lm": Kind(
        {"kind": "causal_lm", "num_layers": 1, "hidden_size": 32, "num_heads": 1},
        {"kind": "tvdpp", "scope": "batch"},
        GENERATED,
    ),
    "sorted_lm": Kind(
        {"kind": "sorted_lm", "num_layers": 2, "exits": [1], "hidden_size": 32, "num_heads": 1}, {"kind": "forward_kl"}
    ),
    "matformer": Kind(
        {
            "kind": "matformer",
            "num_layers": 1,
            "hidden_size": 32,
            "num_heads": 1,
            "intermediate_size": 64,
            "distill": 0.5,
        }
    ),
    "medusa": Kind({"kind": "medusa", "num_heads": 2}, {"kind": "ce"}, {"cache": "full"}),
    "medusa2": Kind({"kind": "medusa", "num_heads": 2, "joint": {"lora": {"rank": 2}}}, {"kind": "ce"}),
    "consistency": Kind(
        {"kind": "consistency", "block": 4, "tune": {"lora": {"rank": 2}}},
        {"kind": "forward_kl"},
        GENERATED | {"generate": GENERATED["generate"] | {"temperatures": [0.0]}},
    ),
    "consistency_whole": Kind(
        {"kind": "consistency", "block": 4, "tune": {"lora": None}},
        {"kind": "ce"},
        GENERATED | {"generate": GENERATED["generate"] | {"temperatures": [0.0]}},
    ),
    "lexical_units": Kind(
        {
            **{"kind": "lexical_units", "look_ahead_token_id": 1, "ahead": 2, "threshold": 0.001},
            "tune": {"lora": {"rank": 2}},
        },
        {"kind": "forward_kl"},
        GENERATED,
    ),
    "hamburger": Kind(
        {
            **{"kind": "hamburger", "segment": 3, "low_entropy": 4.9, "continue_above": 0.4, "num_layers": 1},
            "tune": {"lora": {"rank": 2}},
        },
        {"kind": "forward_kl"},
        GENERATED,
    ),
    "kangaroo": Kind({"kind": "kangaroo", "exit_layer": 1}, {"kind": "forward_kl"}, {"cache": "top_k"}),
    "early_exit": Kind({"kind": "early_exit", "exit_layer": 1, "rotation": 1, "tune": {"lora": {"rank": 2}}}),
    "eagle": Kind({"kind": "eagle", "num_steps": 2}),
    "eagle3": Kind({"kind": "eagle3", "num_steps": 2}, {"kind": "lk_hybrid"}, {"cache": "states"}),
    "eagle3_cut": Kind({"kind": "eagle3", "num_steps": 2, "draft_vocab_size": 128}, {"kind": "lk_hybrid"}),
    "mtp": Kind(
        {"kind": "mtp", "init": "random", "layout": "mimo", "num_steps": 2, "feed": "own"},
        {"kind": "lk_hybrid"},
        {"cache": "states"},
    ),
    "chimera": Kind({"kind": "chimera", "num_steps": 3, "draft_vocab_size": 128}, {"kind": "ce"}, {"cache": "states"}),
    "hidden_transfer": Kind({"kind": "hidden_transfer", "num_steps": 3, "layers": [1, 1, 2]}),
    "dflash": Kind(
        {
            **{"kind": "dflash", "num_layers": 1, "taps": [1], "block_size": 4, "anchors": 4, "mask_token_id": 0},
            **{"head_dim": 16},
        }
    ),
    "dspark": Kind(
        {
            **{"kind": "dspark", "num_layers": 1, "taps": [1], "block_size": 4, "anchors": 4, "mask_token_id": 0},
            **{"head_dim": 16, "markov_rank": 8, "markov_head": "rnn"},
        },
        {
            "kind": "sum",
            "terms": [
                {"loss": {"kind": "ce"}, "weight": 0.1},
                {"loss": {"kind": "tvd"}, "weight": 1.8},
                {"loss": {"kind": "confidence"}},
            ],
        },
    ),
    "p_eagle": Kind({"kind": "p_eagle", "num_layers": 2, "num_depths": 3, "mask_token_id": 0}),
    "p_eagle_own": Kind(
        {
            **{"kind": "p_eagle", "num_layers": 1, "num_depths": 3, "mask_token_id": 0, "draft_vocab_size": 128},
            **{"train_embedding": True, "fc_norm": True},
        }
    ),
    "jetspec": Kind(
        {
            **{"kind": "dflash", "num_layers": 1, "block_size": 4, "anchors": 4, "mask_token_id": 0, "causal": True},
            **{"sample_from_anchor": True, "draft_vocab_size": 128},
        }
    ),
    "xpress": Kind(
        {
            **{"kind": "xpress", "num_layers": 1, "block_size": 4, "anchors": 4, "mask_token_id": 0},
            **{"head_dim": 16, "rank": 8, "mlp_hidden": 16, "num_candidates": 16},
        },
        {"kind": "ce"},
    ),
    "dflash2": Kind(
        {
            **{"kind": "dflash2", "num_layers": 1, "block_size": 4, "anchors": 4, "mask_token_id": 0},
            **{"head_dim": 16, "selector_rank": 8, "selector_top_k": 4},
        },
        {"kind": "ce"},
    ),
    "domino": Kind(
        {
            **{"kind": "domino", "num_layers": 1, "block_size": 4, "anchors": 4, "mask_token_id": 0},
            **{"head_dim": 16, "gru_hidden_dim": 16, "emb_dim": 8},
        },
        {"kind": "ce"},
    ),
}
KINDS |= {
    name: Kind({"kind": name})
    for name in drafters.names()
    if name not in {kind.drafter["kind"] for kind in KINDS.values()} and not is_searched(name)
}

SEARCHED = {name: Kind({"kind": name}, loss=None) for name in searched_kinds()}
"""Kinds without weights to train."""

ON_POLICY = Kind(
    KINDS["causal_lm"].drafter,
    {"kind": "reverse_kl"},
    {
        "on_policy": {
            **{"fraction": 0.5, "drafter_share": 0.5, "max_new_tokens": 6, "min_prompt_tokens": 6},
            **{"every_steps": 2, "batch_size": 2},
        }
    },
)
"""Answers by both models."""

TUNED = ("medusa2", "early_exit")
"""Kinds that train their target."""

NOTED = ("consistency", "lexical_units", "hamburger")

ON_TEXTS = [name for name, kind in KINDS.items() if kind.drafter["kind"] not in NOTED]
"""They train on texts alone; the others on what the target noted about each, which their recipes write first."""

CHAINS_ONLY = [name for name, kind in KINDS.items() if not drafters.entry(kind.drafter["kind"]).component.drafts_trees]
"""They draft no trees."""

IN_PROCESSES = "eagle3_cut"
"""The kind that several processes train."""


def drafter_settings(name: str) -> Any:
    """Return the settings of a kind's drafter."""
    return recipe((KINDS | SEARCHED)[name], target=Path("none"), folder=Path("none")).drafter


def loss_settings(name: str) -> Any:
    """Return the settings of the loss that a kind is trained with."""
    return recipe(KINDS[name], target=Path("none"), folder=Path("none")).loss


def recipe(kind: Kind, *, target: Path, folder: Path, device: str = "cuda:0", train: Any = None) -> Recipe:
    """Return the recipe that trains a kind on the texts of a folder: packed micro-batches under bf16-mixed.

    Args:
        device: Of the target.
        train: Further keys of that section.
    """
    prompts = str(folder / "prompts.jsonl")
    text = {"kind": "text", "path": str(folder / "text.txt")}
    data = json.loads(json.dumps(kind.data).replace("TEXT", text["path"]))
    content = {
        "name": "pretended",
        "target": {"model": str(target), "device": device, "dtype": "bfloat16"},
        "drafter": kind.drafter,
        "loss": kind.loss,
        "data": {"max_length": 40, "sources": [text], "cache_dtype": "bfloat16", **data},
        "train": {
            **{"max_steps": 3, "batch_size": 4, "records_per_device": 2, "warmup_steps": 0, "precision": "bf16-mixed"},
            **{"log_every_steps": 1, "checkpoint_every_steps": 2, "eval_every_steps": 2, "eval_prompts": 2},
            **{"loggers": ["csv"], "loss_chunk_rows": 16},
            **(train or {}),
        },
        "eval": {
            **{"prompts": prompts, "validation_prompts": prompts, "num_prompts": 2, "prompt_tokens": 6},
            **{"max_new_tokens": 6, "speed_prompts": 0, "batch_size": 2, "replay_lengths": [1, 2]},
            "temperatures": [0.0],
            "length": {"kind": "fixed", "num_draft_tokens": 2},
        },
    }
    return read_recipe(json.dumps(content), source=f"the recipe of {kind.drafter['kind']}")


def write_texts(folder: Path) -> None:
    """Write what the recipes read."""
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40, encoding="utf-8")
    lines = [json.dumps({"id": str(number), "text": f"prompt number {number} is here"}) for number in range(2)]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
