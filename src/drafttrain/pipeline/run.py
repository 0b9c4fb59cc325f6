"""A recipe at work in its folder: what the stages share."""

from __future__ import annotations

import functools
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from drafttrain.config.dump import dump_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.distributed.collectives import first_before_others
from drafttrain.distributed.world import is_first
from drafttrain.pipeline.data import contaminated_prompts
from drafttrain.pipeline.evaluating import check_lengths
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.settled import settled

if TYPE_CHECKING:
    from drafttrain.core.texts import Sampling
    from drafttrain.drafters import Drafter
    from drafttrain.eval.replay import Text
    from drafttrain.target_model import Target


class Run:
    """A recipe at work in its folder; what is loaded once is shared by the stages.

    Args:
        placement: Of the target, while data is made and a drafter trained (`train.target_placement`).
        evaluates_only: What is trained here is only evaluated.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        quiet: bool = False,
        placement: str = "replicated",
        evaluates_only: bool = False,
    ) -> None:
        quiet_libraries()
        self.placement = placement
        self.folder = RunFolder(folder)
        with first_before_others("it opens the run folder"):
            # The others find what the first one settled.
            recipe = settled(recipe, self.folder.held())
            if is_first():
                self.folder.open(recipe, quiet=quiet, evaluates_only=evaluates_only)
        self.recipe = recipe
        self.resolved = dump_recipe(recipe)
        if recipe.train.num_threads:
            import torch

            torch.set_num_threads(recipe.train.num_threads)

    @functools.cached_property
    def target(self) -> Target:
        """The target; loading it takes the time that it takes."""
        target = self._load_target()
        target.check_length(self.recipe.data.max_length, what="data.max_length")
        return target

    def _load_target(self) -> Target:
        if self.placement == "absent":
            from drafttrain.target_model.absent_target import AbsentTarget

            return AbsentTarget.load(self.recipe.target)
        if self.placement == "sharded":
            from drafttrain.train.sharded_target import ShardedTarget

            return ShardedTarget.load(self.recipe.target)
        from drafttrain.target_model import Target

        return Target.load(self.recipe.target)

    @functools.cached_property
    def cached_target(self) -> Target:
        """The target as it answers on the validation texts: itself where it is whole, else what was stored of it, once.

        Every process must have come here before one of them needs it alone.
        """
        if self.placement == "replicated":
            return self.target
        from drafttrain.data_gen.stored.validation_target import cached_target

        texts, _ = self.validation_texts
        return cached_target(
            self.folder.validation,
            [[*text.prompt, *text.new] for text in texts],
            self.target,
            needs=self.drafter.needs(),
            dtype=self.recipe.data.cache_dtype,
            max_gb=self.recipe.data.max_cache_gb,
        )

    def leave_the_others(self) -> None:
        """Go on in this process alone: a target that is spread over all cannot be run any more."""
        if self.placement == "sharded":
            self.placement = "absent"
            self.release()

    def release(self) -> None:
        """Let go of target and drafter, and of the memory of their device; who asks for one again loads it again."""
        import torch

        for name in ("target", "cached_target", "drafter"):
            self.__dict__.pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The target's tokenizer; read without any weights when there is no target."""
        from drafttrain.target_model.tokenizer import load_target_tokenizer

        return load_target_tokenizer(self.recipe.target)

    @property
    def num_tokens(self) -> int:
        """Ids that target, drafter and tokenizer share."""
        from drafttrain.target_model.tokenizer import num_ids

        return self.target.num_tokens if self.has_target() else num_ids(self.tokenizer)

    @functools.cached_property
    def validation_texts(self) -> tuple[list[Text], Sampling]:
        """What the target writes after the validation prompts, and how it is drawn."""
        from drafttrain.core.texts import Sampling
        from drafttrain.data_gen.backends import Task
        from drafttrain.data_gen.backends.builtin import continuations
        from drafttrain.data_gen.stored.validation_target import cached_continuations
        from drafttrain.eval.prompts import read_prompts
        from drafttrain.eval.repetition import tokens_before_repetition
        from drafttrain.eval.replay import Text

        recipe, wanted = self.recipe, self.recipe.eval
        temperature = wanted.temperatures[0]
        sampling = Sampling() if temperature == 0 else Sampling(temperature, wanted.top_p, wanted.top_k)
        prompts = read_prompts(
            wanted.validation_prompts,
            self.tokenizer,
            prompt_tokens=wanted.prompt_tokens,
            dropped=contaminated_prompts(self, wanted.validation_prompts),
            limit=recipe.train.eval_prompts,
        )
        check_lengths(self.target, prompts, wanted)
        tasks = [Task(prompt.id, list(prompt.tokens), sampling) for prompt in prompts]
        limits = {"max_new_tokens": wanted.max_new_tokens, "seed": recipe.seed}
        if self.placement == "replicated":
            written = continuations(tasks, self.target, **limits)
        else:
            written = cached_continuations(self.folder.validation / "texts.json", tasks, self.target, **limits)
        if wanted.repetition_ngram:
            written = [new[: max(1, tokens_before_repetition(new, ngram=wanted.repetition_ngram))] for new in written]
        texts = [Text(task.id, task.prompt, new) for task, new in zip(tasks, written, strict=True)]
        return texts, sampling

    @functools.cached_property
    def drafter(self) -> Drafter:
        """The drafter as its settings make it, before anything is trained."""
        return self.new_drafter(self.recipe.drafter)

    def new_drafter(self, settings: Any) -> Drafter:
        """Return the drafter of these settings on its device: by default the target's, or where a target would be."""
        import torch

        from drafttrain.drafters import drafters
        from drafttrain.target_model.device import pick_device

        torch.manual_seed(self.recipe.seed)
        target = self.target if self.has_target() else None
        entry = cast(Any, drafters.entry(settings.kind).component)
        drafter: Drafter = entry.create(settings, target=target, tokenizer=self.tokenizer)
        if self.recipe.train.device != "auto":
            return drafter.to(pick_device(self.recipe.train.device))
        return drafter.to(target.device if target is not None else pick_device(self.recipe.target.device))

    def has_target(self) -> bool:
        """Tell whether the recipe names a target."""
        return self.recipe.target.model is not None


def quiet_libraries() -> None:
    """Silence bars and hints of transformers; our own lines say what a user needs."""
    import torch
    import transformers

    # DeepSpeed, which Lightning imports, would otherwise warn that it had to look for a device.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
