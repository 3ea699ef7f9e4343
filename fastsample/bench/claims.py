"""Several workers on one run folder: a cell is claimed by a lock that its worker's death releases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claimed(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the claim on what will be written to ``path``.

    The lock is the operating system's (``flock``), so a killed worker leaves no claim behind. Where a file
    system has no locks, every worker gets every claim: work may be done twice, and the results are the same.

    Args:
        path: the file to be written; the claim is a file beside it.
        wait: wait for another worker to finish or to die.

    Yields:
        Whether the claim is held; False only without ``wait``.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield True
        return
    claim = path.with_suffix(".claim")
    descriptor = os.open(claim, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            yield True
            return
        try:
            yield True
        finally:
            # while the lock is held; who has opened the file before finds the cell finished
            claim.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
