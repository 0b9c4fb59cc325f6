"""Texts that the drafter writes during its training, alone or together with the target: on-policy distillation.

Which records of a source are drawn again is a pure function of how many were read before. A text is a pure function of its prompt,
its position in the stream of records, the weights at its draw, and the seed.

T = new tokens

Sources: Zhou et al. 2023, DistillSpec, arXiv 2310.08461 (mixtures by record); Liu et al. 2023, Online Speculative Decoding, arXiv
2310.07177 (mixtures by token).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from drafttrain.core.batches import DraftBatch, Late
from drafttrain.core.console import say
from drafttrain.core.random import stream
from drafttrain.core.texts import Record
from drafttrain.data_gen.decoding import continued
from drafttrain.data_gen.sampler import num_micro_batches
from drafttrain.data_gen.settings import OnPolicySettings
from drafttrain.data_gen.training_data import TrainingData
from drafttrain.distributed.collectives import own_share, shared
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM

DRAFTER, TARGET = "drafter", "target"


class OnPolicyData:
    """The data of a run in which the drafter in training writes answers.

    Args:
        data: The order of the records and their number stay as they are here.
        drafter: The causal LM that is trained; it is never changed here.
        target: Also says which ids can be drawn, and which end a text.
        num_steps: Optimizer steps of the training.
    """

    def __init__(
        self,
        data: TrainingData,
        settings: OnPolicySettings,
        *,
        drafter: Any,
        target: Target,
        num_steps: int,
        seed: int,
    ) -> None:
        self.data = data
        self.settings = settings
        self.drafter = drafter
        self.target = target
        self.num_steps = num_steps
        self.seed = seed
        self._version = -1
        """Optimizer steps that the drafter had taken at the draw of `_texts`; -1: there was none."""
        self._texts: dict[int, list[int]] = {}
        """The drawn answers by position in the stream of records."""

    def of_step(
        self,
        step: int,
        *,
        batch_size: int,
        records_per_device: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        multiple: int = 1,
    ) -> list[Late]:
        """Return the micro-batches of an optimizer step on one rank, made when the first of them is asked for."""
        layout: Any = {"batch_size": batch_size, "records_per_device": records_per_device, "world_size": world_size}

        @lru_cache(maxsize=1)
        def micro_batches() -> list[DraftBatch]:
            drawn = self.records(step, batch_size=batch_size)
            return self.data.of_step(step, rank=rank, multiple=multiple, drawn=drawn, **layout)

        return [Late(micro_batches, number) for number in range(num_micro_batches(**layout))]

    def records(self, step: int, *, batch_size: int) -> Mapping[int, Record]:
        """Return the drawn records of a step by their number within it; draw them first if that is due.

        All processes must call it: each draws a share, and has all of them afterwards.
        """
        first = step - step % self.settings.every_steps
        if first != self._version:
            assert step == first, (
                f"the answers of step {step} were drawn at step {first}, and the checkpoint lacks them"
            )
            stop = min(first + self.settings.every_steps, self.num_steps)
            self._texts = self._drawn(range(first * batch_size, stop * batch_size))
            self._version = first
        positions = range(step * batch_size, (step + 1) * batch_size)
        return {number: self._record(position) for number, position in enumerate(positions) if position in self._texts}

    def state_dict(self) -> dict[str, Any]:
        """Return the answers that are drawn and perhaps not trained yet."""
        texts = [[position, torch.tensor(text)] for position, text in self._texts.items()]
        return {"version": self._version, "texts": texts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._version = state["version"]
        self._texts = {position: text.tolist() for position, text in state["texts"]}

    def say_cost(self, *, batch_size: int) -> None:
        """Log what the draws add to a step."""
        asked = self.settings
        texts = asked.fraction * batch_size * asked.every_steps
        when = "in every step" if asked.every_steps == 1 else f"every {asked.every_steps} steps"
        writers = " and ".join(
            f"the current {name}" if name == DRAFTER else f"the {name}" for name, _ in self._writers()
        )
        say(
            f"on-policy: {when} {writers} draw the answers of {texts:g} records: up to {asked.max_new_tokens} forwards of one "
            f"token for each {asked.batch_size} of them; column draw_ms of metrics.csv has their time"
        )

    def _record(self, position: int) -> Record:
        prompt, new = self._prompt(position), self._texts[position]
        source, number = self.data.sampler.at(position)
        return Record(
            self.data.stores[source].ids[number],
            [*prompt, *new],
            [False] * len(prompt) + [True] * len(new),
            drawn_by=f"the drafter after {self._version} steps",
        )

    def _prompt(self, position: int) -> Sequence[int]:
        source, number = self.data.sampler.at(position)
        record = self.data.stores[source][number]
        begins = max(record.loss_mask.index(True), self.settings.min_prompt_tokens)
        return record.tokens[: min(begins, len(record.tokens) - 1)]

    def _writers(self) -> list[tuple[str, Any]]:
        """Return the models that draw tokens, the drafter first."""
        share = self.settings.drafter_share
        both = [(DRAFTER, self.drafter, share > 0), (TARGET, self.target.model, share < 1)]
        return [(name, model) for name, model, writes in both if writes]

    def _drawn(self, positions: Sequence[int]) -> dict[int, list[int]]:
        """Return the answers of those positions that are drawn. The batches do not depend on the processes, which divide them."""
        assert not self.drafter.training, "dropout would draw from another distribution than the drafter's"
        chosen = [position for position in positions if self.settings.draws(self.data.sampler.turn(position)[1])]
        prompts = {position: self._prompt(position) for position in chosen}
        chosen.sort(key=lambda position: (len(prompts[position]), position))
        size = self.settings.batch_size
        batches = [chosen[first : first + size] for first in range(0, len(chosen), size)]
        models = [CachedLM(model, name=name) for name, model in self._writers()]
        own = []
        for number in own_share(range(len(batches))):
            texts = self._continued({position: prompts[position] for position in batches[number]}, models)
            own += list(zip(batches[number], texts, strict=True))
        return dict(pair for pairs in shared(own) for pair in pairs)

    def _continued(self, prompts: Mapping[int, Sequence[int]], models: Sequence[CachedLM]) -> list[list[int]]:
        settings, room = self.settings, self.data.settings.max_length
        numbers, coins = (
            torch.stack([self._numbers(purpose, position) for position in prompts]) for purpose in ("token", "writer")
        )
        return continued(
            list(prompts.values()),
            models,
            num_tokens=self.target.num_tokens,
            ends=set(self.target.eos_token_ids),
            sampling=settings.sampling,
            limits=[min(settings.max_new_tokens, room - len(prompt)) for prompt in prompts.values()],
            numbers_BT=numbers,
            model_BT=(coins >= settings.drafter_share).long() if len(models) > 1 else None,
        )

    def _numbers(self, purpose: str, position: int) -> torch.Tensor:
        generator = stream(self.seed, "on-policy", purpose, position)
        return torch.rand(self.settings.max_new_tokens, dtype=torch.float64, generator=generator)
