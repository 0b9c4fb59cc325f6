"""Logged speculative rounds: refused positions come from the log without any forward pass, and only those are learned."""

from __future__ import annotations

import json

import torch

from drafttrain.core.texts import Sampling
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.losses.forward_kl import ForwardKL
from drafttrain.online.learner import Learner
from drafttrain.online.positions import refused_positions
from drafttrain.online.run_files import metrics, status
from drafttrain.recorder.intake import Served
from drafttrain.training.settings import TrainSettings
from tests.online.test_learning import K, near_copy, refused_by_the_engine, serve
from tests.online.test_loop import online_run, start


def logged(records, rounds, log) -> None:
    """Write a log of these answers with the rounds of the engine."""
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        for record, of_record in zip(records, rounds, strict=True):
            drafted, accepted = ([getattr(one, n) for one in of_record] for n in ("num_draft_tokens", "num_accepted"))
            choice = {
                "message": {"role": "assistant", "content": None},
                "token_ids": [int(token) for token in record.tokens[3:]],
                "speculative": {"drafted": drafted, "accepted": accepted},
            }
            line = {
                "id": record.id,
                "request": {"model": "t", "prompt": list(record.tokens[:3])},
                "response": {"model": "t", "choices": [choice]},
            }
            file.write(json.dumps(line) + "\n")


def test_logged_refusals_equal_those_of_the_engine_and_cost_no_forward(tmp_path, tiny_target):
    first = start(tmp_path, tiny_target)
    run = online_run(tmp_path, tiny_target, first, positions="refused", held_out=0.01, implausible=None, steps=1)
    drafter = near_copy(tiny_target, noise=0.4)
    records, rounds = serve(tiny_target, drafter)
    logged(records, rounds, tmp_path / "logs" / "a.jsonl")
    assert run.intake.take() == len(records)
    requests: list[Served] = list(run.intake.served())
    route = run.routes[""]
    forwards: list[str] = []
    handles = [
        model.get_input_embeddings().register_forward_pre_hook(lambda *_, name=name: forwards.append(name))
        for name, model in (("target", tiny_target.model), ("drafter", route.serving.model))
    ]
    found = {one.record.id: list(one.record.refused) for one in route._with_refusals(requests)}
    assert forwards == []
    expected = {r.id: [3 + place for place in refused_by_the_engine(of)] for r, of in zip(records, rounds, strict=True)}
    assert found == {id: places for id, places in expected.items() if places}
    # Replay of the served drafter finds the same positions, at the cost of forwards.
    replayed = refused_positions(tiny_target, drafter, records, Sampling(), num_draft_tokens=K, seed=0)
    assert dict(zip(expected, replayed, strict=True)) == expected
    unknown = [Served(r, "", one.mark) for r, one in zip(records, requests, strict=True)]
    route._with_refusals(unknown)
    assert {"target", "drafter"} <= set(forwards), "without logged rounds both models run"
    for handle in handles:
        handle.remove()


def test_served_block_efficiency_equals_that_of_the_logged_rounds(tmp_path, tiny_target):
    first = start(tmp_path, tiny_target)
    run = online_run(tmp_path, tiny_target, first, every_requests=2, steps=1)
    records, rounds = serve(tiny_target, near_copy(tiny_target, noise=0.4))
    logged(records, rounds, tmp_path / "logs" / "a.jsonl")
    run.learn_once()
    expected = [
        sum(sum(record.loss_mask) for record in records[i : i + 2]) / sum(map(len, rounds[i : i + 2]))
        for i in range(0, len(records), 2)
    ]
    rows = metrics(tmp_path / "run")
    assert [row["served_block_efficiency"] for row in rows] == expected
    assert status(tmp_path / "run")["routes"][""]["served_block_efficiency"] == expected[-1] > 1


def test_only_rows_before_logged_refusals_get_a_gradient(tmp_path, tiny_target):
    first = start(tmp_path, tiny_target)
    run = online_run(tmp_path, tiny_target, first, positions="refused")
    records, rounds = serve(tiny_target, near_copy(tiny_target, noise=0.4))
    logged(records, rounds, tmp_path / "logs" / "a.jsonl")
    run.intake.take()
    seen: list[torch.Tensor] = []

    class Watched(CausalLMDrafter):
        def forward(self, batch):
            drafted = super().forward(batch)
            drafted.states_BTD[1].register_hook(seen.append)
            return drafted

    settings = TrainSettings(optimizer="sgd", lr=0.1, batch_size=4)
    learner = Learner(
        Watched(near_copy(tiny_target, noise=0.4).model),
        ForwardKL(),
        target=tiny_target,
        settings=settings,
        max_length=40,
        num_tokens=257,
    )
    places = {r.id: [3 + place for place in refused_by_the_engine(of)] for r, of in zip(records, rounds, strict=True)}
    record = next(one.record for one in run.intake.served() if places[one.record.id])
    step = learner.step([record], positions="refused")
    rows = seen[0][0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert rows == [place - 1 for place in places[record.id]]
    assert step.positions == len(rows) < sum(record.loss_mask)
