"""Reads weights from safetensors files, whole or tensor by tensor, and refuses damaged ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: It is missing, truncated, not a safetensors file, or contains NaN or infinity.
    """
    with _readable(path):
        tensors = load_file(path)
    check_finite(tensors, where=str(path))
    return tensors


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors from reading a weights file into one that names the file."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: not a regular file")
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the weights cannot be read: {error}") from error


def load_into(module: nn.Module, path: Path) -> None:
    """Read a file into a module with exactly the same names, shapes and kinds of number.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or is an integer; or there is an unknown tensor, which
            engines would ignore silently.
    """
    load_named(module, read_tensors(path), where=str(path))


def load_named(module: nn.Module, stored: Mapping[str, Tensor], *, where: str) -> None:
    """Copy tensors into a module with exactly the same names, shapes and kinds of number.

    Args:
        where: What they were read from, for the error.

    Raises:
        CheckpointError: As for `load_into`.
    """
    wanted = module.state_dict()
    problems = [f"{name}: missing" for name in wanted if name not in stored]
    problems += [f"{name}: unknown" for name in stored if name not in wanted]
    for name, ours in wanted.items():
        theirs = stored.get(name)
        if theirs is None:
            continue
        if theirs.shape != ours.shape:
            problems.append(f"{name}: shape {list(theirs.shape)}, must be {list(ours.shape)}")
        elif theirs.is_floating_point() != ours.is_floating_point():
            problems.append(f"{name}: {theirs.dtype}, must be {ours.dtype}")
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors are wrong: {'; '.join(problems[:5])}")
    module.load_state_dict(stored)


def check_finite(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse weights that contain NaN or infinity.

    Raises:
        CheckpointError: Naming the tensors.
    """
    found = [f"{name}: {wrong}" for name, tensor in tensors.items() if (wrong := _not_finite(tensor))]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise CheckpointError(f"{where}: not weights: {'; '.join(found[:5])}{more}")


def _not_finite(tensor: Tensor) -> str | None:
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return None
    # The sum reads the tensor once. Single numbers are checked only if it is not finite (or overflows).
    summed = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    numbers = tensor if tensor.itemsize > 1 else tensor.to(summed)
    if bool(numbers.sum(dtype=summed).isfinite()):
        return None
    wrong = int((~numbers.isfinite()).sum())
    return f"{wrong} of {tensor.numel()} numbers are NaN or infinite" if wrong else None


def check_number_types(folder: Path) -> None:
    """Refuse integer or complex weights in a model folder: loaders would convert them to real numbers silently.

    Raises:
        CheckpointError: Naming the file and its first tensors.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with _readable(path), safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        wrong = [
            f"{name} ({kind})"
            for name, kind in kinds.items()
            if name.endswith(".weight") and kind[0] in "IUBC" and kind != "BF16"
        ]
        if wrong:
            raise CheckpointError(
                f"{path}: {len(wrong)} weights of integers or complex numbers, and config.json has no quantization_config: "
                f"{', '.join(wrong[:5])}"
            )


def elements_by_type(folder: Path) -> dict[str, int]:
    """Return, by safetensors' name of the type, how many numbers a model folder contains. Only headers are read."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _readable(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                kind = str(tensor.get_dtype())
                found[kind] = found.get(kind, 0) + math.prod(tensor.get_shape())
    return found


def shapes_in(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a model folder. Only headers are read."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _readable(path), safe_open(path, framework="pt") as file:
            found |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


class TensorFiles:
    """The tensors of a model folder by name, each read when needed.

    Raises:
        CheckpointError: A file is truncated or not a safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with _readable(path), safe_open(path, framework="pt") as file:
                self._file_of |= dict.fromkeys(file.keys(), path)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        path = self._file_of[name]
        with _readable(path), safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        check_finite({name: tensor}, where=str(path))
        return tensor


def tensors_named(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of a model folder that have these names; others are not read.

    Raises:
        CheckpointError: A file of weights is damaged.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _readable(path), safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
    return found
