"""The tiny target of the tests: a random Llama with a byte-level tokenizer, as a real folder on disk."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drafttrain.target_model import Target, TargetSettings

torch.set_num_threads(1)

# DeepSpeed chooses its device once a process, also while a test lets torch see GPUs that are not there.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# Property-based tests try the same cases in every run, however long a busy machine takes.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("repeatable")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes and one end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {symbol: index + 1 for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def random_llama(*, seed: int = 0, num_layers: int = 2, vocab_size: int = 257, hidden_size: int = 32) -> Any:
    """Return a random Llama; weights larger than usual, so that its laws are far from flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of cases and real data beside the project; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Draws without a generator of their own are the same in every run, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def evaluated_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fit` evaluate in this process."""
    # It imports most of the package, which few tests need.
    from tests.evaluated_here import evaluate_here

    evaluate_here(monkeypatch)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target's folder."""
    folder = tmp_path_factory.mktemp("tiny_target")
    random_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_target(tiny_folder: Path) -> Target:
    """The tiny target, loaded."""
    return Target.load(TargetSettings(model=str(tiny_folder)))


@pytest.fixture(scope="session")
def save_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes a random Llama and its tokenizer, and returns the folder."""

    def save(**kwargs: Any) -> Path:
        folder = tmp_path_factory.mktemp("llama")
        random_llama(**kwargs).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return save
