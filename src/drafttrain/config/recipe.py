"""The recipe: the settings of all rooms in one dataclass, whose sections have a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from drafttrain.config.images import problems_of_images
from drafttrain.config.searched import is_searched, needs_no_loss, problems_of_search, problems_of_swift
from drafttrain.config.tuned import problems_of_tuning
from drafttrain.core.registry import Registry, components_of
from drafttrain.core.settings import setting
from drafttrain.data_gen.annotate import annotators
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.states import states
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMSettings
from drafttrain.eval.settings import EvalSettings
from drafttrain.export import exporters
from drafttrain.export.settings import ExportSettings
from drafttrain.heads import heads
from drafttrain.losses import losses
from drafttrain.online.settings import OnlineSettings
from drafttrain.serving.engines import engines
from drafttrain.target_model.settings import TargetSettings
from drafttrain.training.settings import TrainSettings

TRAINED = (("drafter", "loss"), ("head",))
"""The sections that define what is trained: a recipe has one of these groups, or a drafter that is searched."""

MAX_NAME_BYTES = 200
"""File systems allow 255; some folders beside the run's have a longer name than it."""


@dataclass(kw_only=True)
class Recipe:
    """One whole run, from the data to the exported and evaluated drafter."""

    name: str = setting(help="Name of the run and of its folder.")
    seed: int = setting(0, help="Seed of every random stream of the run.", ge=0)
    plugins: list[str] = setting([], help="Your modules to import first; they register their own kinds.")
    target: TargetSettings = field(
        default_factory=TargetSettings, metadata={"help": "The frozen model whose output distribution is preserved."}
    )
    drafter: Any = setting(
        None, help="The drafter to train, by kind; or give a head.", registry=drafters, unless="head"
    )
    head: Any = setting(
        None, help="The head to train on a frozen drafter and target, by kind; or give a drafter.", registry=heads
    )
    loss: Any = setting(
        None, help="The loss of a drafter, by kind; a head has its own.", registry=losses, unless=needs_no_loss
    )
    data: DataSettings = setting(help="Where text comes from, and what the target generates.")
    train: TrainSettings = field(default_factory=TrainSettings, metadata={"help": "How the drafter is trained."})
    eval: EvalSettings = field(default_factory=EvalSettings, metadata={"help": "How the exported files are evaluated."})
    export: ExportSettings = field(
        default_factory=ExportSettings, metadata={"help": "What is exported, and the gate it must meet."}
    )
    online: OnlineSettings | None = setting(
        None, help="Learn from serving logs as they grow; null: train once on fixed data."
    )

    def check(self) -> list[str]:
        """Return what is wrong across sections."""
        problems = []
        if not self.name.isprintable() or not self.name.strip() or "/" in self.name or self.name.startswith("."):
            problems.append(f"name: must be a valid folder name, got {self.name!r}")
        if len(self.name.encode()) > MAX_NAME_BYTES:
            problems.append(
                f"name: it names a folder, so at most {MAX_NAME_BYTES} bytes, got {len(self.name.encode())}"
            )
        if self.head is not None:
            problems += self._of_head()
        elif self.data.annotate is not None:
            problems.append("data.annotate: labels are for a head, and this recipe does not train one")
        if self.target.model is None:
            problems += self._without_target()
        if self.train.pretrain is not None:
            problems += self._pretraining()
        if self.export.to or self.export.verify:
            problems += self._exports()
        if self.online is not None:
            problems += self._online()
        if self.train.target_placement != "replicated":
            problems += self._placement()
        problems += self._states()
        if self.data.cache_while_training:
            problems += self._while_training()
        if self.data.on_policy is not None and self.data.on_policy.fraction > 0:
            problems += self._on_policy()
        if self.train.device != "auto":
            problems += self._own_device()
        if getattr(self.drafter, "tokenizer", None) is not None and self.train.zero_stage == 3:
            problems.append(
                "drafter.tokenizer: rows of a head that is partitioned over processes cannot be chosen: use train.deepspeed.stage 0, 1 or 2"
            )
        made_of = _component(self.drafter)
        if not getattr(made_of, "trains_partitioned", True) and self.train.zero_stage == 3:
            problems.append(
                f"drafter.kind {made_of.kind} reads parts of weights, which stage 3 partitions over processes: use train.deepspeed.stage 0, 1 or 2"
            )
        if not getattr(made_of, "trains_elsewhere", True) and self.train.device != "auto":
            problems.append(
                f"train.device: {self.train.device}: {made_of.kind} trains inside the target, on its device: leave it at auto"
            )
        problems += self.eval.problems_with(self.drafter)
        problems += self._confidence()
        if is_searched(getattr(self.drafter, "kind", None)):
            problems += problems_of_search(self)
        problems += problems_of_tuning(self, made_of)
        problems += self._trees()
        problems += self._numbered_devices()
        problems += [*self._beside(), *problems_of_swift(self), *problems_of_images(self)]
        if "gain_over_start" in self.export.require and not self.eval.start:
            problems.append("export.require.gain_over_start: the start is not evaluated with eval.start: false")
        problems += self._adapters()
        if self.train.compile and (self.online is not None or not getattr(made_of, "compiles", False)):
            what = f"drafter {self.drafter.kind}" if self.drafter is not None else "a head"
            what = "online learning" if self.online is not None else what
            problems.append(f"train.compile: {what} has no part to compile: leave it out")
        if self.train.activation_checkpointing and not getattr(made_of, "recomputes", False):
            what = f"drafter {self.drafter.kind}" if self.drafter is not None else "a head"
            problems.append(
                f"train.activation_checkpointing: {what} has no stack of layers whose activations could be recomputed"
            )
        return problems

    def _adapters(self) -> Iterator[str]:
        """Yield what cannot be trained with adapters beside the drafter's weights."""
        if getattr(self.drafter, "lora", None) is None:
            return
        if self.train.pretrain is not None:
            yield "train.pretrain: it trains all weights, drafter.lora none of them: pretrain in a recipe of its own, and start from its folder"
        if self.online is not None:
            yield "drafter.lora: online learning starts from exported weights and trains all of them: leave it out"

    def _confidence(self) -> Iterator[str]:
        """Yield a loss or a length policy that reads a prediction of the drafter which does not exist."""
        length = self.eval.length
        readers = {
            "loss: confidence trains": any(one.kind == "confidence" for one in components_of(self.loss)),
            f"eval.length: {getattr(length, 'kind', '')} reads": getattr(length, "reads_confidence", False),
        }
        made_of = _component(self.drafter)
        if made_of is not None and any(readers.values()) and not made_of.predicts_confidence(self.drafter):
            has_none = f"a prediction of acceptance, and drafter.kind {self.drafter.kind} with these settings has none"
            yield from (f"{what} {has_none}" for what, is_there in readers.items() if is_there)

    def _trees(self) -> Iterator[str]:
        """Yield the length policies that ask for trees of a drafter that drafts none."""
        made_of = _component(self.drafter)
        for key, length in self.eval.lengths():
            if (
                made_of is not None
                and not getattr(made_of, "drafts_trees", True)
                and getattr(length, "most_children", 1) > 1
            ):
                yield f"{key}: {length.kind} is a tree, and drafter.kind {self.drafter.kind} drafts chains only: use kind fixed or confidence"

    def _beside(self) -> Iterator[str]:
        """Yield proposers and a rule that cannot use what this drafter drafts."""
        kind, made_of = getattr(self.drafter, "kind", ""), _component(self.drafter)
        own_tokens = getattr(self.drafter, "tokenizer", None) is not None
        reads_text = made_of is None or (getattr(made_of, "writes_text", False) and not own_tokens)
        for one in components_of(self.eval.beside):
            why = getattr(made_of, "why_alone", None)
            if why and getattr(one, "extends_drafter", False):
                yield (
                    f"eval.beside: {one.kind} adds nodes to the drafter's, and drafter.kind {kind} {why}: give it another "
                    "`drafter`, or leave it out"
                )
            if getattr(one, "reads_language_model", False) and not reads_text:
                yield f"eval.beside: {one.kind} reads text with the drafter's own language model: it needs drafter.kind causal_lm without drafter.tokenizer, got {kind}"

    def _exports(self) -> Iterator[str]:
        """Yield the formats and engines that do not support what this recipe trains."""
        if self.head is not None:
            yield "export.to, export.verify: no serving engine loads a head: leave them out"
            return
        if getattr(self.drafter, "tokenizer", None) is not None:
            formats = [f"to: {name}" for name in self.export.to if name != "hf"]
            for key in (*formats, *(f"verify: {name}" for name in self.export.verify)):
                yield f"export.{key} does not support a drafter with drafter.tokenizer: engines pass it the target's token ids"
            return
        kind = getattr(self.drafter, "kind", "")
        places = {
            f"to: {name}": _registered(exporters, name).reads for name in self.export.to if name in exporters.names()
        }
        places |= {
            f"verify: {name}": _registered(engines, name).methods
            for name in self.export.verify
            if name in engines.names()
        }
        for key, kinds in places.items():
            if kind not in kinds:
                yield f"export.{key} does not support drafter.kind {kind}, only {', '.join(kinds)}"
        if self.target.model is None:
            yield "export.to, export.verify: a drafter is exported for its target, but target.model is null"

    def _pretraining(self) -> Iterator[str]:
        """Yield what pretraining needs and the recipe lacks."""
        if not isinstance(self.drafter, CausalLMSettings):
            yield "train.pretrain: only a language model is pretrained on plain text: drafter.kind causal_lm, sorted_lm or matformer"
        plain = [source for source in self.data.sources if getattr(source, "kind", "") != "generated"]
        if not any(getattr(source, "weight", 1.0) for source in plain):
            yield "train.pretrain: needs plain text: a source in data.sources of another kind than generated, with a weight above 0"

    def _online(self) -> Iterator[str]:
        """Yield settings that online learning does not support, or would ignore."""
        if self.head is not None:
            yield "online: only a drafter learns online, not a head"
        if getattr(self.drafter, "tokenizer", None) is not None:
            yield "online: a drafter with drafter.tokenizer does not learn online"
        if self.target.model is None:
            yield "online: candidates are compared with the target, but target.model is null"
        if [getattr(source, "kind", "") for source in self.data.sources] != ["serving_logs"]:
            yield "data.sources: online learning reads one source, of kind serving_logs"
        if self.data.generate is not None or self.data.cache != "none":
            yield "data: online learning neither generates nor caches: leave generate out, and cache at none"
        if self.train.schedule != "constant":
            yield "train.schedule: online learning has no end, so it needs constant"
        if self.train.pretrain is not None or self.train.deepspeed is not None or (self.train.devices or 1) > 1:
            yield "train: online learning runs in one process, without pretrain and deepspeed"
        if self.train.profile_steps is not None or self.train.peak_tflops is not None:
            yield "train.profile_steps, train.peak_tflops: steps of online learning are neither profiled nor timed: leave them out"
        if self.train.records_per_device is not None:
            yield "train.records_per_device: online learning uses whole batches: leave it at null"

    def _placement(self) -> Iterator[str]:
        """Yield what needs the whole target in every process, or a target that can be run."""
        placement = self.train.target_placement
        key = f"train.target_placement: {placement}"
        if self.target.model is None:
            yield f"{key}: there is no target to place: target.model is null"
        if self.head is not None:
            yield f"{key}: labelling draft tokens needs the whole target: a head needs replicated"
        if self.online is not None:
            yield f"{key}: online learning runs its target: it needs replicated"
        made_of = _component(self.drafter)
        if made_of is not None and (reason := made_of.why_whole_target(self.drafter)):
            yield f"{key}: drafter.{reason}, and they must be whole in every process: use replicated"
        if placement == "sharded":
            if self.train.devices == 1:
                yield f"{key}: a target cannot be sharded with train.devices 1"
            if self.target.device != "auto":
                yield f"{key}: shards are on the processes' own devices: leave target.device at auto, got {self.target.device}"
        elif (
            self.data.cache == "none"
            and not self._states_elsewhere()
            and (made_of is None or made_of.needs_target or self._loss_needs_target())
        ):
            yield f"{key}: nothing of the target is stored with data.cache none: choose states, full or top_k"

    def _states_elsewhere(self) -> bool:
        """Return whether an engine computes the target's hidden states."""
        kind = self.data.states.kind
        return kind in states.names() and bool(_registered(states, kind).elsewhere)

    def _states(self) -> Iterator[str]:
        """Yield what does not fit to hidden states from an engine."""
        if not self._states_elsewhere():
            return
        key = f"data.states: {self.data.states.kind}"
        if self.train.target_placement != "absent":
            yield f"{key}: the target's blocks are not loaded here: set train.target_placement: absent"
        if self.data.generate is not None and self.data.generate.backend.kind == "builtin":
            yield f"{key}: nor can drafttrain write texts without them: choose another data.generate.backend than builtin"
        if getattr(self.data.states, "tensor_parallel_size", 1) > 1 and self.train.devices != 1:
            yield f"{key}: its tensor_parallel_size is above 1, so one process uses several GPUs: set train.devices: 1"
        if self.data.states.kind == "vllm" and self.target.device.startswith("cuda:"):
            yield (
                f"{key}: vLLM takes the first GPUs that it sees: leave target.device at auto, got {self.target.device}, and choose them with "
                "CUDA_VISIBLE_DEVICES"
            )

    def _while_training(self) -> Iterator[str]:
        """Yield why no other process can write the cache during the training."""
        key = "data.cache_while_training"
        if self.data.cache == "none":
            yield f"{key}: nothing is cached: set data.cache, or false"
        if self.head is not None:
            yield f"{key}: a head is trained on labelled draft tokens: set false"
        if self.train.target_placement == "sharded":
            yield f"{key}: a sharded target computes in the processes that train: set false, or another train.target_placement"
        if self.train.devices not in (None, 1):
            yield f"{key}: {self.train.devices} processes would wait for one writer in the middle of a step: set false, or train.devices: 1"

    def _on_policy(self) -> Iterator[str]:
        """Yield what cannot be trained on answers of the drafter in training."""
        if self.head is not None:
            yield "data.on_policy: a head is trained on labelled draft tokens, not on answers: leave the section out"
            return
        if self.online is not None:
            yield "data.on_policy: online learning reads the text that was served: leave the section out"
        made_of = _component(self.drafter)
        if made_of is not None and not made_of.writes_text:
            able = [name for name in drafters.names() if _registered(drafters, name).writes_text]
            yield (
                f"data.on_policy: drafter.kind {self.drafter.kind} drafts from the target's hidden states, so it writes no text "
                f"without the target; only {', '.join(able)} can"
            )
        if getattr(self.drafter, "tokenizer", None) is not None:
            yield "data.on_policy: a drafter with its own tokenizer writes no tokens of the target: leave drafter.tokenizer or the section out"
        if (lora := getattr(self.drafter, "lora", None)) is not None and lora.dropout:
            yield f"data.on_policy: drafter.lora.dropout is for the tokens of a training step, not for draws: set 0, got {lora.dropout:g}"
        if self.target.model is None:
            yield "data.on_policy: the answers are trained towards the target's distribution, but target.model is null"
        for settings in components_of(self.loss):
            if settings.kind in losses.names() and _registered(losses, settings.kind).needs_target is False:
                yield (
                    f"data.on_policy: loss {settings.kind} trains the labels themselves, which are the drafter's own draws here: use a "
                    "loss that compares with the target, such as forward_kl"
                )
        if self.data.cache != "none":
            yield f"data.on_policy: no target output of an answer exists before it is drawn: data.cache must be none, got {self.data.cache}"
        if self.train.target_placement != "replicated":
            yield (
                "data.on_policy: the target runs in every step, whole in every process: train.target_placement must be replicated, got "
                f"{self.train.target_placement}"
            )
        if self.train.zero_stage == 3:
            yield "data.on_policy: a drafter whose weights are partitioned over processes writes no text: use train.deepspeed.stage 0, 1 or 2"
        if self.train.compile:
            yield "data.on_policy: the layers that train.compile makes read no cache of keys and values: leave it out"

    def _own_device(self) -> Iterator[str]:
        """Yield what must be on the device of its target."""
        key = f"train.device: {self.train.device}"
        if self.head is not None or self.online is not None:
            yield f"{key}: only a drafter that fit trains can have a device of its own: leave it at auto"

    def _numbered_devices(self) -> Iterator[str]:
        """Yield what cannot be on one numbered device."""
        target, train = self.target.device, self.train
        if target.startswith("cuda:") and (train.devices or 1) > 1:
            yield f"target.device: {target} is one device, for {train.devices} processes: leave it at auto"
        key, device = ("target.device", target) if train.device == "auto" else ("train.device", train.device)
        number = device.removeprefix("cuda:")
        if train.deepspeed is not None and number not in (device, "0"):
            yield (
                f"{key}: {device}: DeepSpeed trains on the first device that a process sees: leave it at auto and start with "
                f"CUDA_VISIBLE_DEVICES={number}, or leave train.deepspeed out"
            )

    def _loss_needs_target(self) -> bool:
        kinds = [settings.kind for settings in components_of(self.loss) if settings.kind in losses.names()]
        return any(_registered(losses, kind).needs_target is True for kind in kinds)

    def _of_head(self) -> Iterator[str]:
        """Yield sections that a recipe of a head must not have, or lacks."""
        kind = self.head.kind
        if self.drafter is not None:
            yield "head: a recipe trains a drafter or a head: name the frozen drafter in head.drafter"
        if self.loss is not None:
            yield f"loss: head {kind} has its own loss: leave the section out"
        if self.target.model is None:
            yield "head: labels compare with the target, but target.model is null"
        fitting = [name for name in annotators.names() if _annotator(name).for_head == kind]
        if self.data.annotate is None or self.data.annotate.kind not in fitting:
            yield f"data.annotate: head {kind} needs labels of kind {' or '.join(fitting)}"

    def _without_target(self) -> Iterator[str]:
        """Yield what needs a target, which this recipe lacks."""
        for settings in components_of(self.loss):
            component: Any = losses.entry(settings.kind).component if settings.kind in losses.names() else None
            # For a sum this is a property of its terms, which are checked themselves.
            if component is not None and component.needs_target is True:
                yield f"loss: {settings.kind} compares with the target, but target.model is null"
        kind, made_of = getattr(self.drafter, "kind", ""), _component(self.drafter)
        if made_of is not None and made_of.needs_target:
            yield f"drafter: {kind} is made from its target, but target.model is null"
        if getattr(self.drafter, "init", None) == "target":
            yield "drafter.init: there is no target to cut the drafter from: target.model is null"


def _registered(registry: Registry, name: str) -> Any:
    return registry.entry(name).component


def _component(settings: Any) -> Any:
    """Return the drafter class of settings; None if the kind is unknown."""
    kind = getattr(settings, "kind", "")
    return drafters.entry(kind).component if kind in drafters.names() else None


def _annotator(name: str) -> Any:
    return annotators.entry(name).component
