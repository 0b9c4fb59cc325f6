"""The section `eval` of a recipe."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from drafttrain.core.registry import component_mapping
from drafttrain.core.settings import setting
from drafttrain.data_gen.checkers import checkers
from drafttrain.drafters.causal_lm.layer_parallel import layer_problem
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.acceptance.jacobi_exit import INSTEAD, NEEDS_ITERATES, JacobiExitSettings
from drafttrain.eval.acceptance.lossless import LosslessSettings
from drafttrain.eval.acceptance.mixed_target import NEEDS_DRAWN_CHAINS, MixedTargetSettings
from drafttrain.eval.length import length_policies
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.pipelined import PIPELINED, SERIAL, Schedule
from drafttrain.eval.prompts import Prompts
from drafttrain.eval.proposers import TrainingFree, proposers
from drafttrain.eval.proposers.none import PLAIN


@dataclass
class EvalSettings:
    """How exported drafters are evaluated."""

    prompts: Any = setting(
        "builtin:test",
        help="A file of prompts (docs/data.md), builtin:test (Python source text), or a list of files, each with its domain.",
        accepts=Prompts,
    )
    validation_prompts: Any = setting(
        "builtin:validation",
        help="Prompts that the best step is chosen on, as a file or a list of files; never the test prompts.",
        accepts=Prompts,
    )
    prompt_tokens: int | None = setting(48, help="Plain text is cut to this many tokens; null: not cut.", ge=1)
    num_prompts: int | None = setting(None, help="Number of prompts, from the first on; null: all.", ge=1)
    max_new_tokens: int = setting(128, help="Most new tokens per prompt.", ge=1)
    temperatures: list[float] = setting([0.0, 1.0], help="Temperatures, each evaluated separately; 0 is greedy.", ge=0)
    top_p: float = setting(1.0, help="Nucleus (top-p) of target and drafter at temperature > 0.", gt=0, le=1)
    top_k: int = setting(0, help="Most likely tokens that are sampled from at temperature > 0; 0: all.", ge=0)
    start: bool = setting(
        True,
        help="Evaluate the drafter's start too, for gain_over_start. Its acceptance is low, so it takes as long as plain decoding.",
    )
    length: Any = setting(FixedLengthSettings(), help="How many tokens to draft, by kind.", registry=length_policies)
    also: list[Any] = setting(
        [],
        help="Further draft lengths; each drafter is evaluated with each of them, as `drafter (tree 24)`.",
        registry=length_policies,
    )
    beside: list[Any] = setting(
        [],
        help="Proposers that need no training, evaluated beside the drafter and compared with it, by kind: `{kind: ngram}` (docs/proposers.md).",
        registry=proposers,
    )
    across_tokenizers: Literal["tokens", "strings"] = setting(
        "tokens",
        help="What a drafter with its own tokenizer drafts. tokens: those that the target has too. strings: any text, encoded again "
        "with the target's tokenizer.",
    )
    rule: Any = setting(LosslessSettings(), help="Which draft tokens are accepted, by kind.", registry=acceptance_rules)
    checker: Any = setting(
        None,
        help="Decides whether an output solves its prompt, by kind; prompts then need an `answer`. null: no task score.",
        registry=checkers,
    )
    schedule: Schedule = setting(
        SERIAL,
        help="serial; or pipelined: the drafter drafts the next chain while the target verifies the last one, as on two devices. Here "
        "the same decisions are made one after the other, so measured times are no gain.",
    )
    layer_parallel_size: int = setting(
        1,
        help="Layers of a causal_lm whose attention reads the same states while it drafts, as on so many devices (EasySpec); 1: none. "
        "Here they run one after the other, so measured times are no gain.",
        ge=1,
    )
    batch_size: int = setting(1, help="Prompts decoded together.", ge=1)
    replay_lengths: list[int] = setting(
        [1, 2, 3, 4, 5, 6, 8], help="Draft lengths for which replay computes the block efficiency.", ge=1
    )
    repetition_ngram: int = setting(
        12,
        help="An output counts up to its first repeated n-gram: repetitions are easy to draft. 0: it counts whole.",
        ge=0,
    )
    speed_prompts: int = setting(
        16, help="Number of prompts on which transformers' generate is timed too; 0: none.", ge=0
    )
    resamples: int | None = setting(
        None,
        help="Has no effect: intervals are computed, not resampled. Accepted so that older recipes load.",
        ge=100,
    )
    seed: int = setting(0, help="Seed of the random streams of the evaluation.", ge=0)

    def check(self) -> list[str]:
        """Return problems that involve several fields."""
        problems = [] if self.temperatures else ["temperatures: at least one is needed"]
        lists = {name: getattr(self, name) for name in ("prompts", "validation_prompts")}
        problems += [f"{name}: at least one file is needed" for name, files in lists.items() if not files]
        labels = [length_label(length) for _, length in self.lengths()]
        for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
            problems.append(f"also: {label} occurs twice (eval.length counts)")
        beside = [TrainingFree(one).label for one in self.beside]
        problems += [f"beside: {one} occurs twice" for one in dict.fromkeys(beside) if beside.count(one) > 1]
        chains = [one.kind for one in self.beside if getattr(one, "chains_only", False)]
        trees = [length_label(one) for _, one in self.lengths() if getattr(one, "most_children", 1) > 1]
        problems += [f"beside: {one} drafts chains only, and {tree} is a tree" for one in chains for tree in trees]
        if self.schedule == PIPELINED:
            refused = [length_label(one) for one in (self.length, *self.also) if not _drafts_alone(one)]
            problems += [f"schedule: pipelined drafts a chain for each sequence alone, not {one}" for one in refused]
            problems += [
                f"schedule: pipelined drafts with a model of its own: leave out beside: {one}" for one in beside
            ]
            if not isinstance(self.rule, LosslessSettings):
                problems.append(f"schedule: pipelined needs rule: {{kind: lossless}}, got {self.rule.kind}")
        if isinstance(self.rule, JacobiExitSettings):
            others = [one for one in self.beside if one.kind != "jacobi"]
            problems += [f"rule: {NEEDS_ITERATES}, and beside: {one.kind} has none: {INSTEAD}" for one in others]
        if isinstance(self.rule, MixedTargetSettings):
            problems += self._without_drafts_to_move_to()
        if beside and any(length.kind == "batch_schedule" for _, length in self.lengths()):
            problems.append(
                "beside: batch_schedule divides draft tokens by the drafter's confidence, which no proposer there has: leave one out"
            )
        if PLAIN.label in beside:
            problems.append(f"beside: {PLAIN.label} is plain decoding, which every evaluation has")
        return problems

    def problems_with(self, drafter: Any) -> list[str]:
        """Return what this evaluation asks of a drafter that these settings do not make.

        Args:
            drafter: The section `drafter` of a recipe; None: it has none.
        """
        problems, kind = [], getattr(drafter, "kind", None)
        own_tokenizer = getattr(drafter, "tokenizer", None) is not None
        if self.across_tokenizers == "strings" and not own_tokenizer:
            problems.append(
                "eval.across_tokenizers: strings: the drafter has the target's tokenizer: set tokens, or drafter.tokenizer"
            )
        if self.schedule == PIPELINED and kind is not None and (kind != "causal_lm" or own_tokenizer):
            problems.append(
                f"eval.schedule: pipelined needs a drafter.kind causal_lm that reads the target's tokens, got {kind}"
                f"{' with a tokenizer of its own' if own_tokenizer else ''}: use serial"
            )
        if isinstance(self.rule, MixedTargetSettings) and getattr(drafter, "draft", "") == "greedy":
            problems.append(f"eval.rule: {NEEDS_DRAWN_CHAINS}, and drafter.draft greedy draws none")
        if isinstance(self.rule, JacobiExitSettings) and kind not in (None, "consistency"):
            problems.append(f"eval.rule: {NEEDS_ITERATES}, got drafter.kind {kind}: {INSTEAD}")
        if self.layer_parallel_size > 1 and kind is not None:
            key = f"eval.layer_parallel_size: {self.layer_parallel_size}"
            if kind != "causal_lm":
                problems.append(
                    f"{key} needs a drafter.kind causal_lm, got {kind}, which has no language model of its own: set 1"
                )
            elif drafter.init != "checkpoint" and (problem := layer_problem(drafter.num_layers)):
                problems.append(f"{key}: {problem} (drafter.num_layers): set 1")
        return problems

    def _without_drafts_to_move_to(self) -> list[str]:
        """Return what leaves the mixed target nothing to move towards: draft tokens that are not drawn from a distribution."""
        why = f"rule: {NEEDS_DRAWN_CHAINS}"
        problems = [f"{why}: leave 0 out of temperatures"] if 0 in self.temperatures else []
        trees = [length_label(length) for _, length in self.lengths() if getattr(length, "most_children", 1) > 1]
        problems += [f"{why}, and {one} is a tree: use kind fixed or confidence" for one in trees]
        if self.across_tokenizers == "strings":
            problems.append(f"{why}, and strings have none: set across_tokenizers: tokens")
        return problems

    def lengths(self) -> list[tuple[str, Any]]:
        """Return every length policy with its key in a recipe."""
        return [("eval.length", self.length), *(("eval.also", length) for length in self.also)]

    def as_dict(self) -> dict[str, Any]:
        """Return the section as eval.json holds it: every component with its kind."""
        return asdict(self) | {
            "rule": component_mapping(self.rule),
            "length": component_mapping(self.length),
            "also": [component_mapping(length) for length in self.also],
            "beside": [component_mapping(proposer) for proposer in self.beside],
            "checker": component_mapping(self.checker) if self.checker else None,
        }

    def smoke(self) -> "EvalSettings":
        """Return a copy with a few short outputs."""
        return replace(
            self,
            num_prompts=min(self.num_prompts or 4, 2 if self.also else 4),
            max_new_tokens=min(self.max_new_tokens, 24),
            prompt_tokens=min(self.prompt_tokens or 24, 24),
            speed_prompts=min(self.speed_prompts, 2),
            also=self.also[:1],
        )


def _drafts_alone(length: Any) -> bool:
    """Return whether a length policy drafts chains, and decides for each sequence alone."""
    return length.kind != "batch_schedule" and length.most_children == 1


def length_label(length: Any) -> str:
    """Return the label of a length policy: its kind, its first setting, and others that differ from the default."""
    first, *others = [field for field in fields(length) if field.name not in ("head", "calibration")]
    value = getattr(length, first.name)
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    words = [length.kind, *(["-".join(f"{one:g}" for one in numbers)] if numbers else [])]
    changed = [other.name for other in others if getattr(length, other.name) != other.default]
    calibrated = ["calibrated"] if getattr(length, "calibration", None) is not None else []
    return ", ".join([" ".join(words), *(f"{name} {getattr(length, name)}" for name in changed), *calibrated])
