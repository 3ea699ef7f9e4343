"""Students: a network, what it means, and the plans it samples with, in a folder."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..denoiser import Denoiser, wrap
from ..integrations.pipelines import Network
from ..plan import Plan, write_atomically
from ..process import from_description
from ..sampler import Sampler
from .adapters import Conditioned
from .checkpoint import MANIFEST, seal, verify
from .lora import again, lora_of
from .method import student_plan
from .weights import load_own, own_state

FORMAT = "fastsample.student"
SCHEMA = 1
_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "student.json", "README.md"
_MEANT_STEPS = ("step", "nfe", "num_steps", "num_inference_steps")


@dataclass
class Student:
    """A distilled model: ``student(n=16, seed=0, steps=1, labels=...)``.

    Attributes:
        denoiser: the network with its meaning.
        solver, options: what it samples with, of ``fs.solvers``, and its options.
        steps: the numbers of steps it was made for.
        method: the method's name and settings, for the record.
        measured: the model card's table: one row for each number of steps.
        training: how it was trained, for the record.
    """

    denoiser: Denoiser
    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (1, 2, 4)
    method: dict[str, Any] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    def plan(self, steps: int) -> Plan:
        """The plan of a number of steps; any is possible, ``self.steps`` are those it was made for."""
        return student_plan(self.denoiser, self.solver, steps, self.options)

    def sampler(self, steps: int | None = None) -> Sampler:
        """The sampler of a number of steps, by default the fewest."""
        return Sampler(self.denoiser, plan=self.plan(self.steps[0] if steps is None else steps))

    def __call__(
        self, shape: Sequence[int] | None = None, *, steps: int | None = None, **settings: Any
    ) -> Any:
        """Draw samples; settings are those of :class:`fastsample.Sampler`'s call (n, seed, conditions, ...).

        Raises:
            TypeError: the number of steps under another name, which the network has no condition of.
        """
        for name in _MEANT_STEPS:
            if name in settings and not _takes(self.denoiser.net, name):
                raise TypeError(
                    f"{name}={settings[name]!r} is no condition of the network; did you mean steps={settings[name]!r}?"
                )
        return self.sampler(steps)(shape, **settings)

    def to(self, device: torch.device | str) -> Student:
        """The same student, its network moved to a device."""
        self.denoiser.net.to(device)  # type: ignore[attr-defined]
        return self

    # -- the folder ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the student to a folder; the manifest comes last.

        Raises:
            ValueError: the network is no module.
        """
        from safetensors.torch import save

        net, target = self.denoiser.net, Path(folder)
        if not isinstance(net, nn.Module):
            raise ValueError(f"the network is a {type(net).__name__}; a module with weights is needed")
        target.mkdir(parents=True, exist_ok=True)
        (target / MANIFEST).unlink(missing_ok=True)  # not whole from here on
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in own_state(net).items()}
        write_atomically(target / _WEIGHTS, save(tensors))
        files = [_WEIGHTS, _CONFIG, _CARD]
        for steps in self.steps:
            self.plan(steps).save(target / f"plan-{steps}.json")
            files.append(f"plan-{steps}.json")
        write_atomically(target / _CONFIG, json.dumps(self._config(), indent=1).encode())
        write_atomically(target / _CARD, self.card().encode())
        seal(target, files)
        return target

    def _config(self) -> dict[str, Any]:
        denoiser = self.denoiser
        levels = denoiser.process.levels
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "network": architecture(denoiser.net),
            "adapter": adapter_of(denoiser.net),
            "lora": lora_of(denoiser.net),
            "process": denoiser.process.describe(),
            "levels": None if levels is None else levels.tolist(),
            "prediction": denoiser.prediction,
            "time_input": denoiser.time_input if isinstance(denoiser.time_input, str) else None,
            "learned_variance": denoiser.learned_variance,
            "sample_shape": denoiser.sample_shape,
            "decoded": denoiser.decode is not None,
            "conditions": {k: v for k, v in denoiser.conditions.items() if _is_plain(v)},
            "solver": self.solver,
            "options": self.options,
            "steps": list(self.steps),
            "method": self.method,
            "measured": self.measured,
            "training": self.training,
        }

    def card(self) -> str:
        """The model card, with what was measured."""
        name = self.method.get("name", "a method of one's own")
        lines = [
            f"# A student of {', '.join(map(str, self.steps))} steps",
            "",
            f"Distilled by `{name}`; {self.denoiser.process!r}, prediction {self.denoiser.prediction!r}; samples of "
            f"shape {self.denoiser.sample_shape}.",
            "",
            "    import fastsample as fs",
            '    student = fs.load("this folder")',
            f"    student(n=16, seed=0, steps={self.steps[0]})",
            "",
        ]
        if self.measured:
            keys = list(self.measured[0])
            lines += [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
            lines += [f"| {' | '.join(_shown(row.get(k)) for k in keys)} |" for row in self.measured]
        else:
            lines.append("Nothing was measured: no metric was given.")
        lines += ["", "Training:", ""]
        lines += [f"- {key}: {_shown(value)}" for key, value in self.training.items()]
        settings = {k: v for k, v in self.method.items() if k != "name"}
        lines += [f"- {key}: {_shown(value)}" for key, value in settings.items()]
        return "\n".join(lines) + "\n"

    def export_diffusers(self, folder: str | Path) -> Path:
        """Write the network as a diffusers model folder (``from_pretrained`` reads it), the plans beside it.

        A LoRA student is written as LoRA weights, which the teacher's network reads:
        ``load_lora_adapter(folder, prefix=None, use_safetensors=True)``.

        Raises:
            ValueError: the network is not one of diffusers, or has an adapter.
        """
        whole: Any = self.denoiser.net
        net, lora = _inside(whole), lora_of(whole) is not None
        if isinstance(whole, Conditioned):
            raise ValueError(
                f"the network is told its {whole.name} by an adapter, which a diffusers folder of a "
                f"{type(net).__name__} has no place for; load the student's own folder by fs.load"
            )
        if not hasattr(net, "save_lora_adapter" if lora else "save_pretrained"):
            which = "whose LoRA weights diffusers reads" if lora else "of diffusers"
            raise ValueError(
                f"the network is a {type(net).__name__}, which is not one {which}; load it by fs.load"
            )
        if lora:
            net.peft_config = whole.peft_config  # which peft leaves at the outermost module
            net.save_lora_adapter(folder)
        else:
            net.save_pretrained(folder)
        for steps in self.steps:
            self.plan(steps).save(Path(folder) / f"plan-{steps}.json")
        return Path(folder)


def _inside(net: Any) -> Any:
    """A network without this package's adapters around it."""
    while isinstance(net, (Conditioned, Network)):
        net = net.net if isinstance(net, Conditioned) else net.module
    return net


def _takes(net: Any, name: str) -> bool:
    """Whether a network has a condition; a number that an adapter tells is the plan's, not a caller's."""
    inside = _inside(net)
    parameters = inspect.signature(getattr(inside, "forward", inside)).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def architecture(net: Any) -> dict[str, Any] | None:
    """How a network is built again without its weights; None where it does not say.

    Understood are modules with their constructor's arguments in ``config`` (a mapping; diffusers models have
    it), alone, of a wrapped pipeline, or with an adapter of this package.
    """
    if isinstance(net, Conditioned):
        inner = architecture(net.net)
        return None if inner is None else {"adapter": adapter_of(net), "net": inner}
    if isinstance(net, Network):
        inner = architecture(net.module) if lora_of(net) is None else None
        return None if inner is None else {"pipeline": inner}
    config = getattr(net, "config", None)
    if lora_of(net) is not None or not isinstance(config, Mapping):
        return None
    own = {k: v for k, v in config.items() if not k.startswith("_")}
    kind = f"{type(net).__module__}.{type(net).__qualname__}"
    return {"class": kind, "config": own} if _is_plain(own) and "<" not in kind else None


def adapter_of(net: Any) -> dict[str, Any] | None:
    """The arguments of a network's adapter; None where it has none."""
    if not isinstance(net, Conditioned):
        return None
    return {"name": net.name, "at": list(net.at), "width": net.width, "scale": net.scale}


def build(description: Mapping[str, Any]) -> nn.Module:
    """The inverse of :func:`architecture`, with fresh weights.

    Raises:
        ValueError: its class is not to be found, or no module.
    """
    if "adapter" in description:
        return Conditioned(build(description["net"]), **description["adapter"])
    if "pipeline" in description:
        return Network(build(description["pipeline"]))
    module, _, name = str(description["class"]).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the student's network is a {description['class']}, which cannot be imported ({error}); "
            "give net=, a network of the same architecture"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(
            f"the student's network is said to be a {description['class']}, which is no torch.nn.Module"
        )
    return kind(**description["config"])


def _embedded(folder: Path, name: Any) -> Denoiser:
    """The teacher of a LoRA student, where it is an embedded model."""
    from .. import zoo

    if not isinstance(name, str) or name not in zoo.names():
        raise ValueError(
            f"{folder} holds LoRA weights on the student's teacher; give it: fs.load(folder, teacher)"
        )
    return zoo.load(name)


def record(folder: str | Path) -> dict[str, Any]:
    """What a student's folder says of it, ``student.json``; every file is checked against the manifest first.

    Raises:
        ValueError: no student, or a damaged file; the message says what to do.
    """
    source = Path(folder)
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; give that of a finished student")
    if not (source / MANIFEST).is_file() and (source / "checkpoints").is_dir():
        raise ValueError(
            f"{source} holds a training that is not finished; run the same command again to go on"
        )
    verify(source)
    config = json.loads((source / _CONFIG).read_text())
    if config.get("format") != FORMAT or config.get("schema") != SCHEMA:
        raise ValueError(
            f"{source / _CONFIG} is no student of this version (schema {SCHEMA}); upgrade fastsample"
        )
    return config


def stands_alone(config: Mapping[str, Any]) -> bool:
    """Whether a student of this :func:`record` is loaded from its folder alone."""
    return config["network"] is not None and config["time_input"] is not None


def load(
    folder: str | Path, net: nn.Module | Denoiser | None = None, *, device: torch.device | str | None = None
) -> Student:
    """A student from its folder; every file is checked against the manifest first.

    Args:
        folder: as written by a trainer or :meth:`Student.save`.
        net: a network of the student's architecture, where it cannot be built again by itself (it tells no
            ``config``); or its teacher, of which a copy is taken. Its weights are replaced. LoRA students need
            it, share its parameters and leave them as they are.
        device: where to put it; by default the CPU, and LoRA students where their base is.

    Raises:
        TypeError: ``net`` is neither a module nor a denoiser of one.
        ValueError: no student, a damaged file, or a network that cannot be built; the message says what to do.
    """
    from safetensors.torch import load as parse

    given = net.net if isinstance(net, Denoiser) else net
    if given is not None and not isinstance(given, nn.Module):
        what = f"a Denoiser of a {type(given).__name__}" if isinstance(net, Denoiser) else f"{given!r}"
        raise TypeError(
            f"net= is {what}; give a torch.nn.Module, or the teacher as a Denoiser of one: "
            'fs.load(folder, fs.zoo.load("digits"))'
        )
    source = Path(folder)
    config = record(source)
    lora = config.get("lora")
    if lora is not None and net is None:
        net = _embedded(source, config["training"].get("teacher"))
    teacher = net if isinstance(net, Denoiser) else None
    if teacher is not None:
        import copy

        net = teacher.net if lora is not None else copy.deepcopy(teacher.net)  # type: ignore[assignment]
    if lora is not None:
        assert isinstance(net, nn.Module)
        place = next(net.parameters()).device
        if device is not None and torch.device(device) != place:
            raise ValueError(
                f"device={str(device)!r}, but the LoRA student's base is on {place}; move that first"
            )
        device, net = place, again(net, lora)
    adapter = config["adapter"]
    if adapter is not None and isinstance(net, nn.Module):
        own = isinstance(net, Conditioned) and net.name == adapter["name"]
        net = net if own else Conditioned(net, **adapter)
    if net is None:
        if config["network"] is None:
            raise ValueError(
                f"{source}: the student's network does not say how it is built; give net=, a network of the same "
                "architecture (or its teacher)"
            )
        net = build(config["network"])
    assert isinstance(net, nn.Module)
    tensors = parse((source / _WEIGHTS).read_bytes())
    try:
        load_own(net, tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{source}: the weights do not fit the network: {str(error).splitlines()[1].strip()}"
        ) from error
    time_input = config["time_input"] or (teacher.time_input if teacher else None)
    if time_input is None:
        raise ValueError(
            f"{source}: the network's time_input is a function of its own; give net=, its teacher"
        )
    process = from_description(config["process"])
    denoiser = wrap(
        net.to(device or "cpu").eval().requires_grad_(False),
        process,
        config["prediction"],
        time_input=time_input,
        quantize=False if config["levels"] is None else config["levels"],
        learned_variance=config["learned_variance"],
        conditions=config["conditions"],
        sample_shape=config["sample_shape"],
        encode=teacher.encode if teacher else None,
        decode=teacher.decode if teacher else None,
    )
    return Student(
        denoiser,
        config["solver"],
        config["options"],
        tuple(config["steps"]),
        config["method"],
        config["measured"],
        config["training"],
    )
