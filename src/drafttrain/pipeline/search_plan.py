"""What the search of a drafter costs that has no weights to train, before anything large is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from drafttrain.config.recipe import Recipe
from drafttrain.core.errors import RecipeError
from drafttrain.core.generations import ForwardShape, Work
from drafttrain.core.gpus import RESERVED_BYTES, Gpu
from drafttrain.drafters import drafters
from drafttrain.pipeline.plan import UTILIZATION, size_in_gb
from drafttrain.target_model.anatomy import trunk
from drafttrain.target_model.growing_layer import GrowingCache, GrowingLayer
from drafttrain.target_model.model_weights import ModelWeights
from drafttrain.target_model.sized_target import SizedTarget


@dataclass(frozen=True)
class SearchPlan:
    """The cost of a search on one device; of a sublayer set at equal distances, whose size every set has."""

    recipe: Recipe
    gpu: Gpu | None
    """None: a CPU, of which neither peak nor memory is known."""
    utilization: float
    target_bytes: int
    cache_bytes: int
    """Keys and values of the texts before the windows, at most."""
    activation_bytes: int
    """Of the call that reads these texts, about: four states and three rows of an MLP for each token."""
    logits_bytes: int
    """Of the windows."""
    set_work: Work
    """Of scoring one set."""

    processes = 1

    @property
    def memory(self) -> int:
        """Bytes at the peak: the texts are read before windows are scored. A GPU's context and fragmentation come on top."""
        return self.target_bytes + self.cache_bytes + max(self.activation_bytes, self.logits_bytes)

    @property
    def set_seconds(self) -> float | None:
        """Time to score a set: its operations at the utilization, or its bytes at the memory's bandwidth if that is longer."""
        if self.gpu is None:
            return None
        computing = self.set_work.flops / (self.gpu.peak_flops * self.utilization)
        return max(computing, self.set_work.bytes_read / self.gpu.bandwidth)

    def changes(self) -> list[str]:
        """Return what to change if it does not fit on the GPU; empty: it fits, or it is for a CPU."""
        if self.gpu is None or self.gpu.holds(self.memory):
            return []
        return ["fewer texts (train.batch_size)", "shorter texts (data.max_length)", "a larger GPU"]

    def figures(self) -> Iterator[tuple[str, str]]:
        """Yield what is counted, and each figure."""
        train, settings = self.recipe.train, self.recipe.drafter
        yield "parameters that are trained", "0"
        yield "weights of the target", f"{size_in_gb(self.target_bytes)} GB"
        yield f"keys and values of {train.batch_size} texts, at most", f"{size_in_gb(self.cache_bytes)} GB"
        yield (
            f"activations of the call that reads {train.batch_size} texts, about",
            f"{size_in_gb(self.activation_bytes)} GB",
        )
        yield f"logits of {train.batch_size} windows of {settings.window} tokens", f"{size_in_gb(self.logits_bytes)} GB"
        yield "all together at the peak of a step", f"{size_in_gb(self.memory)} GB"
        if self.gpu is not None:
            yield "CUDA's context and fragmentation, about", f"{size_in_gb(RESERVED_BYTES)} GB"
        yield "TFLOP to score a set", f"{self.set_work.flops / 1e12:.3g}"
        if self.gpu is not None and self.set_seconds is not None:
            peak = f"{self.utilization:.0%} of {self.gpu.peak_flops / 1e12:,.0f} TFLOP/s"
            yield f"seconds to score a set, at {peak}", f"{self.set_seconds:.3g}"
            yield f"minutes of {train.max_steps:,} sets, at most", f"{train.max_steps * self.set_seconds / 60:.2g}"


def search_plan_of(recipe: Recipe, gpu: Gpu | None, *, utilization: float = UTILIZATION) -> SearchPlan:
    """Return what the search of a recipe's drafter costs; of the target only its config.json is read.

    Raises:
        RecipeError: The recipe names no target.
        CheckpointError: There is no config.json of the target, or it describes a model whose sublayers cannot be skipped.
    """
    if recipe.target.model is None:
        raise RecipeError(recipe.name, ["target.model: a plan needs the sizes of a target, and there is none"])
    component = cast(Any, drafters.entry(recipe.drafter.kind).component)
    texts, window = recipe.train.batch_size, recipe.drafter.window
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        target = SizedTarget.of(recipe.target, device_type="cpu" if gpu is None else "cuda")
        drafter = component.sized(recipe.drafter, target=target, tokenizer=target.tokenizer)
        model, cache = target.model, GrowingCache()
        trunk(model)(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        layers = cast(list[GrowingLayer], cache.layers)
        token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)
        context = max(0, recipe.data.max_length - window - 1)
        shape = ForwardShape.of(
            [window] * texts, [context] * texts, num_layers=drafter.num_blocks, head_rows=window * texts
        )
        weights, config = ModelWeights(model), model.config.get_text_config()
        width = int(config.hidden_size)
        wide = int(getattr(config, "intermediate_size", None) or 4 * width)
        work = weights.work(shape, cache_bytes=token_bytes, without=weights.of_sublayers(*drafter.skipped_modules()))
        return SearchPlan(
            recipe,
            gpu,
            utilization,
            target_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            cache_bytes=token_bytes * texts * recipe.data.max_length,
            activation_bytes=texts * recipe.data.max_length * (4 * width + 3 * wide) * model.dtype.itemsize,
            logits_bytes=texts * window * target.vocab_size * model.dtype.itemsize,
            set_work=work,
        )
