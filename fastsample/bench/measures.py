"""The metrics of a run: one measure each, prepared before any work, with one accumulator for each cell.

A measure turns a batch into values, a state gathers them in one pass, and the estimate comes from the state: moments
or sums in memory that does not grow with the number of samples, or the values of the first samples where pairs or
ranks of samples are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsample.bench.data import ImageSet
from fastsample.errors import unknown
from fastsample.metrics import FeatureExtractor, FrechetEstimate, FrechetReference, GroupedMoments, estimate
from fastsample.metrics.clip import Clip
from fastsample.metrics.extractors import frechet_metrics, metric_name, split_name
from fastsample.metrics.frechet import RELIABLE_RATIO, minimum_samples
from fastsample.metrics.kernel import KernelReference
from fastsample.metrics.manifold import Manifold, precision, recall
from fastsample.metrics.scores import of_means, psnr, score_of_means, score_terms
from fastsample.metrics.sliced import SlicedReference, project
from fastsample.metrics.statistics import GROUPS, GroupSums, Rows, read_sealed, write_sealed

_FEATURES_SCHEMA = "fastsample.features/1"
_CMMD_SCALE = 1000.0  # as the paper reports it
_PROJECTIONS = 256

Extractor = FeatureExtractor | Clip


class Batch:
    """Samples of a cell as the measures see them.

    Args:
        images: uint8 ``[B, C, H, W]``.
        index: their global indices.
        error: mean square error of each to the reference solution ``[B]`` of the samples that have one, the first.
        prompt: the prompts' numbers ``[B]``.
    """

    def __init__(
        self, images: Tensor, index: range, error: Tensor | None = None, prompt: Tensor | None = None
    ) -> None:
        self.images, self.index, self.error, self.prompt = images, index, error, prompt
        self._features: dict[str, Tensor] = {}

    def features(self, extractor: Extractor) -> Tensor:
        """The images' features, extracted once for all measures that want them."""
        if extractor.sha256 not in self._features:
            self._features[extractor.sha256] = extractor(self.images)
        return self._features[extractor.sha256]


State = GroupedMoments | GroupSums | Rows


@dataclass
class Measure:
    """One metric of a run.

    Attributes:
        name: its full name, with the number of samples.
        splits: what it compares with: image sets, or one word for measures without.
        what: how it is measured, a sentence for the report.
        identity: digest of all that its numbers depend on beside the samples.
        higher: whether more is better.
    """

    name: str
    splits: tuple[str, ...]
    what: str
    identity: str
    higher: ClassVar[bool] = False

    def start(self) -> State:
        """An empty state."""
        raise NotImplementedError

    def values(self, batch: Batch) -> tuple[Tensor, range]:
        """What the state gathers of a batch, and the samples' indices."""
        raise NotImplementedError

    def estimate(self, state: State, split: str) -> FrechetEstimate | None:
        """The result; None where there is none for this cell."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What the report has to know, as JSON values."""
        return {"splits": list(self.splits), "what": self.what, "higher": self.higher}


class Accumulator:
    """One measure over one cell: ``update`` a batch at a time, then ``estimates``."""

    def __init__(self, measure: Measure) -> None:
        self.measure, self.state = measure, measure.start()

    def update(self, batch: Batch) -> None:
        """Take in a batch."""
        values, index = self.measure.values(batch)
        self.state.update(values, index)

    def estimates(self) -> dict[str, dict[str, Any] | None]:
        """The result for each split, as JSON values."""
        found = {split: self.measure.estimate(self.state, split) for split in self.measure.splits}
        return {split: None if e is None else e.to_dict() for split, e in found.items()}


@dataclass
class _Frechet(Measure):
    extractor: FeatureExtractor
    dim: int
    references: Mapping[str, FrechetReference]

    def start(self) -> State:
        return GroupedMoments(self.dim)

    def values(self, batch: Batch) -> tuple[Tensor, range]:
        return batch.features(self.extractor), batch.index

    def estimate(self, state: State, split: str) -> FrechetEstimate:
        assert isinstance(state, GroupedMoments)
        return estimate(state, self.references[split])


@dataclass
class _Kept(Measure):
    """Compares the features of the first n samples."""

    extractor: Extractor
    n: int
    references: Mapping[str, Any]

    def start(self) -> State:
        return Rows(self.n, next(iter(self.references.values())).features.shape[1])

    def values(self, batch: Batch) -> tuple[Tensor, range]:
        return batch.features(self.extractor), batch.index


class _Kernel(_Kept):
    def estimate(self, state: State, split: str) -> FrechetEstimate:
        assert isinstance(state, Rows)
        return self.references[split].distance(state.values)


class _Cmmd(_Kernel):
    def estimate(self, state: State, split: str) -> FrechetEstimate:
        return super().estimate(state, split).scaled(_CMMD_SCALE)


class _Precision(_Kept):
    higher = True

    def estimate(self, state: State, split: str) -> FrechetEstimate:
        assert isinstance(state, Rows)
        return precision(state.values, self.references[split])


class _Recall(_Kept):
    higher = True

    def estimate(self, state: State, split: str) -> FrechetEstimate:
        assert isinstance(state, Rows)
        return recall(state.values, self.references[split])


@dataclass
class _Sliced(Measure):
    n: int
    references: Mapping[str, SlicedReference]

    def start(self) -> State:
        return Rows(self.n, _PROJECTIONS)

    def values(self, batch: Batch) -> tuple[Tensor, range]:
        return _directions(batch.images), batch.index

    def estimate(self, state: State, split: str) -> FrechetEstimate:
        assert isinstance(state, Rows)
        return self.references[split].distance(state.values)


@dataclass
class _InceptionScore(Measure):
    higher = True
    extractor: FeatureExtractor
    classes: int

    def start(self) -> State:
        return GroupSums(self.classes + 1)

    def values(self, batch: Batch) -> tuple[Tensor, range]:
        return score_terms(self.extractor.logits(batch.features(self.extractor))), batch.index

    def estimate(self, state: State, split: str) -> FrechetEstimate:
        assert isinstance(state, GroupSums)
        return of_means(state, score_of_means, corrected=True)


@dataclass
class _ClipScore(Measure):
    higher = True
    extractor: Clip
    texts: Tensor

    def start(self) -> State:
        return GroupSums(1)

    def values(self, batch: Batch) -> tuple[Tensor, range]:
        assert batch.prompt is not None
        images = batch.features(self.extractor)
        cosine = (images * self.texts[batch.prompt.to(self.texts.device)]).sum(1, keepdim=True)
        return 100 * cosine.clamp(min=0), batch.index

    def estimate(self, state: State, split: str) -> FrechetEstimate:
        assert isinstance(state, GroupSums)
        return of_means(state, float)


@dataclass
class _Psnr(Measure):
    higher = True

    def start(self) -> State:
        return GroupSums(1)

    def values(self, batch: Batch) -> tuple[Tensor, range]:
        count = 0 if batch.error is None else len(batch.error)
        values = torch.zeros(0, 1) if batch.error is None else batch.error[:, None]
        return values, batch.index[:count]

    def estimate(self, state: State, split: str) -> FrechetEstimate | None:
        assert isinstance(state, GroupSums)
        _, without = state.means()
        if bool((state.counts == 0).any()) or not bool((without > 0).all()):
            return None  # no solution to compare with, or samples equal to it
        return of_means(state, psnr)


# -- names


def _table() -> dict[str, tuple[str, str]]:
    """Base name -> kind of measure, and its extractor ("" for none)."""
    table = {"cmmd": ("cmmd", Clip.name), "clip-score": ("clip-score", Clip.name)}
    table |= {"swd": ("swd", ""), "psnr": ("psnr", "")}
    for base, extractor in frechet_metrics().items():
        table[base] = ("fd", extractor)
        if base == "fid":
            own = {"kid": "kd", "precision": "precision", "recall": "recall", "isc": "isc"}
        else:
            short = base.removeprefix("fd-")
            own = {f"{kind}-{short}": kind for kind in ("kd", "precision", "recall")}
        table |= {name: (kind, extractor) for name, kind in own.items()}
    return table


def measure_names() -> list[str]:
    """Base names of all metrics of a run."""
    return sorted(_table())


@dataclass(frozen=True)
class Wanted:
    """A metric that was asked for.

    Attributes:
        name: full name, which carries the number of samples.
        base, kind, extractor: as in the table of names.
        n: number of samples.
    """

    name: str
    base: str
    kind: str
    extractor: str
    n: int


def wanted(names: Sequence[str], n: int, kept: int, compared: int) -> list[Wanted]:
    """Resolve metrics' names.

    Args:
        names: with or without their number of samples.
        n: samples of a cell.
        kept: samples whose features are kept, ``feature_samples``.
        compared: samples with a reference solution.

    Raises:
        ValueError: no such metric (the nearest is named), one named twice, another number of samples than the
            run has, or too few.
    """
    table = _table() if names else {}  # torch-fidelity takes seconds to import
    found = []
    for name in names:
        base, asked = split_name(name, table)
        kind, extractor = table[base]
        have, setting = {"fd": (n, "n"), "isc": (n, "n"), "clip-score": (n, "n")}.get(
            kind, (min(n, kept), "n and feature_samples")
        )
        if kind == "psnr":
            have, setting = min(n, compared), "n and reference.n"
        if asked is not None and asked != have:
            raise ValueError(
                f"metrics: {name!r} asks for {asked} samples but n={n}"
                + (f" and it compares {have}" if have != n else "")
                + f"; write {base!r}, or set {setting} to {asked}"
            )
        if kind != "fd" and have < 2 * GROUPS:
            raise ValueError(
                f"metrics: {base} has {have} samples; at least {2 * GROUPS} are needed ({setting})"
            )
        found.append(Wanted(metric_name(base, have), base, kind, extractor, have))
    if len({w.name for w in found}) < len(found):
        raise ValueError(f"metrics={list(names)}: a metric is named twice")
    return found


# -- preparation


@dataclass
class _Preparation:
    """What measures are made from; extractors and reference features are made once.

    Attributes:
        shape: (C, H, W) of an image.
        splits: the image sets to compare with.
        cache: folder for statistics and features.
        batch: images at once.
        kept: samples and reference images whose features are kept.
        device: of the extractors.
        weights: local weights by extractor.
        prompts: what the samples were asked for.
    """

    shape: tuple[int, ...]
    splits: Mapping[str, ImageSet]
    cache: Path
    batch: int
    kept: int
    device: torch.device
    weights: Mapping[str, str]
    prompts: Sequence[str]
    _extractors: dict[str, Extractor] = field(default_factory=dict)

    def extractor(self, name: str) -> Any:
        if name not in self._extractors:
            weights = self.weights.get(name)
            self._extractors[name] = (
                Clip(weights, self.device)
                if name == Clip.name
                else FeatureExtractor(name, device=self.device, weights=weights)
            )
        return self._extractors[name]

    def images(self, metric: str) -> None:
        """Check that there are image sets to compare with.

        Raises:
            ValueError: if there are none.
        """
        if not self.splits:
            raise ValueError(
                f"metrics: {metric}: images to compare with are needed; give train=FOLDER (and heldout=FOLDER), or "
                "metrics=[]"
            )

    def features(self, metric: str, extractor: Extractor) -> dict[str, Tensor]:
        """Features of at most ``kept`` images of each set, evenly spaced in its order, float32."""
        found = {}
        for key, split in self.splits.items():
            count = min(self.kept, _images(metric, key, split))
            file = self.cache / f"{extractor.sha256[:16]}-{split.sha256[:16]}-{count}.safetensors"
            if file.exists():
                try:
                    found[key] = read_sealed(file, _FEATURES_SCHEMA)["features"].to(self.device)
                    continue
                except ValueError:
                    file.unlink()  # damaged: made again below
            rows = torch.cat([extractor(images) for images in _spread(split, count, self.batch)])
            write_sealed(file, _FEATURES_SCHEMA, {"features": rows.float()})
            found[key] = rows.float()
        return found


def prepare(
    metrics: Sequence[Wanted],
    shape: tuple[int, ...],
    splits: Mapping[str, ImageSet],
    *,
    cache: Path,
    batch: int,
    kept: int,
    device: torch.device,
    weights: Mapping[str, str],
    prompts: Sequence[str] = (),
) -> list[Measure]:
    """Load extractors and compute what the samples are compared with.

    Args:
        metrics: of :func:`wanted`.
        shape: (C, H, W) of an image.
        splits: image sets by name.
        cache: folder where statistics and features of the sets are kept, under hashes of extractor and images.
        batch: images at once.
        kept: samples and reference images whose features are kept.
        device: where extractors run.
        weights: local weights, by the extractor's name.
        prompts: what the samples are asked for, for the CLIP score.

    Raises:
        ValueError, FileNotFoundError, ImportError: what is missing and the remedy.
    """
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    known = [Clip.name, *FEATURE_EXTRACTORS_REGISTRY]
    for name in weights:
        if name not in known:
            raise unknown("weights", name, known)
    ready = _Preparation(shape, splits, cache, batch, kept, device, weights, prompts)
    return [_MAKE[metric.kind](metric, ready) for metric in metrics]


def _frechet(metric: Wanted, ready: _Preparation) -> Measure:
    ready.images(metric.base)
    extractor = ready.extractor(metric.extractor)
    dim = extractor.dim(ready.shape)
    if metric.n < minimum_samples(dim):
        raise ValueError(
            f"n={metric.n}: {metric.base} has {dim} features, so at least {minimum_samples(dim)} samples "
            f"are needed, and {RELIABLE_RATIO * dim} for a reliable interval"
        )
    references = {key: s.reference(extractor, ready.cache, ready.batch) for key, s in ready.splits.items()}
    for key, reference in references.items():
        if reference.gaussian.dim != dim:
            raise ValueError(
                f"{key}={ready.splits[key].name}: {reference.gaussian.dim} features, {metric.base} has {dim}"
            )
    what = (
        "Fréchet distance between Gaussians fitted to features, with the sample-size bias removed and the error "
        f"estimated by a delete-a-group jackknife ({GROUPS} groups)"
    )
    return _Frechet(metric.name, tuple(references), what, extractor.sha256, extractor, dim, references)


def _kernel(metric: Wanted, ready: _Preparation) -> Measure:
    clip = metric.kind == "cmmd"
    ready.images(metric.base)
    extractor = ready.extractor(metric.extractor)
    rows = ready.features(metric.base, extractor)
    references = {key: KernelReference(r, "gaussian" if clip else "polynomial") for key, r in rows.items()}
    kernel = "Gaussian kernel of width 10, times 1000" if clip else "kernel (x·y/d + 1)³"
    what = (
        f"unbiased squared maximum mean discrepancy of the features ({kernel}) of {metric.n} samples to "
        f"{_counts(rows)}, with a jackknife error"
    )
    make = _Cmmd if clip else _Kernel
    return make(
        metric.name, tuple(rows), what, f"{extractor.sha256} {ready.kept}", extractor, metric.n, references
    )


def _manifold(metric: Wanted, ready: _Preparation) -> Measure:
    ready.images(metric.base)
    extractor = ready.extractor(metric.extractor)
    rows = ready.features(metric.base, extractor)
    references = {key: Manifold(r) for key, r in rows.items()}
    make, share = {
        "precision": (_Precision, "share of samples inside the data's manifold"),
        "recall": (_Recall, "share of the data inside the samples' manifold"),
    }[metric.kind]
    what = (
        f"{share}, balls to the third neighbour in feature space, {metric.n} samples and {_counts(rows)}; it depends "
        "on both numbers"
    )
    return make(
        metric.name, tuple(rows), what, f"{extractor.sha256} {ready.kept}", extractor, metric.n, references
    )


def _sliced(metric: Wanted, ready: _Preparation) -> Measure:
    ready.images(metric.base)
    references, counts = {}, {}
    for key, split in ready.splits.items():
        count = min(ready.kept, _images(metric.base, key, split))
        rows = torch.cat([_directions(images) for images in _spread(split, count, ready.batch)])
        references[key], counts[key] = SlicedReference(rows.to(ready.device)), rows
    what = (
        f"sliced 2-Wasserstein distance of pixels in [-1, 1], {_PROJECTIONS} directions, {metric.n} samples and "
        f"{_counts(counts)}; its bias is not removed"
    )
    return _Sliced(metric.name, tuple(references), what, f"{_PROJECTIONS} {ready.kept}", metric.n, references)


def _inception_score(metric: Wanted, ready: _Preparation) -> Measure:
    extractor = ready.extractor(metric.extractor)
    probe = extractor(torch.zeros(1, *ready.shape, dtype=torch.uint8))
    classes = extractor.logits(probe).shape[1]
    what = "Inception score of all samples together, the bias of their number removed, with a jackknife error"
    return _InceptionScore(metric.name, ("samples",), what, extractor.sha256, extractor, classes)


def _clip_score(metric: Wanted, ready: _Preparation) -> Measure:
    if not ready.prompts:
        raise ValueError("metrics: clip-score compares images with their prompts; give prompts=FILE")
    extractor = ready.extractor(metric.extractor)
    identity = f"{extractor.sha256} {hashlib.sha256(repr(tuple(ready.prompts)).encode()).hexdigest()}"
    what = "mean of 100 max(0, cosine) between CLIP's features of image and prompt"
    return _ClipScore(metric.name, ("prompts",), what, identity, extractor, extractor.texts(ready.prompts))


def _psnr(metric: Wanted, ready: _Preparation) -> Measure:
    what = f"peak signal-to-noise ratio in dB of the error to the converged solution, {metric.n} samples together"
    return _Psnr(metric.name, ("converged",), what, "")


_MAKE = {
    "fd": _frechet,
    "kd": _kernel,
    "cmmd": _kernel,
    "precision": _manifold,
    "recall": _manifold,
    "swd": _sliced,
    "isc": _inception_score,
    "clip-score": _clip_score,
    "psnr": _psnr,
}


def _images(metric: str, key: str, split: ImageSet) -> int:
    if split.n is None:
        raise ValueError(f"{key}={split.name} holds moments only; {metric} needs the images: {key}=FOLDER")
    return split.n


def _spread(split: ImageSet, count: int, batch: int) -> Iterator[Tensor]:
    """Batches of ``count`` images evenly spaced in the set's order (which may be sorted by class)."""
    total = _images("", "", split)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.arange(count) * total // count] = True
    seen = 0
    for images in split.batches(batch):
        part = images[chosen[seen : seen + len(images)]]
        seen += len(images)
        if len(part):
            yield part


def _directions(images: Tensor) -> Tensor:
    return project(images.float() / 127.5 - 1, _PROJECTIONS)


def _counts(rows: Mapping[str, Tensor]) -> str:
    return " and ".join(f"{len(r)} {key} images" for key, r in rows.items())
