import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels.patch_embedding import patch_embedding, patch_embedding_reference

from ..random_checkpoints import random_tiles
from .measure import BF16_ROUNDING, FP32_BOUND, check_gradients, random, relative_error

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
