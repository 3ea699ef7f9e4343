"""The command line: help without torch, overrides, errors before any work."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import fails
from PIL import Image

from fastsample.cli import main


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from fastsample.cli import main; main(sys.argv[1:]); "
        "print('heavy:', [m for m in ('torch', 'numpy', 'hydra', 'triton') if m in sys.modules])"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder
    )


pytestmark = pytest.mark.usefixtures("keep_argv")


@pytest.mark.parametrize(
    "arguments", [("--help",), (), ("bench", "--help"), ("sample", "-h"), ("--version",)]
)
def test_help_is_light(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert "heavy: []" in result.stdout


def test_help_has_examples_and_every_setting() -> None:
    import dataclasses

    from fastsample.cli import _command_help, _help
    from fastsample.conf import COMMANDS

    for command, schema in COMMANDS.items():
        text = _command_help(command)
        assert f"\n  fastsample {command} " in text
        for field in dataclasses.fields(schema):
            assert f"\n  {field.name}" in text
        assert f"\n  {command} " in _help()


def test_cfg_job_prints_the_settings_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(
        ["bench", "--cfg", "job", "model._target_=my.make", "model.width=64", "nfe=[3]", "reference.steps=7"]
    )
    printed = capsys.readouterr().out
    for line in ("  _target_: my.make", "  width: 64", "nfe:\n- 3", "  steps: 7"):
        assert line in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bnech",), "did you mean 'bench'"),
        (
            ("bench", "solver=[ddim]"),
            "no setting 'solver'; there is reference.solver; did you mean 'solvers'",
        ),
        (("bench", "reference.step=3"), "did you mean 'reference.steps'"),
        (("distill", "steps=3"), "no setting 'steps'; there is trainer.steps"),
        (("distill", "samples=3"), "no setting 'samples'; there is evaluation.samples"),
        (("bench", "digits"), "'digits' is not a setting; write key=value"),
        (("sample", "stpes=3"), "did you mean 'steps'"),
        (("sample", "solver=dpmp_2m"), "did you mean 'dpmpp_2m'"),
        (("sample", "solver=ddim", "grid=unifrom"), "did you mean 'uniform'"),
        (("sample", "solver=ddim", "model=digit"), "did you mean 'digits'"),
        (("sample", "solver=ddim", "model._target_=gaussian_model.make_model", "steps=0"), "steps=0"),
        (("sample", "solver=ddim", "model._target_=no.such.module"), "no.such.module"),
        (("sample", "n=0"), "n=0: at least 1"),
        (("report", "run=nothing"), "no run.json there"),
    ],
)
def test_errors_name_the_remedy(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = fails(capsys, *arguments)
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, ("n=many",), "Value 'many' of type 'str' could not be converted to Integer"),
        (None, ("solvers=auto",), "Error merging override solvers=auto; Invalid value assigned"),
        ("n: [1, 2", ("--config-dir=.", "--config-name=mine"), "is not YAML: while parsing a flow sequence"),
        (
            "defaults: [bench, _self_]\nstepz: 3",
            ("--config-dir=.", "--config-name=mine"),
            "Key 'stepz' not in 'BenchConfig'; did you mean 'steps'",
        ),
        (None, ("--config-dir=nowhere",), "nowhere' not found"),
    ],
)
def test_an_unreadable_configuration_is_one_line(
    text: str | None,
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    said = fails(capsys, "bench", *arguments)
    assert message in said
    assert len(said.splitlines()) == 1
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_configuration_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [bench, _self_]\nn: 77\nsolvers: [ddim]\n")
    main(["bench", "--config-dir", str(tmp_path), "--config-name", "mine", "--cfg", "job", "seeds=[5]"])
    printed = capsys.readouterr().out
    assert "\n'n': 77\n" in printed
    assert "solvers:\n- ddim\n" in printed
    assert "seeds:\n- 5\n" in printed


def test_sample_writes_images_and_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "images"
    command = ["sample", "model._target_=gaussian_model.make_model", "model.scale=0.1", "steps=6"]
    main([*command, "solver=dpmpp_2m", "n=7", "batch=3", f"out={out}"])
    assert "6 evaluations" in capsys.readouterr().out
    images = sorted(f.name for f in out.glob("*.png"))
    assert images == [f"{i:05d}.png" for i in range(7)] + ["grid.png"]
    first = np.asarray(Image.open(out / "00000.png"))
    assert first.shape == (8, 8)
    grid = np.asarray(Image.open(out / "grid.png"))
    factor = 1024 // 26
    assert grid.shape == (26 * factor, 26 * factor)
    np.testing.assert_array_equal(grid[::factor, ::factor][:8, :8], first)
    # another batch size gives the same picture
    main([*command, "solver=dpmpp_2m", "n=2", "batch=2", f"out={tmp_path / 'two'}"])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "two" / "00000.png")), first)


def test_labels_in_order_make_columns(tmp_path: Path) -> None:
    main(["sample", "solver=ddim", "steps=2", "n=6", "labels=[3,1]", "guidance=2", f"out={tmp_path}"])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    factor = 1024 // 26
    assert grid.shape == (26 * factor, 17 * factor)


def test_multirun_puts_each_job_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--multirun", "model._target_=gaussian_model.make_model", "model.scale=0.1,0.3"]
    main([*command, "solver=ddim", "n=1", "steps=2", "out=sweep"])
    assert {p.name for p in (tmp_path / "sweep").iterdir()} >= {"0", "1"}
    pictures = [(tmp_path / "sweep" / job / "00000.png").read_bytes() for job in ("0", "1")]
    assert pictures[0] != pictures[1]


def test_bench_and_report(images: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["bench", "model._target_=gaussian_model.make_model", "solvers=[ddim,dpmpp_2m]", "nfe=[2,4]"]
    command += ["n=400", "metrics=[fd-blocks]", f"train={images['train']}", "reference.solver=dpmpp_2m"]
    main([*command, f"out={out}"])
    assert f"report: {out}/report.html" in capsys.readouterr().out
    report = (out / "report.html").read_text()
    assert "fastsample bench model._target_=gaussian_model.make_model" in report
    main(["report", f"run={out}", f"out={tmp_path / 'copy'}"])
    assert (tmp_path / "copy" / "report.html").read_text() == report
    assert (tmp_path / "copy" / "results.json").read_bytes() == (out / "results.json").read_bytes()
