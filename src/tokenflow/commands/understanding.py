"""Questions about pictures."""

from __future__ import annotations

from typing import Annotated, Literal

from tyro.conf import Positional, arg

from tokenflow.commands.options import Images, Model, Output


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


def questions(
    sets: Positional[Annotated[tuple[str, ...], arg(metavar="SET ...")]],
    /,
    *,
    output: Output,
    split: Literal["train", "val"] | None = None,
    seed: int = 0,
    limit: int = 600,
    text: int = 0,
) -> None:
    """Make conversations to train on and questions to measure with out of captions and labels.

    Args:
        sets: Folders of parquet files with captions, label_name or questions and answers. All together, since
            the classes of one are wrong answers for another.
        output: The folder for SET-align.parquet (descriptions and names, for stage align), SET-train.parquet
            (conversations, for stage instruct) and TASK-val.parquet (questions).
        split: Only one of the two.
        seed: Of what is asked, and how.
        limit: About so many questions a task of val; half as many captions.
        text: Also about so many questions without a picture, which the language model of tokenflow-tiny-chat
            answers itself: text-train.jsonl, for stage instruct to keep what it knows (--lora.keep).
    """
    from tokenflow.data.questions import write_questions

    if sets or not text:
        for path, pictures, asked in write_questions(sets, output, split=split, seed=seed, limit=limit):
            print(f"{path}: {pictures:,} rows, {asked:,} questions")
    if text:
        from tokenflow.understanding.own_answers import write_texts

        file = output / "text-train.jsonl"
        print(f"{file}: {write_texts(file, text, seed):,} questions")
