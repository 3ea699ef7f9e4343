"""The command line: ``fastsample COMMAND [key=value ...]``, Hydra applications over typed configurations.

Nothing heavy is imported until a command's settings have been read, so that ``--help`` is immediate.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastsample.conf import COMMANDS
from fastsample.errors import nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

_SUMMARY = {
    "sample": "write images (PNG) and a grid of them",
    "bench": "measure solvers against steps and time; writes report.html, results.json, results.csv",
    "tune": "fit a solver to a model: the same quality in fewer evaluations, as a small JSON file",
    "distill": "train a student of one to four steps from a model; writes its folder with a model card",
    "report": "write the report of a run again, also of an unfinished one or of several runs together",
    "compare": "what got better or worse between two runs, beyond the uncertainty; an exit status for CI",
    "doctor": "what works here (devices, kernels, metrics, libraries), and why not what does not",
}

_EXAMPLES = {
    "sample": """\
fastsample sample model=digits solver=auto steps=8 n=64 out=runs/digits
fastsample sample solver=dpmpp_2m steps=20 grid=karras labels=[0,1,2,3] guidance=2
fastsample sample 'solver={name: ddim, eta: 1}' steps=100
fastsample sample model._target_=my.module.make_model model.width=64 shape=[3,32,32]""",
    "bench": """\
fastsample bench                                    # demonstration: digits, nine solvers, 4 to 50 evaluations
fastsample bench solvers=[auto,ddim,unipc_3] nfe=[5,10,20] seeds=[0,1] out=runs/mine
fastsample bench solvers=[dpmpp_2m] steps=[8,16] grids=[uniform,karras,logsnr]
fastsample bench model._target_=my.module.make_model train=data/train metrics=[fid] n=50000
fastsample bench metrics=[fd-digits,kd-digits,recall-digits,psnr] 'solvers=[auto,ddim,kdiffusion:dpmpp_2m]'
fastsample bench model._target_=my.module.make_model prompts=prompts.txt metrics=[clip-score] weights.clip=FOLDER
fastsample bench --multirun guidance=1,2,4 out=runs/guidance     # one folder each: runs/guidance/0, 1, 2
fastsample bench --cfg job                          # print the settings, run nothing""",
    "tune": """\
fastsample tune model=digits steps=[4,5,8] out=runs/tuned
fastsample bench 'solvers=[auto,dpmpp_2m,{plan: runs/tuned}]' nfe=[4,5,8]      # beside the others
fastsample sample 'solver={plan: runs/tuned/tuned-5.json}'
fastsample tune model._target_=my.module.make_model shape=[3,32,32] steps=6 budget='10 min'""",
    "distill": """\
fastsample distill method=shortcut teacher=digits out=runs/my-student
fastsample distill method=ect trainer.steps=5000 trainer.batch_size=128 method.q=4
fastsample bench model=runs/my-student nfe=[4,8,16]              # the student beside its teacher
fastsample sample model=runs/my-student steps=1
fastsample distill method._target_=my.module.MyMethod method.weight=2
fastsample distill teacher._target_=my.module.make_model data=cifar10 evaluation.metric=fid trainer.precision=bf16
accelerate launch -m fastsample.cli distill method=dmd2 ...      # several GPUs""",
    "report": """\
fastsample report run=runs/bench
fastsample report run=runs/bench out=public/bench
fastsample report runs=[runs/bench,runs/student] out=runs/both""",
    "compare": """\
fastsample compare a=runs/main b=runs/change
fastsample compare a=runs/main b=runs/change gate=true""",
    "doctor": """\
fastsample doctor                                   # nothing is downloaded""",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``fastsample``.

    Args:
        argv: arguments after the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"fastsample {version('fastsample')}")
        return
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        _fail("", f"no command {command!r}; {nearest(command, COMMANDS)}")
    if "-h" in rest or "--help" in rest:
        print(_command_help(command))
        return
    import hydra

    from fastsample.conf import register

    register()
    if command == "distill":
        from fastsample.conf import register_methods

        register_methods()
    overrides = _checked(command, rest)
    task = _task(command, f"fastsample {shlex.join([command, *rest])}", debugging=_debugging())
    sys.argv = [f"fastsample {command}", *overrides]
    # a package of its own: any folder of `fastsample` (solvers, ...) would be taken for a config group
    application = hydra.main(version_base="1.3", config_path="pkg://fastsample.conf", config_name=command)(
        task
    )
    if _debugging():
        application()
    else:
        _report_errors(command, application)


def _debugging() -> bool:
    """Whether the user asks for tracebacks, by Hydra's variable."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _report_errors(command: str, application: Callable[[], None]) -> None:
    """Run a Hydra application; a fault of the settings becomes one line, any other keeps its traceback."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra prints what it catches otherwise
    try:
        application()
    except YAMLError as error:
        _fail(command, f"a configuration file is not YAML: {' '.join(str(error).split())}")
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line for e in (error, error.__cause__) if e is not None for line in str(e).splitlines()]
        reasons = [
            line for line in lines if line and not line.startswith(" ")
        ]  # the rest is OmegaConf's detail
        if key := re.search(r"Key '(.+?)' not in", " ".join(reasons)):
            reasons.append(nearest(key[1], [name for name, *_ in _settings(COMMANDS[command])]))
        _fail(command, "; ".join(dict.fromkeys(reasons)))
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def _task(command: str, line: str, debugging: bool) -> Callable[[DictConfig], None]:
    def task(settings: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from omegaconf import OmegaConf

        config: Any = OmegaConf.to_object(settings)
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN and hasattr(config, "out"):
            config.out = hydra_config.runtime.output_dir
        from fastsample.bench.errors import DISK_FULL, UserError

        try:
            _RUN[command](config, line)
        except (UserError, OSError) as error:
            disk_full = isinstance(error, OSError) and error.errno in DISK_FULL
            if debugging or not (isinstance(error, UserError) or disk_full):
                raise
            out = getattr(config, "out", None)
            _fail(command, f"out={out}: {error}; free some space" if disk_full else str(error))

    return task


def _sample(config: Any, line: str) -> None:
    from fastsample.bench.sample import sample

    print(f"wrote {sample(config)}")


def _bench(config: Any, line: str) -> None:
    from fastsample.bench.run import bench
    from fastsample.distributed import rank_and_size

    path = bench(config, command=line)
    if rank_and_size()[0] == 0:
        print(f"report: {path}")


def _tune(config: Any, line: str) -> None:
    from fastsample.bench.tune import tune

    for path in tune(config):
        print(f"wrote {path}")


def _distill(config: Any, line: str) -> None:
    from fastsample.bench.distill import distill

    print(f"student: {distill(config)}")


def _report(config: Any, line: str) -> None:
    from fastsample.bench.report import render_runs

    folders = [config.run] if config.runs is None else config.runs
    print(f"report: {render_runs(list(map(Path, folders)), Path(config.out) if config.out else None)}")


def _compare(config: Any, line: str) -> None:
    from fastsample.bench.compare import compare
    from fastsample.bench.errors import UserError

    for name in ("a", "b"):
        if getattr(config, name) is None:
            raise UserError(f"{name}= is missing: fastsample compare a=runs/before b=runs/after")
    text, worse = compare(Path(config.a), Path(config.b))
    print(text)
    if worse and config.gate:
        raise SystemExit(1)


def _doctor(config: Any, line: str) -> None:
    from fastsample.doctor import examine

    print(examine())


_RUN: dict[str, Callable[[Any, str], None]] = {
    "sample": _sample,
    "bench": _bench,
    "tune": _tune,
    "distill": _distill,
    "report": _report,
    "compare": _compare,
    "doctor": _doctor,
}


_FLAGS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
_FLAGS_WITH_VALUE |= {"--config-dir", "-cd", "--experimental-rerun", "--info", "-i"}


def _checked(command: str, arguments: Sequence[str]) -> list[str]:
    """Overrides with their keys checked; keys inside an open setting (``model.width=64``) need no ``+``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    checked: list[str] = []
    places: dict[str, int] = {}
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or previous in _FLAGS_WITH_VALUE:
            checked.append(argument)
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException:
            _fail(command, f"{argument!r} is not a setting; write key=value, quoted where the shell needs it")
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")):
            checked.append(argument)
        else:
            inside_open = _check_key(command, key)
            plain = not (override.is_add() or override.is_force_add() or override.is_delete())
            checked.append(f"++{argument}" if inside_open and plain else argument)
            places.setdefault(key, len(checked) - 1)
    if "method._target_" in places and "method" not in places:
        # the default method's settings are not those of one's own; beside it, as flags divide what Hydra reads
        checked.insert(places["method._target_"], "~method")
    return checked


def _check_key(command: str, key: str) -> bool:
    """Whether ``key`` lies inside an open setting; exits if there is no such setting."""
    schema: type = COMMANDS[command]
    parts = key.split(".")
    for depth, part in enumerate(parts):
        fields = {f.name: f for f in dataclasses.fields(schema)}
        if part not in fields:
            prefix = ".".join(parts[:depth])
            known = [f"{prefix}.{name}" if prefix else name for name in fields]
            within = [n for n, f in zip(known, fields.values(), strict=True) if part in _names(f)]
            also = "".join(f"; there is {name}.{part}" for name in within)
            _fail(command, f"no setting {key!r}{also}; {nearest(key, known)}")
        inner = fields[part].metadata.get("schema")
        if inner is None:
            return depth < len(parts) - 1
        schema = inner
    return False


def _names(field: dataclasses.Field[Any]) -> set[str]:
    """The settings of a group; none where the field is no group."""
    schema = field.metadata.get("schema")
    return {f.name for f in dataclasses.fields(schema)} if schema is not None else set()


def _fail(command: str, message: str) -> NoReturn:
    print(f"{' '.join(['fastsample', command]).strip()}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _help() -> str:
    commands = "\n".join(f"  {name:<8} {text}" for name, text in _SUMMARY.items())
    examples = textwrap.indent("\n".join(text.splitlines()[0] for text in _EXAMPLES.values()), "  ")
    return (
        "usage: fastsample COMMAND [key=value ...]\n\n"
        "Make diffusion and flow models sample in few steps, with the proof.\n\n"
        f"commands:\n{commands}\n\nexamples:\n{examples}\n\n"
        "fastsample COMMAND --help lists a command's settings; fastsample --version prints the version."
    )


def _command_help(command: str) -> str:
    lines: list[str] = []
    for key, default, text in _settings(COMMANDS[command]):
        lines.append(f"  {key}={default}")
        lines += textwrap.wrap(
            text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    examples = textwrap.indent(_EXAMPLES[command], "  ")
    return (
        f"usage: fastsample {command} [key=value ...] [--cfg job] [--multirun]\n\n"
        f"{_SUMMARY[command]}\n\nexamples:\n{examples}\n\nsettings:\n" + "\n".join(lines) + "\n\n"
        "--cfg job prints the settings and runs nothing; --multirun runs every combination of "
        "comma-separated values;\n--hydra-help lists what else Hydra offers."
    )


def _settings(schema: type, prefix: str = "") -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for f in dataclasses.fields(schema):
        inner = f.metadata.get("schema")
        if inner is not None:
            found += _settings(inner, f"{prefix}{f.name}.")
        else:
            assert f.default_factory is not dataclasses.MISSING
            found.append((prefix + f.name, _literal(f.default_factory()), f.metadata["help"]))
    return found


def _literal(value: Any) -> str:
    """A default as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    return str(value)


if __name__ == "__main__":
    main()
