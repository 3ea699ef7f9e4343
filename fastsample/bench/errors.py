"""The error that a user is shown without a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something that the user can put right: the message names the setting and the remedy."""


@contextmanager
def checking(what: str = "") -> Iterator[None]:
    """Turn the errors of a check of the user's settings into ``UserError``, prefixed by ``what``."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise  # no fault of the settings
        raise UserError(f"{what}: {error}" if what else str(error)) from error
