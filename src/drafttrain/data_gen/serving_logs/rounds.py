"""Rounds of speculation that a serving stack logged with an answer, and the answered tokens that replaced a rejected draft token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import LoggedRound, Refused, mapping

KIND = "speculative"


def logged_rounds(value: Any, key: str) -> list[LoggedRound] | None:
    """Return the rounds of `{"drafted": [3, 3], "accepted": [1, 3]}`, where drafted may hold the token ids of each round instead of their number.

    Raises:
        Refused: They have another form.
    """
    if value is None:
        return None
    logged = mapping(value, key)
    drafted, accepted = logged.get("drafted"), logged.get("accepted")
    if not isinstance(drafted, list) or not isinstance(accepted, list) or len(drafted) != len(accepted):
        raise Refused(KIND, f"{key}: drafted and accepted must be lists of the same length, one entry a round")
    return [_round(one, count, key) for one, count in zip(drafted, accepted, strict=True)]


def vllm_rounds(response: Mapping[str, Any]) -> list[LoggedRound] | None:
    """Return the rounds of vLLM's `metrics.speculative_decoding` (`--per-request-spec-decode-metrics detailed`).

    It has no entry for the first token of an answer, which is never drafted: a round for it is put before the others.

    Raises:
        Refused: They have another form.
    """
    key = "metrics.speculative_decoding"
    found = mapping(mapping(response.get("metrics") or {}, "metrics").get("speculative_decoding") or {}, key)
    if "per_step_drafted" not in found:
        return None
    rounds = {"drafted": found["per_step_drafted"], "accepted": found.get("per_step_accepted")}
    return [LoggedRound(0, 0), *(logged_rounds(rounds, key) or [])]


def _round(drafted: Any, accepted: Any, key: str) -> LoggedRound:
    tokens = None
    if isinstance(drafted, list):
        if any(type(token) is not int or token < 0 for token in drafted):
            raise Refused(KIND, f"{key}.drafted: token ids must be integers")
        tokens, drafted = tuple(drafted), len(drafted)
    if type(drafted) is not int or type(accepted) is not int or not 0 <= accepted <= drafted:
        raise Refused(KIND, f"{key}: a round must accept between 0 and all of its draft tokens")
    return LoggedRound(drafted, accepted, tokens)


def refusals(rounds: Sequence[LoggedRound], answer: Sequence[int]) -> list[int]:
    """Return the places of answered tokens that replaced a rejected draft token.

    The token after a round whose drafts were all accepted, or that drafted nothing, replaced none. The last round may reach past the
    answer: tokens that it accepted beyond the end were not written.

    Raises:
        Refused: The rounds do not belong to this answer.
    """
    refused, place = [], 0
    for number, one in enumerate(rounds):
        if place >= len(answer):
            raise Refused(KIND, f"round {number} begins after the {len(answer)} tokens of the answer")
        accepted = answer[place : place + one.num_accepted]
        if one.drafted is not None and list(one.drafted[: len(accepted)]) != list(accepted):
            raise Refused(KIND, f"round {number} accepted other tokens than the answer has")
        if one.num_accepted < one.num_drafted and place + one.num_accepted < len(answer):
            refused.append(place + one.num_accepted)
        place += one.num_accepted + 1
    if place < len(answer):
        raise Refused(KIND, f"the rounds have {place} tokens, the answer {len(answer)}")
    return refused
