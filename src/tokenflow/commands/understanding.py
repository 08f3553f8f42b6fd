"""Questions about pictures."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from tokenflow.commands.options import Images, Model


def ask(
    words: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE ... QUESTION")]],
    /,
    *,
    model: Model = "tokenflow-tiny-chat",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    json: bool = False,
    device: str = "auto",
) -> None:
    """Answer a question about pictures.

    Args:
        words: Image files, and last the question, in quotes.
        model: A bundled name, a folder, or a hub name.
        max_new_tokens: The answer is cut off there.
        temperature: 0 gives the likeliest answer; 1 samples as the model believes.
        seed: Of the sampling.
        json: Print one JSON object.
        device: auto, cpu, cuda, cuda:1 ...
    """
    from tokenflow.understanding import console

    options = {"model": model, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    console.ask_files(words, **options, as_json=json, device=device)  # type: ignore[arg-type]


def chat(
    images: Images = (),
    /,
    *,
    model: Model = "tokenflow-tiny-chat",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Talk about pictures, question by question.

    Args:
        images: Image files to begin with; `/image FILE` shows more, `/new` starts over, `/quit` ends.
        model: A bundled name, a folder, or a hub name.
        max_new_tokens: Each answer is cut off there.
        temperature: 0 gives the likeliest answer; 1 samples as the model believes.
        seed: Of the sampling.
        device: auto, cpu, cuda, cuda:1 ...
    """
    from tokenflow.understanding import console

    options = {"model": model, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    console.chat(images, **options, device=device)  # type: ignore[arg-type]
