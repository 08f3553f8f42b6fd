"""What the commands of this room can be asked for: plain values, so that `--help` imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ReconstructionEval:
    """Which pictures are rebuilt, by which model, and which distances are measured."""

    data: str
    """A folder of images, a folder with SPLIT.parquet in it, a parquet file, webdataset shards, or a hub
    name."""
    model: str = "tokenflow-tiny"
    """A bundled name, a folder, or a hub name."""
    split: str | None = None
    """The split of `data` to rebuild; by default "val", or the only one of a folder ("train" if it has no
    splits)."""
    baseline: str | None = None
    """Measure a yardstick in place of the model, on pictures of the model's size: shrink:N (box to N x N
    pixels and back), webp:N or jpeg:N (best picture of at most N bytes)."""
    limit: int | None = None
    """Only the first so many pictures."""
    vgg16: str | None = None
    """Keras .h5 file of the HED network: adds the distance "vgg16-trunk" in its VGG16 features."""
    lpips: str | None = None
    """torchvision's VGG16 weights, or the released file that holds the heads too: adds LPIPS."""
    lpips_heads: str | None = None
    """The heads of the `lpips` package (vgg.pth), where `lpips` is the VGG16 alone."""
    inception: str | None = None
    """pt_inception-2015-12-05-6726825d.pth: adds rFID. Steady only from some 10,000 pictures on."""
    dtype: Dtype = "float32"
    """Of the decoder; encoders and quantizer are always float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    batch_size: int = 16
    """Pictures at a time; changes the speed, not the figures."""
    out: str | None = None
    """Where to write the result as JSON."""


@dataclass(frozen=True)
class SemanticsEval:
    """Which labelled set, which model, and beside which teacher."""

    data: str
    """A labelled set (a `label` column), as in `eval reconstruction`."""
    model: str = "tokenflow-tiny"
    """A bundled name, a folder, or a hub name."""
    train_split: str = "train"
    """The split that neighbours and probe learn from."""
    split: str = "val"
    """The split that is reported."""
    teacher: str | None = None
    """Folder or name of the vision model that the semantic flow was trained to follow: the ceiling."""
    class_embeddings: str | None = None
    """Text embeddings of the class names (safetensors: tensor "embeddings", metadata "names"): adds
    zero-shot accuracy. By default the model folder's own file, if its classes are those of `data`."""
    limit: int | None = None
    """Only the first so many pictures of each split."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    batch_size: int = 64
    """Pictures at a time; changes the speed, not the figures."""
    out: str | None = None
    """Where to write the result as JSON."""


@dataclass(frozen=True)
class VlmEval:
    """Which model is asked which questions: of your own sets (`data`) or of benchmarks (`tasks`)."""

    data: tuple[str, ...] = ()
    """Sets with columns `question` and `answer`, or `questions` and `answers` (a list each), as in
    `eval reconstruction`; a column `task` keeps figures apart. `tokenflow questions` makes such files."""
    model: str = "tokenflow-tiny-chat"
    """A model that answers questions: a bundled name, a folder, or a hub name."""
    split: str | None = None
    """The split of `data` to ask about; by default "val", or the only one of a folder."""
    limit: int | None = None
    """Only the first so many pictures."""
    text: bool = False
    """Also ask plain questions without a picture, of the model and of its language model before training."""
    instruction: str = ""
    """Stands on a line of its own after each question, captions excepted. The released models were trained to
    be brief after "Answer the question using a single word or phrase."."""
    max_new_tokens: int = 16
    """Answers are cut off there."""
    dtype: Dtype = "float32"
    """Of the language model; bfloat16 is faster, and now and then answers differently."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    batch_size: int = 16
    """Questions at a time; changes the speed, not the answers."""
    out: str | None = None
    """Where to write the result as JSON."""
    answers: str | None = None
    """Where to write each question with its answers, expected and given, as JSON lines."""
    tasks: tuple[str, ...] = ()
    """In place of `data`: "all" of Tab. 3, or some of SEEDB MMV POPE VQAv2 GQA TQA AI2D RWQA MMMU MMB MME.
    They run in the environment of `make venv-vlm`, and heed model, limit (questions of each task), dtype,
    device, batch size and out."""
    results: str | None = None
    """Folder of lmms-eval's result files, by default vlm-results: a task with a result of the same model and
    limit is not measured again. Without `tasks`, only the table of these files is printed."""
    include_path: str | None = None
    """Folder of your own lmms-eval task files, whose names `tasks` then knows too."""
    vlm_python: str | None = None
    """Python of the environment that has lmms-eval, if it is another one."""


@dataclass(frozen=True)
class GenerationEval:
    """Whose prompts are drawn, by which model, and who judges the pictures."""

    data: str
    """A set with captions, or with labels and names of the labels, as in `eval reconstruction`."""
    model: str = "tokenflow-tiny-t2i"
    """A text-to-image or class-conditional model: a bundled name, a folder, or a hub name."""
    split: str = "val"
    """The split of `data` whose prompts and pictures are used."""
    limit: int | None = None
    """Only the first so many rows: one picture a row."""
    classifier: str | None = None
    """EfficientNet-Lite weights (.pth): adds agreement (where there are labels) and the Frechet distance."""
    classifier_names: str | None = None
    """Table (.tsv) of the classifier's classes with columns index, wnid and name: labels that it knows are
    judged by the classifier itself; a set with others by a linear probe on the train split."""
    teacher: str | None = None
    """Folder of a CLIP-style image tower: adds "teacher similarity", with `text_encoder`."""
    text_encoder: str | None = None
    """Folder of the sentence encoder that belongs to the teacher."""
    ablation: bool = False
    """Also sample with the other strategies of Tab. 6: several times the work."""
    guidance_scale: float = 7.5
    """Classifier-free guidance."""
    seed: int = 0
    """The picture of row i is made from seed + i, whatever the strategy."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    batch_size: int = 16
    """Pictures at a time; changes the speed, not the figures."""
    out: str | None = None
    """Where to write the result as JSON."""
    sheet: str | None = None
    """Where to save a contact sheet (PNG): real, through the tokenizer, and generated."""
