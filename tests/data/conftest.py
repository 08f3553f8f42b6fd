from __future__ import annotations

import io
import struct
import tarfile
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


class Packs:
    """Makes tiny data sets. The red channel of picture `i` is `i` everywhere, which survives any crop."""

    @staticmethod
    def picture(i, broken=False):
        if broken:
            return b"not a picture"
        pixels = np.random.default_rng(i).integers(0, 256, (20, 26, 3), dtype=np.uint8)
        pixels[..., 0] = i
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    @staticmethod
    def png_chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png_of_claimed_size(self, width, height):
        """A header that promises width x height RGB pixels, and next to nothing behind it."""
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = self.png_chunk(b"IHDR", header) + self.png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
        return b"\x89PNG\r\n\x1a\n" + body + self.png_chunk(b"IEND", b"")

    def parquet(self, path, ids, broken=(), **columns):
        """`broken` holds ids whose bytes are rubbish; a column is a function of the id."""
        rows = {"image": [{"bytes": self.picture(i, i in broken), "path": f"{i}.png"} for i in ids]}
        rows |= {"label": [i % 3 for i in ids], "caption": [f"picture {i}" for i in ids]}
        rows |= {name: [value(i) for i in ids] for name, value in columns.items()}
        features = datasets.Features(
            {
                "image": datasets.Image(decode=False),
                "label": datasets.ClassLabel(names=["ant", "bee", "cat"]),
                "caption": datasets.Value("string"),
                **{name: datasets.Value("string") for name in columns},
            }
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        return str(path)

    def tar(self, path, ids, broken=()):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for i in ids:
                for suffix, data in (("png", self.picture(i, i in broken)), ("txt", b"picture %d" % i)):
                    member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return str(path)

    def folder(self, path, ids, broken=(), name="{i:03d}.png"):
        path.mkdir(parents=True, exist_ok=True)
        for i in ids:
            (path / name.format(i=i)).write_bytes(self.picture(i, i in broken))
        return str(path)


@pytest.fixture(scope="session")
def packs():
    return Packs()
