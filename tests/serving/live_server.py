"""A small server on loopback that decodes with a drafter in drafttrain's engine and counts like vLLM, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, generate_latest

from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import Drafter
from drafttrain.serving.reference import count_rounds, decode
from drafttrain.target_model import Target

ENGINES = ("0", "1")
"""Two label sets, as of two engines behind one address."""


@dataclass
class DecodingServer:
    """Serves /v1/models, /v1/completions and /metrics.

    Args:
        drafter: None: it speculates not at all, and has no counters of that.
        root: The `root` of its model in /v1/models.
        others: Requests of somebody else, of 7 tokens each, that are served together with each of ours.
        late: Pages of /metrics that an answer is counted after.
    """

    target: Target
    drafter: Drafter | None
    num_draft_tokens: int
    root: str
    others: list[int] = field(default_factory=list)
    late: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    _site: Any = None

    def __post_init__(self) -> None:
        self.registry = CollectorRegistry()
        self._uncounted: list[tuple[int, Any]] = []

        def counter(name: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", name, ["engine", *labels], registry=self.registry)

        self.requests = counter("request_success", "finished_reason")
        self.tokens = counter("generation_tokens")
        if self.drafter is not None:
            self.drafts = counter("spec_decode_num_drafts")
            self.draft_tokens = counter("spec_decode_num_draft_tokens")
            self.accepted = counter("spec_decode_num_accepted_tokens")
            self.accepted_at = counter("spec_decode_num_accepted_tokens_per_pos", "position")
            for engine in ENGINES:
                # What was before us.
                self.drafts.labels(engine).inc(1000)
                self.accepted.labels(engine).inc(900)
                self.draft_tokens.labels(engine).inc(3000)
                for position in range(self.num_draft_tokens):
                    self.accepted_at.labels(engine, str(position)).inc(300)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "served", "root": self.root, "parent": None}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        waiting, self._uncounted = self._uncounted, []
        for pages, count in waiting:
            if pages:
                self._uncounted.append((pages - 1, count))
            else:
                count()
        return web.Response(body=generate_latest(self.registry))

    async def _completions(self, request: web.Request) -> web.Response:
        asked = await request.json()
        number = len(self.asked)
        self.asked.append(asked)
        one = self._decoded(asked, number)
        engine = ENGINES[number % 2]

        def count() -> None:
            served = count_rounds(one, max_new_tokens=asked["max_tokens"])
            self.requests.labels(engine, "length").inc()
            self.tokens.labels(engine).inc(len(served.tokens))
            self.drafts.labels(engine).inc(served.num_drafts)
            self.draft_tokens.labels(engine).inc(served.num_draft_tokens)
            self.accepted.labels(engine).inc(served.num_accepted)
            for position, accepted in enumerate(served.accepted_at):
                self.accepted_at.labels(engine, str(position)).inc(accepted)
            if number in self.others:
                self.tokens.labels(ENGINES[0]).inc(7)
                self.drafts.labels(ENGINES[0]).inc(7)

        self._uncounted.append((self.late, count))
        tokens = list(one.tokens[: asked["max_tokens"]])
        choice = {"index": 0, "text": "", "token_ids": tokens, "finish_reason": "length"}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": len(tokens)}})

    def _decoded(self, asked: dict[str, Any], number: int) -> Any:
        assert self.drafter is not None
        (one,) = decode(
            self.target,
            self.drafter,
            [Prompt(f"r{number}", asked["prompt"])],
            Sampling(asked["temperature"]),
            max_new_tokens=asked["max_tokens"],
            num_draft_tokens=self.num_draft_tokens,
        )
        return one
