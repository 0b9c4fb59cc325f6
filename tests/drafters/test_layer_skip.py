"""Layer skipping: drafts are those of the target with sublayers removed, on its own cache; the search finds idle sublayers.

B = sequences, T = positions, S = sublayers, N = sets
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, LlamaConfig, OPTConfig
from transformers.pytorch_utils import Conv1D

from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.layer_skip.module import LayerSkipDrafter, LayerSkipSettings
from drafttrain.drafters.layer_skip.windows import Window, matched, windows_of
from drafttrain.target_model import Target, growing_layer
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.sublayers import Skipped, Sublayers
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, decode, greedy
from tests.target_model.test_target import ARCHITECTURES, SMALL

EXACT = 1e-10
SKIPPED = Skipped(attention=(1,), mlp=(2,))


def wrapped(model: Any) -> Target:
    return Target(model, byte_tokenizer(), name="tiny", fingerprint="")


def made(target: Target, **settings: Any) -> LayerSkipDrafter:
    return LayerSkipDrafter.create(LayerSkipSettings(**settings), target=target, tokenizer=None)


def removed(model: Any, skipped: Skipped) -> Any:
    """Return a copy in which the last matrix of each of these sublayers is 0, so that they add nothing."""
    changed = copy.deepcopy(model)
    sublayers = Sublayers(changed)
    with torch.no_grad():
        for module in itertools.chain(*sublayers.modules(skipped)):
            *_, last = (part for part in module.modules() if isinstance(part, nn.Linear | Conv1D))
            last.weight.zero_()
            if last.bias is not None:
                last.bias.zero_()
    return changed


@pytest.fixture(scope="module")
def target() -> Target:
    return wrapped(random_llama(num_layers=5).double())


# ---------------------------------------------------------------- drafts and caches


@torch.no_grad()
def plain_logits(model: Any, without: Any, text: Sequence[int], draft: Sequence[int], *, prefix: Any = None) -> Tensor:
    """Return the logits after a draft: a fresh prefill of the text before its root, then the other model from there on."""
    cache = DynamicCache()
    if len(text) > 1:
        (prefix or model)(torch.tensor([text[:-1]]), past_key_values=cache)
    new = [text[-1], *draft]
    positions = torch.arange(len(text) - 1, len(text) - 1 + len(new))[None]
    logits_V: Tensor = without(torch.tensor([new]), past_key_values=cache, position_ids=positions).logits[0, -1]
    return logits_V


def largest_errors(
    target: Target, skipped: Skipped, references: Sequence[tuple[Skipped, bool]], *, new: int = 8
) -> list[float]:
    """Return the largest difference of the logits of drafts, over all rounds of ragged sequences, from each fresh computation.

    Args:
        references: The sublayers that are removed there, and whether they are also removed in the text before the root.
    """
    proposer: Any = LayerSkipDrafter(target, LayerSkipSettings(), skipped).proposer(target)
    beside = proposer._beside
    others = [(removed(target.model, one), own_prefix) for one, own_prefix in references]
    read, worst, compared = beside.forward, [0.0] * len(others), [0]
    drafts: dict[int, list[int]] = {}

    def forward(tokens: Any, **options: Any) -> Any:
        if beside._cache is None:
            drafts.clear()
        seen = read(tokens, **options)
        for row, (nodes, output) in enumerate(zip(tokens, seen, strict=True)):
            if nodes:
                draft = drafts[row] = [*drafts.get(row, []), *(nodes if row in drafts else [])]
                text = proposer._contexts[row].tokens
                for number, (without, own_prefix) in enumerate(others):
                    plain_V = plain_logits(target.model, without, text, draft, prefix=without if own_prefix else None)
                    worst[number] = max(worst[number], float((output.logits_BTV[0, -1] - plain_V).abs().max()))
                compared[0] += 1
        return seen

    beside.forward = forward
    prompts = [one for one in PROMPTS if max(one.tokens) < target.vocab_size]
    found = decode(target, proposer, prompts=prompts, new=new, stop_tokens=())
    assert compared[0] >= 20
    assert all(len(one.rounds) > 2 for one in found)
    return worst


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drafts_are_those_of_the_target_with_the_sublayers_removed(name):
    """After several rounds the cache gives what a fresh prefill gives, with ragged sequences that end at different rounds."""
    torch.manual_seed(0)
    config = copy.deepcopy(ARCHITECTURES[name])
    setattr(config, "n_layer" if name == "gpt2" else "num_hidden_layers", 4)
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [kinds[0]] * 4
    target = wrapped(AutoModelForCausalLM.from_config(config).eval().double())
    # These models are nearly idle at first, so that long drafts are accepted.
    (error,) = largest_errors(target, SKIPPED, [(SKIPPED, False)], new=20)
    assert error < EXACT


def test_controls_other_sublayers_or_keys_of_the_draft_give_other_logits(target):
    references = [(SKIPPED, False), (Skipped(attention=(2,), mlp=(2,)), False), (SKIPPED, True)]
    ours, other_sublayers, own_keys = largest_errors(target, SKIPPED, references)
    assert ours < EXACT
    assert other_sublayers > 1e-3
    assert own_keys > 1e-3


@torch.no_grad()
def test_rows_of_packed_texts_are_those_of_decoding_at_every_root_and_depth(target):
    """Row t of depth d: the logits of a draft with root t whose tokens are the text's. Control: rows of another depth."""
    texts = [list(range(20, 29)), list(range(60, 66))]
    records = [Record(str(number), text, [True] * len(text)) for number, text in enumerate(texts)]
    batch, _ = pack(records, width=18, weight_of_step=1.0)
    assert len(batch.tokens_BT) == 1
    drafter, without = LayerSkipDrafter(target, LayerSkipSettings(), SKIPPED), removed(target.model, SKIPPED)
    drafted = drafter(replace(batch, num_depths=3))
    apart = []
    for number, text in enumerate(texts):
        first = int((batch.documents_BT[0] == number).nonzero()[0, 0])
        for depth, root in itertools.product((1, 2, 3), range(len(text))):
            if root + depth <= len(text):
                plain_V = plain_logits(target.model, without, text[: root + 1], text[root + 1 : root + depth])
                row_V = drafted.logits_BTV(depth)[0, first + root]
                torch.testing.assert_close(row_V, plain_V, rtol=0, atol=EXACT)
                if depth > 1:
                    other_V = drafted.logits_BTV(1)[0, first + root + depth - 1]
                    apart.append(float((other_V - plain_V).abs().max()))
    assert min(apart) > 1e-6, "after the same text, keys and values differ by where the draft begins"


def beside_reading(
    model: Any, *, second: Sequence[int] = (7, 8), count: int = 70
) -> tuple[CachedLM, list[Tensor], list[Tensor]]:
    """Read tokens beside a cache, so many that its memory grows; return copies of keys and values before and after."""
    lm, sublayers = CachedLM(model, name="target"), Sublayers(model)
    lm.begin([[1, 2, 3, 4, 5], second])
    held = lambda: [states.clone() for layer in lm.cache.hf.layers for states in (layer.keys, layer.values)]  # noqa: E731
    before, layers, whole = held(), list(lm.cache.hf.layers), lm.cache.hf
    cache = lm.cache.beside(SKIPPED.attention)
    for first in range(0, count, 10):
        lm.read_beside(
            cache, [list(range(first, first + 10)), [3] * (5 + len(second))], sublayers=sublayers, skipped=SKIPPED
        )
    assert lm.cache.hf is whole
    assert all(one is other for one, other in zip(lm.cache.hf.layers, layers, strict=True))
    assert cache.lengths[0] == 5 + count
    for number, (one, other) in enumerate(zip(cache.hf.layers, layers, strict=True)):
        if number in SKIPPED.attention:
            assert not one.is_initialized, "a skipped attention has no columns"
        else:
            assert one.keys.data_ptr() == other.keys.data_ptr(), "no column is copied: both views begin in one memory"
    return lm, before, held()


def test_the_targets_cache_stays_as_it_is_and_is_never_copied(target):
    lm, before, after = beside_reading(target.model)
    assert (lm.lengths, lm.kept) == ([5, 2], [5, 2])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    (first, second) = lm.forward([[9], [10]])
    for text, output in (([1, 2, 3, 4, 5, 9], first), ([7, 8, 10], second)):
        with torch.no_grad():
            plain_V = target.model(torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(output.logits_BTV[0, -1], plain_V, rtol=0, atol=EXACT)


def test_control_columns_that_begin_one_too_early_overwrite_the_cache(target, monkeypatch):
    begin = growing_layer.LayerBeside.__init__

    def too_early(self: Any, other: Any) -> None:
        begin(self, other)
        self.show(self.keys.shape[-2] - 1)

    monkeypatch.setattr(growing_layer.LayerBeside, "__init__", too_early)
    # Of equal lengths, so that no mask notices it.
    _, before, after = beside_reading(random_llama(num_layers=5).double(), second=[6, 7, 8, 9, 10])
    assert not all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_window_of_cached_text_is_scored_as_after_its_context_alone(target):
    """The window's own columns in the cache are hidden. Control: if they are not, its logits are others."""
    texts, sublayers = [list(range(10, 30)), list(range(50, 63))], Sublayers(target.model)
    contexts, windows = [texts[0][:8], texts[1][:4]], [texts[0][8:13], texts[1][4:9]]

    def logits_of(read: list[list[int]], visible: list[int] | None) -> list[Tensor]:
        lm = CachedLM(target.model, name="target")
        lm.begin(read)
        cache = lm.cache.beside(SKIPPED.attention, visible=visible)
        seen = lm.read_beside(cache, windows, sublayers=sublayers, skipped=SKIPPED)
        return [one.logits_BTV[0] for one in seen]

    alone = logits_of(contexts, None)
    for ours, plain in zip(logits_of(texts, [8, 4]), alone, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=EXACT)
    assert float((logits_of(texts, None)[0] - alone[0]).abs().max()) > 1e-3


def test_matches_are_counted_where_there_is_a_label(target):
    """By the logits of a fresh computation, token by token."""
    text, sublayers = [*PROMPTS[0].tokens, *greedy(target, PROMPTS[0], 20)], Sublayers(target.model)
    window = Window(text[:6], text[6:14], [None, *text[8:15]])
    lm, without = CachedLM(target.model, name="target"), removed(target.model, SKIPPED)
    lm.begin([window.context])
    likeliest = [
        int(plain_logits(target.model, without, [*text[:6], text[6]], text[7 : 7 + count]).argmax())
        for count in range(8)
    ]
    wanted = sum(one == label for one, label in zip(likeliest[1:], text[8:15], strict=True))
    assert matched(lm, [window], sublayers, SKIPPED, num_tokens=257) == wanted
    assert matched(lm, [Window(text[:6], text[6:14], text[7:15])], sublayers, Skipped(), num_tokens=257) == 8, (
        "nothing is skipped: the target agrees with its own text"
    )


def test_windows_begin_at_a_token_before_a_label():
    records = [
        Record("answer", range(20), [False] * 8 + [True] * 12),
        Record("short", range(4), [False] + [True] * 3),
        Record("question", range(5), [False] * 5),
    ]
    seen = set()
    for seed in range(30):
        found = windows_of(records, size=5, seed=seed)
        assert len(found) == 2, "a text without labels has no window"
        window = found[0]
        assert (len(window.tokens), window.labels) == (5, [token + 1 for token in window.tokens])
        assert window.context == list(range(window.tokens[0]))
        assert 7 <= window.tokens[0] <= 14
        seen.add(window.tokens[0])
        assert found[1].labels[-1] == 3
    assert len(seen) > 5
    assert windows_of(records, size=5, seed=3) == windows_of(records, size=5, seed=3)


def idle(model: Any, skipped: Skipped) -> Any:
    """Make sublayers of a model idle: their last matrix is 0."""
    return removed(model, skipped)


def written(target: Target, count: int = 4) -> list[Record]:
    """Return texts that the target wrote itself, greedily."""
    prompts = [[1 + i, 2 + 3 * i, 9] for i in range(count)]
    texts = [
        target.model.generate(torch.tensor([one]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        for one in prompts
    ]
    return [Record(str(i), text[0].tolist(), [False] * 3 + [True] * (len(text[0]) - 3)) for i, text in enumerate(texts)]


# ---------------------------------------------------------------- the folder, and refusals


def test_the_folder_has_the_numbers_of_the_blocks_and_reads_back(target, tmp_path):
    drafter = made(target, ratio=0.5, draft="greedy")
    drafter.search(target, written(target), num_steps=3, seed=0, log=tmp_path / "search.jsonl")
    drafter.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["skipped_attention"] == list(drafter.skipped.attention)
    again = LayerSkipDrafter.load(tmp_path, target)
    assert (again.skipped, again.draft, again.score) == (drafter.skipped, "greedy", drafter.score)
    assert not list(again.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 7}, "made for a target of 7 blocks, tiny has 5"),
        (
            {"skipped_attention": [0]},
            r"skipped_attention must be numbers of different blocks, ascending, of 1\.\.3, got \[0\]",
        ),
        ({"skipped_mlp": [2, 2]}, r"skipped_mlp must be .* got \[2, 2\]"),
        ({"skipped_mlp": "all"}, "skipped_mlp must be .* got 'all'"),
        ({"draft": "beam"}, "draft must be sampled or greedy, got 'beam'"),
        ({"skipped_attention": [4], "skipped_mlp": None}, r"skipped_attention .* got \[4\]; skipped_mlp .* got None"),
    ],
)
def test_a_damaged_folder_is_refused(target, tmp_path, changes, message):
    made(target).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        LayerSkipDrafter.load(tmp_path, target)


def test_models_whose_sublayers_cannot_be_skipped_are_refused(monkeypatch):
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM has 2 blocks: .* needs 3 or more"):
        made(wrapped(random_llama(num_layers=2)))
    opt = OPTConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=32
    )
    with pytest.raises(
        CheckpointError, match="OPTForCausalLM: an MLP was not found in its OPTDecoderLayer under any of mlp"
    ):
        made(wrapped(AutoModelForCausalLM.from_config(opt)))
    bloom = BloomConfig(vocab_size=61, hidden_size=32, n_layer=3, n_head=2)
    with pytest.raises(CheckpointError, match="BloomForCausalLM"):
        Sublayers(AutoModelForCausalLM.from_config(bloom).eval()).check()
    Sublayers(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, intermediate_size=48)).eval()).check()


def test_control_a_block_that_adds_something_else_is_noticed():
    model = random_llama(num_layers=4)
    Sublayers(model).check()
    forward = blocks(model)[1].forward
    blocks(model)[1].forward = lambda *a, **k: forward(*a, **k) + 0.1
    with pytest.raises(CheckpointError, match="a block without its attention and MLP does not return its input"):
        Sublayers(model).check()


def test_texts_without_labels_and_a_missing_target_are_refused(target, tmp_path: Path):
    with pytest.raises(DataError, match="no text has a label with a token before it"):
        made(target).search(target, [Record("a", [1, 2], [False, False])], num_steps=1, seed=0, log=tmp_path / "log")
    with pytest.raises(CheckpointError, match=r"target\.model is null"):
        LayerSkipDrafter.create(LayerSkipSettings(), target=None, tokenizer=None)
