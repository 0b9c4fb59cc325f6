"""Why an item of a source gives no record."""

from collections.abc import Iterator
from contextlib import contextmanager


class BadItem(Exception):
    """Why an item gives no record; the item is quarantined."""


class NoLabel(BadItem):
    """An item is read, and none of its tokens would be trained."""


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turn any exception of foreign code (a template, a tokenizer) into a reason of one line.

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
        # A panic in the Rust code of tokenizers is not an Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise BadItem(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return an exception's message in one line of limited length."""
    return " ".join(str(error).split())[:200]
