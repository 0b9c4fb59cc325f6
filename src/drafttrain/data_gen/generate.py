"""Text that the target writes: shards that are byte for byte the same however often the run was killed.

B = sequences, V = vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.console import progress, say
from drafttrain.core.errors import DataError
from drafttrain.core.files import sha256_of, write_json, write_text
from drafttrain.core.probability import sampling_probs
from drafttrain.core.processes import first, first_before_others, own_share, wait_for_all
from drafttrain.core.random import stream, stream_seed
from drafttrain.core.records import Sampling
from drafttrain.data_gen.formats import Encoder
from drafttrain.data_gen.quarantine import read_items
from drafttrain.data_gen.settings import GenerateSettings
from drafttrain.data_gen.sources import content_of, sources
from drafttrain.target import Target
from drafttrain.target.cached_lm import CachedLM


@dataclass(frozen=True)
class Task:
    """One text to write."""

    id: str
    prompt: Sequence[int]
    sampling: Sampling


def generate(settings: GenerateSettings, target: Target, folder: Path, *, seed: int, max_length: int) -> Path:
    """Write the shards that are missing, then the manifest; return the folder. Several processes share the shards out.

    Which texts are decoded together is part of the plan, because padding moves logits by rounding: a shard depends on the
    recipe, never on where an earlier run was killed.

    Raises:
        DataError: The folder holds shards of another plan, target or tokenizer.
    """
    about = {
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "tokenizer_fingerprint": target.tokenizer_fingerprint,
        "seed": seed,
        "max_length": max_length,
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "settings": asdict(settings) | {"prompts": content_of(settings.prompts)},
    }
    manifest = folder / "manifest.json"
    plan_file = folder / "plan.json"
    if plan_file.exists() and json.loads(plan_file.read_text(encoding="utf-8")) != json.loads(json.dumps(about)):
        raise DataError(f"{folder}: holds shards of another plan; remove the folder or give the run another name")
    if manifest.exists():
        return folder
    write_json(plan_file, about)
    tasks = _tasks(settings, target, folder / "quarantine.jsonl", seed=seed, max_length=max_length)
    size = settings.records_per_shard
    shards = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    missing = [number for number in range(len(shards)) if not _shard(folder, number).exists()]
    own = own_share(missing)
    with progress("generating", total=sum(len(shards[number]) for number in own), unit="texts") as bar:
        for number in own:
            write_text(_shard(folder, number), "".join(_lines(shards[number], target, settings, seed=seed, bar=bar)))
    wait_for_all("texts are generated")
    with first_before_others("it writes the manifest"):
        if first():
            write_json(manifest, _manifest(about, folder, shards))
    return folder


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.jsonl"


def _tasks(settings: GenerateSettings, target: Target, quarantine: Path, *, seed: int, max_length: int) -> list[Task]:
    """Return the texts to write: prompts in a shuffled order, temperatures in turn; bad prompts go into quarantine."""
    encoder = Encoder(target.tokenizer, max_length)
    prompts = list(
        read_items(
            sources.build(settings.prompts),
            lambda item: encoder.prompts(item.value, id=item.where, prompt_tokens=settings.prompt_tokens),
            quarantine,
            name="data.generate.prompts",
            max_items=getattr(settings.prompts, "max_items", None),
        )
    )
    prompts.sort(key=lambda prompt: stream_seed(seed, "prompt order", prompt[0]))
    if len(prompts) < settings.num_records:
        say(f"{len(prompts):,} prompts for {settings.num_records:,} texts: prompts are used again, with other draws")
    tasks = []
    for number in range(settings.num_records):
        again, place = divmod(number, len(prompts))
        id, tokens = prompts[place]
        # A prompt that is used again goes on to the next temperature: greedy, it would give the same text.
        temperature = settings.temperatures[(place + again) % len(settings.temperatures)]
        sampling = Sampling(temperature, top_p=1.0 if temperature == 0 else settings.top_p)
        tasks.append(Task(f"{id}#{again}" if again else id, tokens, sampling))
    return tasks


def _lines(shard: Sequence[Task], target: Target, settings: GenerateSettings, *, seed: int, bar: Any) -> list[str]:
    """Return the shard's lines, in the order of its tasks."""
    written: dict[int, list[int]] = {}
    # Texts of one sampling rule and of like prompt lengths are decoded together.
    order = sorted(range(len(shard)), key=lambda i: (shard[i].sampling.temperature, len(shard[i].prompt), i))
    for temperature in dict.fromkeys(task.sampling.temperature for task in shard):
        members = iter([i for i in order if shard[i].sampling.temperature == temperature])
        while batch := list(islice(members, settings.batch_size)):
            texts = continuations([shard[i] for i in batch], target, max_new_tokens=settings.max_new_tokens, seed=seed)
            written |= dict(zip(batch, texts, strict=True))
            bar.advance(len(batch))
    return [_line(task, written[i], target) for i, task in enumerate(shard)]


def _line(task: Task, new: Sequence[int], target: Target) -> str:
    record = {
        "id": task.id,
        "tokens": [*task.prompt, *new],
        "loss_mask": [0] * len(task.prompt) + [1] * len(new),
        "sampling": asdict(task.sampling),
        "drawn_by": target.fingerprint,
    }
    return json.dumps(record, separators=(",", ":")) + "\n"


@torch.no_grad()
def continuations(tasks: Sequence[Task], target: Target, *, max_new_tokens: int, seed: int) -> list[list[int]]:
    """Return what the target writes after each prompt; all tasks share one sampling rule.

    Every record has its own stream of random numbers, named by (seed, record id): one number a token.
    """
    sampling = tasks[0].sampling
    lm = CachedLM(target.model, name="target")
    ends = set(target.eos_token_ids)
    new: list[list[int]] = [[] for _ in tasks]
    numbers_BT = torch.stack(
        [torch.rand(max_new_tokens, dtype=torch.float64, generator=stream(seed, "text", task.id)) for task in tasks]
    )
    lm.begin([list(task.prompt[:-1]) for task in tasks])
    live = list(range(len(tasks)))
    inputs = [[task.prompt[-1]] for task in tasks]
    for step in range(max_new_tokens):
        seen = lm.forward(inputs)
        lm.cache.commit()
        logits_BV = torch.cat([output.logits_BTV[0, -1:] for output in seen if output.logits_BTV is not None])
        chosen = _choose(logits_BV[:, : target.num_tokens], sampling, numbers_BT[live, step].to(logits_BV.device))
        for row, token in zip(live, chosen, strict=True):
            new[row].append(token)
        going = [place for place, token in enumerate(chosen) if token not in ends]
        if not going:
            break
        if len(going) < len(live):
            lm.drop(going)
            live = [live[place] for place in going]
        inputs = [[new[row][-1]] for row in live]
    return new


def _choose(logits_BV: Tensor, sampling: Sampling, numbers_B: Tensor) -> list[int]:
    """Draw one token a row by inverting its distribution function at the row's number."""
    if sampling.temperature == 0:
        return [int(token) for token in logits_BV.argmax(-1)]
    below_BV = sampling_probs(logits_BV, sampling).double().cumsum(-1)
    drawn_B1 = torch.searchsorted(below_BV, numbers_B[:, None] * below_BV[:, -1:], right=True)
    return [int(token) for token in drawn_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1)]


def _manifest(about: dict[str, Any], folder: Path, shards: Sequence[Sequence[Task]]) -> dict[str, Any]:
    def entry(number: int, shard: Sequence[Task]) -> dict[str, Any]:
        path = _shard(folder, number)
        return {"file": path.name, "records": len(shard), "sha256": sha256_of(path)}

    return about | {"shards": [entry(number, shard) for number, shard in enumerate(shards)]}
