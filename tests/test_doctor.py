"""``fastsample doctor`` says what is true here."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastsample.cli import main
from fastsample.doctor import _package, examine
from fastsample.metrics.extractors import inception_file


def test_findings_are_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = {f.what: f for f in examine().findings}
    assert found["torch"].detail == torch.__version__.split("+")[0] or found["torch"].works
    assert found["diffusers"].works == (importlib.util.find_spec("diffusers") is not None)
    assert ("cuda:0" in found) == torch.cuda.is_available()
    assert found["kernel group_norm"].works == ("Triton" in found["kernel group_norm"].detail)
    assert found["metric fd-digits"].works
    assert found["metric fid"].works == inception_file().is_file()
    assert str(inception_file()) in found["metric fid"].detail
    main(["doctor"])
    printed = capsys.readouterr().out
    assert all(what in printed for what in found)


def test_what_is_missing_has_a_remedy() -> None:
    missing = _package("no-such-distribution", "pip install it")
    assert not missing.works
    assert missing.detail == "not installed; pip install it"
