"""Labels of draft tokens: equal to brute force, mixed by share, with the states of decoding, the models unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.proposals import Budget, Context
from drafttrain.core.random import stream
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.annotate import Frozen
from drafttrain.data_gen.annotate.acceptance import AcceptanceLabels, AcceptanceLabelSettings, acceptance_labels, mixed
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources import Item
from drafttrain.data_gen.stored.labelled_tokens import annotate
from drafttrain.data_gen.stored.records import open_store
from drafttrain.data_gen.training_data import TrainingData
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.target_model.weights_digest import weights_digest
from tests.conftest import random_llama
from tests.drafters.eagle_models import eagle_drafter, eagle_target


@pytest.fixture(scope="module")
def drafter() -> CausalLMDrafter:
    return CausalLMDrafter(random_llama(seed=0, num_layers=1)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def frozen(tiny_target, drafter) -> Frozen:
    return Frozen(tiny_target, drafter, seed=3)


RECORDS = [
    Record("a", [5, 9, 200, 31, 44, 8, 8, 17], [False, False, False, True, True, True, True, True]),
    Record("b", [77, 3, 250, 4], [True] * 4),
    Record("c", [7, 7, 7], [False] * 3),
]


def labelled(frozen: Frozen, records: Any = RECORDS, **settings: Any) -> Any:
    return AcceptanceLabels(AcceptanceLabelSettings(**settings), frozen).label(records)


@torch.no_grad()
def brute_force(frozen: Frozen, record: Record, *, temperature: float) -> tuple[list[torch.Tensor], list[float]]:
    """Return features and labels of mixing 0, one forward a prefix."""
    model, generator = frozen.drafter.model, stream(frozen.seed, "drafted", record.id)
    drawn, labels = {}, []
    for i, trained in enumerate(record.loss_mask):
        if not trained or i == 0:
            continue
        prefix = torch.tensor([list(record.tokens[:i])])
        p_V, q_V = ((lm(prefix).logits[0, -1] / temperature).softmax(-1) for lm in (frozen.target.model, model))
        uniform = torch.rand(1, dtype=torch.float64, generator=generator)
        cumulative_V = q_V.double().cumsum(-1)
        drawn[i] = int((cumulative_V <= uniform * cumulative_V[-1]).sum())
        labels.append(min(1.0, float(p_V[drawn[i]] / q_V[drawn[i]])))
    read = [drawn.get(i, token) for i, token in enumerate(record.tokens)]
    states = [model.base_model(torch.tensor([read[: i + 1]])).last_hidden_state[0, -1] for i in drawn]
    return states, labels


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_labels_and_states_equal_brute_force(frozen, temperature):
    found = labelled(frozen, mixing=0.0, temperature=temperature)
    assert [len(rows) for rows in found] == [5, 3, 0]
    for record, rows in zip(RECORDS[:2], found, strict=False):
        states, labels = brute_force(frozen, record, temperature=temperature)
        torch.testing.assert_close(rows.labels_N, torch.tensor(labels), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows.features_ND, torch.stack(states), rtol=1e-4, atol=1e-4)
        # Control: labels of the next position differ.
        assert not torch.allclose(rows.labels_N.roll(1), torch.tensor(labels), atol=1e-3)


def test_a_text_has_the_same_rows_alone_and_among_others(frozen):
    together = labelled(frozen)
    for record, rows in zip(RECORDS, together, strict=True):
        (alone,) = labelled(frozen, [record])
        torch.testing.assert_close(alone.labels_N, rows.labels_N, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.features_ND, rows.features_ND, rtol=1e-4, atol=1e-4)


def test_at_temperature_0_a_label_is_whether_both_would_write_the_same(frozen):
    for rows in labelled(frozen, temperature=0.0):
        assert set(rows.labels_N.tolist()) <= {0.0, 1.0}


def test_mixing_decides_what_is_read_and_what_is_trained():
    drawn, written = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 9, 3, 9])
    none, all_ = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    read, ours = mixed(drawn, written, none)
    assert (read.tolist(), ours.tolist()) == ([1, 2, 3, 4], [True] * 4)
    read, ours = mixed(drawn, written, all_)
    assert (read.tolist(), ours.tolist()) == ([1, 9, 3, 9], [True, False, True, False])
    read, ours = mixed(drawn, written, torch.tensor([False, True, True, False]))
    assert (read.tolist(), ours.tolist()) == ([1, 9, 3, 4], [True, False, True, True])


def test_mixing_at_its_ends(frozen, drafter):
    long = [Record("long", list(range(1, 200)), [True] * 199)]
    (all_drawn,), (half,), (all_written,) = (labelled(frozen, long, mixing=m) for m in (0.0, 0.5, 1.0))
    assert len(all_drawn) == 198
    assert 70 < len(half) < 140
    # At 1 the drafter reads the text unchanged; trained rows are those where it would have drawn the text's token.
    with torch.no_grad():
        states_TD = drafter.model.base_model(torch.tensor([long[0].tokens])).last_hidden_state[0]
    for feature_D in all_written.features_ND:
        assert float((states_TD - feature_D).abs().amax(-1).min()) < 1e-4
    assert len(all_written) < 40


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_drafter_that_is_the_target_is_always_accepted(temperature):
    """Also if the target's head has rows without a token, and much of the probability: 43 of 300 here."""
    target = eagle_target(vocab_size=300)
    drafter = CausalLMDrafter(target.model).eval()
    records = [Record(str(i), list(range(i, i + 12)), [True] * 12) for i in range(1, 9)]
    rows = labelled(Frozen(target, drafter, 0), records, temperature=temperature, mixing=0.0)
    labels_N = torch.cat([part.labels_N for part in rows])
    assert len(labels_N) == 8 * 11
    torch.testing.assert_close(labels_N, torch.ones_like(labels_N), rtol=1e-6, atol=1e-6)


def test_labels_by_hand():
    target = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]])
    drafter = torch.tensor([[0.25, 0.25, 0.5], [0.4, 0.4, 0.2]])
    for drawn, expected in [([0, 0], [1.0, 0.5]), ([2, 1], [0.0, 1.0])]:
        assert acceptance_labels(target, drafter, torch.tensor(drawn)).tolist() == pytest.approx(expected)


def test_the_states_are_those_of_decoding(tiny_target, drafter):
    """DraftStep.hidden_D at depth k + 1 is the state where the drafter read draft token k: that of the label."""
    proposer = drafter.proposer(tiny_target)
    context = Context("x", [5, 9, 200], 3)
    proposer.begin([context], [])
    steps: list[Any] = []
    (proposal,) = proposer.propose(
        [Budget(4, 4, states=True)], Sampling(1.0), [stream(0)], lambda step: bool(steps.append(step)) or True
    )
    tokens = [5, 9, *proposal.tokens_N.tolist()]
    with torch.no_grad():
        states_TD = drafter.model.base_model(torch.tensor([tokens])).last_hidden_state[0]
    for step in steps:
        place = 1 + step.depth  # depth 1 has read the root, at 2
        assert step.token == tokens[place]
        torch.testing.assert_close(step.hidden_D, states_TD[place], rtol=1e-4, atol=1e-4)


class Lines:
    def items(self) -> Any:
        for i in range(40):
            yield Item(str(i), {"id": f"text {i}", "tokens": [1 + (i * j) % 250 for j in range(1, 13)]})


def data(tmp_path: Any, tokenizer: Any, **settings: Any) -> TrainingData:
    encoder = Encoder(tokenizer, 64)
    store = open_store(tmp_path / "store", Lines(), encoder, about={"source": {"kind": "lines"}})
    chosen = DataSettings(sources=[type("S", (), {"kind": "lines", "weight": 1.0})()], **settings)
    return TrainingData([store], chosen, Encoder(tokenizer, 64), seed=0)


def test_texts_are_held_out_whole_and_a_killed_labelling_continues(frozen, tiny_target, tmp_path):
    settings = AcceptanceLabelSettings(held_out=0.25, mixing=0.0)
    texts = data(tmp_path, tiny_target.tokenizer)
    before = weights_digest(frozen.drafter), weights_digest(tiny_target.model)
    first = annotate(settings, texts, frozen, tmp_path / "labelled")
    assert (weights_digest(frozen.drafter), weights_digest(tiny_target.model)) == before
    assert len(first.train) + len(first.held_out) == 40 * 11
    assert len(first.held_out) % 11 == 0
    assert 0 < len(first.held_out) < 250
    files = sorted((tmp_path / "labelled").glob("*.npy"))
    bytes_before = [path.read_bytes() for path in files]
    for path in (files[1], tmp_path / "labelled" / "labelled.json"):
        path.unlink()
    again = annotate(settings, texts, frozen, tmp_path / "labelled")
    assert [path.read_bytes() for path in files] == bytes_before
    np.testing.assert_array_equal(again.train.labels_N, first.train.labels_N)
    with pytest.raises(DataError, match="of an older version of drafttrain: remove this folder"):
        annotate(AcceptanceLabelSettings(held_out=0.3), texts, frozen, tmp_path / "labelled")


def test_labels_that_would_be_too_large_are_refused(frozen, tiny_target, tmp_path):
    with pytest.raises(DataError, match=r"data.max_cache_gb allows 1e-06"):
        annotate(
            AcceptanceLabelSettings(), data(tmp_path, tiny_target.tokenizer, max_cache_gb=1e-6), frozen, tmp_path / "l"
        )


def test_a_drafter_without_states_of_its_draft_tokens_is_refused(frozen):
    medusa = eagle_target()
    drafter = drafters.entry("medusa").component.create(
        drafters.entry("medusa").settings(), target=medusa, tokenizer=medusa.tokenizer
    )
    with pytest.raises(CheckpointError, match="proposes several tokens from one state"):
        labelled(Frozen(medusa, drafter, 0))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("kangaroo", {"exit_layer": 2}), ("eagle", {}), ("eagle3", {"draft_vocab_size": 120})],
)
def test_every_kind_that_drafts_token_by_token_is_labelled_with_the_states_that_decoding_has(kind, settings):
    """The last token of a text is drafted: its state and label are those of the first draft token of a round there."""
    target = eagle_target()
    drafter = eagle_drafter(kind, target, **settings)
    annotator = AcceptanceLabels(AcceptanceLabelSettings(temperature=0.0, mixing=0.0), Frozen(target, drafter, 0))
    text = [5, 9, 200, 31, 44, 8, 8, 17]
    found = []
    for length in range(4, 9):
        record = Record(str(length), text[:length], [False] * (length - 1) + [True])
        (rows,) = annotator.label([record])
        found.append((rows, watched_round(target, drafter, text[: length - 1])))
    for rows, (hidden_D, kept) in found:
        torch.testing.assert_close(rows.features_ND[0], hidden_D.float(), rtol=1e-4, atol=1e-5)
        assert rows.labels_N.tolist() == [float(kept)]


def watched_round(target: Any, drafter: Any, prompt: list[int]) -> tuple[torch.Tensor, bool]:
    """Return the state where the first draft token of a round was read, and whether the token was accepted."""
    steps: list[Any] = []

    class Watching(FixedLength):
        def more(self, step: Any) -> bool:
            steps.append(step)
            return True

    engine = Engine(
        target,
        drafter.proposer(target),
        rule=Lossless(),
        policy=Watching(FixedLengthSettings(2)),
        sampling=Sampling(),
        max_new_tokens=3,
        stop_tokens=(),
    )
    (one,) = engine.generate([Prompt("x", prompt)])
    return steps[1].hidden_D, one.rounds[0].num_accepted > 0
