"""The metrics of a run beside Frechet distances: against independent computations and torch-fidelity's functions."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gaussian_model
import pytest
import torch
from torch import Tensor

import fastsample as fs
from fastsample.bench.compare import changes
from fastsample.bench.errors import UserError
from fastsample.bench.measures import Accumulator, Batch, prepare, wanted
from fastsample.bench.report import headline_text
from fastsample.bench.results import collect, leaders
from fastsample.bench.run import bench
from fastsample.conf import BenchConfig, ReferenceConfig
from fastsample.metrics import FeatureExtractor, rmse, sliced_wasserstein, to_uint8
from fastsample.metrics import extractors as extractor_file
from fastsample.metrics.statistics import read_sealed

Settings = Callable[..., BenchConfig]
ALL = ["fd-blocks", "kd-blocks", "precision-blocks", "recall-blocks", "swd", "psnr"]


def load(config: BenchConfig) -> dict[str, Any]:
    return json.loads((Path(config.out) / "results.json").read_text())


def blocks(images: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 64


@pytest.fixture
def samples() -> tuple[Tensor, Tensor, Tensor]:
    """Of 30 steps as the run below draws them, of the converged solution, and the training images."""
    denoiser, shape = gaussian_model.make_model(), (400, *gaussian_model.SHAPE)
    x, exact = (
        fs.Sampler(denoiser, *way)(shape=shape, seed=0) for way in (("dpmpp_2m", 30), ("dpmpp_2m", 40))
    )
    return x, exact, to_uint8(denoiser.net.images(200, 7))  # type: ignore[union-attr]


def test_every_metric_is_that_of_an_independent_computation(
    settings: Settings, samples: tuple[Tensor, Tensor, Tensor]
) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    config = settings(metrics=ALL, nfe=[30], reference=ReferenceConfig(solver="dpmpp_2m", steps=40, n=300))
    bench(config)
    row = next(p for p in load(config)["points"] if p["label"] == "dpmpp_2m")
    found = {name: by.get("train", by.get("converged")) for name, by in row["metrics"].items()}
    x, exact, train = samples
    own, real = blocks(to_uint8(x)), blocks(train)

    prc = prc_features_to_metric(own.double(), real.double(), save_cpu_ram=False, verbose=False)
    assert found["precision-blocks-400"]["value"] == pytest.approx(prc["precision"], abs=0.006)
    assert found["recall-blocks-400"]["value"] == pytest.approx(prc["recall"], abs=0.006)
    # their subsets, as large as the sets, are the sets; their estimate divides the cross term alike for equal sizes
    kid = kid_features_to_metric(
        own[:200].double(), real.double(), kid_subsets=1, kid_subset_size=200, verbose=False
    )
    small = settings(metrics=["kd-blocks"], nfe=[30], solvers=["dpmpp_2m"], n=200, out=config.out + "-200")
    bench(small)
    (point,) = load(small)["points"]
    assert point["metrics"]["kd-blocks-200"]["train"]["value"] == pytest.approx(
        kid["kernel_inception_distance_mean"], rel=1e-3
    )
    pixels = [v.float() / 127.5 - 1 for v in (to_uint8(x), train)]
    assert found["swd-400"]["value"] == pytest.approx(sliced_wasserstein(*pixels), rel=1e-3)
    error, _ = rmse(x[:300], exact[:300])
    assert found["psnr-300"]["value"] == pytest.approx(20 * math.log10(2 / error), rel=1e-4)
    assert found["psnr-300"]["value"] == pytest.approx(row["psnr"], rel=1e-6)
    assert all(entry["se"] > 0 for entry in found.values())
    assert load(config)["reference"]["metrics"]["psnr-300"]["converged"] is None


def test_results_report_and_csv_hold_them(settings: Settings) -> None:
    solvers = ["ddim", "dpmpp_2m", {"name": "ddim", "eta": 1.0, "label": "noisy"}]
    config = settings(metrics=["psnr", "recall-blocks"], nfe=[16, 20], solvers=solvers)
    bench(config)
    data = load(config)
    assert data["run"]["metrics"]["psnr-400"] == {
        "splits": ["converged"],
        "what": data["run"]["metrics"]["psnr-400"]["what"],
        "higher": True,
    }
    # the larger is the better, and what has none is left out
    by = {(p["label"], p["nfe"]): p["metrics"]["psnr-400"]["converged"] for p in data["points"]}
    assert by["noisy", 16.0] is None
    assert by["dpmpp_2m", 20.0]["value"] > by["ddim", 20.0]["value"]
    assert (by["dpmpp_2m", 20.0]["place"], by["ddim", 20.0]["place"]) == ("best", None)
    assert data["headline"]["metric"] == "psnr-400"
    assert data["headline"]["kind"] == "fewer"
    assert data["headline"]["solver"] == "dpmpp_2m"
    assert "dpmpp_2m does in 16 evaluations what ddim takes 20 for" in headline_text(data)[0]
    with (Path(config.out) / "results.csv").open() as file:
        rows = {(row["label"], float(row["nfe"])): row for row in csv.DictReader(file)}
    assert float(rows["ddim", 20.0]["psnr-400_converged"]) == by["ddim", 20.0]["value"]
    assert rows["noisy", 20.0]["psnr-400_converged"] == ""
    text = (Path(config.out) / "report.md").read_text()
    assert "psnr-400, +- two standard errors, higher is better" in text
    assert re.search(r"\| noisy \| – \| – \|", text)
    assert (
        "recall-blocks-400</b>: share of the data inside the samples&#39; manifold"
        in (Path(config.out) / "report.html").read_text()
    )
    results = collect(Path(config.out))
    worst = leaders(results.points, "psnr-400", "converged", 1)["20"]
    assert [p.solver for p in worst] == ["ddim"]


def test_compare_knows_which_way_is_better(settings: Settings, tmp_path: Path) -> None:
    runs = []
    for name, solver in (("a", "ddim"), ("b", "dpmpp_2m")):
        config = settings(
            metrics=["psnr", "swd"],
            nfe=[4],
            solvers=[{"name": solver, "label": "s"}],
            out=str(tmp_path / name),
        )
        bench(config)
        runs.append(collect(tmp_path / name))
    verdicts = {(c.metric, c.split): c.verdict for c in changes(*runs)}
    assert verdicts["psnr-400", "converged"] == "better"
    back = {(c.metric, c.split): c.verdict for c in changes(*reversed(runs))}
    assert back["psnr-400", "converged"] == "worse"


def test_kept_features_are_bounded_and_cached_by_content(settings: Settings, tmp_path: Path) -> None:
    config = settings(metrics=["kd-blocks", "fd-blocks", "precision-blocks"], nfe=[4], feature_samples=60)
    bench(config)
    (row, _) = load(config)["points"]
    assert set(row["metrics"]) == {"kd-blocks-60", "fd-blocks-400", "precision-blocks-60"}
    what = load(config)["run"]["metrics"]["precision-blocks-60"]["what"]
    assert "60 samples and 60 train images and 60 heldout images" in what
    statistics = Path(config.out) / "statistics"
    kept = {f.name for f in statistics.iterdir() if f.name.endswith("-60.safetensors")}
    assert len(kept) == 2
    # a damaged cache is made again
    file = statistics / sorted(kept)[0]
    whole, content = file.read_bytes(), read_sealed(file, "fastsample.features/1")["features"].clone()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    bench(config)
    assert torch.equal(read_sealed(file, "fastsample.features/1")["features"], content)


def test_reference_images_are_spread_over_a_sorted_folder(images: dict[str, str], tmp_path: Path) -> None:
    from fastsample.bench.data import load_images

    split = load_images(images["train"], gaussian_model.SHAPE)
    asked = wanted(["kd-blocks"], 400, 50, 400)
    (measure,) = prepare(
        asked,
        gaussian_model.SHAPE,
        {"train": split},
        cache=tmp_path,
        batch=30,
        kept=50,
        device=torch.device("cpu"),
        weights={},
    )
    whole = torch.cat(list(split.batches(1000)))
    expected = FeatureExtractor("blocks")(whole[::4])
    torch.testing.assert_close(measure.references["train"].features, expected)  # type: ignore[attr-defined]


def test_a_cells_numbers_do_not_depend_on_batches(settings: Settings, tmp_path: Path) -> None:
    found = []
    for batch in (150, 77):
        config = settings(
            metrics=ALL, nfe=[4], solvers=["ddim"], batch=batch, heldout=None, out=str(tmp_path / str(batch))
        )
        bench(config)
        (point,) = load(config)["points"]
        found.append([e["value"] for by in point["metrics"].values() for e in by.values()])
    assert found[0] == pytest.approx(found[1], rel=2e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["precision-block"]}, "did you mean 'precision-blocks'"),
        (
            {"metrics": ["kd-blocks-400"], "feature_samples": 100},
            r"asks for 400 samples but n=400 and it compares 100",
        ),
        ({"metrics": ["psnr-300"]}, "set n and reference.n to 300"),
        ({"metrics": ["swd", "swd"]}, "named twice"),
        ({"metrics": ["swd"], "n": 39}, r"swd has 39 samples; at least 40 are needed"),
        ({"metrics": ["recall-blocks"], "feature_samples": 20}, "has 20 samples; at least 40"),
        ({"metrics": ["clip-score"]}, "give prompts=FILE"),
        ({"metrics": ["cmmd"]}, r"weights.clip=None: a local folder"),
        ({"metrics": ["swd"], "train": None, "heldout": None}, "images to compare with are needed"),
        ({"metrics": ["fd-dinov2-vit-s-14"]}, r"git clone .*dinov2_vits14_pretrain.pth into the clone"),
        ({"weights": {"dinov2": "x"}}, "did you mean 'dinov2-"),
        ({"feature_samples": 0}, "feature_samples=0"),
    ],
)
def test_bad_metrics_are_refused_before_any_work(
    settings: Settings, change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    config = settings(**change)
    with pytest.raises(UserError, match=message):
        bench(config)
    assert not (Path(config.out) / "cells").exists()


def test_moments_alone_are_not_enough_for_what_needs_images(settings: Settings, tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "stats.npz", mu=np.zeros(16), sigma=np.eye(16))
    config = settings(train=str(tmp_path / "stats.npz"), heldout=None, metrics=["kd-blocks"])
    with pytest.raises(UserError, match=r"holds moments only; kd-blocks needs the images: train=FOLDER"):
        bench(config)


def test_kid_precision_and_recall_are_torch_fidelitys_from_images_on(tmp_path: Path) -> None:
    """Its own run over the images of digits, with the embedded extractor."""
    import torch_fidelity
    from torch.utils.data import Dataset

    from fastsample.bench.data import load_images
    from fastsample.zoo.data import digits

    class Images(Dataset):  # type: ignore[type-arg]
        def __init__(self, images: Tensor) -> None:
            self.images = images.expand(-1, 3, -1, -1)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> Tensor:
            return self.images[i]

    train = load_images("digits:train", (1, 8, 8))
    assert train.n is not None
    samples = to_uint8(digits("heldout")[0][:300])
    count = len(samples)
    asked = wanted(["kd-digits", "precision-digits", "recall-digits"], count, count, count)
    real = torch.cat(list(train.batches(500)))[torch.arange(count) * train.n // count]
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(samples),
        input2=Images(real),
        kid=True,
        kid_subsets=1,
        kid_subset_size=count,
        prc=True,
        feature_extractor="fd-digits",
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    measures = prepare(
        asked,
        (1, 8, 8),
        {"train": train},
        cache=tmp_path,
        batch=100,
        kept=count,
        device=torch.device("cpu"),
        weights={},
    )
    found = []
    for measure in measures:
        accumulator = Accumulator(measure)
        for start in range(0, count, 70):
            index = range(start, min(count, start + 70))
            accumulator.update(Batch(samples[start : index.stop], index))
        entry = accumulator.estimates()["train"]
        assert entry is not None
        found.append(entry["plain"])
    assert found[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert found[1:] == pytest.approx([theirs["precision"], theirs["recall"]], abs=1e-6)


# -- torch-fidelity's own networks, with random weights


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of random weights of the real class, and the digest that is expected of it."""
    import hashlib

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {}
    )
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    monkeypatch.undo()
    file = tmp_path / "inception.pth"
    torch.save(network.state_dict(), file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(extractor_file, "_INCEPTION_SHA256_PREFIX", sha256[:8])
    return str(file)


def test_the_inception_score_takes_torch_fidelitys_logits(inception: str) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = FeatureExtractor("inception-v3-compat", weights=inception)
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception
    )
    features, logits = theirs(images)
    own = extractor(images)
    torch.testing.assert_close(own, features.double())
    torch.testing.assert_close(extractor.logits(own), logits.double(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="blocks has no logits"):
        FeatureExtractor("blocks").logits(own)


def test_one_pass_through_inception_serves_all_its_metrics(
    inception: str, images: dict[str, str], tmp_path: Path
) -> None:
    """Its features are extracted once a batch; kid, precision, recall and isc agree with torch-fidelity's functions."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    names = ["kid", "precision", "recall", "isc"]
    from fastsample.bench.data import load_images

    split = load_images(images["train"], gaussian_model.SHAPE)
    asked = wanted(names, 40, 40, 40)
    assert [w.name for w in asked] == ["kid-40", "precision-40", "recall-40", "isc-40"]
    measures = prepare(
        asked,
        gaussian_model.SHAPE,
        {"train": split},
        cache=tmp_path,
        batch=20,
        kept=5,
        device=torch.device("cpu"),
        weights={"inception-v3-compat": inception},
    )
    extractor = FeatureExtractor("inception-v3-compat", weights=inception)
    assert measures[0].extractor is measures[3].extractor  # type: ignore[attr-defined]
    accumulators = [Accumulator(measure) for measure in measures]
    features = torch.randn(40, 2048, generator=torch.Generator().manual_seed(0)).abs().double()
    for start in (0, 20):
        batch = Batch(torch.zeros(20, *gaussian_model.SHAPE, dtype=torch.uint8), range(start, start + 20))
        batch._features[extractor.sha256] = features[start : start + 20]
        for accumulator in accumulators:
            accumulator.update(batch)
    score = accumulators[3].estimates()["samples"]
    theirs = isc_features_to_metric(extractor.logits(features), splits=1)
    assert score is not None
    assert score["plain"] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert all(a.estimates() for a in accumulators[:3])


def test_dinov2_comes_from_a_local_clone(tmp_path: Path) -> None:
    """The folder's entry point builds the network (transformers' real DINOv2 here); torch-fidelity prepares images."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
    from transformers import Dinov2Config, Dinov2Model

    (tmp_path / "hubconf.py").write_text(
        "import torch\n"
        "from transformers import Dinov2Config, Dinov2Model\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))\n"
        "    def forward(self, x):\n"
        "        return self.inner(x).last_hidden_state[:, 0]\n"
        "def dinov2_vits14(pretrained=True):\n"
        "    assert not pretrained\n"
        "    return Net()\n"
    )
    with pytest.raises(
        FileNotFoundError, match=r"no dinov2_vits14_pretrain.pth; git clone .*weights.dinov2-vit-s-14"
    ):
        FeatureExtractor("dinov2-vit-s-14", weights=tmp_path)
    torch.manual_seed(0)
    real = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    state = {f"inner.{key}": value for key, value in real.state_dict().items()}
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    images = torch.randint(256, (2, 3, 20, 20), dtype=torch.uint8)
    found = FeatureExtractor("dinov2-vit-s-14", weights=tmp_path)(images)
    large = (
        interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(224, 224), align_corners=False) / 255
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = real((large - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)
