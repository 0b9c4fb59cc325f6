"""MTP: the rollout of a target's own next-token-prediction layer is its drafting, and each detail of the layouts matters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import drafters
from drafttrain.drafters.mtp.layouts import DEEPSEEK, MIMO, layout_named
from drafttrain.losses.ce import CrossEntropy, CrossEntropySettings
from drafttrain.losses.step import batch_loss
from drafttrain.target_model.packed_attention import Columns
from tests.drafters.eagle_models import eagle_target, packed
from tests.drafters.mtp_models import deepseek_folder, loaded, mimo_folder
from tests.eval.decoding import PROMPTS, chi_square, decode, greedy, rounds_of_replay
from tests.marks import slow

STEPS = 4
LENGTHS = (9, 7, 12)


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded(mimo_folder(tmp_path_factory.mktemp("mimo") / "target"))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded(deepseek_folder(tmp_path_factory.mktemp("deepseek") / "target"))


@pytest.fixture(params=["mimo", "deepseek"])
def target(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def made(target: Any, **settings: Any) -> Any:
    """Return the target's own layer in float64."""
    entry: Any = drafters.entry("mtp")
    torch.manual_seed(3)
    return entry.component.create(entry.settings(**settings), target=target, tokenizer=target.tokenizer).double().eval()


def chain_states(drafter: Any, target: Any, tokens: list[int], slot: int, num_steps: int) -> list[Tensor]:
    """Return the layer's states of a chain after `slot`, token by token, with the cache that decoding would have."""
    seen = target.read(torch.tensor([tokens]), torch.arange(len(tokens))[None], drafter.needs())
    features_TD = drafter.features(seen)[0]
    cache: list[tuple[Tensor, Tensor]] = []

    def read(token: int, hidden_D: Tensor, position: int) -> Tensor:
        at = torch.tensor([[position]])
        inputs, residual = drafter.entering(drafter.embed_at(torch.tensor([[token]]), at), hidden_D.view(1, 1, -1))
        cache.append(drafter.layer.keys_and_values(inputs, at))
        query = drafter.layer.queries(inputs, at)
        keys, values = (torch.cat(states, dim=2) for states in zip(*cache, strict=True))
        share = query.shape[1] // keys.shape[1]
        keys, values = (states.repeat_interleave(share, dim=1) for states in (keys, values))
        weights = (query @ keys.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        return drafter.layer.finish(weights @ values, residual)[0, 0]

    for t in range(slot + 1):
        state = read(tokens[t + 1], features_TD[t], t)
    found = [state]
    for step in range(1, num_steps):
        found.append(read(tokens[slot + 1 + step], drafter.fed_back(found[-1]), slot + step))
    return found


def largest_difference(target: Any, drafter: Any) -> list[float]:
    """Return, by step, the largest difference of logits between the packed rollout and chains drafted token by token."""
    batch, places = packed(target, drafter, LENGTHS, width=22)
    worst = [0.0] * STEPS
    with torch.no_grad():
        states = drafter(replace(batch, num_depths=STEPS)).states_BTD
        for (row, column), length in zip(places, LENGTHS, strict=True):
            tokens = batch.tokens_BT[row, column : column + length].tolist()
            for slot in range(length - STEPS):
                for step, state in enumerate(chain_states(drafter, target, tokens, slot, STEPS)):
                    ours = drafter.head(states[step + 1][row, column + slot][None], step + 1)
                    theirs = drafter.head(state[None], step + 1)
                    worst[step] = max(worst[step], float((ours - theirs).abs().max()))
    return worst


# MiMo's layer is float64 throughout; the router and the angles of DeepSeek's are float32 in transformers.
@pytest.mark.parametrize(("layout", "tolerance"), [("mimo", 1e-10), ("deepseek", 1e-5)])
def test_step_k_of_training_has_the_logits_of_decoding_with_a_grown_cache(layout, tolerance, request):
    target = request.getfixturevalue(layout)
    assert max(largest_difference(target, made(target))) < tolerance


@pytest.mark.parametrize("layout", ["mimo"])
def test_control_keys_of_the_own_step_only_break_the_identity_from_the_second_step_on(layout, request, monkeypatch):
    """What speculators trains: step k attends to the keys of step k of all slots, and not to those of step 0."""
    target = request.getfixturevalue(layout)
    drafter = made(target)
    attend = Columns.attend

    def local(self: Any, query: Tensor, own: Any) -> Tensor:
        return attend(Columns(*own[-1], self.documents), query) if own else attend(self, query)

    monkeypatch.setattr(Columns, "attend", local)
    differences = largest_difference(target, drafter)
    assert differences[0] < 1e-10
    assert min(differences[1:]) > 1e-2


def test_control_a_position_that_does_not_advance_breaks_the_identity(target, monkeypatch):
    drafter = made(target)
    layer, shape = type(drafter.layer), {}

    def stuck(method: Any) -> Any:
        def call(self: Any, inputs: Tensor, positions: Tensor) -> Any:
            # Within a rollout all calls have the shape of the first; chains are read one token at a time.
            first = shape.setdefault(positions.shape, positions) if positions.numel() > 1 else positions
            return method(self, inputs, first)

        return call

    for name in ("queries", "keys_and_values"):
        monkeypatch.setattr(layer, name, stuck(getattr(layer, name)))
    differences = largest_difference(target, drafter)
    assert differences[0] < 1e-5
    assert min(differences[1:]) > 1e-2


def test_a_shift_of_all_positions_changes_nothing(target):
    """Engines count from the feature (vLLM) or from the token after it (transformers): only distances matter."""
    drafter = made(target)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 6, drafter.fc.out_features, generator=generator, dtype=torch.float64)
    at = torch.arange(6)[None]

    def scores(shift: int) -> Tensor:
        keys, _ = drafter.layer.keys_and_values(inputs, at + shift)
        query = drafter.layer.queries(inputs, at + shift)
        return query @ keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1).mT

    torch.testing.assert_close(scores(1), scores(0), rtol=1e-5, atol=1e-5)


def test_one_step_has_the_loss_of_a_next_token_layer_written_by_hand(mimo):
    drafter, batch = made(mimo, num_steps=1), packed(mimo, made(mimo), (12,), width=12)[0]
    logits_TV = hand_written(tensors_of(mimo), batch.tokens_BT[0], batch.target.hidden_BTD[3][0])
    # Rotary angles are float32.
    torch.testing.assert_close(drafter(batch).logits_BTV(1)[0, :-1], logits_TV, rtol=0, atol=1e-6)
    loss = batch_loss(drafter.train(), CrossEntropy(CrossEntropySettings()), batch, vocab_size=mimo.vocab_size).total
    wanted = cross_entropy(logits_TV[:-1], batch.tokens_BT[0, 2:], reduction="sum")
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


def tensors_of(target: Any) -> dict[str, Tensor]:
    stored = load_file(f"{target.model.config._name_or_path}/model.safetensors")
    return {name: tensor.double() for name, tensor in stored.items()}


def hand_written(tensors: dict[str, Tensor], tokens_T: Tensor, hidden_TD: Tensor, *, swap: bool = False) -> Tensor:
    """Return MiMo's logits of the token two places ahead, from plain products of the tensors in the checkpoint."""
    part = {
        name.removeprefix("model.mtp_layers.0.").removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if ".mtp_layers." in name
    }

    def normed(states: Tensor, name: str) -> Tensor:
        return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * part[name]

    count, width = len(tokens_T) - 1, hidden_TD.shape[-1] // 2
    embedded = tensors["model.embed_tokens.weight"][tokens_T[1:]].clone()
    embedded[0] = 0
    halves = [normed(hidden_TD[:count], "hidden_layernorm"), normed(embedded, "token_layernorm")]
    joined = torch.cat(halves[::-1] if swap else halves, dim=-1) @ part["input_proj"].T
    entering = normed(joined, "input_layernorm")
    angle = torch.arange(count)[:, None] * 10000.0 ** -(torch.arange(0, width, 2).double() / width)
    cos, sin = (
        torch.cat([made, made], dim=-1) for made in (angle.float().cos().double(), angle.float().sin().double())
    )

    def turned(states: Tensor) -> Tensor:
        left, right = states.chunk(2, dim=-1)
        return states * cos + torch.cat([-right, left], dim=-1) * sin

    query, key, value = (
        entering @ part[f"self_attn.{name}_proj"].T + part[f"self_attn.{name}_proj.bias"] for name in "qkv"
    )
    hidden_later = torch.full((count, count), -torch.inf, dtype=torch.float64).triu(1)
    heads = [
        (turned(one) @ turned(key).T / width**0.5 + hidden_later).softmax(-1) @ value
        for one in query.split(width, dim=-1)
    ]
    stream = joined + torch.cat(heads, dim=-1) @ part["self_attn.o_proj"].T
    inner = normed(stream, "post_attention_layernorm")
    gate, up = inner @ part["mlp.gate_proj"].T, inner @ part["mlp.up_proj"].T
    stream = stream + (gate.sigmoid() * gate * up) @ part["mlp.down_proj"].T
    return normed(stream, "final_layernorm") @ tensors["lm_head.weight"].T


def test_control_the_halves_of_the_projection_are_not_interchangeable(mimo):
    batch = packed(mimo, made(mimo), (12,), width=12)[0]
    tensors = tensors_of(mimo)
    given = tensors, batch.tokens_BT[0], batch.target.hidden_BTD[3][0]
    right, swapped = hand_written(*given), hand_written(*given, swap=True)
    assert float((right - swapped).abs().max()) > 1
    left, other = tensors["model.mtp_layers.0.input_proj.weight"].chunk(2, dim=1)
    tensors["model.mtp_layers.0.input_proj.weight"] = torch.cat([other, left], dim=1)
    torch.testing.assert_close(hand_written(*given, swap=True), right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("field", ["hidden_first", "fed_back", "zero_first"])
def test_each_detail_of_a_layout_changes_the_logits(field, target):
    drafter = made(target)
    batch, _ = packed(target, drafter, (9,), width=9)
    with torch.no_grad():
        before = drafter(replace(batch, num_depths=2))
        flipped = {"before_norm": "after_norm", "after_norm": "before_norm", True: False, False: True}
        drafter.config[field] = flipped[drafter.config[field]]
        after = drafter(replace(batch, num_depths=2))
        moved = [float((before.logits_BTV(d) - after.logits_BTV(d))[0, :6].abs().max()) for d in (1, 2)]
    assert moved[1] > 1e-3
    assert (moved[0] > 1e-3) == (field != "fed_back"), "the first step reads no fed-back state"


def test_layouts_are_run_as_their_engines_run_them(mimo, deepseek):
    assert (MIMO.feature, MIMO.fed_back, MIMO.hidden_first, MIMO.zero_first) == (
        "before_norm",
        "after_norm",
        True,
        True,
    )
    assert (DEEPSEEK.feature, DEEPSEEK.fed_back, DEEPSEEK.hidden_first, DEEPSEEK.zero_first) == (
        "after_norm",
        "after_norm",
        False,
        True,
    )
    assert layout_named("deepseek", "transformers") == replace(DEEPSEEK, zero_first=False)
    # The state before the final norm, and the one after it.
    for target, final in ((mimo, False), (deepseek, True)):
        assert made(target).needs().final == final


def test_only_the_first_embedding_of_a_document_is_zeroed(mimo):
    drafter = made(mimo)
    tokens_BT, positions_BT = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 1]])
    plain, found = drafter.embed(tokens_BT), drafter.embed_at(tokens_BT, positions_BT)
    assert torch.equal(found[0, 1::2], plain[0, 1::2])
    assert not found[0, 0::2].any()


# ---------------------------------------------------------------- own tokens


def counting(target: Any) -> Any:
    """Return a drafter that always predicts the token after the embedded one, so that it is right on counting texts."""
    drafter = made(target, feed="own", num_steps=3)
    width = drafter.fc.out_features
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            parameter.fill_(float("norm" in name))
        drafter.fc.weight[:, width:].copy_(torch.eye(width))
        embedding = target.model.get_input_embeddings().weight
        head = target.model.get_output_embeddings().weight
        # The head's row of a token is the normed embedding of the one before it: its own inner product is the largest.
        rows = embedding / embedding.norm(dim=-1, keepdim=True).clamp_min(1e-9)
        head.copy_(rows.roll(1, dims=0))
    return drafter


def own_and_data(drafter: Any, target: Any, text: list[int]) -> list[Tensor]:
    batch, _ = pack([Record("", text, [True] * len(text))], width=len(text), weight_of_step=1.0)
    batch = replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs()))
    found = []
    for feed in ("own", "data"):
        drafter.own["feed"] = feed
        drafted = drafter.train()(batch)
        found.append(torch.cat([drafted.states_BTD[d][:, 1 : len(text) - 1 - d] for d in (1, 2, 3)], dim=1))
    return found


def test_own_tokens_of_a_drafter_that_is_always_right_are_the_datas(tmp_path):
    target = loaded(mimo_folder(tmp_path / "target"))
    own, data = own_and_data(counting(target), target, list(range(20, 40)))
    assert torch.equal(own, data)


def test_control_own_tokens_of_a_drafter_that_is_wrong_are_not(tmp_path):
    target = loaded(mimo_folder(tmp_path / "target"))
    own, data = own_and_data(counting(target), target, list(range(40, 20, -1)))
    assert float((own - data).detach().abs().max()) > 0.1


def test_evaluation_embeds_the_datas_tokens_whatever_training_does(mimo):
    batch, _ = packed(mimo, made(mimo), (9,), width=9)
    one, other = (made(mimo, feed=feed)(batch).states_BTD for feed in ("own", "data"))
    assert all(torch.equal(one[d], other[d]) for d in one)


# ---------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def learned_of(mimo: Any, deepseek: Any) -> dict[str, Any]:
    """Drafters that are right for some tokens, by the name of their layout."""
    return {"mimo": learned(mimo), "deepseek": learned(deepseek)}


@pytest.fixture(params=["mimo", "deepseek"])
def both(request: pytest.FixtureRequest, learned_of: dict[str, Any]) -> tuple[Any, Any]:
    """A target, and a trained drafter for it."""
    return request.getfixturevalue(request.param), learned_of[request.param]


def learned(target: Any) -> Any:
    digest, drafter = target.weights_digest(), made(target).train()
    texts = [[*prompt.tokens, *greedy(target, prompt, 16)] for prompt in PROMPTS[:2]]
    batch, _ = pack(
        [Record(str(i), text, [True] * len(text)) for i, text in enumerate(texts)], width=50, weight_of_step=1.0
    )
    batch = replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs()))
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        batch_loss(drafter, CrossEntropy(CrossEntropySettings()), batch, vocab_size=target.vocab_size).total.backward()
        optimizer.step()
    assert target.weights_digest() == digest, "training changes no weight of the target"
    return drafter.eval()


def test_greedy_output_is_the_targets_own(both):
    target, drafter = both
    found = decode(target, drafter.proposer(target), prompts=PROMPTS[:2], new=16, stop_tokens=())
    assert [one.tokens for one in found] == [greedy(target, prompt, 16) for prompt in PROMPTS[:2]]
    assert sum(len(one.rounds) for one in found) < 28, "tokens are accepted"


def test_replay_of_the_training_rows_counts_the_rounds_of_the_loop(both):
    target, drafter = both
    differences = rounds_of_replay(target, drafter, PROMPTS[:2], temperature=0.0, num_draft_tokens=[3])[0]
    assert differences.abs().max() < 1e-9


@pytest.mark.long
@pytest.mark.parametrize("draft", ["sampled", slow("greedy")])
def test_sampled_output_has_the_targets_distribution(draft, tmp_path):
    small = loaded(
        mimo_folder(tmp_path / "target", vocab_size=8, num_hidden_layers=1, hidden_size=16, initializer_range=0.5)
    )
    drafter = made(small)
    drafter.draft = draft
    assert chi_square(small.model, drafter.proposer(small), temperature=1.0, samples=800, target=small) > 1e-3


# ---------------------------------------------------------------- refusals


def test_a_target_without_such_a_layer_is_refused_unless_a_random_one_is_asked_for(save_llama):
    target = loaded(save_llama())
    with pytest.raises(CheckpointError) as refused:
        made(target)
    assert "looked for model.mtp_layers.0.input_proj.weight (mimo) and model.layers.2.eh_proj.weight" in str(
        refused.value
    )
    assert made(target, init="random").config["layout"] == "deepseek"


def test_a_target_that_was_not_loaded_from_a_folder_is_refused():
    with pytest.raises(CheckpointError, match="was not loaded from one"):
        made(eagle_target())


def test_several_layers_and_damaged_ones_are_refused_by_name(tmp_path):
    folder = mimo_folder(tmp_path / "target")
    target = loaded(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.mtp_layers.1.input_proj.weight": torch.zeros(64, 128)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="several next-token-prediction layers"):
        made(target)
    del tensors["model.mtp_layers.0.hidden_layernorm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"hidden_norm\.weight: missing"):
        made(target)


def test_a_layer_that_is_not_computed_here_is_refused_by_field(tmp_path):
    target = loaded(mimo_folder(tmp_path / "target"))
    target.model.config.hidden_act = "gelu"
    with pytest.raises(CheckpointError, match="hidden_act is gelu, must be silu"):
        made(target)


def test_parameters_are_counted(mimo):
    """2 D^2, the layer (with Qwen2's biases), two norms in it and three around it."""
    width, inner, heads, keys, size = 64, 96, 2, 1, 32
    attention = width * size * (2 * heads + 2 * keys) + size * (heads + 2 * keys)
    assert sum(p.numel() for p in made(mimo).parameters()) == 2 * width**2 + attention + 3 * width * inner + 5 * width


def test_what_is_trained_is_the_layer_alone(mimo, learned_of):
    drafter, before = learned_of["mimo"], made(mimo)
    moved = {
        name for name, tensor in drafter.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert moved == set(before.state_dict())
    assert not any("embed_tokens" in name or "lm_head" in name for name in moved)
