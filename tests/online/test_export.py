"""An online version is exported as every other drafter: with what its kind calibrates."""

from __future__ import annotations

import json

from drafttrain.checkpoint import read_drafter
from drafttrain.core.texts import Record
from drafttrain.data_gen.serving_logs.duplicates import Mark
from drafttrain.losses.forward_kl import ForwardKL
from drafttrain.online.route import OnlineSetup, Route
from drafttrain.online.settings import OnlineSettings
from drafttrain.online.versions import Versions, publish_first
from drafttrain.recorder.intake import Served
from drafttrain.training.settings import TrainSettings
from tests.export import folders


def test_an_online_version_of_medusa_has_its_tree(tmp_path, tiny_target):
    start = folders.save(folders.drafter_of("medusa", tiny_target), tmp_path / "start", tiny_target)
    versions = Versions(tmp_path / "drafters")
    publish_first(versions, start)
    setup = OnlineSetup(
        target=tiny_target,
        online=OnlineSettings(),
        train=TrainSettings(batch_size=4, warmup_steps=0, schedule="constant"),
        loss=ForwardKL,
        max_length=40,
        num_draft_tokens=2,
        dtype="float32",
        seed=0,
    )
    route = Route("", setup, versions)
    for number in range(4):
        tokens = [(7 * number + 3 * i) % 250 + 1 for i in range(20)]
        route.held_out.add(Served(Record(str(number), tokens, [False] * 8 + [True] * 12), "", Mark(str(number), "")))
    version = versions.add(route._export, update=1)
    tree = json.loads((versions.path(version) / "medusa_tree.json").read_text())
    assert sum(tree["num_positions"]) > 0
    assert [list(path) for path in read_drafter(versions.path(version), tiny_target).paths] == tree["paths"]
    assert sorted(path.name for path in versions.path(version).glob("*") if path.is_dir()) == []
