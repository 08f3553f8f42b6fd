"""What a training run of the teacher is made of: plain values, so that reading a recipe imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenflow.errors import UserError
from tokenflow.training.recipe import check_numbers


@dataclass
class TeacherRecipe:
    """Everything `training.teacher.train_teacher` needs. Plain values only; paths may be relative.

    A pack is a folder with `train.parquet` and `val.parquet`; rows with a `label_name` are aligned to
    "a photo of a NAME", rows with `captions` to their captions, all rows are distilled from the classifier.
    """

    packs: list[str] = field(
        default_factory=lambda: ["packs/tiny_imagenet", "packs/flickr8k", "packs/flowers102"]
    )
    classifier: str = "packs/models/efficientnet-lite0"
    classifier_names: str = "packs/imagenet_1k.tsv"  # columns index, wnid, name: the classifier's own classes
    text_encoder: str = "packs/models/all-minilm-l6-v2"
    output_dir: str = "runs/tokenflow-tiny-teacher"  # its export/ is the teacher of the recipe tokenflow-tiny

    # The image tower (CLIPVisionConfig); its projection has the width of the sentence encoder.
    image_size: int = 128
    patch_size: int = 16
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 4

    init_from: str | None = (
        None  # an exported tower of the same shape, or a bundled name; None: fresh weights
    )

    # The cache holds every picture once, a little larger than the tower sees it.
    cache_size: int = 144
    min_crop_area: float = 0.4
    # Where the classifier looks: once at each whole picture, whose map is then cropped (little work, for
    # CPUs), or at the very crops that the tower sees ("patient and consistent", Beyer et al. 2022; for GPUs).
    live_targets: bool = False
    mix: float = 0.0  # share of live crops blended with another one (mixup); they get no text loss

    batch_size: int = 32  # per process; steps count for more than large batches here
    steps: int = 20_000
    max_minutes: float | None = None  # the cosine schedule ends at `steps` or here, whichever comes first
    learning_rate: float = 1e-3  # of AdamW: embeddings, projection, heads, norms, biases
    hidden_learning_rate: float = 3e-3  # of Muon: the matrices of the layers, scaled to AdamW's update size
    weight_decay: float = 0.05
    warmup_steps: int = 60
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995
    # FLIP (Li et al. 2023): this share of patches is dropped until this share of the run is over.
    drop_patches: float = 0.5
    drop_until: float = 0.75
    text_weight: float = 1.0
    logits_weight: float = 1.0
    features_weight: float = 2.0
    bf16: bool = True
    seed: int = 0
    save_minutes: float = 5.0
    log_every: int = 20

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.mix and not self.live_targets:
            raise UserError(f"mix={self.mix} needs live_targets: a cached map knows one picture")
