"""Out of memory: one error that says what to change, and by how much."""

from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import DrafttrainError
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from tests.training.layouts import run


class Large(CausalLMDrafter):
    """Asks for more memory than any machine has, at its third step."""

    def forward(self, batch: DraftBatch) -> Any:
        if batch.step == 2:
            torch.empty(2**50)
        return super().forward(batch)


@pytest.mark.parametrize("stage", [None, 2])
def test_a_step_that_needs_too_much_memory_reports_what_to_change(tmp_path: Path, stage: int | None) -> None:
    with pytest.raises(DrafttrainError) as caught:
        run(tmp_path, drafter=Large, records_per_device=4, stage=stage)
    said = str(caught.value)
    assert "out of memory on cpu in step 3" in said
    assert "GB resident so far" in said
    assert f"allocate {4 * 2**50} bytes" in said
    assert "train.records_per_device=2 (now 4): 2 of a step's records at once in place of 4, 50%" in said
    assert "train.activation_checkpointing=true" in said
    assert "train.target_placement=absent, with a data.cache: 0.00 GB" in said


def test_a_batch_of_single_records_gets_no_advice_to_read_fewer(tmp_path: Path) -> None:
    with pytest.raises(DrafttrainError) as caught:
        run(tmp_path, drafter=Large, records_per_device=1, activation_checkpointing=True)
    assert "train.records_per_device" not in str(caught.value)
    assert "data.max_length" in str(caught.value)


def test_memory_that_ends_while_it_measures_is_another_matter(tmp_path: Path) -> None:
    def estimate(_: Any) -> dict[str, Any]:
        torch.empty(2**50)
        return {}

    with pytest.raises(DrafttrainError, match="in the measurement on held-out data") as caught:
        run(tmp_path, estimate=estimate, eval_every_steps=3)
    assert "train.eval_prompts" in str(caught.value)


def test_control_another_error_stays_what_it_is(tmp_path: Path) -> None:
    def estimate(_: Any) -> dict[str, Any]:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path, estimate=estimate, eval_every_steps=3)
