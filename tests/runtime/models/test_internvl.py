import pytest
import torch

from vitrail.runtime.models.internvl import InternVLModel

from ...random_checkpoints import build, chat_config, random_tiles, random_weights

CONTEXT = 508


def model(dtype: torch.dtype = torch.float32, **changes: object) -> InternVLModel:
    config = chat_config(**changes)
    return build(config, random_weights(config), dtype)


@torch.no_grad()
def test_a_tile_becomes_a_quarter_of_its_patches_in_the_width_of_the_language_model() -> None:
    assert model().encode_tiles(random_tiles(3, 84)).shape == (3, 9, 64)
    assert model(force_image_size=112).encode_tiles(random_tiles(3, 112)).shape == (3, 16, 64)


@torch.no_grad()
def test_ps_v1_orders_the_same_tokens_by_columns() -> None:
    tiles = random_tiles(2, 84)
    by_rows, by_columns = (model(ps_version=version).encode_tiles(tiles) for version in ("v2", "v1"))
    # v1 swaps the axes of the grid of tokens; the channels of each token stay, so the projector sees the same.
    assert torch.equal(by_columns.view(2, 3, 3, 64), by_rows.view(2, 3, 3, 64).transpose(1, 2))


@torch.no_grad()
def test_visual_tokens_take_the_marked_places_in_order() -> None:
    whole = model()
    ids = torch.tensor([7, CONTEXT, CONTEXT, 9, 3, CONTEXT, 7])
    visual = torch.randn(3, 64)
    embeddings = whole.splice(ids, visual, CONTEXT)
    text = ids != CONTEXT
    assert torch.equal(embeddings[~text], visual)
    assert torch.equal(embeddings[text], whole.language_model.embed(ids[text]))


@torch.no_grad()
def test_a_prompt_without_images_is_its_embeddings() -> None:
    whole = model()
    ids = torch.tensor([7, 9, 3])
    assert torch.equal(whole.splice(ids, torch.empty(0, 64), CONTEXT), whole.language_model.embed(ids))


@torch.no_grad()
def test_fp32_visual_tokens_join_a_bf16_prompt() -> None:
    visual = torch.randn(1, 64)
    embeddings = model(torch.bfloat16).splice(torch.tensor([7, CONTEXT]), visual, CONTEXT)
    assert embeddings.dtype == torch.bfloat16
    assert torch.equal(embeddings[1], visual[0].bfloat16())


@pytest.mark.parametrize(("places", "visual"), [(2, 3), (3, 2), (0, 1), (1, 0)])
@torch.no_grad()
def test_places_and_visual_tokens_must_be_as_many(places: int, visual: int) -> None:
    ids = torch.tensor([7] + [CONTEXT] * places)
    with pytest.raises(ValueError, match=f"{places} image places in the prompt, {visual} visual tokens"):
        model().splice(ids, torch.zeros(visual, 64), CONTEXT)


def test_an_image_can_be_learned_from_through_the_splice() -> None:
    whole = model().requires_grad_(True)
    ids = torch.tensor([7] + [CONTEXT] * 9 + [3])
    visual = whole.encode_tiles(random_tiles(1, 84))[0]
    whole.splice(ids, visual, CONTEXT).square().mean().backward()
    for part in (whole.vision_model, whole.projector):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    gradient = whole.language_model.embedding.grad
    assert gradient is not None
    assert gradient[[7, 3]].any(dim=-1).all()
    assert not gradient[CONTEXT].any(), "the mark's own embedding is replaced"
