"""The class-conditional pipeline: labels, seeds, outputs, mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tokenflow import ClassToImagePipeline, TextToImagePipeline, TokenFlowModel
from tokenflow.errors import UserError


@pytest.fixture(scope="module")
def pipe(small_class_folder):
    return ClassToImagePipeline.from_pretrained(small_class_folder)


def test_pictures_of_each_label_from_its_seeds(pipe):
    found = pipe([3, 1], num_images_per_label=2, seed=7)
    assert found.seeds == [7, 8, 7, 8]
    assert [image.size for image in found.images] == [(32, 32)] * 4
    expected = pipe.model.generate_indices(torch.tensor([3, 3, 1, 1]), seed=found.seeds)
    assert torch.equal(found.codes, expected)  # with VAR's settings
    alone = pipe(1, seed=8)
    assert torch.equal(alone.codes, found.codes[3:])
    assert np.array_equal(np.asarray(alone.images[0]), np.asarray(found.images[3]))
    assert not torch.equal(found.codes[0], found.codes[2])
    settings = {"guidance_scale": 3.0, "top_k": (9, 1), "top_p": (0.5, 0.0), "temperature": 0.9}
    other = pipe([3], seed=7, output_type="codes", **settings)
    assert torch.equal(other.images, pipe.model.generate_indices(torch.tensor([3]), seed=7, **settings))


def test_previews_known_codes_and_generators(pipe):
    heard = []
    codes = pipe([0, 4], seed=1, callback=heard.append, batch_size=2).codes
    assert [(list(p.rows), p.position) for p in heard] == [([0, 1], 0), ([0, 1], 1), ([0, 1], 2)]
    assert [picture.size for picture in heard[0].pictures()] == [(32, 32)] * 2
    kept = pipe.keep(Image.new("RGB", (32, 32), "red"), scales=1)
    varied = pipe([0, 4], seed=1, known=kept).codes
    assert (varied[:, 0] == kept.codes[0, 0]).all()
    assert not torch.equal(varied, codes)
    drawn = pipe([2], generator=torch.Generator().manual_seed(3))
    assert torch.equal(pipe([2], seed=drawn.seeds).codes, drawn.codes)


def test_numbers_of_numpy(pipe):
    settings = {
        "num_images_per_label": np.int64(2),
        "seed": np.int64(7),
        "top_k": np.array([9]),
        "top_p": [0.5],
    }
    found = pipe(np.array([3, 1]), **settings)
    assert found.seeds == [7, 8, 7, 8]
    expected = pipe([3, 1], num_images_per_label=2, seed=7, top_k=(9,), top_p=(0.5,))
    assert torch.equal(found.codes, expected.codes)


def test_too_little_memory_is_one_line(pipe, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pipe.model, "generate_indices", full)
    with pytest.raises(UserError, match="not enough memory for 3 pictures"):
        pipe([1, 2, 3])


def test_saved_and_loaded_in_half_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = ClassToImagePipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.head.weight.dtype == torch.bfloat16
    assert loaded.model.code_table.codes.dtype == torch.float32
    unit = loaded([2], seed=0, output_type="pt").images
    assert unit.shape == (1, 3, 32, 32)
    assert 0 <= float(unit.min()) <= float(unit.max()) <= 1


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "no labels given; this model knows 0 to 4"),
        ([1, 5], {}, "label 5: this model knows 0 to 4"),
        ([-1], {}, "label -1: this model knows 0 to 4"),
        ([2**70], {}, "this model knows 0 to 4"),
        (["cat"], {}, "label cat: this model knows 0 to 4"),
        ([1], {"num_images_per_label": 0}, "num_images_per_label must be an integer of at least 1, got 0"),
        ([1, 2], {"num_images_per_label": 10**12}, "pictures are too many for one run; draw at most 100,000"),
        (3.5, {}, "label 3.5: this model knows 0 to 4"),
        ([1], {"output_type": "jpg"}, "output_type must be one of pil, pt, np, codes"),
        ([1], {"seed": 1, "generator": torch.Generator()}, "give seed or generator, not both"),
        ([1, 2], {"generator": [torch.Generator()]}, "one for each of the 2 labels; got 1"),
    ],
)
def test_mistakes_are_one_line(pipe, labels, options, message):
    with pytest.raises(UserError, match=message) as error:
        pipe(labels, **options)
    assert "\n" not in str(error.value)


def test_a_model_that_draws_from_something_else(
    small_class_folder, small_pipeline_folder, small_model_folder, other_model_folder, pipe, tmp_path
):
    with pytest.raises(UserError, match="small-t2i draws from prompts; use TextToImagePipeline"):
        ClassToImagePipeline.from_pretrained(small_pipeline_folder)
    with pytest.raises(UserError, match="small-var draws from class labels; use ClassToImagePipeline"):
        TextToImagePipeline.from_pretrained(small_class_folder)
    with pytest.raises(UserError, match="has no image tokenizer in tokenizer/; give a ClassToImagePipeline"):
        ClassToImagePipeline.from_pretrained(small_model_folder)
    tokenizer = TokenFlowModel.from_pretrained(small_model_folder)
    tokenizer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="is no model that draws: its config says model_type 'tokenflow'"):
        ClassToImagePipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="on the codes of another image tokenizer"):
        ClassToImagePipeline(pipe.model, TokenFlowModel.from_pretrained(other_model_folder))
