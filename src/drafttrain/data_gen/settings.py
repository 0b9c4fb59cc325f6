"""Settings of the data: sources and their mixture, what the target writes, what is cached of the target."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from drafttrain.core.settings import setting
from drafttrain.data_gen.annotate import annotators
from drafttrain.data_gen.backends import backends
from drafttrain.data_gen.backends.builtin import BuiltinSettings
from drafttrain.data_gen.sources import sources

LARGEST_SHARE = 10_000
"""Records of one source for one of another; a period of the order holds all of them."""


@dataclass
class GenerateSettings:
    """Text that the target writes, and the prompts it starts from."""

    prompts: Any = setting(help="A source of prompts, by kind.", registry=sources)
    prompt_tokens: int | None = setting(
        48, help="Plain text is cut into prompts of this many tokens; chats keep their turns. null: a whole text.", ge=1
    )
    num_records: int = setting(1000, help="Texts to generate.", ge=1)
    max_new_tokens: int = setting(128, help="New tokens a text at most.", ge=1)
    temperatures: list[float] = setting(
        [0.0, 0.3, 0.7, 1.0],
        help="Prompts take these in turn, and a prompt used again the next one (Goel et al. 2024).",
        ge=0,
    )
    top_p: float = setting(0.95, help="Nucleus of the draws at temperature > 0.", gt=0, le=1)
    batch_size: int = setting(32, help="Texts generated together.", ge=1)
    records_per_shard: int = setting(256, help="Texts a shard; a killed run repeats at most one shard.", ge=1)
    backend: Any = setting(
        BuiltinSettings(),
        help="Who decodes the texts, by kind: builtin (drafttrain), openai (a server that serves the target), or vllm (its own "
        "environment).",
        registry=backends,
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        return [] if self.temperatures else ["temperatures: at least one is needed"]

    def smoke(self) -> "GenerateSettings":
        """Return a copy that writes a handful of short texts."""
        return replace(
            self,
            num_records=min(self.num_records, 32),
            max_new_tokens=min(self.max_new_tokens, 24),
            prompt_tokens=min(self.prompt_tokens or 24, 24),
            batch_size=min(self.batch_size, 16),
            records_per_shard=min(self.records_per_shard, 16),
        )


@dataclass
class DataSettings:
    """Where text comes from, and what the target writes of it."""

    sources: list[Any] = setting(
        help="Sources with weights; each trained record is drawn from one of them.", registry=sources
    )
    max_length: int = setting(256, help="Tokens a record; longer plain text is cut into several.", ge=2)
    generate: GenerateSettings | None = setting(
        None, help="What the target writes for sources of kind generated; null: nothing."
    )
    annotate: Any = setting(
        None,
        help="How draft tokens along the texts are labelled for a head, by kind; null: they are not.",
        registry=annotators,
    )
    cache: Literal["none", "states", "full", "top_k"] = setting(
        "none",
        help="What is stored of the target's law for the records that training will read: states (final hidden states, the "
        "whole law by the target's own head), full (logits), top_k (approximate), or none: the target runs in every step. "
        "The hidden states that the drafter reads are stored beside it.",
    )
    cache_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", help="Type of stored hidden states; bfloat16 loses nothing of a target that runs in bfloat16."
    )
    cache_top_k: int = setting(
        64, help="cache top_k: tokens whose probability is stored; the rest share the tail evenly.", ge=1
    )
    max_cache_gb: float = setting(
        8.0, help="A cache, or labelled tokens, that would be larger is refused before it is begun.", gt=0
    )
    overlap_ngram: int = setting(
        13,
        help="A prompt of an evaluation that shares this many tokens in a row with training text is dropped; 0: none is.",
        ge=0,
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = [] if self.sources else ["sources: at least one is needed"]
        kinds = [getattr(source, "kind", "") for source in self.sources]
        if "generated" in kinds and self.generate is None:
            problems.append("generate: a source of kind generated needs this section")
        if self.generate is not None and "generated" not in kinds:
            problems.append("sources: nothing reads what data.generate writes; add {kind: generated}")
        if self.generate is not None and getattr(self.generate.prompts, "kind", "") == "generated":
            problems.append("generate.prompts: the target cannot start from what it is about to write")
        weights = [getattr(source, "weight", 1.0) for source in self.sources]
        used = [weight for weight in weights if weight > 0]
        if self.sources and not used:
            problems.append("sources: the weights must not all be 0")
        if used and max(used) > LARGEST_SHARE * min(used):
            problems.append(f"sources: weight {min(used):g} beside {max(used):g}: at most 1 to {LARGEST_SHARE:,}, or 0")
        return problems
