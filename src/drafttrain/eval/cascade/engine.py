"""The second loop: a router says who writes the next span, a judge may take it back. LOSSY.

N = nodes, V = vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from drafttrain.core.device_time import Span as DeviceSpan
from drafttrain.core.probability import draw
from drafttrain.core.proposals import Context
from drafttrain.core.random import stream
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.texts import Prompt
from drafttrain.eval.cascade.boundary import Marks
from drafttrain.eval.cascade.drafted import Drafted
from drafttrain.eval.cascade.router import Pair, Router
from drafttrain.eval.cascade.spans import CascadeGeneration, Span, Writer, Written
from drafttrain.eval.cascade.text_reader import TextReader
from drafttrain.eval.ledger import Ledger
from drafttrain.target_model.cached_lm import CachedLM


class WritesOn(Protocol):
    """Continues the shared text."""

    def write(self, text: Context) -> list[float]:
        """Append one token or several; return their entropies in bits, if they are needed."""
        ...


@dataclass
class Plain:
    """Writes token by token from a model's own distribution."""

    reader: TextReader
    generator: torch.Generator
    reads_entropies: bool

    def write(self, text: Context) -> list[float]:
        """Append one token."""
        probs = self.reader.next()
        only = probs.only_token(0)
        text.tokens.append(draw(probs.row(0), self.generator) if only is None else only)
        return [entropy_bits(probs)] if self.reads_entropies else []


def entropy_bits(probs: TargetProbs) -> float:
    """Return the entropy of the only row at temperature 1, in bits."""
    return float(torch.special.entr(probs.log_probs_at_one()[0].exp()).sum()) / math.log(2)


@dataclass
class _Text:
    """One prompt that is being continued."""

    context: Context
    writers: dict[Writer, WritesOn]
    by: list[Writer] = field(default_factory=list)
    """The writer of each new token."""
    scores: list[float] = field(default_factory=list)
    num_taken_back: int = 0


class CascadeEngine:
    """Decodes prompts one at a time with two models. A model reads the other's tokens when it writes next.

    At temperature 0 each token is its writer's argmax. Above 0, the large model draws from the stream of plain decoding, so that a
    text that it writes alone is that of plain decoding, token for token.
    """

    def __init__(self, pair: Pair, router: Router) -> None:
        assert pair.draft is None or not router.reads_entropies, "`decoder_of` refuses it"
        self.pair, self.router, self.ledger = pair, router, Ledger()
        target, sampling = pair.target, pair.sampling
        small_lm = CachedLM(pair.small, name="drafter", listener=self.ledger.append)
        self._drafted = None if pair.draft is None else Drafted(pair, small_lm, self.ledger.append)
        large_lm = (
            CachedLM(target.model, name="target", listener=self.ledger.append)
            if self._drafted is None
            else self._drafted.engine.lm
        )
        self._readers = {
            Writer.LARGE: TextReader(large_lm, sampling, num_tokens=target.num_tokens),
            Writer.SMALL: TextReader(small_lm, sampling, num_tokens=target.num_tokens),
        }
        self._stop_tokens = frozenset(target.eos_token_ids if pair.stop_tokens is None else pair.stop_tokens)

    @torch.no_grad()
    def generate(self, prompt: Prompt) -> CascadeGeneration:
        """Continue a prompt until the text ends or its length is reached."""
        before, span = len(self.ledger.events), DeviceSpan(self._readers[Writer.LARGE].lm.device)
        text = self._begin(prompt)
        self.router.begin(stream(self.pair.seed, "route", prompt.id))
        while not self._ended(text):
            wanted = self.router.next()
            written = self._write(text, wanted)
            if wanted.writer is Writer.SMALL and not self._stays(text, written):
                self._take_back(text, written)
                written = self._write(text, replace(wanted, writer=Writer.LARGE))
            self.router.observe(written)
        return CascadeGeneration(
            id=prompt.id,
            tokens=text.context.tokens[text.context.num_prompt_tokens :],
            num_by_large=text.by.count(Writer.LARGE),
            num_switches=sum(one is not other for one, other in zip(text.by, text.by[1:], strict=False)),
            num_taken_back=text.num_taken_back,
            scores=text.scores,
            forwards=self.ledger.events[before:],
            seconds=span.end().seconds,
        )

    def _begin(self, prompt: Prompt) -> _Text:
        if not prompt.tokens:
            raise ValueError(f"prompt {prompt.id!r} is empty: it needs at least one token")
        context = Context(prompt.id, list(prompt.tokens), len(prompt.tokens))
        streams = {
            Writer.LARGE: stream(self.pair.seed, "verdict", prompt.id),
            Writer.SMALL: stream(self.pair.seed, "draft", prompt.id),
        }
        if self._drafted is not None:
            context, streams[Writer.SMALL] = self._drafted.begin(prompt, self._readers[Writer.LARGE])
        for reader in self._readers.values():
            reader.begin(context, begun=self._drafted is not None)
        writers: dict[Writer, WritesOn] = {
            writer: Plain(reader, streams[writer], self.router.reads_entropies)
            for writer, reader in self._readers.items()
        }
        if self._drafted is not None:
            writers[Writer.LARGE] = self._drafted
        return _Text(context, writers)

    def _write(self, text: _Text, span: Span) -> Written:
        """Write a span; tokens behind its end, which were drafted beyond it, are dropped."""
        tokens, start = text.context.tokens, len(text.context.tokens)
        marks = Marks(self.pair.target.tokenizer, span.unit.marks)
        entropies: list[float] = []
        end, complete = None, False
        while end is None:
            known = len(tokens)
            entropies += text.writers[span.writer].write(text.context)
            for length in range(known + 1, len(tokens) + 1):
                complete = marks.completed_by_last(tokens[start - span.num_before : length])
                if complete or self._is_end(text.context, length) or length - start == span.unit.tokens:
                    end = length
                    break
        self._shorten(text, end)
        text.by += [span.writer] * (end - start)
        return Written(span.writer, start, tokens[start:], complete, entropies)

    def _stays(self, text: _Text, written: Written) -> bool:
        score = self.router.judged(written, self._readers[Writer.LARGE])
        if score is None:
            return True
        text.scores.append(score)
        return self.router.stays(score)

    def _take_back(self, text: _Text, written: Written) -> None:
        self._shorten(text, written.start)
        del text.by[written.start - text.context.num_prompt_tokens :]
        text.num_taken_back += len(written.tokens)

    def _shorten(self, text: _Text, length: int) -> None:
        if length < len(text.context.tokens):
            del text.context.tokens[length:]
            for reader in self._readers.values():
                reader.cut()

    def _ended(self, text: _Text) -> bool:
        context = text.context
        return len(context.tokens) > context.num_prompt_tokens and self._is_end(context, len(context.tokens))

    def _is_end(self, context: Context, length: int) -> bool:
        """Return whether the text of this length is finished: by its last token, or because no more may follow."""
        full = length - context.num_prompt_tokens >= self.pair.max_new_tokens
        return full or context.tokens[length - 1] in self._stop_tokens
