"""``fastsample doctor``: what works here, and why not what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        what: what was looked at.
        works: whether it works here.
        detail: a version, a device, or why not and the remedy.
    """

    what: str
    works: bool
    detail: str


@dataclass(frozen=True)
class Examination:
    """All findings; prints as a table."""

    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        width = max(len(f.what) for f in self.findings)
        return "\n".join(
            f"{'ok' if f.works else '--':<3} {f.what:<{width}}  {f.detail}" for f in self.findings
        )


# Distribution -> what it is for.
_OPTIONAL = {
    "diffusers": "pipelines and their schedulers beside ours: pip install 'fastsample[diffusers]'",
    "transformers": "text encoders of pipelines: pip install 'fastsample[diffusers]'",
    "peft": "LoRA students: pip install 'fastsample[peft]'",
    "tensorboard": "pip install 'fastsample[tensorboard]'",
    "k-diffusion": "its samplers beside ours: pip install k-diffusion",
}
_NEEDED = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "safetensors",
    "torch-fidelity",
    "hydra-core",
    "accelerate",
)


def _package(name: str, remedy: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, f"not installed; {remedy}")


def _devices() -> list[Finding]:
    import torch

    found = [Finding("cpu", True, f"{torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
            found.append(
                Finding(f"cuda:{i}", True, f"{torch.cuda.get_device_name(i)}, capability {capability}")
            )
    else:
        built = torch.version.cuda
        why = (
            "this PyTorch has no CUDA"
            if built is None
            else f"PyTorch has CUDA {built}, but no device answers"
        )
        found.append(Finding("cuda", False, why))
    return found


def _kernels() -> list[Finding]:
    import torch

    import fastsample_kernels as kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.zeros(1, 8, 4, device=device)
    q = torch.zeros(1, 1, 4, 16, device=device)
    asked: dict[str, Callable[[], str]] = {
        "group_norm": lambda: kernels.explain("group_norm", x, 4),
        "attention": lambda: kernels.explain("attention", q, q, q),
        "layer_norm": lambda: kernels.explain("layer_norm", x),
        "rms_norm": lambda: kernels.explain("rms_norm", x),
    }
    found = []
    for name, ask in asked.items():
        text = ask().removeprefix(f"{name}: ")
        found.append(Finding(f"kernel {name}", text.startswith("Triton"), text))
    return found


def _metrics() -> list[Finding]:
    from .metrics import FeatureExtractor, dinov2, metric_names, parse_metric
    from .metrics.extractors import inception_file
    from .zoo.features import EXTRACTORS

    found = []
    for name in metric_names():
        if name == "fid":
            file = inception_file()
            why = (
                f"{file}"
                if file.is_file()
                else f"its weights are not at {file}; they are fetched at first use"
            )
            found.append(Finding("metric fid", file.is_file(), why))
            found.append(Finding("metrics kid, precision, recall, isc", file.is_file(), "the weights of fid"))
        elif name in EXTRACTORS:
            dim = FeatureExtractor(parse_metric(name).extractor).dim(EXTRACTORS[name][1])
            found.append(Finding(f"metric {name}", True, f"{dim} features, embedded"))
        elif parse_metric(name).extractor.startswith(dinov2.PREFIX):
            try:
                weights = dinov2.find(parse_metric(name).extractor)[1]
                found.append(Finding(f"metric {name}", True, str(weights)))
            except FileNotFoundError as error:
                found.append(Finding(f"metric {name}", False, str(error)))
        else:
            found.append(
                Finding(f"metric {name}", False, "not looked at: torch-fidelity fetches its weights")
            )
    return [
        *found,
        Finding("metrics kd-, precision-, recall-NAME", True, "where fd-NAME works"),
        Finding("metrics swd, psnr", True, "they need no weights"),
        Finding(
            "metrics cmmd, clip-score", False, "not looked at: weights.clip=FOLDER of transformers' CLIP"
        ),
    ]


def _energy() -> Finding:
    import torch

    from .bench.cost import EnergyMeter

    why = EnergyMeter(torch.device("cuda" if torch.cuda.is_available() else "cpu")).why
    return Finding("energy", why is None, why or "NVML's counter")


def _models() -> list[Finding]:
    from . import zoo

    return [Finding(f"model {name}", True, repr(zoo.load(name).process)) for name in zoo.names()]


def examine() -> Examination:
    """Look at packages, devices, kernels, metrics and embedded models; nothing is downloaded."""
    findings = [_package(name, "pip install fastsample") for name in _NEEDED]
    findings += [_package(name, remedy) for name, remedy in _OPTIONAL.items()]
    findings.append(_package("triton", "the kernels need it: pip install triton (Linux)"))
    return Examination((*findings, *_devices(), _energy(), *_kernels(), *_metrics(), *_models()))
