"""Errors that a user can cause, each with the exit code that the command line returns."""

from collections.abc import Sequence


class DrafttrainError(Exception):
    """A run cannot continue, for a reason that its user can read and fix."""

    exit_code = 1


class RecipeError(DrafttrainError):
    """A recipe, an override or an argument is wrong. Contains all problems found, not only the first."""

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{source}: {count}", *problems]))


class DataError(DrafttrainError):
    """Training text, prompts or a manifest cannot be used."""


class CheckpointError(DrafttrainError):
    """A model folder is damaged, incomplete, or made for something else."""


class GateError(DrafttrainError):
    """The exported drafter does not reach the limits of `export.require`."""

    exit_code = 3


class Interrupted(DrafttrainError):
    """The run was asked to stop and saved its state: the same command continues it."""

    exit_code = 75
