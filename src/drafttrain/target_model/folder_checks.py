"""What a folder holds that somebody gives as a model: a causal LM, or one sentence that says what it is instead and what to give.

Only names of files and configurations are read, so that it takes no longer for 100 GB.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import check_folder, read_json
from drafttrain.core.printable import shown

INDEX = "model.safetensors.index.json"
MERGE = (
    'merge it, and give the merged folder: python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import '
    "AutoTokenizer as T; M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}.merged'); "
    "T.from_pretrained('{tokenizer}').save_pretrained('{folder}.merged')\""
)
LONGEST_SENTENCE = 300


def check_model_files(folder: Path) -> None:
    """Refuse a folder that holds no configuration and weights of a model.

    Raises:
        CheckpointError: In one sentence: what it holds, and what to give instead.
    """
    names = sorted(path.name for path in folder.iterdir())
    if reason := _no_configuration(folder, names) or _no_weights(folder, names):
        raise CheckpointError(f"{folder}: {reason}")


def check_causal_lm(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a folder that holds no causal LM that can be loaded here.

    Raises:
        CheckpointError: In one sentence: what it holds, and what to give instead.
    """
    check_model_files(folder)
    check_folder(folder)
    config = read_json(folder / "config.json")
    if reason := _other_architecture(config, trust_remote_code=trust_remote_code) or _cannot_be_unpacked(config):
        raise CheckpointError(f"{folder}: {reason}")


def no_folder(name: str) -> str | None:
    """Return what a path is that is no folder; None: there is nothing."""
    path = Path(os.path.expanduser(name))  # where a user is unknown, the name stays
    if path.is_dir() or not path.exists():
        return None
    if path.suffix == ".gguf":
        return "is a GGUF file, which llama.cpp reads: give the folder with config.json and *.safetensors that it was made from"
    return "is a file: give the folder that holds config.json and *.safetensors"


def in_one_line(error: BaseException) -> str:
    """Return the message of another library as a part of a sentence."""
    words = " ".join(str(error).split())
    if isinstance(error, KeyError | ArithmeticError | AssertionError | TypeError | AttributeError) or not words:
        # Their words alone are a name, or nothing that tells what is wrong.
        words = f"{type(error).__name__}: {words}"
    return words if len(words) <= LONGEST_SENTENCE else f"{words[:LONGEST_SENTENCE]}..."


def _no_configuration(folder: Path, names: list[str]) -> str | None:
    weights = [name for name in names if name.endswith(".safetensors")]
    if "config.json" in names and not ("adapter_config.json" in names and weights == ["adapter_model.safetensors"]):
        return None
    if not names:
        return "is empty: give a folder with config.json and *.safetensors"
    if "adapter_config.json" in names:
        return _adapter(folder)
    if "model_index.json" in names:
        return "is a pipeline of diffusers (model_index.json), not a language model"
    if any(name.endswith(".gguf") for name in names):
        return "holds GGUF files, which llama.cpp reads: give the folder with config.json and *.safetensors that they were made from"
    if "params.json" in names or any(name.endswith((".pth", ".nemo", ".distcp")) for name in names):
        return "is not in the layout of Hugging Face (no config.json): convert it first"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"no config.json here: not a model folder (it holds {shown})"


def _adapter(folder: Path) -> str:
    """Return how a folder with an adapter alone becomes a model."""
    held = read_json(folder / "adapter_config.json")
    kind, base = held.get("peft_type") or "LoRA", held.get("base_model_name_or_path")
    if isinstance(base, str) and len(base) > LONGEST_SENTENCE:
        return f"is an adapter, and its base_model_name_or_path is no name of a model: {shown(base)}"
    what = (
        f"is an adapter ({kind if isinstance(kind, str) else shown(kind):.60}, adapter_config.json), not a whole model"
    )
    if not isinstance(base, str) or not base:
        return f"{what}, and names no base model: write base_model_name_or_path into adapter_config.json, then merge the two"
    if (base.startswith((".", "/", "~")) or base.count("/") != 1) and not os.path.isdir(os.path.expanduser(base)):
        return f"{what}, and its base model {base!r} is not here: bring it, or correct base_model_name_or_path, then merge the two"
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return f"{what}, for {base}: {MERGE.format(folder=folder, tokenizer=folder if own else base)}"


def _no_weights(folder: Path, names: list[str]) -> str | None:
    if INDEX in names:
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, Mapping):
            return f"{INDEX}: weight_map must map tensors to files"
        if missing := sorted({str(file) for file in shards.values()} - set(names)):
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            return f"{len(missing)} of {len(set(shards.values()))} files that {INDEX} names are missing: {shown}: fetch it again"
    if any(name.endswith(".safetensors") for name in names):
        return None
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"no *.safetensors here (pickled weights are not read: {pickled[0]}): load it by transformers and "
            "save_pretrained it"
        )
    return "no *.safetensors here: a configuration without weights"


def _other_architecture(config: Mapping[str, Any], *, trust_remote_code: bool) -> str | None:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    kind = config.get("model_type")
    listed = config.get("architectures") or [kind]
    name = str(listed[0])
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        if trust_remote_code or kind in CAUSAL:
            return None
        return f"{name} brings code of its own (auto_map): read it, then set target.trust_remote_code: true"
    if kind is None:
        return "config.json: model_type is missing: not a model of transformers"
    if kind not in CONFIG_MAPPING_NAMES:
        return f"config.json: transformers {__version__} does not know model_type {kind!r}"
    if config.get("is_encoder_decoder") or (
        kind not in CAUSAL and name.endswith("ForConditionalGeneration") and "text_config" not in config
    ):
        return f"{name} is an encoder with a decoder (seq2seq): drafters are trained for decoder-only language models"
    if kind in MASKED and not config.get("is_decoder"):
        return f"{name} is an encoder (model_type {kind}): drafters are trained for decoder-only language models"
    inner = (config.get("text_config") or {}).get("model_type")
    if kind not in CAUSAL and inner not in CAUSAL:
        where = f", nor has {inner!r} inside it" if inner else ""
        return f"transformers has no causal language model for {name} (model_type {kind}){where}"
    return None


def _cannot_be_unpacked(config: Mapping[str, Any]) -> str | None:
    """Return why quantized weights cannot be used here."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

    given = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        return "config.json: quantization_config must be a mapping"
    method = given.get("quant_method") or (
        "bitsandbytes" if "load_in_4bit" in given or "load_in_8bit" in given else None
    )
    if not isinstance(method, str):
        return "config.json: quantization_config names no quant_method"
    known = f"{method}_4bit" if method == "bitsandbytes" else method
    if known not in AUTO_QUANTIZER_MAPPING:
        return f"quantized by {method!r}, which transformers does not know: give the weights before they were quantized"
    return _said_by(
        lambda: AutoHfQuantizer.from_config(json.loads(json.dumps(given)), pre_quantized=True).validate_environment(
            device_map=None, dtype=None
        ),
        f"quantized by {method}",
    )


def _said_by(check: Callable[[], Any], what: str) -> str | None:
    """Return why a library cannot do something here; None: it can."""
    try:
        check()
    except Exception as error:  # each method checks what it wants in its own way
        return f"{what}: {in_one_line(error)}; or give the weights before they were quantized"
    return None
