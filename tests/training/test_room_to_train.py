"""What is checked before a training: room for its checkpoints, and no stale lock of a build."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from drafttrain.core.errors import DrafttrainError
from drafttrain.training.offload import refuse_stale_lock
from drafttrain.training.preflight import check_disk


def test_the_size_of_large_checkpoints_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_disk(tmp_path, num_trained=1000, keep=2)
    assert "checkpoints" not in capsys.readouterr().err
    check_disk(tmp_path, num_trained=10**7, keep=1)
    assert "checkpoints: up to 0.1 GB each" in capsys.readouterr().err


def test_a_disk_too_small_for_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DrafttrainError, match=r"need 36,?000\.00 GB"):
        check_disk(tmp_path, num_trained=10**12, keep=2)
    with pytest.raises(DrafttrainError, match=r"need 24,?000\.00 GB"):
        check_disk(tmp_path, num_trained=10**12, keep=1)
    for step in (3, 6, 9):
        (tmp_path / f"step-{step:08d}.ckpt").touch()
    with pytest.raises(DrafttrainError, match=r"need 12,?000\.00 GB \(3 at once, 2 are there\)"):
        check_disk(tmp_path, num_trained=10**12, keep=2)


def test_a_stale_lock_of_a_build_is_named(tmp_path: Path) -> None:
    refuse_stale_lock(tmp_path)
    lock = tmp_path / "lock"
    lock.touch()
    refuse_stale_lock(tmp_path)
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    with pytest.raises(DrafttrainError, match="lock: the lock of a build"):
        refuse_stale_lock(tmp_path)
