"""A small serving stack: the OpenAI protocol, the engine, and the drafter that `current` names at each request."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from drafttrain.checkpoint import read_drafter
from drafttrain.core.generations import Generation
from drafttrain.core.roles import Proposer
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.serving_logs.lines import log_files
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.recorder.capture import events
from drafttrain.target_model import Target

NUM_DRAFT_TOKENS = 5
PROMPTS_AT_ONCE = 16


def engine(target: Target, proposer: Proposer, *, max_tokens: int) -> Engine:
    """Return the greedy engine of the server. Without drafts it writes the target's own text."""
    policy = FixedLength(FixedLengthSettings(num_draft_tokens=NUM_DRAFT_TOKENS))
    return Engine(target, proposer, rule=Lossless(), policy=policy, sampling=Sampling(), max_new_tokens=max_tokens)


def own_texts(target: Target, generations: Sequence[Generation]) -> list[list[int]]:
    """Return what the target alone writes after the same prompts. A text that differs is decoded again, alone."""
    alone = engine(target, NoDraft(), max_tokens=max(len(one.tokens) for one in generations))
    found = []
    for start in range(0, len(generations), PROMPTS_AT_ONCE):
        some = generations[start : start + PROMPTS_AT_ONCE]
        prompts = [Prompt(one.id, one.prompt_tokens) for one in some]
        for prompt, one, plain in zip(prompts, some, alone.generate(prompts), strict=True):
            # Sums over a batch are rounded in another order, which may change the choice between two equally likely tokens.
            own = plain if list(plain.tokens) == list(one.tokens) else alone.generate([prompt])[0]
            found.append(list(map(int, own.tokens)))
    return found


@dataclass(frozen=True)
class Answered:
    """A request that was served."""

    version: str
    """Version of the drafter."""
    generation: Generation

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens and rounds. The ratio of their sums is the block efficiency."""
        return len(self.generation.tokens), len(self.generation.rounds)


def decoded_again(target: Target, drafter: Path, generations: Sequence[Generation]) -> list[Answered]:
    """Decode the same prompts with another version, to the same lengths."""
    proposer = read_drafter(drafter, target).proposer(target)
    prompts = [(Prompt(one.id, one.prompt_tokens), len(one.tokens)) for one in generations]
    return [
        Answered(drafter.name, engine(target, proposer, max_tokens=count).generate([prompt])[0])
        for prompt, count in prompts
    ]


def shipped(kind: str) -> list[dict[str, Any]]:
    """Return the lines of one domain of the bundled log."""
    (path,) = log_files("builtin:serving_log")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["domain"] == kind]


class TargetServer:
    """Answers one request after another.

    Args:
        drafters: A folder of published versions.
    """

    def __init__(self, target: Target, drafters: Path) -> None:
        self.target = target
        self.drafters = drafters
        self.answered: list[Answered] = []
        self._one_at_a_time = threading.Lock()
        self._version = ""

    def app(self) -> web.Application:
        """Return the application."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        prompt = self.target.tokenizer.apply_chat_template(
            asked["messages"], add_generation_prompt=True, tokenize=False
        )
        return await self._answer(request, asked, self.target.tokenizer(prompt).input_ids, chat=True)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        return await self._answer(request, asked, self.target.tokenizer(asked["prompt"]).input_ids, chat=False)

    async def _answer(
        self, request: web.Request, asked: dict[str, Any], prompt: list[int], *, chat: bool
    ) -> web.StreamResponse:
        number = len(self.answered)
        answered = await asyncio.to_thread(self._decode, Prompt(f"cmpl-{number}", prompt), asked["max_tokens"])
        self.answered.append(answered)
        pieces = list(self._pieces(answered.generation))
        if not asked.get("stream"):
            merged = {name: [one for piece in pieces for one in piece[name]] for name in ("token_ids", "rounds")}
            whole = {"text": "".join(piece["text"] for piece in pieces)} | merged
            return web.json_response(self._message(asked, answered, whole, chat=chat, key="message"))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for place, piece in enumerate(pieces):
            last = place == len(pieces) - 1
            message = self._message(asked, answered, piece, chat=chat, key="delta", first=place == 0, last=last)
            await response.write(b"data: " + json.dumps(message).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _decode(self, prompt: Prompt, max_tokens: int) -> Answered:
        with self._one_at_a_time:
            # Resolve the link once: a version never changes, but another one may be published at any moment.
            folder = (self.drafters / "current").resolve()
            if folder.name != self._version:
                self._proposer = read_drafter(folder, self.target).proposer(self.target)
                self._version = folder.name
            (generation,) = engine(self.target, self._proposer, max_tokens=max_tokens).generate([prompt])
            return Answered(folder.name, generation)

    def _pieces(self, generation: Generation) -> Any:
        """Yield for each round its ids, its text (complete characters only), and the round itself."""
        ends, tokens, sent = self.target.eos_token_ids, list(map(int, generation.tokens)), ""
        for one in generation.rounds:
            until = one.start + one.num_emitted
            text = self.target.tokenizer.decode([t for t in tokens[:until] if t not in ends])
            # An incomplete character waits for its other bytes.
            text = text if until == len(tokens) else text.rstrip("\ufffd")
            yield {"text": text[len(sent) :], "token_ids": tokens[one.start : until], "rounds": [one]}
            sent = text

    def _message(
        self,
        asked: dict[str, Any],
        answered: Answered,
        piece: dict[str, Any],
        *,
        chat: bool,
        key: str,
        first: bool = True,
        last: bool = True,
    ) -> dict[str, Any]:
        generation = answered.generation
        ended = int(generation.tokens[-1]) in self.target.eos_token_ids
        text = {key: {"role": "assistant", "content": piece["text"]}} if chat else {"text": piece["text"]}
        rounds = {
            "drafted": [one.num_draft_tokens for one in piece["rounds"]],
            "accepted": [one.num_accepted for one in piece["rounds"]],
        }
        choice = {
            "index": 0,
            **text,
            "speculative": rounds,
            "finish_reason": ("stop" if ended else "length") if last else None,
        }
        value: dict[str, Any] = {"id": generation.id, "model": asked["model"], "choices": [choice]}
        if asked.get("return_token_ids"):
            choice["token_ids"] = piece["token_ids"]
            value |= {"prompt_token_ids": list(generation.prompt_tokens)} if first else {}
        return value


async def ask(session: aiohttp.ClientSession, address: str, prompt: str, *, stream: bool, max_tokens: int) -> str:
    """Ask for a completion and return the text that a client reads."""
    asked = {"model": "target", "prompt": prompt, "max_tokens": max_tokens, "stream": stream}
    async with session.post(address + "/v1/completions", json=asked) as answer:
        body = await answer.text()
        assert answer.status == 200, body
    messages = events(body) if stream else [body]
    return "".join(json.loads(one)["choices"][0]["text"] for one in messages)
