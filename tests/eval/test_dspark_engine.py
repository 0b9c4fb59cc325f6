"""DSpark in the loop: greedy identity, the walk against training, output distribution with and without a cut, trees, replay."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.probability import sampling_probs
from drafttrain.core.proposals import Context, DraftStep, NodeKind, Proposal, chain
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.dspark.proposer import DSparkProposer
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.dyspec import DySpec, DySpecSettings
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.length.predicted_acceptance import PredictedAcceptance, PredictedAcceptanceSettings
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from tests.drafters.block_models import block_drafter, block_target
from tests.drafters.test_dspark import PAPER, all_logits
from tests.eval.decoding import chi_square, decode, greedy
from tests.eval.test_eagle_engine import Tree
from tests.marks import slow

PROMPTS = [Prompt(str(i), list(range(1 + i, 2 + i + size))) for i, size in enumerate((0, 5, 11))]
NEW = 24
DSPARK: dict[str, Any] = {"sample_from_anchor": True, "markov_rank": 6, "block_size": 4}
CHAIN, TREE = FixedLength(FixedLengthSettings(4)), Tree(12, 3, 3)
CUT = PredictedAcceptance(PredictedAcceptanceSettings(threshold=0.5))
ARMS = [
    slow("vanilla", CHAIN),
    ("gated", CHAIN),
    slow("rnn", CHAIN),
    ("vanilla", CUT),
    slow("vanilla", TREE),
    ("rnn", TREE),
]


@pytest.fixture(scope="module")
def target() -> Any:
    return block_target()


@functools.cache
def written(target: Target) -> tuple[tuple[int, ...], ...]:
    """Return the target's text after each prompt."""
    return tuple(tuple(greedy(target, prompt, NEW)) for prompt in PROMPTS)


@functools.cache
def trained_briefly(target: Target, head: str, vocabulary: int | None = None) -> Any:
    """Return a drafter that is often right: trained briefly on the target's text after the prompts, with the published loss."""
    settings = DSPARK | {"markov_head": head, "draft_vocab_size": vocabulary, "anchors": 64}
    drafter = block_drafter(target, "dspark", **settings)
    drafter.fit_vocabulary(lambda: np.bincount([token for text in written(target) for token in text], minlength=257))
    drafter.train()
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    texts = [[*prompt.tokens, *new] for prompt, new in zip(PROMPTS, written(target), strict=True)]
    batch, _ = pack([Record("", text, [True] * len(text)) for text in texts], width=40, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
    for _ in range(40):
        optimizer.zero_grad()
        batch_loss(drafter, losses.build(PAPER), batch, vocab_size=257).total.backward()
        optimizer.step()
    return drafter.eval()


def decoded(target: Target, drafter: Any, policy: Any = CHAIN, **options: Any) -> Any:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "new": NEW, "stop_tokens": ()} | options
    proposer = drafter.proposer(target, arguments.pop("listener", None))
    return decode(target, proposer, policy=policy, **arguments)


@pytest.mark.parametrize(("head", "policy"), ARMS)
def test_greedy_output_is_the_targets_own_together_and_alone(target, head, policy):
    """In a batch every prompt has the same rounds as alone, also where chains end at different places."""
    drafter = trained_briefly(target, head)
    together = decoded(target, drafter, policy)
    assert [g.tokens for g in together] == [list(text) for text in written(target)]
    alone = [decoded(target, drafter, policy, prompts=[prompt])[0] for prompt in PROMPTS]
    assert [g.rounds for g in together] == [g.rounds for g in alone]
    assert sum(one.num_accepted for g in together for one in g.rounds) >= NEW // 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_samples_what_each_prompt_samples_alone(target, temperature):
    drafter = trained_briefly(target, "rnn", 200)
    together = decoded(target, drafter, CUT, temperature=temperature)
    alone = [decoded(target, drafter, CUT, prompts=[one], temperature=temperature)[0] for one in PROMPTS]
    assert [g.tokens for g in together] == [g.tokens for g in alone]


class Watching(FixedLength):
    """Stores every draft step that it is asked for."""

    def __init__(self) -> None:
        super().__init__(FixedLengthSettings(4))
        self.steps: list[DraftStep] = []

    def more(self, step: DraftStep) -> bool:
        self.steps.append(step)
        return super().more(step)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_the_walk_has_the_logits_and_predictions_of_training(target, head):
    """Up to the first rejected token of a round, whose tokens before are those of the final text."""
    drafter, policy = trained_briefly(target, head), Watching()
    (found,) = decoded(target, drafter, policy, prompts=PROMPTS[2:])
    text = [*found.prompt_tokens, *found.tokens]
    batch, _ = pack([Record("", text, [True] * len(text))], width=len(text), weight_of_step=1.0)
    batch = replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs()))
    with torch.no_grad():
        trained = drafter(batch)
    place, first, late = len(found.prompt_tokens) - 1, 0, 0
    for one in found.rounds:
        for depth in range(1, min(one.num_accepted + 1, one.num_draft_tokens) + 1):
            step = policy.steps[first + depth - 1]
            wanted_V = trained.logits_BTV(depth)[0, place]
            torch.testing.assert_close(step.logits_V, wanted_V[: len(step.logits_V)], rtol=0, atol=1e-10)
            torch.testing.assert_close(step.confidence, trained.confidence_BT[depth][0, place], rtol=0, atol=1e-10)
            torch.testing.assert_close(step.hidden_D, trained.states_BTD[depth][0, place], rtol=0, atol=1e-10)
            late += depth > 1
        place, first = place + one.num_accepted + 1, first + one.num_draft_tokens
    assert late > 5


def test_a_chain_is_drawn_from_rows_that_it_hands_over(target):
    """At temperature 0.7 with top-k: rows of q are those that the tokens were drawn from; at 0, argmax."""
    drafter, policy, found = trained_briefly(target, "gated", 200), Watching(), []

    class Watched(DSparkProposer):
        def propose(self, *arguments: Any) -> list[Proposal]:
            found.append((arguments[1], proposals := super().propose(*arguments)))
            return proposals

    sizes: dict[str, Any] = {"vocab_size": 257, "num_tokens": 257, "device": target.device}
    sampling = Sampling(temperature=0.7, top_k=20)
    proposer = Watched(drafter, **sizes)
    context = Context("a", [3, 4, 5, 6], 4)
    seen = target.read(torch.tensor([[3, 4, 5]]), torch.arange(3)[None], drafter.needs())
    for each in (sampling, Sampling()):
        policy.steps.clear()
        proposer.begin([context], [seen])
        (made,) = proposer.propose([policy.budget(context)], each, [torch.Generator().manual_seed(1)], policy.more)
        assert made.num_draft_tokens == 4
        logits_KR = torch.stack([step.logits_V for step in policy.steps])
        if each.temperature:
            assert set(made.kinds_N[1:].tolist()) == {NodeKind.SAMPLED.value}
            rows_KV = torch.zeros(4, 257, dtype=torch.float64)
            rows_KV[:, drafter.vocabulary] = sampling_probs(logits_KR, sampling)
            torch.testing.assert_close(made.q_rows_RV, rows_KV)
        else:
            assert set(made.kinds_N[1:].tolist()) == {NodeKind.FIXED.value}
            assert made.tokens_N[1:].tolist() == drafter.vocabulary[logits_KR.argmax(-1)].tolist()


@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_the_children_of_a_node_depend_on_its_token(target, head):
    """In a tree, nodes of one level have different distributions: those of a chain with their tokens."""
    drafter, policy = trained_briefly(target, head), Tree(12, 3, 3)
    steps: list[DraftStep] = []
    proposer = drafter.proposer(target)
    tokens = [3, 4, 5, 6]
    context = Context("a", tokens, 4)
    seen = target.read(torch.tensor([[3, 4, 5]]), torch.arange(3)[None], drafter.needs())
    proposer.begin([context], [seen])
    proposer.propose([policy.budget(context)], Sampling(), [torch.Generator()], lambda step: steps.append(step) or True)
    second = [step for step in steps if step.depth == 2]
    assert len({step.token for step in second}) == 3
    for step in second:
        wanted_V = all_logits(target, drafter, [*tokens, step.token, 0, 0, 0])[3, 1]
        torch.testing.assert_close(step.logits_V, wanted_V, rtol=0, atol=1e-10)


def test_rows_of_q_of_a_heap_are_those_of_each_path_though_its_frontiers_have_several_depths(target):
    drafter, policy = trained_briefly(target, "rnn"), DySpec(DySpecSettings(40, depth=4, width=3))
    proposer, tokens = drafter.proposer(target), [3, 4, 5, 6]
    context = Context("a", tokens, 4)
    seen = target.read(torch.tensor([[3, 4, 5]]), torch.arange(3)[None], drafter.needs())
    proposer.begin([context], [seen])

    def drafted(seed: int) -> tuple[Proposal, list[int]]:
        depths: list[int] = []
        (made,) = proposer.propose(
            [policy.budget(context)],
            Sampling(1.0),
            [torch.Generator().manual_seed(seed)],
            lambda step: depths.append(step.depth) or True,
        )
        return made, depths

    made = next(made for made, depths in map(drafted, range(50)) if depths != sorted(depths))
    paths: list[list[int]] = [[]]
    for node, parent in list(enumerate(made.parents_N.tolist()))[1:]:
        paths.append([*paths[parent], int(made.tokens_N[node])])
    for path, row in zip(paths, made.q_row_N.tolist(), strict=True):
        if row >= 0:
            wanted_V = all_logits(target, drafter, [*tokens, *path, 0, 0, 0, 0])[3, len(path)].softmax(-1)
            torch.testing.assert_close(made.q_rows_RV[row], wanted_V, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
@pytest.mark.parametrize("temperature", [0.0])
def test_greedy_replay_takes_the_rounds_of_the_loop(target, num_draft_tokens, temperature):
    drafter = trained_briefly(target, "rnn")
    found = decoded(target, drafter, FixedLength(FixedLengthSettings(num_draft_tokens)))
    texts = [Text(g.id, list(g.prompt_tokens), list(g.tokens)) for g in found]
    rows = replay_rows(target, drafter, texts, Sampling(temperature), num_depths=num_draft_tokens)
    assert [expected_rounds(row, num_draft_tokens) for row in rows] == pytest.approx([len(g.rounds) for g in found])


def test_every_weight_that_a_round_reads_is_in_the_ledger(target):
    drafter, ledger = trained_briefly(target, "vanilla"), Ledger()
    decoded(target, drafter, prompts=PROMPTS[2:], listener=ledger.append)
    _, first, *_ = [event for event in ledger.events if event.model == "drafter"]
    size = lambda *parts: sum(8 * p.numel() for part in parts for p in part.parameters())  # noqa: E731
    columns = 2 * 2 * 2 * 6 * 8 * (len(PROMPTS[2].tokens) - 1)
    walk = 4 * size(drafter.markov_head.markov_w2, drafter.confidence_head)
    block = size(drafter.layers, drafter.norm) + 257 * 32 * 8 + 2 * 32 * 8
    assert first.bytes_read == block + walk + columns


# ---------------------------------------------------------------- DS6, DS7: the output distribution


@pytest.fixture(scope="module")
def small() -> Any:
    """A target with 8 tokens, and drafters with 5 of them, whose predictions differ from place to place."""
    target = block_target(vocab_size=8, num_layers=3, hidden_size=16)

    def drafter(head: str) -> Any:
        settings = DSPARK | {"taps": [1, 2], "mask_token_id": 7, "draft_vocab_size": 5, "markov_head": head}
        made = block_drafter(target, "dspark", scale=0.5, **settings)
        made.fit_vocabulary(lambda: np.array([3, 9, 0, 7, 0, 5, 4, 0]))
        with torch.no_grad():
            made.confidence_head.proj.bias.zero_()
        return made

    return target, drafter


class Lengths(PredictedAcceptance):
    """Notes how long the drafts are."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(PredictedAcceptanceSettings(**settings))
        self.lengths: list[int] = []

    def observe(self, verdict: Any) -> None:
        self.lengths.append(verdict.num_draft_tokens)


@pytest.mark.long
@pytest.mark.parametrize(
    ("of", "head"),
    [
        *((None, "vanilla"), slow(None, "gated"), slow(None, "rnn")),
        *(slow("token", "vanilla"), ("token", "gated"), slow("token", "rnn")),
        *(slow("prefix", "vanilla"), slow("prefix", "gated"), ("prefix", "rnn")),
    ],
)
def test_the_output_has_the_targets_distribution(small, head, of):
    """Without and with a cut where the predicted acceptance is low."""
    target, made = small
    policy = None if of is None else Lengths(of=of, threshold=0.5 if of == "token" else 0.3, min_tokens=0)
    assert distribution_of(target, made(head).proposer(target), policy) > 1e-3
    if policy is not None:
        assert len(set(policy.lengths)) > 1


@pytest.mark.long
def test_control_a_cut_that_reads_the_token_itself_changes_the_output(small):
    """Before the verdict: drop the last token if it is a likely one, so that what is left to judge depends on it."""
    target, made = small

    class Peeking(DSparkProposer):
        def propose(self, *arguments: Any) -> list[Proposal]:
            return [self.cut(one) for one in super().propose(*arguments)]

        def cut(self, one: Proposal) -> Proposal:
            tokens = one.tokens_N.tolist()
            kept = next((place for place in range(1, len(tokens)) if tokens[place] in (1, 3)), len(tokens))
            if kept == 1:
                return chain(tokens[:1], kind=NodeKind.FIXED)
            return chain(tokens[:kept], kind=NodeKind.SAMPLED, q_rows_RV=one.q_rows_RV[: kept - 1])

    sizes: dict[str, Any] = {"vocab_size": 8, "num_tokens": 8, "device": target.device}
    assert distribution_of(target, Peeking(made("vanilla"), **sizes), None) < 1e-3


def distribution_of(target: Target, proposer: Any, policy: Any) -> float:
    return chi_square(target.model, proposer, 1.0, samples=800, target=target, policy=policy)


def test_a_drafter_without_predictions_is_refused(target):
    drafter = block_drafter(target, "dspark", **DSPARK, confidence_head=False)
    with pytest.raises(CheckpointError, match="needs a drafter with a confidence head"):
        decoded(target, drafter, CUT)


# ---------------------------------------------------------------- DS10: what only a walk can know


def markov_target() -> Target:
    """Return a target whose next token depends on the newest one alone: its blocks add nothing."""
    target = block_target(vocab_size=8, num_layers=3, hidden_size=16)
    with torch.no_grad():
        for layer in target.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        target.model.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(1))
        target.model.get_output_embeddings().weight.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.25)
    return target


def sampled(table_VV: Tensor, generator: torch.Generator) -> list[list[int]]:
    """Return texts of twelve tokens from the target's bigram."""
    column_N = torch.randint(8, (24,), generator=generator)
    columns = [column_N]
    for _ in range(11):
        column_N = torch.multinomial(table_VV[column_N], 1, generator=generator)[:, 0]
        columns.append(column_N)
    return torch.stack(columns, dim=1).tolist()


def acceptance_after_training(target: Target, kind: str, table_VV: Tensor) -> float:
    """Return the mean acceptance rate of all depths on new texts, after training on new texts in every step."""
    settings = {"taps": [1], "num_layers": 1, "mask_token_id": 7, "sample_from_anchor": True, "block_size": 3}
    extra = {"markov_rank": 8} if kind == "dspark" else {}
    drafter = block_drafter(target, kind, **settings, **extra, anchors=64).train()
    # Slots start without an opinion of their own, which training would have to remove first.
    torch.nn.init.zeros_(drafter.norm.weight)
    loss, generator = losses.build(losses.entry("forward_kl").settings()), torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=5e-2)
    steps, rates = 120, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-2 * (1 - step / steps)
        texts = sampled(table_VV, generator)
        batch, _ = pack([Record("", text, [True] * len(text)) for text in texts], width=288, weight_of_step=1.0)
        seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
        batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
        optimizer.zero_grad()
        made = batch_loss(drafter, loss, batch, vocab_size=8, measured=step >= steps - 5)
        (made.total / len(made.loss_N)).backward()
        optimizer.step()
        if made.acceptance_N is not None:
            rates.append(float(made.acceptance_N.mean()))
    return sum(rates) / len(rates)


@pytest.mark.slow
def test_a_walk_learns_a_bigram_that_independent_slots_cannot():
    """Training's next texts were never seen, so their acceptance is held out."""
    target = markov_target()
    with torch.no_grad():
        table_VV = target.model(torch.arange(8)[:, None]).logits[:, -1].softmax(-1)
    assert acceptance_after_training(target, "dspark", table_VV) > 0.98
    # The second and third token of a block of DFlash do not know the one before them.
    assert acceptance_after_training(target, "dflash", table_VV) < 0.9
