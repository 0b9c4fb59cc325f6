"""Numeric answers: the number after a marker."""

import re
from dataclasses import dataclass
from fractions import Fraction

from drafttrain.core.settings import setting
from drafttrain.data_gen.checkers import checkers

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
SPACED_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")


@dataclass
class NumericSettings:
    """The number after the last marker of a text."""

    after: str = setting("answer", help="Marker, as in 'answer' or '####'; empty: the last number of the text.")
    spaced_digits: bool = setting(False, help="Digits separated by spaces are one number.")


@checkers.register("numeric", NumericSettings)
class Numeric:
    """Compares as fractions, so that 0.5, 1/2 and 0.50 are one answer."""

    def __init__(self, settings: NumericSettings | None = None) -> None:
        self.settings = settings or NumericSettings()

    def answer(self, text: str, *, id: str) -> Fraction | None:
        """Return the number, None where there is none."""
        _, marker, behind = text.rpartition(self.settings.after) if self.settings.after else ("", "", text)
        if self.settings.after and not marker:
            return None
        if self.settings.spaced_digits:
            behind = SPACED_DIGITS.sub("", behind)
        found = NUMBER.findall(behind)
        if not found:
            return None
        try:
            return Fraction((found[0] if marker else found[-1]).replace(",", ""))
        except (ValueError, ZeroDivisionError):
            return None

    def correct(self, text: str, reference: str, *, id: str) -> bool:
        """Return whether the number equals the reference.

        Raises:
            ValueError: The reference is no number.
        """
        wanted = Fraction(reference.replace(",", "").strip())
        return self.answer(text, id=id) == wanted
