"""Measures steps of the shipped recipes on this machine's GPUs: tokens per second, time by part, utilization, memory.

Each recipe trains as `fit` trains it (same module, loader and optimizer, its own loss, precision and micro-batch) on full-length rows
of random tokens. The weights are random, have the real sizes and are made on the device, so nothing is downloaded. Each recipe runs on
one GPU. If there are several GPUs, the ZeRO recipes also run on all of them under stages 1-3. Each case has its own process.

    make gpu-check                                           run the tests for GPUs, then this script
    python benchmarks/gpu.py                                 run only this script; it writes benchmarks/gpu.md
    python benchmarks/gpu.py --device cpu --tiny --out x.md  rehearse the script without a GPU
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from drafttrain.config.load import load_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.core.batches import DraftBatch
from drafttrain.core.peak import peak_of
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.data_gen.sampler import own_shares
from drafttrain.distributed.collectives import together
from drafttrain.distributed.world import is_first, without_launcher, world
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.losses import losses
from drafttrain.target_model import Target
from drafttrain.target_model.device import pick_device
from drafttrain.training.deepspeed_settings import DeepSpeedSettings
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings

OUT = Path(__file__).with_suffix(".md")
RECIPES = (
    "kd_qwen3_8b_0.6b",
    "medusa_llama3.1_8b",
    "kangaroo_llama3.1_8b",
    "eagle3_llama3.1_8b",
    "eagle3_qwen3_8b",
    "eagle3_1_qwen3_8b",
    "p_eagle_qwen3_8b",
)
UNDER_ZERO = ("kd_qwen3_8b_0.6b", "eagle3_llama3.1_8b")
GOAL = {"recipe": "eagle3_llama3.1_8b", "device": "NVIDIA H200", "mfu": 0.43}

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "meta-llama/Llama-3.1-8B-Instruct": (
        LlamaConfig,
        {
            **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072},
            **{"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}, "tie_word_embeddings": False},
        },
    ),
    "Qwen/Qwen3-8B": (
        Qwen3Config,
        QWEN3
        | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
        | {"tie_word_embeddings": False},
    ),
    "Qwen/Qwen3-0.6B": (
        Qwen3Config,
        QWEN3
        | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
        | {"tie_word_embeddings": True},
    ),
}
"""The sizes of the models that the recipes name, from their public configurations."""
SMALL = {
    **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}


@dataclass(frozen=True)
class Case:
    """One measurement, made in its own process or processes."""

    recipe: str
    gpus: int = 1
    stage: int | None = None
    """Stage of ZeRO; None: without DeepSpeed."""
    device: str = "cuda"
    tiny: bool = False
    """Run the same code on shapes that fit a CPU. This measures nothing."""
    warm_steps: int = 5
    steps: int = 20

    @property
    def name(self) -> str:
        """Its name in log lines and files."""
        return self.recipe if self.stage is None else f"{self.recipe} on {self.gpus} GPUs, ZeRO {self.stage}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases that this machine supports and write the table; return 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only a rehearsal; needs --tiny and --out"
    )
    parser.add_argument("--tiny", action="store_true", help="use shapes that fit a CPU; nothing is measured")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each case")
    parser.add_argument("--recipes", nargs="*", default=RECIPES, choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.case:
        with together(timeout_seconds=1800):
            result = measured(Case(**json.loads(given.case)))
            given.result.with_suffix(f".{world().rank}").write_text(json.dumps(result))
        return 0
    if given.device == "cpu" and (not given.tiny or given.out == OUT):
        parser.error("a CPU can only rehearse: --device cpu needs --tiny and an --out other than the table")
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    if list(given.recipes) != list(RECIPES) and given.out == OUT:
        parser.error(f"a table of some recipes would replace the whole table in {OUT.name}. Pass --out.")
    if given.device == "cuda" and not torch.cuda.is_available():
        print("No GPU here (torch.cuda.is_available() is false): nothing was measured.")
        if not given.out.exists():
            given.out.write_text(not_measured(), encoding="utf-8")
        print(f"{given.out}: {given.out.read_text(encoding='utf-8').splitlines()[2]}")
        return 0
    gpus = torch.cuda.device_count() if given.device == "cuda" else 1
    cases = [Case(name) for name in given.recipes]
    if gpus > 1:
        cases += [Case(name, gpus, stage) for name in given.recipes if name in UNDER_ZERO for stage in (1, 2, 3)]
    shared = {"device": given.device, "tiny": given.tiny, "steps": given.steps}
    results = []
    for case in (replace(case, **shared) for case in cases):
        print(f"{case.name} ...", flush=True)
        results.append((case, in_processes(case)))
        # Written after each case, so that results survive if a later case crashes the machine.
        given.out.write_text(table(results), encoding="utf-8")
    print(table(results))
    return int(any("failed" in result for _, result in results))


def in_processes(case: Case) -> dict[str, Any]:
    """Return the figures of a case, or `failed` with the reason."""
    command = [sys.executable]
    if case.gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.gpus)]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        command += [__file__, "--case", json.dumps(asdict(case)), "--result", str(result)]
        environment = without_launcher(os.environ) | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.stderr.write(done.stderr)
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            of_memory = [line for line in lines if "out of memory" in line.lower()]
            return {"failed": (of_memory or lines or [f"exit code {done.returncode}"])[-1][:200]}
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("result.*"))]
    return found[0] | {name: max(one[name] for one in found) for name in ("allocated_gb", "reserved_gb")}


def measured(case: Case) -> dict[str, Any]:
    """Train a few steps as `fit` does; return the figures of the steps after the warm-up."""
    device = pick_device("auto") if case.device == "cuda" else torch.device("cpu")
    recipe = tiny(load_recipe(case.recipe)) if case.tiny else load_recipe(case.recipe)
    target = random_target(recipe, device)
    drafter = random_drafter(recipe, target, device)
    settings = replace(
        recipe.train,
        max_steps=case.warm_steps + case.steps,
        warmup_steps=0,
        log_every_steps=case.warm_steps,
        eval_every_steps=0,
        checkpoint_every_steps=10**9,
        loggers=["csv"],
        deepspeed=None if case.stage is None else DeepSpeedSettings(stage=case.stage),  # type: ignore[arg-type]
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        train(
            drafter,
            losses.build(recipe.loss),
            target=target,
            of_step=full_rows(settings, length=recipe.data.max_length, vocab_size=target.num_tokens),
            estimate=None,
            settings=settings,
            vocab_size=target.num_tokens,
            folder=Path(folder),
        )
        rows = list(csv.DictReader((Path(folder) / "metrics.csv").open())) if is_first() else []
    figures = {
        "parameters": sum(p.numel() for p in drafter.parameters()),
        "micro_batch": settings.largest_micro_batch(world().size),
    }
    figures |= {"allocated_gb": 0.0, "reserved_gb": 0.0, "peak_tflops": peak_of(device, settings.peak_tflops)}
    if device.type == "cuda":
        figures["allocated_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        figures["reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    return figures | (figures_of(rows) if rows else {})


def figures_of(rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Return the means over all rows except the first, which holds the warm-up."""
    kept = rows[1:]
    names = [name for name in kept[0] if name.endswith("_ms")]
    figures: dict[str, Any] = {name: sum(float(row[name]) for row in kept) / len(kept) for name in names}
    steps, tokens = (int(kept[-1][name]) - int(rows[0][name]) for name in ("step", "tokens"))
    figures["tokens_per_second"] = tokens / (steps * figures["step_ms"] / 1000)
    figures["step_tflop"] = sum(int(row["step_flops"]) for row in kept) / len(kept) / 1e12
    utilization = [float(row["mfu"]) for row in kept if row["mfu"]]
    figures["mfu"] = sum(utilization) / len(utilization) if utilization else None
    figures["loss"] = float(kept[-1]["loss"])
    return figures


def tiny(recipe: Recipe) -> Recipe:
    """Return the recipe with few and short rows."""
    drafter = recipe.drafter
    if getattr(drafter, "draft_vocab_size", None):
        drafter = replace(drafter, draft_vocab_size=64)
    return replace(
        recipe,
        drafter=drafter,
        data=replace(recipe.data, max_length=16),
        train=replace(recipe.train, precision="fp32", loss_chunk_rows=None, batch_size=4, records_per_device=2),
    )


def random_model(name: str, device: torch.device, dtype: torch.dtype, *, small: bool) -> Any:
    """Return a model of these sizes with random weights, made on its device."""
    kind, sizes = MODELS[name]
    config = kind(**sizes | (SMALL if small else {}))
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def is_tiny(recipe: Recipe) -> bool:
    """Return whether `tiny` made this recipe."""
    return recipe.data.max_length < 64


def random_target(recipe: Recipe, device: torch.device) -> Target:
    """Return the target of a recipe, with a tokenizer of as many words as its vocabulary."""
    assert recipe.target.model is not None
    dtype = torch.float32 if is_tiny(recipe) else torch.bfloat16
    model = random_model(recipe.target.model, device, dtype, small=is_tiny(recipe))
    words = {f"w{number}": number for number in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    return Target(model, tokenizer, name=recipe.target.model, fingerprint="random")


def random_drafter(recipe: Recipe, target: Target, device: torch.device) -> Any:
    """Return a recipe's drafter before training, in float32; a drafter that the recipe would load gets random weights."""
    torch.manual_seed(0)
    if recipe.drafter.kind == "causal_lm":
        return CausalLMDrafter(random_model(recipe.drafter.checkpoint, device, torch.float32, small=is_tiny(recipe)))
    entry: Any = drafters.entry(recipe.drafter.kind)
    return entry.component.create(recipe.drafter, target=target, tokenizer=target.tokenizer).float().to(device)


def full_rows(settings: TrainSettings, *, length: int, vocab_size: int) -> Callable[[int], list[DraftBatch]]:
    """Return this process's micro-batches of a step: rows of random tokens without padding; the first eighth is not trained."""
    here, count, prompt = world(), settings.batch_size, length // 8
    mask = [False] * prompt + [True] * (length - prompt)
    shares = own_shares(
        [length] * count, records_per_device=settings.records_per_device, rank=here.rank, world_size=here.size
    )

    def of_step(step: int) -> list[DraftBatch]:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, vocab_size, (count, length), generator=generator).tolist()
        records = [Record(f"{step}.{number}", row, mask) for number, row in enumerate(tokens)]
        weight = float(count * (length - prompt))
        return [
            pack([records[number] for number in share], width=length, weight_of_step=weight, step=step)[0]
            for share in shares
        ]

    return of_step


COLUMNS = (
    *("recipe", "GPUs", "ZeRO", "records at once", "tokens/s", "step ms", "fetch", "target", "forward", "backward"),
    *("optimizer", "needed TFLOP per step", "MFU", "GB allocated", "GB reserved"),
)
HEAD = "# Steps of the shipped recipes on GPUs\n\n"
HOW = (
    "Each row trains as `fit` does, with random weights of the real sizes, on random tokens in rows of\n"
    "the recipe's full length without padding. Times are milliseconds per step on the device. MFU is\n"
    "the operations that the step needs, divided by the device's dense 16-bit peak (`docs/metrics.md`).\n"
    "GB is the highest of any process. `make gpu-check` makes this table; `docs/gpu.md` explains what\n"
    "to look at.\n\n"
)


def not_measured() -> str:
    """Return the page for a project that was never measured on a GPU."""
    rows = "\n".join(f"| {name} |" + " not measured |" * (len(COLUMNS) - 1) for name in RECIPES)
    goal = f"Goal: MFU of {GOAL['recipe']} on one {GOAL['device']} at least {GOAL['mfu']:.0%}: not measured.\n"
    return f"{HEAD}Not measured: no GPU was at hand.\n\n{HOW}{head_of_table()}{rows}\n\n{goal}"


def head_of_table() -> str:
    return "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|\n"


def table(results: Sequence[tuple[Case, dict[str, Any]]]) -> str:
    """Return the page: machine, versions, commit, one row per case, and the goal."""
    case = results[0][0]
    lines = [row_of(case, result) for case, result in results]
    what = f"Measured over {case.steps} steps after {case.warm_steps} of warm-up."
    if case.tiny or case.device == "cpu":
        what = "A REHEARSAL of the script with tiny shapes: NOT MEASURED."
    return f"{HEAD}{what}\n\n{machine(case.device)}\n{HOW}{head_of_table()}" + "\n".join(lines) + "\n" + goal(results)


def row_of(case: Case, result: dict[str, Any]) -> str:
    head = (
        f"| {case.recipe} | {case.gpus if case.device == 'cuda' else 0} | {'-' if case.stage is None else case.stage} |"
    )
    if "failed" in result:
        return f"{head} failed: {result['failed'].replace('|', '/')} |" + " |" * (len(COLUMNS) - 4)
    times = [result[name] for name in ("step_ms", "fetch_ms", "target_ms", "forward_ms", "backward_ms", "optimizer_ms")]
    mfu = "peak unknown" if result["mfu"] is None else f"{result['mfu']:.1%}"
    cells = [
        *(str(result["micro_batch"]), f"{result['tokens_per_second']:,.0f}", *(f"{value:,.1f}" for value in times)),
        *(f"{result['step_tflop']:,.1f}", mfu, f"{result['allocated_gb']:.1f}", f"{result['reserved_gb']:.1f}"),
    ]
    return f"{head} " + " | ".join(cells) + " |"


def machine(device: str) -> str:
    """Return date, commit, devices, driver and versions, one per line."""
    versions = {name: version(name) for name in ("torch", "transformers", "lightning", "deepspeed")}
    facts = [f"date {datetime.now(UTC):%Y-%m-%d}, commit {commit() or 'unknown'}", f"processor: {processor()}"]
    if device == "cuda":
        count, properties = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
        facts.append(f"{count} x {properties.name}, {properties.total_memory / 1e9:.0f} GB, driver {driver()}")
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    facts.append(", ".join(f"{name} {value}" for name, value in versions.items()))
    return "".join(f"- {fact}\n" for fact in facts)


def driver() -> str:
    """Return the version of NVIDIA's driver, or '?' if its tool cannot be run."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "?"
    return done.stdout.split("\n")[0].strip() or "?"


def goal(results: Sequence[tuple[Case, dict[str, Any]]]) -> str:
    """Return the line on the goal: met, missed or not measured."""
    of_goal = [result for case, result in results if case.recipe == GOAL["recipe"] and case.gpus == 1]
    measured = of_goal and of_goal[0].get("mfu") is not None and results[0][0].device == "cuda"
    verdict = "not measured"
    if measured and torch.cuda.get_device_name(0) == GOAL["device"]:
        mfu = of_goal[0]["mfu"]
        verdict = f"{'met' if mfu >= GOAL['mfu'] else 'MISSED'}, {mfu:.1%}"
    return f"\nGoal: MFU of {GOAL['recipe']} on one {GOAL['device']} at least {GOAL['mfu']:.0%}: {verdict}.\n"


if __name__ == "__main__":
    sys.exit(main())
