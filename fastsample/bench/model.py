"""What the commands make of their settings: the model, its labels, the samplers."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsample.denoiser import Bound, Denoiser
from fastsample.errors import unknown
from fastsample.metrics.statistics import GROUPS
from fastsample.noise import philox
from fastsample.plan import Plan
from fastsample.sampler import Sampler

if TYPE_CHECKING:
    from fastsample.distill.student import Student

_LABELS = 0xFFFFFFFF  # noise stream of the labels; plans use 0 and their rows' numbers


@dataclass(frozen=True)
class Model:
    """A model ready to be sampled.

    Attributes:
        name: what the report calls it.
        denoiser: on its device, with guidance set.
        shape: (C, H, W) of one sample.
        classes: number of classes; None for models without labels.
        identity: what distinguishes it from other models, as JSON values.
        image_shape: (C, H, W) of one image: of a decoded sample for latent models.
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, ...]
    classes: int | None
    identity: dict[str, Any]
    image_shape: tuple[int, ...]

    def images(self, samples: Tensor) -> Tensor:
        """Images in [-1, 1] of samples."""
        decode = self.denoiser.decode
        return samples if decode is None else decode(samples)


def load_model(
    model: str | Mapping[str, Any],
    *,
    shape: Sequence[int] | None = None,
    classes: int | None = None,
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
    setting: str = "model",
) -> Model:
    """The model that a setting names.

    Args:
        model: name of an embedded model, the folder of a student, or ``{"_target_": "module.function", ...}``
            that returns a Denoiser.
        shape: shape of one sample where the denoiser does not say.
        classes: number of classes of a model that is not embedded.
        guidance: classifier-free guidance scale.
        device: where to put the network.
        setting: what messages call the setting.

    Raises:
        ValueError: on an unknown name, a target that fails or returns something else, or a missing shape.
    """
    described: Any
    null: dict[str, Any]
    if isinstance(model, str) and student_folder(model):
        student = load_student(model, device=device)
        name, denoiser, described, null = model, student.denoiser, model, {}
        classes = student.training.get("classes") if classes is None else classes
    elif isinstance(model, str):
        from fastsample import zoo
        from fastsample.zoo.data import NUM_CLASSES

        if model not in zoo.names():
            raise unknown(setting, model, zoo.names())
        name, denoiser = model, zoo.load(model)
        classes = NUM_CLASSES
        null = {"null": {"labels": NUM_CLASSES}}
        described = model
    elif isinstance(model, Mapping) and "_target_" in model:
        from hydra.errors import InstantiationException
        from hydra.utils import instantiate

        name = str(model["_target_"])
        described = dict(model)
        null = {}  # the target's own guidance says
        try:
            denoiser = instantiate(described)
        except InstantiationException as error:
            raise ValueError(f"{setting}._target_={name}: {error}") from error
    else:
        raise ValueError(
            f"{setting}={model!r}: give the name of an embedded model, the folder of a student, or "
            f"{setting}._target_=my.module.make_model"
        )
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            f"{setting}={name} returned a {type(denoiser).__name__}; return a Denoiser: "
            'fastsample.wrap(net, process, prediction="eps")'
        )
    if isinstance(denoiser.net, nn.Module):
        denoiser.net.to(device).eval()
    denoiser = denoiser.replace(source=described)
    if guidance != 1:
        if not null and denoiser.guidance is None and denoiser.encode is not None:
            null = {"null": denoiser.encode([""])}  # away from the empty prompt
        denoiser = denoiser.guided(guidance, **null)
    full = tuple(shape) if shape is not None else denoiser.sample_shape
    if full is None:
        raise ValueError(
            f"shape: {setting}={name} does not say the shape of a sample; give shape=[3,32,32], say"
        )
    image_shape = full
    if denoiser.decode is not None:
        image_shape = tuple(denoiser.decode(torch.zeros(1, *full, device=device)).shape[1:])
    if len(image_shape) != 3 or image_shape[0] not in (1, 3):
        raise ValueError(
            f"shape={list(image_shape)}: images with 1 or 3 channels, [C, H, W], are needed; a latent model says how "
            "samples become images: fs.wrap(..., decode=function)"
        )
    identity = {
        "model": described,
        "weights": _weights_sha256(denoiser.net),
        "process": denoiser.process.fingerprint,
        "prediction": denoiser.prediction,
        "guidance": guidance,
    }
    return Model(name, denoiser.replace(sample_shape=full), full, classes, identity, image_shape)


def load_student(
    folder: str, base: Denoiser | None = None, *, device: torch.device | str | None = None
) -> Student:
    """A student from its folder, also one that cannot be loaded from it alone.

    Args:
        folder: of a finished student.
        base: what a network that does not say how it is built is copied from; by default the teacher that the
            folder names, which is made again (its ``_target_`` is called) and says how latents are decoded, too.
        device: where to put it.

    Raises:
        ValueError: no such student, or a teacher that is not named or cannot be made; the message says what to do.
    """
    from fastsample.distill.student import load, record, stands_alone

    said = record(folder)
    alone = stands_alone(said)
    if alone and (base is not None or not said.get("decoded")):
        return load(folder, device=device)
    which = "its teacher" if base is None else "model="
    if base is None:
        base = _teacher_of(folder, said, device or "cpu")
    if alone:
        student = load(folder, device=device)
        student.denoiser = student.denoiser.replace(encode=base.encode, decode=base.decode)
        return student
    try:
        return load(folder, base, device=device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"student {folder}, whose network is a copy of that of {which}: {error}") from error


def _teacher_of(folder: str, said: Mapping[str, Any], device: torch.device | str) -> Denoiser:
    teacher = said["training"].get("teacher")
    remedy = f"name its teacher, and the student as the solver: model=... solver={{student: {folder}}}"
    if teacher is None:
        raise ValueError(
            f"{folder}: the student cannot be loaded without its teacher, which the folder does not name; {remedy}"
        )
    try:
        return load_model(teacher, shape=said["sample_shape"], device=device, setting="teacher").denoiser
    except ValueError as error:
        raise ValueError(f"{folder}: the student's teacher cannot be made: {error}; {remedy}") from error


def student_folder(model: Any) -> bool:
    """Whether ``model=`` names a folder (of a student) rather than an embedded model."""
    return isinstance(model, str) and Path(model).is_dir()


def _weights_sha256(net: Any) -> str | None:
    if not isinstance(net, nn.Module):
        return None
    total = hashlib.sha256()
    for key, tensor in sorted(net.state_dict().items()):
        total.update(key.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def draw_labels(labels: Any, classes: int | None, seed: int, index: Tensor) -> Tensor | None:
    """Labels of the samples ``index``.

    Drawn labels are balanced: each jackknife group (index modulo 20) goes through random permutations of all
    classes, one after the other. Groups stay exchangeable, and no number of samples is lost to the noise of
    class frequencies.

    Args:
        labels: "auto" (drawn from (seed, index) where the model has classes), None, one label, or a list
            (repeated in the order of the index).
        classes: number of classes, None for a model without labels.
        seed: seed of the draw.
        index: global sample indices, int64 ``[B]``.

    Returns:
        int64 ``[B]`` on the device of ``index``, or None for unconditional samples.

    Raises:
        ValueError: on labels that the model does not have.
    """
    if labels is None or (labels == "auto" and classes is None):
        return None
    if classes is None:
        raise ValueError(f"labels={labels!r}: this model has no classes; use labels=auto, or give classes=")
    if labels == "auto":
        position = index // GROUPS
        permutation = position // classes * GROUPS + index % GROUPS
        words = philox(seed, torch.arange(classes, device=index.device)[None], _LABELS, permutation[:, None])[
            0
        ]
        return words.argsort(dim=1).gather(1, (position % classes)[:, None])[:, 0]
    choices = [labels] if isinstance(labels, int) else labels
    if not isinstance(choices, list) or not choices or not all(type(c) is int for c in choices):
        raise ValueError(f"labels={labels!r}: give auto, null, a label or a list of labels")
    if not all(0 <= c < classes for c in choices):
        raise ValueError(f"labels={labels!r}: labels are 0 to {classes - 1}")
    return torch.tensor(choices, device=index.device)[index % len(choices)]


def check_conditions(model: Model, given: Collection[str]) -> None:
    """Check that guidance has the conditions that it replaces.

    Args:
        model: the model.
        given: names of the conditions that samples get.

    Raises:
        ValueError: if one of them is neither the denoiser's own nor drawn.
    """
    guidance = model.denoiser.guidance
    if guidance is None or guidance.scale == 1:
        return
    for key in guidance.null:
        if key not in model.denoiser.conditions and key not in given:
            raise ValueError(
                f"guidance={guidance.scale:g} needs the condition {key!r}, which the samples do not have; "
                "use guidance=1, or labels=auto (and classes= for your own model), or prompts=FILE"
            )


def solver_label(solver: Any) -> str:
    """``"ddim"``, ``"ddim(eta=1)"`` for a solver with options, the ``label`` of plan files ("tuned").

    Raises:
        ValueError: if it is neither a name, nor a mapping with a name, nor one with a plan.
    """
    if isinstance(solver, Mapping) and "plan" in solver:
        unknown_keys = set(solver) - {"plan", "label"}
        if unknown_keys:
            raise ValueError(f"solver={dict(solver)}: a plan file takes no {', '.join(sorted(unknown_keys))}")
        return str(solver.get("label", "tuned"))
    if isinstance(solver, Mapping) and "student" in solver:
        unknown_keys = set(solver) - {"student", "label"}
        if unknown_keys:
            raise ValueError(f"solver={dict(solver)}: a student takes no {', '.join(sorted(unknown_keys))}")
        return str(solver.get("label", Path(str(solver["student"])).name))
    if isinstance(solver, str):
        return solver
    if isinstance(solver, Mapping) and "label" in solver:
        return str(solver["label"])
    if isinstance(solver, Mapping) and isinstance(solver.get("_target_"), str):
        return solver["_target_"].rpartition(".")[2]
    if isinstance(solver, Mapping) and isinstance(solver.get("name"), str):
        options = ", ".join(f"{key}={value}" for key, value in solver.items() if key != "name")
        return f"{solver['name']}({options})" if options else solver["name"]
    raise ValueError(
        f"solver={solver!r}: give a name, {{name: ddim, eta: 0.5}}, {{plan: tuned.json}}, "
        "{student: FOLDER} or {_target_: my.module.sample} (each with label: NAME, too)"
    )


def plan_files(solver: Any) -> list[Path] | None:
    """The plan files that a solver entry ``{plan: FILE, FOLDER, PATTERN or a list}`` names; None for others.

    Raises:
        ValueError: if there are none.
    """
    if not (isinstance(solver, Mapping) and "plan" in solver):
        return None
    given = solver["plan"] if isinstance(solver["plan"], list) else [solver["plan"]]
    files: list[Path] = []
    for one in map(str, given):
        found = Path(one).glob("tuned-*.json") if Path(one).is_dir() else map(Path, glob.glob(one))
        files += sorted(found)
    if not files:
        raise ValueError(f"plan={solver['plan']}: no such file; give a JSON file written by fastsample tune")
    return files


def check_names(solver: Any, grid: str | None) -> None:
    """Check the names of a solver and a grid before anything is loaded.

    Raises:
        ValueError: if one of them is unknown (the nearest name is given).
    """
    from fastsample import grids, solvers
    from fastsample.bench import kdiffusion, peers

    solver_label(solver)
    files = plan_files(solver)
    if files is not None:
        for file in files:
            Plan.load(file)
        return
    if isinstance(solver, Mapping) and "student" in solver:
        if grid is not None:
            raise ValueError(f"student={solver['student']} has plans of its own; use grids=[null]")
        from fastsample.distill.checkpoint import verify

        verify(Path(str(solver["student"])))
        return
    if isinstance(solver, Mapping) and "_target_" in solver:
        return
    name = solver if isinstance(solver, str) else solver["name"]
    known = sorted({"auto", *solvers.names()})
    if name.startswith((peers.PREFIX, kdiffusion.PREFIX)):
        if name.startswith(peers.PREFIX):
            peers.scheduler_class(name)
        else:
            kdiffusion.function(name)
        if grid is not None:
            raise ValueError(
                f"solver={name}: other libraries' samplers have grids of their own; use grids=[null]"
            )
    elif name not in known:
        raise unknown("solver", name, known)
    if grid is not None and grid not in grids.names():
        raise unknown("grid", grid, grids.names())


def make_sampler(denoiser: Denoiser, solver: Any, steps: int, grid: str | None, end: str | None) -> Any:
    """A sampler from the commands' settings; a solver's own options (``end`` among them) come first.

    Raises:
        ValueError: if the solver cannot be used so; the message says why.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1 is needed")
    files = plan_files(solver)
    if files is not None:
        if len(files) > 1:
            raise ValueError(f"plan={solver['plan']} names {len(files)} files; give the one to use")
        return Sampler(denoiser, plan=files[0])
    if isinstance(solver, Mapping) and "student" in solver:
        return student_samplers(denoiser, solver["student"], [steps])[0]
    from fastsample.bench import kdiffusion, peers

    options = {} if isinstance(solver, str) else dict(solver)
    options.pop("label", None)
    if "_target_" in options:
        if denoiser.sample_shape is None:
            raise ValueError("a function's evaluations are counted on one sample: give shape=")
        return peers.FunctionSampler(denoiser, options.pop("_target_"), steps, options, denoiser.sample_shape)
    name = solver if isinstance(solver, str) else options.pop("name")
    if name.startswith(peers.PREFIX):
        return peers.DiffusersSampler(denoiser, name, steps, options)
    if name.startswith(kdiffusion.PREFIX):
        return kdiffusion.KDiffusionSampler(denoiser, name, steps, options)
    for key in ("solver", "steps", "plan", "hooks"):
        if key in options:
            raise ValueError(f"solver={solver_label(solver)}: {key} is no option of a solver")
    return Sampler(denoiser, name, steps, **({"grid": grid, "end": end} | options))


def student_samplers(denoiser: Denoiser, folder: Any, steps: Sequence[int] | None = None) -> list[Sampler]:
    """The samplers of a student, whose evaluations count like those of ``denoiser`` (its teacher).

    Args:
        denoiser: the model beside it.
        folder: of the student.
        steps: numbers of steps; None: those it was made for.

    Raises:
        ValueError: its samples have another shape, or its network is not the model's.
    """
    from fastsample.distill.checkpoint import MANIFEST, sha256
    from fastsample.distill.student import record

    folder = str(folder)
    shape = record(folder)["sample_shape"]
    shapes = denoiser.sample_shape, None if shape is None else tuple(shape)
    if None not in shapes and shapes[0] != shapes[1]:
        raise ValueError(f"student={folder} makes samples of shape {shapes[1]}, the model of {shapes[0]}")
    base = None  # the model may be the student itself
    if denoiser.source != folder:
        counting = isinstance(denoiser.net, _CountedModule)
        base = denoiser.replace(net=denoiser.net.net) if counting else denoiser  # type: ignore[attr-defined]
    student = load_student(folder, base, device=denoiser.device)
    own = student.denoiser
    if isinstance(denoiser, _CountedDenoiser):
        own, _ = counted(own, denoiser._tally)
    samplers = [Sampler(own, plan=student.plan(k)) for k in (student.steps if steps is None else steps)]
    identity = sha256(Path(folder) / MANIFEST)
    for sampler in samplers:
        sampler.identity = identity
    return samplers


class Tally:
    """What a network really did: rows it was given, and evaluations of the denoiser."""

    def __init__(self) -> None:
        self.rows = 0
        self._bound: list[Bound] = []

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser, one for each sample of a batch (guidance does not count twice)."""
        return sum(bound.evaluations * bound.batch for bound in self._bound)

    def reset(self) -> None:
        """Start again from zero."""
        self.rows = 0
        self._bound.clear()


class _CountedDenoiser(Denoiser):
    _tally: Tally

    def bind(self, batch: int, conditions: Mapping[str, Any], device: torch.device) -> Bound:
        bound = super().bind(batch, conditions, device)
        self._tally._bound.append(bound)
        return bound


class _CountedModule(nn.Module):
    def __init__(self, net: nn.Module, tally: Tally) -> None:
        super().__init__()
        self.net = net
        self.tally = tally

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Any:
        self.tally.rows += x.shape[0]
        return self.net(x, t, **conditions)


def counted(denoiser: Denoiser, tally: Tally | None = None) -> tuple[Denoiser, Tally]:
    """The same denoiser with every network row and every evaluation counted in the tally."""
    import dataclasses

    tally = Tally() if tally is None else tally
    net = denoiser.net
    if isinstance(net, nn.Module):
        counting: Any = _CountedModule(net, tally)
    else:

        def counting(x: Tensor, t: Tensor, **conditions: Any) -> Any:
            tally.rows += x.shape[0]
            return net(x, t, **conditions)

    fields = {f.name: getattr(denoiser, f.name) for f in dataclasses.fields(denoiser)}
    result = _CountedDenoiser(**(fields | {"net": counting}))
    object.__setattr__(result, "_tally", tally)  # a frozen dataclass
    return result, tally
