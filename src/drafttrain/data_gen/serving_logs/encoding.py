"""From an exchange to a record: the served ids where they are logged, else the ids of the text by the target's own template.

Only the answer is a label, and only where it is certain which tokens the target wrote.

N = labels, K = tokens of a row of logged log-probabilities
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from drafttrain.core.texts import LoggedDistribution, Record
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.plain_ids import continuation_ids
from drafttrain.data_gen.serving_logs.exchange import Exchange, LogProbs, Refused
from drafttrain.data_gen.serving_logs.private.values import spells_private
from drafttrain.data_gen.serving_logs.redaction import Redact
from drafttrain.data_gen.serving_logs.rounds import refusals

LONGEST_TOKEN = 128
"""Characters of a token at most: text of more characters than this times the tokens of a record is not even tokenized."""
LEAST_TOP_K = 2
"""A row that names fewer tokens tells too little of the distribution."""
OVER_ONE = 1e-2
"""Rounding error that a row's total probability may have."""


class ExchangeEncoder:
    """Makes records of exchanges by one tokenizer.

    Args:
        redact: Removes private content from text; token ids whose text it would change are refused.
        logprobs: Read logged log-probabilities.
    """

    def __init__(self, encoder: Encoder, redact: Redact, *, logprobs: bool) -> None:
        self._encoder = encoder
        self._redact = redact
        self._reads_logprobs = logprobs
        self._names: dict[int, str] = {}

    def record(self, exchange: Exchange) -> Record:
        """Return the record of an exchange.

        Raises:
            Refused: The tokens that the target read or wrote are not known, or none of them fits into a record.
        """
        prompt = self._prompt(exchange)
        logprobs = exchange.logprobs if self._reads_logprobs else None
        answer = self._answer(exchange, prompt, logprobs)
        self._check_redacted(prompt + answer)
        logprobs = self._without_private(logprobs)
        self._check_length(prompt)
        length = self._encoder.max_length
        if not prompt or not answer:
            raise Refused("empty", "no token before the answer, or none in it")
        labels = min(len(answer), length - len(prompt))
        refused = None if exchange.rounds is None else refusals(exchange.rounds, answer)
        return Record(
            exchange.id,
            (prompt + answer)[:length],
            [False] * len(prompt) + [True] * labels,
            domain=exchange.domain,
            refused=None if refused is None else [len(prompt) + place for place in refused if place < labels],
            num_rounds=None if exchange.rounds is None or labels < len(answer) else len(exchange.rounds),
            logged=self._rows(logprobs, answer, labels),
        )

    def prompt(self, exchange: Exchange) -> list[int]:
        """Return the ids that the target read, if an answer fits behind them.

        Raises:
            Refused: They are not known, spell private content, or are too many.
        """
        prompt = self._prompt(exchange)
        self._check_redacted(prompt)
        self._check_length(prompt)
        if not prompt:
            raise Refused("empty", "the prompt has no token")
        return prompt

    def _prompt(self, exchange: Exchange) -> list[int]:
        """Return the ids that the target read."""
        if exchange.prompt_ids is not None:
            self._check_ids(exchange.prompt_ids)
            self._check_count(exchange.num_prompt_tokens, exchange.prompt_ids)
            logged = exchange.prompt[-1]["content"] if isinstance(exchange.prompt, list) else exchange.prompt
            if logged and not exchange.incomplete and logged.strip() not in self._spelled(exchange.prompt_ids):
                raise Refused("wrong_tokenizer", "the prompt's token ids do not spell its text")
            return exchange.prompt_ids
        if exchange.prompt is None:
            raise Refused("no_text", "neither text nor token ids of the prompt are logged")
        if exchange.incomplete:
            raise Refused(
                exchange.incomplete,
                "the prompt's text is not all that the target read, and its token ids are not logged",
            )
        tokens = self._read(exchange)
        self._check_count(exchange.num_prompt_tokens, tokens)
        return tokens

    def _read(self, exchange: Exchange) -> list[int]:
        """Return the ids of a prompt's text."""
        prompt = exchange.prompt
        words = sum(len(turn["content"]) for turn in prompt) if isinstance(prompt, list) else len(prompt or "")
        self._check_size(words)
        if not isinstance(prompt, list):
            # An empty prompt is the start-of-text token alone.
            return list(self._encoder.tokenizer(prompt or "").input_ids)
        try:
            return self._encoder.chat_ids(prompt, exchange.template_arguments, add_generation_prompt=True)
        except BadItem as reason:
            raise Refused("template", "the chat template refuses this chat") from reason
        except Exception as error:
            # A template is a program and a stranger's chat its input: it may fail in any way.
            raise Refused("template", f"the chat template fails on this chat: {type(error).__name__}") from error

    def _answer(self, exchange: Exchange, prompt: list[int], logprobs: LogProbs | None) -> list[int]:
        """Return the ids that the target wrote."""
        logged = exchange.answer_ids if exchange.answer_ids is not None else self.named_ids(logprobs)
        if logged is None:
            return self._retokenized(exchange, prompt)
        self._check_ids(logged)
        self._check_count(exchange.num_answer_tokens, logged)
        if exchange.answer is not None:
            # Servers spell half a character at the end of a cut answer differently.
            spelled, answer = (
                words.strip().rstrip("\ufffd") for words in (self._spelled(logged, special=False), exchange.answer)
            )
            stopped = exchange.stops_on_text or exchange.finish == "stop_text"
            if not (spelled == answer or (stopped and spelled.startswith(answer))):
                raise Refused("wrong_tokenizer", "the answer's token ids do not spell its text")
        return logged

    def _retokenized(self, exchange: Exchange, prompt: list[int]) -> list[int]:
        """Return the ids of an answer's text.

        Raises:
            Refused: They do not decode to the same text, or the server counted another number of tokens.
        """
        answer = exchange.answer
        if answer is None:
            raise Refused("no_text", "neither text nor token ids of the answer are logged")
        self._check_size(len(answer))
        tokens = self._continued(exchange, prompt, answer)
        if self._spelled(prompt + tokens) != self._spelled(prompt) + answer:
            raise Refused("retokenised", "the text's token ids do not decode to the same text")
        special = set(self._encoder.tokenizer.all_special_ids)
        if special & set(tokens):
            raise Refused(
                "retokenised",
                "the answer's text holds a special token, which the target need not have written as one token",
            )
        counted = exchange.num_answer_tokens
        if counted is not None and counted - len(tokens) not in (0, 1):
            raise Refused("retokenised", f"the answer has {len(tokens)} tokens here, {counted} where it was served")
        ended = exchange.finish == "stop" and not exchange.stops_on_text and (counted is None or counted > len(tokens))
        end = self._end(exchange, prompt + tokens) if ended else None
        return tokens if end is None else [*tokens, end]

    def _continued(self, exchange: Exchange, prompt: list[int], answer: str) -> list[int]:
        """Return the ids of an answer as a continuation: some tokenizers put a space before every text."""
        if isinstance(exchange.prompt, str) and exchange.prompt_ids is None:
            whole = list(self._encoder.tokenizer(exchange.prompt + answer).input_ids)
            if whole[: len(prompt)] == prompt:
                return whole[len(prompt) :]
        return continuation_ids(self._encoder.tokenizer, answer)

    def _end(self, exchange: Exchange, tokens: list[int]) -> int | None:
        """Return the token that ends an answer: the template's, else the tokenizer's end of text."""
        tokenizer = self._encoder.tokenizer
        if isinstance(exchange.prompt, list) and exchange.answer:
            turns = [*exchange.prompt, {"role": "assistant", "content": exchange.answer}]
            try:
                whole = self._encoder.chat_ids(turns, exchange.template_arguments)
            except Exception:  # As in _read; the answer can be used without its end.
                return None
            if whole[: len(tokens)] == tokens and whole[len(tokens) : len(tokens) + 1]:
                end = whole[len(tokens)]
                return end if end in tokenizer.all_special_ids else None
        end = tokenizer.eos_token_id
        return None if end is None else int(end)

    def _rows(self, logprobs: LogProbs | None, answer: Sequence[int], labels: int) -> LoggedDistribution | None:
        """Return the logged distribution at the labels; None where a label has no row, or a row of too few tokens.

        Raises:
            Refused: A row is not a distribution, or names tokens of another tokenizer.
        """
        if logprobs is None or len(logprobs) < labels:
            return None
        rows = []
        for row, token in zip(logprobs, answer[:labels], strict=False):
            named = [(self._id(one), value) for one, value in row]
            if any(one is None for one, _ in named):
                return None
            known: dict[int, float] = {}
            for one, value in named:
                known.setdefault(int(one or 0), value)
            if any(one >= self._encoder.size for one in known) or token not in known:
                raise Refused("wrong_tokenizer", "log-probabilities of tokens that this tokenizer does not have")
            if sum(np.exp(list(known.values()))) > 1 + OVER_ONE:
                raise Refused("logprobs", "a row's probabilities sum to more than 1")
            if len(known) < LEAST_TOP_K:
                return None
            rows.append(known)
        ids_NK = np.full((labels, max(map(len, rows))), -1, dtype=np.int32)
        log_probs_NK = np.full(ids_NK.shape, -np.inf, dtype=np.float32)
        for number, known in enumerate(rows):
            ids_NK[number, : len(known)] = list(known)
            log_probs_NK[number, : len(known)] = list(known.values())
        return LoggedDistribution(ids_NK, log_probs_NK)

    def named_ids(self, logprobs: LogProbs | None) -> list[int] | None:
        """Return the answered ids by their log-probabilities; None where a token's text belongs to several ids, or to none."""
        if not logprobs:
            return None
        tokens = [self._id(row[0][0]) for row in logprobs]
        return None if any(token is None for token in tokens) else [int(token) for token in tokens if token is not None]

    def _id(self, token: int | str) -> int | None:
        return token if isinstance(token, int) else self._spellings.get(token)

    @cached_property
    def _spellings(self) -> dict[str, int]:
        """Ids by their text; texts that several tokens share are left out."""
        tokenizer = self._encoder.tokenizer
        found: dict[str, int] = {}
        several = set()
        for token in range(self._encoder.size):
            words = tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if words in found:
                several.add(words)
            found[words] = token
        return {words: token for words, token in found.items() if words not in several}

    def _spelled(self, tokens: Sequence[int], *, special: bool = True) -> str:
        return str(
            self._encoder.tokenizer.decode(tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        )

    def _check_ids(self, tokens: Sequence[int]) -> None:
        if any(not 0 <= token < self._encoder.size for token in tokens):
            raise Refused("wrong_tokenizer", f"a token id is outside 0..{self._encoder.size - 1}")

    def _check_count(self, counted: int | None, tokens: Sequence[int]) -> None:
        if counted is not None and counted != len(tokens):
            raise Refused("retokenised", f"{len(tokens)} tokens here, {counted} where they were served")

    def _check_length(self, prompt: Sequence[int]) -> None:
        length = self._encoder.max_length
        if len(prompt) >= length:
            raise Refused("too_long", f"the prompt has {len(prompt)} tokens, allowed are 1..{length - 1}")

    def _check_size(self, characters: int) -> None:
        if characters > LONGEST_TOKEN * self._encoder.max_length:
            raise Refused("too_long", f"more text than {self._encoder.max_length} tokens can hold")

    def _without_private(self, logprobs: LogProbs | None) -> LogProbs | None:
        """Return the log-probabilities; None where the alternatives to the answered tokens spell private content."""
        if logprobs is None:
            return None
        rows = [[self._named(token) for token, _ in row] for row in logprobs]
        return None if spells_private(rows, self._redact) else logprobs

    def _named(self, token: int | str) -> str:
        if isinstance(token, int) and token not in self._names:
            self._names[token] = self._spelled([token]) if 0 <= token < self._encoder.size else ""
        return token if isinstance(token, str) else self._names[token]

    def _check_redacted(self, tokens: Sequence[int]) -> None:
        words = self._spelled(tokens)
        if self._redact(words) != words:
            raise Refused("redacted", "the token ids spell private content")
