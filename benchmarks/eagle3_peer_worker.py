"""The part of eagle3_peer.py that runs in the environment of speculators: its own `train` command, on a CPU.

Its trainer puts everything on the device number `local_rank` and waits for an accelerator. Two functions are replaced: the rank
is "cpu" and the wait does nothing. So it trains on the CPU, otherwise unchanged.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Carry out the request: write the dataset, or train."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    answer = prepare(**request["prepare"]) if "prepare" in request else train(request["train"], request["seconds_to"])
    print(json.dumps(answer))


def prepare(records: str, model: str, data: str, taps: list[int]) -> dict[str, Any]:
    """Write texts and hidden states as its offline generation does: inputs of the tapped blocks, and the last state before its norm."""
    from datasets import Dataset
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    kept: dict[int, torch.Tensor] = {}

    def keep(place: int) -> Any:
        def hook(_: Any, arguments: Any, named: Any) -> None:
            kept[place] = (arguments[0] if arguments else named["hidden_states"])[0]

        return hook

    for tap in taps:
        target.model.layers[tap].register_forward_pre_hook(keep(tap), with_kwargs=True)
    target.model.norm.register_forward_pre_hook(keep(-1), with_kwargs=True)
    folder = Path(data) / "hidden_states"
    folder.mkdir(parents=True)
    rows = [json.loads(line) for line in Path(records).read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        tokens = torch.tensor(row["tokens"])
        with torch.no_grad():
            target(tokens[None])
        states = torch.stack([kept[tap] for tap in (*taps, -1)], dim=1).contiguous()
        save_file({"hidden_states": states, "token_ids": tokens}, folder / f"hs_{number}.safetensors")
    table = {
        "input_ids": [row["tokens"] for row in rows],
        "loss_mask": [[int(one) for one in row["mask"]] for row in rows],
        "seq_len": [len(row["tokens"]) for row in rows],
    }
    Dataset.from_dict(table).with_format("torch").save_to_disk(str(Path(data) / "dataset"))
    return {"records": len(rows)}


def train(arguments: list[str], seconds_to: str) -> dict[str, Any]:
    """Run its command; the CPU seconds are those of the loop over epochs, including its loader and its checkpoints."""
    import speculators.train.trainer as trainer
    from speculators.train.cli import main as command
    from speculators.train.config import TrainConfig

    trainer.get_local_rank = lambda: "cpu"
    torch.accelerator.synchronize = lambda *_: None
    whole = trainer.Trainer.run_training
    spent: dict[str, Any] = {}

    def timed(self: Any) -> Any:
        began = _seconds()
        result = whole(self)
        spent["seconds"] = _seconds() - began
        spent["steps"] = self.global_step
        return result

    trainer.Trainer.run_training = timed
    sys.argv = ["train", *arguments]
    command(TrainConfig.resolve())
    Path(seconds_to).write_text(json.dumps(spent), encoding="utf-8")
    return spent


def _seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
