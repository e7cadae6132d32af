import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels.patch_embedding import patch_embedding, patch_embedding_reference

from ..random_checkpoints import random_tiles
from .measure import BF16_ROUNDING, FP32_BOUND, assert_errs_like, check_gradients, on, random, relative_error

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]


def arguments(n: int, rows: int, columns: int, hidden: int, patch: int) -> Arguments:
    generator = torch.Generator().manual_seed(rows * columns)
    shape = (n, rows * patch, columns * patch, 3)
    tiles = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    weight = random(hidden, 3 * patch * patch, seed=1, scale=(3 * patch * patch) ** -0.5)
    bias, class_token = random(hidden, seed=2), random(hidden, seed=3)
    return tiles, weight, bias, class_token, random(1 + rows * columns, hidden, seed=4), patch


def by_loops(tiles: Tensor, weight: Tensor, bias: Tensor, class_token: Tensor, positions: Tensor, patch: int) -> Tensor:
    """Patch by patch, channel by channel: column c * patch^2 + y * patch + x of the weight meets that pixel."""
    weight, bias, class_token, positions = weight.double(), bias.double(), class_token.double(), positions.double()
    pixels = (tiles.double() / 255 - MEAN) / STD
    images = []
    for image in pixels:
        tokens = [class_token]
        for top in range(0, image.shape[0], patch):
            for left in range(0, image.shape[1], patch):
                token = bias
                for channel in range(3):
                    square = image[top : top + patch, left : left + patch, channel].flatten()
                    columns = weight[:, channel * patch * patch : (channel + 1) * patch * patch]
                    token = token + columns @ square
                tokens.append(token)
        images.append(torch.stack(tokens) + positions)
    return torch.stack(images)


@settings(max_examples=40)
@given(
    n=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    hidden=st.integers(1, 9),
    patch=st.integers(1, 5),
)
def test_reference_is_the_patchwise_formula_also_for_oblong_images(
    n: int, rows: int, columns: int, hidden: int, patch: int
) -> None:
    inputs = arguments(n, rows, columns, hidden, patch)
    assert relative_error(patch_embedding_reference(*inputs), by_loops(*inputs)) < FP32_BOUND


def test_a_real_448_pixel_tile_gives_1025_tokens_as_the_convolution_does() -> None:
    tiles, weight, bias, class_token, positions, patch = arguments(1, 32, 32, 1024, 14)
    pixels = ((tiles.double() / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    kernel = weight.double().view(1024, 3, 14, 14)
    grid = torch.nn.functional.conv2d(pixels, kernel, bias.double(), stride=14)
    exact = torch.cat((class_token.double()[None, None], grid.flatten(2).transpose(1, 2)), dim=1) + positions.double()
    assert relative_error(patch_embedding(tiles, weight, bias, class_token, positions, patch), exact) < FP32_BOUND


def test_bf16_normalises_in_fp32_and_rounds_pixels_once() -> None:
    tiles, *parameters, patch = arguments(2, 4, 4, 64, 14)
    halved = [parameter.bfloat16() for parameter in parameters]
    result = patch_embedding_reference(tiles, *halved, patch)
    assert result.dtype == torch.bfloat16
    exact = by_loops(tiles, *halved, patch)
    # Rounded pixels average out over 588 columns; what is left is the rounding of the projection and of the sum.
    assert relative_error(result, exact) < 2 * BF16_ROUNDING


def test_on_the_cpu_the_launcher_is_the_reference() -> None:
    inputs = arguments(2, 3, 3, 8, 14)
    assert torch.equal(patch_embedding(*inputs), patch_embedding_reference(*inputs))


def test_gradients_flow_to_every_parameter() -> None:
    tiles, *parameters, patch = arguments(2, 2, 3, 5, 4)
    check_gradients(lambda *p: patch_embedding(tiles, *p, patch), lambda *p: by_loops(tiles, *p, patch), *parameters)


def test_tiles_must_be_uint8_images_with_three_channels() -> None:
    tiles, *rest = arguments(1, 2, 2, 8, 14)
    for wrong in (tiles.float(), tiles[0], tiles[..., :1], tiles.permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"patch_embedding: tiles must be uint8 \(n, h, w, 3\), not torch"):
            patch_embedding(wrong, *rest)


def test_sides_must_be_multiples_of_the_patch_size() -> None:
    _, *rest = arguments(1, 2, 2, 8, 14)
    with pytest.raises(ValueError, match="30x28 is not a multiple of patch size 14"):
        patch_embedding(random_tiles(1, 30)[:, :28], *rest)


def test_positions_must_match_the_patches() -> None:
    tiles, weight, bias, class_token, positions, patch = arguments(1, 2, 2, 8, 14)
    with pytest.raises(ValueError, match="4 patches need 5 positions, not 4"):
        patch_embedding(tiles, weight, bias, class_token, positions[1:], patch)


# --- the kernel ---

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=30)
@given(
    n=st.integers(1, 3),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    hidden=st.integers(1, 9),
    patch=st.integers(1, 5),
)
def test_the_kernel_embeds_images_of_any_shape(interpreted, n, rows, columns, hidden, patch) -> None:
    inputs = arguments(n, rows, columns, hidden, patch)
    with interpreted():
        result = patch_embedding(*inputs)
    assert relative_error(result, by_loops(*inputs)) < 2 * FP32_BOUND


# Patches of the released models, a strip of a tile; more patches and channels than a block has, undivided by any block.
@pytest.mark.parametrize(("rows", "columns", "hidden", "patch"), [(1, 32, 40, 14), (5, 27, 264, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_errs_no_more_than_the_reference(device, dtype, rows, columns, hidden, patch) -> None:
    tiles, *parameters, patch = arguments(1, rows, columns, hidden, patch)
    parameters = on(device, *parameters, dtype=dtype)
    exact = by_loops(tiles, *(parameter.cpu() for parameter in parameters), patch).to(device)
    tiles = tiles.to(device)
    result = patch_embedding(tiles, *parameters, patch)
    assert_errs_like(result, patch_embedding_reference(tiles, *parameters, patch), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_normalises_every_value_of_every_channel_as_the_reference_does(any_device, dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3).contiguous()
    # Patches of one pixel, and a projection that passes the three channels on.
    nothing = torch.zeros(3)
    parameters = on(any_device, torch.eye(3), nothing, nothing, torch.zeros(257, 3), dtype=dtype)
    result = patch_embedding(values.to(any_device), *parameters, 1)
    expected = patch_embedding_reference(values.to(any_device), *parameters, 1)
    if dtype == torch.float32:
        assert relative_error(result, expected.double()) < FP32_BOUND
    else:
        assert torch.equal(result, expected)


def test_the_kernel_rounds_where_separate_operations_do(any_device) -> None:
    tiles, *parameters, patch = arguments(1, 4, 4, 40, 4)
    tiles, parameters = tiles.to(any_device), on(any_device, *parameters, dtype=torch.bfloat16)
    # Sums in another order may land on the other side of a rounding boundary in one element of some hundred.
    same = patch_embedding(tiles, *parameters, patch) == patch_embedding_reference(tiles, *parameters, patch)
    assert same.float().mean() > 0.98


def test_the_kernel_takes_views_of_tiles_and_parameters(any_device) -> None:
    tiles, weight, bias, class_token, positions, patch = arguments(1, 2, 3, 8, 4)
    wide, tall = torch.cat((tiles, tiles), dim=2)[:, :, : tiles.shape[2]], weight.t().contiguous().t()
    inputs = on(any_device, tall, bias, class_token, positions.t().contiguous().t(), dtype=torch.float32)
    result = patch_embedding(wide.to(any_device), *inputs, patch)
    exact = by_loops(tiles, weight, bias, class_token, positions, patch)
    assert relative_error(result.cpu(), exact) < 2 * FP32_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1024, 3200])
def test_the_kernel_errs_no_more_than_the_reference_on_real_tiles(dtype: torch.dtype, hidden: int) -> None:
    tiles, *parameters, patch = arguments(2, 32, 32, hidden, 14)
    tiles, parameters = tiles.cuda(), on(torch.device("cuda"), *parameters, dtype=dtype)
    exact = patch_embedding_reference(tiles, *(parameter.double() for parameter in parameters), patch)
    assert_errs_like(
        patch_embedding(tiles, *parameters, patch), patch_embedding_reference(tiles, *parameters, patch), exact
    )
