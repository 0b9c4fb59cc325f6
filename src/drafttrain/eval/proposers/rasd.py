"""RASD: a drafter's tree and a retrieved tree in one proposal.

V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Budget, Context, DraftStep, More, NodeKind, Proposal, Verdict
from drafttrain.core.roles import DraftsInTarget, DraftsWithOwnCache, Proposer, Remembers
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.eval.proposers import Surroundings, make, proposers
from drafttrain.eval.proposers.ngram import NgramSettings


@dataclass
class RasdSettings:
    """A drafter's tree and a retrieved tree in one proposal."""

    retrieval: Any = setting(NgramSettings(), help="The proposer of the retrieved tree, by kind.", registry=proposers)
    drafter: Any = setting(
        None,
        help="The proposer of the drafter's tree, by kind; null: the drafter that is evaluated.",
        registry=proposers,
    )
    retrieved: int = setting(8, help="Most nodes of eval.length's tree that are retrieved ones.", ge=1)
    min_probability: float = setting(
        0.01, help="Least probability, by the drafter, of the first token of a retrieved path.", ge=0, lt=1
    )
    chain: bool = setting(
        False, help="The drafter drafts a chain, which is sampled at temperature > 0, and not a tree."
    )

    @property
    def extends_drafter(self) -> bool:
        """It adds nodes to those of the drafter that is evaluated."""
        return self.drafter is None

    @property
    def reads_drafter(self) -> bool:
        """It uses the drafter that is evaluated, or one of its parts does."""
        parts = (self.drafter, self.retrieval)
        return self.drafter is None or any(getattr(one, "reads_drafter", False) for one in parts)

    @property
    def nodes_come_first(self) -> bool:
        """One of its parts finds its own nodes in a verdict by their numbers."""
        return self.drafter is None or getattr(self.drafter, "nodes_come_first", False)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if getattr(self.drafter, "in_target", False):
            return [
                f"drafter: {self.drafter.kind} drafts with the verifying target's own blocks, on its own nodes only: choose another"
            ]
        if not getattr(self.retrieval, "nodes_come_first", False):
            return []
        return [
            f"retrieval: {self.retrieval.kind} keeps a cache by the numbers of its nodes, and retrieved nodes come after the drafter's: "
            "make it `drafter`, or retrieve with another kind"
        ]


def fused(model: Proposal, retrieved: Proposal, budget: Budget, *, may_begin: Callable[[int], bool]) -> Proposal:
    """Return a proposal with the nodes of the drafter, then those of the retrieved tree that it lacks.

    The output distribution stays the target's. Siblings are verified in order: those of the drafter as it drew them, then the
    retrieved ones, which are FIXED. A retrieved token that the drafter drew too is one node with it: after its rejection the
    residual has no mass at it, so a second one could not be accepted.

    Args:
        may_begin: Whether a retrieved path may begin with this token, if the drafter did not draft it.
    """
    tokens, parents, depths = (part.tolist() for part in (model.tokens_N, model.parents_N, model.depths_N))
    children: list[dict[int, int]] = [{} for _ in tokens]
    for node in range(1, len(tokens)):
        children[parents[node]].setdefault(tokens[node], node)
    count = [parents.count(node) for node in range(len(tokens))]
    place = {0: 0}
    pairs = zip(retrieved.tokens_N.tolist(), retrieved.parents_N.tolist(), strict=True)
    for node, (token, parent) in enumerate(pairs):
        if parent not in place:
            continue
        under = place[parent]
        if token in children[under]:
            place[node] = children[under][token]
            continue
        full = len(tokens) > budget.nodes or depths[under] >= budget.depth or count[under] >= budget.width
        if full or (under == 0 and not may_begin(token)):
            continue
        place[node] = children[under][token] = len(tokens)
        count[under] += 1
        tokens.append(token)
        parents.append(under)
        depths.append(depths[under] + 1)
        children.append({})
        count.append(0)
    added = len(tokens) - len(model.tokens_N)
    if model.beside is not None:
        raise CheckpointError("rasd: a drafter with rows beside its own nodes cannot be extended by other nodes")
    kinds_N = torch.cat([model.kinds_N, torch.full((added,), NodeKind.FIXED.value)])
    rows_N = None if model.q_row_N is None else torch.cat([model.q_row_N, torch.full((added,), -1)])
    return replace(
        model,
        tokens_N=torch.tensor(tokens),
        parents_N=torch.tensor(parents),
        depths_N=torch.tensor(depths),
        kinds_N=kinds_N,
        q_row_N=rows_N,
    )


@proposers.register("rasd", RasdSettings)
class Rasd:
    """Composes two proposers. Retrieved nodes come after the drafter's, so both find their own nodes in a verdict.

    Retrieved paths are pruned at their first token by the drafter's probability of it, the only one that is known without a
    further call. It is not known where the drafter has a vocabulary of its own and its tree is FIXED, or where it is no model:
    then nothing is pruned.

    Source: Quan et al. 2025, RASD: Retrieval-Augmented Speculative Decoding, Findings of ACL 2025.
    """

    def __init__(
        self, model: Proposer, retrieval: Proposer, settings: RasdSettings, *, widths: Collection[int]
    ) -> None:
        if isinstance(model, DraftsInTarget):
            raise CheckpointError(
                "rasd: a drafter that runs the target's first blocks cannot be extended by other nodes"
            )
        self._model = model
        self._retrieval = retrieval
        self._settings = settings
        self._widths = widths
        self.needs = model.needs | retrieval.needs

    @classmethod
    def create(cls, settings: RasdSettings, surroundings: Surroundings) -> Proposer:
        """Return the proposer of these settings."""
        target, drafter = surroundings.target, surroundings.drafter
        if settings.drafter is not None:
            model = make(settings.drafter, surroundings)
        else:
            assert drafter is not None, "an evaluation has a drafter"
            model = drafter.proposer(target, surroundings.listener)
        in_target_ids = drafter is None or drafter.vocabulary is None
        widths = (target.vocab_size, target.num_tokens) if in_target_ids else ()
        return cls(model, make(settings.retrieval, surroundings), settings, widths=widths)

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return why sequences of up to `longest` tokens must be drafted one at a time; None: they can be batched."""
        parts = [part for part in (self._model, self._retrieval) if isinstance(part, DraftsWithOwnCache)]
        return next((why for part in parts if (why := part.why_one_at_a_time(longest))), None)

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start both parts."""
        self._model.begin(contexts, seen)
        self._retrieval.begin(contexts, seen)

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return the fused proposal of each sequence. The drafter gets the nodes that are not retrieved."""
        first: dict[int, Tensor] = {}

        def noting_the_first(step: DraftStep) -> bool | More:
            if step.depth == 1:
                first[step.sequence] = step.logits_V
            return more(step)

        of_retrieval = [replace(one, nodes=min(one.nodes, self._settings.retrieved)) for one in budgets]
        retrieved = self._retrieval.propose(of_retrieval, sampling, generators, more)
        of_model = [
            self._of_model(budget, found.num_draft_tokens) for budget, found in zip(budgets, retrieved, strict=True)
        ]
        drafted = self._model.propose(of_model, sampling, generators, noting_the_first)
        return [
            fused(own, found, budget, may_begin=self._may_begin(own, first.get(number)))
            for number, (own, found, budget) in enumerate(zip(drafted, retrieved, budgets, strict=True))
        ]

    def _of_model(self, budget: Budget, retrieved: int) -> Budget:
        """Return the drafter's budget. In a chain, retrieved tokens have their place only after the drafter's."""
        nodes = max(budget.nodes - retrieved, min(budget.nodes, 1)) if budget.width > 1 else budget.nodes
        width = 1 if self._settings.chain else budget.width
        return replace(budget, nodes=nodes, depth=min(budget.depth, nodes), width=width)

    def _may_begin(self, own: Proposal, logits_V: Tensor | None) -> Callable[[int], bool]:
        """Return whether the drafter's probability of a first token is large enough, or not known."""
        if own.q_rows_RV is not None and own.q_row_N is not None and int(own.q_row_N[0]) >= 0:
            probs_V = own.q_rows_RV[int(own.q_row_N[0])]
        elif logits_V is not None and len(logits_V) in self._widths:
            probs_V = logits_V.float().softmax(dim=-1)
        else:
            return lambda token: True
        least = self._settings.min_probability
        return lambda token: token < len(probs_V) and float(probs_V[token]) >= least

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Update both parts."""
        self._model.observe(verdicts, seen)
        self._retrieval.observe(verdicts, seen)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._model.drop(keep)
        self._retrieval.drop(keep)

    def forget(self) -> None:
        """Let the parts return to their state before the first prompt."""
        for part in (self._model, self._retrieval):
            if isinstance(part, Remembers):
                part.forget()
