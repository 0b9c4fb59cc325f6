"""Kangaroo: it starts as the raw early exit, equals the target if the last blocks do nothing, and runs first blocks once."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from drafttrain.config.load import load_recipe
from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.proposals import Budget, Context
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.kangaroo.module import KangarooDrafter, KangarooSettings
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.confidence import Confidence, ConfidenceSettings
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.losses.align import align, planned
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks, final_norm
from drafttrain.target_model.logits import head_logits
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, chi_square, decode, greedy
from tests.marks import only, slow
from tests.target_model.test_target import ARCHITECTURES
from tests.training.squares import Squares

EXIT = 2


def wrapped(model: Any, fingerprint: str = "") -> Target:
    return Target(model, byte_tokenizer(), name="tiny", fingerprint=fingerprint)


def made(target: Target, *, noise: float = 0.0, **settings: Any) -> KangarooDrafter:
    """Return an adapter with its initial weights, or with changed ones."""
    torch.manual_seed(1)
    chosen = KangarooSettings(**{"exit_layer": EXIT} | settings)
    drafter = KangarooDrafter.create(chosen, target=target, tokenizer=None)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return drafter.eval()


@pytest.fixture(scope="module")
def target() -> Target:
    return wrapped(random_llama(num_layers=4).double())


@pytest.fixture(scope="module")
def idle_target() -> Target:
    """A target whose blocks after the exit add nothing."""
    model = random_llama(num_layers=4).double()
    with torch.no_grad():
        for block in blocks(model)[EXIT:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return wrapped(model)


def batch_of(texts: list[list[int]], *, width: int = 24) -> DraftBatch:
    return pack(
        [Record(str(i), text, [True] * len(text)) for i, text in enumerate(texts)], width=width, weight_of_step=1.0
    )[0]


def logits_of(drafter: KangarooDrafter, target: Target, batch: DraftBatch) -> Tensor:
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs())
    with torch.no_grad():
        return drafter(replace(batch, target=seen)).logits_BTV(1)


TEXTS = [[5, 6, 7, 8, 9, 10], [50, 51, 52], list(range(100, 120))]


# ---------------------------------------------------------------- the module


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_starts_as_the_raw_early_exit(name):
    """The target's final norm and head on the state that enters the exit layer; 4 D^2 weights and two norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval().double()
    target = wrapped(model)
    drafter = made(target)
    batch = batch_of([[5, 6, 7, 8], [9, 10, 11]])
    seen = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(hidden=(EXIT,)))
    raw_BTV = head_logits(model, final_norm(model)(seen.hidden_BTD[EXIT]))
    torch.testing.assert_close(logits_of(drafter, target, batch), raw_BTV, rtol=0, atol=1e-12)
    norm = sum(p.numel() for p in final_norm(model).parameters())
    assert sum(p.numel() for p in drafter.parameters()) == 4 * 32**2 + 32 + norm
    moved = made(target, noise=0.1)
    assert not torch.allclose(logits_of(moved, target, batch), raw_BTV)


def test_the_size_of_the_papers_adapter():
    """67 M for a target of width 4096 (Vicuna-7B): arXiv 2404.18911."""
    from drafttrain.drafters.kangaroo.adapter import Adapter

    with torch.device("meta"):
        adapter = Adapter(torch.nn.RMSNorm(4096), 4096, num_heads=32, rope_theta=1e4)
    assert sum(p.numel() for p in adapter.parameters()) == 4 * 4096**2 + 2 * 4096 == 67_117_056


def test_attention_is_causal_and_stays_in_the_document(target):
    drafter = made(target, noise=0.1)
    together = batch_of(TEXTS, width=32)
    assert together.tokens_BT.shape[0] == 1
    logits_BTV = logits_of(drafter, target, together)
    for number, text in enumerate(TEXTS):
        alone_BTV = logits_of(drafter, target, batch_of([text]))
        here = together.documents_BT[0] == number
        torch.testing.assert_close(logits_BTV[0, here], alone_BTV[0], rtol=0, atol=1e-10)
        shorter_BTV = logits_of(drafter, target, batch_of([text[:-1]]))
        torch.testing.assert_close(shorter_BTV[0], alone_BTV[0, :-1], rtol=0, atol=1e-10)


def plain_states(drafter: KangarooDrafter, exit_BTD: Tensor, batch: DraftBatch) -> Tensor:
    """Return the adapter's states with all scores in memory, and a mask over them."""
    adapter = drafter.adapter
    (layer,) = adapter.layers
    query, keys, values = layer.project(exit_BTD, batch.positions_BT)
    same_BTT = batch.documents_BT[:, :, None] == batch.documents_BT[:, None]
    scores_BHTT = (query @ keys.mT / query.shape[-1] ** 0.5).masked_fill(~same_BTT.tril()[:, None], -torch.inf)
    states_BTD: Tensor = adapter.norm(layer.finish(scores_BHTT.softmax(-1) @ values, exit_BTD))
    return states_BTD


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("plan", [False, True])
def test_packed_documents_attend_as_with_a_mask(target, dtype, atol, plan):
    """States and gradients, for two rows with padding, one of them with several documents."""
    drafter = made(target, noise=0.1).to(dtype)
    batch = batch_of([*TEXTS, list(range(60, 75))], width=32)
    assert batch.tokens_BT.shape[0] == 2
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs())
    exit_BTD = seen.hidden_BTD[EXIT].to(dtype)
    batch = replace(batch, target=replace(seen, hidden_BTD={EXIT: exit_BTD}))
    if plan:
        batch = planned(batch, drafter.rows_asked())
    found = []
    for states_BTD in (drafter(batch).states_BTD[1], plain_states(drafter, exit_BTD, batch)):
        gradients = torch.autograd.grad(states_BTD.square().mean(), list(drafter.parameters()))
        found.append([states_BTD[batch.documents_BT >= 0], *gradients])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=atol)
    assert all(bool(gradient.any()) for gradient in found[0])


def test_no_mask_no_scores_and_memory_linear_in_the_text(target):
    drafter = made(target, noise=0.1)

    def kept(width: int, forward: Any) -> tuple[int, bool]:
        batch = planned(batch_of([[1 + i % 250 for i in range(width)]], width=width), drafter.rows_asked())
        exit_BTD = torch.randn(1, width, 32, dtype=torch.float64)
        batch = replace(batch, target=TargetOutput(hidden_BTD={EXIT: exit_BTD}))
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Squares(width) as squares:
            states_BTD = forward(exit_BTD, batch)
        assert states_BTD.requires_grad
        return sum(sizes.values()), bool(squares.found)

    ours = [kept(width, lambda _, batch: drafter(batch).states_BTD[1]) for width in (64, 128, 256)]
    assert not any(square for _, square in ours)
    # Weights are kept too, whatever the width.
    assert ours[2][0] - ours[1][0] == 2 * (ours[1][0] - ours[0][0])
    plain = [kept(width, lambda exit_BTD, batch: plain_states(drafter, exit_BTD, batch)) for width in (64, 128, 256)]
    assert all(square for _, square in plain)
    assert plain[2][0] - plain[1][0] > 3 * (plain[1][0] - plain[0][0])


def test_rows_of_one_token_before_are_aligned(idle_target):
    """Lag 0: if the blocks after the exit do nothing, the drafter's rows are the target's rows of the same labels."""
    drafter = made(idle_target)
    batch = batch_of(TEXTS)
    seen = idle_target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(hidden=(EXIT,), final=True))
    drafted = drafter(replace(batch, target=seen))
    rows = align(drafted, batch)
    assert seen.final_BTD is not None
    states_RD, final_RD = drafted.states_BTD[1].flatten(0, 1), seen.final_BTD.flatten(0, 1)
    torch.testing.assert_close(states_RD[rows.drafter_N], final_RD[rows.target_N], rtol=0, atol=1e-12)
    assert not torch.allclose(states_RD[rows.drafter_N - 1], final_RD[rows.target_N])


def test_only_the_adapter_is_trained_and_training_lifts_the_acceptance_rate(target):
    drafter = made(target).float()
    target = wrapped(copy.deepcopy(target.model).float())
    drafter._model = (target.model,)
    before = target.weights_digest()
    assert not any("model" in name for name, _ in drafter.named_parameters())
    generator = torch.Generator().manual_seed(0)

    def fresh() -> tuple[DraftBatch, Tensor, Any]:
        texts = torch.randint(1, 257, (16, 24), generator=generator).tolist()
        batch = batch_of(texts)
        seen = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(logits=True, hidden=(EXIT,)))
        assert seen.logits_BTV is not None
        drafted = drafter(replace(batch, target=seen))
        return batch, seen.logits_BTV.softmax(-1), drafted.logits_BTV(1).softmax(-1)

    def acceptance() -> float:
        with torch.no_grad():
            _, p_BTV, q_BTV = fresh()
        return float(torch.minimum(p_BTV, q_BTV).sum(-1).mean())

    start = acceptance()
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    for _ in range(60):
        _, p_BTV, q_BTV = fresh()
        optimizer.zero_grad()
        (-(p_BTV * q_BTV.clamp_min(1e-9).log()).sum(-1).mean()).backward()
        optimizer.step()
    assert acceptance() > start + 0.05
    assert target.weights_digest() == before


# ---------------------------------------------------------------- the folder


def test_the_folder_has_only_the_adapter_with_the_papers_names_and_reads_back(target, tmp_path):
    drafter = made(target, noise=0.1, num_heads=4, draft="greedy")
    drafter.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    projections = {f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}
    assert set(tensors) == projections | {"layers.0.input_layernorm.weight", "norm.weight"}
    again = KangarooDrafter.load(tmp_path, target)
    assert (again.exit_layer, again.adapter.num_heads, again.draft) == (EXIT, 4, "greedy")
    batch = batch_of(TEXTS)
    assert torch.equal(logits_of(again, target, batch), logits_of(drafter, target, batch))


@pytest.mark.parametrize("other", ["weights", "width", "damaged"])
def test_a_folder_of_another_target_is_refused(target, tmp_path, other):
    made(target).save(tmp_path)
    model, message = target.model, "the weights cannot be read"
    if other == "width":
        model, message = random_llama(num_layers=4, hidden_size=16), "made for a target of width 32, tiny has 16"
    if other == "damaged":
        (tmp_path / "model.safetensors").write_bytes(b"\0" * 40)
    fingerprint = "another" if other == "weights" else ""
    if other == "weights":
        message = "Train an adapter for this target"
    with pytest.raises(CheckpointError, match=message):
        KangarooDrafter.load(tmp_path, wrapped(model, fingerprint))


def test_impossible_settings_are_refused(target):
    for layer in (4, 40):
        with pytest.raises(
            CheckpointError, match=rf"exit_layer must be 1\.\.3 for this target \(4 layers\), got {layer}"
        ):
            made(target, exit_layer=layer)
    with pytest.raises(CheckpointError, match="num_heads: 5 heads"):
        made(target, num_heads=5)
    with pytest.raises(CheckpointError, match=r"target\.model is null"):
        KangarooDrafter.create(KangarooSettings(), target=None, tokenizer=None)


def test_a_recipe_without_a_target_is_refused(tmp_path):
    recipe = tmp_path / "none.yaml"
    recipe.write_text(
        "name: none\ntarget: {model: null, tokenizer: x}\ndrafter: {kind: kangaroo}\nloss: {kind: ce}\n"
        "data: {sources: [{kind: stdlib}]}\n"
    )
    with pytest.raises(RecipeError, match="drafter: kangaroo is made from its target"):
        load_recipe(recipe)


def test_an_interrupted_training_resumes_bit_for_bit(target, tmp_path):
    from drafttrain.losses import losses
    from drafttrain.losses.forward_kl import ForwardKLSettings
    from drafttrain.training.run import train
    from drafttrain.training.settings import TrainSettings

    target = wrapped(copy.deepcopy(target.model).float())
    settings = TrainSettings(
        max_steps=6, warmup_steps=1, checkpoint_every_steps=2, eval_every_steps=0, optimizer="muon"
    )
    settings.loggers = ["csv"]

    def run(folder: Any, *, breaks_at: int | None = None) -> dict[str, Tensor]:
        def of_step(step: int) -> list[DraftBatch]:
            if step == breaks_at:
                raise OSError("the power went")
            return [replace(batch_of([[step + 1, 2, 3, 4, 5 + step]]), weight_of_step=4.0, step=step)]

        loss = losses.build(ForwardKLSettings())
        drafter = made(target)
        arguments = {"target": target, "of_step": of_step, "estimate": None, "settings": settings}
        train(drafter.train(), loss, **arguments, vocab_size=257, folder=folder)
        return load_file(folder / "last" / "model.safetensors")

    whole = run(tmp_path / "whole")
    with pytest.raises(OSError, match="the power went"):
        run(tmp_path / "broken", breaks_at=4)
    continued = run(tmp_path / "broken")
    start = made(target).adapter.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(continued[name], tensor)
        assert not torch.equal(start[name], tensor)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_equal_to_its_target_is_always_accepted(idle_target, temperature):
    for generation in decode(
        idle_target, made(idle_target).proposer(idle_target), temperature=temperature, stop_tokens=()
    ):
        assert all(one.num_accepted == one.num_draft_tokens == 5 for one in generation.rounds[:-1])
    wrong = decode(idle_target, made(idle_target, noise=0.1).proposer(idle_target), temperature=temperature)
    assert any(one.num_accepted < one.num_draft_tokens for g in wrong for one in g.rounds)


@pytest.mark.parametrize("name", only(["gemma", "gpt_neox"], ARCHITECTURES))
def test_greedy_output_is_the_targets_own_for_every_architecture(name):
    torch.manual_seed(0)
    target = wrapped(AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval().double())
    proposer = made(target, noise=0.02).proposer(target)
    for policy in (FixedLength(), Confidence(ConfidenceSettings(threshold=0.02, max_tokens=4))):
        found = decode(target, proposer, new=16, policy=policy, stop_tokens=())
        assert [g.tokens for g in found] == [greedy(target, prompt, 16) for prompt in PROMPTS]


@pytest.mark.parametrize("draft", ["sampled", slow("greedy")])
def test_a_batch_equals_each_sequence_alone(target, draft):
    """Ragged prompts, unequal draft lengths, sequences that end at different times."""
    proposer = made(target, noise=0.02, draft=draft).proposer(target)
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "policy": Confidence(ConfidenceSettings(0.06)), "new": 16}
        together = decode(target, proposer, **options)
        alone = [decode(target, proposer, prompts=[prompt], **options)[0] for prompt in PROMPTS]
        assert [g.tokens for g in together] == [g.tokens for g in alone]
        assert [g.rounds for g in together] == [g.rounds for g in alone]


def with_vocabulary(target: Target, size: int, **settings: Any) -> KangarooDrafter:
    """Return a drafter of the most frequent tokens, which are spread over the target's."""
    drafter = made(target, draft_vocab_size=size, **settings)
    drafter.fit_vocabulary(lambda: torch.arange(target.vocab_size) * 101 % target.vocab_size)
    return drafter


def test_a_draft_vocabulary_uses_the_heads_rows_of_its_tokens(target):
    whole, cut = made(target, noise=0.1), with_vocabulary(target, 60, noise=0.1)
    assert cut.vocabulary is not None
    assert cut.vocabulary.tolist() != list(range(60))
    batch = batch_of([[3, 1, 4, 1, 5, 9, 2, 6]])
    seen = target.read(batch.tokens_BT, batch.positions_BT, cut.needs())
    drafted = cut(replace(batch, target=seen))
    assert drafted.vocabulary is cut.vocabulary
    with torch.no_grad():
        wanted = logits_of(whole, target, batch)[..., cut.vocabulary]
        torch.testing.assert_close(drafted.logits_BTV(1), wanted)
    assert sum(p.numel() for p in cut.parameters()) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("draft", ["sampled", "greedy"])
def test_with_a_draft_vocabulary_greedy_output_is_the_targets_own(idle_target, draft):
    """The target's last blocks do nothing: the drafter errs only where the target's token is not in its vocabulary."""
    drafter = with_vocabulary(idle_target, 128, draft=draft)
    ledger = Ledger()
    found = decode(idle_target, drafter.proposer(idle_target, ledger.append), new=24, stop_tokens=())
    assert [g.tokens for g in found] == [greedy(idle_target, prompt, 24) for prompt in PROMPTS]
    known = set(drafter.vocabulary.tolist())  # type: ignore[union-attr]
    outcomes = set()
    for g in found:
        for one in g.rounds:
            wanted = g.tokens[one.start : one.start + one.num_draft_tokens]
            right = next((place for place, token in enumerate(wanted) if token not in known), len(wanted))
            assert one.num_accepted == right
            outcomes.add(right < one.num_draft_tokens)
    assert outcomes == {True, False}


def test_a_folder_with_a_draft_vocabulary_reads_back(target, tmp_path):
    drafter = with_vocabulary(target, 60, noise=0.1)
    drafter.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["draft_vocab_size"] == 60
    read = KangarooDrafter.load(tmp_path, target)
    batch = batch_of([[3, 1, 4, 1, 5]])
    assert torch.equal(logits_of(read, target, batch), logits_of(drafter, target, batch))
    assert drafter.vocabulary is not None
    drafter.vocabulary[0] = drafter.vocabulary[1]
    drafter.save(tmp_path)
    with pytest.raises(CheckpointError, match="token_map: gives some ids twice"):
        KangarooDrafter.load(tmp_path, target)


def test_a_prompt_of_one_token_and_an_end_inside_a_block(idle_target):
    proposer = made(idle_target).proposer(idle_target)
    for prompt in (Prompt("one", [7]), PROMPTS[0]):
        plain = greedy(idle_target, prompt, 24)
        stop = plain[3]
        (generation,) = decode(idle_target, proposer, prompts=[prompt], new=24, stop_tokens=[stop])
        assert generation.tokens == plain[: plain.index(stop) + 1]


def test_the_proposer_drafts_from_the_trained_modules_distribution(target):
    """Replay uses one forward, the loop its cache: at temperature 0 they agree in every round."""
    drafter = made(target, noise=0.01)
    for length in (1, 4):
        policy = FixedLength(FixedLengthSettings(length))
        found = decode(target, drafter.proposer(target), policy=policy, stop_tokens=(), new=32)
        texts = [Text(g.id, list(g.prompt_tokens), list(g.tokens)) for g in found]
        rows = replay_rows(target, drafter, texts, Sampling())
        assert [len(g.rounds) for g in found] == pytest.approx([expected_rounds(r, length) for r in rows])
        assert 0 < sum(r.acceptance_T.mean() for r in rows) < 3


def test_both_caches_contain_the_committed_text_after_every_round(target):
    """After partial and full acceptance: all layers of the target, and the adapter except for rows it need not read."""
    from drafttrain.eval.acceptance.lossless import Lossless
    from drafttrain.eval.engine import Engine

    drafter = made(target, noise=0.01)
    proposer: Any = drafter.proposer(target)
    engine = Engine(
        target, proposer, rule=Lossless(), policy=FixedLength(), sampling=Sampling(1.0), max_new_tokens=30, seed=3
    )
    one_round, found = engine.advance, set()

    def watched(live: Any) -> None:
        one_round(live)
        adapter = proposer._adapter._cache
        for row, sequence in enumerate(live):
            tokens = sequence.context.tokens
            assert engine._lm.lengths[row] == engine._lm._first_cache.lengths[row] == len(tokens) - 1
            assert adapter.lengths[row] + len(proposer._unread[row]) == len(tokens) - 1
            text = torch.tensor([tokens[:-1]])
            fresh = target.model(text, use_cache=True).past_key_values
            for ours, theirs in zip(engine._lm.cache.hf.layers, fresh.layers, strict=True):
                torch.testing.assert_close(
                    ours.keys[row : row + 1, :, : len(tokens) - 1], theirs.keys, rtol=0, atol=1e-12
                )
            seen = target.read(text, torch.arange(len(tokens) - 1)[None], drafter.needs())
            block = drafter.adapter.layers[0]
            values_ND = block.self_attn.v_proj(block.input_layernorm(seen.hidden_BTD[EXIT]))[0]
            kept = adapter.lengths[row]
            ours_ND = adapter.hf.layers[0].values[row, :, :kept].transpose(0, 1).flatten(1)
            torch.testing.assert_close(ours_ND, values_ND[:kept], rtol=0, atol=1e-12)
            found.add((sequence.rounds[-1].reason, len(proposer._unread[row])))

    engine.advance = watched  # type: ignore[method-assign]
    with torch.no_grad():
        engine.generate(PROMPTS)
    assert {("reject", 0), ("leaf", 1)} <= found, "partial and whole acceptance must both have been seen"


def test_first_blocks_run_once_per_node_and_every_forward_is_recorded(target):
    """Hooks on the attention of every block count the calls, and the bytes for MBSU follow from them."""
    ledger = Ledger()
    drafter = made(target, noise=0.01)
    tokens_by_block = [0] * 4
    calls_by_block = [0] * 4
    handles = []
    for index, block in enumerate(blocks(target.model)):

        def count(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
            tokens_by_block[index] += kwargs["hidden_states"].shape[1]
            calls_by_block[index] += 1

        handles.append(block.self_attn.register_forward_pre_hook(count, with_kwargs=True))
    proposer = drafter.proposer(target, ledger.append)
    engine_of = {"prompts": PROMPTS[1:2], "temperature": 1.0, "stop_tokens": ()}
    decode(target, proposer, **engine_of, new=1)  # the check of the split is counted here, and excluded
    ledger.events.clear()
    tokens_by_block[:], calls_by_block[:] = [0] * 4, [0] * 4
    trial = 3 + 3 + 3 + 3  # tokens that the check at the engine's start reads with every block
    (generation,) = decode(target, proposer, **engine_of, listener=ledger.append, new=30)
    for handle in handles:
        handle.remove()
    nodes = sum(one.num_draft_tokens + 1 for one in generation.rounds)
    prompt = len(PROMPTS[1].tokens) - 1
    assert tokens_by_block == [trial + prompt + nodes] * 4
    assert ledger.calls("target") == len(generation.rounds)
    assert ledger.calls("target's first blocks") == nodes
    assert ledger.calls("drafter") == nodes - len(generation.rounds)
    assert sum(e.shape.num_tokens for e in ledger.rounds("target")) == nodes
    assert ledger.bytes_read() == sum(e.bytes_read for e in ledger.events if not e.prefill)
    block = sum(p.numel() * 8 for p in blocks(target.model)[0].parameters())
    adapter = sum(p.numel() * 8 for p in drafter.parameters())
    head = target.model.get_output_embeddings().weight.numel() * 8
    first, own = ledger.rounds("target's first blocks")[0], ledger.rounds("drafter")[0]
    cached = first.shape.context + 1
    assert first.bytes_read == EXIT * (block + cached * 2 * 16 * 8) + 32 * 8
    assert own.bytes_read == adapter + head + cached * 2 * 32 * 8


# ---------------------------------------------------------------- when to stop


def drafted(target: Target, threshold: float, *, max_tokens: int = 4) -> list[int]:
    policy = Confidence(ConfidenceSettings(threshold=threshold, max_tokens=max_tokens))
    found = decode(target, made(target, noise=0.02).proposer(target), policy=policy, new=40, stop_tokens=())
    # The end of the text cuts the last rounds short, whatever the policy.
    return [one.num_draft_tokens for g in found for one in g.rounds if one.start < 40 - max_tokens]


def test_a_threshold_of_zero_never_stops_and_one_above_one_always_does(target):
    assert set(drafted(target, 0.0)) == {4}
    assert set(drafted(target, 1.5)) == {1}
    assert {1, 4} < set(drafted(target, 0.04))


@pytest.fixture(scope="module")
def small() -> Target:
    return wrapped(random_llama(num_layers=3, vocab_size=8, hidden_size=16).double())


STOP = Confidence(ConfidenceSettings(threshold=0.235, min_tokens=0, max_tokens=2))


@pytest.mark.long
def test_with_a_draft_vocabulary_the_output_has_the_targets_distribution(small):
    proposer = with_vocabulary(small, 4, noise=0.1).proposer(small)
    policy = FixedLength(FixedLengthSettings(2))
    assert chi_square(small.model, proposer, 1.0, policy=policy, samples=1000) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("draft", ["sampled", "greedy"])
def test_the_output_has_the_targets_distribution_when_drafting_stops_early(small, draft):
    proposer = made(small, noise=0.1, draft=draft).proposer(small)
    lengths: set[int] = set()
    propose = proposer.propose

    def noted(*arguments: Any) -> Any:
        proposals = propose(*arguments)
        lengths.update(p.num_draft_tokens for p in proposals)
        return proposals

    proposer.propose = noted  # type: ignore[method-assign]
    assert chi_square(small.model, proposer, 1.0, policy=STOP, samples=1000) > 1e-3
    assert lengths == {0, 1, 2}, "the rule must have stopped at every length"


@pytest.mark.long
def test_control_a_stop_that_depends_on_the_drawn_token_changes_the_distribution(small):
    """It drops a drawn token by its value, which the verifier does not know."""
    proposer = made(small, noise=0.1).proposer(small)
    propose = proposer.propose

    def shortened(*arguments: Any) -> Any:
        return [
            _cut(p, next((i for i in range(1, len(p.tokens_N)) if p.tokens_N[i] % 2), None))
            for p in propose(*arguments)
        ]

    def _cut(p: Any, end: int | None) -> Any:
        if end is None:
            return p
        row_N = p.q_row_N[:end].clone()
        row_N[-1] = -1
        names = ("tokens_N", "parents_N", "depths_N", "kinds_N")
        resume = replace(p.resume, hidden_ND=p.resume.hidden_ND[:end])
        return replace(p, q_row_N=row_N, resume=resume, **{name: getattr(p, name)[:end] for name in names})

    proposer.propose = shortened  # type: ignore[method-assign]
    policy = FixedLength(FixedLengthSettings(2))
    assert chi_square(small.model, proposer, 1.0, policy=policy, samples=1000) < 1e-3


def test_trees_are_refused(target):
    proposer = made(target).proposer(target)
    proposer.begin([Context("a", [1], 1)], target_output_of(1))
    with pytest.raises(CheckpointError, match="drafts chains only: use a length policy of width 1"):
        proposer.propose([Budget(8, 4, width=2)], Sampling(), [torch.Generator()], lambda step: True)


def target_output_of(count: int) -> list[Any]:
    from drafttrain.core.target_rows import TargetOutput

    return [TargetOutput() for _ in range(count)]
