"""Images to tokens and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from tokenflow.commands.options import Dtype, Images, Model, Output, print_table


def encode(
    images: Images,
    /,
    *,
    output: Output,
    model: Model = "tokenflow-tiny",
    resize_mode: Literal["crop", "pad", "squash"] = "crop",
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """Turn images into tokens, all in one safetensors file.

    Args:
        images: Image files, or folders of them.
        output: The token file to write.
        model: A bundled name, a folder, or a hub name.
        resize_mode: How a picture becomes square: cut out its middle, pad it, or squash it.
        device: auto, cpu, cuda, cuda:1 ...
        batch_size: Pictures at a time.
    """
    from tokenflow import codec

    tokens = codec.encode_files(
        images, output, model=model, resize_mode=resize_mode, device=device, batch_size=batch_size
    )
    count, length = tokens.indices.shape
    size = output.stat().st_size
    print(f"{count} {'image' if count == 1 else 'images'}, {length} tokens each: {output} ({size:,} bytes)")


def decode(
    tokens: Positional[Path],
    /,
    *,
    output: Output,
    model: Annotated[str | None, arg(aliases=["-m"])] = None,
    num_scales: int | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_size: int = 16,
) -> None:
    """Turn a token file back into PNG pictures.

    Args:
        tokens: The token file.
        output: The folder for the pictures.
        model: The model named in the token file, unless given; it must have the same codebook.
        num_scales: Decode only the first so many scales: coarse, but full-size.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: Of the decoder; bfloat16 is faster, and nearly the same.
        batch_size: Pictures at a time.
    """
    from tokenflow import codec

    options = {"device": device, "dtype": dtype, "batch_size": batch_size}
    pictures = codec.decode_file(tokens, output, model=model, num_scales=num_scales, **options)  # type: ignore[arg-type]
    print(f"{len(pictures)} {'picture' if len(pictures) == 1 else 'pictures'} in {output}")


def reconstruct(
    images: Images,
    /,
    *,
    output: Output = Path("reconstructions"),
    model: Model = "tokenflow-tiny",
    metrics: bool = False,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_size: int = 16,
) -> None:
    """Send images through tokens and back; writes a comparison sheet.

    Args:
        images: Image files, or folders of them.
        output: The folder for the pictures and comparison.png.
        model: A bundled name, a folder, or a hub name.
        metrics: Also print PSNR and SSIM, and write metrics.json.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: Of the decoder; bfloat16 is faster, and nearly the same.
        batch_size: Pictures at a time.
    """
    from tokenflow import codec

    options = {"device": device, "dtype": dtype, "batch_size": batch_size}
    rows = codec.reconstruct_files(images, output, model=model, metrics=metrics, **options)  # type: ignore[arg-type]
    if metrics:
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("psnr", "ssim")}
        lines = [*rows, {"file": "mean", **mean}] if len(rows) > 1 else rows
        print_table(["image", "PSNR (dB)", "SSIM"], [_metrics_row(row) for row in lines])
    print(f"originals beside reconstructions: {output / 'comparison.png'}")


def info(model: Positional[str] = "tokenflow-tiny", /) -> None:
    """Say what a model or a token file is.

    Args:
        model: A bundled name, a model's folder, or a token file.
    """
    from tokenflow.about import describe

    print_table([], [list(row) for row in describe(model).items()])


def convert(
    file: Positional[Path],
    out: Positional[Path],
    /,
    *,
    image_size: int | None = None,
    wrapper: str | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Turn a released TokenFlow checkpoint into a loadable folder.

    Args:
        file: The released .pt (or .safetensors) file, or the folder of a text-to-image or understanding
            model; pickled code in it is refused, never run.
        out: The folder to make.
        image_size: 224 or 256 for the CLIP layouts, which the file cannot tell apart.
        wrapper: The entry of the file with the weights: ema, model or state_dict, whichever comes first.
        tokenizer: For a folder without an image tokenizer: the released file (or its converted folder).
    """
    from rich.console import Console

    from tokenflow.checkpoints.tokenizer import convert_tokenizer

    if file.is_dir():
        from tokenflow.checkpoints.text_to_image import convert_text_to_image, is_text_to_image_folder
        from tokenflow.checkpoints.understanding import convert_understanding

        if is_text_to_image_folder(file):
            Console().print(convert_text_to_image(file, out, tokenizer, image_size))
        else:
            Console().print(convert_understanding(file, out, tokenizer))
        return
    Console().print(convert_tokenizer(file, out, image_size, wrapper))


def demo(
    images: Images = (),
    /,
    *,
    output: Output = Path("demo-output"),
    model: Model = "tokenflow-tiny",
    chat: str | None = None,
    text_to_image: str | None = None,
    device: str = "auto",
) -> None:
    """Show the tokenizer at work on a few photographs: an HTML page and a PNG.

    Args:
        images: Your own photographs, or folders of them; a few come with the package.
        output: The folder for page and picture.
        model: A bundled name, a folder, or a hub name.
        chat: The model that answers questions; by default the bundled one, if there is one.
        text_to_image: The model that draws the gallery; by default the bundled one, if there is one.
        device: auto, cpu, cuda, cuda:1 ...
    """
    from tokenflow.demo import run_demo

    page, picture = run_demo(
        output, images=images, model=model, chat=chat, text_to_image=text_to_image, device=device
    )
    print(f"page:    {page.resolve()}\npicture: {picture.resolve()}")


def _metrics_row(row: dict[str, Any]) -> list[str]:
    return [row["file"], f"{row['psnr']:.2f}", f"{row['ssim']:.3f}"]
