"""HAMburger: segments partition the text, one token each is the plain target, training reads what decoding reads, verified is exact."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from drafttrain.core.altered_text import packed_alterations
from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.hamburger.embedder import SegmentEmbedder, look_back
from drafttrain.drafters.hamburger.merged_lm import MergedLM
from drafttrain.drafters.hamburger.merged_target import MergedTarget
from drafttrain.drafters.hamburger.module import Hamburger, HamburgerSettings
from drafttrain.drafters.hamburger.reading import places_of
from drafttrain.drafters.hamburger.segments import Segments, places_in_segments
from drafttrain.drafters.lora import LoraSettings
from drafttrain.drafters.tuned_target import TuningSettings
from drafttrain.eval.acceptance.confident import Confident, ConfidentSettings
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.parity import parity
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.tuned import divergence
from drafttrain.losses.ce import CrossEntropy
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target, TargetSettings
from tests.drafters.test_medusa import V, texts_of
from tests.eval.decoding import decode, greedy, small_target

SIZE = 4
LORA = LoraSettings(rank=8, alpha=16.0, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
CHAIN = FixedLength(FixedLengthSettings(SIZE))
TRUSTED = Confident(ConfidentSettings(0.0))
# Of different lengths: decoded together they are padded.
PROMPTS = [Prompt(str(i), [3 + 7 * i, 11, 2 + i, 9][: 2 + i % 3]) for i in range(4)]


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> Target:
    return Target.load(TargetSettings(model=str(tiny_folder), dtype="float64"))


def segments() -> Segments:
    """A rule that joins about half of the tokens of this target's texts."""
    return Segments(SIZE, low=4.85, ratio=0.98)


@pytest.fixture(scope="module")
def records(target: Target) -> list[Record]:
    texts = texts_of(target, 8, seed=2, new=20)
    return [
        Record(text.id, [*text.prompt, *text.new[: 20 - i]], [False] * 4 + [True] * (20 - i))
        for i, text in enumerate(texts)
    ]


def create(target: Target, **settings: Any) -> Hamburger:
    chosen = {"segment": SIZE, "num_layers": 2, "tune": TuningSettings(lora=LORA), "continue_above": 0.5} | settings
    made = Hamburger.create(HamburgerSettings(**chosen), target=target, tokenizer=target.tokenizer)
    return made.to(target.model.dtype)


def lively(target: Target, **settings: Any) -> Hamburger:
    """A drafter whose embedder is no mean any more, and whose stop head has opinions."""
    torch.manual_seed(3)
    drafter = create(target, **settings)
    with torch.no_grad():
        drafter.embedder.out_proj.weight.normal_(std=0.3)
        drafter.micro.norm.weight.fill_(4)
        for linear in drafter.micro.stop:
            if isinstance(linear, torch.nn.Linear):
                linear.weight.normal_(std=0.8)
        for adapter in drafter.weights.maps:
            adapter.up.normal_(std=0.1)
    return drafter.eval()


def batch_of(records: Sequence[Record], noted: Sequence[Any]) -> DraftBatch:
    altered = [segments().altered(record, notes, seed=0) for record, notes in zip(records, noted, strict=True)]
    labels = [sum(record.loss_mask) for record in records]
    batch, at = pack(records, width=60, weight_of_step=float(sum(labels)))
    return replace(batch, altered=packed_alterations(batch.tokens_BT, at, altered, labels))


@pytest.fixture(scope="module")
def trained(target: Target, records: list[Record]) -> Hamburger:
    torch.manual_seed(0)
    drafter = create(target)
    batch = batch_of(records, segments().of(records, target, seed=0))
    optimizer = torch.optim.Adam(drafter.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        (batch_loss(drafter, CrossEntropy(), batch, vocab_size=V).total / batch.weight_of_step).backward()
        optimizer.step()
    return drafter.eval()


class Reference:
    """p of the target that reads segments, without a cache: the whole text is read again for every token.

    It follows the definition: entries for the prompt's tokens, one for each complete segment, one for the open one.
    """

    def __init__(self, target: Target, drafter: Hamburger) -> None:
        self.model, self.drafter = target.model, drafter
        self._known: dict[tuple[Any, Any], tuple[list[list[int]], list[int]]] = {}

    @torch.no_grad()
    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Return logits_V after a text."""
        complete, open_segment = self.segments(prompt, answer)
        return self._read([*complete, *([open_segment] if open_segment else [])])[0]

    @torch.no_grad()
    def segments(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """Return (complete segments, the open one) of a text."""
        key = tuple(prompt), tuple(answer)
        if key not in self._known:
            if not answer:
                return [[token] for token in prompt], []
            complete, before = self.segments(prompt, answer[:-1])
            open_segment = [*before, answer[-1]]
            goes_on = self.goes_on(complete, open_segment)
            self._known[key] = (complete, open_segment) if goes_on else ([*complete, open_segment], [])
        return self._known[key]

    def goes_on(self, complete: Sequence[Sequence[int]], open_segment: Sequence[int]) -> bool:
        """Return whether the open segment goes on."""
        chance = torch.sigmoid(self.drafter.micro.goes_on(self.micro(complete, open_segment)[-1:])).item()
        return len(open_segment) < self.drafter.size and chance >= self.drafter.continue_above

    @torch.no_grad()
    def micro(self, complete: Sequence[Sequence[int]], open_segment: Sequence[int]) -> Tensor:
        """Return the micro decoder's states of an open segment."""
        macro_FD = torch.stack([states[0, -1] for states in self._read(complete)[1]])
        embedded_ND = self.model.get_input_embeddings()(torch.tensor(list(open_segment)))
        places = torch.arange(len(open_segment))
        return self.drafter.micro(macro_FD[None], embedded_ND, torch.zeros_like(places), places)

    def _read(self, entries: Sequence[Sequence[int]]) -> tuple[Tensor, list[Tensor]]:
        """Return (logits_V after the last entry, the tapped states)."""
        size, rows = self.drafter.size, []
        for entry in entries:
            own_ND = self.model.get_input_embeddings()(torch.tensor(list(entry)))
            rows.append(self.drafter.embedder(look_back(own_ND, size)[-1:], torch.tensor([len(entry) - 1]))[0])
        ends = torch.tensor([len(entry) for entry in entries]).cumsum(0) - 1
        seen = self.model(inputs_embeds=torch.stack(rows)[None], position_ids=ends[None], output_hidden_states=True)
        # In transformers the last of these is normed: no tap here is at the end, except for this target's last block.
        states = [*seen.hidden_states[:-1], None]
        assert all(states[tap] is not None for tap in self.drafter.taps)
        return seen.logits[0, -1], [states[tap] for tap in self.drafter.taps]


def reference_greedy(reference: Reference, prompt: Prompt, new: int) -> list[int]:
    answer: list[int] = []
    for _ in range(new):
        answer.append(int(reference.logits(prompt.tokens, answer).argmax()))
    return answer


@pytest.fixture(scope="module")
def served(target: Target) -> Iterator[tuple[Hamburger, MergedTarget, Reference]]:
    """A drafter, the target that it serves, and the slow definition of that one."""
    drafter = lively(target, features=[0, 1])
    tuned = Target(copy.deepcopy(target.model), target.tokenizer, name="copy", fingerprint="")
    assert drafter.tuned is not None
    with drafter.tuned.weights.applied(tuned.model):
        yield drafter, MergedTarget(tuned, drafter.parts), Reference(tuned, drafter)


def outputs(served: Target, proposer: Any, **options: Any) -> list[Any]:
    return decode(served, proposer, **{"prompts": PROMPTS, "policy": CHAIN, "new": 16, "stop_tokens": ()} | options)


def test_segments_partition_the_labels_and_are_short():
    """Random masks and entropies: every label is in one segment, and each further token of a segment was allowed to join."""
    draws, several, naive = random.Random(0), 0, 0
    for _ in range(300):
        count = draws.randrange(1, 24)
        mask = [draws.random() < 0.9 for _ in range(count)]
        entropies = [draws.choice([0.0, 0.01, 0.5, 2.0, 5.0]) for _ in range(count)]
        places = places_in_segments(mask, entropies, size=SIZE, low=0.05, ratio=0.3)
        starts = [place for place, own in enumerate(places) if own == 0]
        steps = [end - start for start, end in zip(starts, [*starts[1:], count], strict=True)]
        assert sum(steps) == count
        assert max(steps) <= SIZE
        for start, length in zip(starts, steps, strict=True):
            assert places[start : start + length] == list(range(length))
            assert length == 1 or (start > 0 and all(mask[start : start + length]))
            for place in range(start + 1, start + length):
                largest = max(entropies[start:place])
                assert entropies[place] < 0.05 or entropies[place] < 0.3 * largest
        several += sum(length > 1 for length in steps)
        # Control: without the limit some segments would be longer.
        naive += max(places_in_segments(mask, entropies, size=99, low=0.05, ratio=0.3)) >= SIZE
        joins_N = torch.tensor(places) > 0
        assert places_of(joins_N, SIZE).tolist() == places
    assert several > 100
    assert naive > 10


def test_the_entropies_are_those_of_the_targets_distribution(target: Target, records: list[Record]):
    """Computed plainly, text by text; texts of different lengths are read together."""
    noted = segments().of(records, target, seed=0)
    for record, notes_TC in zip(records, noted, strict=True):
        probs_TV = target.model(torch.tensor([list(record.tokens)])).logits[0].softmax(-1)
        entropies = [0.0, *(-(probs_TV * probs_TV.log()).sum(-1))[:-1].tolist()]
        assert notes_TC[:, 0].tolist() == places_in_segments(
            record.loss_mask, entropies, size=SIZE, low=4.85, ratio=0.98
        )
    assert "4 at most" in segments().summary(records, noted)
    with pytest.raises(DataError, match=r"no label joins .* drafter\.low_entropy"):
        Segments(SIZE, 0.0, 0.0).summary(records, Segments(SIZE, 0.0, 0.0).of(records, target, seed=0))


def test_segments_of_one_token_are_the_plain_target(target: Target, records: list[Record]):
    drafter = lively(target)
    batch = batch_of(records, segments().of(records, target, seed=0))
    joins_BT = torch.zeros_like(batch.loss_mask_BT)
    assert drafter.tuned is not None
    plain_BTD, _ = drafter.tuned.read(batch)
    read_BT = batch.documents_BT >= 0
    alone_BTD = drafter.read(batch, joins_BT).final_BTD
    torch.testing.assert_close(alone_BTD[read_BT], plain_BTD[read_BT], rtol=0, atol=1e-10)
    # Control: where two tokens are one segment, the target reads something else from there on.
    joins_BT[0, 6] = True
    joined_BTD = drafter.read(batch, joins_BT).final_BTD
    assert all(float(change) > 1e-3 for change in (joined_BTD - plain_BTD)[0, 6:10].detach().abs().amax(dim=-1))
    torch.testing.assert_close(joined_BTD[0, :6], plain_BTD[0, :6], rtol=0, atol=1e-10)


def test_a_merged_embedding_reads_its_segment_alone_and_in_order():
    torch.manual_seed(0)
    embedder = SegmentEmbedder(8, 2, SIZE).double()
    own_ND = torch.randn(6, 8, dtype=torch.float64)
    back_NSD, place_N = look_back(own_ND, SIZE), torch.tensor([0, 0, 1, 2, 0, 1])
    # It starts at the mean.
    torch.testing.assert_close(embedder(back_NSD, place_N)[3], own_ND[1:4].mean(0))
    torch.nn.init.normal_(embedder.out_proj.weight)
    merged_ND = embedder(back_NSD, place_N)
    assert torch.equal(merged_ND[4], own_ND[4])
    changed = embedder(look_back(torch.cat([own_ND[:1] + 9, own_ND[1:]]), SIZE), place_N)
    assert torch.equal(changed[1:], merged_ND[1:])
    swapped = embedder(look_back(own_ND[[0, 2, 1, 3, 4, 5]], SIZE), place_N)
    assert float((swapped[3] - merged_ND[3]).detach().abs().max()) > 1e-3


def test_plain_decoding_of_the_served_target_is_its_definition(served: Any):
    """Uncached, each prompt by itself; and the cache has one entry for each segment."""
    _, merged, reference = served
    found = outputs(merged, NoDraft())
    assert [one.tokens for one in found] == [reference_greedy(reference, prompt, 16) for prompt in PROMPTS]
    lm = merged.decoder()
    prompt, answer = PROMPTS[1].tokens, found[1].tokens
    lm.begin([prompt[:-1]])
    for token in [prompt[-1], *answer]:
        lm.forward([[token]])
        lm.keep([[0]])
    complete, _ = reference.segments(prompt, answer)
    assert lm.lengths == [len(complete)]
    assert len(complete) < len(prompt) + len(answer) - 3
    # Control: the tuned target that reads single tokens writes something else.
    plain = Target(merged.model, merged.tokenizer, name="single", fingerprint="")
    assert [one.tokens for one in found] != [greedy(plain, prompt, 16) for prompt in PROMPTS]


def test_verified_drafts_write_what_the_served_target_writes(served: Any):
    drafter, merged, _ = served
    plain = outputs(merged, NoDraft())
    exact = outputs(merged, drafter.proposer(merged))
    assert [one.tokens for one in exact] == [one.tokens for one in plain]
    assert parity(plain, exact, merged).lossless
    assert any(one.num_draft_tokens for each in exact for one in each.rounds)
    # Control: trusted, nothing is verified.
    trusted = outputs(merged, drafter.proposer(merged), rule=TRUSTED)
    assert [one.tokens for one in trusted] != [one.tokens for one in plain]
    assert all(one.num_accepted == one.num_draft_tokens for each in trusted for one in each.rounds)
    assert not parity(plain, trusted, merged).lossless


def test_above_one_every_token_is_a_segment_and_nothing_is_drafted(target: Target):
    drafter = lively(target, continue_above=1.01)
    assert drafter.tuned is not None
    with drafter.adapting(target) as merged:
        found = outputs(merged, drafter.proposer(merged))
        assert [one.tokens for one in found] == [greedy(target, prompt, 16) for prompt in PROMPTS]
    assert all(one.num_draft_tokens == 0 for each in found for one in each.rounds)


def sampled_pairs(merged: MergedTarget, proposer: Any, samples: int, **options: Any) -> Tensor:
    """Return how often each pair of second and third tokens was drawn."""
    prompts = [Prompt(str(i), [1, 2, 3]) for i in range(samples)]
    found = outputs(merged, proposer, prompts=prompts, temperature=1.0, new=3, **options)
    counts = torch.zeros(64, dtype=torch.float64)
    for one in found:
        counts[8 * one.tokens[1] + one.tokens[2]] += 1
    return counts


def test_sampled_output_has_the_served_distribution():
    """Enumerated by the definition. Segments of several tokens are drafted, rejected and merged on the way."""
    small = small_target()
    torch.manual_seed(1)
    drafter = lively(small, features=[0])
    assert drafter.tuned is not None
    with drafter.adapting(small) as merged, torch.no_grad():
        assert isinstance(merged, MergedTarget)
        reference = Reference(small, drafter)
        wanted = torch.zeros(64, dtype=torch.float64)
        first_V = reference.logits([1, 2, 3], []).softmax(-1)
        for a in range(8):
            second_V = reference.logits([1, 2, 3], [a]).softmax(-1)
            for b in range(8):
                third_V = reference.logits([1, 2, 3], [a, b]).softmax(-1)
                wanted[8 * b : 8 * b + 8] += first_V[a] * second_V[b] * third_V
        assert any(drafter.size > 1 and reference.goes_on([[1], [2], [3]], [a]) for a in range(8))

        def p_value(**options: Any) -> float:
            samples = 800
            counts = sampled_pairs(merged, drafter.proposer(merged), samples, **options)
            large = wanted * samples >= 5
            observed = [*counts[large].tolist(), float(counts[~large].sum())]
            expected = [*(wanted[large] * samples).tolist(), float(wanted[~large].sum()) * samples]
            return float(stats.chisquare(observed, expected, sum_check=False).pvalue)

        assert p_value() > 1e-3
        # Control: trusted drafts have another distribution.
        assert p_value(rule=TRUSTED) < 1e-3


def test_training_reads_what_decoding_reads(served: Any, target: Target):
    """Logits of the target and of the micro decoder at every token of packed texts, by the segments that decoding made."""
    drafter, merged, reference = served
    found = outputs(merged, NoDraft())
    records, noted, wanted = [], [], []
    for one in found:
        complete, open_segment = reference.segments(one.prompt_tokens, one.tokens)
        tokens = [*one.prompt_tokens, *one.tokens]
        places = [place for part in [*complete, open_segment] for place in range(len(part))]
        records.append(Record(one.id, tokens, [False] * len(one.prompt_tokens) + [True] * len(one.tokens)))
        noted.append(torch.tensor(places)[:, None].numpy())
        wanted.append([reference.logits(one.prompt_tokens, one.tokens[:count]) for count in range(len(one.tokens))])
    batch = batch_of(records, noted)
    joins_BT = torch.zeros_like(batch.loss_mask_BT).flatten()
    joins_BT[batch.altered.slots_N + 1] = True
    joins_BT = joins_BT.view(batch.tokens_BT.shape)
    # The served target is tuned already: the adapters are on its own copy.
    drafter = copy.copy(drafter)
    drafter.tuned = copy.copy(drafter.tuned)
    drafter.tuned.target = merged
    read = drafter.read(batch, joins_BT)
    micro_BTD = drafter.micro_states(read, joins_BT)
    compared = micro_compared = 0
    for number, (one, rows) in enumerate(zip(found, wanted, strict=True)):
        at = (batch.documents_BT == number).nonzero()
        row, start = int(at[0, 0]), int(at[0, 1]) + len(one.prompt_tokens) - 1
        final_AD = read.final_BTD[row, start : start + len(rows)]
        torch.testing.assert_close(merged.model.lm_head(final_AD), torch.stack(rows), rtol=0, atol=1e-9)
        compared += len(rows)
        complete, _ = reference.segments(one.prompt_tokens, one.tokens)
        place = int(at[0, 1]) + len(one.prompt_tokens)
        for index in range(len(one.prompt_tokens), len(complete)):
            alone_ND = reference.micro(complete[:index], complete[index])
            together_ND = micro_BTD[row, place : place + len(complete[index])]
            torch.testing.assert_close(together_ND, alone_ND, rtol=0, atol=1e-9)
            place += len(complete[index])
            micro_compared += len(complete[index]) > 1
    assert compared > 50
    assert micro_compared > 5
    # Control: by other segments the same texts give other logits.
    other_BTD = drafter.read(batch, joins_BT.roll(1, dims=1) & batch.loss_mask_BT).final_BTD
    assert float((other_BTD - read.final_BTD).detach()[batch.loss_mask_BT].abs().max()) > 1e-3


def test_micro_steps_of_decoding_are_those_of_the_definition(served: Any):
    """The logits that a round drafts from, and the stop head's decision, of sequences decoded together."""
    drafter, merged, reference = served
    proposer, checked = drafter.proposer(merged), 0
    lm = MergedLM(merged.model, drafter.parts, name="target")
    micro_states = lm.micro_states
    texts: list[list[int]] = [list(prompt.tokens) for prompt in PROMPTS]
    assert isinstance(lm, MergedLM)
    lm.begin([text[:-1] for text in texts])
    proposer.share(lm)
    for _ in range(6):
        segments = [[*own, text[-1]] for own, text in zip(lm.open_segments(), texts, strict=True)]
        ready = [number for number in range(len(texts)) if lm.room(number)]
        if ready:
            found = micro_states(ready, [segments[number] for number in ready])
            goes_on = lm.goes_on(segments)
            for number, state_D in zip(ready, found, strict=True):
                complete, open_segment = reference.segments(
                    PROMPTS[number].tokens, texts[number][len(PROMPTS[number].tokens) : -1]
                )
                segment = [*open_segment, texts[number][-1]]
                assert segment == segments[number]
                torch.testing.assert_close(state_D, reference.micro(complete, segment)[-1], rtol=0, atol=1e-9)
                assert goes_on[number] == reference.goes_on(complete, segment)
                checked += 1
        seen = lm.forward([[text[-1]] for text in texts])
        lm.keep([[0] for _ in texts])
        for text, output in zip(texts, seen, strict=True):
            assert output.logits_BTV is not None
            text.append(int(output.logits_BTV[0, -1].argmax()))
    assert checked > 10


def test_the_loss_is_that_of_each_segment_read_by_itself(target: Target, records: list[Record]):
    """CE of the tokens that join, and the stop head's at every label that another label follows; no step beyond a segment counts."""
    drafter = lively(target, features=[0, 1])
    noted = segments().of(records[:3], target, seed=0)
    batch = batch_of(records[:3], noted)
    drafter.train()
    found = float(drafter(batch).extra_loss.detach())
    drafter.eval()
    assert drafter.tuned is not None
    wanted = 0.0
    with torch.no_grad(), drafter.tuned.applied():
        reference = Reference(target, drafter)
        for record, notes_TC in zip(records[:3], noted, strict=True):
            places = notes_TC[:, 0].tolist()
            starts = [place for place, own in enumerate(places) if own == 0]
            parts = [record.tokens[a:b] for a, b in zip(starts, [*starts[1:], len(places)], strict=True)]
            losses, stops = 0.0, 0.0
            for index, (start, part) in enumerate(zip(starts, parts, strict=True)):
                if not record.loss_mask[start]:
                    continue
                states_ND = reference.micro(parts[:index], part)
                log_NV = target.model.lm_head(states_ND).log_softmax(-1)
                logits_N = drafter.micro.goes_on(states_ND)
                for place in range(len(part)):
                    if place + 1 < len(part):
                        losses -= float(log_NV[place, part[place + 1]])
                    if place + 1 < SIZE and start + place + 1 < len(places):
                        sign = 1 if place + 1 < len(part) else -1
                        stops -= float(torch.nn.functional.logsigmoid(sign * logits_N[place]))
            wanted += losses + 0.5 * stops
    assert found == pytest.approx(wanted, rel=1e-6)


def test_after_training_fewer_calls_than_tokens_and_the_files_read_back(
    target: Target, trained: Hamburger, records: list[Record], tmp_path: Path
):
    trained.save(tmp_path)
    again = Hamburger.load(tmp_path, target)
    assert again.tuning == tmp_path / "adapter"
    merged = again.adapted(target)
    assert merged.name == f"{target.name} with adapter in segments"
    prompts = [Prompt(record.id, list(record.tokens[:4])) for record in records]
    plain, exact = (outputs(merged, proposer, prompts=prompts) for proposer in (NoDraft(), again.proposer(merged)))
    assert [one.tokens for one in exact] == [one.tokens for one in plain]

    def rounds(found: Sequence[Any]) -> int:
        return sum(len(one.rounds) for one in found)

    assert rounds(exact) < 0.9 * rounds(plain)
    # Stored and in memory: the same texts.
    with trained.adapting(target) as served:
        assert [one.tokens for one in outputs(served, trained.proposer(served), prompts=prompts)] == [
            one.tokens for one in exact
        ]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    # What the tuning costs is measured on the distribution that is served, along its own segments.
    reference = Reference(merged, again)
    text = plain[0]
    wanted = 0.0
    for count in range(len(text.tokens)):
        read = torch.tensor([[*text.prompt_tokens, *text.tokens[:count]]])
        log_p_V = target.model(read).logits[0, -1].log_softmax(-1)
        with torch.no_grad():
            log_q_V = again_logits(merged, text, count).log_softmax(-1)
        wanted += float((log_p_V.exp() * (log_p_V - log_q_V)).sum())
    assert divergence(target, merged, text) == pytest.approx(wanted, rel=1e-4)
    assert reference.drafter is again


def again_logits(merged: Target, text: Any, count: int) -> Tensor:
    return merged.logits_after(text.prompt_tokens, text.tokens[:count], together=1)


def test_the_parts_beside_the_target_have_a_learning_rate_of_their_own(target: Target):
    drafter = create(target, head_lr_multiplier=5.0)
    factors = {name.partition(".")[0]: drafter.lr_factor(name) for name, _ in drafter.named_parameters()}
    assert factors == {"weights": 1.0, "embedder": 5.0, "micro": 5.0}


def test_a_whole_copy_of_the_target_is_trained_and_stored(target: Target, records: list[Record], tmp_path: Path):
    drafter, before = create(target, tune=TuningSettings(lora=None)), target.weights_digest()
    batch = batch_of(records, segments().of(records, target, seed=0))
    batch_loss(drafter.train(), CrossEntropy(), batch, vocab_size=V).total.backward()
    assert all(parameter.grad is not None for parameter in drafter.parameters())
    with torch.no_grad():
        for parameter in drafter.weights.parameters():
            parameter.sub_(1e-4 * parameter.grad)
    assert target.weights_digest() == before
    drafter.eval().save(tmp_path)
    again = Hamburger.load(tmp_path, target)
    served = again.adapted(target)
    assert served.name == f"{target.name} tuned in segments"
    with drafter.adapting(target) as in_memory:
        assert [one.tokens for one in outputs(served, again.proposer(served))] == [
            one.tokens for one in outputs(in_memory, drafter.proposer(in_memory))
        ]


@pytest.mark.parametrize("lora", [LORA, None])
def test_validation_during_training_leaves_all_weights_trainable(target: Target, lora: LoraSettings | None):
    drafter = create(target, tune=TuningSettings(lora=lora)).train()
    with drafter.adapting(target):
        pass
    assert all(parameter.requires_grad for parameter in drafter.parameters())
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


def test_a_draft_beyond_its_segment_is_refused(served: Any):
    """After the prompt's last token, and where the stop head ends a segment that has room."""
    _, merged, reference = served
    lm = merged.decoder()
    lm.begin([[3, 4]])
    with pytest.raises(CheckpointError, match="a draft ends with its segment"):
        lm.forward([[5, 6]], needs=TargetNeeds(logits=True))
    decided = {
        reference.goes_on([[3], [4], [last]], [first]): (last, first) for last in range(5, 25) for first in (6, 60, 160)
    }
    assert set(decided) == {False, True}
    for on, (last, first) in decided.items():
        lm.begin([[3, 4]])
        lm.forward([[last]])
        lm.keep([[0]])
        with nullcontext() if on else pytest.raises(CheckpointError, match="a draft ends with its segment"):
            lm.forward([[first, 6]])


def test_damaged_files_and_other_targets_are_refused(target: Target, trained: Hamburger, tmp_path: Path):
    trained.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, message in (
        ("segment", 1, "segment must be a whole number of 2 to 4096, got 1"),
        ("segment", 10**12, "segment must be a whole number of 2 to 4096, got 1000000000000"),
        ("continue_above", float("nan"), "continue_above must be a number of at least 0, got nan"),
        ("continue_above", "much", "continue_above must be a number of at least 0, got 'much'"),
        ("draft", "beam", "draft must be sampled or greedy, got 'beam'"),
        ("features", [2, 1], r"features: must be different numbers of 0\.\.2 in rising order, got \[2, 1\]"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=message):
            Hamburger.load(tmp_path, target)
    with pytest.raises(CheckpointError, match=r"drafter\.features: must be different numbers of 0\.\.2"):
        create(target, features=[3])
    windowed = Target(copy.deepcopy(target.model), target.tokenizer, name="windowed", fingerprint="")
    windowed.model.config.sliding_window = 8
    with pytest.raises(CheckpointError, match="cannot tune windowed: it has a sliding window of 8 tokens"):
        create(windowed)


@pytest.mark.long
def test_compiled_parts_give_the_same_states(target: Target, records: list[Record]):
    drafter, traced = lively(target), []
    batch = batch_of(records, segments().of(records, target, seed=0))
    joins_BT = torch.zeros_like(batch.loss_mask_BT)
    joins_BT.view(-1)[batch.altered.slots_N + 1] = True
    plain = drafter.micro_states(drafter.read(batch, joins_BT), joins_BT)

    def backend(graph: Any, _: Any) -> Any:
        traced.append(graph)
        return graph.forward

    drafter.compile_with(lambda function: torch.compile(function, backend=backend, dynamic=True))
    torch.testing.assert_close(drafter.micro_states(drafter.read(batch, joins_BT), joins_BT), plain, rtol=0, atol=1e-12)
    assert len(traced) >= 2
