"""Released text-to-image checkpoints as folders for `TextToImagePipeline.from_pretrained`."""

from __future__ import annotations

import re

# Keys of ours and of the released code. The released code kept Llama's names for norms that it had moved: its
# "post_attention_layernorm" sits after the feed-forward layer.
_RULES = (
    (r"\.post_attention_layernorm\.", ".input_layernorm."),
    (r"\.post_feedforward_layernorm\.", ".post_attention_layernorm."),
    (r"\.self_attn\.q_norm\.", ".self_attn.qknorm.query_norm."),
    (r"\.self_attn\.k_norm\.", ".self_attn.qknorm.key_norm."),
    (r"^model\.visual_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.visual_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.scale_embedding\.weight$", "model.lvl_embed.weight"),
    (r"^model\.image_position_embedding\.weight$", "model.pos_1LC"),
)


def released_key(key: str) -> str:
    """Where the released layout keeps one of our tensors (a key of a `TokenFlowForTextToImage`)."""
    for pattern, replacement in _RULES:
        renamed = re.sub(pattern, replacement, key)
        if renamed != key:
            return renamed
    return key
