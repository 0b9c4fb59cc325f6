"""Settings of a source that reads serving logs."""

from __future__ import annotations

from dataclasses import dataclass

from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import WeightedSettings


@dataclass(kw_only=True)
class ServingLogsSettings(WeightedSettings):
    """Logs of a serving stack: OpenAI requests and answers, vLLM's and SGLang's request logs, ShareGPT dumps; gzip and rotation."""

    path: str = setting(help="A folder of logs, a file, a pattern such as logs/*.jsonl*, or builtin:serving_log.")
    max_lost_share: float = setting(
        1.0,
        help="Share of the exchanges that may be quarantined; more stop the run. Logs hold duplicates and much that cannot be used.",
        ge=0,
        le=1,
    )
    model: str | None = setting(
        None,
        help="Name under which the target is served; answers of other models are quarantined. null: the model of the first answer.",
    )
    logprobs: bool = setting(
        True,
        help="Train on logged top-k log-probabilities where available (the target's, at temperature 1) instead of running the "
        "target. Their tail is one bucket.",
    )
    redact: bool = setting(
        True,
        help="Remove e-mail addresses, telephone, card and account numbers, public IP addresses, keys and passwords before anything is written.",
    )
    redact_with: str | None = setting(
        None,
        help="Dotted name of your own function (text) -> text, called after the built-in redaction.",
    )
    near_duplicates: float | None = setting(
        0.9,
        help="An exchange that shares this much of its word 3-grams with an earlier one is quarantined; null: only equal ones.",
        gt=0,
        le=1,
    )
    remembered: int = setting(100_000, help="How many of the newest exchanges a new one is compared with.", ge=1)
    max_line_mb: float = setting(8.0, help="Longer lines are quarantined without being read into memory.", gt=0)
    max_depth: int = setting(32, help="Levels of a line's JSON; deeper lines are quarantined.", ge=4)
