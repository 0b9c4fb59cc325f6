"""Consistency training: the fixed point is the greedy text in at most n updates, only what differs is trained, fewer rounds after it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.checkpoint import About, write_about
from drafttrain.core.altered_text import packed_alterations
from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.proposals import fixed_chain
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.texts import Prompt, Record
from drafttrain.data_gen.packing import as_padding, pack
from drafttrain.data_gen.stored.noted_texts import RECORDS_A_SHARD, NotedTexts
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.consistency.module import Consistency, ConsistencySettings
from drafttrain.drafters.consistency.trajectories import NOTHING, Trajectories, blocks_of, num_updates
from drafttrain.drafters.lora import LoraSettings
from drafttrain.drafters.tuned_target import TuningSettings
from drafttrain.eval.acceptance.jacobi_exit import JacobiExit, JacobiExitSettings, num_changed
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.evaluate import choose_drafts, evaluate
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.proposers import proposers
from drafttrain.eval.proposers.jacobi import Jacobi
from drafttrain.eval.proposers.ngram import Ngram
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.settings import EvalSettings
from drafttrain.losses.ce import CrossEntropy
from drafttrain.losses.step import batch_loss
from drafttrain.serving.card import model_card
from drafttrain.target_model import Target, TargetSettings
from tests.drafters.test_medusa import V, texts_of
from tests.eval.decoding import decode, greedy

N = 6
LORA = LoraSettings(rank=8, alpha=16.0, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
CHAIN = FixedLength(FixedLengthSettings(N))
REPEATING = [Prompt("a", [3, 4, 5, 6, 3, 4, 5, 6, 3, 4])]
PROMPTS = [Prompt(str(i), [3 + 7 * i, 11, 2 + i]) for i in range(4)]


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> Target:
    return Target.load(TargetSettings(model=str(tiny_folder), dtype="float64"))


@pytest.fixture(scope="module")
def records(target: Target) -> list[Record]:
    """Greedy texts of different lengths: the last block of most is short."""
    texts = texts_of(target, 8, seed=2, new=20)
    return [
        Record(text.id, [*text.prompt, *text.new[: 20 - i]], [False] * 4 + [True] * (20 - i))
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def noted(target: Target, records: list[Record]) -> list[Any]:
    return Trajectories(N).of(records, target, seed=0)


def create(target: Target, **settings: Any) -> Consistency:
    made = ConsistencySettings(block=N, tune=TuningSettings(lora=LORA), **settings)
    return Consistency.create(made, target=target, tokenizer=target.tokenizer).double()


def batch_of(
    records: list[Record], noted: list[Any], *, step: int = 0, notes: Trajectories | None = None
) -> DraftBatch:
    altered = [
        (notes or Trajectories(N)).altered(record, notes_TC, seed=1000 * step + i)
        for i, (record, notes_TC) in enumerate(zip(records, noted, strict=True))
    ]
    texts = [replace(record, tokens=one.text) for record, one in zip(records, altered, strict=True)]
    labels = [sum(record.loss_mask) for record in records]
    batch, at = pack(texts, width=60, weight_of_step=float(sum(labels)))
    return replace(batch, altered=packed_alterations(batch.tokens_BT, at, altered, labels))


def train(
    drafter: Consistency, records: list[Record], noted: list[Any], *, steps: int, text_only: bool = False
) -> Consistency:
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    drafter.train()
    for step in range(steps):
        batch = batch_of(records, noted, step=step)
        if text_only:
            batch = replace(batch, altered=batch.altered and batch.altered.as_padding())
        optimizer.zero_grad()
        (batch_loss(drafter, CrossEntropy(), batch, vocab_size=V).total / batch.weight_of_step).backward()
        optimizer.step()
    return drafter.eval()


@pytest.fixture(scope="module")
def trained(target: Target, records: list[Record], noted: list[Any]) -> Consistency:
    torch.manual_seed(0)
    return train(create(target, text_weight=1.0), records, noted, steps=40)


def exported(drafter: Consistency, target: Target, folder: Path) -> tuple[Consistency, Target]:
    """Return the drafter read back, and the target that it works on."""
    drafter.save(folder)
    again = Consistency.load(folder, target)
    return again, again.adapted(target)


def rounds(target: Target, drafter: Consistency, new: int = 24) -> float:
    found = decode(target, drafter.proposer(target), prompts=PROMPTS, policy=CHAIN, new=new, stop_tokens=())
    assert [one.tokens for one in found] == [greedy(target, prompt, new) for prompt in PROMPTS]
    return sum(len(one.rounds) for one in found)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_fixed_point_is_the_greedy_text_in_at_most_n_updates(
    target: Target, trained: Consistency, records: list[Record], tmp_path: Path, seed: int
):
    """From any first iterate, untrained and trained: iterate j has its first j tokens right, so the last one has all."""
    _, tuned = exported(trained, target, tmp_path)
    for one in (target, tuned):
        texts = [[*record.tokens[:4], *greedy(one, Prompt("", record.tokens[:4]), 18)] for record in records]
        own = [Record(str(i), text, [False] * 4 + [True] * 18) for i, text in enumerate(texts)]
        for record, notes_TC in zip(own, Trajectories(N).of(own, one, seed=seed), strict=True):
            assert bool((notes_TC[:4] == NOTHING).all())
            for span in blocks_of(record.loss_mask, N):
                iterates = notes_TC[span.start : span.stop].T.tolist()
                label = list(record.tokens[span.start : span.stop])
                assert iterates[-1] == label
                assert num_updates(iterates) <= len(span)
                for number, iterate in enumerate(iterates):
                    assert iterate[:number] == label[:number]
                assert iterates[0] != label
    # Control: of a text that another target wrote, the fixed point is not the text.
    others = zip(own, Trajectories(N).of(own, target, seed=seed), strict=True)
    assert any(notes_TC[4:, -1].tolist() != list(record.tokens[4:]) for record, notes_TC in others)


def test_an_iterate_is_the_targets_argmax_after_the_one_before(target: Target, records: list[Record], noted: list[Any]):
    """Computed plainly, one block at a time, without a cache."""
    record, notes_TC = records[3], noted[3]
    for span in blocks_of(record.loss_mask, N):
        iterates = notes_TC[span.start : span.stop].T.tolist()
        for before, after in pairwise(iterates):
            tokens = torch.tensor([[*record.tokens[: span.start], *before]])
            found = target.model(tokens).logits[0, span.start - 1 : -1].argmax(-1).tolist()
            assert after == found


def test_blocks_are_runs_of_labels_and_none_has_one_token():
    mask = [True, False, *[True] * 7, False, True, False, True, True]
    assert blocks_of(mask, 3) == [range(2, 5), range(5, 8), range(12, 14)]
    assert blocks_of([False] * 4, 3) == []


def test_a_text_is_altered_in_one_block_and_trained_from_the_first_difference_on(
    records: list[Record], noted: list[Any]
):
    seen = set()
    for seed in range(40):
        one = Trajectories(N).altered(records[0], noted[0], seed=seed)
        assert one == Trajectories(N).altered(records[0], noted[0], seed=seed)
        assert list(one.text) == list(records[0].tokens)
        differing = [place for place, (a, b) in enumerate(zip(one.text, one.read, strict=True)) if a != b]
        (span,) = [span for span in blocks_of(records[0].loss_mask, N) if differing[0] in span]
        assert list(one.places) == list(range(differing[0], span.stop - 1))
        assert set(differing) <= set(span)
        assert list(one.read[span.start : span.stop]) in noted[0][span.start : span.stop].T.tolist()
        seen.add(span.start)
    assert len(seen) == len(blocks_of(records[0].loss_mask, N))


def test_the_loss_is_the_cross_entropy_with_the_distribution_after_the_label(
    target: Target, trained: Consistency, records: list[Record], noted: list[Any]
):
    """By hand, text by text; and the label's own distribution has no gradient."""
    batch = batch_of(records[:3], noted[:3], step=5)
    assert batch.altered is not None
    trained.train()
    found = trained(batch).extra_loss
    trained.eval()
    wanted = 0.0
    assert trained.tuned is not None
    with torch.no_grad(), trained.tuned.applied():
        for i, record in enumerate(records[:3]):
            one = Trajectories(N).altered(record, noted[i], seed=5000 + i)
            p, q = (
                target.model(torch.tensor([list(text)])).logits[0, one.places].log_softmax(-1)
                for text in (one.text, one.read)
            )
            wanted += float(-(p.exp() * q).sum(-1).mean()) * sum(record.loss_mask)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)


def test_nothing_before_the_first_difference_has_a_gradient(target: Target, records: list[Record], noted: list[Any]):
    drafter, batch = create(target), batch_of(records, noted)
    assert batch.altered is not None
    states = [torch.randn(*batch.tokens_BT.shape, 32, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    drafter.loss_of_altered(*states, batch.tokens_BT, batch.altered).backward()
    assert states[0].grad is None, "the distribution after the label is fixed"
    gradient_R = states[1].grad.flatten(0, 1).norm(dim=-1)
    trained_R = torch.zeros(len(gradient_R), dtype=torch.bool)
    trained_R[batch.altered.slots_N] = True
    assert bool((gradient_R[~trained_R] == 0).all())
    assert bool((gradient_R[trained_R] > 0).all())
    for row, column in ((batch.tokens_BT != batch.altered.tokens_BT).nonzero()[:1]).tolist():
        assert not bool(trained_R.unflatten(0, batch.tokens_BT.shape)[row, :column].any())


def test_padding_is_not_trained_and_gives_every_weight_a_gradient(
    target: Target, records: list[Record], noted: list[Any]
):
    """A process without records runs the same modules as the others."""
    drafter, batch = create(target), as_padding(batch_of(records, noted))
    made = batch_loss(drafter, CrossEntropy(), batch, vocab_size=V)
    assert float(made.total.detach()) == 0
    made.total.backward()
    assert all(parameter.grad is not None for parameter in drafter.parameters())


def test_after_training_jacobi_needs_fewer_rounds_and_is_exact_for_the_tuned_target(
    target: Target, trained: Consistency, records: list[Record], noted: list[Any], tmp_path: Path
):
    start = create(target)
    start.save(tmp_path)
    assert Consistency.load(tmp_path, target).adapted(target) is target
    (tmp_path / "trained").mkdir()
    again, tuned = exported(trained, target, tmp_path / "trained")
    assert tuned.name != target.name
    before, after = rounds(target, start), rounds(tuned, again)
    assert after < 0.7 * before
    # Control: training on the texts alone, with as many steps, saves fewer rounds.
    torch.manual_seed(0)
    text_only = train(create(target, text_weight=1.0), records, noted, steps=40, text_only=True)
    (tmp_path / "text_only").mkdir()
    again, tuned = exported(text_only, target, tmp_path / "text_only")
    assert after < 0.7 * rounds(tuned, again)


def test_the_evaluation_sets_the_tuned_target_beside_the_original(target: Target, trained: Consistency, tmp_path: Path):
    folders = {"drafter": tmp_path / "drafter", "start": tmp_path / "start"}
    for path, one in zip(folders.values(), (trained, create(target)), strict=True):
        path.mkdir()
        one.save(path)
        write_about(path, About("consistency", target.name, "", target.tokenizer_fingerprint, V, 0))
    settings = EvalSettings(max_new_tokens=12, temperatures=[0.0], speed_prompts=0)
    result = evaluate(folders, target, PROMPTS, settings)
    (part,) = result.temperatures
    assert part.drafters["drafter"].parity.exact
    assert part.drafters["drafter"].alpha is None
    card = model_card("name", result, drafter="drafter", recipe="", command="")
    assert "**target_modified**" in card
    assert "`adapter/`" in card
    assert "nats a token from the original" in card
    assert "target_modified" not in model_card("name", result, drafter="start", recipe="", command="")
    assert [result.drafters[name].target_modified for name in folders] == ["adapter", None]
    assert list(part.tuned) == ["drafter"]
    figures = part.tuned["drafter"]
    plain = decode(target, create(target).proposer(target), prompts=PROMPTS, new=12)
    assert trained.tuned is not None
    total = 0.0
    for one in plain:
        tokens = torch.tensor([[*one.prompt_tokens, *one.tokens]])
        with torch.no_grad():
            p = target.model(tokens).logits[0, len(one.prompt_tokens) - 1 : -1].log_softmax(-1)
            with trained.tuned.applied():
                q = target.model(tokens).logits[0, len(one.prompt_tokens) - 1 : -1].log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    assert figures.divergence.value == pytest.approx(total / sum(len(one.tokens) for one in plain), rel=1e-4)
    assert figures.divergence.value > 0
    # Control: the start is the original.
    assert evaluate({"start": folders["start"]}, target, PROMPTS, settings).temperatures[0].tuned is None


def test_early_exit_that_is_off_is_lossless(target: Target):
    def outputs(rule: Any) -> list[Any]:
        proposer = create(target).proposer(target)
        return decode(target, proposer, prompts=PROMPTS, policy=CHAIN, rule=rule, new=24, stop_tokens=())

    exact = outputs(Lossless())
    off = outputs(JacobiExit(JacobiExitSettings(max_changed=0)))
    assert [(one.tokens, one.rounds) for one in off] == [(one.tokens, one.rounds) for one in exact]
    # Controls: with an exit the output differs, in fewer rounds; an exit in the first round accepts every token.
    for settings in (JacobiExitSettings(max_changed=3), JacobiExitSettings(max_changed=0, max_rounds=2)):
        early = outputs(JacobiExit(settings))
        assert [one.tokens for one in early] != [one.tokens for one in exact]
        assert sum(len(one.rounds) for one in early) < sum(len(one.rounds) for one in exact)
    first = outputs(JacobiExit(JacobiExitSettings(max_changed=0, max_rounds=1)))
    assert all(part.num_accepted == part.num_draft_tokens for one in first for part in one.rounds)


def test_early_exit_of_drafts_that_are_no_iterates_is_refused(target: Target):
    rule = JacobiExit(JacobiExitSettings())
    for proposer in (CausalLMDrafter(target.model).proposer(target), Ngram()):
        with pytest.raises(CheckpointError, match=r"jacobi_exit ends an iteration, .* these drafts are no iterates"):
            decode(target, proposer, prompts=REPEATING, policy=CHAIN, rule=rule, new=12, stop_tokens=())
    for allowed in (Jacobi(), NoDraft()):
        decode(target, allowed, prompts=REPEATING, policy=CHAIN, rule=rule, new=12, stop_tokens=())


def test_early_exit_of_other_drafts_is_refused_before_training(target: Target):
    rule = JacobiExitSettings()
    (problem,) = EvalSettings(rule=rule).problems_with(drafters.entry("causal_lm").settings())
    assert problem.startswith("eval.rule: jacobi_exit ends an iteration")
    assert problem.endswith("got drafter.kind causal_lm: use rule: {kind: lossless}")
    assert EvalSettings(rule=rule).problems_with(ConsistencySettings()) == []
    beside = [proposers.entry(name).settings() for name in ("ngram", "jacobi")]
    (problem,) = EvalSettings(rule=rule, beside=beside).check()
    assert "beside: ngram has none" in problem
    with pytest.raises(CheckpointError, match="got a drafter of kind causal_lm"):
        choose_drafts([CausalLMDrafter(target.model)], EvalSettings(rule=rule))


def test_changes_are_counted_over_the_whole_chain():
    probs_NV = torch.eye(4)[[1, 2, 0, 3]]
    assert num_changed(fixed_chain(0, [1, 3, 0]), TargetProbs.of(probs_NV)) == 1


def test_mixed_labels_take_the_text_where_the_solution_is_far_from_it(target: Target, records: list[Record]):
    """A text with one foreign token: its block's solution differs from it."""
    tokens = list(records[0].tokens)
    tokens[5] = (tokens[5] + 1) % V
    record = replace(records[0], tokens=tokens)
    notes_TC = Trajectories(N).of([record], target, seed=0)[0]
    (first, *_) = blocks_of(record.loss_mask, N)
    fixed = notes_TC[first.start : first.stop, -1].tolist()
    text = tokens[first.start : first.stop]
    assert fixed != text

    def labels(mixed: float | None) -> set[tuple[int, ...]]:
        found = [Trajectories(N, mixed).altered(record, notes_TC, seed=seed) for seed in range(60)]
        return {
            tuple(one.text[first.start : first.stop])
            for one in found
            if list(one.read[first.start : first.stop]) != list(one.text[first.start : first.stop])
        }

    assert labels(None) == set()
    assert labels(0.0) == {tuple(text)}
    assert labels(1.0) == {tuple(fixed)}


class _Store:
    """What notes need of a store."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def length(self, index: int) -> int:
        return len(self.records[index].tokens)


def test_notes_are_continued_shard_by_shard_and_made_again_for_other_settings(
    target: Target, records: list[Record], noted: list[Any], tmp_path: Path
):
    many = [replace(records[i % 8], id=str(i)) for i in range(RECORDS_A_SHARD + 8)]
    store: Any = _Store(many)

    def texts(block: int) -> NotedTexts:
        notes = Trajectories(block)
        return NotedTexts(tmp_path / "notes", store, notes, about=notes.about(), seed=0)

    texts(N).write([RECORDS_A_SHARD], target)
    assert [path.name for path in sorted((tmp_path / "notes").glob("*.npy"))] == ["notes-00001.npy"]
    before = (tmp_path / "notes" / "notes-00001.npy").stat().st_mtime_ns
    whole = texts(N)
    whole.write([0, RECORDS_A_SHARD], target)
    assert (tmp_path / "notes" / "notes-00001.npy").stat().st_mtime_ns == before
    for index in (0, 7, RECORDS_A_SHARD + 3):
        alone = Trajectories(N).of([many[index]], target, seed=0)[0]
        assert whole[index].tolist() == alone.tolist()
    assert texts(N + 1).folder.glob("*.npy") is not None
    assert not list((tmp_path / "notes").glob("*.npy"))


def test_texts_without_a_block_to_train_are_refused(target: Target, records: list[Record]):
    foreign = [replace(record, tokens=[(token * 7 + 3) % V for token in record.tokens]) for record in records]
    notes = Trajectories(N)
    with pytest.raises(DataError, match=r"none of \d+ blocks .* greedily"):
        notes.summary(foreign, notes.of(foreign, target, seed=0))
    assert "24 of 24 blocks" in notes.summary(records, notes.of(records, target, seed=0))
