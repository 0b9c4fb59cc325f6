"""A model on the meta device, and loading some of its weights from its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.tensors import TensorFiles
from drafttrain.target_model.anatomy import final_norm
from drafttrain.target_model.attention import refuse_attention
from drafttrain.target_model.folder_checks import check_causal_lm, in_one_line
from drafttrain.target_model.multimodal import wraps_language_model

META = torch.device("meta")


def meta_model(folder: Path, *, dtype: str, attention: str, trust_remote_code: bool, device: torch.device) -> Any:
    """Return the causal LM of a folder on the meta device, without weights.

    Buffers that are computed and not stored, such as rotary frequencies, are on `device`.

    Raises:
        CheckpointError: The folder's configuration does not give a causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    check_causal_lm(folder, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        given = config.dtype or "float32" if dtype == "stored" else dtype
        with META:
            model: Any = AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, given) if isinstance(given, str) else given,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # broken configurations raise anything
        refuse_attention(folder, attention, trust_remote_code=trust_remote_code)
        raise CheckpointError(
            f"{folder}: cannot build a causal LM from its configuration: {in_one_line(error)}"
        ) from error
    if wraps_language_model(config) or getattr(config, "quantization_config", None):
        what = "a multimodal model" if wraps_language_model(config) else "a quantized model"
        raise CheckpointError(
            f"{folder}: single weights of {what} cannot be loaded: use train.target_placement: replicated"
        )
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    _compute_buffers(model, device)
    return model.eval().requires_grad_(False)


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that are not stored in files."""
    for name, buffer in list(model.named_buffers()):
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent)._buffers[own] = torch.empty_like(buffer, device=device)
    # Weights on the meta device are also drawn. The run's own random numbers must not depend on it.
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()


def outer_modules(model: Any) -> list[nn.Module]:
    """Return the modules outside the blocks: embedding, final norm, head."""
    return [model.get_input_embeddings(), final_norm(model), model.get_output_embeddings()]


def stored_tensors(*modules: nn.Module) -> list[Tensor]:
    """Return the weights of modules, and the buffers that are stored in files."""
    return [tensor for module in modules for _, tensor in _named(module)]


def load_tensors(model: Any, wanted: Iterable[Tensor], files: TensorFiles, *, device: torch.device) -> None:
    """Replace these tensors of a model on the meta device by those in the files. Tied tensors stay tied.

    Raises:
        CheckpointError: A tensor is not in the files under a known name, or has another shape there.
    """
    in_files = _names_in_files(model, files)
    names: dict[int, list[str]] = {}
    for name, tensor in _named(model):
        names.setdefault(id(tensor), []).append(name)
    ids, read = {id(tensor) for tensor in wanted}, dict[int, Any]()
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for own, tensor in list(tensors.items()):
                if id(tensor) not in ids:
                    continue
                if id(tensor) not in read:
                    name = next((name for name in names[id(tensor)] if name in in_files), names[id(tensor)][0])
                    read[id(tensor)] = _read(model, name, in_files.get(name), tensor, files, device)
                tensors[own] = read[id(tensor)]


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    kept = module.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _names_in_files(model: Any, files: TensorFiles) -> dict[str, str]:
    """Return the name in the files of each tensor that needs no conversion: transformers renames some on loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = model.state_dict()
    entries = get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    found: dict[str, str] = {}
    for name in files.names():
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, converted = name, None
        if converted is None:
            found[renamed] = name
    return found


def _read(
    model: Any, name: str, stored: str | None, tensor: Tensor, files: TensorFiles, device: torch.device
) -> Tensor:
    if stored is None:
        raise CheckpointError(
            f"{files.folder}: no tensor for {name} in its files: {type(model).__name__} is converted on loading, so single "
            "weights cannot be loaded: use train.target_placement: replicated"
        )
    value = files.read(stored)
    if value.shape != tensor.shape:
        raise CheckpointError(
            f"{files.folder}: {stored} has shape {list(value.shape)}, the model needs {list(tensor.shape)}"
        )
    value = value.to(device, tensor.dtype)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
