"""Texts of a backend in shards: a shard is complete or absent, so that a killed run continues.

The built-in backend writes the same bytes however often the run is killed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drafttrain.core.console import progress, say
from drafttrain.core.files import sha256_of, write_json, write_text
from drafttrain.data_gen.backends import Backend, Outcome, Task
from drafttrain.data_gen.record_images import stored
from drafttrain.data_gen.record_keys import IMAGES
from drafttrain.distributed.collectives import first_before_others, own_share, wait_for_all
from drafttrain.distributed.world import is_first
from drafttrain.target_model import Target

Tasks = tuple[list[Task], dict[str, Any]]
"""The texts to write, and facts about them for the manifest."""


def write_shards(
    folder: Path,
    tasks: Callable[[], Tasks],
    *,
    about: dict[str, Any],
    backend: Backend,
    target: Target,
    size: int,
    what: str,
) -> Path:
    """Write the missing shards, then the manifest; return the folder. Several processes divide the shards.

    The plan fixes which texts are decoded together, because padding moves logits by rounding: a shard depends on the recipe,
    never on where an earlier run was killed.

    Args:
        tasks: Returns the texts to write; not called when they are all written.
        about: What the texts depend on.
        size: Texts of a shard.
        what: Name of the stage on its progress bar.

    Raises:
        DataError: The backend cannot continue.
    """
    with first_before_others("it finds the texts of this plan"):
        if is_first():
            _find(folder, json.loads(json.dumps(about)))
    manifest = folder / "manifest.json"
    if manifest.exists():
        return folder
    planned, facts = tasks()
    shards = [planned[start : start + size] for start in range(0, len(planned), size)]
    missing = [number for number in range(len(shards)) if not _shard(folder, number).exists()]
    own = {number: shards[number] for number in own_share(missing)}
    with progress(what, total=sum(map(len, own.values())), unit="texts") as bar:
        for number, outcomes in backend.write(own, bar):
            _store(folder, number, own[number], outcomes, target)
    wait_for_all("texts are generated")
    with first_before_others("it writes the manifest"):
        if is_first():
            for left in folder.glob("answers-*.jsonl"):
                # The run was killed between storing a shard and removing the answers it was made of.
                left.unlink()
            write_json(manifest, _manifest(about | facts, folder, shards, backend.reproducible()))
    return folder


def _find(folder: Path, about: dict[str, Any]) -> None:
    """Bring texts of this plan back into the folder; texts of another plan move beside it, and stay."""
    held = _plan(folder)
    if held is not None and held != about and any(folder.glob("shard-*")):
        apart = _beside(folder, held)
        folder.rename(apart)
        say(f"{folder}: its texts depend on settings that have changed: they are kept as {apart.name}")
    if _plan(folder) != about and (earlier := _beside(folder, about)).exists():
        shutil.rmtree(folder, ignore_errors=True)
        earlier.rename(folder)
        say(f"{folder}: texts of these settings were written before: {earlier.name}")
    if _plan(folder) != about:
        if held is not None:
            # No shard is complete here: an earlier try did not get that far.
            shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "plan.json", about)


def _plan(folder: Path) -> Any:
    plan = folder / "plan.json"
    return json.loads(plan.read_text(encoding="utf-8")) if plan.exists() else None


def _beside(folder: Path, about: dict[str, Any]) -> Path:
    """Return where texts of a plan are kept while the folder has those of another one."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return folder.with_name(f"{folder.name}-{digest[:8]}")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.jsonl"


def _accounts(folder: Path, number: int) -> Path:
    return folder / f"accounts-{number:05d}.jsonl"


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
    record: dict[str, Any] = {
        "id": task.id,
        "tokens": [*task.prompt, *new],
        "loss_mask": [0] * len(task.prompt) + [1] * len(new),
        "sampling": asdict(task.sampling),
        "drawn_by": target.fingerprint,
    }
    if task.images:
        record[IMAGES] = [stored(image) for image in task.images]
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
