"""Labels of the controller, from the frozen target itself: one forward, no completion is written.

T = tokens of a text, N = labelled positions, D = hidden, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from drafttrain.core.target_rows import TargetNeeds
from drafttrain.eval.stop_exit.lines import LEAST_CONTEXT, Lines
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import final_norm
from drafttrain.target_model.logits import head_logits


class Action(IntEnum):
    """What to do with a token after some blocks."""

    GO_ON = 0
    EXIT = 1
    STOP = 2


@dataclass(frozen=True)
class LabelledRows:
    """Positions of texts: by layer, the state after the final norm, and the label."""

    features_ND: Mapping[int, Tensor]
    labels_N: Mapping[int, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.labels_N.values())))


def windows(texts: Sequence[tuple[str, Sequence[int]]], *, length: int, number: int) -> Iterator[Sequence[int]]:
    """Yield windows of texts, at most `number`, evenly over all; they do not overlap."""
    found = [
        tokens[start : start + length]
        for _, tokens in texts
        for start in range(0, len(tokens), length)
        if len(tokens) - start > 2 * LEAST_CONTEXT
    ]
    for index in range(min(number, len(found))):
        yield found[index * len(found) // min(number, len(found))]


@torch.no_grad()
def label(target: Target, lines: Lines, tokens: Sequence[int], *, layers: Sequence[int]) -> LabelledRows:
    """Return the labels of a text's positions whose line ends within it.

    - STOP: the target's greedy completion of the line from here is not the true rest of the line. That is so exactly where its
      likeliest token differs from the true one at this or a later position of the line, so the true text is all that is read.
    - EXIT: otherwise, if the shared head's likeliest token is the target's.
    - GO_ON: otherwise.

    Tokens that end a line count as equal whatever they spell behind it.

    Args:
        layers: Numbers of blocks after which the controller decides.
    """
    tokens_T = torch.tensor(list(tokens))
    positions_T = torch.arange(len(tokens_T))
    seen = target.read(tokens_T[None], positions_T[None], TargetNeeds(hidden=tuple(layers), final=True))
    assert seen.final_BTD is not None
    assert seen.hidden_BTD is not None
    whole_T = lines.same_V[likeliest(target, seen.final_BTD[0])]
    next_T = torch.cat([lines.same_V[tokens_T[1:]], tokens_T.new_tensor([-1])])
    end_T = lines.next_end(tokens_T)
    wrong_T = torch.where(whole_T == next_T, len(tokens_T), positions_T)
    next_wrong_T = wrong_T.flip(0).cummin(0).values.flip(0)
    # The token at `end` is the prediction of position `end` - 1.
    accepted_T = next_wrong_T >= end_T
    rows_N = ((end_T < len(tokens_T)) & (positions_T >= LEAST_CONTEXT)).nonzero()[:, 0]
    features, labels = {}, {}
    for layer in layers:
        normed_ND = final_norm(target.model)(seen.hidden_BTD[layer][0])
        same_T = lines.same_V[likeliest(target, normed_ND)] == whole_T
        label_T = torch.where(accepted_T, same_T.long() * Action.EXIT, torch.tensor(int(Action.STOP)))
        features[layer], labels[layer] = normed_ND[rows_N.to(normed_ND.device)].float().cpu(), label_T[rows_N]
    return LabelledRows(features, labels)


def joined(parts: Sequence[LabelledRows]) -> LabelledRows:
    """Return the rows of several texts."""
    layers = parts[0].labels_N.keys()
    return LabelledRows(
        {layer: torch.cat([part.features_ND[layer] for part in parts]) for layer in layers},
        {layer: torch.cat([part.labels_N[layer] for part in parts]) for layer in layers},
    )


def likeliest(target: Target, normed_ND: Tensor) -> Tensor:
    """Return the likeliest token of each row by the target's head, on the CPU; ids that the tokenizer has not are left out."""
    tokens_N: Tensor = head_logits(target.model, normed_ND)[:, : target.num_tokens].argmax(dim=-1)
    return tokens_N.cpu()
