"""Weights in files: read whole, or tensor by tensor, or named as damaged."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from drafttrain.core.errors import CheckpointError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: It is missing, truncated or none.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the weights cannot be read: {error}") from error


class TensorFiles:
    """The tensors of a model folder by name, each read alone.

    Raises:
        CheckpointError: A file is truncated or none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self._file_of |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: the weights cannot be read: {error}") from error

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        path = self._file_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
        return tensor
