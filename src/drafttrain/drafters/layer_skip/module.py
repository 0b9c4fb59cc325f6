"""Layer skipping: the target drafts for itself without some of its attention and MLP sublayers. It has no weights of its own.

B = sequences, T = positions, L = blocks
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.console import progress, say
from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.files import write_text
from drafttrain.core.foreign import one_of, read_json
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.core.texts import Record
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.drafter import DRAFTS
from drafttrain.drafters.layer_skip.proposer import LayerSkipProposer
from drafttrain.drafters.layer_skip.rollout import draft_states
from drafttrain.drafters.layer_skip.search import Search, SearchSettings, as_chosen, as_skipped, spread
from drafttrain.drafters.layer_skip.windows import WindowScores, windows_of
from drafttrain.target_model import Target
from drafttrain.target_model.logits import head_of
from drafttrain.target_model.sublayers import Skipped, Sublayers

ROLLED_OUT = 6
"""Draft tokens that are replayed if no number is asked for."""


@dataclass
class LayerSkipSettings(SearchSettings):
    """The target without some of its sublayers. `fit` searches them: `train.max_steps` sets at most, on `train.batch_size` texts."""

    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: draft by sampling, or by argmax (then nodes are FIXED)."
    )


@drafters.register("layer_skip", LayerSkipSettings)
class LayerSkipDrafter(Drafter):
    """The target's first and last block, and the sublayers between them that the search leaves in; then the target's own head.

    Lag 0. It starts with sublayers at equal distances left out; `search` finds better ones. Only their numbers are stored.

    Sources: Xia et al. 2024, SWIFT, arXiv 2410.06916; Zhang et al. 2023, Draft & Verify (Self-Speculative decoding), arXiv 2309.08168.
    """

    kind = "layer_skip"
    searched = True
    lag = 0
    needs_target = True
    serving = """\
No serving engine leaves single sublayers out while it drafts; these figures are from the embedded evaluator. The authors' code
of SWIFT (hemingkx/SWIFT) and of Self-Speculative decoding (dilab-zju/self-speculative-decoding) does, for Llama targets: it takes
the lists `skipped_attention` and `skipped_mlp` of config.json.

    drafttrain eval DRAFTER --target TARGET"""

    def __init__(self, target: Target, settings: LayerSkipSettings, skipped: Skipped) -> None:
        super().__init__()
        self.settings = settings
        self.draft = settings.draft
        self.skipped = skipped
        self.score: float | None = None
        """Share of the labels that the draft's likeliest token is, in the search; None: not searched."""
        self._sublayers = Sublayers(target.model)

    @classmethod
    def create(cls, settings: LayerSkipSettings, *, target: Target | None, tokenizer: Any) -> LayerSkipDrafter:
        """Return the drafter that leaves out sublayers at equal distances."""
        if target is None:
            raise CheckpointError(
                "drafter.kind is 'layer_skip' but target.model is null: its sublayers are the target's"
            )
        num_blocks = Sublayers(target.model).num_blocks
        return cls(target, settings, as_skipped(spread(num_blocks, settings.ratio)))

    @classmethod
    def why_whole_target(cls, settings: Any) -> str | None:
        """Return that it runs the target's blocks."""
        return "kind layer_skip runs the target's own blocks"

    @property
    def device(self) -> torch.device:
        """That of the target."""
        device: torch.device = self._sublayers.model.get_input_embeddings().weight.device
        return device

    @property
    def num_blocks(self) -> int:
        """Of the target."""
        return self._sublayers.num_blocks

    def skipped_modules(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the attention modules and MLPs that do not run in a draft."""
        return self._sublayers.modules(self.skipped)

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of every depth."""
        states = draft_states(
            self._sublayers,
            self.skipped,
            batch.tokens_BT,
            batch.positions_BT,
            num_depths=batch.num_depths or ROLLED_OUT,
        )
        return DraftOutput(states, head_of(self._sublayers.model), self.lag)

    def search(self, target: Target, records: Sequence[Record], *, num_steps: int, seed: int, log: Path) -> int:
        """Search the sublayers to leave out; the score of a set is its matchness on windows of the texts."""
        self._sublayers.check()
        windows = windows_of(records, size=self.settings.window, seed=seed)
        if not windows:
            raise DataError(
                "layer_skip: no text has a label with a token before it, so sets of sublayers cannot be scored"
            )
        score = WindowScores(target, windows, self._sublayers)
        search = Search(2 * (self._sublayers.num_blocks - 2), as_chosen(self.skipped), self.settings, seed=seed)
        known = _read_log(log)
        with progress("searching sublayers to skip", total=num_steps, unit="sets") as bar, log.open("a") as file:
            while search.num_steps < num_steps and not search.ended:
                chosen = search.propose()
                if chosen not in known:
                    skipped = as_skipped(chosen)
                    known[chosen] = score(skipped)
                    file.write(json.dumps(_lists(skipped) | {"matchness": known[chosen]}) + "\n")
                    file.flush()
                search.observe(chosen, known[chosen])
                bar.advance(1)
        first = known[as_chosen(self.skipped)]
        self.skipped, self.score = as_skipped(search.best), search.best_score
        say(
            f"searched {search.num_steps} sets of {len(self.skipped)} sublayers: matchness {self.score:.3f} (at equal distances "
            f"{first:.3f}) without {self.skipped}"
        )
        return search.num_steps

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer; its calls are reported by the target that it shares."""
        return LayerSkipProposer(target, self.skipped, draft=self.draft)

    def save(self, folder: Path) -> None:
        """Write the numbers of the blocks; model.safetensors is empty."""
        config = {"model_type": self.kind, "num_hidden_layers": self._sublayers.num_blocks}
        config |= _lists(self.skipped) | {"matchness": self.score, "draft": self.draft}
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        save_file({}, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> LayerSkipDrafter:
        """Read the numbers of the blocks.

        Raises:
            CheckpointError: They are damaged, or of a target with another number of blocks.
        """
        path, sublayers = folder / "config.json", Sublayers(target.model)
        config = read_json(path)
        if config.get("num_hidden_layers") != sublayers.num_blocks:
            raise CheckpointError(
                f"{path}: made for a target of {config.get('num_hidden_layers')!r:.60} blocks, {target.name} has {sublayers.num_blocks}"
            )
        problems = [
            f"{name} must be numbers of different blocks, ascending, of 1..{sublayers.num_blocks - 2}, got {config.get(name)!r:.60}"
            for name in ("skipped_attention", "skipped_mlp")
            if not _are_blocks(config.get(name), last=sublayers.num_blocks - 2)
        ]
        if problems:
            raise CheckpointError(f"{path}: {'; '.join(problems)}")
        skipped = Skipped(tuple(config["skipped_attention"]), tuple(config["skipped_mlp"]))
        drafter = cls(target, LayerSkipSettings(draft=one_of(config, "draft", DRAFTS, path=path)), skipped)
        drafter.score = config.get("matchness")
        return drafter.eval()


def _lists(skipped: Skipped) -> dict[str, Any]:
    return {"skipped_attention": list(skipped.attention), "skipped_mlp": list(skipped.mlp)}


def _are_blocks(numbers: Any, *, last: int) -> bool:
    return (
        isinstance(numbers, list)
        and all(type(number) is int and 1 <= number <= last for number in numbers)
        and numbers == sorted(set(numbers))
    )


def _read_log(path: Path) -> dict[tuple[int, ...], float]:
    """Return the scores of a search that was interrupted, by set; a line that was not finished is removed."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    write_text(path, whole)
    lines: list[Mapping[str, Any]] = [json.loads(line) for line in whole.splitlines()]
    return {
        as_chosen(Skipped(tuple(line["skipped_attention"]), tuple(line["skipped_mlp"]))): line["matchness"]
        for line in lines
    }
