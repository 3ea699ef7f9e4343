"""A cell of the benchmark: what identifies it, and its file.

Each finished cell is one JSON file, written atomically and sealed by a checksum. Its name carries a hash of
everything that its numbers depend on, so that a run started again finds what is finished and redoes the rest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsample.plan import write_atomically

SCHEMA = "fastsample.cell/1"


class DamagedCell(ValueError):
    """A cell file that cannot be used; the message says why."""


def canonical(value: Any) -> bytes:
    """JSON with one spelling for each value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()


@dataclass(frozen=True)
class Cell:
    """One point of the grid solver x steps x grid x seed.

    Attributes:
        solver: label of the solver, options included.
        steps: number of grid intervals.
        grid: name of the time grid; None is the solver's own.
        seed: seed of the noise.
        spec: everything that the cell's numbers depend on, as JSON values.
        reference: whether this is the reference solution rather than a competitor.
    """

    solver: str
    steps: int
    grid: str | None
    seed: int
    spec: dict[str, Any]
    reference: bool = False

    @property
    def key(self) -> str:
        """sha256 of ``spec``."""
        return digest(self.spec)

    @property
    def filename(self) -> str:
        """Readable, unique name of the cell's file."""
        name = "".join(c if c.isalnum() else "_" for c in self.solver)
        grid = f"-{self.grid}" if self.grid else ""
        kind = "reference-" if self.reference else ""
        return f"{kind}{name}-{self.steps:04d}steps{grid}-seed{self.seed}-{self.key[:12]}.json"

    def write(self, folder: Path, result: dict[str, Any], provenance: dict[str, Any]) -> Path:
        """Seal and write the result; the file is whole or absent."""
        body = {
            "schema": SCHEMA,
            "spec": self.spec,
            "key": self.key,
            "solver": self.solver,
            "steps": self.steps,
            "grid": self.grid,
            "seed": self.seed,
            "reference": self.reference,
            "result": result,
            "provenance": provenance,
        }
        path = folder / self.filename
        write_atomically(path, json.dumps(body | {"sha256": digest(body)}, indent=1).encode())
        return path

    def read(self, folder: Path) -> dict[str, Any] | None:
        """The finished cell, or None if there is no file.

        Raises:
            DamagedCell: if there is a file that is not this cell's whole result.
        """
        path = folder / self.filename
        if not path.exists():
            return None
        body = read_file(path)
        if body["key"] != self.key:
            raise DamagedCell(f"{path.name}: it belongs to other settings")
        return body


def read_file(path: Path) -> dict[str, Any]:
    """A finished cell's file, checked.

    Raises:
        DamagedCell: if it is truncated, altered or of another schema.
    """
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedCell(f"{path.name}: unreadable ({error})") from error
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        raise DamagedCell(f"{path.name}: not a {SCHEMA} file")
    seal = body.pop("sha256", None)
    if seal != digest(body):
        raise DamagedCell(f"{path.name}: its checksum does not match")
    return body
