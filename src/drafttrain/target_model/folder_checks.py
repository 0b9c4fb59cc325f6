"""Checks that a folder contains a causal LM. If not, one sentence names what it contains and what to give instead.

Only file names and configurations are read, so it takes no longer for 100 GB.
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
from drafttrain.target_model.mimo import MIMO, register_mimo

INDEX = "model.safetensors.index.json"
MERGE = (
    'merge it, and give the merged folder: python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import '
    "AutoTokenizer as T; M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}.merged'); "
    "T.from_pretrained('{tokenizer}').save_pretrained('{folder}.merged')\""
)
LONGEST_SENTENCE = 300


def check_model_files(folder: Path) -> None:
    """Refuse a folder without the configuration and weights of a model.

    Raises:
        CheckpointError: Says in one sentence what it contains, and what to give instead.
    """
    names = sorted(path.name for path in folder.iterdir())
    if reason := _no_configuration(folder, names) or _no_weights(folder, names):
        raise CheckpointError(f"{folder}: {reason}")


def check_causal_lm(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a folder without a causal LM that can be loaded here.

    Raises:
        CheckpointError: Says in one sentence what it contains, and what to give instead.
    """
    check_model_files(folder)
    check_folder(folder)
    config = read_json(folder / "config.json")
    if reason := _other_architecture(config, trust_remote_code=trust_remote_code) or _cannot_be_unpacked(config):
        raise CheckpointError(f"{folder}: {reason}")


def no_folder(name: str) -> str | None:
    """Return what a path is if it is not a folder; None: it is a folder, or does not exist."""
    path = Path(os.path.expanduser(name))  # an unknown user leaves the name as it is
    if path.is_dir() or not path.exists():
        return None
    return "is a file: give the folder with config.json and *.safetensors, or a GGUF file"


def in_one_line(error: BaseException) -> str:
    """Return the message of another library's error in one line."""
    words = " ".join(str(error).split())
    if isinstance(error, KeyError | ArithmeticError | AssertionError | TypeError | AttributeError) or not words:
        # Their messages alone are a name or nothing, and do not explain the problem.
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
    if files := [name for name in names if name.endswith(".gguf")]:
        return f"contains GGUF files: give one of them ({folder / files[0]}), or the folder with config.json and *.safetensors"
    if "params.json" in names or any(name.endswith((".pth", ".nemo", ".distcp")) for name in names):
        return "is not in Hugging Face's layout (no config.json): convert it first"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"no config.json here: not a model folder (it contains {shown})"


def _adapter(folder: Path) -> str:
    """Return how to turn a folder with only an adapter into a model."""
    held = read_json(folder / "adapter_config.json")
    kind, base = held.get("peft_type") or "LoRA", held.get("base_model_name_or_path")
    if isinstance(base, str) and len(base) > LONGEST_SENTENCE:
        return f"is an adapter, and its base_model_name_or_path is not the name of a model: {shown(base)}"
    what = (
        f"is an adapter ({kind if isinstance(kind, str) else shown(kind):.60}, adapter_config.json), not a whole model"
    )
    if not isinstance(base, str) or not base:
        return (
            f"{what}, and names no base model: add base_model_name_or_path to adapter_config.json, then merge the two"
        )
    if (base.startswith((".", "/", "~")) or base.count("/") != 1) and not os.path.isdir(os.path.expanduser(base)):
        return f"{what}, and its base model {base!r} is not here: copy it, or fix base_model_name_or_path, then merge the two"
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return f"{what}, for {base}: {MERGE.format(folder=folder, tokenizer=folder if own else base)}"


def _no_weights(folder: Path, names: list[str]) -> str | None:
    if INDEX in names:
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, Mapping):
            return f"{INDEX}: weight_map must map tensors to files"
        if missing := sorted({str(file) for file in shards.values()} - set(names)):
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            return f"{len(missing)} of {len(set(shards.values()))} files named in {INDEX} are missing: {shown}: fetch them again"
    if any(name.endswith(".safetensors") for name in names):
        return None
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"no *.safetensors here (pickled weights are not read: {pickled[0]}): load it with transformers and "
            "save it with save_pretrained"
        )
    return "no *.safetensors here: a configuration without weights"


def _other_architecture(config: Mapping[str, Any], *, trust_remote_code: bool) -> str | None:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_MAPPING_NAMES as HEADLESS,
    )

    kind = config.get("model_type")
    listed = config.get("architectures") or [kind]
    name = str(listed[0])
    if kind == MIMO:
        # Its own code is not needed.
        register_mimo()
        return None
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        if trust_remote_code or kind in CAUSAL:
            return None
        return f"{name} comes with its own code (auto_map): read it, then set target.trust_remote_code: true"
    if kind is None:
        return "config.json: model_type is missing: not a transformers model"
    if kind not in CONFIG_MAPPING_NAMES:
        return f"config.json: transformers {__version__} does not know model_type {kind!r}"
    if kind in WITH_IMAGES and f"{kind}_text" in HEADLESS:
        # Its language model may have no class with a head, and older files have no text_config.
        return None
    if config.get("is_encoder_decoder") or (
        kind not in CAUSAL and name.endswith("ForConditionalGeneration") and "text_config" not in config
    ):
        return f"{name} is an encoder-decoder model (seq2seq): drafters are trained for decoder-only language models"
    if kind in MASKED and not config.get("is_decoder"):
        return f"{name} is an encoder (model_type {kind}): drafters are trained for decoder-only language models"
    inner = (config.get("text_config") or {}).get("model_type")
    if kind not in CAUSAL and inner not in CAUSAL:
        where = f", nor has {inner!r} inside it" if inner else ""
        return f"transformers has no causal language model for {name} (model_type {kind}){where}"
    return None


def _cannot_be_unpacked(config: Mapping[str, Any]) -> str | None:
    """Return why quantized weights cannot be used here; None: they can."""
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
        return (
            f"quantized by {method!r}, which transformers does not support: give the weights from before quantization"
        )
    return _refusal_of(
        lambda: AutoHfQuantizer.from_config(json.loads(json.dumps(given)), pre_quantized=True).validate_environment(
            device_map=None, dtype=None
        ),
        f"quantized by {method}",
    )


def _refusal_of(check: Callable[[], Any], what: str) -> str | None:
    """Return why a library cannot do something here; None: it can."""
    try:
        check()
    except Exception as error:  # each method has its own checks
        return f"{what}: {in_one_line(error)}; or give the weights from before quantization"
    return None
