"""What tuning its target costs: the tuned target beside the original, both decoded without drafts on the same prompts.

N = rows, V = vocabulary
"""

from __future__ import annotations

import torch

from drafttrain.core.generations import Generation
from drafttrain.core.loss_rows import kl_divergence
from drafttrain.data_gen.checkers import checkers
from drafttrain.eval.arms import Arm
from drafttrain.eval.quality import TunedFigures, agreement, solved, task_score
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.statistics import ratio_interval, summed_by
from drafttrain.target_model import Target

ROWS_AT_ONCE = 1024


def tuned_figures(tuned: Arm, original: Arm, settings: EvalSettings) -> TunedFigures:
    """Compare plain decoding of both targets."""
    greedy = original.engine.sampling.temperature == 0
    sums = [divergence(original.target, tuned.target, one) for one in original.generations]
    lengths = [len(one.tokens) for one in original.generations]
    task = None
    if settings.checker is not None:
        checker = checkers.build(settings.checker)
        prompts = [prompt for prompt in original.prompts if prompt.turn == 1]
        shares = [
            solved(checker, arm.target.tokenizer, prompts, arm.generations[: len(prompts)]) for arm in (tuned, original)
        ]
        task = task_score(*shares)
    return TunedFigures(
        divergence=ratio_interval(*summed_by(original.units, sums, lengths)),
        agreement=agreement(original.generations, tuned.generations, original.units) if greedy else None,
        task=task,
    )


@torch.no_grad()
def divergence(original: Target, tuned: Target, text: Generation) -> float:
    """Return the sum of KL(original || tuned) over the new tokens of a text, nats."""
    rows = [one.answer_rows(text.prompt_tokens, text.tokens) for one in (original, tuned)]
    index_N = torch.arange(len(text.tokens), device=original.device)
    total = 0.0
    for part_N in index_N.split(ROWS_AT_ONCE):
        log_p_NV, log_q_NV = (one.at(part_N)[:, : original.num_tokens].float().log_softmax(dim=-1) for one in rows)
        total += float(kl_divergence(log_p_NV.exp(), log_p_NV, log_q_NV).double().sum())
    return total
