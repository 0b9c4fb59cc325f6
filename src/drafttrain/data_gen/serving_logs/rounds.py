"""The rounds of speculation that a serving stack logged with an answer, and the answered tokens at which they say a draft was refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import LoggedRound, Refused, mapping

KIND = "speculative"


def logged_rounds(value: Any, key: str) -> list[LoggedRound] | None:
    """Return the rounds of `{"drafted": [3, 3], "accepted": [1, 3]}`, where drafted may hold each round's token ids in place of their number.

    Raises:
        Refused: They are of another form.
    """
    if value is None:
        return None
    logged = mapping(value, key)
    drafted, accepted = logged.get("drafted"), logged.get("accepted")
    if not isinstance(drafted, list) or not isinstance(accepted, list) or len(drafted) != len(accepted):
        raise Refused(KIND, f"{key}: drafted and accepted are lists of one length, an entry a round")
    return [_round(one, kept, key) for one, kept in zip(drafted, accepted, strict=True)]


def vllm_rounds(response: Mapping[str, Any]) -> list[LoggedRound] | None:
    """Return the rounds of vLLM's `metrics.speculative_decoding` (`--per-request-spec-decode-metrics detailed`).

    It has no entry for the first token of an answer, for which nothing is drafted: that round is put before the others.

    Raises:
        Refused: They are of another form.
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
            raise Refused(KIND, f"{key}.drafted: token ids are whole numbers")
        tokens, drafted = tuple(drafted), len(drafted)
    if type(drafted) is not int or type(accepted) is not int or not 0 <= accepted <= drafted:
        raise Refused(KIND, f"{key}: a round keeps 0 to all of its draft tokens, in whole numbers")
    return LoggedRound(drafted, accepted, tokens)


def refusals(rounds: Sequence[LoggedRound], answer: Sequence[int]) -> list[int]:
    """Return the answered tokens that the target put in place of a refused draft token.

    The token after a round of which all was kept, or that drafted nothing, corrects nothing and is none of them. The last round may
    reach past the answer: what it kept behind the end was not written.

    Raises:
        Refused: These are not the rounds of this answer.
    """
    refused, place = [], 0
    for number, one in enumerate(rounds):
        if place >= len(answer):
            raise Refused(KIND, f"round {number} begins behind the {len(answer)} tokens of the answer")
        kept = answer[place : place + one.num_accepted]
        if one.drafted is not None and list(one.drafted[: len(kept)]) != list(kept):
            raise Refused(KIND, f"round {number} kept other tokens than the answer has")
        if one.num_accepted < one.num_drafted and place + one.num_accepted < len(answer):
            refused.append(place + one.num_accepted)
        place += one.num_accepted + 1
    if place < len(answer):
        raise Refused(KIND, f"rounds of {place} tokens, an answer of {len(answer)}")
    return refused
