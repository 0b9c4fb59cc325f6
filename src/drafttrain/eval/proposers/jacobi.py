"""Jacobi decoding of any target, also one that was not trained for it (`drafters.jacobi`)."""

from dataclasses import dataclass

from drafttrain.drafters.jacobi import JacobiProposer
from drafttrain.eval.proposers import TextProposer, proposers


@dataclass
class JacobiSettings:
    """The target's likeliest tokens after the rejected ones of the last round."""


@proposers.register("jacobi", JacobiSettings)
class Jacobi(JacobiProposer, TextProposer):
    """The target's last iterate is the draft."""

    def __init__(self, settings: JacobiSettings | None = None) -> None:
        self.settings = settings or JacobiSettings()
