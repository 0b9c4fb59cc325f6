"""The target without some sublayers as a language model that drafts: it reads the target's cache and writes beside it.

N = nodes
"""

from __future__ import annotations

from collections.abc import Sequence

from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.ragged_cache import RaggedCache, Tree
from drafttrain.target_model.sublayers import Skipped, Sublayers


class LMBeside:
    """Reads the root and draft tokens of a round after the target's cached text. `keep` forgets them all.

    Committed tokens have the target's own keys and values, as in SWIFT and Self-Speculative decoding.
    """

    def __init__(self, sublayers: Sublayers, skipped: Skipped) -> None:
        self.sublayers = sublayers
        self.skipped = skipped
        self.target: CachedLM | None = None
        """The verifying target's, once it is shared."""
        self._cache: RaggedCache | None = None
        """Of the tokens of this round; None: none was read yet."""

    @property
    def lm(self) -> CachedLM:
        """The verifying target."""
        assert self.target is not None, "the engine calls `share` before `begin`"
        return self.target

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache by sequence, including those of this round."""
        return self.lm.lengths if self._cache is None else self._cache.lengths

    @property
    def kept(self) -> list[int]:
        """Tokens in the target's cache by sequence at the beginning of this round."""
        return self.lm.kept if self._cache is None else self._cache.kept

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return why sequences of up to `longest` tokens are read one at a time; None: they can be batched."""
        return self.lm.why_one_at_a_time(longest)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Start new sequences: the target has read their prompts."""
        self._cache = None

    def forward(
        self, tokens: Sequence[Sequence[int]], *, parents: Sequence[Tree] | None = None, needs: TargetNeeds
    ) -> list[TargetOutput]:
        """Read new tokens of every sequence without the skipped sublayers."""
        if self._cache is None:
            self._cache = self.lm.cache.beside(self.skipped.attention)
        return self.lm.read_beside(
            self._cache, tokens, sublayers=self.sublayers, skipped=self.skipped, parents=parents, needs=needs
        )

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Forget the tokens of this round: the target's call writes its own keys and values of accepted ones."""
        self._cache = None

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences: the target has dropped the others."""
        assert self._cache is None, "between rounds only"
