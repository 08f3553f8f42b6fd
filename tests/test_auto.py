"""`import tokenflow` is light, and transformers' Auto classes know our classes in either import order."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = """
import sys
import tokenflow
assert tokenflow.__version__
assert set(dir(tokenflow)) == {*tokenflow.__all__, "__version__"}
heavy = {"torch", "transformers", "numpy", "PIL", "safetensors", "tyro", "rich"} & set(sys.modules)
assert not heavy, heavy
"""

# CLIP imports `transformers.models.auto` from the middle of modules that our own classes need whole.
OURS_FIRST = (
    "import tokenflow, transformers.models.clip.modeling_clip; "
    "from transformers import LlavaForConditionalGeneration"
)
OURS_LAST = "from transformers import LlavaForConditionalGeneration; import tokenflow"

LOAD = """
from transformers import AutoConfig, AutoImageProcessor, AutoModel, LlavaConfig, LlamaConfig
folder, out, drawing, classes = sys.argv[1:]
assert type(AutoConfig.from_pretrained(folder)).__name__ == "TokenFlowConfig"
assert type(AutoImageProcessor.from_pretrained(folder)).__name__ == "TokenFlowImageProcessor"
assert type(AutoModel.from_pretrained(folder)).__name__ == "TokenFlowModel"
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
text = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
vision = AutoConfig.from_pretrained(folder)
strategy = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
config = LlavaConfig(vision_config=vision, text_config=text, **strategy)
LlavaForConditionalGeneration(config).save_pretrained(out)
llava = LlavaForConditionalGeneration.from_pretrained(out)
assert type(llava.model.vision_tower) is tokenflow.TokenFlowModel
assert type(AutoConfig.from_pretrained(drawing)).__name__ == "TokenFlowTextToImageConfig"
assert type(AutoModel.from_pretrained(drawing)).__name__ == "TokenFlowForTextToImage"
assert type(AutoConfig.from_pretrained(classes)).__name__ == "TokenFlowClassToImageConfig"
assert type(AutoModel.from_pretrained(classes)).__name__ == "TokenFlowForClassToImage"
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "tokenflow.auto"]
"""


def run(code: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    run(LIGHT)


@pytest.mark.parametrize("imports", [OURS_FIRST, OURS_LAST], ids=["ours first", "ours last"])
def test_transformers_loads_our_classes_by_name(
    imports, small_model_folder, small_pipeline_folder, small_class_folder, tmp_path
):
    folders = (small_model_folder, tmp_path / "llava", small_pipeline_folder, small_class_folder)
    run(f"import sys; {imports}{LOAD}", *folders)


def test_unknown_attribute_is_an_attribute_error():
    import tokenflow

    with pytest.raises(AttributeError, match="no attribute 'TokenFlowModle'"):
        tokenflow.TokenFlowModle  # noqa: B018
