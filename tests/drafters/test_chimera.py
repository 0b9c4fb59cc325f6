"""Chimera: the network equals its definition; how heads start; what a row reads; what trigrams are for; its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetOutput
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.chimera.module import ChimeraDrafter
from drafttrain.drafters.chimera.settings import ChimeraSettings
from drafttrain.drafters.chimera.trigrams import last_trigram, trigrams
from drafttrain.losses import losses
from drafttrain.losses.align import align
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from tests.drafters.chimera_models import chimera, plain_logits
from tests.drafters.eagle_models import eagle_target, packed
from tests.marks import slow

LENGTHS = (9, 7, 12)
VARIANTS: list[dict[str, Any]] = [{}, {"shared_head": True, "draft_vocab_size": 200}]


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


def logits_of(drafter: Any, batch: Any) -> torch.Tensor:
    """Return logits_BTKR at every slot."""
    with torch.no_grad():
        drafted = drafter(batch)
        return torch.stack([drafted.logits_BTV(depth) for depth in sorted(drafted.states_BTD)], dim=2)


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("width", [slow(12), 22])  # one document a row, padded; two documents in a row
def test_every_slot_and_depth_of_packed_texts_is_a_draft_alone(target, settings, width):
    drafter = chimera(target, **settings)
    batch, places = packed(target, drafter, LENGTHS, width=width)
    ours = logits_of(drafter, batch)
    for (row, column), length in zip(places, LENGTHS, strict=True):
        tokens = batch.tokens_BT[row, column : column + length].tolist()
        for slot in (0, 1, length - 4):
            plain_KR = plain_logits(drafter, target, tokens, slot)
            torch.testing.assert_close(ours[row, column + slot], plain_KR, rtol=0, atol=1e-12)


def test_control_newer_tokens_at_the_position_of_the_root_break_the_identity(target):
    drafter = chimera(target)
    batch, _ = packed(target, drafter, LENGTHS[:1], width=9)
    wrong_KR = plain_logits(drafter, target, batch.tokens_BT[0].tolist(), 4, shift=0).detach()
    distance_K = (logits_of(drafter, batch)[0, 4] - wrong_KR).abs().amax(dim=-1)
    assert float(distance_K[0]) < 1e-12
    assert float(distance_K[1:].min()) > 1e-3


@pytest.mark.parametrize("settings", VARIANTS)
def test_heads_start_as_the_targets_head_on_both_states(target, settings):
    drafter = ChimeraDrafter.create(ChimeraSettings(**settings), target=target, tokenizer=target.tokenizer).double()
    state_ND, known_ND = torch.randn(2, 5, 32, dtype=torch.float64)
    drafter.requires_grad_(False)
    of_target = target.model.get_output_embeddings()
    ids_R = slice(None) if drafter.vocabulary is None else drafter.vocabulary
    for depth in range(1, drafter.num_steps + 1):
        logits_NR = drafter.head(torch.cat([state_ND, known_ND], dim=-1), depth)
        torch.testing.assert_close(logits_NR, (of_target(state_ND) + of_target(known_ND))[:, ids_R], rtol=0, atol=1e-12)
        # The control: one of the two alone.
        assert float((logits_NR - of_target(known_ND)[:, ids_R]).abs().max()) > 0.1


@pytest.mark.parametrize("what", ["token", "feature"])
def test_a_row_reads_features_up_to_its_slot_and_tokens_up_to_its_depth(target, what):
    drafter, slot = chimera(target), 5
    batch, _ = packed(target, drafter, (12,), width=12)
    assert batch.target is not None
    whole = logits_of(drafter, batch)[0]

    def change(place: int) -> torch.Tensor:
        if what == "token":
            tokens = batch.tokens_BT.clone()
            tokens[0, place] = (tokens[0, place] + 7) % 250
            return logits_of(drafter, replace(batch, tokens_BT=tokens))[0]
        final = batch.target.final_BTD.clone()
        final[0, place] += torch.linspace(0, 1, 32, dtype=torch.float64)
        return logits_of(drafter, replace(batch, target=TargetOutput(final_BTD=final)))[0]

    moved = [(change(place)[slot] - whole[slot]).abs().amax(dim=-1) for place in range(12)]
    for depth in range(1, drafter.num_steps + 1):
        # The trigram of the root, token 6, begins two places before it.
        reads = set(range(slot - 1, slot + depth + 1)) if what == "token" else set(range(slot + 1))
        assert {place for place, distance_K in enumerate(moved) if distance_K[depth - 1]} == reads


def test_trigrams_end_at_each_token_and_begin_with_its_document():
    tokens, positions = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 2, 0, 1]])
    assert trigrams(tokens, positions).tolist() == [[[5, 5, 5], [5, 5, 6], [5, 6, 7], [8, 8, 8], [8, 8, 9]]]
    assert [last_trigram(text) for text in ([5], [5, 6], [5, 6, 7], [4, 5, 6, 7])] == [
        *([5, 5, 5], [5, 5, 6], [5, 6, 7], [5, 6, 7])
    ]


class LastToken(ChimeraDrafter):
    """The control: an encoder of the same size that reads the last token alone."""

    def trigram_states(self, tokens_BN3: torch.Tensor) -> torch.Tensor:
        return super().trigram_states(tokens_BN3[..., -1:].expand_as(tokens_BN3))


@pytest.mark.slow
def test_trigrams_reach_the_bayes_accuracy_of_a_source_of_order_three_where_last_tokens_cannot(target):
    """Each token follows from the three before it in nine of ten cases. The target's features carry nothing."""
    generator, size, noise = torch.Generator().manual_seed(0), 4, 0.1
    following = torch.randint(size, (size, size, size), generator=generator)

    def batch_of(seed: int) -> Any:
        draws = torch.Generator().manual_seed(seed)
        texts_BT = torch.randint(size, (16, 64), generator=draws)
        random_BT = torch.rand(16, 64, generator=draws) < noise
        for t in range(3, 64):
            rule_B = following[texts_BT[:, t - 3], texts_BT[:, t - 2], texts_BT[:, t - 1]]
            texts_BT[:, t] = torch.where(random_BT[:, t], texts_BT[:, t], rule_B)
        records = [Record("", text, [t > 2 for t in range(64)]) for text in texts_BT.tolist()]
        batch, _ = pack(records, width=64, weight_of_step=1.0)
        return replace(batch, target=TargetOutput(final_BTD=torch.zeros(16, 64, 32)))

    def accuracy(kind: type[ChimeraDrafter]) -> float:
        torch.manual_seed(0)
        settings = ChimeraSettings(num_steps=1, draft_vocab_size=size)
        drafter = kind.create(settings, target=target, tokenizer=target.tokenizer).float()
        optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
        loss = losses.build(losses.entry("ce").settings())
        for step in range(150):
            optimizer.zero_grad()
            batch_loss(drafter, loss, batch_of(step), vocab_size=257).total.backward()
            optimizer.step()
        batch = batch_of(1000)
        with torch.no_grad():
            drafted = drafter.eval()(batch)
            likeliest_N = drafted.logits_BTV(1).flatten(0, 1).argmax(dim=-1)
        rows = align(drafted, batch)
        return float((likeliest_N[rows.drafter_N] == rows.tokens_N).float().mean())

    bayes = 1 - noise + noise / size
    assert accuracy(ChimeraDrafter) > bayes - 0.05
    assert accuracy(LastToken) < bayes - 0.2


def test_the_parameters_are_those_of_the_formula(target):
    count = lambda **settings: sum(p.numel() for p in chimera(target, **settings).parameters())  # noqa: E731
    width, rows = 32, 200
    trigram = 9 * width**2 + 3 * width + 3 * width**2
    layer = 2 * width * 32 + 2 * width * 16 + 3 * width * 64 + 2 * width
    assert count(draft_vocab_size=rows) == trigram + layer + 3 * 2 * width * rows
    assert count(draft_vocab_size=rows, shared_head=True) == trigram + layer + 2 * width * rows


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_files_read_back(target, tmp_path, settings):
    drafter = chimera(target, **settings)
    drafter.save(tmp_path)
    again = ChimeraDrafter.load(tmp_path, target, "float64")
    assert again.config == drafter.config
    batch, _ = packed(target, drafter, LENGTHS, width=22)
    assert torch.equal(logits_of(drafter, batch), logits_of(again, batch))


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("shared_head",), "yes", "shared_head"),
        (("drafttrain", "num_steps"), 0, "num_steps"),
        (("drafttrain", "num_steps"), 2, r"lm_heads\.2"),
        (("hidden_size",), 64, "hidden_size"),
    ],
)
def test_a_wrong_field_is_named(target, tmp_path, place, value, named):
    chimera(target).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    section = config
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=named):
        ChimeraDrafter.load(tmp_path, target)


def test_settings_name_what_is_wrong():
    wrong = ChimeraSettings(checkpoint="x", num_steps=2, shared_head=True, num_heads=3, num_kv_heads=2)
    named = [line.partition(":")[0] for line in wrong.check()]
    assert named == ["num_steps", "shared_head", "num_heads", "num_kv_heads", "num_kv_heads"]
    assert not ChimeraSettings(shared_head=True, draft_vocab_size=100).check()
    assert ChimeraSettings().smoke().num_steps == 2


def test_a_head_with_a_bias_is_refused(target):
    biased = Target(target.model, target.tokenizer, name="biased", fingerprint="")
    biased.model.lm_head.register_parameter("bias", torch.nn.Parameter(torch.zeros(257, dtype=torch.float64)))
    try:
        with pytest.raises(CheckpointError, match="output head has a bias"):
            ChimeraDrafter.create(ChimeraSettings(), target=biased, tokenizer=target.tokenizer)
    finally:
        biased.model.lm_head.register_parameter("bias", None)
