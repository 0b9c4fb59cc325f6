"""EAGLE that reads images (MSD): what enters at visual positions, that decoding and training agree, and that it is lossless.

B = sequences, T = positions, V = vocabulary, D = hidden
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.checkpoint import About, write_about
from drafttrain.config.load import load_recipe
from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.images import Image
from drafttrain.core.proposals import Budget, Context
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.eagle.eagle1 import Eagle1Drafter, Eagle1Settings
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.parity import parity
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.export.convert import export_as, read_target_config
from drafttrain.losses.align import align
from drafttrain.target_model import Target, TargetSettings
from tests.drafters.eagle_models import eagle_drafter, eagle_target
from tests.multimodal import SHAPES, image, write_target

STEPS = 3


@pytest.fixture(scope="module", params=SHAPES)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = write_target(tmp_path_factory.mktemp(request.param), request.param)
    return Target.load(TargetSettings(model=str(folder), images=True, dtype="float64"))


@pytest.fixture(scope="module")
def drafter(target: Target) -> Any:
    return eagle_drafter("eagle", target, visual=True, num_steps=STEPS)


def record_of(target: Target, images: list[Image], *, id: str = "a") -> Record:
    """Return text, images, text, and an answer whose tokens are labels."""
    assert target.images is not None
    tokens = [65, 66]
    for one in images:
        tokens += [*target.images.tokens_of(one), 70]
    answer = [80, 81, 82, 83, 84]
    mask = [False] * (len(tokens) + 1) + [True] * len(answer)
    return Record(id, [*tokens, 71, *answer], mask, images=images)


def batch_of(target: Target, drafter: Any, *records: Record) -> DraftBatch:
    """Return a batch of these records in one row, read by the target."""
    width = sum(len(record.tokens) for record in records)
    batch, _ = pack(list(records), width=width, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs(), images=batch.images)
    return replace(batch, target=seen)


def entered(drafter: Any, batch: DraftBatch) -> Tensor:
    """Return inputs_TD of the drafter's layer in the first step of the rollout."""
    seen: list[Tensor] = []
    own = drafter.entering
    drafter.__dict__["entering"] = lambda *given: seen.append(own(*given)[0]) or own(*given)
    try:
        with torch.no_grad():
            drafter(batch)
    finally:
        del drafter.__dict__["entering"]
    return seen[0][0]


def test_visual_positions_enter_bit_for_bit_and_text_positions_as_in_eagle(target: Target, drafter: Any) -> None:
    images = [image(1), image(2)]
    batch = batch_of(target, drafter, record_of(target, images))
    inputs_TD = entered(drafter, batch)
    assert target.vision is not None
    arguments = target.vision.arguments([batch.tokens_BT[0].tolist()], [images], device=target.device)
    pixels = {
        name: value.double() if value.is_floating_point() else value
        for name, value in arguments.items()
        if name in ("pixel_values", "image_grid_thw")
    }
    features = target.vision.whole.get_image_features(**pixels).pooler_output
    projected_PD = torch.cat([part.flatten(0, -2) for part in features])
    visual_T = batch.tokens_BT[0] == target.vision.reader.visual_id
    assert torch.equal(inputs_TD[visual_T], projected_PD)
    # Text positions: fc of the next token's embedding and the target's feature. The last one's next token is not known.
    assert batch.target is not None
    assert batch.target.final_BTD is not None
    text_T = (~visual_T).nonzero()[:-1, 0]
    embedded_TD = drafter.embed(batch.tokens_BT[0].roll(-1))
    wanted_TD = drafter.fc(torch.cat([embedded_TD, batch.target.final_BTD[0]], dim=-1))
    torch.testing.assert_close(inputs_TD[text_T], wanted_TD[text_T], rtol=1e-12, atol=1e-12)
    # The control: a drafter that reads every position as text has other inputs there.
    plain = eagle_drafter("eagle", target)
    assert not torch.allclose(entered(plain, batch)[visual_T], projected_PD)


def test_another_image_changes_later_rows_and_no_label_is_visual(target: Target, drafter: Any) -> None:
    records = [record_of(target, [image(1), image(seed)]) for seed in (2, 3)]
    states = []
    for record in records:
        batch = batch_of(target, drafter, record)
        with torch.no_grad():
            drafted = drafter(batch)
        rows = align(drafted, batch)
        assert target.images is not None
        assert target.images.visual_id not in rows.tokens_N.tolist()
        # Only labels of the text, at every depth that has one.
        assert set(rows.tokens_N.tolist()) <= set(range(80, 85))
        states.append(drafted.states_BTD[1][0])
    difference_T = (states[0] - states[1]).abs().amax(-1)
    last = max(
        place
        for place, token in enumerate(records[0].tokens)
        if token == batch.tokens_BT.new_tensor(target.images.visual_id)
    )
    assert (difference_T[last:] > 1e-6).all()


def test_the_loss_does_not_depend_on_the_document_beside(target: Target, drafter: Any) -> None:
    one, two = record_of(target, [image(1)], id="a"), record_of(target, [image(2), image(3)], id="b")
    together = batch_of(target, drafter, one, two)
    with torch.no_grad():
        states = drafter(together).states_BTD
        for document, record in enumerate((one, two)):
            here = together.documents_BT[0] == document
            alone = drafter(batch_of(target, drafter, record)).states_BTD
            labelled_T = torch.arange(len(record.tokens)) < len(record.tokens) - 1 - STEPS
            for depth in range(1, STEPS + 1):
                torch.testing.assert_close(
                    states[depth][0][here][labelled_T], alone[depth][0][labelled_T], rtol=1e-9, atol=1e-9
                )


def test_step_k_of_training_is_the_kth_token_of_a_chain_in_decoding(target: Target, drafter: Any) -> None:
    record = record_of(target, [image(1), image(2)])
    prompt = list(record.tokens[:-3])
    lm, proposer = target.decoder(), drafter.proposer(target)
    seen = lm.begin([prompt[:-1]], images=[record.images], needs=proposer.needs)
    proposer.begin([Context("a", prompt, len(prompt))], seen)
    (proposal,) = proposer.propose(
        [Budget(nodes=STEPS, depth=STEPS, width=1)], Sampling(1.0), [torch.Generator().manual_seed(0)], lambda _: True
    )
    chain = proposal.tokens_N[1:].tolist()
    assert len(chain) == STEPS
    whole = replace(record, tokens=[*prompt, *chain], loss_mask=[False] * len(prompt) + [True] * STEPS)
    batch = batch_of(target, drafter, whole)
    with torch.no_grad():
        states = drafter(replace(batch, num_depths=STEPS)).states_BTD
    for step in range(STEPS):
        logits_V = drafter.head(states[step + 1][0, len(prompt) - 2][None], step + 1)[0, : target.num_tokens]
        drawn_V = proposal.q_rows_RV[proposal.q_row_N[step]]
        torch.testing.assert_close(
            logits_V.softmax(-1), drawn_V[: target.num_tokens].to(logits_V), rtol=1e-5, atol=1e-7
        )


def test_decoding_is_lossless_on_prompts_with_images(target: Target, drafter: Any) -> None:
    record, other = record_of(target, [image(1), image(2)]), record_of(target, [image(3)])
    prompts = [
        Prompt("two", record.tokens[:-3], images=record.images),
        Prompt("one", other.tokens[:-3], images=other.images),
        Prompt("text", [65, 66, 67]),
    ]
    written = [
        Engine(
            target,
            proposer,
            rule=Lossless(),
            policy=FixedLength(FixedLengthSettings(3)),
            sampling=Sampling(),
            max_new_tokens=10,
            stop_tokens=(),
        ).generate(prompts)
        for proposer in (NoDraft(), drafter.proposer(target))
    ]
    assert any(one.rounds[0].num_draft_tokens for one in written[1])
    found = parity(*written, target, images=[prompt.images for prompt in prompts])
    assert found.exact, found.text


def test_the_folder_keeps_what_it_reads(target: Target, drafter: Any, tmp_path: Path) -> None:
    drafter.save(tmp_path)
    loaded = Eagle1Drafter.load(tmp_path, target, dtype="float64")
    batch = batch_of(target, drafter, record_of(target, [image(1)]))
    with torch.no_grad():
        assert torch.equal(loaded(batch).states_BTD[1], drafter(batch).states_BTD[1])


def write_folder(folder: Path, target: Target, *, visual: bool) -> None:
    """Write a drafter folder with all that a start or a conversion reads."""
    drafter = eagle_drafter("eagle", target, visual=visual, num_steps=STEPS)
    drafter.save(folder)
    target.tokenizer.save_pretrained(folder)
    write_about(folder, About("eagle", target.name, target.fingerprint, "", target.num_tokens, 1))


@pytest.mark.parametrize("first", [False, True])
def test_a_start_from_a_checkpoint_reads_images_as_its_own_settings_say(
    first: bool, target: Target, tmp_path: Path
) -> None:
    write_folder(tmp_path / "drafter", target, visual=first)
    for visual in (False, True):
        settings = Eagle1Settings(checkpoint=str(tmp_path / "drafter"), visual=visual)
        made = Eagle1Drafter.create(settings, target=target, tokenizer=target.tokenizer)
        assert bool(made.needs().hidden) == visual


def test_a_visual_drafter_is_not_exported_for_an_engine(target: Target, tmp_path: Path) -> None:
    """The control is the same drafter without `visual`, which is only refused for what else this target has."""
    for visual in (True, False):
        folder = tmp_path / str(visual)
        write_folder(folder, target, visual=visual)
        try:
            export_as(
                "vllm",
                folder,
                tmp_path / f"{visual}.vllm",
                target_config=read_target_config(Path(target.name), name="target"),
            )
        except CheckpointError as error:
            reason = str(error)
        else:
            reason = ""
        assert ("no engine reads the projector's embeddings" in reason) == visual


def test_a_target_without_its_tower_is_refused() -> None:
    blind = eagle_target()
    with pytest.raises(CheckpointError, match=r"drafter\.visual: tiny is loaded without its images"):
        Eagle1Drafter.create(Eagle1Settings(visual=True), target=blind, tokenizer=blind.tokenizer)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["drafter.visual=true"], "drafter.visual: needs a target that reads images"),
        (["data.curriculum={}"], "data.curriculum: needs records with images"),
        (
            ["target.images=true", "train.target_placement=absent"],
            "target.images: train.target_placement must be replicated",
        ),
        (
            ["target.images=true", "data.generate.backend={kind: vllm}"],
            "target.images: data.generate.backend must be builtin",
        ),
        (
            ["target.images=true", "data.on_policy={}", "drafter={kind: medusa}"],
            "target.images: drafter.kind medusa is not",
        ),
        (["target.images=true", "drafter.visual=true", "export.to=[vllm]"], "export.to: no engine's format"),
    ],
)
def test_what_reads_no_images_is_refused_by_name(overrides: list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_recipe("tiny_eagle", overrides)
