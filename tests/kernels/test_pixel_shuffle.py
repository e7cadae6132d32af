import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels.pixel_shuffle import (
    PixelShuffleVersion,
    pixel_shuffle_norm,
    pixel_shuffle_norm_reference,
    pixel_shuffle_reference,
)

from .measure import FP32_BOUND, assert_errs_like, check_gradients, on, random, relative_error

VERSIONS: list[PixelShuffleVersion] = ["v1", "v2"]


def by_index(x: Tensor, k: int, version: PixelShuffleVersion) -> Tensor:
    """The published index map, element by element.

    With s = c' div D and c = c' mod D: v2 out[i, j, c'] = in[k i + s div k, k j + s mod k, c];
    v1 swaps i and j on the right.
    """
    tiles, tokens, channels = x.shape
    side = round(tokens**0.5)
    grid = x.reshape(tiles, side, side, channels)
    i, j, wide = torch.meshgrid(
        torch.arange(side // k), torch.arange(side // k), torch.arange(k * k * channels), indexing="ij"
    )
    s, c = wide // channels, wide % channels
    if version == "v1":
        i, j = j, i
    return grid[:, k * i + s // k, k * j + s % k, c].flatten(1, 2)


def exact_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, k: int, version: PixelShuffleVersion) -> Tensor:
    rows = by_index(x, k, version).double()
    centred = rows - rows.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


@pytest.mark.parametrize("version", VERSIONS)
@given(tiles=st.integers(1, 3), blocks=st.integers(1, 5), k=st.integers(1, 4), channels=st.integers(1, 7))
def test_every_element_comes_from_where_the_index_map_says(
    version: PixelShuffleVersion, tiles: int, blocks: int, k: int, channels: int
) -> None:
    x = torch.arange(tiles * (blocks * k) ** 2 * channels).reshape(tiles, (blocks * k) ** 2, channels)
    assert torch.equal(pixel_shuffle_reference(x, k, version), by_index(x, k, version))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_real_tile_of_32_by_32_patches_becomes_256_tokens(version: PixelShuffleVersion) -> None:
    x = random(1, 1024, 320)  # a tenth of the 6B's channels, which the map treats alike
    assert torch.equal(pixel_shuffle_reference(x, 2, version), by_index(x, 2, version))


def test_v1_is_v2_with_the_two_axes_of_the_result_swapped() -> None:
    x = random(2, 36, 5)
    transposed = pixel_shuffle_reference(x, 2, "v2").view(2, 3, 3, 20).transpose(1, 2).reshape(2, 9, 20)
    assert torch.equal(pixel_shuffle_reference(x, 2, "v1"), transposed)


def test_v2_is_pixel_unshuffle_with_the_channel_innermost() -> None:
    x = random(2, 36, 5)
    image = x.transpose(1, 2).reshape(2, 5, 6, 6)
    unshuffled = torch.nn.functional.pixel_unshuffle(image, 2).flatten(2).transpose(1, 2)
    order = [(wide % 5) * 4 + wide // 5 for wide in range(20)]
    assert torch.equal(pixel_shuffle_reference(x, 2, "v2"), unshuffled[..., order])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("side", "channels"), [(2, 1), (6, 31), (32, 1024)], ids=["tiny", "odd", "300m"])
def test_layer_norm_runs_over_the_shuffled_channels(version: PixelShuffleVersion, side: int, channels: int) -> None:
    x, weight, bias = random(2, side * side, channels) + 1, random(4 * channels, seed=1), random(4 * channels, seed=2)
    exact = exact_norm(x, weight, bias, 1e-5, 2, version)
    assert relative_error(pixel_shuffle_norm(x, weight, bias, 1e-5, 2, version), exact) < FP32_BOUND


def test_patch_tokens_behind_a_class_token_give_what_packed_tokens_give() -> None:
    patches, weight, bias = random(2, 17, 6)[:, 1:], random(24, seed=1), random(24, seed=2)
    packed = pixel_shuffle_norm(patches.contiguous(), weight, bias, 1e-5, 2, "v2")
    assert torch.equal(pixel_shuffle_norm(patches, weight, bias, 1e-5, 2, "v2"), packed)


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_flow_to_patches_weight_and_bias(version: PixelShuffleVersion) -> None:
    check_gradients(
        lambda x, w, b: pixel_shuffle_norm(x, w, b, 1e-5, 2, version),
        lambda x, w, b: exact_norm(x, w, b, 1e-5, 2, version),
        *(random(2, 36, 5), random(20, seed=1), random(20, seed=2)),
    )


@pytest.mark.parametrize(("tokens", "factor"), [(15, 2), (25, 2), (36, 4), (1025, 2)])
def test_patches_that_form_no_square_of_squares_are_refused(tokens: int, factor: int) -> None:
    with pytest.raises(ValueError, match=f"pixel_shuffle_norm: {tokens} tokens .* by {factor}"):
        pixel_shuffle_norm(torch.zeros(1, tokens, 4), torch.ones(16), torch.ones(16), 1e-5, factor, "v2")


def test_a_weight_of_another_width_is_refused_with_both_widths() -> None:
    with pytest.raises(ValueError, match="pixel_shuffle_norm: 16 shuffled channels, weight 4"):
        pixel_shuffle_norm(torch.zeros(1, 36, 4), torch.ones(4), torch.ones(4), 1e-5, 2, "v2")


# --- the kernel ---


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("side", "channels"), [(2, 1), (6, 31), pytest.param(4, 3200, id="4 x 4 patches of the 6B")])
def test_the_kernel_errs_no_more_than_the_reference(any_device, version, dtype, side, channels) -> None:
    # The class token, which is not to be read, would spoil all.
    tokens = torch.cat((torch.full((2, 1, channels), torch.nan), random(2, side * side, channels, scale=3) + 1), dim=1)
    weight, bias = random(4 * channels, seed=1), random(4 * channels, seed=2)
    tokens, weight, bias = on(any_device, tokens, weight, bias, dtype=dtype)
    inputs = tokens[:, 1:], weight, bias, 1e-5, 2, version
    exact = exact_norm(tokens[:, 1:].cpu(), weight.cpu(), bias.cpu(), 1e-5, 2, version).to(any_device)
    assert_errs_like(pixel_shuffle_norm(*inputs), pixel_shuffle_norm_reference(*inputs), exact)


@settings(max_examples=30)
@given(
    tiles=st.integers(1, 2),
    blocks=st.integers(1, 4),
    factor=st.integers(1, 4),
    channels=st.integers(1, 40),
    version=st.sampled_from(VERSIONS),
    layout=st.sampled_from(["packed", "behind a class token", "wider rows", "transposed"]),
)
def test_the_kernel_gathers_squares_of_any_size_from_any_layout(
    interpreted, tiles, blocks, factor, channels, version, layout
) -> None:
    tokens = (blocks * factor) ** 2
    x = {
        "packed": random(tiles, tokens, channels),
        "behind a class token": random(tiles, 1 + tokens, channels)[:, 1:],
        "wider rows": random(tiles, tokens, channels + 3)[:, :, :channels],
        "transposed": random(tiles, channels, tokens).transpose(1, 2),
    }[layout]
    size = factor * factor * channels
    weight, bias = random(size, seed=1), random(size, seed=2)
    with interpreted():
        result = pixel_shuffle_norm(x, weight, bias, 0.1, factor, version)
    assert relative_error(result, exact_norm(x, weight, bias, 0.1, factor, version)) < 2 * FP32_BOUND
