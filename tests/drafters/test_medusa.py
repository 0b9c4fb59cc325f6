"""Medusa: heads start equal to the target's, head k predicts t + k + 1, own blocks, files for engines, lossless decoding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Prompt, Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import chain_draft
from drafttrain.drafters.medusa.folder import TREE
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import MedusaSettings
from drafttrain.drafters.medusa.static_tree import best_paths
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.eval.replay import Text
from drafttrain.losses.align import align
from drafttrain.losses.ce import CrossEntropy, CrossEntropySettings
from drafttrain.losses.chunked import row_losses
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, V, chi_square, decode, greedy, rounds_of_replay, small_target, standard_error
from tests.marks import only, slow
from tests.target_model.test_tree_calls import architectures, build

D = 32
CHAIN = FixedLength(FixedLengthSettings(3))
TREE_POLICY = TreeLength(TreeSettings(num_draft_tokens=12, depth=3, width=3))


def create(target: Target, **settings: Any) -> Medusa:
    return Medusa.create(MedusaSettings(**settings), target=target, tokenizer=target.tokenizer)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")


def test_heads_are_created_on_their_device_without_random_weights(target: Target, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    create(target, num_heads=2).save(tmp_path)
    Medusa.load(tmp_path, target)
    assert torch.equal(torch.get_rng_state(), before)
    elsewhere = Target(random_llama().to("meta"), byte_tokenizer(), name="tiny", fingerprint="")
    assert all(parameter.is_meta for parameter in create(elsewhere, num_heads=2).parameters())


def texts_of(target: Target, count: int, *, seed: int, new: int = 40) -> list[Text]:
    random = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, V, (count, 4), generator=random)
    out = target.model.generate(prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return [Text(str(i), row[:4].tolist(), row[4:].tolist()) for i, row in enumerate(out)]


def batch_of(texts: list[Text]) -> DraftBatch:
    records = [
        Record(text.id, [*text.prompt, *text.new], [False] * len(text.prompt) + [True] * len(text.new))
        for text in texts
    ]
    count = sum(len(text.new) for text in texts)
    batch, _ = pack(records, width=len(records[0].tokens), weight_of_step=float(count))
    return batch


def train(medusa: Medusa, batch: DraftBatch, *, steps: int, lr: float = 1e-2) -> None:
    optimizer = torch.optim.Adam(medusa.parameters(), lr=lr)
    for _ in range(steps):
        drafted = medusa(batch)
        loss_N, _ = row_losses(
            CrossEntropy(CrossEntropySettings()), drafted, align(drafted, batch), batch, vocab_size=V
        )
        optimizer.zero_grad()
        (loss_N.sum() / batch.weight_of_step).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained(target: Target) -> Medusa:
    """Heads trained on the target's texts, with a tree calibrated on other texts of the target."""
    medusa = create(target, num_heads=3).double()
    batch = batch_of(texts_of(target, 48, seed=1))
    seen = target.read(batch.tokens_BT, batch.positions_BT, medusa.needs())
    train(medusa, replace(batch, target=seen), steps=40)
    medusa.eval()
    tree = medusa.calibrate(target, [batch_of(texts_of(target, 16, seed=2))])[TREE]
    medusa.paths = [tuple(path) for path in tree["paths"]]
    return medusa


# ---------------------------------------------------------------- the module


def test_every_head_starts_equal_to_the_targets_head_bit_for_bit(tiny_target: Target):
    medusa = create(tiny_target, num_heads=3, num_layers=2)
    tokens_BT = torch.randint(1, V, (2, 12), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.arange(12).expand(2, 12)
    seen = tiny_target.read(tokens_BT, positions_BT, TargetNeeds(logits=True, final=True))
    batch = DraftBatch(tokens_BT, tokens_BT > 0, positions_BT, torch.zeros(2, 12).long(), 1.0, target=seen)
    drafted = medusa(batch)
    assert sorted(drafted.states_BTD) == [1, 2, 3]
    for depth in (1, 2, 3):
        assert torch.equal(drafted.logits_BTV(depth), seen.logits_BTV)
    with torch.no_grad():  # the control: a bias that is not zero
        medusa.blocks[0].layers[0].bias.fill_(1e-2)  # type: ignore[index,union-attr]
    assert not torch.equal(medusa(batch).logits_BTV(1), seen.logits_BTV)


def label_counts() -> torch.Tensor:
    """Return counts by which the 40 most frequent of 257 tokens are spread over the vocabulary."""
    return torch.arange(V) * 101 % V


@pytest.mark.parametrize("shared", [False, True])
def test_heads_with_a_draft_vocabulary_start_as_the_targets_rows_of_it(tiny_target: Target, shared: bool):
    medusa = create(tiny_target, num_heads=2, draft_vocab_size=40, shared_head=shared)
    medusa.fit_vocabulary(label_counts)
    assert medusa.token_map is not None
    assert medusa.token_map.tolist() == sorted(label_counts().argsort(descending=True)[:40].tolist())
    assert medusa.token_map.tolist() != list(range(40))
    tokens_BT, positions_BT = torch.randint(1, V, (2, 12)), torch.arange(12).expand(2, 12)
    seen = tiny_target.read(tokens_BT, positions_BT, TargetNeeds(logits=True, final=True))
    batch = DraftBatch(tokens_BT, tokens_BT > 0, positions_BT, torch.zeros(2, 12).long(), 1.0, target=seen)
    drafted = medusa(batch)
    assert drafted.vocabulary is medusa.token_map
    assert seen.logits_BTV is not None
    for depth in (1, 2):
        torch.testing.assert_close(drafted.logits_BTV(depth), seen.logits_BTV[..., medusa.token_map])
    matrices = 1 if shared else 2
    assert sum(p.numel() for p in medusa.parameters()) == 2 * (D * D + D) + matrices * 40 * D


def test_a_draft_vocabulary_larger_than_the_tokenizer_is_refused(target: Target):
    with pytest.raises(CheckpointError, match=r"drafter\.draft_vocab_size must be 1\.\.\d+ for this target, got 999"):
        create(target, draft_vocab_size=999)


@pytest.mark.parametrize(("heads", "layers"), [(1, 1), (3, 1), (2, 3)])
def test_the_number_of_parameters_shows_that_no_block_is_shared(target: Target, heads: int, layers: int):
    medusa = create(target, num_heads=heads, num_layers=layers)
    assert sum(p.numel() for p in medusa.parameters()) == heads * (layers * (D * D + D) + V * D)
    # Control: the known bug in which all heads share one block.
    block = torch.nn.Linear(D, D)
    shared = torch.nn.ModuleList([torch.nn.Sequential(*[block] * layers) for _ in range(heads)])
    formula = heads * layers * (D * D + D)
    assert (sum(p.numel() for p in shared.parameters()) == formula) == (heads * layers == 1)


def periodic(period: int, length: int = 40) -> tuple[DraftBatch, torch.Tensor]:
    """Return a copy task: a repeated permutation of `period` tokens; the target's state is the token, one-hot."""
    order = torch.randperm(period, generator=torch.Generator().manual_seed(3)) + 1
    tokens_BT = order.repeat(length // period + 1)[None, :length]
    states_BTD = torch.nn.functional.one_hot(tokens_BT, D).double()
    batch = DraftBatch(
        tokens_BT,
        torch.ones_like(tokens_BT, dtype=torch.bool),
        torch.arange(length)[None],
        torch.zeros_like(tokens_BT),
        weight_of_step=float(length),
        target=TargetOutput(final_BTD=states_BTD),
    )
    return batch, tokens_BT[0]


@pytest.mark.parametrize("permuted", [False, True])
def test_head_k_learns_the_token_k_plus_one_places_ahead_and_no_other(target: Target, permuted: bool):
    batch, tokens_T = periodic(7)
    medusa = create(target, num_heads=3).double()
    train(medusa, replace(batch, tokens_BT=tokens_T.roll(1)[None]) if permuted else batch, steps=60)
    for depth in (1, 2, 3):
        guesses_T = medusa(batch).logits_BTV(depth)[0].argmax(-1)
        right = (guesses_T[: -depth - 1] == tokens_T[depth + 1 :]).double().mean()
        assert right == (0 if permuted else 1)


def test_the_loss_of_head_k_has_weight_decay_to_the_k(target: Target):
    batch, _ = periodic(7)
    loss = {}
    for decay in (1.0, 0.5):
        drafted = create(target, num_heads=3, decay=decay).double()(batch)
        rows = align(drafted, batch)
        loss_N, _ = row_losses(CrossEntropy(CrossEntropySettings()), drafted, rows, batch, vocab_size=V)
        loss[decay] = [part.sum().item() for part in loss_N.split(list(rows.counts.values()))]
    assert loss[0.5] == pytest.approx([0.5**k * whole for k, whole in enumerate(loss[1.0], start=1)])


# ---------------------------------------------------------------- training rows, proposals and the loop agree


@pytest.mark.long
def test_a_proposal_comes_from_the_training_row_before_its_root(target: Target, trained: Medusa):
    (text,) = texts_of(target, 1, seed=5)
    batch = batch_of([text])
    seen = target.read(batch.tokens_BT, batch.positions_BT, trained.needs())
    drafted = trained(replace(batch, target=seen))
    whole = [*text.prompt, *text.new]
    first, second = (
        decode(target, trained.proposer(target), prompts=[Prompt("", whole[:length])], policy=CHAIN, new=4)[0].rounds[0]
        for length in (8, 9)
    )
    for length, found in ((8, first), (9, second)):
        guesses = [int(drafted.logits_BTV(depth)[0, length - 2].argmax()) for depth in (1, 2, 3)]
        right = next((i for i in range(3) if guesses[i] != whole[length + i]), 3)
        assert (found.num_accepted, found.num_draft_tokens) == (right, 3)


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replay_agrees_with_the_loop(target: Target, trained: Medusa, temperature: float):
    prompts = [Prompt(str(i), [1 + i, 2, 3 + i % 7, 5][: 1 + i % 4]) for i in range(24)]  # some of one token only
    for length in (1, 2, 3, 5):
        (differences,) = rounds_of_replay(target, trained, prompts, temperature=temperature, num_draft_tokens=(length,))
        if temperature == 0:
            assert differences.abs().max() < 1e-9
        else:
            assert differences.mean().abs() < 4 * standard_error(differences)


@pytest.mark.parametrize("policy", [CHAIN, TREE_POLICY])
@pytest.mark.parametrize("together", [True, False])
def test_greedy_output_is_the_targets_own(target: Target, trained: Medusa, policy: Any, together: bool):
    prompts = [*PROMPTS, Prompt("one token", [7])]
    groups = [prompts] if together else [[prompt] for prompt in prompts]
    found = [
        g for group in groups for g in decode(target, trained.proposer(target), prompts=group, policy=policy, new=24)
    ]
    assert [g.tokens for g in found] == [greedy(target, prompt, 24) for prompt in prompts]
    assert all(one.start + one.max_depth + 1 <= 24 for g in found for one in g.rounds)


@pytest.mark.parametrize("name", only(["gpt2", "gemma"], architectures()))
def test_greedy_output_is_the_targets_own_on_every_architecture(name: str):
    model = build(name)
    target = Target(model, byte_tokenizer(), name=name, fingerprint="")
    medusa = create(target, num_heads=3).double()
    medusa.paths = best_paths([[0.5, 0.3, 0.1]] * 3, 12)
    for policy in (CHAIN, TREE_POLICY):
        found = decode(target, medusa.proposer(target), policy=policy, new=12, stop_tokens=())
        assert [g.tokens for g in found] == [greedy(target, prompt, 12) for prompt in PROMPTS]


def test_the_tree_accepts_more_than_the_chain(target: Target, trained: Medusa):
    prompts = [Prompt(text.id, text.prompt) for text in texts_of(target, 12, seed=7)]
    rounds = [
        sum(
            len(g.rounds)
            for g in decode(target, trained.proposer(target), prompts=prompts, policy=policy, stop_tokens=())
        )
        for policy in (CHAIN, TREE_POLICY)
    ]
    assert rounds[1] < rounds[0] < 12 * 40


def small_medusa(**settings: Any) -> tuple[Any, Medusa]:
    target = small_target()
    torch.manual_seed(1)
    medusa = create(target, num_heads=2, **settings).double()
    medusa.fit_vocabulary(lambda: torch.arange(target.vocab_size) % 3)
    with torch.no_grad():
        for parameter in medusa.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    medusa.paths = best_paths([[0.5, 0.4], [0.5, 0.4]], 5)
    return target, medusa


@pytest.mark.long
@pytest.mark.parametrize(
    ("draft", "cut"),
    [
        *(("sampled", {}), slow("greedy", {}), slow("tree", {})),
        *((draft, {"draft_vocab_size": 5, "shared_head": True}) for draft in ("greedy", "tree")),
        slow("sampled", {"draft_vocab_size": 5, "shared_head": True}),
    ],
)
def test_the_output_has_the_targets_distribution(draft: str, cut: dict[str, Any]):
    target, medusa = small_medusa(draft="greedy" if draft == "greedy" else "sampled", **cut)
    policy = TreeLength(TreeSettings(num_draft_tokens=5, depth=2, width=2)) if draft == "tree" else None
    assert chi_square(target.model, medusa.proposer(target), 1.0, samples=1000, policy=policy) > 1e-3


@pytest.mark.long
def test_control_the_distribution_of_another_head_changes_the_output(monkeypatch):
    honest = chain_draft.chain

    def swapped(tokens: list[int], *, kind: Any, q_rows_RV: Any = None) -> Any:
        return honest(tokens, kind=kind, q_rows_RV=None if q_rows_RV is None else q_rows_RV.flip(0))

    monkeypatch.setattr(chain_draft, "chain", swapped)
    target, medusa = small_medusa()
    assert chi_square(target.model, medusa.proposer(target), 1.0, samples=1000) < 1e-3


def test_one_call_per_round_reads_only_the_heads_it_uses(target: Target, trained: Medusa):
    ledger = Ledger()
    policy = FixedLength(FixedLengthSettings(2))
    (found,) = decode(target, trained.proposer(target, ledger.append), prompts=PROMPTS[1:2], policy=policy, new=20)
    drafting = sum(one.num_draft_tokens > 0 for one in found.rounds)
    assert ledger.calls("drafter") == drafting
    full = [event for event in ledger.rounds("drafter") if event.shape.num_layers == 2]
    assert {event.bytes_read for event in full} == {2 * 8 * (D * D + D + V * D)}


# ---------------------------------------------------------------- calibration and files


@pytest.fixture(scope="module")
def trained_cut(target: Target) -> Medusa:
    """Heads with a draft vocabulary, trained on the target's texts: they lack some of its tokens."""
    texts = texts_of(target, 48, seed=1)
    tokens = torch.tensor([token for text in texts for token in text.new])
    medusa = create(target, num_heads=3, draft_vocab_size=len(tokens.unique()) // 2, shared_head=True).double()
    medusa.fit_vocabulary(lambda: tokens.bincount(minlength=V))
    batch = batch_of(texts)
    seen = target.read(batch.tokens_BT, batch.positions_BT, medusa.needs())
    train(medusa, replace(batch, target=seen), steps=40)
    return medusa.eval()


def test_tokens_that_heads_lack_are_misses_of_the_calibration_and_train_nothing(target: Target, trained_cut: Medusa):
    batch = batch_of(texts_of(target, 8, seed=9, new=12))
    found = trained_cut.calibrate(target, [batch])[TREE]
    drafted = trained_cut._drafted(target.read(batch.tokens_BT, batch.positions_BT, trained_cut.needs()).final_BTD)
    rows = align(drafted, batch)
    loss_N, _ = row_losses(CrossEntropy(CrossEntropySettings()), drafted, rows, batch, vocab_size=V)
    known_N = torch.isin(rows.tokens_N, trained_cut.token_map)
    assert 0.2 < known_N.double().mean() < 1
    assert ((loss_N > 0) == known_N).all()
    first = 0
    for head, count in enumerate(rows.counts.values()):
        logits_NR = drafted.logits_BTV(head + 1).flatten(0, 1)[rows.drafter_N[first : first + count]]
        guesses_N = trained_cut.token_map[logits_NR.argmax(-1)]
        assert found["accuracy"][head][0] == pytest.approx(
            (guesses_N == rows.tokens_N[first : first + count]).double().mean()
        )
        first += count
    assert found["accuracy"][0][0] > 0.1


@pytest.mark.parametrize("policy", [CHAIN, TREE_POLICY])
def test_with_a_draft_vocabulary_the_output_is_the_targets_own(target: Target, trained_cut: Medusa, policy: Any):
    trained_cut.paths = best_paths([[0.5, 0.3, 0.1]] * 3, 12)
    found = decode(target, trained_cut.proposer(target), policy=policy, new=24)
    assert [g.tokens for g in found] == [greedy(target, prompt, 24) for prompt in PROMPTS]
    assert any(one.num_accepted for g in found for one in g.rounds)


def test_a_folder_with_a_draft_vocabulary_reads_back(target: Target, trained_cut: Medusa, tmp_path: Path):
    trained_cut.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert trained_cut.token_map is not None
    assert (config["truncated_vocab_size"], config["original_lm_head"]) == (len(trained_cut.token_map), True)
    read = Medusa.load(tmp_path, target)
    for name, tensor in trained_cut.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
    with torch.no_grad():  # the control: a map that gives one id twice
        trained_cut.token_map[0] = trained_cut.token_map[1]
    (tmp_path / "damaged").mkdir()
    trained_cut.save(tmp_path / "damaged")
    with pytest.raises(CheckpointError, match="token_map: gives some ids twice"):
        Medusa.load(tmp_path / "damaged", target)


def test_calibration_counts_what_a_plain_loop_counts(target: Target, trained: Medusa):
    texts = texts_of(target, 3, seed=9, new=12)
    found = trained.calibrate(target, [batch_of(texts[:2]), batch_of(texts[2:])])[TREE]
    hits, counts = torch.zeros(3, 10), torch.zeros(3)
    for text in texts:
        whole = [*text.prompt, *text.new]
        final_TD = target.read(torch.tensor([whole]), torch.arange(len(whole))[None], trained.needs()).final_BTD[0]  # type: ignore[index]
        for depth in (1, 2, 3):
            for label in range(max(len(text.prompt), depth + 1), len(whole)):
                logits_V = trained.head(trained.states(final_TD[label - depth - 1], depth), depth)
                hits[depth - 1] += logits_V.topk(10).indices == whole[label]
                counts[depth - 1] += 1
    assert found["num_positions"] == counts.tolist()
    torch.testing.assert_close(torch.tensor(found["accuracy"]), hits / counts[:, None])


def test_the_folder_has_the_official_names_and_reads_back(target: Target, trained: Medusa, tmp_path: Path):
    trained.save(tmp_path)
    (tmp_path / TREE).write_text(json.dumps({"paths": trained.paths}))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": D,
        "vocab_size": V,
        "num_heads": 3,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "drafttrain_draft": "sampled",
    }
    # An engine takes any key with both words for the number of heads.
    assert [key for key in config if "num" in key and "heads" in key] == ["num_heads"]
    shapes = {
        **{f"blocks.{i}.layers.0.weight": [D, D] for i in range(3)},
        **{f"blocks.{i}.layers.0.bias": [D] for i in range(3)},
        **{f"lm_heads.{i}.weight": [V, D] for i in range(3)},
    }
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == shapes  # noqa: SIM118
    read = Medusa.load(tmp_path, target)
    assert read.paths == trained.paths
    for name, tensor in trained.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)


@pytest.fixture
def folder(trained: Medusa, tmp_path: Path) -> Path:
    trained.save(tmp_path)
    return tmp_path


def test_a_folder_without_a_tree_drafts_chains_and_refuses_trees(target: Target, folder: Path):
    read = Medusa.load(folder, target)
    assert read.paths is None
    decode(target, read.proposer(target), policy=CHAIN, new=8)
    with pytest.raises(CheckpointError, match=TREE):
        decode(target, read.proposer(target), policy=TREE_POLICY, new=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, "this target, tiny, has"),
        ({"medusa_fc_bias": False}, "medusa_fc_bias"),
        ({"num_heads": 2}, "num_heads is 2, the weights have 3"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"truncated_vocab_size": 999}, r"truncated_vocab_size must be 1\.\.vocab_size"),
        ({"truncated_vocab_size": 9}, "token_map: missing"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(target: Target, folder: Path, change: dict[str, Any], message: str):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        Medusa.load(folder, target)


def test_targets_without_a_suitable_head_are_refused(target: Target):
    with pytest.raises(CheckpointError, match=r"target\.model is null"):
        Medusa.create(MedusaSettings(), target=None, tokenizer=target.tokenizer)
    model = random_llama()
    model.lm_head = torch.nn.Linear(D, V)
    with pytest.raises(CheckpointError, match="has a bias"):
        create(Target(model, byte_tokenizer(), name="biased", fingerprint=""))
