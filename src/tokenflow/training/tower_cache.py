"""The frozen vision tower's output for each picture, made once and kept on disk.

What is notable:
- of a tokenizer the indices are kept, from which the features of any strategy follow (Tab. 8): some hundred
  bytes a picture, and one pass of the tower for all of them. Of another tower (Tab. 9) its features are kept,
  in half precision;
- an entry is known by the picture's bytes, so stages, recipes and changed data sets share it, and by
  fingerprints of tower and image processor, so nothing stale is read;
- a pass that was broken off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from tokenflow.data.conversations import Conversations
from tokenflow.data.images import ImageError, read_image
from tokenflow.files import atomic_write
from tokenflow.tokenizer.modeling import TokenFlowModel
from tokenflow.tokenizer.token_file import tokenizer_fingerprint
from tokenflow.training.understanding_data import picture_name

logger = logging.getLogger(__name__)

_BATCH, _BATCH_ON_GPU, _PART = 32, 256, 4096  # pictures at a time, and in a file
Place = tuple[int, int]  # file, row in it


class TowerCache:
    """Pictures' entries by content; gives `ConversationRows` the entries of a row.

    Args:
        folder: holds a folder for each tower and image processor, of parts with `keys` `[n, 16]` uint8 and
            `values` `[n, ...]`.
        model, processor: of the chat model, whose tower is asked, on a GPU if there is one.
    """

    def __init__(self, folder: str | Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor):
        self.tower, self.processor = model.model.vision_tower, processor.image_processor
        self.config: Any = model.config
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.folder = Path(folder) / tower_fingerprint(self.tower, self.processor, self.config)[:32]
        self.parts: list[Tensor] = []
        self.places: dict[bytes, Place] = {}
        self.of_row: dict[tuple[int, int], list[bytes]] = {}
        self.broken: dict[tuple[int, int], str] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                self._add(load_file(file))
            except (OSError, SafetensorError) as error:
                logger.warning("left out %s, its pictures are looked at anew: %s", file, error)

    def __call__(self, source: int, row: int) -> list[Tensor]:
        if message := self.broken.get((source, row)):
            raise ImageError(message)
        places = [self.places[key] for key in self.of_row[source, row]]
        entries = [self.parts[part][place] for part, place in places]
        return [entry.int() if entry.dtype == torch.uint16 else entry for entry in entries]

    def encode(self, data: Sequence[Conversations], rows: Sequence[tuple[int, int]]) -> None:
        """Have entries for all pictures of some rows, each a source and its row; `broken` says which have a
        picture that cannot be read, and what is wrong with it."""
        made: dict[bytes, Tensor] = {}
        size = _BATCH if self.device.type == "cpu" else _BATCH_ON_GPU
        with (
            ThreadPoolExecutor(os.cpu_count()) as readers,
            tqdm(total=len(rows), desc="looking at pictures", unit="row", mininterval=1.0) as bar,
        ):
            for start in range(0, len(rows), size):
                some = rows[start : start + size]
                waiting = self._new_pictures(data, some, made, readers)
                if waiting:
                    made |= self._values(waiting)
                if len(made) >= _PART:
                    self._keep(made)
                bar.update(len(some))
        if made:
            self._keep(made)

    def _new_pictures(
        self,
        data: Sequence[Conversations],
        rows: Sequence[tuple[int, int]],
        made: dict[bytes, Tensor],
        readers: ThreadPoolExecutor,
    ) -> dict[bytes, Tensor]:
        """The pictures `[3, H, W]` of some rows that have no entry, by key; sets `of_row` and `broken`."""
        opening: dict[bytes, Future[Tensor]] = {}
        for source, row in rows:
            keys = []
            try:
                for image in data[source].images(row):
                    name = picture_name(data[source], row, image)
                    encoded = _encoded(image, name)
                    keys.append(key := hashlib.sha256(encoded).digest()[:16])
                    if key not in self.places and key not in made and key not in opening:
                        opening[key] = readers.submit(self._opened, encoded, name)
                self.of_row[source, row] = keys
            except ImageError as error:
                self.broken[source, row] = str(error)
        waiting = {key: future.result() for key, future in opening.items() if future.exception() is None}
        for source, row in rows:
            failed = [
                key for key in self.of_row.get((source, row), ()) if key in opening and key not in waiting
            ]
            if failed:
                try:
                    opening[failed[0]].result()
                except ImageError as error:
                    del self.of_row[source, row]
                    self.broken[source, row] = str(error)
        return waiting

    def _opened(self, encoded: bytes, name: str) -> Tensor:
        return self.processor(read_image(encoded, name=name), return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def _values(self, waiting: dict[bytes, Tensor]) -> dict[bytes, Tensor]:
        tower: Any = self.tower.to(self.device)
        pixels = torch.stack(list(waiting.values())).to(self.device)
        if isinstance(tower, TokenFlowModel):
            values = tower.encode(pixels).indices.cpu()
            values = values.to(torch.uint16 if tower.config.codebook_size <= 2**16 else torch.int32)
        else:
            values = chosen_features(tower, self.config, pixels).half().cpu()
        return dict(zip(waiting, values, strict=True))

    def _keep(self, made: dict[bytes, Tensor]) -> None:
        keys = torch.tensor([list(key) for key in made], dtype=torch.uint8)
        part = {"keys": keys, "values": torch.stack(list(made.values()))}
        with atomic_write(self.folder / f"{secrets.token_hex(8)}.safetensors") as temporary:
            save_file(part, temporary)
        self._add(part)
        made.clear()

    def _add(self, part: dict[str, Tensor]) -> None:
        for place, key in enumerate(part["keys"].numpy()):
            self.places[key.tobytes()] = (len(self.parts), place)
        self.parts.append(part["values"])


def _encoded(image: Any, name: str) -> bytes:
    try:
        return image.read_bytes() if isinstance(image, Path) else bytes(image)
    except (OSError, ValueError) as error:  # a ValueError: the name has a NUL character
        raise ImageError(f"cannot read image {name}: {getattr(error, 'strerror', None) or error}") from error


def tower_fingerprint(tower: PreTrainedModel, processor: Any, config: Any) -> str:
    """sha256 over all that turns a picture into an entry."""
    digest = hashlib.sha256(processor.to_json_string().encode())
    if isinstance(tower, TokenFlowModel):
        digest.update(tokenizer_fingerprint(tower).encode())
        return digest.hexdigest()
    digest.update(f"{config.vision_feature_layer} {config.vision_feature_select_strategy}".encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def chosen_features(tower: Any, config: Any, pixels: Tensor) -> Tensor:
    """What a LLaVA of this configuration takes of its tower's hidden states, `[B, N, D]`."""
    seen = tower(pixels.to(tower.dtype), output_hidden_states=True)
    features = seen.hidden_states[config.vision_feature_layer]
    return features[:, 1:] if config.vision_feature_select_strategy == "default" else features


class TowerBeside(nn.Module):
    """Takes the vision tower's place in a LLaVA that is given features as its pixels: what `look` returns.

    The tower itself is no submodule: it is neither trained nor cast, sharded or saved with the model. And it
    is asked outside the model's forward, which in a sharded one rounds its inputs to half precision.
    """

    def __init__(self, tower: PreTrainedModel, config: Any):
        super().__init__()
        self.__dict__["tower"] = tower
        self.config = config

    @torch.no_grad()
    def look(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` to features `[B, N, D]`."""
        tower: Any = self.tower
        return chosen_features(tower.to(pixels.device), self.config, pixels)

    def forward(self, features: Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))


class CachedTower(TowerBeside):
    """The same with entries of the cache."""

    @torch.no_grad()
    def look(self, entries: Tensor) -> Tensor:
        """Indices `[B, L]` or features `[B, N, D]` to features."""
        tower: Any = self.tower
        if not isinstance(tower, TokenFlowModel):
            return entries.float()
        codes = tower.to(entries.device)  # type: ignore[arg-type]
        return codes.features_from_indices(entries, tower.config.feature_strategy)
