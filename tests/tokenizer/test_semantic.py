"""Vision towers of several families, position resizing, the semantic decoder and the frozen teacher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel

from tokenflow.errors import UserError
from tokenflow.tokenizer.configuration import SemanticFlow
from tokenflow.tokenizer.semantic import (
    ImageScaling,
    SemanticDecoder,
    SemanticEncoder,
    SemanticTeacher,
    VisionTower,
    load_tower,
    resize_positions,
)

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
FAMILIES = {
    "clip_vision_model": {"projection_dim": 24},
    "siglip_vision_model": {},
    "siglip2_vision_model": {"num_patches": 16},
    "dinov2": {},
    "dinov2_with_registers": {"num_register_tokens": 2},
    "vit": {},
}


def encoder(family="clip_vision_model", **changes):
    return {"model_type": family, **SIZES, **FAMILIES[family], **changes}


def full_model(family):
    """The whole random vision model, every parameter drawn so that nothing is an identity by chance."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(**encoder(family))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def run_full_model(model, pixels):
    """Its last hidden state, and the output of every layer before any final norm; patch tokens only."""
    layers = next(m for name, m in model.named_modules() if name.rpartition(".")[2] in ("layers", "layer"))
    outputs: list[torch.Tensor] = []

    def keep(module, arguments, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        if model.config.model_type == "siglip2_vision_model":
            patches = pixels.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 4, 3, 5, 1)
            last = model(
                pixel_values=patches.flatten(3).flatten(1, 2),
                pixel_attention_mask=torch.ones(len(pixels), 16, dtype=torch.long),
                spatial_shapes=torch.full((len(pixels), 2), 4),
            ).last_hidden_state
        else:
            last = model(pixels).last_hidden_state
        if model.config.model_type == "clip_vision_model":  # its own last hidden state is not normed
            last = model.post_layernorm(outputs[-1])
    for hook in hooks:
        hook.remove()
    return last[:, -16:], [output[:, -16:] for output in outputs]


def state_of(model):
    return getattr(model, "vision_model", model).state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_give_the_hidden_states_of_the_whole_model(family):
    model = full_model(family)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    normed, layers = run_full_model(model, pixels)
    for hidden_state, final_norm, expected in (
        (-1, True, normed),
        (-1, False, layers[-1]),
        (-2, False, layers[-2]),
    ):
        tower = VisionTower(encoder(family), hidden_state, final_norm).eval()
        load_tower(tower, state_of(model))
        with torch.no_grad():
            features = tower(pixels)
        assert features.shape == (2, 16, 16)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_layers_and_heads_that_are_never_read_are_not_built():
    last = sum(p.numel() for p in VisionTower(encoder("siglip_vision_model")).parameters())
    before = VisionTower(encoder("siglip_vision_model"), hidden_state=-2, final_norm=False)
    assert sum(p.numel() for p in before.parameters()) < last
    assert not any("head" in name for name in before.state_dict())
    with pytest.raises(UserError, match="hidden_state -2: give -1"):
        VisionTower(encoder(), hidden_state=-2)
    with pytest.raises(UserError, match="hidden_state 0: give -1"):
        VisionTower(encoder(), hidden_state=0, final_norm=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_work_at_other_resolutions(family):
    torch.manual_seed(0)
    tower = VisionTower(encoder(family)).eval()
    with torch.no_grad():
        assert tower(torch.randn(1, 3, 48, 48)).shape == (1, 36, 16)


def test_positions_are_resized_with_the_released_scale_factor():
    positions = torch.randn(1 + 16, 5)
    assert resize_positions(positions, 4) is positions
    grid = positions[1:].T.reshape(1, 5, 4, 4)
    resized = resize_positions(positions, 6)
    expected = F.interpolate(grid, scale_factor=(6.1 / 4, 6.1 / 4), mode="bicubic")
    assert torch.equal(resized[:1], positions[:1])  # the class position stays
    torch.testing.assert_close(resized[1:], expected.flatten(2)[0].T)
    by_size = F.interpolate(grid, size=(6, 6), mode="bicubic").flatten(2)[0].T
    assert not torch.allclose(resized[1:], by_size, atol=1e-3)


@pytest.mark.parametrize("grid", range(1, 40))
def test_resized_positions_always_fill_the_grid(grid):
    for base in (4, 14, 27):
        assert resize_positions(torch.randn(1 + base * base, 2), grid).shape == (1 + grid * grid, 2)


def test_scaling_clamps_to_what_eight_bits_hold_and_normalises():
    scaling = ImageScaling((0.5, 0.4, 0.3), (0.5, 0.2, 0.1))
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    unit = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0])
    for channel, (mean, std) in enumerate(((0.5, 0.5), (0.4, 0.2), (0.3, 0.1))):
        torch.testing.assert_close(scaling(x)[0, channel, 0], (unit - mean) / std)
    assert scaling.state_dict() == {}


def flow(**changes):
    return SemanticFlow(encoder=encoder(), dim=6, decoder_layers=2, decoder_heads=2, target_dim=24, **changes)


def test_tokens_become_a_map_in_row_major_order():
    module = SemanticEncoder(flow()).eval()
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        tokens, feature = module.head(module.tower(pixels)), module(pixels)
    assert feature.shape == (1, 6, 4, 4)
    torch.testing.assert_close(feature[0, :, 1, 2], tokens[0, 1 * 4 + 2])


@pytest.mark.parametrize("grid", [4, 6])
def test_the_decoder_gives_one_teacher_feature_a_token(grid):
    decoder = SemanticDecoder(flow(), width=16, base_grid=4).eval()
    torch.nn.init.normal_(decoder.pos_embed)
    with torch.no_grad():
        out = decoder(torch.randn(2, 6, grid, grid))
    assert out.shape == (2, grid * grid, 24)


def test_the_decoders_keys_carry_no_bias():
    attention = SemanticDecoder(flow(), 16, 4).blocks[0].attn
    assert set(attention.state_dict()) == {"q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias"}
    torch.nn.init.normal_(attention.q_bias)
    torch.nn.init.normal_(attention.v_bias)
    x = torch.randn(2, 5, 16)
    q, k, v = (
        part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (x @ attention.qkv.weight.T).chunk(3, -1)
    )
    q = q + attention.q_bias.view(2, 1, 8)
    v = v + attention.v_bias.view(2, 1, 8)
    out = ((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(out))


# teacher
def save_teacher(folder, family):
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

    model = full_model(family)
    if family == "clip_vision_model":
        whole = CLIPVisionModelWithProjection(model.config).eval()
        whole.vision_model.load_state_dict(model.state_dict())
        whole.save_pretrained(folder)
        projection = whole.visual_projection
    else:
        model.save_pretrained(folder)
        projection = torch.nn.Identity()
    CLIPImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return model, projection


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model", "dinov2"])
def test_a_teacher_from_a_folder_sees_normalised_pixels(family, tmp_path):
    model, projection = save_teacher(tmp_path, family)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3)))
    expected, _ = run_full_model(model, (pixels / 2 + 0.5 - mean) / std)
    teacher = SemanticTeacher.from_pretrained(str(tmp_path))
    torch.testing.assert_close(teacher(pixels), projection(expected).detach(), atol=1e-4, rtol=1e-4)


def test_a_teacher_never_learns():
    teacher = SemanticTeacher(VisionTower(encoder()), torch.nn.Linear(16, 24))
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.randn(1, 3, 32, 32, requires_grad=True)).requires_grad


def test_weights_of_another_family_are_refused():
    with pytest.raises(UserError, match=r"vision model lacks \d+ weights, such as"):
        load_tower(VisionTower(encoder()), state_of(full_model("dinov2")))
