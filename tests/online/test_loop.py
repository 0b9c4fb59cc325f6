"""The whole loop on a tiny target: real engine, real logs on disk, and versions that change between requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from drafttrain.checkpoint import About, read_drafter
from drafttrain.commands.online import learn_online
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import DataError, DrafttrainError
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.sources import sources
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.export.hf import export_hf
from drafttrain.losses import Loss
from drafttrain.losses.forward_kl import ForwardKL
from drafttrain.online.loop import OnlineRun
from drafttrain.online.report import write_online_report
from drafttrain.online.route import OnlineSetup
from drafttrain.online.run_files import metrics, status
from drafttrain.online.settings import OnlineSettings
from drafttrain.online.versions import Versions
from drafttrain.pipeline.folder import RunFolder
from drafttrain.recorder.intake import Intake
from drafttrain.training.settings import TrainSettings
from tests.online.test_learning import K, near_copy

SETTINGS = {
    "every_requests": 24,
    "steps": 25,
    "held_out": 0.4,
    "window": 24,
    "min_held_out": 8,
    "parity_prompts": 2,
    "resamples": 300,
    "positions": "all",
    "user_quota": 1.0,
}


def start(tmp_path: Path, target, *, noise: float = 0.3) -> Path:
    drafter = near_copy(target, noise=noise)
    drafter.save(tmp_path / "weights")
    about = About("causal_lm", target.name, target.fingerprint, target.tokenizer_fingerprint, 257, 0)
    export_hf(tmp_path / "weights", tmp_path / "start", tokenizer=target.tokenizer, about=about, dtype="float32")
    return tmp_path / "start"


def online_run(tmp_path: Path, target, first: Path, *, loss: type[Loss] = ForwardKL, **changes) -> OnlineRun:
    online = OnlineSettings(**SETTINGS | changes)
    setup = OnlineSetup(
        target=target,
        online=online,
        train=TrainSettings(lr=2e-3, batch_size=16, warmup_steps=0, schedule="constant"),
        loss=loss,
        max_length=40,
        num_draft_tokens=K,
        dtype="float32",
        seed=0,
    )
    settings = sources.entry("serving_logs").settings(path=str(tmp_path / "logs"), near_duplicates=None)
    intake = Intake(settings, Encoder(target.tokenizer, 40), tmp_path / "run" / "online" / "intake")
    return OnlineRun(setup, intake, tmp_path / "run", start=first)


def prompts(domain: int, count: int, *, first: int = 0) -> list[Prompt]:
    """Return prompts of bytes from one half of the alphabet."""
    draws = torch.Generator().manual_seed(100 * domain + first)
    low = 1 + 128 * domain
    return [
        Prompt(f"{domain}-{first + i}", torch.randint(low, low + 128, (6,), generator=draws).tolist())
        for i in range(count)
    ]


def serve(target, folder: Path, log: Path, wanted: list[Prompt]) -> float:
    """Decode with the version that `folder/current` names, append to the log, and return the block efficiency."""
    log.parent.mkdir(exist_ok=True)
    drafter = read_drafter((folder / "current").resolve(), target)
    policy = FixedLength(FixedLengthSettings(num_draft_tokens=K))
    engines = [
        Engine(target, proposer, rule=Lossless(), policy=policy, sampling=Sampling(), max_new_tokens=14)
        for proposer in (drafter.proposer(target), NoDraft())
    ]
    rounds = tokens = 0
    drafted, plainly = (engine.generate(wanted) for engine in engines)
    with log.open("a") as file:
        for prompt, one, plain in zip(wanted, drafted, plainly, strict=True):
            assert list(one.tokens) == list(plain.tokens), "the served text is the target's own with any drafter"
            rounds, tokens = rounds + len(one.rounds), tokens + len(one.tokens)
            # Random bytes are not valid text, so the log holds ids.
            choice = {"message": {"role": "assistant", "content": None}, "token_ids": list(map(int, one.tokens))}
            line = {
                "id": prompt.id,
                "request": {"model": "t", "prompt": list(prompt.tokens)},
                "response": {"model": "t", "choices": [choice | {"finish_reason": "length"}]},
            }
            file.write(json.dumps(line) + "\n")
    return tokens / rounds


class Stopped(Exception):
    """Stands for the end of the process."""


def write_report_and_stop(tmp_path: Path) -> None:
    """Write the report, as an endless run does after each update, and stop."""
    write_online_report(tmp_path / "run", tmp_path / "report.html", title="t")
    raise Stopped


def test_served_block_efficiency_rises_and_the_text_stays_the_targets(tmp_path, tiny_target):
    first = start(tmp_path, tiny_target)
    run = online_run(tmp_path, tiny_target, first)
    drafters, log = tmp_path / "run" / "drafters", tmp_path / "logs" / "a.jsonl"
    served = [serve(tiny_target, drafters, log, prompts(0, 24))]
    run.learn_once()
    served.append(serve(tiny_target, drafters, log, prompts(0, 24, first=24)))
    with pytest.raises(Stopped):
        run.learn_forever(lambda: write_report_and_stop(tmp_path))
    last = serve(tiny_target, drafters, log, prompts(0, 24, first=200))
    rows = metrics(tmp_path / "run")
    # Updates happen exactly at their interval.
    assert [row["requests"] for row in rows] == [24, 48]
    assert any(row.get("promoted") for row in rows)
    assert last > served[0] + 0.1
    found = status(tmp_path / "run")
    assert found["routes"][""]["published"] >= 2
    assert found["lines"] == {"used": 48}
    assert "published" in (tmp_path / "report.html").read_text()
    # After a rollback, the previous version is served and learning follows it.
    route = run.routes[""]
    _, replaced = route.versions.rollback()
    route.follow_rollback()
    assert route.version == replaced


@pytest.mark.parametrize("resumed", [False, True])
def test_a_worse_candidate_and_forged_answers_change_nothing(tmp_path, tiny_target, resumed):
    first = start(tmp_path, tiny_target, noise=0.0)
    run = online_run(tmp_path, tiny_target, first, steps=2)
    log = tmp_path / "logs" / "a.jsonl"
    serve(tiny_target, tmp_path / "run" / "drafters", log, prompts(0, 12))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    torch.manual_seed(0)
    for number in range(12):
        ids = torch.randint(1, 257, (20,)).tolist()
        choice = lines[number]["response"]["choices"][0] | {"token_ids": ids}
        lines.append(lines[number] | {"id": f"forged{number}", "response": {"model": "t", "choices": [choice]}})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if resumed:
        run.intake.take(max_lines=10)
        run = online_run(tmp_path, tiny_target, first, steps=2)
    run.learn_once()
    # A drafter equal to the target cannot become better.
    assert run.routes[""].versions.current() == "0000"
    assert run.routes[""].counts["requests"] == 24
    assert {event["event"] for event in run.routes[""].versions.history()} <= {"published", "refused"}


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, tiny_target):
    weights = []
    for cut in (False, True):
        place = tmp_path / str(cut)
        place.mkdir()
        first = start(place, tiny_target)
        run = online_run(place, tiny_target, first, steps=2, max_lines=5, every_requests=8)
        serve(tiny_target, place / "run" / "drafters", place / "logs" / "a.jsonl", prompts(0, 28))
        if cut:
            for _ in range(3):
                run._take()
            # Work after the last saved state is lost with the process: here a batch without an update, and an update.
            assert (run.batches, run._saved) == (3, 2)
            run.routes[""].update()
            run = online_run(place, tiny_target, first, steps=2, max_lines=5, every_requests=8)
        run.learn_once()
        weights.append(run.routes[""].learner.state()["drafter"])
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


EAGER = {"every_requests": 32, "steps": 20, "min_held_out": 5, "window": 64, "keep_versions": 2, "significance": 0.1}
"""Settings with which the first and the third update are published."""


def write_log(target, log: Path, wanted: list[Prompt]) -> None:
    """Append the target's answers as `serve` does, decoded in one batch."""
    log.parent.mkdir(exist_ok=True)
    tasks = [Task(prompt.id, list(prompt.tokens), Sampling()) for prompt in wanted]
    with log.open("a") as file:
        for prompt, answer in zip(wanted, continuations(tasks, target, max_new_tokens=14, seed=0), strict=True):
            choice = {"message": {"role": "assistant", "content": None}, "token_ids": answer, "finish_reason": "length"}
            line = {
                "id": prompt.id,
                "request": {"model": "t", "prompt": list(prompt.tokens)},
                "response": {"model": "t", "choices": [choice]},
            }
            file.write(json.dumps(line) + "\n")


def killed_at_save(run: OnlineRun) -> None:
    """Learn from the next batch, and stop before the state is written."""

    def killed() -> None:
        raise Stopped

    run._save = killed
    with pytest.raises(Stopped):
        run._take()


def served_in_turn(run: OnlineRun) -> list[str]:
    return [one["version"] for one in run.routes[""].versions.history() if one["event"] == "published"]


@pytest.mark.long
def test_versions_published_before_a_kill_are_not_published_again(tmp_path, tiny_target):
    first = start(tmp_path, tiny_target, noise=0.6)
    run = online_run(tmp_path, tiny_target, first, **EAGER)
    write_log(tiny_target, tmp_path / "logs" / "a.jsonl", prompts(0, 96))
    killed_at_save(run)
    assert served_in_turn(run) == ["0000", "0001", "0002"]
    # The version from which a restart resumes was kept in spite of newer ones.
    run = online_run(tmp_path, tiny_target, first, **EAGER)
    run.learn_once()
    assert [row["promoted"] for row in metrics(tmp_path / "run")] == [True, False, True]
    assert served_in_turn(run) == ["0000", "0001", "0002"]
    assert run.routes[""].version == run.routes[""].versions.current() == "0002"
    assert run.routes[""].versions.names() == ["0001", "0002"]


@pytest.mark.long
def test_a_kill_after_the_first_publish_keeps_the_served_version(tmp_path, tiny_target):
    first = start(tmp_path, tiny_target, noise=0.6)
    run = online_run(tmp_path, tiny_target, first, **EAGER)
    write_log(tiny_target, tmp_path / "logs" / "a.jsonl", prompts(0, 32))
    killed_at_save(run)
    assert run.routes[""].versions.current() == "0001"
    # With every_minutes, the repeated update sees other requests, and the version may not be better on them.
    run = online_run(tmp_path, tiny_target, first, **EAGER | {"significance": 1e-9})
    run.learn_once()
    assert run.routes[""].version == run.routes[""].versions.current() == "0001"
    read_drafter((tmp_path / "run" / "drafters" / "current").resolve(), tiny_target)


@pytest.mark.long
def test_a_version_rolled_back_after_a_kill_is_not_published_again(tmp_path, tiny_target):
    first = start(tmp_path, tiny_target, noise=0.6)
    run = online_run(tmp_path, tiny_target, first, **EAGER)
    write_log(tiny_target, tmp_path / "logs" / "a.jsonl", prompts(0, 32))
    killed_at_save(run)
    assert run.routes[""].versions.rollback() == ("0001", "0000")
    run = online_run(tmp_path, tiny_target, first, **EAGER)
    run.learn_once()
    assert run.routes[""].version == run.routes[""].versions.current() == "0000"
    assert metrics(tmp_path / "run")[-1]["reason"] == "published before a restart, then rolled back"


@pytest.mark.long
def test_a_rollback_while_a_candidate_is_judged_is_respected(tmp_path, tiny_target):
    first = start(tmp_path, tiny_target, noise=0.6)
    run = online_run(tmp_path, tiny_target, first, **EAGER)
    log = tmp_path / "logs" / "a.jsonl"
    write_log(tiny_target, log, prompts(0, 96)[:64])
    run.learn_once()
    route, versions = run.routes[""], run.routes[""].versions
    assert versions.current() == "0001"

    class RolledBack(Versions):
        """Rolls the current version back as soon as a candidate is written."""

        def add(self, *args, **kwargs):
            version = super().add(*args, **kwargs)
            self.rollback()
            return version

    route.versions = RolledBack(versions.folder)
    write_log(tiny_target, log, prompts(0, 96)[64:])
    run.learn_once()
    row = metrics(tmp_path / "run")[-1]
    assert (row["promoted"], row["reason"]) == (False, "another version was published or rolled back meanwhile")
    assert (versions.current(), versions.names()) == ("0000", ["0000", "0001"])
    route.follow_rollback()
    assert route.version == "0000"


def test_a_learner_refuses_a_folder_that_another_stage_uses(tmp_path, monkeypatch):
    monkeypatch.setattr("drafttrain.pipeline.folder.WAIT_SECONDS", 0.1)
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(DrafttrainError, match="another run is using this folder"),
    ):
        learn_online(load_recipe("online"), tmp_path / "run")


def test_leftovers_of_a_killed_learner_are_removed_by_the_next_one(tmp_path):
    left = tmp_path / "run" / "online" / ".state.pt.abc.part"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    with pytest.raises(DataError, match="no such file or folder"):
        learn_online(load_recipe("online", [f"data.sources.0.path={tmp_path / 'none'}"]), tmp_path / "run", once=True)
    assert not left.exists()


def test_an_update_is_due_after_the_clock_was_set_back(tmp_path, tiny_target):
    run = online_run(tmp_path, tiny_target, start(tmp_path, tiny_target), every_requests=None, every_minutes=5.0)
    route = run.routes[""]
    assert not route.update_is_due()
    route.updated_at -= 5 * 60
    assert route.update_is_due()
    route.updated_at += 24 * 60 * 60
    assert route.update_is_due()
