import math

import pytest
import torch
from torch import Tensor

from vitrail.runtime.models.intern_vit import Block, InternViT
from vitrail.runtime.models.internvl import InternVLModel

from ...random_checkpoints import INTERNVIT_6B, INTERNVIT_300M, build, chat_config, random_tiles, random_weights


def model(seed: int = 0, **vision: object) -> InternVLModel:
    config = chat_config(vision=vision)
    return build(config, random_weights(config, seed))


def cubic(z: float) -> float:
    """The bicubic kernel with a = -0.75."""
    a, z = -0.75, abs(z)
    if z <= 1:
        return (a + 2) * z**3 - (a + 3) * z**2 + 1
    if z < 2:
        return a * z**3 - 5 * a * z**2 + 8 * a * z - 4 * a
    return 0.0


def interpolation(source: int, target: int) -> Tensor:
    """(target, source) fp64 weights of one axis.

    Output o reads s = (o + 0.5) source / target - 0.5, f = floor(s), t = s - f: taps f - 1 .. f + 2, clamped to the
    grid, weighted K(t + 1), K(t), K(1 - t), K(2 - t).
    """
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for o in range(target):
        s = (o + 0.5) * source / target - 0.5
        f = math.floor(s)
        t = s - f
        for tap, weight in zip(range(f - 1, f + 3), (cubic(t + 1), cubic(t), cubic(1 - t), cubic(2 - t)), strict=True):
            matrix[o, min(max(tap, 0), source - 1)] += weight
    return matrix


# Stored grid (image_size / 14) and the grid wanted: larger, smaller, oblong, and 224 px positions used at 336 px.
@pytest.mark.parametrize(
    ("stored", "rows", "columns"), [(6, 9, 9), (6, 4, 4), (6, 5, 8), (4, 1, 13), (16, 24, 24)], ids=str
)
@torch.no_grad()
def test_positions_for_another_grid_are_the_published_bicubic(stored: int, rows: int, columns: int) -> None:
    embeddings = model(image_size=14 * stored).vision_model.embeddings
    grid = embeddings.position_embedding[0]
    image = grid[1:].double().view(stored, stored, -1)
    exact = torch.einsum("rs,cu,sud->rcd", interpolation(stored, rows), interpolation(stored, columns), image)
    positions = embeddings.positions(rows, columns)
    assert positions.shape == (1 + rows * columns, 48)
    assert torch.equal(positions[0], grid[0]), "the class token keeps its position"
    assert (positions[1:].double() - exact.flatten(0, 1)).abs().max() < 2e-6 * exact.abs().max()


@torch.no_grad()
def test_positions_at_the_stored_grid_are_the_stored_ones() -> None:
    embeddings = model().vision_model.embeddings
    assert torch.equal(embeddings.positions(6, 6), embeddings.position_embedding[0])


@torch.no_grad()
def test_bf16_positions_are_interpolated_in_fp32_and_rounded_once() -> None:
    embeddings = model().vision_model.embeddings.to(torch.bfloat16)
    stored = embeddings.position_embedding.clone()
    positions = embeddings.positions(9, 9)
    assert positions.dtype == torch.bfloat16
    embeddings.position_embedding.data = stored.float()
    assert torch.equal(positions, embeddings.positions(9, 9).bfloat16())


@torch.no_grad()
def test_an_oblong_image_passes_through_with_its_own_grid() -> None:
    vit = model().vision_model
    tiles = random_tiles(1, 112)[:, :70]
    assert vit(tiles).shape == (1, 1 + 5 * 8, 48)


@pytest.mark.parametrize("kind", [INTERNVIT_6B, INTERNVIT_300M], ids=["6b", "300m"])
@torch.no_grad()
def test_layer_minus_4_of_6_blocks_is_the_output_of_3_blocks(kind: dict[str, object]) -> None:
    config = chat_config(vision={**kind, "num_hidden_layers": 6}, select_layer=-4)
    weights = random_weights(config)
    selected = build(config, weights)
    short = {name: tensor for name, tensor in weights.items() if not name.startswith(BEYOND_THREE)}
    truncated = build(chat_config(vision={**kind, "num_hidden_layers": 3}), short)
    whole = build(chat_config(vision={**kind, "num_hidden_layers": 6}), weights)
    tiles = random_tiles(2, 84)
    assert torch.equal(selected.encode_tiles(tiles), truncated.encode_tiles(tiles))
    assert torch.equal(selected.vision_model(tiles), whole.vision_model.hidden_states(tiles, [3])[3])
    assert not torch.equal(selected.encode_tiles(tiles), whole.encode_tiles(tiles))


BEYOND_THREE = tuple(f"vision_model.encoder.layers.{layer}." for layer in (3, 4, 5))


@torch.no_grad()
def test_hidden_states_stop_after_the_deepest_block_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = model(num_hidden_layers=5).vision_model
    tiles = random_tiles(1, 84)
    every = vit.hidden_states(tiles, range(6))
    ran: list[Block] = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda block, *args: ran.append(block) or forward(block, *args))
    some = vit.hidden_states(tiles, [3, 1])
    assert ran == list(vit.encoder.layers[:3])
    assert list(some) == [3, 1]
    assert all(torch.equal(some[layer], every[layer]) for layer in some)
    assert torch.equal(every[5], vit(tiles))
    assert torch.equal(every[0], vit.embeddings(tiles))


@torch.no_grad()
def test_a_tile_is_encoded_alike_alone_and_in_a_batch() -> None:
    whole = model()
    tiles = random_tiles(5, 84)
    together = whole.encode_tiles(tiles)
    alone = torch.cat([whole.encode_tiles(tile[None]) for tile in tiles])
    # Not bit-equal: a matrix product of more rows may sum in another order.
    assert (together - alone).abs().max() < 2e-6 * together.abs().max()


@pytest.mark.parametrize("kind", [INTERNVIT_6B, INTERNVIT_300M], ids=["6b", "300m"])
@torch.no_grad()
def test_bf16_features_stay_within_the_gate_of_the_specification(kind: dict[str, object]) -> None:
    config = chat_config(vision=kind)
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(config).items()}
    tiles = random_tiles(3, 84)
    exact = build(config, weights).vision_model(tiles)
    half = build(config, weights, torch.bfloat16).vision_model(tiles)
    assert half.dtype == torch.bfloat16
    # The published gate: relative L2 at most 1e-2, cosine at least 0.9995 for every token.
    assert (half.float() - exact).norm() / exact.norm() < 1e-2
    assert torch.cosine_similarity(half.float(), exact, dim=-1).min() > 0.9995


def test_gradients_reach_every_parameter_of_every_block() -> None:
    vit = model().vision_model.requires_grad_(True)
    vit(random_tiles(2, 84)).square().mean().backward()
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_depth_defaults_to_all_blocks() -> None:
    config = model(num_hidden_layers=4).config.vision
    with torch.device("meta"):
        assert len(InternViT(config).encoder.layers) == 4
        assert len(InternViT(config, 2).encoder.layers) == 2
