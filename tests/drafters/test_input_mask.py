"""Input masking changes what a drafter reads in training, by step and position, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.drafters.input_mask import InputMask
from drafttrain.drafters.matformer.module import MatFormerDrafter, MatFormerSettings
from drafttrain.drafters.sorted_lm.module import SortedLMDrafter, SortedLMSettings
from drafttrain.losses.ce import CrossEntropy, CrossEntropySettings
from drafttrain.losses.forward_kl import ForwardKL
from drafttrain.losses.step import BatchLoss, batch_loss, with_plan
from drafttrain.online.route import OnlineSetup, Route
from drafttrain.online.settings import OnlineSettings
from drafttrain.online.versions import Versions, publish_first
from drafttrain.target_model import Target
from drafttrain.training.settings import TrainSettings
from tests.conftest import byte_tokenizer, random_llama
from tests.export import folders

MASK, IDS = 257, 257
SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
CE = CrossEntropy(CrossEntropySettings())


def padded_target(*, rows: int = MASK + 3) -> Target:
    return Target(random_llama(vocab_size=rows), byte_tokenizer(), name="tiny", fingerprint="")


def drafter_of(kind: Any = CausalLMDrafter, given: Any = CausalLMSettings, **settings: Any) -> Any:
    target = padded_target()
    torch.manual_seed(3)
    return kind.create(given(**SIZES | settings), target=target, tokenizer=target.tokenizer).train()


def batch_of(*lengths: int, step: int = 0, together: bool = True) -> DraftBatch:
    draws = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, IDS, (length,), generator=draws).tolist() for length in lengths]
    records = [Record(str(i), text, [True] * len(text)) for i, text in enumerate(texts)]
    return pack(records, width=sum(lengths) if together else max(lengths), weight_of_step=1.0, step=step)[0]


def hidden(batch: DraftBatch, ratio: float) -> Tensor:
    return InputMask(ratio, MASK).on(batch).tokens_BT == MASK


def loss_of(drafter: Any, batch: DraftBatch) -> BatchLoss:
    return batch_loss(drafter, CE, with_plan(drafter, CE, batch), vocab_size=IDS)


@pytest.mark.parametrize("ratio", [0.15, 0.5])
def test_a_share_of_the_tokens_is_masked_and_nothing_else_changes(ratio: float) -> None:
    batch = batch_of(9000, 11000)
    read = InputMask(ratio, MASK).on(batch)
    masked_BT = read.tokens_BT == MASK
    assert abs(float(masked_BT.double().mean()) - ratio) < 4 * (ratio * (1 - ratio) / 20000) ** 0.5
    assert torch.equal(read.tokens_BT[~masked_BT], batch.tokens_BT[~masked_BT])
    assert read.loss_mask_BT is batch.loss_mask_BT
    assert read.documents_BT is batch.documents_BT
    # Neighbours are masked independently of each other: as often together as two draws are.
    pairs = masked_BT[0, 1:] & masked_BT[0, :-1]
    assert abs(float(pairs.double().mean()) - ratio**2) < 5 * (ratio**2 / 20000) ** 0.5


def test_masks_depend_on_step_document_and_position_alone() -> None:
    together, step = batch_of(40, 24), batch_of(40, 24, step=1)
    assert torch.equal(hidden(together, 0.5), hidden(batch_of(40, 24), 0.5)), "a resumed run"
    assert not torch.equal(hidden(together, 0.5), hidden(step, 0.5)), "the control: another step"
    apart = batch_of(40, 24, together=False)
    assert apart.tokens_BT.shape[0] == 2
    first, second = (hidden(apart, 0.5)[apart.documents_BT == number] for number in (0, 1))
    assert torch.equal(torch.cat([first, second]), hidden(together, 0.5).flatten())
    assert not torch.equal(first[:24], second), "the control: another document"


def test_the_loss_is_that_of_the_true_labels_after_masked_text() -> None:
    masked, plain = drafter_of(input_mask_ratio=0.3), drafter_of()
    batch = batch_of(30, 20)
    read = masked.input_mask.on(batch)
    found = loss_of(masked, batch)
    logits_BTV = plain(read).logits_BTV(1)[..., :IDS]
    log_q_BTV = torch.log_softmax(logits_BTV.float(), dim=-1)
    wanted = [
        -log_q_BTV[0, t, batch.tokens_BT[0, t + 1]]
        for t in range(49)
        if batch.documents_BT[0, t] == batch.documents_BT[0, t + 1]
    ]
    torch.testing.assert_close(found.loss_N, torch.stack(wanted).detach())
    # The controls: the unmasked text, and masked labels.
    assert (loss_of(plain, batch).loss_N - found.loss_N).abs().max() > 1e-3
    masked_labels_N = batch_loss(plain, CE, read, vocab_size=MASK + 1).loss_N
    assert (masked_labels_N - found.loss_N).abs().max() > 0.1
    found.total.backward()
    embedding = masked.model.get_input_embeddings().weight.grad
    assert embedding[MASK].norm() > 0, "the mask token is learned"
    assert not embedding[MASK + 1 :].any()


def test_ratio_0_is_the_drafter_without_masks_and_validation_reads_every_token() -> None:
    batch, plain = batch_of(30, 20), drafter_of()
    without, masked = drafter_of(input_mask_ratio=0.0), drafter_of(input_mask_ratio=0.3)
    with torch.no_grad():
        wanted_BTD = plain(batch).states_BTD[1]
        assert torch.equal(without(batch).states_BTD[1], wanted_BTD)
        assert not torch.equal(masked(batch).states_BTD[1], wanted_BTD), "the control"
        assert torch.equal(masked.eval()(batch).states_BTD[1], wanted_BTD)


@pytest.mark.parametrize(
    ("kind", "given", "more"),
    [
        (MatFormerDrafter, MatFormerSettings, {"widths": [0.5]}),
        (SortedLMDrafter, SortedLMSettings, {"exits": [1]}),
    ],
)
def test_the_sub_models_of_a_nested_drafter_read_the_same_masked_text(kind: Any, given: Any, more: Any) -> None:
    masked, plain = (drafter_of(kind, given, **more, input_mask_ratio=ratio) for ratio in (0.3, 0.0))
    batch = batch_of(30, 20)
    with torch.no_grad():
        found, wanted = masked(batch), plain(masked.input_mask.on(batch))
    assert torch.equal(found.states_BTD[1], wanted.states_BTD[1])
    (one,), (other,) = found.beside, wanted.beside
    assert torch.equal(one.drafted.states_BTD[1], other.drafted.states_BTD[1])


def test_the_mask_token_is_one_that_no_text_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert drafter_of(input_mask_ratio=0.1).input_mask.token == MASK
    assert drafter_of(input_mask_ratio=0.1, mask_token_id=0).input_mask.token == 0
    assert "drafter.mask_token_id: 0 ends texts" in capsys.readouterr().err
    full = padded_target(rows=IDS)
    settings = CausalLMSettings(**SIZES, input_mask_ratio=0.1)
    with pytest.raises(CheckpointError, match=r"mask_token_id: no unused id .* 257 of this drafter"):
        CausalLMDrafter.create(settings, target=full, tokenizer=full.tokenizer)
    with pytest.raises(CheckpointError, match=r"mask_token_id must be in 0\.\.256 for this drafter, got 300"):
        CausalLMDrafter.create(replace(settings, mask_token_id=300), target=full, tokenizer=full.tokenizer)
    # Without a target, ids are those of the tokenizer.
    with pytest.raises(CheckpointError, match="no unused id"):
        CausalLMDrafter.create(settings, target=None, tokenizer=full.tokenizer)


def test_a_drafter_that_is_loaded_to_learn_online_masks_what_it_reads(tmp_path: Path) -> None:
    target = padded_target()
    settings = CausalLMSettings(**SIZES, input_mask_ratio=0.3)
    drafter = CausalLMDrafter.create(settings, target=target, tokenizer=target.tokenizer)
    publish_first(Versions(tmp_path / "drafters"), folders.save(drafter, tmp_path / "start", target))
    batch, read = batch_of(30, 20), []
    for given in (settings, None):
        setup = OnlineSetup(
            target=target,
            online=OnlineSettings(),
            train=TrainSettings(batch_size=4, warmup_steps=0, schedule="constant"),
            loss=ForwardKL,
            max_length=40,
            num_draft_tokens=2,
            dtype="float32",
            seed=0,
            drafter=given,
        )
        route = Route("", setup, Versions(tmp_path / "drafters"))
        assert route.serving.input_mask is None
        learning = route.learner.drafter
        with torch.no_grad():
            read.append(learning.train()(batch).states_BTD[1])
    with torch.no_grad():
        assert torch.equal(read[0], learning(drafter.input_mask.on(batch)).states_BTD[1])
    assert not torch.equal(*read), "control: without the settings it reads every token"


def test_settings_that_do_not_go_together_are_named() -> None:
    assert CausalLMSettings(mask_token_id=3).check() == ["mask_token_id: is not used with input_mask_ratio 0"]
    (problem,) = CausalLMSettings(input_mask_ratio=0.15, tokenizer="x").check()
    assert problem.startswith("input_mask_ratio: is drawn for the target's tokens")
