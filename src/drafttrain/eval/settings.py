"""Settings of the evaluation."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from drafttrain.core.registry import component_mapping
from drafttrain.core.settings import setting
from drafttrain.data_gen.checkers import checkers
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.acceptance.lossless import LosslessSettings
from drafttrain.eval.length import length_policies
from drafttrain.eval.length.fixed import FixedLengthSettings


@dataclass
class EvalSettings:
    """How the exported files are proven."""

    prompts: str = setting(
        "builtin:test",
        help="JSON lines with text, messages, prompt or tokens (id and domain if there are); or builtin:test.",
    )
    validation_prompts: str = setting(
        "builtin:validation", help="Prompts that training picks the best step on; never those of the test."
    )
    prompt_tokens: int | None = setting(48, help="Plain text is cut to its first tokens; null: the whole text.", ge=1)
    num_prompts: int | None = setting(None, help="The first so many; null: all.", ge=1)
    max_new_tokens: int = setting(128, help="New tokens a prompt at most.", ge=1)
    temperatures: list[float] = setting([0.0, 1.0], help="Each is evaluated on its own; 0 is greedy.", ge=0)
    top_p: float = setting(1.0, help="Nucleus of target and drafter at temperature > 0.", gt=0, le=1)
    top_k: int = setting(0, help="Tokens kept at temperature > 0; 0: all.", ge=0)
    length: Any = setting(FixedLengthSettings(), help="How many tokens to draft, by kind.", registry=length_policies)
    also: list[Any] = setting(
        [],
        help="Further lengths; each is one more arm of every drafter, as `drafter (tree 24)`.",
        registry=length_policies,
    )
    rule: Any = setting(LosslessSettings(), help="Which draft tokens are kept, by kind.", registry=acceptance_rules)
    checker: Any = setting(
        None,
        help="What tells whether an output solves its prompt, by kind; prompts then bring an `answer`. null: no task score.",
        registry=checkers,
    )
    batch_size: int = setting(1, help="Prompts decoded together.", ge=1)
    replay_lengths: list[int] = setting(
        [1, 2, 3, 4, 5, 6, 8], help="Draft lengths whose block efficiency replay gives.", ge=1
    )
    repetition_ngram: int = setting(
        12,
        help="An output counts up to where it repeats an n-gram of its own: loops flatter a drafter. 0: counts whole.",
        ge=0,
    )
    speed_prompts: int = setting(16, help="Prompts on which Hugging Face's generate is timed too; 0: none.", ge=0)
    resamples: int | None = setting(
        None,
        help="Has no effect: intervals are computed, not resampled. Kept so that recipes that name it are read.",
        ge=100,
    )
    seed: int = setting(0, help="Names the random streams of the evaluation.", ge=0)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = [] if self.temperatures else ["temperatures: at least one is needed"]
        labels = [length_label(length) for length in (self.length, *self.also)]
        for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
            problems.append(f"also: {label} is there twice (eval.length counts)")
        return problems

    def as_dict(self) -> dict[str, Any]:
        """Return the section as eval.json holds it: every component with its kind."""
        return asdict(self) | {
            "rule": component_mapping(self.rule),
            "length": component_mapping(self.length),
            "also": [component_mapping(length) for length in self.also],
            "checker": component_mapping(self.checker) if self.checker else None,
        }

    def smoke(self) -> "EvalSettings":
        """Return a copy with a handful of short outputs."""
        return replace(
            self,
            num_prompts=min(self.num_prompts or 4, 2 if self.also else 4),
            max_new_tokens=min(self.max_new_tokens, 24),
            prompt_tokens=min(self.prompt_tokens or 24, 24),
            speed_prompts=min(self.speed_prompts, 2),
            also=self.also[:1],
        )


def length_label(length: Any) -> str:
    """Return how an arm of this length policy is called: its kind, its first setting, and others that are not the default."""
    first, *others = [field for field in fields(length) if field.name != "head"]
    value = getattr(length, first.name)
    words = [length.kind, *([f"{value:g}"] if value is not None else [])]
    changed = [other.name for other in others if getattr(length, other.name) != other.default]
    return ", ".join([" ".join(words), *(f"{name} {getattr(length, name)}" for name in changed)])
