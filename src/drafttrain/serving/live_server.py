"""Prompts decoded by a live server one at a time; the increase of its counters is the speculation on each prompt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.core.console import progress
from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.backends.openai import EXTENSIONS
from drafttrain.data_gen.openai_client import Completions, NotAnswered, Patience
from drafttrain.eval.interval import Interval
from drafttrain.eval.statistics import ratio_interval
from drafttrain.serving.engines import CounterNames
from drafttrain.serving.prometheus_counters import LiveCounters, read_counters
from drafttrain.target_model.folders import fingerprint_of

METRICS = "/metrics"
PATIENCE = Patience(retries=2, backoff_seconds=1.0, longest_wait_seconds=60.0, timeout_seconds=600.0)
SETTLE_SECONDS = 5.0
"""How long to wait for the counters of an answer: it may arrive before its last step is counted."""
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Window:
    """One prompt: the length of its output, and the increase of the counters during the request."""

    id: str
    num_tokens: int
    rise: LiveCounters

    @property
    def is_ours_alone(self) -> bool:
        """Whether, by the server's counters, no other request ended or got a token during this one."""
        return self.rise.num_requests == 1 and self.rise.num_tokens == self.num_tokens


@dataclass(frozen=True)
class LiveFigures:
    """The figures of a server on prompts at one temperature."""

    temperature: float
    num_draft_tokens: int
    """Draft tokens of a round, as the server is configured."""
    windows: Sequence[Window]
    """Windows without other clients' requests; the figures are computed on these."""
    num_shared: int
    """Windows left out because the server also served other clients."""

    def block_efficiency(self) -> Interval:
        """Return 1 + accepted / drafts, with its interval over prompts."""
        rises = [window.rise for window in self.windows if window.rise.num_drafts]
        drafts = [rise.num_drafts for rise in rises]
        tokens = [rise.num_drafts + rise.num_accepted for rise in rises]
        return ratio_interval(tokens, drafts)

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the rounds that accepted the i-th draft token."""
        drafts = self.total("num_drafts")
        accepted = (sum(window.rise.accepted_at[i] for window in self.windows) for i in range(self.num_draft_tokens))
        return [count / drafts for count in accepted]

    def total(self, counter: str) -> int:
        """Return the sum of a counter over the windows."""
        return sum(int(getattr(window.rise, counter)) for window in self.windows)

    def json(self) -> dict[str, Any]:
        """Return what server.json holds."""
        names = ("num_drafts", "num_draft_tokens", "num_accepted", "num_tokens")
        return {
            "temperature": self.temperature,
            "num_draft_tokens": self.num_draft_tokens,
            "num_prompts": len(self.windows),
            "num_prompts_shared": self.num_shared,
            "counters": {name: self.total(name) for name in names},
            "acceptance_by_position": self.acceptance_by_position,
        }


class LiveServer:
    """A server that speaks the OpenAI protocol and has counters.

    Args:
        completions: An open client.
        model: The server's name for the model.
    """

    def __init__(self, completions: Completions, names: CounterNames, *, model: str) -> None:
        self._completions = completions
        self._names = names
        self._model = model
        self._where = completions.base_url.removesuffix("/v1") + METRICS

    async def counters(self) -> LiveCounters:
        """Return the current counters.

        Raises:
            DataError: The server cannot be reached, or does not count drafts.
        """
        return read_counters(await self._completions.page(METRICS), self._names, where=self._where)

    async def figures(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, max_new_tokens: Mapping[str, int]
    ) -> LiveFigures:
        """Decode prompts one at a time and return the server's figures.

        Args:
            max_new_tokens: By the id of the prompt.

        Raises:
            DataError: Every request overlapped with another client's, or nothing was drafted.
        """
        windows = []
        with progress(f"serving at temperature {sampling.temperature:g}", total=len(prompts), unit="prompts") as bar:
            for number, prompt in enumerate(prompts):
                most = max_new_tokens[prompt.id]
                windows.append(await self._window(prompt, sampling, max_new_tokens=most, seed=number))
                bar.advance()
        alone = [window for window in windows if window.is_ours_alone]
        if not alone:
            rises = (sum(getattr(window.rise, name) for window in windows) for name in ("num_requests", "num_tokens"))
            requests, tokens = rises
            own = sum(window.num_tokens for window in windows)
            raise DataError(
                f"{self._where}: counted {requests:,} requests and {tokens:,} tokens, but our {len(windows):,} requests got "
                f"{own:,}: the server also served other clients all the time. Check it when they are idle"
            )
        figures = LiveFigures(
            sampling.temperature, len(alone[0].rise.accepted_at), alone, num_shared=len(windows) - len(alone)
        )
        if not figures.total("num_drafts"):
            raise DataError(
                f"{self._where}: counted no draft during {len(alone):,} requests: the server does not speculate"
            )
        return figures

    async def _window(self, prompt: Prompt, sampling: Sampling, *, max_new_tokens: int, seed: int) -> Window:
        before = await self.counters()
        request = {
            "model": self._model,
            "prompt": list(prompt.tokens),
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            **EXTENSIONS,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            **({"seed": seed} if sampling.temperature else {}),
        }
        try:
            answer, _ = await self._completions.complete(request)
        except NotAnswered as reason:
            raise DataError(f"{self._completions.base_url}: prompt {prompt.id!r}: {reason}") from reason
        usage = answer.get("usage")
        count = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
        if type(count) is not int:
            raise DataError(f"{self._completions.base_url}: an answer has no usage.completion_tokens")
        began = time.monotonic()
        rise = await self.counters() - before
        while (rise.num_requests < 1 or rise.num_tokens < count) and time.monotonic() < began + SETTLE_SECONDS:
            await asyncio.sleep(POLL_SECONDS)
            rise = await self.counters() - before
        if min(vars(rise)[name] for name in ("num_drafts", "num_accepted", "num_requests", "num_tokens")) < 0:
            raise DataError(f"{self._where}: counters decreased: the server was restarted meanwhile")
        return Window(prompt.id, count, rise)


def served_model(cards: Sequence[Mapping[str, Any]], target: str, *, fingerprint: str, where: str) -> str:
    """Return the server's name for the target of a drafter.

    Where `root` is a folder on this machine, the fingerprint of its weights decides; otherwise the names do.

    Args:
        cards: The models in /v1/models.
        target: The folder or hub id that the drafter was made for.
        fingerprint: The target's fingerprint; empty: unknown.

    Raises:
        CheckpointError: The server serves other models; names them.
    """
    # Adapters are listed too, with the model that they extend as `parent`.
    models = [card for card in cards if not card.get("parent")]
    for card in models:
        if _is_of(card, target, fingerprint):
            return str(card.get("id"))
    served = ", ".join(dict.fromkeys(str(card.get("root") or card.get("id")) for card in models)) or "no model"
    raise CheckpointError(
        f"{where}: serves {served}, but the drafter was made for {target}. If that is the same model under another name, "
        "give the server's name for it: --model NAME"
    )


def _is_of(card: Mapping[str, Any], target: str, fingerprint: str) -> bool:
    root = str(card.get("root") or card.get("id"))
    if fingerprint and Path(root).is_dir() and list(Path(root).glob("*.safetensors")):
        return fingerprint_of(Path(root)) == fingerprint
    names = {root, str(card.get("id"))}
    return target in names or Path(target).name in {Path(name).name for name in names}
