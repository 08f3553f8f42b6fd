"""TokenFlow: one image tokenizer for understanding and generation (Qu et al., CVPR 2025, arXiv 2412.03069).

    from tokenflow import TokenFlowImageProcessor, TokenFlowModel

    model = TokenFlowModel.from_pretrained("tokenflow-tiny")
    processor = TokenFlowImageProcessor.from_pretrained("tokenflow-tiny")

The public names load on first use: `import tokenflow` itself imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenflow.auto import register_with_transformers
from tokenflow.bundled import bundled_path
from tokenflow.errors import UserError

if TYPE_CHECKING:
    from tokenflow.generation.class_conditional import TokenFlowClassToImageConfig, TokenFlowForClassToImage
    from tokenflow.generation.class_pipeline import ClassToImagePipeline
    from tokenflow.generation.configuration import TokenFlowTextToImageConfig
    from tokenflow.generation.modeling import TokenFlowForTextToImage
    from tokenflow.generation.pipeline import TextToImagePipeline
    from tokenflow.tokenizer.configuration import TokenFlowConfig
    from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor
    from tokenflow.tokenizer.modeling import TokenFlowModel
    from tokenflow.understanding.ask import ask

__version__ = "0.1.0"

__all__ = [
    "ClassToImagePipeline",
    "TextToImagePipeline",
    "TokenFlowClassToImageConfig",
    "TokenFlowConfig",
    "TokenFlowForClassToImage",
    "TokenFlowForTextToImage",
    "TokenFlowImageProcessor",
    "TokenFlowModel",
    "TokenFlowTextToImageConfig",
    "UserError",
    "ask",
    "bundled_path",
]

_LAZY = {
    "ask": "tokenflow.understanding.ask",
    "ClassToImagePipeline": "tokenflow.generation.class_pipeline",
    "TextToImagePipeline": "tokenflow.generation.pipeline",
    "TokenFlowClassToImageConfig": "tokenflow.generation.class_conditional",
    "TokenFlowConfig": "tokenflow.tokenizer.configuration",
    "TokenFlowForClassToImage": "tokenflow.generation.class_conditional",
    "TokenFlowForTextToImage": "tokenflow.generation.modeling",
    "TokenFlowImageProcessor": "tokenflow.tokenizer.image_processing",
    "TokenFlowModel": "tokenflow.tokenizer.modeling",
    "TokenFlowTextToImageConfig": "tokenflow.generation.configuration",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tokenflow' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])  # not what this file itself imports


register_with_transformers()
