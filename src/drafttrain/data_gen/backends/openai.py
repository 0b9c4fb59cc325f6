"""Texts by a server of the target with the OpenAI protocol: `vllm serve`, SGLang, and others.

Every answer is written to a file when it arrives, until its shard is stored: if the server or the run dies, no received answer
is lost or requested again. Only requests in flight (`concurrency` at most) are repeated.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from drafttrain.core.console import Progress, say
from drafttrain.core.errors import DataError
from drafttrain.core.random import stream_seed
from drafttrain.core.settings import setting
from drafttrain.data_gen.backends import NOT_REPRODUCIBLE, Outcome, Plan, Task, backends, unusable
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.openai_client import Completions, NotAnswered, Patience, key_from
from drafttrain.data_gen.serving_logs.encoding import ExchangeEncoder
from drafttrain.data_gen.serving_logs.exchange import Refused
from drafttrain.data_gen.serving_logs.openai import exchanges
from drafttrain.data_gen.serving_logs.untrusted import guard

EXTENSIONS = {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Extensions of vLLM and SGLang. Without them a server uses the model's generation_config.json, and the text would come from
another distribution than the record states."""
LARGEST_SEED = 2**31


@dataclass
class OpenAISettings:
    """A server of the target generates the texts, by requests for text completions with token ids."""

    base_url: str = setting(help="Address with the version of the protocol, such as http://127.0.0.1:8000/v1.")
    model: str = setting(help="The target's name on the server.")
    api_key_variable: str | None = setting(
        None, help="Environment variable with the API key; null: no key is sent. Never write the key into a recipe."
    )
    prompts_as: Literal["token_ids", "text"] = setting(
        "token_ids", help="How prompts are sent. As text, prompts whose text has other token ids are quarantined."
    )
    extensions: bool = setting(
        True,
        help="Also send the extensions of vLLM and SGLang (return_token_ids, top_k, min_p, repetition_penalty); false for servers "
        "that refuse unknown keys. Answers without token ids are tokenized again, or quarantined.",
    )
    logprobs: bool = setting(
        False,
        help="Also request the log-probability of each token, for servers that return no token ids: the text of each token "
        "identifies it. The whole text does not: as many other tokens may have the same text.",
    )
    concurrency: int = setting(16, help="Requests in flight, by process.", ge=1)
    retries: int = setting(5, help="How often a failed request is repeated.", ge=0)
    backoff_seconds: float = setting(
        1.0, help="Wait before the first repetition; it doubles each time, up to 60 s.", ge=0
    )
    longest_wait_seconds: float = setting(
        600.0, help="A server that asks for a longer wait (Retry-After) stops the run, which can be continued.", gt=0
    )
    timeout_seconds: float = setting(600.0, help="Time limit of one answer.", gt=0)

    def check(self) -> list[str]:
        """Return problems between fields."""
        problems = []
        # Never repeat what may be a password.
        if "@" in self.base_url or "?" in self.base_url:
            problems.append("base_url: must not hold a user or a key; name an environment variable in api_key_variable")
        elif not self.base_url.startswith(("http://", "https://")):
            problems.append(f"base_url: must begin with http:// or https://, got {self.base_url!r}")
        return problems


# Settings of the connection, not of the texts: a server with another address continues the same shards.
CONNECTION = (
    "base_url",
    "api_key_variable",
    "concurrency",
    "retries",
    "backoff_seconds",
    "longest_wait_seconds",
    "timeout_seconds",
)


@backends.register("openai", OpenAISettings)
class OpenAI:
    """Requests texts from a server, many at a time."""

    def __init__(self, settings: OpenAISettings, plan: Plan) -> None:
        self.settings = settings
        self.plan = plan

    def content(self) -> dict[str, Any]:
        """Return the model and the form of the requests, without the connection."""
        content = asdict(self.settings)
        return {"kind": "openai"} | {name: value for name, value in content.items() if name not in CONNECTION}

    def reproducible(self) -> dict[str, Any]:
        """Return that sampled texts are not reproducible."""
        return NOT_REPRODUCIBLE

    def write(self, shards: Mapping[int, Sequence[Task]], bar: Progress) -> Iterator[tuple[int, list[Outcome]]]:
        """Yield the outcomes of each shard.

        Raises:
            DataError: The server is gone, refuses all requests, or serves another model; received answers are kept.
        """
        key = key_from(self.settings.api_key_variable, named_by="data.generate.backend.api_key_variable")
        for number, shard in shards.items():
            kept = _kept_file(self.plan.folder, number)
            yield number, asyncio.run(self._written(number, shard, kept, key, bar))
            kept.unlink(missing_ok=True)

    async def _written(
        self, number: int, shard: Sequence[Task], kept_file: Path, key: str | None, bar: Progress
    ) -> list[Outcome]:
        chosen = self.settings
        patience = Patience(chosen.retries, chosen.backoff_seconds, chosen.longest_wait_seconds, chosen.timeout_seconds)
        outcomes = _kept(kept_file, shard)
        bar.advance(len(outcomes))
        if outcomes:
            say(f"shard {number}: {len(outcomes):,} of {len(shard):,} texts were received before")
        answers = _Answers(self.plan, shard, self.settings.prompts_as)
        free = asyncio.Semaphore(chosen.concurrency)
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(Completions(chosen.base_url, key, patience))
            await server.check_model(chosen.model)
            file = stack.enter_context(kept_file.open("a", encoding="utf-8"))

            async def one(place: int) -> None:
                async with free:
                    outcomes[place] = outcome = await self._asked(server, shard[place], answers)
                if outcome.tokens is not None:
                    _keep(file, place, shard[place], outcome)
                bar.advance(1)

            try:
                async with asyncio.TaskGroup() as group:
                    for place in range(len(shard)):
                        if place not in outcomes:
                            group.create_task(one(place))
            except ExceptionGroup as errors:
                ours, others = errors.split(DataError)
                if ours is None or others is not None:
                    raise
                # The first error stops all requests; the others repeat it.
                raise ours.exceptions[0] from None
        # Only the first shard decides, so that the outcome does not depend on the number of processes.
        if number == 0 and all(outcome.tokens is None for outcome in outcomes.values()):
            raise DataError(
                f"{chosen.base_url}: none of the {len(shard)} texts of shard {number} can be used. "
                f"The first one: {outcomes[0].reason}"
            )
        return [outcomes[place] for place in range(len(shard))]

    async def _asked(self, server: Completions, task: Task, answers: _Answers) -> Outcome:
        retries = 0
        try:
            with guard():
                request = self._request(task, answers)
            answer, retries = await server.complete(request)
            with guard():
                tokens, account = answers.read(task, answer)
        except NotAnswered as reason:
            return Outcome(None, str(reason), {"retries": reason.retries})
        except Refused as reason:
            return Outcome(None, str(reason), {"retries": retries})
        return Outcome(tokens, account=account | {"retries": retries})

    def _request(self, task: Task, answers: _Answers) -> dict[str, Any]:
        sampling = task.sampling
        request: dict[str, Any] = {
            "model": self.settings.model,
            "prompt": answers.prompt(task),
            "max_tokens": self.plan.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.temperature > 0:
            request["seed"] = stream_seed(self.plan.seed, "server", task.id) % LARGEST_SEED
        if self.settings.logprobs:
            request["logprobs"] = 1
        return request | (EXTENSIONS | {"top_k": sampling.top_k or -1} if self.settings.extensions else {})


class _Answers:
    """Gets token ids from the answers of a server, by the rules for serving logs."""

    def __init__(self, plan: Plan, shard: Sequence[Task], prompts_as: str) -> None:
        self._plan = plan
        self._as_text = prompts_as == "text"
        longest = max(len(task.prompt) for task in shard)
        # Longer than any valid answer: a longer one must be refused, not cut.
        self._encoder = Encoder(plan.target.tokenizer, longest + 2 * plan.max_new_tokens + 1)
        self._exchanges = ExchangeEncoder(self._encoder, lambda words: words, logprobs=False)

    def prompt(self, task: Task) -> list[int] | str:
        """Return a prompt in the form that is sent.

        Raises:
            Refused: Its text has other token ids.
        """
        tokens = list(task.prompt)
        if not self._as_text:
            return tokens
        words = str(self._encoder.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        if self._encoder.text(words) != tokens:
            raise Refused("retokenised", "the prompt's text has other token ids")
        return words

    def read(self, task: Task, answer: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """Return the tokens after a prompt, how the text ended, and the origin of its token ids.

        Raises:
            Refused: The tokens that were read or written are not known, or do not match the request.
        """
        prompt, most = list(task.prompt), self._plan.max_new_tokens
        # If the server reports the prompt that it read, the exchange holds that one.
        found = exchanges({"request": {"prompt": prompt}, "response": dict(answer)}, id=task.id)
        if len(found) != 1:
            raise Refused("several", f"{len(found)} texts, one was requested")
        (exchange,) = found
        if exchange.prompt_ids != prompt:
            raise Refused("wrong_prompt", "the server read other tokens than it was sent")
        counted = exchange.num_answer_tokens
        if exchange.finish == "length" and counted is not None and counted < most:
            raise Refused("short", f"cut after {counted} tokens, {most} were requested")
        ids = "served"
        if exchange.answer_ids is None:
            named = self._exchanges.named_ids(exchange.logprobs)
            exchange = replace(exchange, answer_ids=named)
            ids = "text" if named is None else "spelled"
        if ids == "served" and "\ufffd" in (exchange.answer or ""):
            # Servers spell bytes that are not text differently: rely on the ids.
            exchange = replace(exchange, answer=None)
        tokens = list(self._exchanges.record(exchange).tokens[len(prompt) :])
        finish = exchange.finish
        if ids == "text" and finish == "length" and len(tokens) != most:
            raise Refused("retokenised", f"the answer has {len(tokens)} tokens here, {most} on the server")
        if reason := unusable(tokens, finish, ends=self._plan.target.eos_token_ids, max_new_tokens=most):
            kind, _, sentence = reason.partition(": ")
            raise Refused(kind, sentence)
        return tokens, {"finish": finish, "ids": ids}


def _kept_file(folder: Path, number: int) -> Path:
    return folder / f"answers-{number:05d}.jsonl"


def _keep(file: TextIO, place: int, task: Task, outcome: Outcome) -> None:
    """Append an answer to the file and flush it."""
    entry = {"place": place, "id": task.id, "tokens": outcome.tokens, "account": outcome.account}
    file.write(json.dumps(entry, separators=(",", ":")) + "\n")
    file.flush()


def _kept(path: Path, shard: Sequence[Task]) -> dict[int, Outcome]:
    """Return the answers that an earlier run received, by place; an incomplete last line is removed."""
    if not path.exists():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    entries = [json.loads(line) for line in whole.splitlines()]
    if any(shard[one["place"]].id != one["id"] for one in entries):
        raise DataError(f"{path}: holds answers to other prompts; remove the folder or give the run another name")
    return {one["place"]: Outcome(one["tokens"], account=one["account"]) for one in entries}
