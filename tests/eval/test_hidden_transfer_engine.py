"""Hidden Transfer in the loop: greedy identity, output distribution, decoding equals training, replay, ledger."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.hidden_transfer import proposer as transfer_proposer
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target, rows_beside
from drafttrain.target_model.cached_lm import CachedLM
from tests.conftest import byte_tokenizer
from tests.drafters.eagle_models import eagle_target
from tests.drafters.hidden_transfer_models import transfer
from tests.eval.decoding import chi_square, decode, greedy
from tests.eval.test_dflash_engine import Watching
from tests.eval.test_eagle_engine import Tree
from tests.marks import slow

PROMPTS = [Prompt(str(i), list(range(1 + i, 2 + i + size))) for i, size in enumerate((0, 5, 11))]
"""One prompt has a single token: there is no state of it yet."""
NEW = 16
CHAIN, TREE = FixedLength(FixedLengthSettings(3)), Tree(10, 3, 3)


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


@functools.cache
def written(target: Target) -> tuple[tuple[int, ...], ...]:
    """Return the target's text after each prompt."""
    return tuple(tuple(greedy(target, prompt, NEW)) for prompt in PROMPTS)


@functools.cache
def trained_briefly(target: Target, draft_in: str = "verifying_call") -> Any:
    """Return a drafter that is often right: trained briefly on the target's text after the prompts."""
    drafter = transfer(target, layers=[2, 3, 3], train_steps="together", draft_in=draft_in).train()
    optimizer = torch.optim.Adam(drafter.parameters(), lr=2e-2)
    texts = [[*prompt.tokens, *new] for prompt, new in zip(PROMPTS, written(target), strict=True)]
    batch, _ = pack([Record("", text, [True] * len(text)) for text in texts], width=40, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
    loss = losses.build(losses.entry("forward_kl").settings())
    for _ in range(30):
        optimizer.zero_grad()
        batch_loss(drafter, loss, batch, vocab_size=257).total.backward()
        optimizer.step()
    return drafter.eval()


def decoded(target: Target, drafter: Any, policy: Any = CHAIN, **options: Any) -> Any:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "new": NEW, "stop_tokens": ()} | options
    return decode(target, drafter.proposer(target, arguments.get("listener")), policy=policy, **arguments)


@pytest.mark.parametrize(
    ("policy", "draft_in"), [(CHAIN, "verifying_call"), (TREE, "verifying_call"), slow(CHAIN, "own_pass")]
)
def test_greedy_output_is_the_targets_own_together_and_alone(target, policy, draft_in):
    """With low and with high acceptance; in a batch every prompt has the same rounds as alone."""
    unskilled = decoded(target, transfer(target), policy, new=6)
    assert [g.tokens for g in unskilled] == [list(text[:6]) for text in written(target)]
    drafter = trained_briefly(target, draft_in)
    together = decoded(target, drafter, policy)
    assert [g.tokens for g in together] == [list(text) for text in written(target)]
    alone = [decoded(target, drafter, policy, prompts=[prompt])[0] for prompt in PROMPTS]
    assert [g.rounds for g in together] == [g.rounds for g in alone]
    accepted = [sum(one.num_accepted for g in found for one in g.rounds) for found in (unskilled, together)]
    assert accepted[1] >= NEW // 2 > accepted[0]


def drafted_logits(target: Target, drafter: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logits of decoding, round by round; those of training's forward over the final text at the same rows)."""
    policy = Watching(3)
    (found,) = decoded(target, drafter, policy, prompts=PROMPTS[2:])
    text = torch.tensor([[*found.prompt_tokens, *found.tokens]])
    batch, _ = pack([Record("", text[0].tolist(), [True] * text.shape[1])], width=text.shape[1], weight_of_step=1.0)
    batch = replace(batch, target=target.read(text, batch.positions_BT, drafter.needs()))
    with torch.no_grad():
        drafted = drafter(batch)
        trained = torch.stack([drafted.logits_BTV(depth)[0] for depth in sorted(drafted.states_BTD)], dim=1)
    row, wanted = len(found.prompt_tokens) - 2, []
    for one in found.rounds:
        wanted += list(trained[row, : one.num_draft_tokens])
        row += one.num_accepted + 1
    return torch.stack(policy.seen), torch.stack(wanted)


@pytest.mark.parametrize("draft_in", ["verifying_call", "own_pass"])
def test_decoding_computes_what_training_does(target, draft_in):
    ours, wanted = drafted_logits(target, trained_briefly(target, draft_in))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)


def test_control_the_state_of_another_accepted_token_breaks_the_identity(target, monkeypatch):
    first = lambda output: {block: states[0, 0] for block, states in output.hidden_BTD.items() if states.shape[1]}  # noqa: E731
    monkeypatch.setattr(transfer_proposer, "_last", first)
    ours, wanted = drafted_logits(target, trained_briefly(target, "own_pass"))
    assert float((ours - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_greedy_replay_takes_the_rounds_of_the_loop(target, num_draft_tokens):
    drafter = trained_briefly(target)
    found = decoded(target, drafter, FixedLength(FixedLengthSettings(num_draft_tokens)), prompts=PROMPTS[1:])
    texts = [Text(g.id, list(g.prompt_tokens), list(g.tokens)) for g in found]
    rows = replay_rows(target, drafter, texts, Sampling())
    assert [expected_rounds(row, num_draft_tokens) for row in rows] == pytest.approx([len(g.rounds) for g in found])
    # The control: another draft length does not agree.
    wrong = [expected_rounds(row, 4 - num_draft_tokens) for row in rows]
    assert wrong != pytest.approx([len(g.rounds) for g in found])


def shifted(row: int, states_MD: torch.Tensor, *, drafter: Any) -> torch.Tensor:
    """The wrong variant: each chain of rows is made of another node's state."""
    return drafter.pseudo(row, states_MD.roll(1, dims=0))


def test_control_rows_of_another_node_break_the_identity(target, monkeypatch):
    drafter = trained_briefly(target)
    monkeypatch.setattr(
        transfer_proposer.HiddenTransferProposer, "entering", lambda _, *given: shifted(*given, drafter=drafter)
    )
    ours, wanted = drafted_logits(target, drafter)
    assert float((ours[:3] - wanted[:3]).abs().max()) < 1e-10  # the first round has a pass of its own
    assert float((ours - wanted).abs().max()) > 1e-2


def with_and_without_rows(target: Target, drafter: Any) -> float:
    """Return the largest difference that the rows make to logits and states of a tree's nodes, of two sequences."""
    prompts, nodes, parents = [[5, 6, 7], [8, 9]], [[3, 4, 5, 6], [7, 8]], [[-1, 0, 0, 1], [-1, 0]]
    needs = TargetNeeds(logits=True, hidden=(2,), final=True)
    found = []
    for rows in (False, True):
        lm = CachedLM(target.model, name="target")
        lm.begin(prompts)
        if rows:
            drafter.proposer(target).share(lm)
        seen = lm.forward(nodes, parents=parents, needs=needs)
        lm.keep([[0, 2], [0]])
        found.append([torch.cat([one.logits_BTV[0], one.final_BTD[0], one.hidden_BTD[2][0]], dim=-1) for one in seen])
        found[-1].append(lm.step([1, 2]))
    return max(float((one - other).abs().max()) for one, other in zip(*found, strict=True))


def test_rows_of_the_verifying_call_change_nothing_at_its_nodes_nor_after_them(target, monkeypatch):
    drafter = trained_briefly(target)
    assert with_and_without_rows(target, drafter) < 1e-10
    # The control: rows that are put into the places of nodes.
    entering = rows_beside._entering
    monkeypatch.setattr(
        rows_beside, "_entering", lambda model, added, sizes, *, width: entering(model, added, [0, 1], width=width)
    )
    assert with_and_without_rows(target, drafter) > 1e-3


def test_drafting_in_the_verifying_call_has_the_rows_of_every_node_in_it(target):
    drafter, ledger = trained_briefly(target), Ledger()
    (generation,) = decoded(target, drafter, prompts=PROMPTS[2:], listener=ledger.append)
    assert ledger.calls("target") == len(generation.rounds)
    assert ledger.calls("target's last blocks") == 2, "the first round alone has a pass of its own"
    nodes = [1 + one.num_draft_tokens for one in generation.rounds]
    assert [one.shape.num_tokens for one in ledger.rounds("target")] == [4 * count for count in nodes]
    assert [one.shape.head_rows for one in ledger.rounds("target")] == [4 * count for count in nodes]


WINDOW = {
    "layer_types": ["sliding_attention"] * 4,
    "sliding_window": 32,
    "use_sliding_window": True,
    "max_window_layers": 0,
}


@pytest.mark.parametrize("limited", ["window", "positions"])
def test_where_rows_have_no_room_in_the_verifying_call_they_have_a_pass_of_their_own(limited):
    """Texts that reach the sliding window, or the last position embedding, are decoded to their end."""
    prompt, new = PROMPTS[2], 24
    sizes = {"vocab_size": 257, "initializer_range": 0.2}
    if limited == "window":
        small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
        model: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, **small, **WINDOW, intermediate_size=64))
    else:
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=4, n_head=2, n_positions=12 + new))
    target = Target(model.double().eval(), byte_tokenizer(), name="tiny", fingerprint="")
    assert transfer(target).replayable == (limited == "positions")
    ledger = Ledger()
    (found,) = decoded(target, transfer(target), prompts=[prompt], new=new, listener=ledger.append)
    assert found.tokens == greedy(target, prompt, new)
    rows = [
        one.shape.num_tokens - 1 - of.num_draft_tokens
        for one, of in zip(ledger.rounds("target"), found.rounds, strict=True)
    ]
    assert rows[0] > 0
    assert rows[-1] == 0
    # The first round has a pass of its own, in two parts; so have later ones beyond the window.
    assert (ledger.calls("target's last blocks") > 2) == (limited == "window")


def test_rows_longer_than_the_window_are_not_trained():
    """One mask for all layers has no window; control: rows within it are trained."""
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **WINDOW, num_key_value_heads=1, intermediate_size=64))
    target = Target(model.double().eval(), byte_tokenizer(), name="tiny", fingerprint="")
    drafter = transfer(target).train()
    for width in (32, 33):
        batch, _ = pack([Record("", [1] * width, [True] * width)], width=width, weight_of_step=1.0)
        batch = replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs()))
        if width == 32:
            drafter(batch)
        else:
            with pytest.raises(CheckpointError, match=r"data.max_length: rows of 33 .*sliding window of 32"):
                drafter(batch)


def test_every_pass_of_its_own_is_in_the_ledger(target):
    """The blocks that pseudo states pass, in two parts, and the maps; bytes are counted by hand."""
    drafter, ledger = trained_briefly(target, "own_pass"), Ledger()
    (generation,) = decoded(target, drafter, prompts=PROMPTS[2:], listener=ledger.append)
    drafting = sum(one.num_draft_tokens > 0 for one in generation.rounds)
    passes = ledger.rounds("target's last blocks")
    assert len(passes) == ledger.calls("drafter") == 2 * drafting
    assert ledger.calls("target") == len(generation.rounds)
    first, second = passes[:2]
    cached = len(PROMPTS[2].tokens) - 1
    assert [(one.shape.num_tokens, one.shape.num_layers, one.shape.context) for one in (first, second)] == [
        *((1, 1, cached), (3, 1, cached))
    ]
    size = lambda *modules: sum(8 * p.numel() for m in modules for p in m.parameters())  # noqa: E731
    inner, column, row = target.model.model, 2 * 16 * 8, 32 * 8
    assert first.bytes_read == size(inner.layers[2]) + column * (cached + 1) + row
    last = size(inner.layers[3], inner.norm, target.model.lm_head)
    assert second.bytes_read == last + column * (cached + 3) + 3 * row
    assert [one.bytes_read for one in ledger.rounds("drafter")[:2]] == [
        size(drafter.maps[0]),
        2 * size(drafter.maps[0]),
    ]


@pytest.mark.parametrize("policy", [slow(None), Tree(5, 2, 3)])
def test_the_output_has_the_targets_distribution(policy):
    target = eagle_target(vocab_size=8, num_layers=3, hidden_size=16)
    drafter = transfer(target, layers=[1, 2])
    assert chi_square(target.model, drafter.proposer(target), 1.0, samples=800, target=target, policy=policy) > 1e-3
