"""TokenFlowForTextToImage: a Llama that predicts an image's tokens scale by scale (Sec. 3.3).

Notable, next to Llama:
- norms come after the sublayers, inside the residual branch (as in OLMo 2); queries and keys are normalised
  per head before the rotary embedding (as in Qwen 3);
- a scale's positions carry what the scales before it add up to, not tokens: codes enter through a projector,
  so there are no embedding rows for visual tokens, only head rows;
- everything visual is shifted by one: the last text position predicts the first scale, so that "position i
  predicts token i + 1" holds everywhere, and a zero vector fills the place after the image;
- one position axis for text and image, on which the image always begins at the same place: left padding is
  cut off rather than computed, and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from tokenflow.errors import UserError
from tokenflow.generation.codes import CodeTable
from tokenflow.generation.configuration import TokenFlowTextToImageConfig
from tokenflow.generation.decoder import Decoder
from tokenflow.generation.graphs import GraphedPredictor
from tokenflow.generation.masks import Segment, block_numbers, dense_mask, flex_mask
from tokenflow.generation.predictor import CachedPredictor, UncachedPredictor, one_pass
from tokenflow.generation.prompt import add_pad_token, marker_ids
from tokenflow.generation.sampler import (
    KnownTokens,
    NextScalePredictor,
    SamplingSettings,
    ScaleStep,
    sample_scales,
    seeds_for,
)
from tokenflow.tokenizer.modeling import TokenFlowModel

LOGITS_AT_A_TIME = 2**28  # of the loss; beyond it they are computed in pieces, and again in the backward pass


@dataclass
class TextToImageOutput(ModelOutput):
    """Attributes:
    loss: what is trained: `loss_vision`, plus `loss_text` if that was asked for.
    loss_vision: mean over the codes, the closing marker and the end token of all rows, nats.
    loss_text: mean over the prompts' tokens and the opening marker, nats; None unless asked for.
    nll: `[B, N + len(closing marker) + 1]` float32, each target of `loss_vision`, detached.
    """

    loss: Tensor = None  # type: ignore[assignment]  # a ModelOutput's fields need defaults
    loss_vision: Tensor = None  # type: ignore[assignment]
    loss_text: Tensor | None = None
    nll: Tensor = None  # type: ignore[assignment]


class TokenFlowForTextToImage(PreTrainedModel):
    r"""The text-to-image language model.

    Example:

    ```python
    model = TokenFlowForTextToImage.from_llama("HuggingFaceTB/SmolLM2-135M", text_tokenizer, tokenflow)
    input_ids, attention_mask = encode_prompts(text_tokenizer, captions, 128, model.config.image_open_ids)
    model(input_ids, attention_mask, tokenflow.encode(pixel_values).indices).loss.backward()
    ```
    """

    config_class = TokenFlowTextToImageConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (transformers' own way)
    _keep_in_fp32_modules_strict = ["code_table"]  # noqa: RUF012

    config: TokenFlowTextToImageConfig

    def __init__(self, config: TokenFlowTextToImageConfig):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.full_vocab_size, bias=False)
        self.code_table = CodeTable(config.codebook_size, config.code_dim, config.scales)
        self.compiled_pass: Callable[..., Any] | None = None
        self.graphed: dict[int, GraphedPredictor] | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        text = self.config.text_config
        # transformers calls this only for modules with parameters of their own: not for the projector itself.
        projector = self.model.visual_projector
        if module is projector.linear_1 or module is projector.linear_2:
            init.kaiming_uniform_(module.weight, a=5**0.5)  # PyTorch's own defaults
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=text.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            ours = module in (self.model.scale_embedding, self.model.image_position_embedding)
            std = (3 * text.hidden_size) ** -0.5 if ours else text.initializer_range
            init.normal_(module.weight, std=std)
        elif isinstance(module, CodeTable):
            init.zeros_(module.codes)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; names of bundled models come first, and weights are loaded as float32 unless
        `dtype` says otherwise."""
        from tokenflow.bundled import resolve

        kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(resolve(pretrained_model_name_or_path), *args, **kwargs)

    @classmethod
    def from_llama(
        cls,
        llama: str | os.PathLike[str] | LlamaForCausalLM,
        text_tokenizer: Any,
        tokenizer: TokenFlowModel,
        max_text_tokens: int = 128,
    ) -> TokenFlowForTextToImage:
        """Start from a language model of Llama's layout (Llama 2, TinyLlama, SmolLM2, ...).

        `[PAD]` starts as the mean of the other tokens, codes with the usual random head rows, the projector
        and the new embeddings as in the paper's code. The norms keep their weights at their new places.

        Args:
            llama: the model, its folder or hub name.
            text_tokenizer: its tokenizer; gets `[PAD]` as its padding token if it lacks it.
            tokenizer: the image tokenizer, whose code vectors are copied.
            max_text_tokens: length of the text block.

        Raises:
            UserError: the model is not of Llama's layout.
        """
        if not isinstance(llama, LlamaForCausalLM):
            kind = AutoConfig.from_pretrained(llama).model_type
            if kind != "llama":
                raise UserError(f"{llama} is a {kind!r} model; this one starts from a 'llama'")
            llama = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
        base, pad = llama.config.vocab_size, add_pad_token(text_tokenizer)
        opening, closing = marker_ids(text_tokenizer)
        eos = text_tokenizer.eos_token_id
        bos = eos if text_tokenizer.bos_token_id is None else text_tokenizer.bos_token_id
        text = {**llama.config.to_dict(), "vocab_size": max(base, pad + 1), "pad_token_id": pad}
        config = TokenFlowTextToImageConfig(
            text_config=text,
            codebook_size=tokenizer.config.codebook_size,
            scales=tokenizer.config.scales,
            flow_dims=[flow.dim for flow in tokenizer.config.flow_specs],
            max_text_tokens=max_text_tokens,
            image_open_ids=opening,
            image_close_ids=closing,
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=eos,
        )
        model = cls(config)
        renamed = {  # in this order: one name moves to where another was
            ".post_attention_layernorm.": ".post_feedforward_layernorm.",
            ".input_layernorm.": ".post_attention_layernorm.",
        }
        state = llama.state_dict()
        for old, new in renamed.items():
            state = {key.replace(old, new): value for key, value in state.items()}
        tables = {
            model.model.embed_tokens: state.pop("model.embed_tokens.weight"),
            model.lm_head: state.pop("lm_head.weight"),
        }
        unknown = model.load_state_dict(state, strict=False).unexpected_keys
        if unknown:
            raise UserError(f"{unknown[0]} and {len(unknown) - 1} more tensors are not of Llama's layout")
        with torch.no_grad():
            for module, table in tables.items():
                module.weight[:base] = table
                module.weight[pad] = table[:pad].mean(dim=0)
        model.set_codebooks(tokenizer)
        return model

    def set_codebooks(self, tokenizer: TokenFlowModel) -> None:
        """Copy the code vectors of the image tokenizer; they are frozen and saved with this model."""
        self.code_table.take_from(tokenizer)

    @torch.no_grad()
    def start_head_from_codes(self) -> None:
        """Start the codes' rows of the head as one random projection of their code vectors.

        Codes that look alike then begin with alike logits, so what is learned of one helps its neighbours;
        rows of their own would each need many examples first (docs/training-log.md has the difference).
        """
        self.code_table.check_set()
        vectors = self.code_table.codes - self.code_table.codes.mean(dim=0)
        head = self.lm_head.weight[self.config.text_vocab_size :]
        mix = torch.randn(vectors.shape[1], head.shape[1], device=head.device)
        head.copy_(vectors / vectors.norm(dim=1).mean() @ mix * self.config.text_config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    # training
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        codes: Tensor,
        text_loss: bool = False,
        input_codes: Tensor | None = None,
    ) -> TextToImageOutput:
        """The training losses of Sec. 3.3: cross entropy over the full vocabulary.

        Args:
            input_ids: `[B, P]` int64, prompts and opening marker (`encode_prompts`), padded on the left.
            attention_mask: `[B, P]`, 0 at padding.
            codes: `[B, N]` integers in [0, K), the image's indices; closing marker and end token are added.
            text_loss: also learn the prompt's text. The first token of a row is never a target.
            input_codes: `[B, N]`, what the model sees in place of `codes`, which it learns.

        Raises:
            UserError: shapes that do not fit; no code vectors were ever set.
        """
        self._check(input_ids, attention_mask, codes)
        if input_ids.device.type == "cpu":
            input_ids, real = cut_padding(input_ids, attention_mask)
        else:  # shapes that never change, and no waiting for the device to say how much could be cut
            real = attention_mask.bool()
            torch._assert_async(real[:, -1].all(), "prompts are padded on the left")
        codes = codes.long()
        seen = codes if input_codes is None else input_codes.long()
        prefix, n = input_ids.shape[1], self.config.num_image_tokens
        closing = self._after_image(codes)
        x = torch.cat(
            [
                self.model.embed_prefix(input_ids),
                self.model.embed_scales(self.code_table.all_inputs(seen), first=1),
                self.model.embed_after(closing[:, :-1]),
            ],
            dim=1,
        )
        hidden = self.model(x, self.image_start - prefix, self._mask(real, closing.shape[1]))
        targets = torch.cat([codes + self.config.text_vocab_size, closing], dim=1)
        nll = self._nll(hidden[:, prefix - 1 : prefix - 1 + n + closing.shape[1]], targets)
        loss_vision = nll.mean()
        loss_text = None
        if text_loss:
            wanted = real[:, 1:] & real[:, :-1]
            loss_text = self._nll(hidden[:, : prefix - 1][wanted], input_ids[:, 1:][wanted]).mean()
        loss = loss_vision if loss_text is None else loss_vision + loss_text
        return TextToImageOutput(loss=loss, loss_vision=loss_vision, loss_text=loss_text, nll=nll.detach())

    def _check(self, input_ids: Tensor, attention_mask: Tensor, codes: Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
            raise UserError(
                "input_ids and attention_mask must both be [B, P], got "
                f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
            )
        shape = [len(input_ids), self.config.num_image_tokens]
        if list(codes.shape) != shape:
            raise UserError(f"codes must be {shape} here, got {list(codes.shape)}")
        self.code_table.check_set()

    def _after_image(self, like: Tensor) -> Tensor:
        ids = [*self.config.image_close_ids, self.config.eos_token_id]
        return torch.cat([like.new_full((len(like), 1), id) for id in ids], dim=1)

    def _mask(self, real: Tensor, after: int) -> Tensor | BlockMask:
        blocks = block_numbers([*self.segments(real.shape[1]), Segment(after, "text")], real.device)
        real = F.pad(real, (0, len(blocks) - real.shape[1]), value=True)
        flex = self.config._attn_implementation == "flex_attention"
        return flex_mask(blocks, real) if flex else dense_mask(blocks, real)

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods, shaped as `targets`: logits exist only for these positions."""
        rows, labels = hidden.flatten(0, -2), targets.flatten()
        size = max(1, LOGITS_AT_A_TIME // self.config.full_vocab_size)
        if len(rows) <= size:
            return self._cross_entropy(rows, labels).view(targets.shape)
        pieces = [
            checkpoint(self._cross_entropy, *piece, use_reentrant=False)
            for piece in zip(rows.split(size), labels.split(size), strict=True)
        ]
        return torch.cat(pieces).view(targets.shape)

    def _cross_entropy(self, rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(rows).float(), labels, reduction="none")

    # sampling
    def compile_passes(self, **options: Any) -> None:
        """Compile the passes of cached sampling, one graph a scale, at its first use.

        Prompts are then padded to `max_text_tokens`, so that no later one of the same batch size changes a
        shape: nothing is compiled again. Tokens stay as they are, but where two codes are a rounding apart.

        On a GPU `capture_passes` is ready sooner.

        Args:
            options: of `torch.compile`. `mode="reduce-overhead"` captures the graphs as CUDA graphs.
        """
        graphs = 8 * len(self.config.scales)  # eight batch sizes; torch's own limit is fewer than the scales
        torch._dynamo.config.recompile_limit = max(graphs, torch._dynamo.config.recompile_limit)
        self.compiled_pass = torch.compile(one_pass, **{"dynamic": False, "fullgraph": True, **options})

    def capture_passes(self) -> None:
        """Capture the passes of cached sampling as CUDA graphs, each at its first use: seconds in all.

        Prompts are then padded to `max_text_tokens`, and each batch size has graphs and a key-value cache of
        its own, which are kept. The weights must stay where they are: call this again after moving the model.

        Raises:
            UserError: the model is not on a CUDA device.
        """
        if self.device.type != "cuda":
            raise UserError(f"CUDA graphs need a CUDA device; this model is on {str(self.device)!r}")
        self.graphed = {}

    def stream_indices(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        *,
        guidance_scale: float = 7.5,
        top_k: Sequence[int] = (1200, 100, 1),
        top_p: Sequence[float] = (0.8, 0.8, 0.0),
        temperature: float = 1.0,
        seed: int | Sequence[int] | None = None,
        known: KnownTokens | None = None,
        use_cache: bool = True,
        batch_size: int | None = None,
    ) -> Iterator[ScaleStep]:
        """Sample images and hear of each scale as soon as it is there.

        Args:
            input_ids, attention_mask: `[B, P]`, prompts and opening marker (`encode_prompts`).
            negative_input_ids, negative_attention_mask: `[B, P']` or `[1, P']`, what guidance leads away
                from; by default the empty prompt.
            guidance_scale, top_k, top_p, temperature: see `SamplingSettings`.
            seed: an int for every prompt, or B of them; None draws them. A prompt's codes depend on its seed
                alone, not on its neighbours.
            known: codes that are given (in-painting, variations), see `KnownTokens`.
            use_cache: False computes everything again in each pass: the oracle that the cache is tested with.
            batch_size: prompts at a time; by default one on a CPU, where larger batches are hardly faster and
                one keeps results bitwise equal whatever the batch, and all of them elsewhere.

        Yields:
            A `ScaleStep` a scale and batch.

        Raises:
            UserError: settings, seeds, masks or codes that do not fit.
        """
        settings = SamplingSettings(guidance_scale, top_k, top_p, temperature)
        rows = len(input_ids)
        if not rows:
            raise UserError("input_ids has no rows; give at least one prompt")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.code_table.check_set()
        if known is not None:
            known.check(rows, self.code_table)
        if negative_input_ids is None:
            negative_input_ids = input_ids.new_tensor(
                [[self.config.bos_token_id, *self.config.image_open_ids]]
            )
            negative_attention_mask = torch.ones_like(negative_input_ids)
        elif negative_attention_mask is None:
            raise UserError("negative_input_ids needs negative_attention_mask")
        if len(negative_input_ids) not in (1, rows):
            raise UserError(f"give 1 or {rows} negative prompts, got {len(negative_input_ids)}")
        seeds = seeds_for(seed, rows)
        size = batch_size or (1 if self.device.type == "cpu" else rows)
        for first in range(0, rows, size):
            part = slice(first, min(first + size, rows))
            prefixes = [(input_ids[part], attention_mask[part])]
            if settings.guided:
                negative = (negative_input_ids, cast(Tensor, negative_attention_mask))
                ids, mask = (x.expand(rows, -1)[part] for x in negative)
                prefixes.append((ids, mask))
            predictor = self._predictor(prefixes, use_cache)
            given = None if known is None else known.of(part)
            steps = sample_scales(predictor, self.code_table, settings, seeds[part], given)
            for position, codes in enumerate(steps):
                yield ScaleStep(range(part.start, part.stop), position, codes)

    def generate_indices(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        *,
        callback: Callable[[ScaleStep], None] | None = None,
        **options: Any,
    ) -> Tensor:
        """Sample images: their codes `[B, N]` int64 in [0, K).

        Arguments and errors as in `stream_indices`; `callback` is called with each of its steps.
        """
        done = []
        prompts = (input_ids, attention_mask, negative_input_ids, negative_attention_mask)
        for step in self.stream_indices(*prompts, **options):
            if callback is not None:
                callback(step)
            if step.position == len(self.config.scales) - 1:
                done.append(step.codes)
        return torch.cat(done)

    def _predictor(self, prefixes: list[tuple[Tensor, Tensor]], use_cache: bool) -> NextScalePredictor:
        if not use_cache:
            return UncachedPredictor(self, *join_prefixes(prefixes))
        if self.graphed is not None:
            ids, real = join_prefixes(prefixes, self.image_start)
            if len(ids) not in self.graphed:
                self.graphed[len(ids)] = GraphedPredictor(self, len(ids))
            return self.graphed[len(ids)].load(ids, real)
        return CachedPredictor(self, *join_prefixes(prefixes, self.image_start if self.compiled_pass else 0))

    def visual_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the K codes only, float32: `[..., H]` to `[..., K]`."""
        return F.linear(hidden, self.lm_head.weight[self.config.text_vocab_size :]).float()

    # geometry
    @property
    def image_start(self) -> int:
        """Where on the position axis the image begins, however long the prompt is."""
        return self.config.max_text_tokens + len(self.config.image_open_ids)

    def segments(self, prefix: int, scales: int | None = None) -> list[Segment]:
        """Prefix of `prefix` tokens and the first `scales` scales (all by default), shifted by one."""
        sides: Sequence[int] = self.config.scales[:scales]
        return [Segment(prefix - 1, "text"), *(Segment(side * side, "scale") for side in sides)]


def cut_padding(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the columns on the left that are padding in every row; the mask comes back as bool.

    Raises:
        UserError: a row ends with padding (prompts are padded on the left), or is nothing but padding.
    """
    real = attention_mask.bool()
    if not real[:, -1].all():
        raise UserError("a row of attention_mask ends with padding; prompts are padded on the left")
    first = int(real.any(dim=0).int().argmax())
    return input_ids[:, first:], real[:, first:]


def join_prefixes(prefixes: Sequence[tuple[Tensor, Tensor]], width: int = 0) -> tuple[Tensor, Tensor]:
    """Batches `(input_ids, attention_mask)` as one, without needless padding beyond `width`; the mask comes
    back as bool."""
    cut = [cut_padding(*prefix) for prefix in prefixes]
    width = max(width, *(ids.shape[1] for ids, _ in cut))
    # Which id fills the padding does not matter: nothing sees it.
    ids = torch.cat([F.pad(ids, (width - ids.shape[1], 0)) for ids, _ in cut])
    real = torch.cat([F.pad(real, (width - real.shape[1], 0)) for _, real in cut])
    return ids, real


__all__ = ["TextToImageOutput", "TokenFlowForTextToImage"]
