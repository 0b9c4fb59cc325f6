"""Trains drafters that differ in their tokenizer for stories260K (512 tokens in SentencePiece's form), and prints what it costs.

The drafter and its texts are those of stories260k.py: first run that with `--stages gen`. Tokenizers: the target's, that of
`builtin:target` (byte-level BPE of Python source text, 4,096 tokens), SmolLM2's (byte-level BPE, 49,152 tokens), and plain bytes.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drafttrain.checkpoint import read_drafter
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.drafters.causal_lm.across_tokenizers import EncodedText
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.drafters.causal_lm.retokenized import RetokenizedProposer
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.eval.statistics import ratio_interval
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.other_tokenizer import OtherTokenizer
from drafttrain.target_model.tokenizer import load_tokenizer, num_ids

TOKENIZERS = {"target's": None, "builtin": "builtin:target", "smollm2": "known:smollm2", "bytes": "bytes"}


def main() -> None:
    """Fit one drafter after the other; print a row of figures for each temperature."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="OUT of stories260k.py")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a prompt")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bounds", action="store_true", help="only what the shared tokens hold: nothing is trained")
    parser.add_argument(
        "--language-model", action="store_true", help="a drafter that was trained on the same texts without the target"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="DRAFTER",
        help="block efficiency by tokens and by strings",
    )
    parser.add_argument("--tokenizers", nargs="+", choices=TOKENIZERS, default=list(TOKENIZERS))
    arguments = parser.parse_args()
    bytes_folder = arguments.out / "bytes"
    byte_tokenizer().save_pretrained(bytes_folder)
    if arguments.bounds:
        bounds(arguments, str(bytes_folder))
        return
    if arguments.compare:
        compare(arguments)
        return
    if arguments.language_model:
        print(f"written: {language_model(arguments)}")
        return
    print("| tokenizer | shared | temperature | block efficiency | alpha | at most | parity | MBSU | speed-up | fit |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in arguments.tokenizers:
        began = time.perf_counter()
        folder = fit(arguments, name, str(bytes_folder) if name == "bytes" else TOKENIZERS[name])
        seconds = time.perf_counter() - began
        results = {name: folder / "eval.json"}
        if TOKENIZERS[name] is not None:
            results[f"{name}, strings"] = evaluated(arguments, folder, folder / "drafter", "strings")
        for label, result in results.items():
            for row in rows(label, folder / "drafter", result, seconds=seconds):
                print("| " + " | ".join(row) + " |", flush=True)


@torch.no_grad()
def bounds(arguments: argparse.Namespace, bytes_folder: str) -> None:
    """Print the target's probability of the shared tokens, over the texts that it writes after the test prompts at temperature 1."""
    target = Target.load(TargetSettings(model=the_target(arguments.out)))
    prompts = [json.loads(line)["tokens"] for line in (arguments.out / "test.jsonl").read_text().splitlines()]
    tasks = [Task(str(n), tokens, Sampling(1.0)) for n, tokens in enumerate(prompts[: arguments.prompts])]
    texts = continuations(tasks, target, max_new_tokens=arguments.tokens, seed=0)
    rows = []
    for task, new in zip(tasks, texts, strict=True):
        logits_TV = target.model(torch.tensor([[*task.prompt, *new]])).logits[0, len(task.prompt) - 1 : -1]
        rows.append(logits_TV.double().softmax(-1))
    probs_NV = torch.cat(rows)
    greedy_N = probs_NV.argmax(-1)
    print(f"{len(probs_NV):,} tokens of {len(tasks)} texts")
    print("| tokenizer | its tokens | shared | alpha at most, temperature 1 | likeliest token is shared |")
    print("|---|---|---|---|---|")
    for name in arguments.tokenizers:
        if (place := bytes_folder if name == "bytes" else TOKENIZERS[name]) is None:
            continue
        own = load_tokenizer(resolve_folder(place))
        ids_R = OtherTokenizer(target.tokenizer, own, target_rows=target.vocab_size).target_R
        mass, likeliest = float(probs_NV[:, ids_R].sum(-1).mean()), float(torch.isin(greedy_N, ids_R).double().mean())
        print(f"| {name} | {num_ids(own):,} | {len(ids_R)} | {mass:.3f} | {likeliest:.3f} |")


def the_target(out: Path) -> str:
    """Return the target of the recipe."""
    return str(yaml.safe_load((out / "stories260k.yaml").read_text())["target"]["model"])


def fit(arguments: argparse.Namespace, name: str, tokenizer: str | None) -> Path:
    """Return the run folder of a trained drafter."""
    out = arguments.out
    texts = {"kind": "generated", "path": str(out / "stories260k" / "data" / "generated")}
    overrides = [
        f"name=cross-{'same' if tokenizer is None else name}",
        f"drafter.tokenizer={json.dumps(tokenizer)}",
        "data.generate=null",
        f"data.sources={json.dumps([texts])}",
        f"train.max_steps={arguments.steps}",
        f"train.eval_every_steps={arguments.steps}",
        f"train.batch_size={arguments.batch}",
        "train.eval_prompts=16",
        f"eval.num_prompts={arguments.prompts}",
        f"eval.max_new_tokens={arguments.tokens}",
        "eval.temperatures=[0.0, 1.0]",
        "eval.start=false",
        "export.require={parity: true}",
    ]
    command = [sys.executable, "-m", "drafttrain", "fit", str(out / "stories260k.yaml"), "--runs", str(out), *overrides]
    with (out / f"cross-{name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return Path(out) / overrides[0].removeprefix("name=")


def language_model(arguments: argparse.Namespace) -> Path:
    """Train a model of the drafter's size on the texts alone, in the tokens of builtin:target; return its folder.

    It is what one finds for a target of another family: it knows all of its own tokens, and nothing of the target.
    """
    out = arguments.out
    tokenizer = load_tokenizer(resolve_folder(the_target(out)))
    shards = sorted((out / "stories260k" / "data" / "generated").glob("shard-*.jsonl"))
    tokens = [json.loads(line)["tokens"] for shard in shards for line in shard.read_text().splitlines()]
    texts = [tokenizer.decode(one, skip_special_tokens=True) for one in tokens]
    (out / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = yaml.safe_load((out / "stories260k.yaml").read_text())
    recipe |= {"name": "cross-language-model", "target": {"model": None, "tokenizer": "builtin:target"}}
    recipe |= {"loss": {"kind": "ce"}, "export": {}, "eval": {}}
    recipe["data"] = {"max_length": 160, "sources": [{"kind": "jsonl", "path": str(out / "texts.jsonl")}]}
    recipe["train"] |= {"max_steps": arguments.steps, "batch_size": arguments.batch, "eval_every_steps": 0}
    file = out / "language-model.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "drafttrain", "fit", str(file), "--runs", str(out)]
    with (out / "cross-language-model.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    model = out / recipe["name"] / "model"
    shutil.copytree(out / recipe["name"] / "drafter", model, dirs_exist_ok=True)
    # Without it the folder is a plain model of another family.
    (model / "drafttrain.json").unlink()
    return model


def compare(arguments: argparse.Namespace) -> None:
    """Print the block efficiency of drafters with their own tokenizer: by shared tokens and by strings, drawn and likeliest."""
    torch.set_num_threads(1)
    target = Target.load(TargetSettings(model=the_target(arguments.out)))
    lines = (arguments.out / "test.jsonl").read_text().splitlines()[: arguments.prompts]
    prompts = [Prompt(str(number), json.loads(line)["tokens"]) for number, line in enumerate(lines)]
    print("| drafter | temperature | what is drafted | block efficiency | accepted of the drafted tokens |")
    print("|---|---|---|---|---|")
    ways = [("tokens", "greedy"), ("strings", "greedy"), ("tokens", "sampled"), ("strings", "sampled")]
    for folder, temperature, (what, draft) in itertools.product(arguments.compare, (0.0, 1.0), ways):
        if temperature == 0 and draft == "sampled":
            continue
        drafter: Any = read_drafter(folder, target)
        drafter.draft = draft
        proposer: Any = drafter.proposer(target)
        if what == "strings":
            # The drafter itself drafts its likeliest token.
            own = drafter.other.own
            drafts = ChainProposer(drafter.model, target_vocab_size=num_ids(own), draft=draft)
            proposer = RetokenizedProposer(drafts, drafter.other, EncodedText(drafter.other))
        engine = Engine(
            target,
            proposer,
            rule=Lossless(),
            policy=FixedLength(),
            sampling=Sampling(temperature),
            max_new_tokens=arguments.tokens,
        )
        found = engine.generate(prompts)
        rounds = [one for generation in found for one in generation.rounds]
        efficiency = ratio_interval([len(one.tokens) for one in found], [len(one.rounds) for one in found])
        share = sum(one.num_accepted for one in rounds) / sum(one.num_draft_tokens for one in rounds)
        words = f"{what}, {'likeliest' if draft == 'greedy' else 'drawn'}"
        row = [folder.parent.name, f"{temperature:g}", words, efficiency.text(), f"{share:.3f}"]
        print(f"| {' | '.join(row)} |", flush=True)


def evaluated(arguments: argparse.Namespace, folder: Path, drafter: Path, choice: str) -> Path:
    """Evaluate a drafter with its own tokenizer, beside prompt lookup; return the result's file."""
    out = folder / choice
    overrides = [
        f"eval.prompts={arguments.out / 'test.jsonl'}",
        "eval.prompt_tokens=null",
        f"eval.num_prompts={arguments.prompts}",
        f"eval.max_new_tokens={arguments.tokens}",
        f"eval.across_tokenizers={choice}",
        "eval.beside=[{kind: ngram}]",
    ]
    command = [sys.executable, "-m", "drafttrain", "eval", str(drafter), "--out", str(out), *overrides]
    with (arguments.out / f"{folder.name}-{choice}.log").open("w") as log:
        subprocess.run([*command, "--target", the_target(arguments.out)], check=True, stdout=log, stderr=log)
    return out / "eval.json"


def rows(name: str, drafter: Path, file: Path, *, seconds: float) -> list[list[str]]:
    """Return the figures of a result, by temperature; of prompt lookup too, where it was evaluated beside the drafter."""
    result = json.loads(file.read_text())
    found = []
    drafters = [(part, label) for part in result["temperatures"] for label in part["drafters"] if label != "start"]
    for part, label in drafters:
        figures: dict[str, Any] = part["drafters"][label]
        parity = figures.get("parity")
        found.append(
            [
                name if label == "drafter" else label,
                shared(drafter) if label == "drafter" else "",
                f"{part['temperature']:g}",
                interval(figures["block_efficiency"]),
                f"{figures['alpha']['value']:.3f}" if figures.get("alpha") else "",
                f"{figures.get('alpha_bound', 1.0):.3f}" if figures.get("alpha") else "",
                f"{parity['num_equal']} of {parity['num_prompts']}" if parity else "",
                f"{figures['mbsu']:.2f}",
                interval(figures["speedup"]),
                f"{seconds:.0f} s",
            ]
        )
    return found


def interval(found: dict[str, float]) -> str:
    """Return a value with its bounds."""
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def shared(drafter: Path) -> str:
    """Return the number of shared tokens."""
    target = Target.load(TargetSettings(model=the_target(drafter.parent.parent)))
    vocabulary = read_drafter(drafter, target).vocabulary
    return "all" if vocabulary is None else str(len(vocabulary))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes and an end of text."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>"]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


if __name__ == "__main__":
    main()
