from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tokenflow.tokenizer.vitamin import VITAMIN_XLARGE_256, ViTaminConfig, ViTaminModel

MANIFEST = Path(__file__).parents[1] / "parity/tokenizer/manifests/vitamin_xlarge_256.json.gz"
PREFIX = "encoder_vqkd."


def tiny_config(**changes) -> ViTaminConfig:
    sizes = {
        "image_size": 64,
        "conv_widths": [8, 12],
        "conv_depths": [2, 3],
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
    }
    return ViTaminConfig(**(sizes | changes))


@pytest.fixture(scope="module")
def model() -> ViTaminModel:
    torch.manual_seed(0)
    model = ViTaminModel(tiny_config()).eval()
    # weights far from the initial ones, so that every bias and norm counts
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def norm_channels(x, state, name):
    mean = x.mean(1, keepdim=True)
    variance = x.var(1, unbiased=False, keepdim=True)
    weight, bias = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
    return (x - mean) / (variance + 1e-6).sqrt() * weight + bias


def reference(state: dict[str, torch.Tensor], x: torch.Tensor, config: ViTaminConfig) -> torch.Tensor:
    """The architecture spelled out: explicit softmax and norms, float64, straight from a state dict."""

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def norm(x, name):
        return norm_channels(x.transpose(1, 2).unsqueeze(-1), state, name).squeeze(-1).transpose(1, 2)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    root = "patch_embed.backbone"
    x = conv(x, f"{root}.stem.conv1", stride=2, padding=1)
    x = conv(gelu(norm_channels(x, state, f"{root}.stem.norm1")), f"{root}.stem.conv2", padding=1)
    for stage, depth in enumerate(config.conv_depths):
        for index in range(depth):
            name = f"{root}.stages.{stage}.{index}"
            stride = 2 if index == 0 else 1
            shortcut = x
            if index == 0:
                ones = F.avg_pool2d(torch.ones_like(x), 3, 2, 1)
                shortcut = F.avg_pool2d(x, 3, 2, 1) / ones
            if f"{name}.shortcut.expand.weight" in state:
                shortcut = conv(shortcut, f"{name}.shortcut.expand")
            y = gelu(conv(norm_channels(x, state, f"{name}.pre_norm"), f"{name}.conv1_1x1"))
            y = gelu(conv(y, f"{name}.conv2_kxk", stride=stride, padding=1, groups=y.shape[1]))
            x = conv(y, f"{name}.conv3_1x1") + shortcut
    x = conv(norm_channels(x, state, f"{root}.pool.norm"), f"{root}.pool.proj", stride=2, padding=1)
    x = x.flatten(2).transpose(1, 2)

    heads = config.num_attention_heads
    for index in range(config.num_hidden_layers):
        name = f"blocks.{index}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        y = norm(norm(x, f"{name}.norm2"), f"{name}.mlp.norm")
        x = x + linear(gelu(linear(y, f"{name}.mlp.w0")) * linear(y, f"{name}.mlp.w1"), f"{name}.mlp.w2")
    return x


def test_keys_and_shapes_of_the_released_tower():
    manifest = json.loads(gzip.decompress(MANIFEST.read_bytes()))
    expected = {
        key.removeprefix(PREFIX): tuple(entry["shape"])
        for key, entry in manifest.items()
        if key.startswith(PREFIX)
    }
    with torch.device("meta"):
        model = ViTaminModel(ViTaminConfig(**VITAMIN_XLARGE_256))
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert ViTaminConfig(**VITAMIN_XLARGE_256).to_dict() == ViTaminConfig().to_dict()


def test_output_is_row_major_tokens_without_class_token(model):
    assert model(torch.randn(2, 3, 64, 64)).last_hidden_state.shape == (2, 16, 24)
    assert model(torch.randn(1, 3, 32, 96)).last_hidden_state.shape == (1, 2 * 6, 24)


def test_hidden_states_are_the_blocks_inputs_and_outputs(model):
    x = torch.randn(1, 3, 32, 32)
    assert model(x).hidden_states is None
    output = model(x, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.patch_embed(x))
    assert torch.equal(output.hidden_states[1], model.blocks[0](output.hidden_states[0]))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("size", [64, 80])
def test_forward_agrees_with_the_description(model, size):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    state = {key: value.double() for key, value in model.state_dict().items()}
    expected = reference(state, x.double(), model.config)
    with torch.no_grad():
        actual = model(x).last_hidden_state
    torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-4)


def test_saving_and_loading_restores_every_tensor(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ViTaminModel.from_pretrained(tmp_path)
    assert loaded.config.conv_depths == [2, 3]
    saved = model.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, saved[key]), key


def test_new_weights_are_initialised():
    model = ViTaminModel(tiny_config(initializer_range=0.05))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert all(torch.equal(m.weight, torch.ones_like(m.weight)) and not m.bias.any() for m in norms)
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert not model.patch_embed.backbone.stem.conv1.bias.any()


def test_gradient_checkpointing_gives_the_same_gradients(model):
    x = torch.randn(1, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(x).last_hidden_state.square().mean().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
    model.gradient_checkpointing_disable()
    model.eval()
    torch.testing.assert_close(*gradients)


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match=r"two conv_widths and two conv_depths, not \[8\]"):
        tiny_config(conv_widths=[8])
    with pytest.raises(ValueError, match="hidden_size 24 is not a multiple of num_attention_heads 5"):
        tiny_config(num_attention_heads=5)
