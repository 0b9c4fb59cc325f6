"""Tiny targets, decoding with them, and two checks that every proposer must pass: output distribution, and replay."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama

V = 257
PROMPTS = [Prompt(str(i), list(range(1 + i, 4 + 5 * i))) for i in range(3)]


def noisy(model: Any, scale: float) -> Any:
    torch.manual_seed(1)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return changed


def decode(
    target: Target, proposer: Any, *, prompts=PROMPTS, temperature=0.0, policy=None, new=40, **options: Any
) -> Any:
    engine = Engine(
        target,
        proposer,
        rule=options.pop("rule", Lossless()),
        policy=policy or FixedLength(),
        sampling=Sampling(temperature),
        max_new_tokens=new,
        **options,
    )
    return engine.generate(prompts)


def greedy(target: Target, prompt: Prompt, new: int, stop: int | None = None) -> list[int]:
    tokens = torch.tensor([list(prompt.tokens)])
    out = target.model.generate(tokens, max_new_tokens=new, do_sample=False, eos_token_id=stop, pad_token_id=0)
    return out[0, len(prompt.tokens) :].tolist()


def small_target() -> Target:
    model = random_llama(num_layers=1, vocab_size=8, hidden_size=16).double()
    return Target(model, byte_tokenizer(), name="small", fingerprint="")


def chi_square(
    model: Any,
    proposer: Any,
    temperature: float,
    *,
    samples: int = 2500,
    prepare: Any = None,
    policy: Any = None,
    target: Target | None = None,
    engine: Any = None,
) -> float:
    """Return the p-value of the first two sampled tokens against the target's distribution, which is enumerated.

    Args:
        engine: What decodes in place of an engine of this proposer.
    """
    if target is None:
        target = Target(model, byte_tokenizer(), name="small", fingerprint="")
    engine = engine or Engine(
        target,
        proposer,
        rule=Lossless(),
        policy=policy or FixedLength(FixedLengthSettings(2)),
        sampling=Sampling(temperature),
        max_new_tokens=4,
        stop_tokens=(),
    )
    if prepare:
        prepare(engine)
    prompts = [Prompt(str(i), [1, 2, 3]) for i in range(samples)]
    found = [
        tuple(g.tokens[1:3]) for start in range(0, samples, 500) for g in engine.generate(prompts[start : start + 500])
    ]
    with torch.no_grad():
        first = (model(torch.tensor([[1, 2, 3]])).logits[0, -1] / temperature).softmax(-1)
        after = model(torch.tensor([[1, 2, 3, a] for a in range(8)])).logits[:, -1].div(temperature).softmax(-1)
        pairs = [[1, 2, 3, a, b] for a in range(8) for b in range(8)]
        third = model(torch.tensor(pairs)).logits[:, -1].div(temperature).softmax(-1).view(8, 8, 8)
    wanted = torch.einsum("a,ab,abc->bc", first, after, third).flatten()
    counts = torch.zeros(64, dtype=torch.float64)
    for b, c in found:
        counts[8 * b + c] += 1
    order = wanted.argsort(descending=True)
    large = [int(i) for i in order if wanted[i] * samples >= 5]
    observed = [float(counts[i]) for i in large] + [samples - sum(float(counts[i]) for i in large)]
    expected = [float(wanted[i]) * samples for i in large] + [samples * (1 - sum(float(wanted[i]) for i in large))]
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    return float(stats.chisquare(observed, expected, sum_check=False).pvalue)


def power(samples: int, distance: float, freedom: int, *, level: float = 1e-3) -> float:
    """Return the chance that a chi-square test finds an output at least so far from the target's, in total variation."""
    return float(stats.ncx2.sf(stats.chi2.isf(level, freedom), freedom, 4 * samples * distance**2))


def rounds_of_replay(
    target: Target, drafter: Drafter, prompts: Sequence[Prompt], *, temperature: float, num_draft_tokens: Sequence[int]
) -> list[Tensor]:
    """Return the difference in rounds between decoding and replay, for each text.

    Args:
        num_draft_tokens: Decoded with the first, replayed with each of them. At other lengths replay should differ.
    """
    policy = FixedLength(FixedLengthSettings(num_draft_tokens[0]))
    options: dict[str, Any] = {"prompts": prompts, "temperature": temperature, "policy": policy, "new": 32}
    found = decode(target, drafter.proposer(target), stop_tokens=(), **options)
    assert any(len(one.rounds) < len(one.tokens) for one in found), (
        "no draft token was accepted: there is nothing to compare"
    )
    texts = [Text(one.id, list(one.prompt_tokens), list(one.tokens)) for one in found]
    rows = replay_rows(target, drafter, texts, Sampling(temperature))
    return [
        torch.tensor([len(one.rounds) - expected_rounds(row, count) for one, row in zip(found, rows, strict=True)])
        for count in num_draft_tokens
    ]


def standard_error(values_N: Tensor) -> float:
    """Return the standard error of a mean."""
    return float(values_N.std()) / len(values_N) ** 0.5
