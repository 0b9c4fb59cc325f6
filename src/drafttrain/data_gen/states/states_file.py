"""The file of a text's hidden states, as vLLM's connector writes it.

L = layers, T = tokens, D = hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from drafttrain.core.errors import DataError
from drafttrain.data_gen.states import TextStates
from drafttrain.target_model.folder_checks import in_one_line


def states_of_file(path: Path, text: Sequence[int], columns: Sequence[int], *, next_token: int) -> TextStates:
    """Return some layers of a text's file, and remove the file.

    Args:
        columns: Which of the file's layers.

    Raises:
        DataError: The file is of another text, or has other contents.
    """
    try:
        tensors = load_file(path)
        tokens, states_TLD = tensors["token_ids"].tolist(), tensors["hidden_states"][:, list(columns)]
    except (OSError, SafetensorError, KeyError, IndexError) as error:
        raise DataError(f"data.states: {path}: no states of a text: {in_one_line(error)}") from error
    if tokens != list(text):
        raise DataError(
            f"data.states: {path}: states of other tokens than were sent: {tokens[:8]}..., not {list(text)[:8]}..."
        )
    path.unlink()
    return TextStates(states_TLD, next_token)
