"""The speculators library loads exports in its format and computes the same logits. Needs its environment: make test-serving."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.environments.environment import check_installed
from drafttrain.environments.known import SPECULATORS
from drafttrain.export.convert import export_as, read_target_config
from drafttrain.importers.convert import import_folder
from drafttrain.serving.engines.speculators import SpeculatorsLibrary
from drafttrain.target_model import Target, TargetSettings
from tests.drafters.eagle_models import packed
from tests.export import folders

pytestmark = pytest.mark.serving

NUM_STEPS = 3
LENGTH = 128
"""A block of the library's attention: with another length its later steps refuse their mask on a CPU."""


@pytest.fixture(scope="module")
def library() -> SpeculatorsLibrary:
    """The library; if it is not installed, the tests fail."""
    check_installed(SPECULATORS)
    return SpeculatorsLibrary()


@pytest.fixture(scope="module")
def target(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


def check_logits(library: SpeculatorsLibrary, source: Path, target: Target, work: Path) -> None:
    """Export a drafter folder and compare the library's logits of every step with ours."""
    export_as(
        "speculators", source, work / "out", target_config=read_target_config(Path(target.name), name=target.name)
    )
    # What is compared is the computation, not its rounding.
    drafter = read_drafter(source, target).double()
    batch, _ = packed(target, drafter, (LENGTH,), width=LENGTH)
    features_BTF = drafter.features(batch.target)
    with torch.no_grad():
        drafted = drafter(replace(batch, num_depths=NUM_STEPS))
        ours = [drafted.head(drafted.states_BTD[depth].flatten(0, 1), depth) for depth in range(1, NUM_STEPS + 1)]
    tokens_BT = batch.tokens_BT.roll(-1, dims=1)
    theirs = library.logits(work / "out", features_BTF, tokens_BT, num_steps=NUM_STEPS, work=work)
    # What a step embeds past the row's end differs: rolled round here, zero there.
    for ours_TR, theirs_BTR in zip(ours, theirs, strict=True):
        kept = slice(0, LENGTH - NUM_STEPS)
        # Of the largest logit: the library's norms and angles are float32, whatever the weights.
        bound = 1e-5 * max(1.0, float(ours_TR.abs().max()))
        torch.testing.assert_close(theirs_BTR[0, kept], ours_TR[kept], rtol=0, atol=bound)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draft_vocab_size": None},
        {"norm_before_residual": True},
        {"norm_before_fc": True},
        {"fc_norm": True, "norm_output": True},
    ],
    ids=str,
)
def test_the_library_computes_what_we_do(settings, library, target, tmp_path):
    made = folders.drafter_of("eagle3", target, num_steps=NUM_STEPS, scale=0.05, **settings)
    check_logits(library, folders.save(made, tmp_path / "drafter", target), target, tmp_path)


def test_control_another_embedding_is_seen(library, target, tmp_path):
    """The embedding of the file is the one that the library reads."""
    source = folders.save(
        folders.drafter_of("eagle3", target, num_steps=NUM_STEPS, scale=0.05), tmp_path / "one", target
    )
    other = folders.save(
        folders.drafter_of("eagle3", target, num_steps=NUM_STEPS, scale=0.05), tmp_path / "two", target
    )
    target_config = read_target_config(Path(target.name), name=target.name)
    export_as("speculators", source, tmp_path / "out", target_config=target_config)
    folders.damage(tmp_path / "out", lambda t, _: t.update({"embed_tokens.weight": 1 - t["embed_tokens.weight"]}))
    export_as("speculators", other, tmp_path / "whole", target_config=target_config)
    features_BTF = torch.randn(1, LENGTH, 3 * 32, generator=torch.Generator().manual_seed(0))
    tokens_BT = torch.arange(LENGTH)[None]
    changed, whole = (
        library.logits(tmp_path / name, features_BTF, tokens_BT, num_steps=1, work=tmp_path)[0]
        for name in ("out", "whole")
    )
    assert not torch.allclose(changed, whole, atol=1e-3)


@pytest.mark.parametrize("name", ["sp_nbf", "spd_nearest", "sf_qwen25"])
def test_a_folder_of_the_library_is_exported_again_unchanged(name, library, shared_folder, tmp_path):
    """Imported, exported again and loaded by the library that wrote it (sf_qwen25: SpecForge's)."""
    folder = shared_folder / "cases" / "checkpoints"
    # An embedding in the type of the file, as the exported one is.
    dtype = "bfloat16" if name == "spd_nearest" else "float32"
    target = Target.load(TargetSettings(model=str(folder / "target_llama"), dtype=dtype))
    import_folder(folder / name, tmp_path / "drafter", target=target.name)
    check_logits(library, tmp_path / "drafter", target, tmp_path)


def test_two_norms_before_fc_are_refused_as_the_library_does(target, tmp_path):
    made = folders.drafter_of("eagle3", target, norm_before_fc=True, fc_norm=True)
    source = folders.save(made, tmp_path / "drafter", target)
    with pytest.raises(CheckpointError, match="both true"):
        export_as(
            "speculators", source, tmp_path / "out", target_config=read_target_config(Path(target.name), name="x")
        )
