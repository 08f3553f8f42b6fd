"""The model `tokenflow` of lmms-eval: any LLaVA that `tokenflow.understanding.load` loads.

lmms-eval finds `MANIFEST` through its entry-point group `lmms_eval.models`, so where both are installed
`python -m lmms_eval --model tokenflow --model_args pretrained=MODEL --tasks pope` works as it stands. This
file is imported there only; `tokenflow eval vlm --tasks` (evaluation/lmms.py) starts it as a process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from tokenflow.understanding import load
from tokenflow.understanding.ask import encode_images, generate, tokenize, user_message

MANIFEST = ModelManifest(model_id="tokenflow", simple_class_path=f"{__name__}.TokenFlowLlava")

_MAX_NEW_TOKENS = 1024  # for tasks that name no limit: what lmms-eval gives its own LLaVA


class TokenFlowLlava(lmms):
    """Answers the requests of lmms-eval's tasks: the images, then the task's text, in the model's template.

    Args:
        pretrained: a bundled name, a folder, or a hub name.
        batch_size: questions at a time; changes the speed, not the answers.
        device: auto, cpu, cuda, cuda:1 ...; under `torchrun` each process takes its own.
        dtype: of the language model; auto is that of the file.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str = "auto", dtype: str = "auto"
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        several = self.accelerator.num_processes > 1
        name = str(self.accelerator.device) if several else device
        self.model, self.processor = load(str(pretrained), device=name, dtype=dtype)
        self.batch_size = int(batch_size)
        text: Any = self.model.config.text_config
        self.context = text.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One answer a request, in the requests' order.

        The stop words of a task (`until`) are not applied, as in lmms-eval's own LLaVA: where a task names
        none they are an empty line, which would cut off the reasoning that MM-Vet asks for.
        """
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        with tqdm(total=len(requests), disable=self.rank != 0, unit="question", mininterval=1) as bar:
            for numbers in alike.values():
                numbers.sort(key=lambda number: len(requests[number].args[0]))  # little padding
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    for number, text in zip(
                        batch, self._answer([requests[n].args for n in batch]), strict=True
                    ):
                        answers[number] = text
                    bar.update(len(batch))
        return answers

    def _answer(self, batch: list[tuple[Any, ...]]) -> list[str]:
        shown = [
            doc_to_visual(self.task_dict[task][split][document]) or []
            for _, _, doc_to_visual, document, task, split in batch
        ]
        turns = [
            [user_message(self.processor, text, len(pictures))]
            for (text, *_), pictures in zip(batch, shown, strict=True)
        ]
        inputs = tokenize(self.model, self.processor, turns)
        features = encode_images(self.model, self.processor, [one for pictures in shown for one in pictures])
        settings = batch[0][1]
        left = max(1, self.context - inputs["input_ids"].shape[1])
        options = {
            "max_new_tokens": min(settings.get("max_new_tokens", _MAX_NEW_TOKENS), left),
            "num_beams": settings.get("num_beams", 1),
            "do_sample": settings.get("do_sample", False),
        }
        if options["do_sample"]:
            options |= {key: settings[key] for key in ("temperature", "top_p", "top_k") if key in settings}
        return generate(self.model, self.processor, inputs, features, **options)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "the model tokenflow writes answers; tasks that rate given ones do not work"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("the model tokenflow answers in one turn; multi-round tasks do not work")
