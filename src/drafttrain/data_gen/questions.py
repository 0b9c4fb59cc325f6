"""Questions that the target writes itself after its chat template's opening of a user's turn (Magpie)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from drafttrain.core.errors import DataError
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Backend, Plan, Task, backends
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.settings import PROMPTS, GenerateSettings
from drafttrain.data_gen.shards import write_shards
from drafttrain.data_gen.sources.magpie import MagpieSettings
from drafttrain.target_model import Target


def write_questions(
    wanted: MagpieSettings, generate: GenerateSettings, target: Target, folder: Path, *, seed: int
) -> MagpieSettings:
    """Let the target write the questions that are missing, by the backend of its answers; return the settings that read them.

    Raises:
        DataError: The target has no chat template, or one that puts nothing before a question.
    """
    opening, ending = Encoder(target.tokenizer, 1).template.around_question
    if not opening or not ending:
        raise DataError(
            f"{target.name}: no chat template that opens and ends a user's turn, so it cannot write questions: leave the source "
            f"magpie out of {PROMPTS}"
        )
    plan = Plan(
        target=target, folder=folder, max_new_tokens=wanted.max_tokens, batch_size=generate.batch_size, seed=seed
    )
    backend: Backend = backends.build(generate.backend, plan)
    sampling = Sampling(wanted.temperature, top_p=wanted.top_p)
    write_shards(
        folder,
        lambda: ([Task(f"question:{number}", opening, sampling) for number in range(wanted.number)], {}),
        about=plan.about()
        | {
            "opening": opening,
            "sampling": asdict(sampling),
            "number": wanted.number,
            "max_tokens": wanted.max_tokens,
            "batch_size": generate.batch_size,
            "records_per_shard": generate.records_per_shard,
            "backend": backend.content(),
        },
        backend=backend,
        target=target,
        size=generate.records_per_shard,
        what="writing questions",
    )
    return replace(wanted, path=str(folder))
