"""Kind early_exit: weights of exits and rates of dropped blocks as in the paper, one loss for all exits, a tuned target, its files.

B = sequences, T = positions, D = hidden, L = blocks
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.early_exit.curriculum import CurriculumSettings
from drafttrain.drafters.early_exit.layer_dropout import dropped_blocks
from drafttrain.drafters.early_exit.module import EarlyExitDrafter, EarlyExitSettings
from drafttrain.drafters.lora import LoraSettings
from drafttrain.drafters.tuned_target import ADAPTER, WHOLE, TuningSettings
from drafttrain.losses import losses
from drafttrain.losses.align import align
from drafttrain.losses.ce import CrossEntropy, CrossEntropySettings
from drafttrain.losses.forward_kl import ForwardKLSettings
from drafttrain.losses.step import batch_loss, drafted_loss
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.anatomy import final_norm
from drafttrain.target_model.documents import document_states
from drafttrain.target_model.logits import head_logits
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, decode, greedy

BLOCKS, EXIT, V = 4, 2, 257
LORA = LoraSettings(rank=4, alpha=16.0, target_modules=["q_proj", "v_proj", "down_proj"])
TEXTS = [[5, 6, 7, 8, 9, 10], [50, 51, 52], list(range(100, 120))]


def wrapped(model: Any) -> Target:
    return Target(model, byte_tokenizer(), name="tiny", fingerprint="")


@pytest.fixture(scope="module")
def target() -> Target:
    return wrapped(random_llama(num_layers=BLOCKS).double())


def made(target: Target, *, lora: LoraSettings | None = LORA, **settings: Any) -> EarlyExitDrafter:
    torch.manual_seed(1)
    chosen = EarlyExitSettings(**{"exit_layer": EXIT, "tune": TuningSettings(lora)} | settings)
    drafter = EarlyExitDrafter.create(chosen, target=target, tokenizer=None)
    return drafter.double() if target.model.dtype == torch.float64 else drafter


def batch_of(texts: list[list[int]], *, width: int = 40, **more: Any) -> DraftBatch:
    records = [Record(str(number), text, [True] * len(text)) for number, text in enumerate(texts)]
    return replace(pack(records, width=width, weight_of_step=1.0)[0], **more)


# ---------------------------------------------------------------- schedules


def test_weights_of_exits_by_hand_and_where_only_the_last_one_counts():
    """L = 4: sums of 0..l, and L - 1 more for the last; divided by those of the exits of this step."""
    settings = CurriculumSettings(exit_scale=0.5)
    whole = 3 + 0.5 * (0 + 1 + 2)
    assert settings.weights([1, 2, 3, 4], 4) == pytest.approx(
        {1: 0.0, 2: 0.5 / (2 + whole), 3: 1.5 / (2 + whole), 4: whole / (2 + whole)}
    )
    assert settings.weights([3, 4], 4) == pytest.approx({3: 1.5 / (1.5 + whole), 4: whole / (1.5 + whole)})
    assert CurriculumSettings(exit_scale=0).weights([2, 3, 4], 4) == {2: 0, 3: 0, 4: 1}


def test_curricula_train_every_exit_and_always_the_last():
    rotational = CurriculumSettings(rotation=3)
    steps = [rotational.trained(8, step=step, num_steps=0) for step in range(3)]
    assert sorted(one for exits in steps for one in exits[:-1]) == list(range(1, 8))
    assert all(exits[-1] == 8 for exits in steps)
    assert rotational.trained(8, step=3, num_steps=0) == steps[0] != steps[1]
    gradual = [CurriculumSettings(curriculum="gradual").trained(8, step=step, num_steps=64) for step in range(64)]
    assert gradual[0] == [8]
    assert gradual[4] == [7, 8]
    assert all({*one} <= {*other} for one, other in pairwise(gradual))
    assert [len(one) for one in gradual].index(8) <= 32, "all exits are trained from the middle on"
    assert CurriculumSettings(curriculum="all").trained(3, step=5, num_steps=9) == [1, 2, 3]


def test_drop_rates_rise_exponentially_with_the_block_and_with_the_training():
    settings = CurriculumSettings(layer_dropout=0.2)
    rates = settings.drop_rates(9, step=7, num_steps=0)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)
    assert rates[4] == pytest.approx(0.2 * (2**0.5 - 1))
    rising = CurriculumSettings(layer_dropout=0.2, dropout_curriculum="exponential")
    assert [rising.drop_rates(9, step=step, num_steps=11)[-1] for step in (0, 5, 10)] == pytest.approx(
        [0, 0.2 * (2**0.5 - 1), 0.2]
    )


# ---------------------------------------------------------------- layer dropout


def read(target: Target, batch: DraftBatch, rates: list[float]) -> tuple[Tensor, Tensor]:
    """Return the final states and the states that enter the last block, with dropped blocks."""
    target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True))
    with dropped_blocks(target.model, batch, rates):
        final_BTD, hidden_BTD = document_states(target.model, batch.tokens_BT, batch.positions_BT, hidden=(BLOCKS - 1,))
    return final_BTD, hidden_BTD[BLOCKS - 1]


def test_rate_0_is_no_dropout_bit_for_bit_and_rate_1_is_a_block_less(target):
    batch = batch_of(TEXTS)
    plain_BTD, _ = document_states(target.model, batch.tokens_BT, batch.positions_BT)
    assert torch.equal(read(target, batch, [0.0] * BLOCKS)[0], plain_BTD)
    assert torch.equal(read(target, batch, [0.0, 0.0, 0.0, 1e-30])[0], plain_BTD), "drawn, and nothing is dropped"
    dropped_BTD, entering_BTD = read(target, batch, [0.0, 0.0, 0.0, 1.0])
    assert torch.equal(dropped_BTD, final_norm(target.model)(entering_BTD))
    assert not torch.allclose(dropped_BTD, plain_BTD)


def test_a_dropped_block_gets_no_gradient_and_the_others_do(target):
    """All weights are trained. Control: without dropout it gets one."""
    found = {}
    for largest in (0.0, 1.0):
        drafter = made(target, lora=None, layer_dropout=largest, curriculum="all")
        batch_loss(
            drafter.train(), CrossEntropy(CrossEntropySettings()), batch_of(TEXTS), vocab_size=V
        ).total.backward()
        by_name = dict(target.model.named_parameters(remove_duplicate=False))
        names = [name for name in by_name if name.endswith("down_proj.weight")]
        gradients = [drafter.tuned.weights.of(name.rpartition(".")[0], "weight").grad for name in names]  # type: ignore[union-attr]
        found[largest] = [gradient is not None and bool(gradient.any()) for gradient in gradients]
    assert found[0.0] == [True] * BLOCKS
    assert not found[1.0][-1]
    assert found[1.0][0]


def test_dropped_blocks_depend_on_step_and_document_alone(target):
    """Not on the packing; the documents of a step differ. Control: another step drops others."""
    texts = [[3 + number, *range(20, 26 + number)] for number in range(12)]
    rates = [0.0, 0.1, 0.3, 0.4]

    def states(members: range, *, step: int = 3, width: int = 64) -> dict[int, Tensor]:
        records = [Record(str(number), texts[number], [True] * len(texts[number])) for number in members]
        batch, places = pack(records, width=width, weight_of_step=1.0, step=step, first_document=members.start)
        final_BTD, _ = read(target, batch, rates)
        return {
            number: final_BTD[row, column : column + len(texts[number])]
            for number, (row, column) in zip(members, places, strict=True)
        }

    together = states(range(12))
    apart = states(range(5), width=24) | states(range(5, 12))
    plain = {
        number: document_states(target.model, torch.tensor([text]), torch.arange(len(text))[None])[0][0]
        for number, text in enumerate(texts)
    }
    changed = []
    for number, states_TD in together.items():
        torch.testing.assert_close(apart[number], states_TD, rtol=0, atol=1e-10)
        changed.append(not torch.allclose(plain[number], states_TD, atol=1e-6))
    assert {True, False} == set(changed)
    other = states(range(12), step=4)
    assert any(not torch.allclose(other[number], together[number], atol=1e-6) for number in together)


# ---------------------------------------------------------------- training


def test_it_starts_as_the_raw_exit_and_rows_have_the_targets_place(target):
    drafter = made(target, layer_dropout=0.0, curriculum="all").train()
    batch = batch_of(TEXTS)
    drafted = drafter(batch)
    seen = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(hidden=(1, 2, 3), final=True))
    norm = final_norm(target.model)
    torch.testing.assert_close(drafted.states_BTD[1], norm(seen.hidden_BTD[EXIT]), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        drafted.logits_BTV(1), head_logits(target.model, norm(seen.hidden_BTD[EXIT])), rtol=0, atol=1e-12
    )
    _, third, last = [drafted.states_BTD[1], *(one.drafted.states_BTD[1] for one in drafted.beside)]
    torch.testing.assert_close(third, norm(seen.hidden_BTD[3]), rtol=0, atol=1e-12)
    torch.testing.assert_close(last, seen.final_BTD, rtol=0, atol=1e-12)
    assert drafted.lag == 0


@pytest.mark.parametrize("kind", ["ce", "forward_kl"])
def test_the_loss_is_the_weighted_sum_of_those_of_the_exits(target, kind):
    """Each by itself. Control: other weights give another sum."""
    settings = {"layer_dropout": 0.0, "curriculum": "all", "exit_scale": 0.7}
    drafter = made(target, **settings).train()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = batch_of(TEXTS, num_steps=9)
    seen = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
    loss = losses.build(CrossEntropySettings() if kind == "ce" else ForwardKLSettings())
    found = batch_loss(drafter, loss, batch, vocab_size=V).total
    assert drafter.tuned is not None
    final_BTD, hidden_BTD = drafter.tuned.read(batch, hidden=(2, 3))
    norm = final_norm(target.model)
    states = {2: norm(hidden_BTD[2]), 3: norm(hidden_BTD[3]), 4: final_BTD}
    weights = drafter.settings.weights([1, 2, 3, 4], BLOCKS)

    def alone(states_BTD: Tensor) -> float:
        drafted = DraftOutput({1: states_BTD}, drafter.tuned.head, 0)  # type: ignore[union-attr]
        return float(drafted_loss(loss, drafted, align(drafted, batch), batch, vocab_size=V).total.detach())

    by_exit = {one: alone(states_BTD) for one, states_BTD in states.items()}
    assert float(found.detach()) == pytest.approx(sum(weights[one] * value for one, value in by_exit.items()), rel=1e-5)
    assert float(found.detach()) != pytest.approx(sum(by_exit.values()) / 3, rel=1e-3)


def steps_of(drafter: EarlyExitDrafter, target: Target, *, count: int) -> None:
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    texts = [[*prompt.tokens, *greedy(target, prompt, 24)] for prompt in PROMPTS]
    for step in range(count):
        batch = batch_of(texts, step=step, num_steps=count)
        optimizer.zero_grad()
        (batch_loss(drafter, CrossEntropy(CrossEntropySettings()), batch, vocab_size=V).total / 60).backward()
        optimizer.step()


@pytest.fixture(scope="module", params=[LORA, None], ids=["adapters", "whole"])
def trained(request: Any, tiny_folder: Path) -> tuple[Target, EarlyExitDrafter]:
    target = Target.load(TargetSettings(model=str(tiny_folder), dtype="float64"))
    drafter = made(target, lora=request.param, exit_layer=1, layer_dropout=0.1, rotation=1, exit_scale=4.0).train()
    before = target.weights_digest()
    steps_of(drafter, target, count=24)
    assert target.weights_digest() == before, "the target itself stays as it was"
    return target, drafter.eval()


def accepted(target: Target, drafter: EarlyExitDrafter) -> float:
    found = decode(target, drafter.proposer(target), prompts=PROMPTS, new=24, stop_tokens=())
    assert [one.tokens for one in found] == [greedy(target, prompt, 24) for prompt in PROMPTS]
    rounds = [one for text in found for one in text.rounds]
    return sum(one.num_accepted for one in rounds) / sum(one.num_draft_tokens for one in rounds)


def test_training_lifts_acceptance_and_the_folder_reads_back(trained, tmp_path):
    """Output is the tuned target's own, token for token. Control: before training fewer draft tokens are accepted."""
    target, drafter = trained
    start = accepted(target, made(target, exit_layer=1))
    drafter.save(tmp_path)
    assert (tmp_path / ADAPTER).is_dir() != (tmp_path / WHOLE).is_dir()
    read_back = EarlyExitDrafter.load(tmp_path, target)
    standing = read_back.adapted(target)
    assert standing is not target
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    with drafter.adapting(target):
        wanted = target.model(tokens).logits
    torch.testing.assert_close(standing.model(tokens).logits, wanted, rtol=0, atol=1e-8)
    assert (wanted - target.model(tokens).logits).norm() > 1e-3 * wanted.norm()
    assert accepted(standing, read_back) > start + 0.1
    batch = batch_of(TEXTS)
    seen = standing.read(batch.tokens_BT, batch.positions_BT, read_back.needs())
    with drafter.adapting(target):
        own = drafter(replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs())))
        ours_BTV = own.logits_BTV(1)
    torch.testing.assert_close(read_back(replace(batch, target=seen)).logits_BTV(1), ours_BTV, rtol=0, atol=1e-8)


def test_the_start_is_the_target_as_it_is(target, tmp_path):
    drafter = made(target)
    drafter.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = EarlyExitDrafter.load(tmp_path, target)
    assert again.adapted(target) is target
    assert again.exit_layer == EXIT


def test_folders_and_places_that_do_not_fit_are_refused(target, tmp_path):
    made(target).save(tmp_path)
    with pytest.raises(CheckpointError, match="made for a target of 4 blocks, tiny has 3"):
        EarlyExitDrafter.load(tmp_path, wrapped(random_llama(num_layers=3).double()))
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace('"exit_layer": 2', '"exit_layer": 4'), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match=r"exit_layer must be 1\.\.3, got 4"):
        EarlyExitDrafter.load(tmp_path, target)
    config.write_text('{"num_hidden_layers": 4, "exit_layer": 2, "draft": "beam"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: draft must be sampled or greedy, got 'beam'"):
        EarlyExitDrafter.load(tmp_path, target)
    with pytest.raises(CheckpointError, match=r"exit_layer must be 1\.\.3 for this target \(4 blocks\), got 4"):
        made(target, exit_layer=4)


def test_an_interrupted_training_ends_with_the_weights_of_a_whole_one(tmp_path):
    """Dropped blocks and exits depend on the step alone. Control: they differ between steps."""
    target = wrapped(random_llama(num_layers=BLOCKS))
    settings = TrainSettings(max_steps=6, warmup_steps=1, checkpoint_every_steps=2, eval_every_steps=0)
    settings.loggers = ["csv"]

    def run(folder: Path, *, breaks_at: int | None = None) -> dict[str, Tensor]:
        def of_step(step: int) -> list[DraftBatch]:
            if step == breaks_at:
                raise OSError("the power went")
            return [batch_of([[step + 1, 2, 3, 4, 5 + step]], weight_of_step=4.0, step=step)]

        drafter = made(target, layer_dropout=0.5, curriculum="gradual")
        loss = losses.build(CrossEntropySettings())
        arguments = {"target": target, "of_step": of_step, "estimate": None, "settings": settings}
        train(drafter.train(), loss, **arguments, vocab_size=V, folder=folder)
        return load_file(folder / "last" / ADAPTER / "adapter_model.safetensors")

    whole = run(tmp_path / "whole")
    with pytest.raises(OSError, match="the power went"):
        run(tmp_path / "broken", breaks_at=4)
    continued = run(tmp_path / "broken")
    assert whole.keys() == continued.keys()
    assert all(torch.equal(continued[name], tensor) for name, tensor in whole.items())
    assert any(bool(tensor.any()) for name, tensor in whole.items() if "lora_B" in name)
