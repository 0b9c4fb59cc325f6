"""GGUF: transformers computes the same from the file, and what llama.cpp would misread is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.core.errors import CheckpointError
from drafttrain.export.convert import check_exported, converted, export_as
from drafttrain.export.gguf import permuted
from drafttrain.export.gguf_file import FILE, read_gguf, write_gguf
from drafttrain.target_model.gguf_splitting import CONTRACTIONS, REST, SPLITTINGS
from tests.conftest import byte_tokenizer, random_llama

VOCABULARY = 270
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": [0, 1],
}
CHAT = "{% for m in messages %}<|end|>{{ m.content }}{% endfor %}"


def isolated(pattern: str) -> Any:
    """Return the way to split that Llama 3 and Qwen have, with their pattern."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
WAYS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (WORDS, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]), False),
    "qwen2": (isolated(CONTRACTIONS + r"\p{N}" + REST), False),
    "llama-bpe": (isolated(CONTRACTIONS + r"\p{N}{1,3}" + REST), True),
}


def merging_tokenizer(way: str = "gpt-2") -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with some merges, two special tokens, one added word, and ids without a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("1", "2"), ("Ġ", "ab")]
    symbols = ["<|end|>", "<|stop|>", *alphabet, *("".join(merge) for merge in merges)]
    splitting, whole = WAYS[way]
    made = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, merges, ignore_merges=whole))
    made.pre_tokenizer, made.decoder = splitting, decoders.ByteLevel()
    made.add_special_tokens(["<|end|>", "<|stop|>"])
    made.add_tokens(["hello"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", chat_template=CHAT)


BIASED = {"attention_bias": True, "mlp_bias": True}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **BIASED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
}
UNTOLD: dict[str, dict[str, Any]] = {"llama with biases": BIASED, "qwen3": {"head_dim": 16}}
"""Fields that transformers does not read from the file."""


def saved(model: Any, folder: Path, tokenizer: Any = None, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model of which every tensor matters, with a tokenizer."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.randn_like(parameter)
                parameter.copy_((0.3 * noise).exp() if "norm" in name else noise)
    model.to(dtype).save_pretrained(folder)
    (tokenizer or merging_tokenizer()).save_pretrained(folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def exported(folder: Path, out: Path) -> Path:
    export_as("gguf", folder, out, target_config=config_of(folder))
    return out


@pytest.fixture
def llama(tmp_path) -> Path:
    return saved(MODELS["llama"](), tmp_path / "source")


@torch.no_grad()
def logits(folder: Path, **how: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    return model(torch.arange(2, 62)[None]).logits


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_reads_the_same_model_from_the_file(kind, tmp_path):
    """Somebody else's reader, which undoes the permutation that llama.cpp wants."""
    torch.manual_seed(0)
    source = saved(MODELS[kind](), tmp_path / "source")
    out = exported(source, tmp_path / "out")
    assert torch.equal(logits(source), logits(out, gguf_file=FILE, **UNTOLD.get(kind, {})))


def test_rows_that_are_not_permuted_are_another_model(llama, tmp_path):
    """The control of the test above."""
    out = exported(llama, tmp_path / "out")
    metadata, tensors = read_gguf(out / FILE)
    plain = load_file(llama / "model.safetensors")
    tensors["blk.0.attn_q.weight"] = plain["model.layers.0.self_attn.q_proj.weight"]
    write_gguf(out / FILE, metadata, tensors)
    assert not torch.allclose(logits(llama), logits(out, gguf_file=FILE), atol=0.1)


def test_rotating_neighbours_after_the_permutation_is_rotating_halves_before():
    num_heads, size = 3, 8
    weight_QD, input_D = torch.randn(num_heads * size, 5), torch.randn(5)
    angles_F = torch.rand(size // 2)

    def rotated(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return first * angles_F.cos() - second * angles_F.sin(), second * angles_F.cos() + first * angles_F.sin()

    halves = rotated(*(weight_QD @ input_D).view(num_heads, 2, size // 2).unbind(1))
    pairs = rotated(*(permuted(weight_QD, num_heads=num_heads) @ input_D).view(num_heads, size // 2, 2).unbind(2))
    for half, neighbour in zip(halves, pairs, strict=True):
        assert torch.allclose(half, neighbour)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_keep_their_type_and_vectors_are_float32(dtype, tmp_path):
    source = saved(MODELS["qwen2"](), tmp_path / "source", dtype=dtype)
    _, tensors = read_gguf(exported(source, tmp_path / "out") / FILE)
    plain = load_file(source / "model.safetensors")
    assert torch.equal(tensors["blk.1.attn_k.weight"], plain["model.layers.1.self_attn.k_proj.weight"])
    assert tensors["blk.1.attn_k.weight"].dtype == dtype
    assert torch.equal(tensors["blk.1.attn_k.bias"], plain["model.layers.1.self_attn.k_proj.bias"].float())
    assert {tensor.dtype for tensor in tensors.values() if tensor.dim() == 1} == {torch.float32}


@pytest.mark.parametrize("way", WAYS)
def test_the_tokenizer_is_in_the_file(way, tmp_path):
    tokenizer = merging_tokenizer(way)
    source = saved(MODELS["llama"](), tmp_path / "source", tokenizer)
    out = exported(source, tmp_path / "out")
    metadata, _ = read_gguf(out / FILE)
    assert metadata["tokenizer.ggml.pre"] == way
    assert len(metadata["tokenizer.ggml.tokens"]) == VOCABULARY
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCABULARY - 1}]"
    assert metadata["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert metadata["tokenizer.ggml.token_type"][tokenizer.convert_tokens_to_ids("hello")] == 4
    assert (metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"]) == (0, 1)
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == CHAT
    text = "abc 12 ab<|stop|>xhello é\n"
    if way == "gpt-2":
        read = AutoTokenizer.from_pretrained(out, gguf_file=FILE)
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_every_way_to_split_that_is_known_is_one_that_tokenizers_write():
    assert {one.name for one in SPLITTINGS.values()} == WAYS.keys()


def test_a_token_before_every_text_is_in_the_file(tmp_path):
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    source = saved(MODELS["llama"](), tmp_path / "source", tokenizer)
    metadata, _ = read_gguf(exported(source, tmp_path / "out") / FILE)
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (True, False)
    change(source, bos_token_id=1)
    with pytest.raises(CheckpointError, match=r"adds \[0\] to texts, but bos_token_id in config\.json is 1"):
        exported(source, tmp_path / "again")


def test_a_note_reports_text_that_llama_cpp_does_not_normalize(tmp_path):
    tokenizer = merging_tokenizer("qwen2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    source = saved(MODELS["qwen2"](), tmp_path / "source", tokenizer)
    (note,) = converted("gguf", source, config_of(source)).notes
    assert "text that is not in NFC already gets other tokens" in note


def change(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | fields))


def change_tokenizer(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        edit(tokenizer)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    return changed


def change_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return changed


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64, **fields}}


REFUSED: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: change(f, model_type="gpt2"), "model_type is 'gpt2': only llama, qwen2, qwen3"),
    (lambda f: change(f, hidden_act="gelu"), "hidden_act is 'gelu': llama.cpp always computes silu"),
    (lambda f: change(f, use_sliding_window=True), "use_sliding_window: llama.cpp attends to the whole text"),
    (lambda f: change(f, quantization_config={"bits": 4}), "quantization_config"),
    (lambda f: change(f, **rope(rope_type="dynamic")), "rope_type is 'dynamic': only default, linear, llama3, yarn"),
    (
        lambda f: change(f, **rope(rope_type="yarn", beta_fast=8)),
        "rope_parameters.beta_fast is 8: only YaRN's default 32",
    ),
    (lambda f: change(f, **rope(partial_rotary_factor=0.5)), "partial_rotary_factor"),
    (lambda f: change(f, eos_token_id=None), "eos_token_id is missing: llama.cpp would end texts at token id 11"),
    (lambda f: change(f, vocab_size=200), r"embed_tokens.weight: shape \[270, 32\], must be \[200, 32\]"),
    (
        change_tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(48)})),
        "up_proj.bias: this layout has no such bias",
    ),
    (change_tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight: missing"),
    (
        change_tensors(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].double()})),
        "embed_tokens.weight: is torch.float64",
    ),
    (
        change_tensors(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].half()})),
        "matrices of several types",
    ),
    (change_tokenizer(lambda t: t["model"].update(merges=[])), "no merges"),
    (
        change_tokenizer(lambda t: t.update(normalizer={"type": "Lowercase"})),
        "normalizer Lowercase: llama.cpp silently skips it",
    ),
    (change_tokenizer(lambda t: t["model"].update(end_of_word_suffix="</w>")), "model.end_of_word_suffix is '</w>'"),
    (change_tokenizer(lambda t: t["model"].update(ignore_merges=True)), "ignore_merges is True: .* False with gpt-2"),
    (
        change_tokenizer(lambda t: t["pre_tokenizer"].update(add_prefix_space=True)),
        "splits text in a way that has no known name",
    ),
    (change_tokenizer(lambda t: t["added_tokens"][0].update(rstrip=True)), "token '<|end|>' has rstrip"),
    (
        change_tokenizer(lambda t: t["added_tokens"][2].update(id=300)),
        "has token id 300, but the model has only 270 rows",
    ),
    (change_tokenizer(lambda t: t["model"].update(type="Unigram")), "is Unigram: only byte-level BPE"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: cannot be read as a tokenizer"),
]


@pytest.mark.parametrize(("fault", "named"), REFUSED)
def test_what_llama_cpp_would_drop_or_misread_is_refused_by_name(fault, named, llama, tmp_path):
    converted("gguf", llama, config_of(llama))
    fault(llama)
    with pytest.raises(CheckpointError, match=named.replace("|", r"\|")):
        exported(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_the_architecture_lacks_is_refused(tmp_path):
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, attention_bias=True))
    source = saved(model, tmp_path / "source")
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.bias: llama\.cpp has no such bias in qwen3"
    ):
        exported(source, tmp_path / "out")


def more(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    tensors["blk.0.ffn_up.weight"][3, 4] += 1


def shifted(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][1:], "<|end|>"]


def turned(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    metadata["llama.rope.freq_base"] = 500.0


def dropped(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    del metadata["tokenizer.ggml.eot_token_id"]


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (more, r"blk\.0\.ffn_up\.weight: 1 of 1536 values differ"),
        (
            shifted,
            r"model\.gguf: tokenizer\.ggml\.tokens is \[.*: entry 0 is '<\|stop\|>', must be '<\|end\|>'",
        ),
        (turned, r"model\.gguf: llama\.rope\.freq_base is 500\.0, must be 10000\.0"),
        (dropped, r"tokenizer\.ggml\.eot_token_id is missing, must be 1"),
    ],
)
def test_a_changed_file_differs_from_its_source(fault, named, llama, tmp_path):
    out = exported(llama, tmp_path / "out")
    metadata, tensors = read_gguf(out / FILE)
    fault(tensors, metadata)
    write_gguf(out / FILE, metadata, tensors)
    with pytest.raises(CheckpointError, match=named):
        check_exported("gguf", llama, out, target_config=config_of(llama))


def test_a_truncated_file_is_named(llama, tmp_path):
    out = exported(llama, tmp_path / "out")
    whole = (out / FILE).read_bytes()
    for length in (len(whole) - 100, 3000):
        (out / FILE).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf: cannot be read as a GGUF file"):
            read_gguf(out / FILE)


def test_without_the_package_the_message_names_the_command_that_installs_it(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install gguf"):
        exported(llama, tmp_path / "out")


def test_a_tokenizer_without_merges_is_refused_on_the_command_line(tmp_path):
    source = saved(random_llama(), tmp_path / "drafter", byte_tokenizer())
    done = CliRunner().invoke(app, ["export", str(source), "--to", "gguf", "--target", str(source)])
    assert done.exit_code == 1
    assert "tokenizer.json: has no merges" in done.stderr


def test_the_command_line_writes_a_file(llama):
    done = CliRunner().invoke(app, ["export", str(llama), "--to", "gguf", "--target", str(llama)])
    assert done.exit_code == 0, done.stderr
    assert (llama.with_name("source.gguf") / FILE).is_file()
