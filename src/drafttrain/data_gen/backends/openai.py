"""Texts by a server that serves the target and speaks the OpenAI protocol: `vllm serve`, SGLang, and others.

Every answer is kept in a file as soon as it comes, until its shard is stored: whoever dies, server or run, nothing that came is
lost or asked for again. What was under way when the run itself was killed (`concurrency` texts at most) is.
"""

from __future__ import annotations

import asyncio
import json
import os
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
from drafttrain.data_gen.openai_client import Completions, NotAnswered, Patience
from drafttrain.data_gen.serving_logs.encoding import ExchangeEncoder
from drafttrain.data_gen.serving_logs.exchange import Refused
from drafttrain.data_gen.serving_logs.openai import exchanges
from drafttrain.data_gen.serving_logs.untrusted import guard

EXTENSIONS = {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""What vLLM and SGLang understand besides. A server takes what is left out from the model's own generation_config.json, and the
text would be of another law than the record says."""
LARGEST_SEED = 2**31


@dataclass
class OpenAISettings:
    """A server that serves the target writes the texts; it is asked for text completions by token ids."""

    base_url: str = setting(help="Address with its version, such as http://127.0.0.1:8000/v1.")
    model: str = setting(help="The target as the server calls it.")
    api_key_variable: str | None = setting(
        None, help="Environment variable that holds the key; null: none is sent. The key itself belongs in no recipe."
    )
    prompts_as: Literal["token_ids", "text"] = setting(
        "token_ids", help="How prompts are sent. As text, those that its tokens do not spell again are set aside."
    )
    extensions: bool = setting(
        True,
        help="Also send what vLLM and SGLang understand besides (return_token_ids, top_k, min_p, repetition_penalty); false for "
        "servers that refuse keys they do not know. Without token ids answers are tokenised again, or set aside.",
    )
    logprobs: bool = setting(
        False,
        help="Also ask for the log-probability of each token, for servers that give no token ids: how the tokens are spelled one "
        "by one says which they were. Text alone does not: other tokens, as many, may spell the same.",
    )
    concurrency: int = setting(16, help="Requests at a time, by process.", ge=1)
    retries: int = setting(5, help="How often a request that failed is repeated.", ge=0)
    backoff_seconds: float = setting(
        1.0, help="Wait before the first repetition; each further one waits twice as long, 60 s at most.", ge=0
    )
    longest_wait_seconds: float = setting(
        600.0, help="A server that asks for a longer wait (Retry-After) ends the run, which can be continued.", gt=0
    )
    timeout_seconds: float = setting(600.0, help="Longest that one answer may take.", gt=0)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = []
        # What may be a password is not repeated.
        if "@" in self.base_url or "?" in self.base_url:
            problems.append("base_url: holds a name or a key; name an environment variable in api_key_variable")
        elif not self.base_url.startswith(("http://", "https://")):
            problems.append(f"base_url: must begin with http:// or https://, got {self.base_url!r}")
        return problems


# What is about the way and not about the text: a server that comes back elsewhere continues the same shards.
OF_THE_WAY = (
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
    """Asks a server, many texts at a time."""

    def __init__(self, settings: OpenAISettings, plan: Plan) -> None:
        self.settings = settings
        self.plan = plan

    def content(self) -> dict[str, Any]:
        """Return the model and how it is asked, not where."""
        content = asdict(self.settings)
        return {"kind": "openai"} | {name: value for name, value in content.items() if name not in OF_THE_WAY}

    def reproducible(self) -> dict[str, Any]:
        """Return that sampled texts are not."""
        return NOT_REPRODUCIBLE

    def write(self, shards: Mapping[int, Sequence[Task]], bar: Progress) -> Iterator[tuple[int, list[Outcome]]]:
        """Yield the outcomes of each shard.

        Raises:
            DataError: The server is gone, refuses everything, or serves another model; answers so far are kept.
        """
        key = self._key()
        for number, shard in shards.items():
            kept = _kept_file(self.plan.folder, number)
            yield number, asyncio.run(self._written(number, shard, kept, key, bar))
            kept.unlink(missing_ok=True)

    def _key(self) -> str | None:
        variable = self.settings.api_key_variable
        if variable is None:
            return None
        key = os.environ.get(variable, "").strip()
        if not key:
            raise DataError(f"data.generate.backend.api_key_variable: the environment has no {variable}")
        return key

    async def _written(
        self, number: int, shard: Sequence[Task], kept_file: Path, key: str | None, bar: Progress
    ) -> list[Outcome]:
        chosen = self.settings
        patience = Patience(chosen.retries, chosen.backoff_seconds, chosen.longest_wait_seconds, chosen.timeout_seconds)
        outcomes = _kept(kept_file, shard)
        bar.advance(len(outcomes))
        if outcomes:
            say(f"shard {number}: {len(outcomes):,} of {len(shard):,} texts were answered before")
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
                # The first one ends all requests; the others say the same.
                raise ours.exceptions[0] from None
        # The first shard alone decides, so that it does not depend on the number of processes who goes on.
        if number == 0 and all(outcome.tokens is None for outcome in outcomes.values()):
            raise DataError(
                f"{chosen.base_url}: not one of the {len(shard)} texts of shard {number} could be used. "
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
        return request | (EXTENSIONS if self.settings.extensions else {})


class _Answers:
    """Makes token ids of what a server answers, by the rules by which serving logs are read."""

    def __init__(self, plan: Plan, shard: Sequence[Task], prompts_as: str) -> None:
        self._plan = plan
        self._as_text = prompts_as == "text"
        longest = max(len(task.prompt) for task in shard)
        # Longer than any right answer: a longer one is to be told, not cut.
        self._encoder = Encoder(plan.target.tokenizer, longest + 2 * plan.max_new_tokens + 1)
        self._exchanges = ExchangeEncoder(self._encoder, lambda words: words, logprobs=False)

    def prompt(self, task: Task) -> list[int] | str:
        """Return a prompt as it is sent.

        Raises:
            Refused: Its text would be read as other tokens.
        """
        tokens = list(task.prompt)
        if not self._as_text:
            return tokens
        words = str(self._encoder.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        if self._encoder.text(words) != tokens:
            raise Refused("retokenised", "the prompt's text has other token ids")
        return words

    def read(self, task: Task, answer: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """Return what was written after a prompt, how it ended, and what says which tokens it is.

        Raises:
            Refused: It cannot be known which tokens were read and written, or they are not what was asked for.
        """
        prompt, most = list(task.prompt), self._plan.max_new_tokens
        # Where the server says what it read, that stands in the exchange in place of what it was sent.
        found = exchanges({"request": {"prompt": prompt}, "response": dict(answer)}, id=task.id)
        if len(found) != 1:
            raise Refused("several", f"{len(found)} texts, one was asked for")
        (exchange,) = found
        if exchange.prompt_ids != prompt:
            raise Refused("wrong_prompt", "the server read other tokens than it was sent")
        counted = exchange.num_answer_tokens
        if exchange.finish == "length" and counted is not None and counted < most:
            raise Refused("short", f"cut after {counted} tokens, {most} were asked for")
        ids = "served"
        if exchange.answer_ids is None:
            named = self._exchanges.named_ids(exchange.logprobs)
            exchange = replace(exchange, answer_ids=named)
            ids = "text" if named is None else "spelled"
        if ids == "served" and "\ufffd" in (exchange.answer or ""):
            # Bytes that are no text are spelled differently by different servers: the ids say what was written.
            exchange = replace(exchange, answer=None)
        tokens = list(self._exchanges.record(exchange).tokens[len(prompt) :])
        finish = exchange.finish
        if ids == "text" and finish == "length" and len(tokens) != most:
            raise Refused("retokenised", f"the answer is {len(tokens)} tokens here, {most} where it was written")
        if reason := unusable(tokens, finish, ends=self._plan.target.eos_token_ids, max_new_tokens=most):
            kind, _, sentence = reason.partition(": ")
            raise Refused(kind, sentence)
        return tokens, {"finish": finish, "ids": ids}


def _kept_file(folder: Path, number: int) -> Path:
    return folder / f"answers-{number:05d}.jsonl"


def _keep(file: TextIO, place: int, task: Task, outcome: Outcome) -> None:
    """Write an answer down at once."""
    entry = {"place": place, "id": task.id, "tokens": outcome.tokens, "account": outcome.account}
    file.write(json.dumps(entry, separators=(",", ":")) + "\n")
    file.flush()


def _kept(path: Path, shard: Sequence[Task]) -> dict[int, Outcome]:
    """Return what an earlier run was answered, by place; a line that it was killed in is cut off, not answered."""
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
