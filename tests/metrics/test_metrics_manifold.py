"""Precision and recall against torch-fidelity's, by definition, and their errors against simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample.metrics import Manifold, paired_difference, precision, recall


def draw(n: int, d: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3])
def test_both_are_torch_fidelitys(k: int) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = draw(1100, 6, 0, 0.8), draw(700, 6, 1)  # more than one block
    theirs = prc_features_to_metric(x, y, prc_neighborhood=k, save_cpu_ram=False, verbose=False)
    reference = Manifold(y, k)
    found = precision(x, reference), recall(x, reference)
    assert [e.plain for e in found] == pytest.approx([theirs["precision"], theirs["recall"]], abs=1e-7)
    assert 0.3 < found[1].plain < found[0].plain < 1
    assert all(e.value == e.plain for e in found)


def test_both_are_torch_fidelitys_on_the_features_of_digits() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    from fastsample.metrics import FeatureExtractor, parse_metric, to_uint8
    from fastsample.zoo.data import digits

    extractor = FeatureExtractor(parse_metric("fd-digits").extractor)
    train, heldout = (extractor(to_uint8(digits(split)[0])) for split in ("train", "heldout"))
    theirs = prc_features_to_metric(heldout, train, save_cpu_ram=False, verbose=False)
    reference = Manifold(train)
    assert precision(heldout, reference).plain == pytest.approx(theirs["precision"], abs=1e-7)
    assert recall(heldout, reference).plain == pytest.approx(theirs["recall"], abs=1e-7)


def test_leave_one_out_values_are_those_of_the_remaining_samples() -> None:
    x, reference = draw(70, 2, 2, 0.7), Manifold(draw(60, 2, 3))
    index = torch.randperm(70, generator=torch.Generator().manual_seed(4))
    for statistic in (precision, recall):
        found = statistic(x, reference, index)
        for g, value in enumerate(found.leave_one_out):
            rest = x[index % 20 != g]
            assert value == pytest.approx(statistic(rest, reference).plain, abs=1e-12)


def test_errors_are_those_of_repeated_draws() -> None:
    """Over fresh samples against one reference. Recall's are too long, as its docstring says, never too short."""
    reference = Manifold(draw(300, 8, 100))
    for statistic, longest, longest_paired in ((precision, 1.35, 1.35), (recall, 1.8, 3.0)):
        pairs = []
        for seed in range(40):
            x = draw(200, 8, seed, 0.9)
            pairs.append((statistic(x, reference), statistic(0.97 * x, reference)))
        values = np.array([a.value for a, _ in pairs])
        assert 0.7 < np.median([a.se for a, _ in pairs]) / values.std(ddof=1) < longest
        differences = [paired_difference(a, b) for a, b in pairs]
        assert differences[0].value == pairs[0][0].value - pairs[0][1].value
        spread = np.std([d.value for d in differences], ddof=1)
        assert 0.7 < np.median([d.se for d in differences]) / spread < longest_paired
        assert spread < values.std(ddof=1)  # pairing helps


@pytest.mark.parametrize("call", [precision, recall])
def test_bad_input(call: object) -> None:
    reference = Manifold(draw(50, 3, 0))
    with pytest.raises(ValueError, match="39 samples are too few; at least 40"):
        call(draw(39, 3, 1), reference)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"\[n, 3\] is needed, got \(50, 4\)"):
        call(draw(50, 4, 1), reference)  # type: ignore[operator]
    with pytest.raises(ValueError, match="group is empty"):
        call(draw(50, 3, 1), reference, torch.zeros(50))  # type: ignore[operator]
    with pytest.raises(ValueError, match="m at least 4"):
        Manifold(draw(3, 3, 0))
