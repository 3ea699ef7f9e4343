"""The error that a user is shown without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something that the user can put right: the message names the setting and the remedy."""


@contextmanager
def checking(what: str = "") -> Iterator[None]:
    """Turn the errors of a check of the user's settings into ``UserError``, prefixed by ``what``."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, AttributeError) as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from error
