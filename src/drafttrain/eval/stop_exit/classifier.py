"""The classifiers of a controller, one for each layer: training, file, and what they predict.

N = rows, D = hidden
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.core.random import stream
from drafttrain.core.tensors import load_into
from drafttrain.eval.stop_exit.labels import Action, LabelledRows
from drafttrain.target_model import Target

CONFIG, WEIGHTS, KIND = "config.json", "model.safetensors", "stop_exit"
ROWS_A_STEP = 1024


class LayerClassifier(nn.Module):
    """Go on, exit or stop, from the state after the final norm: linear, or with one hidden layer.

    Source: Sun et al. 2024, When Neural Code Completion Models Size up the Situation, arXiv 2401.09964, for the three actions. The
        labels are this project's, and the target's own head is shared where the paper has intermediate ones.
    """

    mean_D: Tensor
    scale_D: Tensor

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(hidden_size))
        self.register_buffer("scale_D", torch.ones(hidden_size))
        inner: list[nn.Module] = [nn.Linear(hidden_size, width), nn.SiLU()] if width else []
        self.layers = nn.Sequential(*inner, nn.Linear(width or hidden_size, len(Action)))

    def forward(self, normed_ND: Tensor) -> Tensor:
        """Return the logit of each action, by row."""
        logits_N3: Tensor = self.layers((normed_ND.float() - self.mean_D) / self.scale_D)
        return logits_N3


class Classifiers(nn.Module):
    """One classifier for each layer."""

    def __init__(self, layers: Sequence[int], hidden_size: int, width: int = 0) -> None:
        super().__init__()
        self.chosen, self.hidden_size, self.width = list(layers), hidden_size, width
        self.by_layer = nn.ModuleDict({str(layer): LayerClassifier(hidden_size, width) for layer in layers})

    @torch.no_grad()
    def chances(self, layer: int, normed_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return (stop_N, exit_N): the chance that the completion would not be accepted; and, if it would, that the token is right."""
        logits_N3 = self.by_layer[str(layer)](normed_ND)
        stop_N = logits_N3.softmax(dim=-1)[:, Action.STOP]
        return stop_N, (logits_N3[:, Action.EXIT] - logits_N3[:, Action.GO_ON]).sigmoid()

    def save(self, folder: Path, target: Target) -> None:
        """Write config.json and model.safetensors."""
        config = {
            "kind": KIND,
            "layers": self.chosen,
            "hidden_size": self.hidden_size,
            "width": self.width,
            "made_for": {"target": target.name, "target_fingerprint": target.fingerprint},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_classifiers(folder: Path, target: Target) -> Classifiers:
    """Read the folder that `Classifiers.save` wrote.

    Raises:
        CheckpointError: It is missing or damaged, is of another kind, or was made for another target.
    """
    path = folder / CONFIG
    config: dict[str, Any] = read_json(path)
    if config.get("kind") != KIND:
        raise CheckpointError(f"{path}: kind must be {KIND!r}, got {config.get('kind')!r:.60}")
    try:
        made, layers = config["made_for"], [int(layer) for layer in config["layers"]]
        found = Classifiers(layers, int(config["hidden_size"]), int(config["width"]))
        fingerprint, name = str(made["target_fingerprint"]), str(made["target"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the configuration of a controller: {error!r}") from error
    if fingerprint != target.fingerprint:
        raise CheckpointError(
            f"{folder}: this controller was made for the target {name} ({fingerprint}), not {target.name} ({target.fingerprint}). "
            "Train one for this target, or pass the target that it was made for."
        )
    load_into(found, folder / WEIGHTS)
    return found.to(target.device).eval().requires_grad_(False)


def train_classifiers(rows: LabelledRows, *, width: int, steps: int, lr: float, seed: int) -> Classifiers:
    """Train every layer's classifier by cross entropy with AdamW on a cosine schedule; the target is not needed any more."""
    layers = list(rows.labels_N)
    hidden_size = rows.features_ND[layers[0]].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifiers = Classifiers(layers, hidden_size, width)
    for layer in layers:
        one, features_ND, labels_N = classifiers.by_layer[str(layer)], rows.features_ND[layer], rows.labels_N[layer]
        assert isinstance(one, LayerClassifier)
        one.mean_D.copy_(features_ND.mean(dim=0))
        one.scale_D.copy_(features_ND.std(dim=0).clamp_min(1e-6))
        optimizer = torch.optim.AdamW(one.parameters(), lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = stream(seed, "rows", layer)
        for _ in range(steps):
            drawn_N = torch.randint(len(labels_N), (ROWS_A_STEP,), generator=generator)
            loss = nn.functional.cross_entropy(one(features_ND[drawn_N]), labels_N[drawn_N])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return classifiers.eval().requires_grad_(False)
