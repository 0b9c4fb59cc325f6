"""Labels of the judge: no token after a mistake enters the loss; a token matters exactly if it changes the answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.errors import DataError
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.annotate import Frozen
from drafttrain.data_gen.annotate.counterfactual import Counterfactual, CounterfactualSettings
from drafttrain.data_gen.annotate.marked import Marked, MarkedSettings, labels_of
from drafttrain.data_gen.annotate.states import states_of
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.data_gen.checkers.numeric import NumericSettings
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources import Item
from drafttrain.data_gen.stored.labelled_tokens import annotate
from drafttrain.data_gen.stored.records import open_store
from drafttrain.data_gen.training_data import TrainingData
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.target_model.anatomy import final_norm
from drafttrain.target_model.logits import head_logits
from tests.conftest import random_llama
from tests.drafters.eagle_models import eagle_drafter, eagle_target

NEW = 12


@pytest.fixture(scope="module")
def frozen(tiny_target) -> Frozen:
    drafter = CausalLMDrafter(random_llama(seed=0, num_layers=1)).eval().requires_grad_(False)
    return Frozen(tiny_target, drafter, seed=0)


class Half:
    """The answer of a text: which half of the ids most of its last letters are in; it is changed by some tokens only."""

    def answer(self, text: str, *, id: str) -> bool | None:
        return sum(ord(letter) for letter in text[-4:]) % 3 == 0 if text else None

    def correct(self, text: str, reference: str, *, id: str) -> bool:
        return True


def annotator(frozen: Frozen) -> Counterfactual:
    found = Counterfactual(CounterfactualSettings(checker=NumericSettings(), max_new_tokens=NEW), frozen)
    found.checker = Half()
    return found


RECORDS = [Record(str(i), [5 + i, 9, 40 * i + 3, 1], [False, False, False, True]) for i in range(5)]


@torch.no_grad()
def slowly(frozen: Frozen, record: Record) -> list[tuple[list[int], float]]:
    """Return (text up to the draft token, label), one forward a token."""
    target, drafter = frozen.target.model, frozen.drafter.model

    def written(start: list[int], limit: int) -> list[int]:
        new: list[int] = []
        while len(new) < limit and (not new or new[-1] != 0) and start[-1] != 0:
            new.append(int(target(torch.tensor([start + new])).logits[0, -1].argmax()))
        return new

    def answer(new: list[int]) -> Any:
        return Half().answer(frozen.target.tokenizer.decode(new, skip_special_tokens=True), id="")

    prompt = list(record.tokens[:3])
    new = written(prompt, NEW)
    own, place, rows = answer(new), 0, []
    while place < len(new) and own is not None:
        token = int(drafter(torch.tensor([prompt + new[:place]])).logits[0, -1].argmax())
        if token != new[place]:
            other = [*new[:place], token]
            other += written(prompt + other, NEW - len(other))
            same = answer(other) == own
            rows.append((prompt + new[:place] + [token], float(same)))
            new = other if same else new
        place += 1
    return rows


def test_the_walk_finds_what_a_slow_plain_version_finds(frozen):
    found = annotator(frozen).label(RECORDS)
    labels = [label for rows in found for label in rows.labels_N.tolist()]
    assert set(labels) == {0.0, 1.0}, "both happen"
    for record, rows in zip(RECORDS, found, strict=True):
        expected = slowly(frozen, record)
        assert rows.labels_N.tolist() == [label for _, label in expected]
        texts = [Record("", text, [True] * len(text)) for text, _ in expected]
        states_ND = torch.stack([states_TD[-1] for states_TD in states_of(texts, frozen)])
        torch.testing.assert_close(rows.features_ND, states_ND, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("eagle3", {"draft_vocab_size": 120}), ("eagle3", {}), ("eagle", {}), ("kangaroo", {"exit_layer": 2})],
)
def test_the_walk_tries_the_tokens_that_decoding_drafts(kind, settings):
    """By the target's ids whatever the drafter's own are; after a prompt of one token as well, where some drafters draft nothing."""
    target = eagle_target(vocab_size=300)
    drafter = eagle_drafter(kind, target, **settings)
    if "draft_vocab_size" in settings:
        drafter.fit_vocabulary(lambda: torch.arange(257.0))
        assert drafter.vocabulary.tolist() == list(range(137, 257))
    records = [Record(str(n), [*[9, 5, 44, 8][:n], 1], [False] * n + [True]) for n in (1, 2, 4)]
    records.append(Record("text", [7, 30, 2], [True] * 3))
    annotator = Counterfactual(
        CounterfactualSettings(checker=NumericSettings(), max_new_tokens=NEW, max_mismatches=1),
        Frozen(target, drafter, 0),
    )
    annotator.checker = Half()
    tried = [walk.tried[0] if walk.tried else None for walk in annotator.walks(records)]
    for record, text in zip(records, tried, strict=True):
        prompt = list(record.tokens[: record.loss_mask.index(True, 1)])
        new = continuations([Task("x", prompt, Sampling())], target, max_new_tokens=NEW, seed=0)[0]
        expected = None
        for place, own in enumerate(new):
            drafted = first_draft(target, drafter, prompt + new[:place])
            if drafted not in (None, own):
                expected = [*prompt, *new[:place], drafted]
                break
        assert text == expected
    assert any(tried)


def first_draft(target: Any, drafter: Any, text: list[int]) -> int | None:
    """Return the proposer's greedy draft after a text."""
    proposer = drafter.proposer(target)
    engine = Engine(
        target,
        proposer,
        rule=Lossless(),
        policy=FixedLength(FixedLengthSettings(1)),
        sampling=Sampling(),
        max_new_tokens=2,
        stop_tokens=(),
    )
    found: list[int] = []
    proposed = proposer.propose
    proposer.propose = lambda *a, **k: [found.append(p.tokens_N.tolist()) or p for p in proposed(*a, **k)]
    engine.generate([Prompt("x", text)])
    return found[0][1] if len(found[0]) > 1 else None


def test_the_state_is_the_one_before_the_final_norm(frozen):
    (states_TD,) = states_of([RECORDS[0]], frozen)
    model = frozen.target.model
    with torch.no_grad():
        logits_TV = model(torch.tensor([RECORDS[0].tokens])).logits[0]
        torch.testing.assert_close(head_logits(model, final_norm(model)(states_TD)), logits_TV, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(head_logits(model, states_TD), logits_TV, atol=1e-2)


@pytest.mark.parametrize(
    ("errors", "labels"),
    [
        ([], [1, 1, 1, 1, 1]),
        ([(4, 6)], [1, 1, 0]),
        ([(5, 6)], [1, 1, 0]),
        ([(4, 7)], [1, 1, 0, 0]),
        ([(8, 10), (2, 4)], [1, 0]),
        ([(0, 1)], [0]),
    ],
)
def test_tokens_after_the_first_mistake_have_no_label(errors, labels):
    """Tokens of two letters each. Control: without marks all five have a label."""
    assert labels_of([(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)], errors) == labels


def write_marked(path: Any, *items: Any) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


ITEMS = [
    {"id": "a", "prompt": "2+2=", "completion": "four, no: five!", "errors": [[10, 14]]},
    {"id": "b", "prompt": "1+1=", "completion": "two", "errors": []},
]


def test_marks_become_labels_of_the_tokens_that_they_cover(frozen, tmp_path):
    marked = Marked(MarkedSettings(path=write_marked(tmp_path / "m.jsonl", *ITEMS)), frozen)
    encoder = Encoder(frozen.target.tokenizer, 64)
    records = [encoder.records({k: v for k, v in item.items() if k != "errors"}, id="")[0] for item in ITEMS]
    first, second = marked.label(records)
    # One token a letter: ten letters before the mistake, its four, none for the "!" after it.
    assert first.labels_N.tolist() == [1.0] * 10 + [0.0] * 4
    assert second.labels_N.tolist() == [1.0] * 3
    (states_TD,) = states_of(records[:1], frozen)
    torch.testing.assert_close(first.features_ND, states_TD[4:18], rtol=1e-4, atol=1e-4)


def test_changes_after_a_mistake_change_no_row(frozen, tmp_path):
    """The label leak: a text that continues differently has the same rows."""
    other = ITEMS[0] | {"completion": "four, no: five, surely", "errors": [[10, 14], [16, 22]]}
    rows = []
    for item in (ITEMS[0], other):
        marked = Marked(MarkedSettings(path=write_marked(tmp_path / "m.jsonl", item)), frozen)
        (record,) = Encoder(frozen.target.tokenizer, 64).records(item, id="")
        rows += marked.label([record])
    torch.testing.assert_close(rows[0].features_ND, rows[1].features_ND, rtol=1e-4, atol=1e-4)
    assert torch.equal(rows[0].labels_N, rows[1].labels_N)


def test_marks_that_match_no_text_are_refused(frozen, tmp_path):
    wrong = [ITEMS[0] | {"errors": [[3, 99]]}, {"id": "x"}]
    with pytest.raises(DataError, match=r"(?s)2 lines.*line 1: errors: \[3, 99\] is not a span.*line 2"):
        Marked(MarkedSettings(path=write_marked(tmp_path / "m.jsonl", *wrong)), frozen)
    marked = Marked(MarkedSettings(path=write_marked(tmp_path / "m.jsonl", *ITEMS)), frozen)
    (record,) = Encoder(frozen.target.tokenizer, 64).records(ITEMS[0] | {"completion": "three"}, id="")
    with pytest.raises(DataError, match="its completion differs from"):
        marked.label([record])
    with pytest.raises(DataError, match="no line has id 'z'"):
        marked.label([Record("z", [1, 2], [False, True])])


def test_a_mark_is_found_by_the_id_of_its_problem(frozen, tmp_path):
    """An id is any text on one line; a repeated record has the same marks; an id with two marks is refused."""
    path = tmp_path / "m.jsonl"
    odd = ITEMS[0] | {"id": "a\u2028b\x85"}
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in (odd, ITEMS[1])), encoding="utf-8")
    marked = Marked(MarkedSettings(path=str(path)), frozen)
    (record,) = Encoder(frozen.target.tokenizer, 64).records(odd, id="")
    (first,), (again,) = (marked.label([replace(record, id=f"{odd['id']}{use}")]) for use in ("", "#1"))
    assert len(first) == 14
    assert torch.equal(first.labels_N, again.labels_N)
    with pytest.raises(DataError, match="line 2: id 'a' occurs twice"):
        Marked(MarkedSettings(path=write_marked(tmp_path / "n.jsonl", ITEMS[0], ITEMS[0])), frozen)


@pytest.mark.parametrize("clean", [0, 19, 40])
def test_a_judge_is_not_trained_where_one_label_is_rare(frozen, tmp_path, clean):
    """Answers of two letters, the second a mistake in those that are not clean."""
    items = [
        {"id": str(i), "prompt": f"{i}?", "completion": "ab", "errors": [] if i < clean else [[0, 2]]}
        for i in range(40)
    ]

    class Lines:
        def items(self) -> Any:
            yield from (Item(item["id"], {k: v for k, v in item.items() if k != "errors"}) for item in items)

    encoder = Encoder(frozen.target.tokenizer, 64)
    store = open_store(tmp_path / "store", Lines(), encoder, about={"source": {"kind": "lines"}})
    sources = DataSettings(sources=[type("S", (), {"kind": "lines", "weight": 1.0})()])
    data = TrainingData([store], sources, encoder, seed=0)
    path = write_marked(tmp_path / "m.jsonl", *items)

    def labelled(**settings: Any) -> Any:
        return annotate(MarkedSettings(path=path, **settings), data, frozen, tmp_path / str(settings))

    if clean == 19:
        assert 0.3 < float(labelled().train.labels_N.mean()) < 0.7
        with pytest.raises(DataError, match=r"data.annotate.min_share requires 49% of both"):
            labelled(min_share=0.49)
    else:
        share = f"{clean / 40:.1%} of the draft tokens are good enough to accept and {1 - clean / 40:.1%} are not"
        with pytest.raises(DataError, match=f"{share}; data.annotate.min_share requires 10% of both"):
            labelled()
        labelled(min_share=0.0)
