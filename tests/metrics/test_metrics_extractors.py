"""Metric names, quantisation, extractors and their weights."""

import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from fastsample.metrics import FeatureExtractor, metric_names, parse_metric, to_uint8
from fastsample.metrics.extractors import metric_name


def test_quantisation_is_that_of_edm() -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    assert to_uint8(x).tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert to_uint8(x.half()).dtype == torch.uint8


def test_names_carry_the_number_of_samples() -> None:
    assert [metric_name("fid", n) for n in (50_000, 2_000, 2_048, 999)] == [
        "fid-50k",
        "fid-2k",
        "fid-2048",
        "fid-999",
    ]
    assert parse_metric("fd-digits").with_n(1000) == "fd-digits-1k"
    named = parse_metric("fid-50k")
    assert (named.base, named.extractor, named.n) == ("fid", "inception-v3-compat", 50_000)
    assert named.with_n(50_000) == "fid-50k"
    with pytest.raises(ValueError, match="'fid-50k' asks for 50000 samples but n=2000"):
        named.with_n(2_000)


def test_a_number_in_the_extractors_own_name_is_no_sample_count() -> None:
    assert "fd-clip-vit-b-32" in metric_names()
    assert parse_metric("fd-clip-vit-b-32").n is None
    assert parse_metric("fd-clip-vit-b-32-5k").n == 5000


@pytest.mark.parametrize(
    ("name", "nearest"), [("fid-", "fid"), ("fd-digit", "fd-digits"), ("FID-50k", "fid")]
)
def test_unknown_names(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        parse_metric(name)


def test_digits_extractor_gives_the_features_of_the_zoo() -> None:
    from fastsample.zoo.data import digits
    from fastsample.zoo.features import features

    extractor = FeatureExtractor("fd-digits")
    images = to_uint8(digits("heldout")[0][:50])
    found = extractor(images)
    assert found.dtype == torch.float64
    assert extractor.dim((1, 8, 8)) == found.shape[1]
    torch.testing.assert_close(found, features(images), rtol=1e-5, atol=1e-5)
    assert extractor.sha256 == FeatureExtractor("fd-digits").sha256
    with pytest.raises(ValueError, match="uint8"):
        extractor(digits("heldout")[0][:5])


def test_unknown_extractor_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'vgg16'"):
        FeatureExtractor("vgg17")
    with pytest.raises(FileNotFoundError, match="give the file of vgg16's weights"):
        FeatureExtractor("vgg16", weights=tmp_path / "none.pth")


def test_inception_weights_are_checked_and_the_remedy_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def offline(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    name = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(FileNotFoundError, match=rf"no network.*put it at .*{name}.*inception_weights=FILE"):
        FeatureExtractor("inception-v3-compat")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FeatureExtractor("inception-v3-compat", weights=tmp_path / "mine.pth")
    cached = tmp_path / "hub" / "checkpoints" / name
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"sha256 .* but 6726825d\.\.\. is expected"):
        FeatureExtractor("inception-v3-compat")
    assert [f.name for f in cached.parent.iterdir()] == [name]


def test_the_distance_is_that_of_torch_fidelity_from_images_on() -> None:
    import torch_fidelity
    from torch.utils.data import Dataset

    from fastsample.metrics import GroupedMoments, frechet_distance
    from fastsample.zoo.data import digits

    class Images(Dataset):
        def __init__(self, images: torch.Tensor) -> None:
            self.images = images.expand(-1, 3, -1, -1)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> torch.Tensor:
            return self.images[i]

    train, heldout = (to_uint8(digits(split)[0]) for split in ("train", "heldout"))
    parse_metric("fd-digits")  # makes the extractor known to torch-fidelity
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(train),
        input2=Images(heldout),
        fid=True,
        feature_extractor="fd-digits",
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )["frechet_inception_distance"]
    extractor, gaussians = FeatureExtractor("fd-digits"), []
    for images in (train, heldout):
        moments = GroupedMoments(extractor.dim((1, 8, 8)))
        moments.update(extractor(images), range(len(images)))
        gaussians.append(moments.gaussian())
    assert frechet_distance(*gaussians) == pytest.approx(theirs, rel=1e-6)
