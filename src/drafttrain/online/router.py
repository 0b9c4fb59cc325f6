"""Chooses the drafter for a request: by its tag, or by the tokens of its prompt.

F = features (hashed token ids), R = routes
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.core.files import written_beside
from drafttrain.core.tensors import read_tensors
from drafttrain.core.texts import Record
from drafttrain.online.settings import RouterSettings

LR = 0.5
DECAY = 1e-4


class Router:
    """Chooses a route for each request. A serving stack loads it with `Router.load` and calls `route_of_prompt`."""

    def __init__(self, settings: RouterSettings) -> None:
        self.settings = settings
        self.routes = list(settings.routes)
        self.weights_FR = torch.zeros(settings.num_buckets, len(self.routes))
        self.bias_R = torch.zeros(len(self.routes))
        self.examples = 0

    def route(self, record: Record) -> str:
        """Return the route of a logged request."""
        if record.domain in self.routes:
            return record.domain
        return self.route_of_prompt(_prompt(record))

    def route_of_prompt(self, tokens: Sequence[int]) -> str:
        """Return the route of a prompt without a tag."""
        if self.settings.kind == "tag" or self.examples < self.settings.min_examples:
            return self.routes[0]
        logits_R = features(tokens, self.settings.num_buckets) @ self.weights_FR + self.bias_R
        return self.routes[int(logits_R.argmax())]

    def learn(self, records: Sequence[Record]) -> None:
        """Take one step of logistic regression for each tagged request."""
        if self.settings.kind == "tag":
            return
        for record in records:
            if record.domain in self.routes:
                bag_F = features(_prompt(record), self.settings.num_buckets)
                error_R = (bag_F @ self.weights_FR + self.bias_R).softmax(dim=-1)
                error_R[self.routes.index(record.domain)] -= 1
                self.weights_FR -= LR * (bag_F[:, None] * error_R + DECAY * self.weights_FR)
                self.bias_R -= LR * 0.1 * error_R
                self.examples += 1

    def save(self, path: Path) -> None:
        """Write the router as one safetensors file."""
        about = {"kind": self.settings.kind, "routes": json.dumps(self.routes), "examples": str(self.examples)}
        with written_beside(path) as temporary:
            save_file({"weights_FR": self.weights_FR, "bias_R": self.bias_R}, temporary, metadata=about)

    @staticmethod
    def load(path: Path, settings: RouterSettings) -> Router:
        """Load a router that `save` wrote."""
        router = Router(settings)
        tensors = read_tensors(path)
        router.weights_FR, router.bias_R = tensors["weights_FR"], tensors["bias_R"]
        with safe_open(path, framework="pt") as file:
            router.examples = int(file.metadata()["examples"])
        return router

    def state(self) -> dict[str, Tensor | int]:
        """Return the state for `restore`."""
        return {"weights_FR": self.weights_FR, "bias_R": self.bias_R, "examples": self.examples}

    def restore(self, state: dict[str, Tensor | int]) -> None:
        """Restore a state."""
        for name, value in state.items():
            setattr(self, name, value)


def features(tokens: Sequence[int], num_buckets: int) -> Tensor:
    """Return the hashed bag of token ids of a prompt, normalized to length 1."""
    buckets_T = (torch.tensor(list(tokens), dtype=torch.long) * 2654435761) % 2**32 % num_buckets
    bag_F = torch.bincount(buckets_T, minlength=num_buckets).float().log1p()
    return bag_F / bag_F.norm().clamp_min(1e-9)


def _prompt(record: Record) -> Sequence[int]:
    return record.tokens[: len(record.tokens) - sum(record.loss_mask)]
