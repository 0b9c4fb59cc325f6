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
        help="Share of the exchanges that may be quarantined; logs hold duplicates and much that cannot be used. More of them stop "
        "the run.",
        ge=0,
        le=1,
    )
    model: str | None = setting(
        None, help="Name under which the target is served; other models' answers are set aside. null: the first one's."
    )
    law: bool = setting(
        True,
        help="Train on logged top-k log-probabilities where there are any (the target's own, at temperature 1): the target is not "
        "asked again. Their tail is one bucket.",
    )
    redact: bool = setting(
        True,
        help="Take out e-mail addresses, telephone, card and account numbers, public IP addresses, keys and passwords before anything is written.",
    )
    redact_with: str | None = setting(
        None,
        help="Your function (text) -> text by its dotted name, called after that; it returns text that may be kept as it is.",
    )
    near_duplicates: float | None = setting(
        0.9,
        help="Share of common word 3-grams from which an exchange is set aside; null: only equal ones are.",
        gt=0,
        le=1,
    )
    remembered: int = setting(100_000, help="Exchanges that a new one is compared with, the newest ones.", ge=1)
    max_line_mb: float = setting(8.0, help="Longer lines are set aside without being held.", gt=0)
    max_depth: int = setting(32, help="Levels of a line's JSON; deeper ones are set aside.", ge=4)
