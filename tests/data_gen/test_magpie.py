"""Questions that the target writes itself: the same bytes from the same seed, and only questions become prompts."""

import json

import pytest
from transformers import LlamaForCausalLM

from drafttrain.core.errors import DataError
from drafttrain.data_gen import shards
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.generate import _prompts, generate
from drafttrain.data_gen.settings import DataSettings, GenerateSettings
from drafttrain.data_gen.sources import Item
from drafttrain.data_gen.sources.jsonl import JSONLSettings
from drafttrain.data_gen.sources.magpie import Magpie, MagpieSettings
from drafttrain.target_model import Target, TargetSettings
from tests.conftest import random_llama
from tests.data_gen.chats import CHATML, chat_tokenizer


@pytest.fixture(scope="module")
def chat_target(tmp_path_factory) -> Target:
    """A random Llama that reads and ends turns of ChatML."""
    folder = tmp_path_factory.mktemp("chat_target")
    tokenizer = chat_tokenizer(CHATML)
    model: LlamaForCausalLM = random_llama(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Target.load(TargetSettings(model=str(folder)))


def settings(*prompts, **more) -> GenerateSettings:
    return GenerateSettings(
        prompts=list(prompts), num_records=12, max_new_tokens=4, batch_size=8, records_per_shard=16, **more
    )


def asked(target: Target, folder, *, number: int = 48):
    wanted = MagpieSettings(number=number, max_tokens=40)
    folder.mkdir(exist_ok=True, parents=True)
    return list(_prompts("data.generate.prompts", wanted, settings(wanted), target, folder, seed=0, length=400))


def written(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.with_name("prompts").glob("shard-*"))}


def test_every_prompt_is_a_question_in_the_targets_template(chat_target, tmp_path):
    found = asked(chat_target, tmp_path / "g")
    assert 0 < len(found) < 48
    texts = [chat_target.tokenizer.decode(prompt.tokens) for prompt in found]
    assert all(
        one.startswith("<|im_start|>user\n") and one.endswith("<|im_end|>\n" + "<|im_start|>assistant\n")
        for one in texts
    )
    assert all(one.count("<|im_end|>") == 1 for one in texts)
    assert len(set(texts)) == len(texts)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "g" / "quarantine.jsonl").read_text().splitlines()]
    assert len(reasons) == 48 - len(found)
    assert any(reason.startswith("unfinished") for reason in reasons)


def test_a_killed_run_goes_on_with_the_same_questions(chat_target, tmp_path, monkeypatch):
    whole = asked(chat_target, tmp_path / "whole" / "g")
    store, stored = shards._store, []

    def dies(folder, number, *more):
        if stored:
            raise KeyboardInterrupt
        stored.append(number)
        store(folder, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_store", dies)
        with pytest.raises(KeyboardInterrupt):
            asked(chat_target, tmp_path / "killed" / "g")
    assert len(written(tmp_path / "killed" / "g")) == 1
    assert asked(chat_target, tmp_path / "killed" / "g") == whole
    assert written(tmp_path / "killed" / "g") == written(tmp_path / "whole" / "g")


def test_questions_and_files_are_mixed_by_weight(chat_target, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"id": "file:{i}", "question": "{i}?"}}\n' for i in range(40)))
    file = JSONLSettings(path=str(tmp_path / "p.jsonl"), weight=3)
    asks = settings(MagpieSettings(number=48, max_tokens=40), file)
    folder = generate(asks, chat_target, tmp_path / "g", seed=0, max_length=400)
    ids = [json.loads(line)["id"] for path in sorted(folder.glob("shard-*")) for line in path.read_text().splitlines()]
    assert [sum(id.startswith(kind) for id in ids) for kind in ("magpie:", "file:")] == [3, 9]
    questions = tmp_path / "prompts.0" / "shard-00000.jsonl"
    date = questions.stat().st_mtime_ns
    asks.num_records = 4
    generate(asks, chat_target, folder, seed=0, max_length=400)
    assert questions.stat().st_mtime_ns == date, "fewer answers need no new questions"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("why", "unfinished"),
        (" <|im_end|>", "empty"),
        ("a<|im_start|>b<|im_end|>", "special"),
        ("Why  me?<|im_end|>", None),
        (" why me?\n<|im_end|>", "repeated"),
    ],
)
def test_what_is_no_question_is_quarantined(text, reason):
    coder = Encoder(chat_tokenizer(CHATML), 400)
    source = Magpie(MagpieSettings(path="unread"))
    ids = coder.tokenizer(text, add_special_tokens=False).input_ids
    earlier = coder.tokenizer("Why me?<|im_end|>", add_special_tokens=False).input_ids if reason == "repeated" else None
    for tokens in filter(None, [earlier]):
        source.prompts(Item("", {"id": "question:0", "tokens": tokens, "loss_mask": [1] * len(tokens)}), coder)
    item = Item("", {"id": "question:1", "tokens": ids, "loss_mask": [1] * len(ids)})
    if reason is None:
        ((id, tokens),) = source.prompts(item, coder)
        assert (id, coder.tokenizer.decode(tokens)) == (
            "magpie:1",
            "<|im_start|>user\nWhy  me?<|im_end|>\n<|im_start|>assistant\n",
        )
    else:
        with pytest.raises(Exception, match=reason):
            source.prompts(item, coder)


def test_a_target_without_a_chat_template_is_refused(tiny_target, tmp_path):
    with pytest.raises(DataError, match=r"no chat template.*magpie"):
        asked(tiny_target, tmp_path / "g")


def test_questions_are_no_training_text():
    (problem,) = DataSettings(sources=[MagpieSettings()]).check()
    assert "questions of magpie have no answers" in problem
