"""The small serving stack of the loop test: in every form of the protocol it sends the text of its engine, and its log can be read."""

from __future__ import annotations

import asyncio
import json
import shutil
from importlib import resources
from pathlib import Path

import aiohttp
import pytest

from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.sources import sources
from drafttrain.online.versions import Versions, publish_first
from drafttrain.recorder.capture import events
from drafttrain.recorder.intake import Intake
from drafttrain.target_model import Target, TargetSettings
from tests.online.target_server import TargetServer, own_texts
from tests.recorder.openai_server import post, recorded, served

FORMS = [
    {"prompt": "import os\n", "stream": False},
    {"prompt": "class Queue:\n", "stream": True},
    {"messages": [{"role": "user", "content": "What is a list?"}], "stream": False},
    {"messages": [{"role": "user", "content": "What is a dict?"}], "stream": True},
]


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load(TargetSettings(model="builtin:target"))


def read(body: bytes, *, stream: bool) -> str:
    """Return the text that a client receives."""
    choices = [json.loads(one)["choices"][0] for one in (events(body.decode()) if stream else [body.decode()])]
    assert not any("token_ids" in one for one in choices), "only the recorder requested ids"
    parts = [one.get("text", (one.get("delta") or one.get("message") or {}).get("content")) for one in choices]
    return "".join(parts)


async def asked(server: TargetServer, versions: Versions, logs: Path) -> list[str]:
    """Send requests in every form through the recorder. Publish another version in the middle."""
    texts = []
    first = versions.path(versions.current())
    async with (
        served(server.app()) as upstream,
        recorded(upstream, logs, token_ids=True) as (address, _),
        aiohttp.ClientSession() as session,
    ):
        for number, form in enumerate(FORMS):
            if number == 2:
                versions.publish(
                    versions.add(lambda folder: shutil.copytree(first, folder, dirs_exist_ok=True), update=1)
                )
            request = form | {"model": "target", "max_tokens": 12}
            texts.append(read(await post(session, address, request), stream=form["stream"]))
    return texts


def test_every_form_returns_the_targets_own_text_and_the_log_holds_its_ids(tmp_path: Path, target: Target) -> None:
    versions = Versions(tmp_path / "drafters")
    publish_first(versions, Path(str(resources.files("drafttrain") / "builtin" / "drafter")))
    server = TargetServer(target, versions.folder)
    received = asyncio.run(asked(server, versions, tmp_path / "logs"))
    answered = server.answered
    assert [one.version for one in answered] == ["0000", "0000", "0001", "0001"]
    own = own_texts(target, [one.generation for one in answered])
    assert [list(map(int, one.generation.tokens)) for one in answered] == own
    assert received == [target.tokenizer.decode(ids, skip_special_tokens=True) for ids in own]
    settings = sources.entry("serving_logs").settings(path=str(tmp_path / "logs"))
    intake = Intake(settings, Encoder(target.tokenizer, 96), tmp_path / "intake")
    assert intake.take() == len(FORMS)
    expected = [[*one.generation.prompt_tokens, *ids] for one, ids in zip(answered, own, strict=True)]
    assert [list(one.record.tokens) for one in intake.served()] == expected
