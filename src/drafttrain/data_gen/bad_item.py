"""Why an item of a source gives no record."""

from collections.abc import Iterator
from contextlib import contextmanager


class BadItem(Exception):
    """Why an item gives no record; it is put into quarantine."""


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turn whatever foreign code (a template, a tokenizer) makes of an item into one line.

    Raises:
        BadItem: The block failed.
    """
    try:
        yield
    except BadItem:
        raise
    except Exception as error:
        raise BadItem(f"{what}: {type(error).__name__}: {one_line(error)}") from error
    except BaseException as error:
        # What the Rust of tokenizers raises when it panics is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise BadItem(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return what an exception says, in one line of bounded length."""
    return " ".join(str(error).split())[:200]
