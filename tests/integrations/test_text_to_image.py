"""Text-to-image models in the harness: prompts, decoded images, CLIP score and CMMD against transformers' own CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import make_model, save_clip, text_to_image

import fastsample as fs
from fastsample.bench.conditions import conditions_of, read_prompts
from fastsample.bench.errors import UserError
from fastsample.bench.model import load_model
from fastsample.bench.run import bench
from fastsample.conf import BenchConfig, ReferenceConfig
from fastsample.metrics import kernel_distance, to_uint8
from fastsample.metrics.clip import Clip

PROMPTS = ["a red fox", "two dogs in snow", "a house"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n\n  " + PROMPTS[2])
    return str(tmp_path / "prompts.txt")


def config(tmp_path: Path, prompts: str | None, **changes: Any) -> BenchConfig:
    settings: dict[str, Any] = {
        "model": {"_target_": "tiny_text.make_model"},
        "prompts": prompts,
        "solvers": ["ddim"],
        "nfe": [2],
        "n": 40,
        "batch": 25,
        "images": 2,
        "metrics": ["clip-score"],
        "reference": ReferenceConfig(steps=4, n=40),
        "weights": {"clip": str(tmp_path / "clip")},
        "out": str(tmp_path / "run"),
    }
    return BenchConfig(**(settings | changes))


def test_the_scores_of_a_run_are_those_of_transformers(tmp_path: Path, prompts: str) -> None:
    """CLIP's own similarity of each image and its prompt, and the discrepancy of its own features."""
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    folder = save_clip(tmp_path / "clip")
    train = torch.rand(45, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    (tmp_path / "train").mkdir()
    for i, image in enumerate(train):
        array = (255 * image).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / "train" / f"{i:02d}.png")
    settings = config(
        tmp_path, prompts, metrics=["clip-score", "cmmd"], train=str(tmp_path / "train"), guidance=3.0
    )
    bench(settings)
    (point,) = json.loads((tmp_path / "run" / "results.json").read_text())["points"]
    assert point["rows_per_sample"] == 2 * point["nfe"] == 4

    # the same samples by hand: the pipeline's encoder, guidance from the empty prompt, its decoder
    pipe = text_to_image()
    model = load_model(settings.model)
    conditions = conditions_of(model, None, tuple(PROMPTS))
    index = torch.arange(40)
    chosen = conditions.prompt(0, index)
    assert chosen is not None
    assert torch.bincount(chosen).min() >= 8
    embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    empty = pipe.encode_prompt([""], "cpu", 1, False)[0]
    guided = fs.wrap(pipe, guidance=fs.Guidance(3.0, null={"encoder_hidden_states": empty}))
    latents = fs.Sampler(guided, "ddim", 2, end="zero")(n=40, seed=0, encoder_hidden_states=embeds[chosen])
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    images = to_uint8(decoded.detach())

    clip, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    rgb = [image.permute(1, 2, 0).numpy() for image in images]
    inputs = processor(
        text=[PROMPTS[int(i)] for i in chosen], images=rgb, return_tensors="pt", padding=True, do_rescale=True
    )
    with torch.no_grad():
        out = clip(**inputs)
    cosine = (out.image_embeds * out.text_embeds).sum(1) / (
        out.image_embeds.norm(dim=1) * out.text_embeds.norm(dim=1)
    )
    score = point["metrics"]["clip-score-40"]["prompts"]
    assert score["value"] == pytest.approx(float(100 * cosine.clamp(min=0).mean()), rel=1e-3)
    assert score["value"] > 1
    assert score["se"] > 0

    with torch.no_grad():
        real = [(255 * image).to(torch.uint8).permute(1, 2, 0).numpy() for image in train]
        other = clip.get_image_features(**processor(images=real, return_tensors="pt"))
    other = getattr(other, "pooler_output", other)
    own, other = (v / v.norm(dim=1, keepdim=True) for v in (out.image_embeds, other))
    expected = kernel_distance(own, other, kernel="gaussian")
    found = point["metrics"]["cmmd-40"]["train"]
    assert found["value"] == pytest.approx(1000 * expected.value, rel=0.02)
    assert found["se"] == pytest.approx(1000 * expected.se, rel=0.1)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "3 prompts, drawn in balance" in page
    assert "Higher is better" in page


def test_clip_features_are_of_unit_length_and_need_no_processor_of_ours(tmp_path: Path) -> None:
    clip = Clip(save_clip(tmp_path / "clip"))
    images = (255 * torch.rand(3, 1, 20, 24)).to(torch.uint8)
    features = clip(images)
    assert features.shape == (3, clip.dim((1, 20, 24)))
    assert torch.allclose(features.norm(dim=1), torch.ones(3).double())
    assert clip.texts(PROMPTS).shape == (3, 18)
    long = "a very long prompt " * 20
    assert torch.isfinite(clip.texts([long])).all()
    assert clip.sha256 == Clip(tmp_path / "clip").sha256


def test_prompts_and_weights_are_checked_before_any_work(tmp_path: Path, prompts: str) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=message):
            bench(config(tmp_path, changes.pop("prompts", prompts), **changes))
        assert not (tmp_path / "run" / "cells").exists()

    refused("a local folder of transformers' CLIP is needed; save one on a machine with network: hf download")
    save_clip(tmp_path / "clip")
    refused("needs the condition 'encoder_hidden_states'.*prompts=FILE", prompts=None, guidance=2.0)
    refused("no prompt in it", prompts=str(_written(tmp_path / "empty.txt", "\n \n")))
    refused(r"prompts=.*nowhere.txt.*give a text file", prompts=str(tmp_path / "nowhere.txt"))
    refused("does not say how prompts are encoded", model="digits", metrics=[])
    (tmp_path / "clip" / "model.safetensors").unlink()
    refused(r"weights.clip=.*model.safetensors.*hf download")
    _written(tmp_path / "clip" / "config.json", '{"model_type": "vit"}')
    refused("it holds a model of type 'vit', clip is needed")
    refused("did you mean 'clip'", weights={"clp": "x"})
    assert read_prompts(prompts) == tuple(PROMPTS)


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_pipelines_decoder_gives_its_images() -> None:
    """A whole call of the pipeline is encoding, sampling and decoding."""
    denoiser = make_model()
    assert denoiser.encode is not None
    assert denoiser.decode is not None
    pipe = text_to_image()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    embeds = denoiser.encode(PROMPTS[:2])["encoder_hidden_states"]
    theirs = pipe(
        PROMPTS[:2],
        latents=latents,
        guidance_scale=1.0,
        num_inference_steps=3,
        output_type="pt",
        height=16,
        width=16,
    ).images
    last = pipe(
        prompt_embeds=embeds,
        latents=latents,
        guidance_scale=1.0,
        num_inference_steps=3,
        output_type="latent",
        height=16,
        width=16,
    ).images
    torch.testing.assert_close(denoiser.decode(last) / 2 + 0.5, theirs, rtol=1e-4, atol=1e-5)
