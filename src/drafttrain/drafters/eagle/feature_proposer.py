"""What proposers over the target's features share: the texts, what of them is unread, and how chains and trees are drawn.

N = slots of one call (the longest sequence's), F = width of the target features
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from drafttrain.core.proposals import Context, Verdict
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.chain_draft import ChainDraft
from drafttrain.drafters.eagle.unread import UnreadText
from drafttrain.drafters.tree_draft import TreeDraft
from drafttrain.target_model import Target


class ReadsFeatures(Protocol):
    """A drafter that reads the target's features."""

    draft: str
    """`sampled`, or `greedy`: chains are FIXED at every temperature, as some engines draft."""

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's id of each token in the drafter's vocabulary; None: the vocabularies are the same."""
        ...

    def needs(self) -> TargetNeeds:
        """Return what is read from the target."""
        ...

    def features(self, seen: TargetOutput) -> Tensor:
        """Return features_BNF from the target's outputs."""
        ...


class CachedLayers(Protocol):
    """Layers with a cache of committed slots."""

    def begin(self, num_sequences: int) -> None:
        """Start on new texts."""
        ...

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        ...


L = TypeVar("L", bound=CachedLayers)


class FeatureProposer(Generic[L]):
    """Keeps the target's features of the committed text until the layers have read them.

    Args:
        layers: Those that draft, with their cache.
    """

    def __init__(self, model: ReadsFeatures, layers: L, target: Target, listener: ForwardListener | None) -> None:
        self.needs = model.needs()
        vocabulary = DraftVocabulary(model.vocabulary, num_tokens=target.num_tokens)
        self._device = target.device
        self._draft = ChainDraft(vocabulary, target.vocab_size, model.draft)
        self._tree_draft = TreeDraft(vocabulary, target.vocab_size, model.draft)
        self._listener = listener
        self._contexts: list[Context] = []
        self._layers = layers
        self._unread = UnreadText(model.features)

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start on new texts: their features are unread."""
        self._contexts = list(contexts)
        self._layers.begin(len(contexts))
        self._unread.begin(contexts, seen)

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Store the target's features of the accepted path. What was drafted has left the cache already."""
        self._unread.add(seen, [len(verdict.path) for verdict in verdicts])

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._unread.drop(keep)
        self._layers.drop(keep)
