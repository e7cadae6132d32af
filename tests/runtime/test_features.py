"""Hidden states of the vision half: class token, patch grid, pooled, at any resolution."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.runtime import Runtime, features
from vitrail.runtime.errors import InvalidRequestError
from vitrail.runtime.image import tile_static
from vitrail.runtime.resize import fit_image

from ..random_checkpoints import chat_config, random_weights, write_checkpoint
from .tiny_contrastive import write_tiny_contrastive
from .tiny_model import picture, write_tiny_model

SQUARE, WIDE = picture(90, 90, 1), picture(250, 150, 2)


@pytest.fixture(scope="module")
def rt(sentencepiece_folder):
    with Runtime.from_pretrained(write_tiny_model(sentencepiece_folder()), dtype="float32", device="cpu") as runtime:
        yield runtime


def states(rt, tiles):
    return rt.model.vision_model.hidden_states(tiles, range(4))


def test_features_are_the_hidden_states_of_the_image_as_one_tile(rt):
    images = [WIDE, picture(84, 84)]
    expected = states(rt, torch.cat([torch.from_numpy(tile_static(image, 84)) for image in images]))
    found = rt.features(images, [0, 2, -1])
    assert list(found) == [0, 2, -1]
    for layer, block in ((0, 0), (2, 2), (-1, 3)):
        class_token, patches = expected[block][:, 0], expected[block][:, 1:]
        assert found[layer].patches.shape == (2, 6, 6, 48)
        assert torch.equal(found[layer].class_token, class_token)
        assert torch.equal(found[layer].patches.flatten(1, 2), patches)
        assert torch.equal(found[layer].pooled, torch.cat((class_token, patches.mean(1)), 1))
    last = rt.features(WIDE)
    assert list(last) == [-1]
    assert torch.allclose(last[-1].patches, found[-1].patches[:1], atol=1e-5)


def test_features_come_under_the_numbers_that_were_asked_for(rt):
    found = rt.features(SQUARE, layers=[-1, 3, 0])
    assert set(found) == {-1, 3, 0}
    assert torch.equal(found[-1].patches, found[3].patches)


def test_a_row_of_patches_is_a_row_of_the_image(rt):
    image = np.zeros((84, 84, 3), np.uint8)
    image[:14, 70:] = 255  # the last patch of the first row
    patches = rt.features(image, [0])[0].patches[0] - rt.features(np.zeros_like(image), [0])[0].patches[0]
    assert patches.abs().sum(-1).nonzero().tolist() == [[0, 5]]


@pytest.mark.parametrize(("size", "grid"), [(112, (8, 8)), (42, (3, 3)), ((28, 98), (2, 7))])
@pytest.mark.parametrize("crop", [False, True])
def test_any_multiple_of_the_patch_is_a_resolution(rt, size, grid, crop):
    height, width = (14 * side for side in grid)
    tile = torch.from_numpy(fit_image(Image.fromarray(WIDE), (height, width), crop=crop))
    found = rt.features(WIDE, [2], image_size=size, crop=crop)[2]
    assert found.patches.shape == (1, *grid, 48)
    assert torch.equal(found.patches.flatten(1, 2), states(rt, tile[None])[2][:, 1:])


def test_many_images_go_through_in_batches(rt, monkeypatch):
    images = [SQUARE, WIDE, SQUARE, WIDE, SQUARE]
    together = rt.features(images, [1, 3])
    monkeypatch.setattr(features, "IMAGES_PER_BATCH", 2)
    for layer, found in rt.features(images, [1, 3]).items():
        torch.testing.assert_close(found.pooled, together[layer].pooled, atol=1e-5, rtol=1e-5)
        assert found.patches.shape == together[layer].patches.shape


def test_a_probe_can_be_trained_on_features(rt):
    pooled = rt.features([SQUARE, WIDE], crop=True)[-1].pooled
    probe = torch.nn.Linear(96, 2)
    probe(pooled).sum().backward()
    assert probe.weight.grad is not None


def test_contrastive_models_have_features_of_all_their_blocks(sentencepiece_folder):
    folder = write_tiny_contrastive(sentencepiece_folder(tokens=[]), force_image_size=112)
    with Runtime.from_pretrained(folder, dtype="float32") as model:
        found = model.features(WIDE, [-1, -4])
        assert found[-1].patches.shape == (1, 8, 8, 48)
        tile = torch.from_numpy(fit_image(Image.fromarray(WIDE), (112, 112), crop=False))[None]
        assert torch.equal(found[-1].class_token, model.model.vision_model(tile)[:, 0])
        assert torch.equal(found[-4].class_token, model.model.vision_model.embeddings(tile)[:, 0])
        # The 768-number probe of the paper is the raw embedding of C.
        raw = model.embed(images=WIDE, normalize=False, crop=False)
        assert torch.equal(model.model.clip_projector(model.model.vision_model(tile)), raw)


def test_a_vision_encoder_on_its_own_has_the_size_it_stores(tmp_path):
    config = {"model_type": "intern_vit_6b", **chat_config()["vision_config"]}
    write_checkpoint(tmp_path, config, random_weights(config))
    with Runtime.from_pretrained(tmp_path, dtype="float32") as model:
        assert model.features(WIDE)[-1].patches.shape == (1, 6, 6, 48)
        assert model.tokenizer is None


@pytest.mark.parametrize("layers", [3, [1.5], [], ["1"], [99], [4], [-5]])
def test_layers_that_do_not_exist_are_refused(rt, layers):
    with pytest.raises(InvalidRequestError, match=r"layers=.* must be a list of integers from -4 to 3"):
        rt.features(SQUARE, layers=layers)


def test_other_mistakes_are_named(rt):
    for call, message in (
        (lambda: rt.features([]), "at least one image"),
        (lambda: rt.features([SQUARE, "/nowhere.png"]), "image 2: no such file"),
        (lambda: rt.features(SQUARE, image_size=100), "image_size=100"),
        (lambda: rt.features(SQUARE, image_size=(28, 30)), "multiple of 14"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            call()
