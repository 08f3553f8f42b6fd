"""Telling transformers' Auto classes about ours, without importing transformers before the user does.

`AutoModel.register` needs our classes, and those need torch: seconds that `import tokenflow` must not
cost. So the registration waits for the import that brings in `transformers.models.auto`. It runs when the
*outermost* running import of transformers (or of this package) has ended, for `auto` is loaded from the
middle of transformers' own modules (CLIP imports `modeling_layers`, which imports `auto`) and ours need
those whole.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto"


def register_with_transformers() -> None:
    """Register now if transformers' Auto classes are loaded, else as soon as they are."""
    if _AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterAuto())


def _register() -> None:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    from tokenflow.generation.class_conditional import TokenFlowClassToImageConfig, TokenFlowForClassToImage
    from tokenflow.generation.configuration import TokenFlowTextToImageConfig
    from tokenflow.generation.modeling import TokenFlowForTextToImage
    from tokenflow.tokenizer.configuration import TokenFlowConfig
    from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor
    from tokenflow.tokenizer.modeling import TokenFlowModel

    pairs: tuple[tuple[Any, Any], ...] = (
        (TokenFlowConfig, TokenFlowModel),
        (TokenFlowTextToImageConfig, TokenFlowForTextToImage),
        (TokenFlowClassToImageConfig, TokenFlowForClassToImage),
    )
    for config, model in pairs:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    processors: dict[str, type] = {"pil": TokenFlowImageProcessor}
    AutoImageProcessor.register(TokenFlowConfig, image_processor_classes=processors, exist_ok=True)


class _AfterAuto:
    """A finder that finds nothing itself: it counts running imports and leaves after the one it waits for."""

    def __init__(self) -> None:
        self.running = 0

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in ("transformers", "tokenflow"):
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.running += 1
            try:
                execute(module)
            finally:
                self.running -= 1
            if self.running == 0 and _AUTO in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)  # before registering, which imports more
                _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # each module has its own loader
        return spec
