"""A plain Llama as decoding runs it gives the module's logits: chains, trees, batches with drops, caches that grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from drafttrain.core.generations import ForwardEvent
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt
from drafttrain.drafters import decoding_layer, keys_and_values
from drafttrain.drafters.causal_lm.decoding import DecodingLM, decoding_lm, is_plain
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.drafters.decoding_layer import TurnTable
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.training.step_cost import Counted
from tests.eval.decoding import decode, noisy, small_target

ROUNDS = [([2, 2, 2], [1, 2, 0]), ([1, 3, 1], [1, 0, 1]), ([0, 4, 1], [0, 4, 1]), ([1, 1, 1], [1, 1, 1])]
"""By round: new tokens of each sequence, and how many of them are kept. After the second round one sequence is dropped."""
TREE = [-1, -1, 0, 0, 1, 2]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows in nearly every call."""
    monkeypatch.setattr(keys_and_values, "COLUMNS_AT_ONCE", 2)


def model(kind: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    config, made = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    of_kind = made(config(**(sizes | heads | {"tie_word_embeddings": False} | options)))
    for name, parameter in of_kind.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            nn.init.normal_(parameter, 1.0, 0.3)
    return of_kind.to(dtype).eval()


def texts(sizes: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(50, (size,), generator=generator).tolist() for size in sizes]


class Comparison:
    """Reads the same tokens with `DecodingLM` and with `CachedLM`."""

    def __init__(self, model: Any, prompts: list[int]) -> None:
        self.reports: list[list[ForwardEvent]] = [[], []]
        self.both: list[Any] = [
            kind(model, name="drafter", listener=report.append)
            for kind, report in zip((DecodingLM, CachedLM), self.reports, strict=True)
        ]
        self.worst = 0.0
        for one in self.both:
            one.begin(texts(prompts, 0))

    def read(self, tokens: list[list[int]], **options: Any) -> None:
        needs = TargetNeeds(logits=True, final=True)
        found, wanted = (one.forward(tokens, needs=needs, **options) for one in self.both)
        for row, ours, theirs in zip(tokens, found, wanted, strict=True):
            for name in ("logits_BTV", "final_BTD") if row else ():
                a, b = (getattr(one, name).double() for one in (ours, theirs))
                assert a.shape == b.shape
                self.worst = max(self.worst, float((a - b).abs().max() / b.abs().max()))

    def each(self, name: str, given: Any) -> None:
        for one in self.both:
            getattr(one, name)(given)
        assert self.both[0].lengths == self.both[1].lengths


@torch.no_grad()
def difference(model: Any, *, prompts: list[int] | None = None) -> float:
    """Return the largest difference of logits and final states, relative to the largest one of a call."""
    prompts = prompts or [5, 9, 0]
    compared = Comparison(model, prompts)
    live = list(range(len(prompts)))
    for number, (sizes, kept) in enumerate(ROUNDS):
        compared.read(texts([sizes[i] for i in live], number))
        compared.read(texts([min(sizes[i], 1) for i in live], 10 + number))
        compared.each("keep", [range(kept[i]) for i in live])
        if number == 1 and len(live) == 3:
            live = [0, 2]
            compared.each("drop", live)
    tree = texts([len(TREE)] * len(live), 20)
    compared.read(tree, parents=[TREE] * len(live))
    compared.each("keep", [[] for _ in live])
    compared.read(texts([1] * len(live), 21))
    assert [_counts(event) for event in compared.reports[0]] == [_counts(event) for event in compared.reports[1]]
    return compared.worst


def _counts(event: ForwardEvent) -> dict[str, Any]:
    return {name: value for name, value in vars(event).items() if name != "span"}


@pytest.mark.parametrize("prompts", [[7], [5, 9, 0], [40, 70, 0]])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_decoding_gives_the_logits_of_the_module(kind: str, options: Any, prompts: list[int]) -> None:
    assert difference(model(kind, **options), prompts=prompts) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_differ_by_rounding(dtype: torch.dtype) -> None:
    assert difference(model(dtype=dtype, initializer_range=0.1)) < TOLERANCE[dtype]


def test_a_token_at_the_position_before_its_own_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    at = TurnTable.at
    late = lambda self, positions, **options: at(self, (positions - positions % 3 // 2).clamp(min=0), **options)  # noqa: E731
    monkeypatch.setattr(TurnTable, "at", late)
    assert difference(model()) > 1e-4


def test_a_token_that_attends_to_rejected_ones_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodingLM, "_allowed", lambda self, parents, width: None)
    assert difference(model()) > 1e-4


def test_a_rejected_token_that_stays_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = DecodingLM.keep

    def late(self: Any, nodes: Any) -> None:
        keep(self, nodes)
        for layer in self._layers:
            layer.columns._states[0][:, :, max(self.kept) - 1] = 1.0

    monkeypatch.setattr(DecodingLM, "keep", late)
    assert difference(model(), prompts=[7]) > 1e-4


def test_norms_of_queries_and_keys_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decoding_layer.DecodingAttention.__init__

    def without(self: Any, *given: Any, **options: Any) -> None:
        made(self, *given, **options)
        self._norms = []

    monkeypatch.setattr(decoding_layer.DecodingAttention, "__init__", without)
    assert difference(model("qwen3")) > 1e-4


def _hooked(model: Any) -> Any:
    model.model.layers[0].register_forward_hook(lambda *given: None)
    return model


def _compiled(model: Any) -> Any:
    block = model.model.layers[0]
    block.__dict__["forward"] = block.forward
    return model


def _adapted(model: Any) -> Any:
    class Wider(nn.Linear):
        """As an adapter replaces a layer."""

    model.model.layers[0].self_attn.q_proj.__class__ = Wider
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: model(hidden_act="gelu"),
        lambda: model(attn_implementation="eager"),
        lambda: model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        lambda: model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0),
        lambda: _hooked(model()),
        lambda: _compiled(model()),
        lambda: _adapted(model()),
    ],
)
def test_anything_else_stays_with_transformers(other: Any) -> None:
    assert is_plain(model())
    assert isinstance(decoding_lm(model()), DecodingLM)
    assert not is_plain(other())
    assert isinstance(decoding_lm(other()), CachedLM)


@pytest.mark.parametrize("policy", [FixedLength(), TreeLength(TreeSettings(6, depth=3, width=2))])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_proposals_are_those_of_the_module(policy: Any, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    target = small_target()
    found = []
    for plain in (True, False):
        monkeypatch.setattr("drafttrain.drafters.causal_lm.decoding.is_plain", lambda model, plain=plain: plain)
        proposer = ChainProposer(noisy(target.model, 0.05), target_vocab_size=8)
        assert isinstance(proposer._lm, DecodingLM if plain else CachedLM)
        prompts = [Prompt(str(i), list(range(1, 2 + i))) for i in range(4)]
        found.append(
            decode(target, proposer, prompts=prompts, new=24, temperature=temperature, policy=policy, stop_tokens=(3,))
        )
    assert [(one.tokens, one.rounds) for one in found[0]] == [(one.tokens, one.rounds) for one in found[1]]


def test_the_mask_of_a_long_prompt_is_not_made() -> None:
    """It would have a number and a boolean for each pair of tokens, more than everything else."""
    size, drafter = 1500, DecodingLM(model(dtype=torch.float32, max_position_embeddings=2048), name="drafter")
    with Counted() as counted:
        drafter.begin(texts([size], 0))
    assert counted.peak < 5 * size**2 / 2
