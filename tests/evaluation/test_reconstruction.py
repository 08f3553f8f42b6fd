"""Reconstruction figures against cases whose answer is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tokenflow.data.sources import Source
from tokenflow.errors import UserError
from tokenflow.evaluation import baselines, report
from tokenflow.evaluation.options import ReconstructionEval
from tokenflow.evaluation.reconstruction import (
    CodebookUsage,
    evaluate_reconstruction,
    measure,
    psnr,
    run,
    ssim,
    to_uint8,
    to_unit_range,
)


def pictures(count=4, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_psnr_of_a_known_error_is_analytic():
    real = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    fake = real.clone()
    fake[0] += 5  # error 25 everywhere
    fake[1, :, ::2] += 10  # error 100 on half of the pixels
    expected = [20 * math.log10(255 / 5), 10 * math.log10(255**2 / 50)]
    assert psnr(real, fake).tolist() == pytest.approx(expected, abs=1e-9)


def test_psnr_of_gaussian_noise_matches_its_deviation():
    real = torch.full((8, 3, 64, 64), 128, dtype=torch.uint8)
    noise = 10 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    fake = (real + noise).round().clamp(0, 255).to(torch.uint8)
    expected = 10 * math.log10(255**2 / (10**2 + 1 / 12))  # rounding adds a twelfth
    assert float(psnr(real, fake).mean()) == pytest.approx(expected, abs=0.05)


def test_identical_pictures():
    real = pictures()
    assert ssim(real, real).tolist() == pytest.approx([1.0] * 4)
    assert psnr(real, real).tolist() == [100.0] * 4


def test_psnr_is_averaged_over_pictures_in_decibels_not_over_errors():
    real = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    fake = real + torch.tensor([1, 50], dtype=torch.uint8).view(2, 1, 1, 1)
    batches = iter([fake[:1], fake[1:]])
    metrics, _ = measure([real[:1], real[1:]], lambda x: (next(batches), None))
    assert metrics["PSNR (dB)"] == pytest.approx((20 * math.log10(255) + 20 * math.log10(255 / 50)) / 2)


def test_ssim_falls_with_noise_and_ignores_batch_composition():
    real = pictures(3)
    little = (real.int() + 4).clamp(0, 255).to(torch.uint8)
    other = pictures(3, seed=1)
    values = ssim(real, little)
    assert (values > 0.95).all()
    assert (ssim(real, other) < 0.2).all()
    assert values[2].item() == pytest.approx(ssim(real[2:], little[2:]).item())


def test_pixels_survive_the_way_into_the_model_and_back():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_unit_range(every)), every)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_codebook_usage_is_exact_overall_and_per_scale():
    usage = CodebookUsage(codebook_size=8, scales=[1, 2])
    usage.update(torch.tensor([[0, 1, 1, 1, 1], [0, 1, 2, 3, 4]]))
    assert usage.compute() == {"overall": 5 / 8, "per scale": {"1x1": 1 / 2, "2x2": 4 / 8}}
    usage.update(torch.tensor([[7, 5, 6, 7, 0]]))
    assert usage.compute() == {"overall": 1.0, "per scale": {"1x1": 2 / 3, "2x2": 8 / 8}}


def test_reference_hash_sees_pixels_and_order_but_not_batches():
    real = pictures(6)

    def keep(x):
        return x, None

    whole, chunks = (measure(real.split(n), keep)[1] for n in (6, 4))
    assert whole == chunks
    assert whole["pictures"] == 6
    assert measure([real.flip(0)], keep)[1]["sha256"] != whole["sha256"]
    with pytest.raises(UserError, match="evaluation set is empty"):
        measure([], keep)


def test_extra_distances_are_averaged_over_pictures():
    real = pictures(5)
    metrics, _ = measure(
        real.split(3), lambda x: (x, None), distances={"count": lambda a, b: torch.ones(len(a)) * 2}
    )
    assert metrics["count"] == 2.0


def smooth_pictures():
    ramp = torch.linspace(0, 255, 32)
    return torch.stack([ramp.expand(32, 32), ramp.view(-1, 1).expand(32, 32), torch.full((32, 32), 90.0)]).to(
        torch.uint8
    )[None]


@pytest.mark.parametrize("name", ["shrink:8", "webp:400", "jpeg:400"])
def test_baselines_keep_smooth_pictures(name):
    real = smooth_pictures()
    fake = baselines.reconstruct(name, real)
    assert fake.shape == real.shape
    assert fake.dtype == torch.uint8
    assert psnr(real, fake).item() > 28


def test_a_larger_budget_never_hurts():
    real = pictures(2)
    few, many = (psnr(real, baselines.reconstruct(f"webp:{n}", real)) for n in (200, 800))
    assert (many >= few).all()


@pytest.mark.parametrize(
    ("name", "message"), [("png:9", "unknown baseline 'png:9'"), ("webp:3", "no picture fits in 3 bytes")]
)
def test_baselines_that_cannot_be_had(name, message):
    with pytest.raises(UserError, match=message):
        baselines.reconstruct(name, pictures(1))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder data set with a val split of 7 smooth pictures of several shapes."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "val").mkdir()
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(40, 64), (64, 40), (32, 32), (80, 80), (50, 33), (33, 50), (64, 64)]):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(shape, Image.Resampling.BICUBIC).save(folder / "val" / f"{number}.png")
    return folder


def test_a_model_is_measured_from_a_folder_to_a_file(photographs, small_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tokenflow", "eval", "reconstruction"])
    options = ReconstructionEval(
        data=str(photographs), model=str(small_model_folder), out=str(tmp_path / "r.json")
    )
    result = run(options)
    assert report.read(tmp_path / "r.json") == result
    metrics, fingerprint = result["metrics"], result["fingerprint"]
    assert 3 < metrics["PSNR (dB)"] < 30
    assert -1 < metrics["SSIM"] < 1
    assert 0 < metrics["codebook usage"]["overall"] <= 1
    assert set(metrics["codebook usage"]["per scale"]) == {"1x1", "2x2", "4x4"}
    assert fingerprint["image_size"] == 32
    assert fingerprint["reference"]["name"] == photographs.name
    assert fingerprint["reference"]["pictures"] == 7
    assert result["command"] == "tokenflow eval reconstruction"
    again = run(dataclasses.replace(options, batch_size=3, out=None))
    assert again["fingerprint"] == fingerprint
    assert again["metrics"]["codebook usage"] == metrics["codebook usage"]
    assert again["metrics"]["PSNR (dB)"] == pytest.approx(metrics["PSNR (dB)"], abs=1e-3)


def test_a_folder_without_splits_is_measured_whole(photographs, small_model_folder):
    plain = ReconstructionEval(data=str(photographs / "val"), model=str(small_model_folder))
    reference = run(plain)["fingerprint"]["reference"]
    assert (reference["split"], reference["pictures"]) == ("train", 7)
    assert run(dataclasses.replace(plain, split="train"))["fingerprint"]["reference"] == reference
    with pytest.raises(UserError, match="has no split 'val'"):
        run(dataclasses.replace(plain, split="val"))


def test_psnr_equals_the_public_way_through_processor_and_postprocess(photographs, small_model_folder):
    from tokenflow import TokenFlowImageProcessor, TokenFlowModel

    processor = TokenFlowImageProcessor.from_pretrained(small_model_folder)
    model = TokenFlowModel.from_pretrained(small_model_folder)
    values = []
    for file in sorted((photographs / "val").iterdir()):
        pixels = processor(Image.open(file), return_tensors="pt").pixel_values
        with torch.inference_mode():
            back = processor.postprocess(model.decode(model.encode(pixels).quantized).pixel_values)[0]
        original = processor.postprocess(pixels)[0]
        error = np.square(np.asarray(back, dtype=float) - np.asarray(original, dtype=float)).mean()
        values.append(10 * math.log10(255**2 / error))
    result = evaluate_reconstruction(model, Source(str(photographs), split="val"))
    assert result["metrics"]["PSNR (dB)"] == pytest.approx(np.mean(values), abs=1e-3)


def test_a_training_model_is_measured_as_it_would_be_used_and_left_as_it_was(photographs, small_model_folder):
    from tokenflow import TokenFlowModel

    model = TokenFlowModel.from_pretrained(small_model_folder)
    source = Source(str(photographs), split="val")
    expected = evaluate_reconstruction(model, source)["metrics"]
    model.train()
    assert evaluate_reconstruction(model, source)["metrics"] == expected
    assert model.training
    assert int(model.quantizer.quantizer.usage.seen) == 0


def test_baselines_and_models_on_the_same_pictures_can_be_compared(photographs, small_model_folder):
    options = ReconstructionEval(data=str(photographs), model=str(small_model_folder), limit=3)
    model, shrink = run(options), run(dataclasses.replace(options, baseline="shrink:4"))
    assert shrink["metrics"]["PSNR (dB)"] > 20
    assert "codebook usage" not in shrink["metrics"]
    report.refuse_different([model, shrink])
    with pytest.raises(UserError, match=r"reference / pictures \(3 / 7\).*sha256"):
        report.refuse_different([model, run(dataclasses.replace(options, limit=None))])
    with pytest.raises(UserError, match=r"dtype \(float32 / bfloat16\)"):
        report.refuse_different([model, run(dataclasses.replace(options, dtype="bfloat16"))])


def test_options_that_cannot_be_met(photographs, small_model_folder):
    options = ReconstructionEval(data=str(photographs), model=str(small_model_folder))
    with pytest.raises(UserError, match="cannot use device 'tpu9'"):
        run(dataclasses.replace(options, device="tpu9"))
    with pytest.raises(UserError, match="has no split 'train'"):
        run(dataclasses.replace(options, split="train"))
    with pytest.raises(UserError, match="unknown baseline 'foo'"):  # before anything is looked for
        run(ReconstructionEval(data="/missing", model="missing", baseline="foo"))
    with pytest.raises(UserError, match="no such file"):
        run(dataclasses.replace(options, inception="missing.pth"))
    with pytest.raises(UserError, match="cannot write /proc/result"):  # before the work, too
        run(ReconstructionEval(data="/missing", model="missing", out="/proc/result.json"))
