"""Every layout with its makers' names: imported, exported and imported again, it has the same tensors and decodes losslessly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.checkpoint import read_about, read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import drafters
from drafttrain.drafters.medusa.settings import JointSettings
from drafttrain.export.convert import export_as, read_target_config
from drafttrain.importers.convert import import_folder
from drafttrain.serving.engines import engine_of
from drafttrain.target_model import Target, TargetSettings
from tests.conftest import byte_tokenizer, random_llama
from tests.drafters.eagle_models import packed
from tests.export import folders
from tests.importers import given
from tests.importers.decoding import drafted_and_plain


@pytest.fixture(scope="module")
def target(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


@dataclass(frozen=True)
class Layout:
    """A folder of somebody else's."""

    tensors: Callable[[], dict[str, Any]]
    config: Callable[[str], dict[str, Any]]
    """Of the target's name."""
    formats: tuple[str, ...]
    file: str = "model.safetensors"
    renames: tuple[str, str] = ("", "")
    """What its names begin with, and what ours do."""


LAYOUTS = {
    "eagle3 SafeAILab": Layout(
        given.eagle3_tensors, lambda _: given.eagle3_config(), ("vllm", "sglang", "speculators"), "pytorch_model.bin"
    ),
    "eagle3 SpecForge": Layout(given.eagle3_tensors, lambda _: given.specforge_config(), ("vllm", "sglang")),
    "eagle3 ModelOpt": Layout(
        lambda: given.eagle3_tensors("layers.0."),
        lambda _: given.modelopt_config(),
        ("vllm", "sglang", "speculators"),
        renames=("layers.0.", "midlayer."),
    ),
    "speculators": Layout(
        lambda: given.eagle3_tensors("layers.0."),
        lambda target: given.speculators_config(target) | {"norm_before_residual": False},
        ("vllm", "speculators"),
        renames=("layers.0.", "midlayer."),
    ),
    "speculators with norm_before_fc": Layout(
        lambda: {**given.eagle3_tensors("layers.0."), **given.drawn({"input_norm.weight": (3 * given.WIDTH,)})},
        lambda target: given.speculators_config(target) | {"norm_before_residual": True, "norm_before_fc": True},
        ("vllm", "speculators"),
        renames=("layers.0.", "midlayer."),
    ),
    "eagle3 with norm_before_fc inside": Layout(
        lambda: {**given.eagle3_tensors(), **given.drawn({"input_norm.weight": (3 * given.WIDTH,)})},
        lambda _: given.eagle3_config(eagle_config={"norm_before_fc": True}),
        ("vllm", "sglang", "speculators"),
    ),
    "eagle3 as a module of its trainer": Layout(
        lambda: {f"module.model.{name}": tensor for name, tensor in given.eagle3_tensors().items()},
        lambda _: given.eagle3_config(),
        ("vllm",),
        renames=("module.model.", ""),
    ),
    "p_eagle": Layout(given.p_eagle_tensors, lambda _: given.p_eagle_config(), ("vllm", "speculators")),
    "p_eagle with its own embedding": Layout(
        lambda: given.p_eagle_tensors("layers.0.", embedding=True),
        lambda _: given.p_eagle_config(architectures=["PEagleDraftModel"]),
        ("vllm", "speculators"),
        renames=("layers.0.", "midlayer."),
    ),
    "p_eagle speculators": Layout(
        lambda: given.p_eagle_tensors("layers.0.", embedding=True),
        given.speculators_p_eagle_config,
        ("speculators",),
        renames=("layers.0.", "midlayer."),
    ),
    "eagle": Layout(
        given.eagle_tensors,
        lambda _: {"architectures": ["EagleLlamaForCausalLM"], "model_type": "llama", **given.LLAMA, "bias": False},
        ("vllm", "sglang"),
    ),
    "eagle with a bias in fc": Layout(
        lambda: {**given.eagle_tensors(), "fc.bias": torch.linspace(-1, 1, given.WIDTH)},
        lambda _: {"architectures": ["LlamaForCausalLM"], **given.LLAMA, "model_type": "mixtral", "bias": True},
        ("sglang",),
        "pytorch_model.bin",
    ),
    "eagle vLLM wrapper": Layout(
        given.eagle_tensors,
        lambda _: {"model_type": "eagle", "model": {"model_type": "llama", **given.LLAMA}, "truncated_vocab_size": 257},
        ("vllm",),
    ),
    "medusa .pt": Layout(given.medusa_tensors, given.medusa_config, ("vllm",), "medusa_lm_head.pt"),
    "medusa safetensors": Layout(given.medusa_tensors, given.medusa_config, ("vllm",), "medusa_lm_head.safetensors"),
    "medusa vLLM": Layout(given.vllm_medusa_tensors, lambda _: given.vllm_medusa_config(), ("vllm",)),
    "medusa token_map": Layout(given.cut_medusa_tensors, lambda _: given.cut_medusa_config(), ()),
}


def ours(layout: Layout) -> dict[str, torch.Tensor]:
    """Return a layout's tensors as a drafter folder must hold them, renamed by hand."""
    if "medusa" in layout.file:
        return given.vllm_medusa_tensors()
    old, new = layout.renames
    return {
        new + name.removeprefix(old) if old and name.startswith(old) else name: tensor
        for name, tensor in layout.tensors().items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_imported_exported_and_imported_again_it_holds_the_same_tensors(name, target, tmp_path):
    layout = LAYOUTS[name]
    source = given.write(tmp_path / "theirs", layout.tensors(), layout.config(target.name), file=layout.file)
    import_folder(source, tmp_path / "first", target=target.name)
    assert given.same(given.held(tmp_path / "first"), ours(layout))
    target_config = read_target_config(Path(target.name), name=target.name)
    first = json.loads((tmp_path / "first" / "config.json").read_text())
    for format in layout.formats:
        export_as(format, tmp_path / "first", tmp_path / format, target_config=target_config)
        import_folder(tmp_path / format, tmp_path / f"again_{format}")
        assert given.same(given.held(tmp_path / f"again_{format}"), ours(layout)), format
        assert json.loads((tmp_path / f"again_{format}" / "config.json").read_text()) == first, format


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_imported_drafter_decodes_as_the_target_does(name, target, tmp_path):
    layout = LAYOUTS[name]
    source = given.write(tmp_path / "theirs", layout.tensors(), layout.config(target.name), file=layout.file)
    import_folder(source, tmp_path / "drafter", target=target.name)
    drafter = read_drafter(tmp_path / "drafter", target)
    drafted, plain = drafted_and_plain(drafter, target)
    assert drafted == plain


EXPORTED = [
    *((kind, "vllm") for kind in ("eagle3", "eagle", "medusa", "causal_lm")),
    *((kind, "sglang") for kind in ("eagle3", "eagle", "causal_lm")),
    *(("eagle3", "speculators"), ("p_eagle", "speculators"), ("p_eagle", "vllm")),
    *(("dflash", format) for format in ("vllm", "speculators", "transformers")),
    *(("dspark", format) for format in ("deepspec", "speculators")),
]


@pytest.mark.parametrize(("kind", "format"), EXPORTED)
def test_an_exported_drafter_is_imported_unchanged(kind, format, target, tmp_path):
    source = folders.save(folders.drafter_of(kind, target), tmp_path / "source", target)
    target_config = read_target_config(Path(target.name), name=target.name)
    export_as(format, source, tmp_path / "out", target_config=target_config)
    import_folder(tmp_path / "out", tmp_path / "again")
    assert given.same(given.held(tmp_path / "again"), given.held(source))
    about = read_about(tmp_path / "again")
    assert about is not None
    assert (about.kind, about.target, about.target_fingerprint) == (kind, target.name, target.fingerprint)
    batch, _ = packed(target, read_drafter(source, target), (9,), width=9)
    logits = []
    for folder in (source, tmp_path / "again"):
        drafter = read_drafter(folder, target)
        with torch.no_grad():
            drafted = drafter(batch)
            logits.append(drafted.head(drafted.states_BTD[1].flatten(0, 1), 1))
    assert torch.equal(*logits)


def test_missing_fields_of_dsparks_heads_are_the_librarys_values(target, tmp_path):
    source = folders.save(folders.drafter_of("dspark", target), tmp_path / "source", target)
    target_config = read_target_config(Path(target.name), name=target.name)
    export_as("speculators", source, tmp_path / "out", target_config=target_config)
    held = json.loads((tmp_path / "out" / "config.json").read_text())
    left_out = ("sample_from_anchor", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
    folders.damage(tmp_path / "out", lambda _, config: [config.pop(key) for key in left_out])
    made = import_folder(tmp_path / "out", tmp_path / "again")
    assert given.same(given.held(tmp_path / "again"), given.held(source))
    for key in left_out:
        assert made.files.config[key] == held[key]
        assert f"config.json: {key} is missing: set to {held[key]!r}, as speculators 0.9.0 does" in made.notes


def plain_eagle3(
    tensors: dict[str, torch.Tensor], target: Target, tokens: list[int], *, norm_before_residual: bool = False
) -> torch.Tensor:
    """Return logits_TR of the first draft token, computed from the file's own names and nothing of ours."""
    with torch.no_grad():
        states = target.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * tensors[name]

    tapped_TF = torch.cat([states[tap][0, :-1] for tap in given.TAPS], dim=-1)
    if "input_norm.weight" in tensors:
        tapped_TF = norm("input_norm.weight", tapped_TF)
    hidden_TD = tapped_TF @ tensors["fc.weight"].T
    embedded_TD = target.model.get_input_embeddings().weight[tokens[1:]]
    read = torch.cat(
        [norm("midlayer.input_layernorm.weight", embedded_TD), norm("midlayer.hidden_norm.weight", hidden_TD)], dim=-1
    )
    query, key, value = (
        (read @ tensors[f"midlayer.self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, 16)) for p in "qkv"
    )
    places = torch.arange(len(hidden_TD))[:, None]
    angles = places * (500.0 ** (-torch.arange(0, 16, 2) / 16))

    def turned(x: torch.Tensor) -> torch.Tensor:
        left, right = x[..., :8], x[..., 8:]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    query, key = turned(query), turned(key)
    scores = torch.einsum("thd,cd->htc", query, key[:, 0]) / 4
    scores = scores.masked_fill(places < places.T, -torch.inf).softmax(-1)
    mixed = torch.einsum("htc,cd->thd", scores, value[:, 0]).flatten(1)
    residual_TD = norm("midlayer.hidden_norm.weight", hidden_TD) if norm_before_residual else hidden_TD
    stream = residual_TD + mixed @ tensors["midlayer.self_attn.o_proj.weight"].T
    normed = norm("midlayer.post_attention_layernorm.weight", stream)
    gate = normed @ tensors["midlayer.mlp.gate_proj.weight"].T
    inner = gate * gate.sigmoid() * (normed @ tensors["midlayer.mlp.up_proj.weight"].T)
    stream = stream + inner @ tensors["midlayer.mlp.down_proj.weight"].T
    return norm("norm.weight", stream) @ tensors["lm_head.weight"].T


@pytest.mark.parametrize(
    "name",
    [
        "eagle3 SafeAILab",
        "eagle3 ModelOpt",
        "speculators",
        "speculators with norm_before_fc",
        "eagle3 with norm_before_fc inside",
    ],
)
def test_an_imported_eagle3_computes_the_distributions_of_its_file(name, target, tmp_path):
    """Holds names, taps (of both numberings), rotary base, norm order and the map of the vocabulary."""
    layout = LAYOUTS[name]
    source = given.write(tmp_path / "theirs", layout.tensors(), layout.config(target.name), file=layout.file)
    import_folder(source, tmp_path / "drafter", target=target.name)
    drafter = read_drafter(tmp_path / "drafter", target)
    tokens = [7, 90, 14, 200, 33, 8]
    batch, _ = pack([Record("", tokens, [True] * len(tokens))], width=len(tokens), weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs())
    with torch.no_grad():
        drafted = drafter(replace(batch, target=seen))
        law_TR = drafted.head(drafted.states_BTD[1][0, : len(tokens) - 1], 1)
    before_residual = layout.config(target.name).get("norm_before_residual", False)
    wanted_TR = plain_eagle3(ours(layout), target, tokens, norm_before_residual=before_residual)
    assert torch.allclose(law_TR, wanted_TR, atol=1e-4)
    assert torch.equal(drafter.vocabulary, given.drafter_ids())


def test_a_missing_norm_before_residual_is_true_and_the_note_names_how_others_read_it(target, tmp_path):
    source = given.write(tmp_path / "theirs", given.eagle3_tensors("layers.0."), given.speculators_config(target.name))
    made = import_folder(source, tmp_path / "drafter")
    assert made.files.config["norm_before_residual"] is True
    (note,) = (note for note in made.notes if "norm_before_residual" in note)
    assert "as vLLM 0.32.0 does" in note
    assert "speculators 0.9.0 assumes false" in note


def test_a_p_eagle_folder_tells_its_mask_token_layers_and_draft_length(target, tmp_path):
    layout = LAYOUTS["p_eagle speculators"]
    source = given.write(tmp_path / "theirs", layout.tensors(), layout.config(target.name))
    config = import_folder(source, tmp_path / "drafter").files.config
    assert (config["num_hidden_layers"], config["mask_token_id"], config["embed_requires_grad"]) == (2, 256, True)
    assert config["norm_before_residual"] is False
    assert config["drafttrain"]["num_depths"] == 5
    plain = given.write(tmp_path / "plain", given.p_eagle_tensors(), given.p_eagle_config())
    made = import_folder(plain, tmp_path / "plain_drafter", target=target.name)
    assert made.files.config["drafttrain"]["num_depths"] == 8
    assert [note for note in made.notes if "how many tokens it was trained to draft" in note]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"pard_token": None}, "mask_token_id must be an id"), ({"num_hidden_layers": 3}, r"layers\.2\.")],
)
def test_a_wrong_p_eagle_folder_is_named(change, named, target, tmp_path):
    source = given.write(tmp_path / "theirs", given.p_eagle_tensors(), given.p_eagle_config() | change)
    with pytest.raises(CheckpointError, match=named):
        import_folder(source, tmp_path / "drafter", target=target.name)


def test_the_bias_of_fc_is_added_and_exported_where_it_is_used(target, tmp_path):
    """The drafter with the bias in fc is the one without it, shifted by the bias where the layer begins."""
    layout = LAYOUTS["eagle with a bias in fc"]
    source = given.write(tmp_path / "theirs", layout.tensors(), layout.config(target.name), file=layout.file)
    import_folder(source, tmp_path / "drafter", target=target.name)
    biased: Any = read_drafter(tmp_path / "drafter", target)
    import_folder(
        given.write(tmp_path / "plain", given.eagle_tensors(), layout.config("")), tmp_path / "none", target=target.name
    )
    plain: Any = read_drafter(tmp_path / "none", target)
    assert plain.fc.bias is None
    states_BTD = torch.randn(2, 1, 3, given.WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shift_BTD = biased.entering(*states_BTD)[0] - plain.entering(*states_BTD)[0]
    assert torch.allclose(shift_BTD, torch.linspace(-1, 1, given.WIDTH).expand_as(shift_BTD), atol=1e-5)
    target_config = read_target_config(Path(target.name), name=target.name)
    export_as("sglang", tmp_path / "drafter", tmp_path / "sglang", target_config=target_config)
    assert torch.equal(given.held(tmp_path / "sglang")["fc.bias"], torch.linspace(-1, 1, given.WIDTH))
    with pytest.raises(
        CheckpointError, match=r"fc\.bias: 32 of 32 values are not zero: vLLM 0\.32\.0 silently drops them"
    ):
        export_as("vllm", tmp_path / "drafter", tmp_path / "vllm", target_config=target_config)
    (line,) = engine_of("vllm").misread(tmp_path / "drafter", "eagle")
    assert "fc has a bias: vLLM 0.32.0 silently drops it" in line
    assert not engine_of("vllm").misread(tmp_path / "none", "eagle")


def test_a_drafter_with_a_bias_in_fc_is_trained_on_with_it(target, tmp_path):
    layout = LAYOUTS["eagle with a bias in fc"]
    source = given.write(tmp_path / "theirs", layout.tensors(), layout.config(target.name), file=layout.file)
    import_folder(source, tmp_path / "drafter", target=target.name)
    entry: Any = drafters.entry("eagle")
    made = entry.component.create(
        entry.settings(checkpoint=str(tmp_path / "drafter")), target=target, tokenizer=target.tokenizer
    )
    assert made.fc.bias.requires_grad
    made.save(tmp_path / "again")
    assert given.same(given.held(tmp_path / "again"), given.held(tmp_path / "drafter"))


def test_a_plain_causal_lm_is_not_changed(target, tmp_path):
    model = random_llama(seed=5, num_layers=1)
    model.save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "drafter", target=target.name)
    assert given.same(given.held(tmp_path / "drafter"), given.held(tmp_path / "theirs"))
    tokens = torch.tensor([[5, 6, 7]])
    drafter: Any = read_drafter(tmp_path / "drafter", target)
    with torch.no_grad():
        assert torch.equal(drafter.model(tokens).logits, model(tokens).logits)


def test_matrices_of_all_rows_are_cut_to_the_token_map(target, tmp_path):
    theirs = given.write(tmp_path / "theirs", given.cut_medusa_tensors(whole=True), given.cut_medusa_config())
    made = import_folder(theirs, tmp_path / "drafter", target=target.name)
    assert "lm_heads.0.weight: cut to the 100 rows of token_map" in made.notes
    assert given.same(given.held(tmp_path / "drafter"), given.cut_medusa_tensors())


def test_added_zero_biases_and_a_shared_head_change_no_output(target, tmp_path):
    tensors = given.vllm_medusa_tensors(bias=False)
    heads = {name: tensor for name, tensor in tensors.items() if not name.startswith(("lm_heads.1", "lm_heads.2"))}
    config = given.vllm_medusa_config(medusa_fc_bias=False, original_lm_head=True)
    import_folder(given.write(tmp_path / "theirs", heads, config), tmp_path / "drafter", target=target.name)
    drafter: Any = read_drafter(tmp_path / "drafter", target)
    state_ND = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    wanted_ND = state_ND
    for block in range(2):
        wanted_ND = wanted_ND + torch.nn.functional.silu(wanted_ND @ tensors[f"blocks.2.layers.{block}.weight"].T)
    with torch.no_grad():
        law_NV = drafter.head(drafter.states(state_ND, 3), 3)
    assert torch.allclose(law_NV, wanted_ND @ tensors["lm_heads.0.weight"].T, atol=1e-4)


def test_heads_on_an_adapted_target_keep_their_adapter(target, tmp_path):
    source = folders.save(folders.drafter_of("medusa", target, joint=JointSettings()), tmp_path / "source", target)
    target_config = read_target_config(Path(target.name), name=target.name)
    export_as("vllm", source, tmp_path / "out", target_config=target_config)
    import_folder(tmp_path / "out", tmp_path / "again")
    assert read_drafter(tmp_path / "again", target).adapted(target) is not target
    medusa: Any = drafters.entry("medusa")
    settings = medusa.settings(checkpoint=str(tmp_path / "again"))
    with pytest.raises(CheckpointError, match=r"training cannot continue from heads on an adapted target \(Medusa-2\)"):
        medusa.component.create(settings, target=target, tokenizer=target.tokenizer)


def test_weights_keep_their_type(target, tmp_path):
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in given.eagle3_tensors().items()
    }
    source = given.write(tmp_path / "theirs", tensors, given.eagle3_config(torch_dtype="float16"))
    import_folder(source, tmp_path / "drafter", target=target.name)
    assert given.same(given.held(tmp_path / "drafter"), tensors)
    assert json.loads((tmp_path / "drafter" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_tied_head_may_be_in_the_file_if_it_is_equal(target, tmp_path):
    model = random_llama(seed=5, num_layers=1)
    model.save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    tensors = given.held(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    head = tensors["model.embed_tokens.weight"].clone()
    given.write(tmp_path / "theirs", tensors | {"lm_head.weight": head}, config)
    import_folder(tmp_path / "theirs", tmp_path / "drafter", target=target.name)
    assert given.same(given.held(tmp_path / "drafter"), tensors)
    given.write(
        tmp_path / "theirs", tensors | {"lm_head.weight": head + 1}, config | {"auto_map": {"AutoModel": "m.M"}}
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight") as caught:
        import_folder(tmp_path / "theirs", tmp_path / "drafter", target=target.name)
    assert caught.match("auto_map names code in the folder")
