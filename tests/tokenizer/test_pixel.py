"""The convolutional encoder and decoder: shapes, strides, padding, attention."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow.tokenizer.configuration import ConvSpec, TokenFlowConfig
from tokenflow.tokenizer.pixel import AttentionBlock, Downsample, GroupNorm, PixelDecoder, PixelEncoder


@given(
    multipliers=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3),
    patch=st.sampled_from([1, 2, 4]),
    blocks=st.integers(1, 2),
    grid=st.integers(1, 3),
    batch=st.integers(1, 2),
)
@settings(max_examples=8, deadline=None)
def test_encoder_and_decoder_agree_on_every_shape(multipliers, patch, blocks, grid, batch):
    spec = ConvSpec(64, tuple(multipliers), blocks, latent_channels=32, patch=patch)
    side = spec.stride * grid
    with torch.inference_mode():
        latent = PixelEncoder(spec)(torch.randn(batch, 3, side, side))
        assert latent.shape == (batch, 32, grid, grid)
        assert PixelDecoder(spec)(latent).shape == (batch, 3, side, side)


def test_downsampling_pads_right_and_bottom_only():
    layer = Downsample(1)
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    image = torch.zeros(1, 1, 4, 4)
    image[..., 0, 0] = 1  # the upper left corner is seen by one window only: nothing lies left of it
    assert layer(image).flatten().tolist() == [1, 0, 0, 0]
    assert layer(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9, 6, 6, 4]


def test_group_norm_is_exact_in_channels_last():
    torch.manual_seed(0)
    norm = GroupNorm(64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 64, 32, 48) + 20 * torch.randn(2, 64, 1, 1)
    exact = copy.deepcopy(norm).double()(x.double())
    x = x.contiguous(memory_format=torch.channels_last)
    scratch = torch.empty_like(x)
    with torch.no_grad():
        for out in (norm(x), norm(x, out=scratch)):
            assert out.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(out.double(), exact, atol=3e-6, rtol=0)
    assert out.data_ptr() == scratch.data_ptr()


@pytest.mark.parametrize("patch", [1, 2])
def test_inference_equals_training_whatever_the_memory_format(patch):
    torch.manual_seed(0)
    spec = ConvSpec(32, (1, 2), 2, latent_channels=32, patch=patch)
    encoder, decoder = PixelEncoder(spec), PixelDecoder(spec)
    latent = encoder(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    image = decoder(latent)
    with torch.inference_mode():
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(encoder(x), latent, atol=2e-5, rtol=0)
        torch.testing.assert_close(decoder(latent), image, atol=2e-5, rtol=0)


def test_attention_is_single_head_scaled_softmax_with_a_residual():
    torch.manual_seed(0)
    block = AttentionBlock(32)
    x = torch.randn(2, 32, 3, 5)
    h = block.norm(x).flatten(2)
    q, k, v = (layer.weight[:, :, 0, 0] @ h + layer.bias[:, None] for layer in (block.q, block.k, block.v))
    weights = (q.transpose(1, 2) @ k / 32**0.5).softmax(-1)
    out = (v @ weights.transpose(1, 2)).unflatten(2, (3, 5))
    torch.testing.assert_close(block(x), x + block.proj_out(out))


def test_attention_sits_at_the_lowest_resolution_only():
    spec = TokenFlowConfig.from_preset("tokenflow-b-224").flow_specs[1].encoder
    with torch.device("meta"):
        encoder, decoder = PixelEncoder(spec), PixelDecoder(spec)
    assert [len(level.attn) for level in encoder.levels] == [0, 0, 0, 0, 2]
    assert [len(level.attn) for level in decoder.levels] == [2, 0, 0, 0, 0]
    assert decoder.last_layer.shape == (3, 128, 3, 3)


@pytest.mark.parametrize("network", [PixelEncoder, PixelDecoder])
def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch(network):
    torch.manual_seed(0)
    spec = ConvSpec(32, (1, 1), 1, 32, 2)
    model = network(spec).eval()
    x = torch.randn(3, 3, 16, 16) if network is PixelEncoder else torch.randn(3, 32, 4, 4)
    with torch.inference_mode():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-5, rtol=1e-4)
