"""Settings of the data: sources and their mixture, generated texts, answers of the drafter in training, cached target outputs."""

from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import Any, Literal

from drafttrain.core.settings import setting
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.annotate import annotators
from drafttrain.data_gen.backends import backends
from drafttrain.data_gen.backends.builtin import BuiltinSettings
from drafttrain.data_gen.curriculum import CurriculumSettings
from drafttrain.data_gen.sources import sources
from drafttrain.data_gen.states import states
from drafttrain.data_gen.states.builtin import BuiltinStates

PROMPTS = "data.generate.prompts"
LARGEST_SHARE = 10_000
"""Largest ratio of two weights; a period of the order must hold a record of each source."""


@dataclass
class GenerateSettings:
    """Texts that the target generates, and their prompts."""

    prompts: Any = setting(
        help="A source of prompts by kind, or a list of them, drawn from by weight.", registry=sources, or_list=True
    )
    prompt_tokens: int | None = setting(
        48, help="Plain text is cut into prompts of this many tokens; chats keep their turns. null: a whole text.", ge=1
    )
    num_records: int = setting(1000, help="Texts to generate.", ge=1)
    max_new_tokens: int = setting(128, help="Most new tokens a text.", ge=1)
    temperatures: list[float] = setting(
        [0.0, 0.3, 0.7, 1.0],
        help="Prompts use these in turn; a prompt that is used again takes the next one (Goel et al. 2024).",
        ge=0,
    )
    top_p: float = setting(0.95, help="Nucleus sampling at temperature > 0.", gt=0, le=1)
    batch_size: int = setting(32, help="Texts generated together.", ge=1)
    records_per_shard: int = setting(256, help="Texts a shard; a killed run repeats at most one shard.", ge=1)
    backend: Any = setting(
        BuiltinSettings(),
        help="What generates the texts, by kind: builtin (drafttrain), openai (a server of the target), or vllm (in its own "
        "environment).",
        registry=backends,
    )

    def check(self) -> list[str]:
        """Return problems between fields."""
        problems = [] if self.temperatures else ["temperatures: at least one is needed"]
        if not any(getattr(source, "weight", 1.0) for source in self.prompt_sources().values()):
            problems.append("prompts: at least one source with a weight above 0 is needed")
        return problems

    def prompt_sources(self) -> dict[str, Any]:
        """Return the sources of prompts by their keys in a recipe."""
        if isinstance(self.prompts, list):
            return {f"{PROMPTS}.{number}": source for number, source in enumerate(self.prompts)}
        return {PROMPTS: self.prompts}

    def smoke(self) -> "GenerateSettings":
        """Return a copy that generates a few short texts."""
        return replace(
            self,
            num_records=min(self.num_records, 32),
            max_new_tokens=min(self.max_new_tokens, 24),
            prompt_tokens=min(self.prompt_tokens or 24, 24),
            batch_size=min(self.batch_size, 16),
            records_per_shard=min(self.records_per_shard, 16),
        )


@dataclass
class OnPolicySettings:
    """Answers that the drafter in training writes in place of those of the records (DistillSpec, Zhou et al. 2023)."""

    fraction: float = setting(
        1.0,
        help="Share of each source's records whose answer is drawn, in exact counts: 1 all (on-policy), 0.5 every other one, 0 none. The "
        "others are trained as they are.",
        ge=0,
        le=1,
    )
    drafter_share: float = setting(
        1.0,
        help="Chance of each new token to be drawn from the drafter, else from the target (Liu et al. 2023). 1: the target writes "
        "nothing; below 1 it decodes too.",
        ge=0,
        le=1,
    )
    temperature: float = setting(1.0, help="Temperature of the draws; 0 is greedy.", ge=0)
    top_p: float = setting(1.0, help="Nucleus sampling at temperature > 0.", gt=0, le=1)
    max_new_tokens: int = setting(
        128, help="Most new tokens of an answer; it also ends at data.max_length and at an end of text.", ge=1
    )
    min_prompt_tokens: int = setting(
        1,
        help="The prompt is the record up to its first label, and at least this many tokens: plain text is labels from its start.",
        ge=1,
    )
    every_steps: int = setting(
        1, help="Answers of this many steps are drawn together, by the weights before the first of them.", ge=1
    )
    batch_size: int = setting(
        32, help="Answers drawn together in one batch; the batches are shared among the processes.", ge=1
    )

    @property
    def sampling(self) -> Sampling:
        """How a token is drawn."""
        return Sampling() if self.temperature == 0 else Sampling(self.temperature, self.top_p)

    def draws(self, count: int) -> bool:
        """Return whether the record of a source is drawn that is read after `count` others of it."""
        share = Fraction(str(self.fraction))
        return floor((count + 1) * share) > floor(count * share)

    def smoke(self) -> "OnPolicySettings":
        """Return a copy that writes short answers."""
        return replace(self, max_new_tokens=min(self.max_new_tokens, 16))


@dataclass
class DataSettings:
    """Where texts come from, how they are mixed, and which target outputs are cached."""

    sources: list[Any] = setting(
        help="Sources with weights; each trained record is drawn from one of them.", registry=sources
    )
    max_length: int = setting(256, help="Tokens a record; longer plain text is cut into several.", ge=2)
    generate: GenerateSettings | None = setting(
        None, help="Texts that the target generates, read by a source of kind generated; null: none."
    )
    on_policy: OnPolicySettings | None = setting(
        None, help="Answers that the drafter in training writes in place of those of the records; null: none."
    )
    curriculum: CurriculumSettings | None = setting(
        None, help="Text first, then more and more records with images (MSD); null: sources are mixed by their weights."
    )
    annotate: Any = setting(
        None,
        help="How draft tokens are labelled to train a head, by kind; null: no labels.",
        registry=annotators,
    )
    cache: Literal["none", "states", "full", "top_k"] = setting(
        "none",
        help="How the target's distribution is cached for the records that training will read: states (final hidden states: "
        "exact, through the target's own head), full (logits), top_k (approximate), or none: the target runs in every step. "
        "The hidden states that the drafter reads are cached with it.",
    )
    cache_dtype: Literal["float32", "bfloat16", "float16", "int8"] = setting(
        "float32",
        help="Type of cached states; bfloat16 is exact for a target that runs in bfloat16, int8 (with a scale for 32 features) takes "
        "about half of its bytes. What a type costs of acceptance is measured when the cache is written.",
    )
    cache_while_training: bool = setting(
        False,
        help="Begin to train with the first shards of the cache, while another process on this machine writes the others; it loads the "
        "target (or starts the engine of data.states) by itself.",
    )
    cache_top_k: int = setting(
        64, help="For cache top_k: tokens whose probability is stored; the others share the rest evenly.", ge=1
    )
    states: Any = setting(
        BuiltinStates(),
        help="What computes the target's outputs for the cache, and for each step without one, by kind: builtin (drafttrain), vllm (in "
        "its own environment) or vllm_server (a running one); the last two need train.target_placement: absent.",
        registry=states,
    )
    max_cache_gb: float = setting(
        8.0, help="Limit for a cache or for labelled tokens; larger ones are refused before writing.", gt=0
    )
    overlap_ngram: int = setting(
        13,
        help="Contamination: an evaluation prompt that shares this many tokens in a row with training text is not evaluated; 0: no check.",
        ge=0,
    )

    def check(self) -> list[str]:
        """Return problems between fields."""
        problems = [] if self.sources else ["sources: at least one is needed"]
        kinds = [getattr(source, "kind", "") for source in self.sources]
        own = any(kind == "generated" and one.path is None for kind, one in zip(kinds, self.sources, strict=True))
        if own and self.generate is None:
            problems.append("generate: a source of kind generated without a path needs this section")
        if self.generate is not None and not own:
            problems.append("sources: no source reads the texts of data.generate; add {kind: generated}")
        if "magpie" in kinds:
            problems.append(f"sources: questions of magpie have no answers: name it in {PROMPTS}")
        asked = self.generate.prompt_sources().values() if self.generate is not None else ()
        if any(getattr(source, "kind", "") == "generated" for source in asked):
            problems.append("generate.prompts: generated texts cannot be their own prompts")
        if self.on_policy is not None and self.on_policy.min_prompt_tokens >= self.max_length:
            problems.append(
                f"on_policy.min_prompt_tokens: {self.on_policy.min_prompt_tokens} leave no room for an answer within max_length {self.max_length}"
            )
        weights = [getattr(source, "weight", 1.0) for source in self.sources]
        used = [weight for weight in weights if weight > 0]
        if self.sources and not used:
            problems.append("sources: at least one weight must be above 0")
        if used and max(used) > LARGEST_SHARE * min(used):
            problems.append(
                f"sources: weights {min(used):g} and {max(used):g}: the ratio must be at most 1 to {LARGEST_SHARE:,}, or a weight 0"
            )
        return problems
