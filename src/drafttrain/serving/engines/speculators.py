"""The speculators library, which trains and loads drafters in its own format: its logits, for comparison with drafttrain's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from drafttrain.core.tensors import read_tensors
from drafttrain.environments.environment import ask
from drafttrain.environments.known import SPECULATORS
from drafttrain.serving.engines import Loader, libraries


@dataclass
class Speculators:
    """The library speculators."""


@libraries.register("speculators", Speculators)
class SpeculatorsLibrary(Loader):
    """Computes the logits of a drafter folder; it serves nothing."""

    environment = SPECULATORS
    worker = Path(__file__).with_name("speculators_worker.py")
    formats = ("speculators",)
    methods: ClassVar[Mapping[str, str]] = {"eagle3": "eagle3"}

    def logits(
        self, folder: Path, features_BTF: Tensor, tokens_BT: Tensor, *, num_steps: int, work: Path
    ) -> list[Tensor]:
        """Return logits_BTR of every draft step for one row.

        Args:
            features_BTF: The tapped states of the target, concatenated.
            tokens_BT: For each position the next token, which the first step embeds.
            work: Folder for the files that are exchanged.

        Raises:
            EngineError: The library is not installed here, or cannot load the folder.
        """
        from safetensors.torch import save_file

        asked, answered = (work.resolve() / name for name in ("asked.safetensors", "answered.safetensors"))
        save_file({"features": features_BTF.contiguous(), "tokens": tokens_BT.contiguous()}, asked)
        request: dict[str, Any] = {"folder": str(folder.resolve()), "num_steps": num_steps}
        ask(self.environment, self.worker, request | {"asked": str(asked), "answered": str(answered)})
        held = read_tensors(answered)
        return [torch.as_tensor(held[f"logits.{step}"]) for step in range(num_steps)]
