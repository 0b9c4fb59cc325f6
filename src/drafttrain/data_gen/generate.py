"""Texts that the target generates: a shard is complete or absent, so that a killed run continues.

The built-in backend writes the same bytes however often the run is killed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drafttrain.core.console import progress, say
from drafttrain.core.errors import DataError
from drafttrain.core.files import sha256_of, write_json, write_text
from drafttrain.core.random import stream_seed
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Backend, Outcome, Plan, Task, backends
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.names import Names, content_name, shared_names
from drafttrain.data_gen.quarantine import read_items
from drafttrain.data_gen.settings import GenerateSettings
from drafttrain.data_gen.sources import PromptSource, Source, content_of, sources
from drafttrain.distributed.collectives import first_before_others, own_share, wait_for_all
from drafttrain.distributed.world import is_first
from drafttrain.target_model import Target


def generate(
    settings: GenerateSettings,
    target: Target,
    folder: Path,
    *,
    seed: int,
    max_length: int,
) -> Path:
    """Write the missing shards, then the manifest; return the folder. Several processes divide the shards.

    The plan fixes which texts are decoded together, because padding moves logits by rounding: a shard depends on the recipe,
    never on where an earlier run was killed.

    Raises:
        DataError: The folder holds shards of another plan, target or tokenizer; or the backend cannot continue.
    """
    backend: Backend = backends.build(
        settings.backend,
        Plan(
            target=target,
            folder=folder,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            seed=seed,
        ),
    )
    about = {
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "tokenizer_fingerprint": target.tokenizer_fingerprint,
        "seed": seed,
        "max_length": max_length,
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "settings": _content(settings, backend),
    }
    manifest = folder / "manifest.json"
    plan_file = folder / "plan.json"
    if plan_file.exists() and json.loads(plan_file.read_text(encoding="utf-8")) != json.loads(json.dumps(about)):
        raise DataError(f"{folder}: holds shards of another plan; remove the folder or give the run another name")
    if manifest.exists():
        return folder
    write_json(plan_file, about)
    tasks, num_shared = _tasks(settings, target, folder / "quarantine.jsonl", seed=seed, max_length=max_length)
    size = settings.records_per_shard
    shards = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    missing = [number for number in range(len(shards)) if not _shard(folder, number).exists()]
    own = {number: shards[number] for number in own_share(missing)}
    with progress("generating", total=sum(map(len, own.values())), unit="texts") as bar:
        for number, outcomes in backend.write(own, bar):
            _store(folder, number, own[number], outcomes, target)
    wait_for_all("texts are generated")
    with first_before_others("it writes the manifest"):
        if is_first():
            for left in folder.glob("answers-*.jsonl"):
                # The run was killed between storing a shard and removing the answers it was made of.
                left.unlink()
            shared = {"shared_names": num_shared} if num_shared else {}
            write_json(manifest, _manifest(about | shared, folder, shards, backend.reproducible()))
    return folder


def _content(settings: GenerateSettings, backend: Backend) -> dict[str, Any]:
    """Return the settings that the texts depend on.

    The built-in backend is not named, so that shards written before other backends existed stay valid.
    """
    content = asdict(settings) | {"prompts": content_of(settings.prompts)}
    del content["backend"]
    return content | ({"backend": named} if (named := backend.content()) else {})


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.jsonl"


def _accounts(folder: Path, number: int) -> Path:
    return folder / f"accounts-{number:05d}.jsonl"


def _tasks(
    settings: GenerateSettings, target: Target, quarantine: Path, *, seed: int, max_length: int
) -> tuple[list[Task], int]:
    """Return the texts to write, and how many prompts repeat the name of an earlier one.

    Prompts are shuffled and temperatures used in turn; bad prompts are quarantined.
    """
    encoder = Encoder(target.tokenizer, max_length).reading_as(settings.prompts)
    source: Source = sources.build(settings.prompts)
    names = Names()
    found = read_items(
        source,
        lambda item: (
            source.prompts(item, encoder)
            if isinstance(source, PromptSource)
            else encoder.prompts(item.value, id=content_name(item.value), prompt_tokens=settings.prompt_tokens)
        ),
        quarantine,
        name="data.generate.prompts",
        max_items=settings.prompts.max_items,
        max_lost_share=settings.prompts.max_lost_share,
    )
    prompts = [(names.own(id), tokens) for id, tokens in found]
    encoder.report("data.generate.prompts")
    num_shared = names.num_shared
    if num_shared:
        say(f"data.generate.prompts: {shared_names(num_shared)}")
    prompts.sort(key=lambda prompt: stream_seed(seed, "prompt order", prompt[0]))
    if len(prompts) < settings.num_records:
        say(
            f"{len(prompts):,} prompts for {settings.num_records:,} texts: prompts are used again, with other random numbers"
        )
    tasks = []
    for number in range(settings.num_records):
        again, place = divmod(number, len(prompts))
        id, tokens = prompts[place]
        # A prompt that is used again takes the next temperature: greedy decoding would repeat the text.
        temperature = settings.temperatures[(place + again) % len(settings.temperatures)]
        sampling = Sampling(temperature, top_p=1.0 if temperature == 0 else settings.top_p)
        tasks.append(Task(names.own(id) if again else id, tokens, sampling))
    return tasks, num_shared


def _store(folder: Path, number: int, shard: Sequence[Task], outcomes: Sequence[Outcome], target: Target) -> None:
    """Write a shard; before it the accounts of its texts, and the quarantined texts with their reasons."""
    pairs = list(zip(shard, outcomes, strict=True))
    accounts = [{"id": task.id} | _account(outcome) for task, outcome in pairs if outcome.account]
    refused = [
        {"where": task.id, "reason": outcome.reason, "item": {"tokens": list(task.prompt)}}
        for task, outcome in pairs
        if outcome.tokens is None
    ]
    for name, entries in ((_accounts(folder, number), accounts), (folder / f"quarantine-{number:05d}.jsonl", refused)):
        name.unlink(missing_ok=True)
        if entries:
            write_text(name, "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries))
    lines = [_line(task, outcome.tokens, target) for task, outcome in pairs if outcome.tokens is not None]
    write_text(_shard(folder, number), "".join(lines))


def _account(outcome: Outcome) -> dict[str, Any]:
    tokens = None if outcome.tokens is None else len(outcome.tokens)
    return {"tokens": tokens, **outcome.account} | ({"reason": outcome.reason} if outcome.reason else {})


def _line(task: Task, new: Sequence[int], target: Target) -> str:
    record = {
        "id": task.id,
        "tokens": [*task.prompt, *new],
        "loss_mask": [0] * len(task.prompt) + [1] * len(new),
        "sampling": asdict(task.sampling),
        "drawn_by": target.fingerprint,
    }
    return json.dumps(record, separators=(",", ":")) + "\n"


def _manifest(
    about: dict[str, Any], folder: Path, shards: Sequence[Sequence[Task]], reproducible: dict[str, Any]
) -> dict[str, Any]:
    entries = []
    accounts = []
    for number in range(len(shards)):
        path = _shard(folder, number)
        lines = path.read_text(encoding="utf-8").splitlines()
        entries.append({"file": path.name, "records": len(lines), "sha256": sha256_of(path)})
        if _accounts(folder, number).exists():
            lines = _accounts(folder, number).read_text(encoding="utf-8").splitlines()
            accounts += [json.loads(line) for line in lines]
    whole = about | {"shards": entries}
    if reproducible:
        whole["reproducible"] = reproducible
    if accounts:
        whole["accounts"] = _sum(accounts)
        say(f"generated: {_in_words(whole['accounts'])}")
        if inferred := whole["accounts"]["ids"].get("text"):
            say(
                f"{inferred:,} texts came without token ids: their tokens decode to the text and their number is right, but some "
                "texts may be split differently (data.generate.backend.logprobs asks for each token's text)"
            )
    return whole


def _sum(accounts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "texts": sum(one["tokens"] is not None for one in accounts),
        "tokens": sum(one["tokens"] or 0 for one in accounts),
        "retries": sum(one.get("retries", 0) for one in accounts),
        "finish": _counts(one["finish"] for one in accounts if one["tokens"] is not None),
        "ids": _counts(one["ids"] for one in accounts if one["tokens"] is not None),
        "set_aside": _counts(str(one["reason"]).partition(":")[0] for one in accounts if "reason" in one),
    }


def _counts(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))


def _in_words(total: dict[str, Any]) -> str:
    quarantined = ", ".join(f"{kind} {count:,}" for kind, count in total["set_aside"].items())
    return (
        f"{total['texts']:,} texts, {total['tokens']:,} tokens, {total['retries']:,} requests repeated; "
        f"quarantined: {quarantined or 'none'}"
    )
