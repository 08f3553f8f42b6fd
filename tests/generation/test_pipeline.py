"""TextToImagePipeline: prompts in, pictures out, saved and loaded."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tokenflow import TextToImagePipeline, TokenFlowModel
from tokenflow.errors import UserError
from tokenflow.training.checkpointing import export_half_generator


@pytest.fixture(scope="module")
def pipe(small_pipeline_folder) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(small_pipeline_folder)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_pictures(pipe):
    out = pipe(["a hat", "a boat"], seed=0, num_images_per_prompt=2)
    assert [image.size for image in out.images] == [(32, 32)] * 4
    assert out.codes.shape == (4, 21)
    assert out.seeds == [0, 1, 0, 1]
    assert pipe("a hat", seed=0).images[0].tobytes() == out.images[0].tobytes()


def test_a_picture_depends_on_prompt_and_seed_alone(pipe):
    out = pipe(["a hat", "a boat"], seed=[4, 9], num_images_per_prompt=3, output_type="codes")
    for row, (prompt, seed) in enumerate(zip(["a hat"] * 3 + ["a boat"] * 3, out.seeds, strict=True)):
        assert torch.equal(pipe(prompt, seed=seed, output_type="codes").codes[0], out.codes[row])
    drawn = pipe("a hat", output_type="codes")
    assert torch.equal(pipe("a hat", seed=drawn.seeds, output_type="codes").codes, drawn.codes)


def test_generators(pipe):
    def one():
        return torch.Generator().manual_seed(3)

    first = pipe(["a", "b"], generator=one(), output_type="codes")
    assert torch.equal(pipe(["a", "b"], generator=one(), output_type="codes").codes, first.codes)
    single = pipe(["a", "b"], generator=[one(), one()], output_type="codes")
    assert single.seeds[0] == single.seeds[1] == first.seeds[0]
    with pytest.raises(UserError, match="one for each of the 2 prompts; got 1"):
        pipe(["a", "b"], generator=[one()])
    with pytest.raises(UserError, match="seed or generator, not both"):
        pipe("a", generator=one(), seed=1)


def test_output_types(pipe):
    images, pt, array = (pipe("a hat", seed=0, output_type=kind).images for kind in ("pil", "pt", "np"))
    assert (pt.shape, array.shape) == ((1, 3, 32, 32), (1, 32, 32, 3))
    assert pt.min() >= 0
    assert pt.max() <= 1
    np.testing.assert_array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    assert np.abs(np.asarray(images[0]) / 255 - array[0]).max() < 0.01
    codes = pipe("a hat", seed=0, output_type="codes")
    assert codes.images is codes.codes
    with pytest.raises(UserError, match="output_type must be one of pil, pt, np, codes, got 'jpg'"):
        pipe("a hat", output_type="jpg")


def test_previews(pipe):
    heard = []
    out = pipe(["a hat", "a boat"], seed=0, callback=heard.append)
    streamed = list(pipe.stream(["a hat", "a boat"], seed=0))
    assert [(p.rows, p.position) for p in streamed] == [(p.rows, p.position) for p in heard]
    assert [p.codes.shape[1] for p in heard] == [1, 5, 21, 1, 5, 21]
    assert heard[0].pictures()[0].size == (32, 32)
    assert heard[5].pictures()[0].tobytes() == out.images[1].tobytes()


def test_negative_prompts(pipe):
    default = pipe(["a", "b"], seed=0, output_type="codes").codes
    assert torch.equal(pipe(["a", "b"], seed=0, negative_prompt="", output_type="codes").codes, default)
    other = pipe(["a", "b"], seed=0, negative_prompt=["blurry", ""], output_type="codes").codes
    assert not torch.equal(other[0], default[0])
    assert torch.equal(other[1], default[1])
    with pytest.raises(UserError, match="give 1 or 2 negative prompts, got 3"):
        pipe(["a", "b"], negative_prompt=["x", "y", "z"])


def test_long_prompts_are_cut_with_a_warning(pipe):
    limit = pipe.model.config.max_text_tokens
    with pytest.warns(UserWarning, match=f"1 of 2 prompts are cut to {limit} tokens; the longest has 50001"):
        long = pipe(["word " * 10_000, "short"], seed=0, output_type="codes").codes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut = pipe(("word " * 10_000)[: limit - 1], seed=0, output_type="codes").codes
    assert torch.equal(cut[0], long[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt must be a string or a list of strings"),
        ({"prompt": [1]}, "prompt must be a string"),
        ({"prompt": "\ud800"}, "prompt is not valid Unicode text"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer of at least 1, got 0"),
        ({"num_images_per_prompt": -2}, "at least 1, got -2"),
        ({"num_images_per_prompt": True}, "at least 1, got True"),
        ({"num_images_per_prompt": 10**12}, "1,000,000,000,000 pictures are too many for one run"),
        ({"guidance_scale": -1.0}, "guidance_scale must be"),
        ({"top_k": (1, 2)}, "top_k has 2 entries and top_p 3"),
        ({"seed": [1, 2]}, "one for each of the 1 images; got 2"),
        ({"seed": -1}, "a seed must be an integer from 0"),
        ({"seed": 1.5}, "a seed must be an integer, or a list of one for each image"),
        ({"seed": ["1"]}, "a seed must be an integer from 0 to .*, got '1'"),
    ],
)
def test_what_makes_no_sense(pipe, options, message):
    with pytest.raises(UserError, match=message) as caught:
        pipe(**({"prompt": "a hat"} | options))
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy(pipe):
    ours = {"num_images_per_prompt": 2, "seed": 3, "top_k": (5,), "top_p": (0.5,), "guidance_scale": 1.0}
    theirs = {
        "num_images_per_prompt": np.int64(2),
        "seed": np.int64(3),
        "top_k": np.array([5]),
        "top_p": [np.float32(0.5)],
        "guidance_scale": np.float32(1),
    }
    assert torch.equal(pipe("a hat", **theirs).codes, pipe("a hat", **ours).codes)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")]
)
def test_too_little_memory_is_one_line(pipe, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(pipe.tokenizer, "decode_pixels", full)
    with pytest.raises(UserError, match="not enough memory for 2 pictures; draw fewer, or lower batch_size"):
        pipe("a hat", num_images_per_prompt=2)


def test_other_errors_of_a_device_stay_what_they_are(pipe, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pipe.tokenizer, "decode_pixels", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pipe("a hat")


# ------------------------------------------------------------------------------------------------ editing
def test_a_variation_keeps_the_first_scales(pipe, photo):
    known = pipe.keep(photo, scales=2)
    out = pipe(["a", "b"], known=known, seed=0, output_type="codes").codes
    assert torch.equal(out[:, :5], known.codes.expand(2, -1))


def test_in_painting_keeps_what_is_black(pipe, photo):
    mask = np.zeros((32, 32), dtype=bool)
    mask[:, 16:] = True
    bytes_, integers = mask.astype(np.uint8) * 255, mask.astype(np.int64)
    for repaint in (mask, mask.astype(np.float32), bytes_, integers, integers * 255, Image.fromarray(mask)):
        known = pipe.keep(photo, repaint=repaint)
        assert known.mask[0, 5:].view(4, 4).tolist() == [[True, True, False, False]] * 4
    out = pipe("a hat", known=known, seed=0, output_type="codes").codes
    assert torch.equal(out[known.mask], known.codes[known.mask])


def test_masks_that_make_no_sense(pipe, photo):
    with pytest.raises(UserError, match="the mask is 8 x 4, the image 32 x 32"):
        pipe.keep(photo, repaint=np.zeros((4, 8), dtype=bool))
    with pytest.raises(UserError, match=r"a picture or an array \[H, W\], got \[32, 32, 3\]"):
        pipe.keep(photo, repaint=np.zeros((32, 32, 3)))
    with pytest.raises(UserError, match="repaints nothing"):
        pipe.keep(photo, repaint=Image.new("L", (32, 32)))
    for options in ({}, {"scales": 1, "repaint": photo}):
        with pytest.raises(UserError, match="one of them"):
            pipe.keep(photo, **options)
    with pytest.raises(UserError, match="keeps 1 to 2 scales"):
        pipe.keep(photo, scales=3)
    for scales in ("2", 2.5, True):
        with pytest.raises(UserError, match=f"scales must be an integer, got {scales!r}"):
            pipe.keep(photo, scales=scales)
    for image in ("nofile.png", None):
        with pytest.raises(UserError, match=f"image must be a PIL image .*, got {image!r}"):
            pipe.keep(image, scales=1)


# ------------------------------------------------------------------------------------------------- saving
def test_saving_and_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="5GB")
    again = TextToImagePipeline.from_pretrained(tmp_path)
    assert torch.equal(again("a hat", seed=0).codes, pipe("a hat", seed=0).codes)
    assert TokenFlowModel.from_pretrained(tmp_path / "tokenizer").config.scales == [1, 2, 4]
    half = TextToImagePipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.lm_head.weight.dtype == half.tokenizer.decoder_dtype == torch.bfloat16
    assert half("a hat", seed=0).images[0].size == (32, 32)


def test_the_form_that_ships_names_its_image_tokenizer(pipe, small_pipeline_folder, tmp_path):
    named = str(small_pipeline_folder / "tokenizer")
    folder = export_half_generator(small_pipeline_folder, tmp_path / "half", named)
    stored = load_file(folder / "model.safetensors")
    assert stored.pop("code_table.codes").dtype == torch.float32
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    assert not (folder / "tokenizer").exists()
    half = TextToImagePipeline.from_pretrained(folder)
    assert half.model.dtype == torch.float32
    assert torch.equal(half.tokenizer.quantizer.quantizer.codes(), pipe.tokenizer.quantizer.quantizer.codes())
    for name, t in half.model.state_dict().items():
        torch.testing.assert_close(t, pipe.model.state_dict()[name], rtol=1e-3, atol=1e-6)
    half.model.config.image_tokenizer = None
    half.model.save_pretrained(folder)
    with pytest.raises(UserError, match="no image tokenizer in tokenizer/"):
        TextToImagePipeline.from_pretrained(folder)


def test_push_to_hub_is_there():
    from transformers.utils import PushToHubMixin

    assert TextToImagePipeline.push_to_hub is PushToHubMixin.push_to_hub


def test_a_folder_of_another_kind(small_model_folder):
    with pytest.raises(UserError, match="has no image tokenizer in tokenizer/"):
        TextToImagePipeline.from_pretrained(small_model_folder)
    with pytest.raises(UserError, match="no model folder at"):
        TextToImagePipeline.from_pretrained("./nothing")


def test_models_that_do_not_belong_together(pipe, other_model_folder):
    other = TokenFlowModel.from_pretrained(other_model_folder)
    with pytest.raises(UserError, match="on the codes of another image tokenizer"):
        TextToImagePipeline(pipe.model, pipe.text_tokenizer, other)


@pytest.mark.gpu
def test_pictures_in_half_precision_on_a_gpu(small_pipeline_folder, photo):
    pipe = TextToImagePipeline.from_pretrained(small_pipeline_folder, dtype=torch.bfloat16).to("cuda")
    assert pipe.model.code_table.codes.dtype == torch.float32
    out = pipe(["a hat", "a boat"], seed=0, num_images_per_prompt=2, output_type="pt")
    assert out.images.shape == (4, 3, 32, 32)
    assert out.images.isfinite().all()
    again = pipe(["a hat", "a boat"], seed=0, num_images_per_prompt=2, output_type="pt")
    assert torch.equal(again.codes, out.codes)
    steps = list(pipe.stream("a hat", seed=0))
    assert [step.codes.shape[1] for step in steps] == [1, 5, 21]
    assert steps[0].pictures()[0].size == (32, 32)
    white = Image.new("L", photo.size, 0)
    white.paste(255, (0, 0, 16, 32))
    known = pipe.keep(photo, repaint=white)
    kept = pipe("a hat", known=known, seed=0, output_type="codes").codes
    assert torch.equal(kept[known.mask.to(kept.device)], known.codes[known.mask].to(kept.device))
