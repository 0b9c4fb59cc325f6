"""What cannot be read or written is refused: pickles with code, unknown layouts, weights that are there twice, an occupied place."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.registry import Entry
from drafttrain.importers import Claim, Given, importers
from drafttrain.importers.convert import import_folder, layout_of
from drafttrain.importers.medusa import MedusaImporter
from drafttrain.importers.reading import read_given, read_pickle
from drafttrain.target_model import Target, TargetSettings
from tests.importers import given


@pytest.fixture(scope="module")
def target(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


class CodeInPickle:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(target, tmp_path, capsys):
    folder = given.write(tmp_path / "theirs", {}, given.medusa_config(target.name), file="medusa_lm_head.pt")
    torch.save({**given.medusa_tensors(), "extra": CodeInPickle()}, folder / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match=r"medusa_lm_head\.pt: refused: .* holds more than tensors"):
        import_folder(folder, tmp_path / "out", target=target.name)
    assert "run" not in capsys.readouterr().out
    torch.load(folder / "medusa_lm_head.pt", weights_only=False)  # the control: it would have run
    assert "run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {"a": torch.ones(1)}}, r"holds 'state_dict' \(dict\)"),
        ([torch.ones(1)], "holds a list, must be a dict of tensors"),
    ],
)
def test_a_pickle_of_another_form_is_named(content, words, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=words):
        read_pickle(tmp_path / "model.pt")


def test_damaged_pickles_are_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.randn(1000)}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense", pickle.dumps(3, protocol=2)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.pt"):
            read_pickle(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        read_pickle(path)


def test_a_folder_of_no_layout_gets_a_list_of_their_marks(target, tmp_path):
    folder = given.write(tmp_path / "theirs", {"weight": torch.ones(2)}, {"some": 1})
    with pytest.raises(CheckpointError) as caught:
        import_folder(folder, tmp_path / "out", target=target.name)
    assert all(f"{name}: " in str(caught.value) for name in importers.names())


@pytest.mark.parametrize("claim", list(Claim))
@pytest.mark.parametrize("layout", ["eagle", "eagle3", "p_eagle", "speculators"])
def test_a_new_layout_is_preferred_by_its_own_claim_alone(layout, claim, target, tmp_path, monkeypatch):
    class New(MedusaImporter):
        def recognises(self, given: Given) -> bool:
            return True

    New.claim = claim
    theirs = given.made(layout, target)
    one = read_given(given.write(tmp_path / "theirs", *theirs))
    known = layout_of(one)
    monkeypatch.setitem(importers._entries, "new", Entry("new", New, object))
    if claim == known.claim:
        with pytest.raises(CheckpointError, match=rf"has the marks of {layout} and new|new and {layout}"):
            layout_of(one)
    else:
        assert isinstance(layout_of(one), New if claim > known.claim else type(known))


def test_only_a_drafter_folder_is_overwritten(target, tmp_path):
    folder, full = given.write(tmp_path / "theirs", *given.made("eagle3", target)), tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("")
    for out in (folder, tmp_path, full):
        with pytest.raises(CheckpointError, match="give another --out"):
            import_folder(folder, out, target=target.name)
    assert (full / "thesis.txt").exists()
    import_folder(folder, tmp_path / "out", target=target.name)
    import_folder(folder, tmp_path / "out", target=target.name)


def test_a_tensor_in_two_files_is_refused(target, tmp_path):
    folder = given.write(tmp_path / "theirs", *given.made("eagle3", target))
    (folder / "again.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: fc\.weight: is in again\.safetensors too"):
        import_folder(folder, Path(tmp_path / "out"), target=target.name)


def test_without_a_target_the_message_asks_for_it(target, tmp_path):
    with pytest.raises(CheckpointError, match="names no target: give --target"):
        import_folder(given.write(tmp_path / "theirs", *given.made("eagle3", target)), tmp_path / "out")
    import_folder(given.write(tmp_path / "medusa", *given.made("medusa", target)), tmp_path / "out")
