"""The large model's spans by the lossless engine: the small model, which has read the text anyway, drafts for them."""

from __future__ import annotations

import torch

from drafttrain.core.proposals import Context
from drafttrain.core.roles import ForwardListener
from drafttrain.core.texts import Prompt
from drafttrain.drafters.causal_lm.proposer import LMProposer
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.cascade.router import Pair
from drafttrain.eval.cascade.text_reader import TextReader
from drafttrain.eval.engine import Engine
from drafttrain.eval.length import length_policies
from drafttrain.target_model.cached_lm import CachedLM


class Drafted:
    """Writes by rounds of the lossless engine, on the caches of both models; a span may end within a round.

    Args:
        small: The small model's cache, in which it drafts too.
    """

    def __init__(self, pair: Pair, small: CachedLM, listener: ForwardListener) -> None:
        proposer = LMProposer(
            small,
            rows=int(pair.small.get_output_embeddings().weight.shape[0]),
            target_vocab_size=pair.target.vocab_size,
            num_tokens=pair.target.num_tokens,
        )
        self.engine = Engine(
            pair.target,
            proposer,
            rule=Lossless(),
            policy=length_policies.build(pair.draft),
            sampling=pair.sampling,
            max_new_tokens=pair.max_new_tokens,
            seed=pair.seed,
            listener=listener,
            stop_tokens=pair.stop_tokens,
        )

    def begin(self, prompt: Prompt, large: TextReader) -> tuple[Context, torch.Generator]:
        """Read a prompt with both models; return its text, and the stream that drafts are drawn from."""
        self._large = large
        self._decoding = self.engine.begin([prompt])
        return self._decoding[0].context, self._decoding[0].draft_stream

    def write(self, text: Context) -> list[float]:
        """Append the tokens of one round."""
        self._large.catch_up()
        self.engine.advance(self._decoding)
        return []
