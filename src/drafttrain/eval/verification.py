"""The one walk that verifies every proposal losslessly: chains and trees, sampled, fixed and mixed, and greedy.

N = nodes, V = vocabulary
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from drafttrain.core.probability import draw, residual, residual_without
from drafttrain.core.proposals import DrawMode, NodeKind, Proposal
from drafttrain.core.target_probs import TargetProbs

FIXED = NodeKind.FIXED.value


class Decisions(Protocol):
    """Source of the random decisions of a verdict."""

    def accept(self, probability: float) -> bool:
        """Return True with this probability (1 or more: always)."""
        ...

    def draw(self, probs_V: Tensor) -> int:
        """Draw one token from a distribution."""
        ...


class RandomDecisions:
    """Random decisions from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def accept(self, probability: float) -> bool:
        return float(torch.rand((), dtype=torch.float64, generator=self._generator)) < probability

    def draw(self, probs_V: Tensor) -> int:
        return draw(probs_V, self._generator)


def walk(
    proposal: Proposal,
    target_probs: TargetProbs,
    decisions: Decisions,
    *,
    credit: Callable[[float], float] | None = None,
    overrule: Callable[[int], bool] | None = None,
    moved: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[list[int], int | None]:
    """Return (accepted path from the root, the token after it); both have exactly the target's distribution.

    After an unread leaf there is no row of the target, and no token: it is the next round's to draft or to draw.

    Siblings are tested in the order in which they were drawn. A child drawn from q is accepted with probability
    p(x) / q(x); after a rejection the next sibling is tested against the residual p <- norm(max(p - q, 0)). FIXED is the
    case q = 1 at x. Where all siblings are FIXED, one draw y ~ p decides, and the walk continues at the child with token
    y: the same distribution with one random number.

    Args:
        proposal: The tree.
        target_probs: The target's distribution after every node, with temperature, top-k and top-p applied.
        decisions: Source of random decisions.
        credit: Lossy: test credit(p(x)) instead of p(x). The residual is still that of p.
        overrule: Lossy: called for the children of a node in draw order when all were rejected; the first True is accepted.
        moved: Lossy: test drawn tokens against p' = moved(p, q) in place of p. The residual is that of p and min(q, p').

    Source: Leviathan et al. 2022, arXiv 2211.17192, algorithm 1, for chains; Miao et al. 2023, SpecInfer, arXiv 2305.09781,
    for siblings drawn independently; Jeon et al. 2024, arXiv 2402.14160, for siblings drawn without replacement.
    """
    tokens, kinds = proposal.tokens_N.tolist(), proposal.kinds_N.tolist()
    children = _children(proposal)
    probs = TokenProbs(proposal, target_probs)
    path = [0]
    while True:
        if path[-1] == proposal.num_read:
            return path, None
        group = children[path[-1]]
        if credit is None and all(kinds[child] == FIXED for child in group):
            only = target_probs.only_token(path[-1])
            token = decisions.draw(target_probs.row(path[-1])) if only is None else only
            match = next((child for child in group if tokens[child] == token), None)
            match = _overruled(group, overrule) if match is None else match
            if match is None:
                return path, token
            path.append(match)
            continue
        target_V = target_probs.row(path[-1])
        drafter_V = _distribution_of_children(proposal, path[-1])
        for child in group:
            drawn_from_V = drafter_V if kinds[child] != FIXED else None
            if child == group[0]:
                target, drafter = probs.of(child)
            else:
                target = float(target_V[tokens[child]])
                drafter = 1.0 if drawn_from_V is None else float(drawn_from_V[tokens[child]])
            accepted_V = drawn_from_V
            if moved is not None and drawn_from_V is not None:
                moved_V = moved(target_V, drawn_from_V)
                target, accepted_V = float(moved_V[tokens[child]]), torch.minimum(drawn_from_V, moved_V)
            if decisions.accept(_ratio(target, drafter, credit)):
                path.append(child)
                break
            if drawn_from_V is None or accepted_V is None:
                target_V = residual_without(target_V, tokens[child])
                continue
            target_V = residual(target_V, accepted_V)
            if proposal.draw is DrawMode.WITHOUT_REPLACEMENT:
                drafter_V = residual_without(drawn_from_V, tokens[child])
        else:
            accepted = _overruled(group, overrule)
            if accepted is None:
                return path, decisions.draw(target_V)
            path.append(accepted)


def _overruled(group: Sequence[int], overrule: Callable[[int], bool] | None) -> int | None:
    """Return the first child that is accepted although the walk rejected it."""
    return None if overrule is None else next((child for child in group if overrule(child)), None)


def _children(proposal: Proposal) -> dict[int, list[int]]:
    """Return the children of every node in draw order."""
    children: dict[int, list[int]] = defaultdict(list)
    for node, parent in enumerate(proposal.parents_N.tolist()):
        children[parent].append(node)
    return children


def _distribution_of_children(proposal: Proposal, node: int) -> Tensor | None:
    """Return the distribution that the SAMPLED children of a node were drawn from."""
    if proposal.q_rows_RV is None or proposal.q_row_N is None:
        return None
    row = int(proposal.q_row_N[node])
    return proposal.q_rows_RV[row] if row >= 0 else None


class TokenProbs:
    """Probabilities of the draft tokens before any rejection. Those of a GPU are copied for all nodes at the first use."""

    def __init__(self, proposal: Proposal, target_probs: TargetProbs) -> None:
        self._proposal = proposal
        self._target_probs = target_probs
        self._found: list[list[float]] | None = None

    def of(self, node: int) -> tuple[float, float]:
        """Return (p(x), q(x)) of a node's token x; q is 1 where the node is FIXED."""
        if self._target_probs.computed_NV is None:
            return self._of_one(node)
        if self._found is None:
            self._found = self._read(self._target_probs.computed_NV)
        return self._found[0][node], self._found[1][node]

    def _of_one(self, node: int) -> tuple[float, float]:
        one, parent, token = self._proposal, int(self._proposal.parents_N[node]), int(self._proposal.tokens_N[node])
        drafter_V = None if int(one.kinds_N[node]) == FIXED else _distribution_of_children(one, parent)
        target = float(self._target_probs.row(parent)[token])
        return target, 1.0 if drafter_V is None else float(drafter_V[token])

    def _read(self, target_probs_NV: Tensor) -> list[list[float]]:
        one, device = self._proposal, target_probs_NV.device
        parents_N, tokens_N = one.parents_N[1:], one.tokens_N[1:]
        rows_N = torch.zeros_like(parents_N) if one.q_row_N is None else one.q_row_N[parents_N].clamp_min(0)
        parents_N, tokens_N, rows_N = torch.stack([parents_N, tokens_N, rows_N]).to(device)
        target_N = target_probs_NV[parents_N, tokens_N].double()
        drafter_N = torch.ones_like(target_N)
        if one.q_rows_RV is not None:
            drafter_N = one.q_rows_RV[rows_N, tokens_N].double()
        target, drafter = torch.stack([target_N, drafter_N]).tolist()
        kinds = one.kinds_N[1:].tolist()
        drafter = [1.0 if kind == FIXED else prob for kind, prob in zip(kinds, drafter, strict=True)]
        return [[1.0, *target], [1.0, *drafter]]  # the root is never tested


def _ratio(target: float, drafter: float, credit: Callable[[float], float] | None) -> float:
    """Return p(x) / q(x), not clamped to 1."""
    # A token of probability 0 cannot have been drawn; rejecting it keeps the distribution exact.
    return (target if credit is None else credit(target)) / drafter if drafter > 0 else 0.0
