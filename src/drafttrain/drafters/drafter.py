"""What every drafter offers, and the registry of the kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.registry import Registry
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.target_rows import RowsAsked, TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.drafters.lora import LoraAdapter, LoraSettings, linears_in, modules_named
from drafttrain.drafters.start_choice import StartChoice
from drafttrain.drafters.text_notes import TextNotes
from drafttrain.drafters.tuned_target import TunedTarget, tuned
from drafttrain.target_model import Target

drafters = Registry("drafter", "drafttrain.drafters")
DRAFTS = ("sampled", "greedy")
"""How a drafter drafts at temperature > 0: see `Drafter.draft`."""


class Drafter(nn.Module, ABC):
    """A trainable module that proposes the target's next tokens. `create` makes one, `load` reads one from a folder."""

    kind: ClassVar[str]
    lag: ClassVar[int]
    """Row t of depth d is the distribution of token t + d + lag: 0 if the drafter sees the root, 1 if it sees only features
    before it."""
    needs_target: ClassVar[bool] = False
    """It is created from its target and cannot be trained without one."""
    recomputes: ClassVar[bool] = False
    """Its forward reads `recomputing`: it has layers or steps whose activations can be computed again."""
    adapted_in: ClassVar[tuple[str, ...]] = ()
    """The parts whose linear layers can have adapters: a forward calls each of these layers as a module."""
    compiles: ClassVar[bool] = False
    """`compile_with` replaces parts of it."""
    reads_slots: ClassVar[bool] = False
    """In training, its forward computes only the positions that the rows of its loss need."""
    searched: ClassVar[bool] = False
    """It has no weights to train: `fit` calls `search` where it would train."""
    trains_partitioned: ClassVar[bool] = True
    """Its forward calls modules only, so that ZeRO stage 3 may partition its weights; False: it reads parts of weights."""
    trains_elsewhere: ClassVar[bool] = True
    """It can be trained on another device than its target's; False: its forward runs inside the target's."""
    writes_text: ClassVar[bool] = False
    """It reads nothing of the target, so that its `language_model` continues any text, also during training."""
    why_alone: ClassVar[str | None] = None
    """Why others cannot add nodes to its proposals; None: they can."""
    drafts_trees: ClassVar[bool] = True
    """Its proposer drafts a tree where a length policy asks for one."""
    draft: str = "sampled"
    """At temperature > 0: `sampled` draws from its distribution; `greedy` takes the argmax, as some engines draft."""
    drafts_strings: bool = False
    """It has its own tokenizer, and drafts any text: what it drew says nothing about the probability of the target's tokens."""
    layer_parallel_size: int = 1
    """Layers of its language model whose attention reads the same states while it drafts; 1: each reads those of the layer before."""
    rows_beside: int = 0
    """Rows of its own that the target's call reads beside every node."""
    figures: ClassVar[tuple[str, ...]] = ()
    """Further columns of metrics.csv: means over rows that the loss beside its drafts measures in training."""
    serving: ClassVar[str] = "No serving engine loads this kind: decode with `drafttrain eval DRAFTER`."
    """What its model card says about serving, next to the commands of the engines that run this kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lora: LoraAdapter | None = None
        """The adapters in training beside the drafter's own layers; None: the weights themselves are trained."""
        self.tuned: TunedTarget | None = None
        """The target in training with the drafter, whose `weights` are a part of it; None: the target stays as it is."""
        self.tuning: Path | None = None
        """Folder of what the target was tuned to, of a loaded drafter: it works only on that target. None: on the target as it is."""
        self.recomputing = False
        """The forward stores the inputs of its parts only (`recomputing.run_part`)."""

    @classmethod
    @abstractmethod
    def create(cls, settings: Any, *, target: Target | None, tokenizer: Any) -> Drafter:
        """Return the drafter as training starts from it."""

    def train_with(self, settings: Any, *, target: Target | None, tokenizer: Any) -> None:
        """Take from the settings what only training reads and no folder holds: of a loaded drafter that learns on."""

    @classmethod
    def sized(cls, settings: Any, *, target: Target, tokenizer: Any) -> Drafter:
        """Return a drafter of the sizes that `create` gives it, reading no weights: they are made where tensors have no data."""
        return cls.create(settings, target=target, tokenizer=tokenizer)

    @classmethod
    def for_training(cls, settings: Any, *, target: Target | None, tokenizer: Any, sized: bool = False) -> Drafter:
        """Return the drafter as training starts from it, with the adapters that its settings describe.

        Args:
            sized: Read no weights (see `sized`).
        """
        make: Any = cls.sized if sized else cls.create
        drafter: Drafter = make(settings, target=target, tokenizer=tokenizer)
        lora: LoraSettings | None = getattr(settings, "lora", None)
        if lora is not None:
            drafter.train_adapters(lora)
        return drafter

    @classmethod
    def why_whole_target(cls, settings: Any) -> str | None:
        """Return why these settings need the target's blocks themselves; None: the target's outputs are enough."""
        key = cls.tuned_by(settings)
        return None if key is None else f"{key}: the target's own blocks are trained"

    @classmethod
    def tuned_by(cls, settings: Any) -> str | None:
        """Return the key of these settings that trains the target itself (`tuned_target`); None: it stays as it is."""
        return None

    @classmethod
    def notes(cls, settings: Any) -> TextNotes | None:
        """Return what the target notes about the training texts before a training with these settings; None: nothing."""
        return None

    @classmethod
    def start_choice(cls, settings: Any) -> StartChoice | None:
        """Return what these settings leave to be chosen on training texts before `create`; None: nothing."""
        return None

    @classmethod
    def predicts_confidence(cls, settings: Any) -> bool:
        """Return whether a drafter with these settings predicts its own acceptance: `DraftOutput.confidence_BT`."""
        return False

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    @property
    def deepest(self) -> int | None:
        """The most draft tokens per round; None: no limit, it continues from its own tokens."""
        return None

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's id of each token in the drafter's own vocabulary; None: the vocabularies are the same."""
        return None

    @property
    def compares_with_target(self) -> bool:
        """Training reads the target's distribution, even if the loss does not."""
        return False

    def draft_strings(self) -> bool:
        """Draft any text from now on, also what the target's tokenizer splits differently; return whether the drafter can."""
        return False

    def run_layers_parallel(self, size: int) -> None:
        """From now on, draft with the attention of `size` layers on the same states.

        Raises:
            CheckpointError: It has no such layers.
        """
        raise CheckpointError(
            f"eval.layer_parallel_size: {size} is for a causal_lm, not for drafter.kind {self.kind}. Set 1"
        )

    @property
    def replayable(self) -> bool:
        """Its forward gives the distributions that it drafts from: not of strings, nor with layers in parallel."""
        return not self.drafts_strings and self.layer_parallel_size == 1

    @property
    def language_model(self) -> Any:
        """The Hugging Face causal LM that writes text."""
        raise NotImplementedError(f"{self.kind}: writes_text is False")

    def needs(self) -> TargetNeeds:
        """Return what this drafter reads from the target in training. The loss adds its own needs."""
        return TargetNeeds()

    def rows_asked(self) -> Sequence[RowsAsked]:
        """Return which rows training reads: first those of the loss, then those of the drafter's own forward.

        These rows are found on the host before a batch is sent to a device. Finding others makes the host wait.
        """
        return [RowsAsked((1,), self.lag)]

    def why_not_cached(self) -> str | None:
        """Return why the target outputs that this drafter reads cannot be cached before training; None: they can."""
        return "it reads the target's logits of every token" if self.needs().logits else None

    def fit_vocabulary(self, label_counts: Callable[[], Any]) -> None:
        """Choose the drafter's vocabulary before its initial weights are written. Most kinds use the target's.

        Args:
            label_counts: Computes how often each token id is a label in training.
        """

    def with_own_text(self, batch: DraftBatch) -> DraftBatch:
        """Return a batch with its text in the drafter's own tokens, if these differ from the target's. Call it on the host."""
        return batch

    @abstractmethod
    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of every depth."""

    @abstractmethod
    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer that drafts for this target at inference."""

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the matrix products of a training step, head included, as `core.flops` counts them.

        By default every weight is used at every position.
        """
        yield matrix(parameters_of(self), shape.positions, gradients=2)

    def work(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of a training step: those of `products`, without the gradients of frozen weights, and of adapters.

        Adapters are counted at every position, as if their layers were called once there.
        """
        if self.lora is None:
            yield from self.products(shape)
            return
        for each in self.products(shape):
            yield replace(each, gradients=min(each.gradients, 1)) if each.of_weights else each
        yield matrix(parameters_of(self.lora), shape.positions, gradients=2)

    def adaptable(self) -> dict[str, nn.Linear]:
        """Return the linear layers that can have adapters, by their full name."""
        return {name: layer for name, layer in linears_in(self).items() if name.partition(".")[0] in self.adapted_in}

    def train_adapters(self, settings: LoraSettings) -> None:
        """Freeze the weights, and train adapters beside them. From now on, `save` and `proposer` use merged weights.

        Raises:
            CheckpointError: A module that the settings name does not exist.
        """
        adapter = LoraAdapter(settings, self.adaptable())
        whole = modules_named(self, settings.whole_modules, key="drafter.lora.whole_modules")
        self.requires_grad_(False)
        for module in whole:
            module.requires_grad_(True)
        adapter.turn_on(self)
        self.lora = adapter
        for name in ("save", "proposer"):
            self.__dict__[name] = self._with_merged(getattr(self, name))

    def _with_merged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def on_merged(*arguments: Any, **keywords: Any) -> Any:
            with self.merged():
                return function(*arguments, **keywords)

        return on_merged

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within this context the drafter has no adapters, but weights with the adapters merged in."""
        adapter, self.lora = self.lora, None
        if adapter is None:
            yield
            return
        try:
            with adapter.merged(self):
                yield
        finally:
            self.lora = adapter

    def recompute_activations(self) -> None:
        """From now on, recompute activations in the backward pass instead of storing them."""
        if not self.recomputes:
            raise NotImplementedError(f"{self.kind}: recomputes is False")
        self.recomputing = True

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace the most expensive functions of a training step by compiled ones. Weights keep their names."""
        raise NotImplementedError(f"{self.kind}: compiles is False")

    def lr_factor(self, name: str) -> float:
        """Return the factor on the learning rate for the parameter of this name."""
        return 1.0

    def adapted(self, target: Target) -> Target:
        """Return the target that the exported drafter drafts for: the given one, or a tuned copy."""
        return tuned(target, self.tuning)

    @contextmanager
    def adapting(self, target: Target) -> Iterator[Target]:
        """Within this context, yield the target that the drafter in training drafts for: tuned as it has it so far, if it trains it."""
        with nullcontext() if self.tuned is None else self.tuned.weights.applied(target.model):
            yield target

    def search(self, target: Target, records: Sequence[Record], *, num_steps: int, seed: int, log: Path) -> int:
        """Find what this drafter is made of, if it is `searched`, on training texts; return the number of steps.

        Args:
            records: `train.batch_size` of them.
            num_steps: `train.max_steps`.
            log: File of the scores so far: an interrupted search continues from it.
        """
        raise NotImplementedError(f"{self.kind}: searched is False")

    def calibrate(self, target: Target, batches: Iterable[DraftBatch]) -> Mapping[str, Any]:
        """Fit what is calibrated on held-out text after training; return JSON files of the drafter folder, by name."""
        return {}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Drafter:
        """Read the folder that `save` wrote."""
