"""The command line, called in the process of the test."""

from __future__ import annotations

import pytest

from fastsample.cli import main


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that cannot run says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err
