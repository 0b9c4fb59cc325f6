"""One training: where it runs, how it stops, and that its target stays as it was."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from lightning.fabric.accelerators.mps import MPSAccelerator

from drafttrain.cli.app import exit_codes
from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import DrafttrainError, Interrupted
from drafttrain.core.texts import Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.replay import Text, replay_rows
from drafttrain.losses import losses
from drafttrain.target_model import Target
from drafttrain.training.checkpoints import newest_checkpoint
from drafttrain.training.result import TrainResult
from drafttrain.training.run import placement, train
from drafttrain.training.settings import TrainSettings
from drafttrain.training.validation import OF_DRAFTERS
from tests.conftest import byte_tokenizer, random_llama

STEPS = 3


@pytest.fixture
def target() -> Target:
    """A target of its own: these tests meddle with it."""
    return Target(random_llama(), byte_tokenizer(), name="tiny", fingerprint="")


def run(
    folder: Path,
    target: Target,
    *,
    at_step: Callable[[int], None] = lambda step: None,
    estimate: Callable[[Any], dict[str, Any]] | None = None,
    accumulation: int = 1,
    precision: Any = "fp32",
) -> TrainResult:
    """Train for three steps; `at_step` is called when the batch of a step is made."""

    def of_step(step: int) -> list[DraftBatch]:
        at_step(step)
        records = [Record("a", list(range(1, 9)), [True] * 8)]
        return [pack(records, width=8, weight_of_step=7.0 * accumulation)[0] for _ in range(accumulation)]

    settings = TrainSettings(
        max_steps=STEPS,
        batch_size=accumulation,
        records_per_device=1,
        warmup_steps=0,
        loggers=["csv"],
        eval_every_steps=STEPS,
        precision=precision,
    )
    return train(
        CausalLMDrafter(random_llama(seed=1, num_layers=1)),
        losses.build(losses.entry("forward_kl").settings()),
        target=target,
        of_step=of_step,
        estimate=estimate,
        settings=settings,
        vocab_size=257,
        folder=folder,
    )


def test_a_target_that_changes_while_it_trains_is_an_error(target: Target, tmp_path: Path) -> None:
    def one_weight_moves(step: int) -> None:
        if step == 1:
            target.model.model.norm.weight.data[0] += 1e-3

    with pytest.raises(DrafttrainError, match="must stay frozen"):
        run(tmp_path / "changed", target, at_step=one_weight_moves)
    assert not (tmp_path / "changed" / "train.json").exists()
    assert run(tmp_path / "frozen", target).last_step == STEPS


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_request_to_stop_during_the_first_validation_exits_with_75(
    target: Target, tmp_path: Path, accumulation: int
) -> None:
    def estimate(_: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return dict.fromkeys(OF_DRAFTERS, 1.0) | {"message": "measured"}

    with pytest.raises(typer.Exit) as caught, exit_codes(debug=False):
        run(tmp_path, target, estimate=estimate, accumulation=accumulation)
    assert caught.value.exit_code == Interrupted.exit_code
    assert not (tmp_path / "train.json").exists()


def test_a_request_to_stop_after_the_last_step_is_heard(target: Target, tmp_path: Path) -> None:
    digests = iter(range(9))

    def ask(*_: Any) -> None:
        # The first digest is taken before training, the second after it.
        if next(digests) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = target.model.register_state_dict_pre_hook(ask)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as caught, exit_codes(debug=False):
        run(tmp_path, target)
    assert caught.value.exit_code == Interrupted.exit_code
    assert signal.getsignal(signal.SIGTERM) is handler
    hook.remove()
    assert run(tmp_path, target).last_step == STEPS, "the same command continues"


def test_training_runs_where_the_drafter_is(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device, number in (("cuda:1", 1), ("cuda", 0)):
        placed = placement(torch.device(device), TrainSettings())
        assert (placed["accelerator"], placed["devices"]) == ("cuda", [number])
    # On a machine whose own choice would be another device.
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    assert run(tmp_path, target).last_step == STEPS


def test_a_checkpoint_of_garbage_falls_back_to_the_one_before(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "step-00000001.ckpt")
    for number, content in ((2, b"garbage"), (3, b""), (4, b"\x80\x04garbage"), (5, b"PK\x03\x04garbage")):
        (tmp_path / f"step-{number:08d}.ckpt").write_bytes(content)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000001.ckpt"
    assert len(list(tmp_path.glob("*.damaged"))) == 4


def test_a_checkpoint_whose_bytes_have_changed_falls_back_to_the_one_before(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save({"weights": torch.randn(5000)}, tmp_path / f"step-{number:08d}.ckpt")
    newest = tmp_path / "step-00000002.ckpt"
    assert newest_checkpoint(tmp_path) == newest
    written = newest.read_bytes()
    # A page that was lost, as after a power failure: torch reads it without a word.
    middle = len(written) // 2
    newest.write_bytes(written[:middle] + bytes(4096) + written[middle + 4096 :])
    assert torch.load(newest)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000001.ckpt"
    for length in range(0, len(written), 997):
        newest.write_bytes(written[:length])
        assert newest_checkpoint(tmp_path) == tmp_path / "step-00000001.ckpt"


def test_a_checkpoint_that_cannot_be_read_now_is_not_quarantined(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.ckpt").mkdir()
    with pytest.raises(IsADirectoryError):
        newest_checkpoint(tmp_path)
    assert (tmp_path / "step-00000001.ckpt").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_validation_computes_in_the_type_that_training_computes_in(target: Target, tmp_path: Path, precision) -> None:
    found = []

    def estimate(drafter: Any) -> dict[str, Any]:
        """Replay, and note the type of the drafter's last map: a model's first reading is a check of it in its own type."""
        types = []
        layer = drafter.model.model.layers[0].self_attn.q_proj
        watch = layer.register_forward_hook(lambda module, args, output: types.append(output.dtype))
        rows = replay_rows(target, drafter, [Text("a", [1, 2, 3], [4, 5, 6])], Sampling(1.0))
        watch.remove()
        assert all(row.acceptance_T.dtype == "float64" for row in rows)
        found.append(types[-1])
        return dict.fromkeys(OF_DRAFTERS, 1.0) | {"message": ""}

    run(tmp_path, target, estimate=estimate, precision=precision)
    assert found == [torch.bfloat16 if precision == "bf16-mixed" else torch.float32] * 2
