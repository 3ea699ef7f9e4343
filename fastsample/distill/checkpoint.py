"""Checkpoints that are whole or not there: written beside, flushed, renamed, and sealed by a manifest."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..plan import write_atomically

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STATE = "state.pt"
_WRITING = ".writing-"


def sha256(file: Path) -> str:
    """The digest of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seal(folder: Path, files: Sequence[str]) -> None:
    """Write the manifest of files that are complete; it marks the folder as whole."""
    content = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in files
    }
    write_atomically(folder / MANIFEST, json.dumps(content, indent=1).encode())


def verify(folder: Path) -> None:
    """Check a sealed folder against its manifest.

    Raises:
        ValueError: no manifest, or a file that is missing, cut short or changed; the message names it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it was not finished, or is no folder of this kind")
    try:
        content = json.loads(path.read_text())
        items = [(str(name), str(item["sha256"]), int(item["bytes"])) for name, item in content.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r})") from error
    for name, digest, size in items:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file} is damaged: it has {file.stat().st_size} bytes instead of {size}")
        if sha256(file) != digest:
            raise ValueError(f"{file} is damaged: its sha256 is not that of the manifest")


class Checkpoints:
    """The checkpoints of a run: one folder for each, named by the number of updates.

    Args:
        folder: where they lie.
        keep: so many are kept, the newest.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The numbers of updates of all checkpoints, whole or not, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(f.name) for f in self.folder.iterdir() if f.is_dir() and f.name.isdigit())

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / f"{step:08d}"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint; older ones than the newest ``keep`` are removed.

        Raises:
            OSError: it could not be written; what was there is untouched, and named.
        """
        target = self.path(step)
        # under another name until it is whole: a checkpoint that a kill cut short is none
        writing = self.folder / f"{_WRITING}{target.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{_WRITING}*"):
                shutil.rmtree(leftover)
            writing.mkdir()
            with (writing / _STATE).open("wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            seal(writing, [_STATE])
            shutil.rmtree(target, ignore_errors=True)  # a damaged one of the same step
            os.replace(writing, target)
        except OSError as error:
            shutil.rmtree(writing, ignore_errors=True)
            raise OSError(
                error.errno or errno.EIO,
                f"the checkpoint of step {step} could not be written to {self.folder} "
                f"({error.strerror or error}); {self.last_good()}",
            ) from error
        except RuntimeError as error:  # how torch.save reports a failed write
            shutil.rmtree(writing, ignore_errors=True)
            raise OSError(
                errno.ENOSPC,
                f"the checkpoint of step {step} could not be written to {self.folder} "
                f"({str(error).splitlines()[0]}); {self.last_good()}",
            ) from error
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return target

    def last_good(self) -> str:
        """A sentence that names the newest whole checkpoint."""
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except ValueError:
                continue
            return f"the last good checkpoint is {self.path(step)}"
        return "there is no earlier checkpoint"

    def load(self, device: torch.device | str = "cpu") -> tuple[int, dict[str, Any]] | None:
        """The newest whole checkpoint; damaged ones are named in a warning and passed over.

        Raises:
            ValueError: there are checkpoints, and none is whole.
        """
        found = self.steps()
        for step in reversed(found):
            path = self.path(step)
            try:
                verify(path)
            except ValueError as error:
                log.warning("checkpoint %s is not used: %s", path, error)
                continue
            return step, torch.load(path / _STATE, map_location=device, weights_only=True)
        if found:
            raise ValueError(
                f"none of the {len(found)} checkpoints in {self.folder} is whole; delete them to start again"
            )
        return None
