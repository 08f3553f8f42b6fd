"""Codes as inputs: the table of code vectors, and the running map that a next-scale predictor sees.

Used by both predictors (language model and class-conditional transformer), in training for all scales at once
and in sampling scale by scale:

    U_k = resize(F_(k-1), s_k)    what scale k is predicted from (F_(-1) is empty: scale 0 sees no codes)
    F_k = U_k + E_k               E_k: code vectors of scale k

The map is resized from scale to scale; decoding, which resizes each scale straight to the final grid, is the
tokenizer's own affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenflow.errors import UserError
from tokenflow.tokenizer.modeling import TokenFlowModel
from tokenflow.tokenizer.multiscale import resize_up
from tokenflow.tokenizer.precision import Float32Module


class CodeTable(Float32Module):
    """The code vectors of a tokenizer, `[K, D]` float32, frozen and saved with the model.

    Args:
        codebook_size: K.
        dim: D, the channels of all flows.
        scales: grid sides, coarse to fine.
    """

    codes: Tensor

    def __init__(self, codebook_size: int, dim: int, scales: Sequence[int]):
        super().__init__()
        self.scales = list(scales)
        self.register_buffer("codes", torch.zeros(codebook_size, dim, dtype=torch.float32))
        self.known_set = False

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Take the code vectors `[K, D]`, as the tokenizer's `lookup` gives them (normalised).

        Raises:
            UserError: another shape.
        """
        if codes.shape != self.codes.shape:
            raise UserError(f"codes must be {list(self.codes.shape)} for this model, got {list(codes.shape)}")
        self.codes.copy_(codes)

    def take_from(self, tokenizer: TokenFlowModel) -> None:
        """`set_codes` from a tokenizer, which must have the same scales.

        Raises:
            UserError: other scales, codebook size or channels.
        """
        if list(tokenizer.config.scales) != self.scales:
            raise UserError(f"the tokenizer has scales {tokenizer.config.scales}, this model {self.scales}")
        self.set_codes(tokenizer.quantizer.quantizer.codes())

    def check_set(self) -> None:
        """Raise UserError if no codes were ever set: a model without them learns and samples nonsense."""
        if self.known_set:  # looking again would wait for the device, at each training step
            return
        self.known_set = bool(self.codes.any())
        if not self.known_set:
            raise UserError("the model has no code vectors yet; call set_codebooks(tokenizer) first")

    def code_map(self, indices: Tensor, position: int) -> Tensor:
        """E_k: `[B, s * s]` indices of the scale at `position` to `[B, D, s, s]`."""
        side = self.scales[position]
        return self.codes[indices].transpose(1, 2).unflatten(2, (side, side))

    def advance(self, inputs: Tensor | None, indices: Tensor, position: int) -> Tensor:
        """F_k: the map `[B, D, s, s]` after scale `position`, from its U_k (`inputs`; None at scale 0)."""
        codes = self.code_map(indices, position)
        return codes if inputs is None else inputs + codes

    def inputs_of(self, running: Tensor, position: int) -> Tensor:
        """U_k: `running` (the map after the scale before) at the size of scale `position`."""
        return resize_up(running, self.scales[position])

    @torch.no_grad()
    def all_inputs(self, indices: Tensor) -> Tensor:
        """U_1, U_2, ... flattened row-major, from all indices `[B, L]`: `[B, L - s_0^2, D]` for training."""
        parts = indices.split([side * side for side in self.scales], dim=1)
        blocks: list[Tensor] = []
        inputs = None
        for position in range(1, len(self.scales)):
            running = self.advance(inputs, parts[position - 1], position - 1)
            inputs = self.inputs_of(running, position)
            blocks.append(as_rows(inputs))
        return torch.cat(blocks, dim=1) if blocks else self.codes.new_zeros(len(indices), 0, self.dim)

    @property
    def dim(self) -> int:
        """D."""
        return self.codes.shape[1]


def as_rows(x: Tensor) -> Tensor:
    """A map `[B, D, s, s]` as rows `[B, s * s, D]`."""
    return x.flatten(2).transpose(1, 2)
