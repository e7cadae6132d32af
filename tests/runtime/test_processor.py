"""From a conversation to token ids and tiles: counted from headers alone, exactly as prepared."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.runtime import image as image_module
from vitrail.runtime.config import parse_config
from vitrail.runtime.engine import processor as processor_module
from vitrail.runtime.engine.processor import Conversation, Picture, Processor
from vitrail.runtime.errors import CapacityError, ConfigError, InvalidRequestError
from vitrail.runtime.image import ImageLimits, tile_image, tile_static
from vitrail.runtime.prompt import ImageSlot
from vitrail.runtime.tokenizer import load_tokenizer

from ..random_checkpoints import chat_config
from .tiny_model import picture

TOKENS_PER_TILE = 9
DYNAMIC = {"dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 6}
CONTEXT, IMG, END_IMG = "<IMG_CONTEXT>", "<img>", "</img>"


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_folder):
    return load_tokenizer(sentencepiece_folder())


@pytest.fixture(scope="module")
def make(tokenizer):
    def make(*, limits=None, max_images=64, max_model_len=4096, **changes):
        return Processor(
            parse_config(chat_config(**{**DYNAMIC, **changes})),
            tokenizer,
            limits=limits or ImageLimits(),
            max_images=max_images,
            max_model_len=max_model_len,
        )

    return make


def ask(question, *pictures, **keywords):
    return Conversation([(question, None)], [Picture(source) for source in pictures], **keywords)


def encoded(width, height, kind, orientation=None):
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (width, height), (9, 99, 199)).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def refuse_to_decode(*_args, **_keywords):
    raise AssertionError("a picture was decoded")


# --- counting ---

sources_drawn = st.one_of(
    st.builds(
        encoded,
        st.integers(2, 400),
        st.integers(2, 400),
        st.sampled_from(["PNG", "JPEG", "WEBP"]),
        st.sampled_from([None, 1, 3, 6, 8]),
    ),
    st.builds(encoded, st.integers(2, 400), st.integers(2, 400), st.sampled_from(["BMP", "GIF"])),
    st.builds(picture, st.integers(2, 400), st.integers(2, 400)),
    st.builds(lambda width, height: Image.new("L", (width, height)), st.integers(2, 400), st.integers(2, 400)),
)
conversations_drawn = st.builds(
    lambda pictures, system, answered: Conversation(
        [("earlier", "answer")] * answered + [("<image>" * len(pictures) + "What is the total?", None)],
        [Picture(source, cap) for source, cap in pictures],
        system,
    ),
    st.lists(st.tuples(sources_drawn, st.sampled_from([None, None, 1, 3, 12])), max_size=3),
    st.sampled_from([None, "", "Answer briefly."]),
    st.integers(0, 1),
)
configs_drawn = st.fixed_dictionaries(
    {
        "dynamic_image_size": st.sampled_from([True, True, False]),
        "use_thumbnail": st.booleans(),
        "min_dynamic_patch": st.integers(1, 4),
        "max_dynamic_patch": st.integers(4, 8),
        "pad2square": st.booleans(),
    }
)


def check_count(make, config, conversation, max_tiles, total_max_tiles, exif_orientation):
    processor = make(limits=ImageLimits(exif_orientation=exif_orientation), **config)
    caps = {"max_tiles": max_tiles, "total_max_tiles": total_max_tiles}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor_module, "open_image", refuse_to_decode)
        patch.setattr(Image.Image, "convert", refuse_to_decode)
        try:
            counted = processor.count(conversation, **caps)
        except InvalidRequestError as error:
            assert "total_max_tiles" in str(error)
            counted = None
    if counted is None:
        with pytest.raises(InvalidRequestError, match="total_max_tiles"):
            processor.prepare(conversation, **caps)
        return
    prepared = processor.prepare(conversation, **caps)
    assert counted.usage == prepared.usage
    assert counted.token_ids == prepared.token_ids
    assert counted.num_tiles == prepared.num_tiles == [len(tiles) for tiles in prepared.tiles]
    assert counted.tiles == []
    image_tokens = prepared.token_ids.count(processor.tokenizer.token_to_id(CONTEXT))
    assert image_tokens == counted.image_tokens == sum(counted.num_tiles) * TOKENS_PER_TILE
    if total_max_tiles is not None:
        assert sum(counted.num_tiles) <= total_max_tiles
    for tiles, own in zip(prepared.tiles, conversation.pictures, strict=True):
        assert tiles.shape[1:] == (84, 84, 3)
        own_cap = min(filter(None, (max_tiles, own.max_tiles)), default=config["max_dynamic_patch"])
        assert len(tiles) <= own_cap + 1


CHECK_COUNT = {
    "config": configs_drawn,
    "conversation": conversations_drawn,
    "max_tiles": st.sampled_from([None, None, 1, 2, 5, 12]),
    "total_max_tiles": st.sampled_from([None, None, 1, 3, 7]),
    "exif_orientation": st.booleans(),
}


@settings(max_examples=60)
@given(**CHECK_COUNT)
def test_a_count_is_what_preparing_gives_and_decodes_nothing(make, **drawn):
    check_count(make, **drawn)


@pytest.mark.slow
@settings(max_examples=2000)
@given(**CHECK_COUNT)
def test_many_counts_are_what_preparing_gives(make, **drawn):
    check_count(make, **drawn)


# --- prompts ---


def test_each_image_fills_its_own_place_in_order(make, tokenizer):
    processor = make()
    prepared = processor.prepare(ask("a <image> b <image> c", picture(300, 100), picture(80, 80)))
    assert prepared.num_tiles == [4, 1]
    places = [tokenizer.token_to_id(token) for token in (IMG, CONTEXT, END_IMG)]
    spans = [[token for token in prepared.token_ids if token in places]]
    expected = [places[0], *[places[1]] * 4 * TOKENS_PER_TILE, places[2]]
    expected += [places[0], *[places[1]] * TOKENS_PER_TILE, places[2]]
    assert spans == [expected]
    between = prepared.token_ids[prepared.token_ids.index(places[2]) + 1 :]
    assert tokenizer.decode(between[: between.index(places[0])]).strip() == "b"


def test_places_told_apart_from_text_leave_marks_in_the_text(make, tokenizer):
    conversation = Conversation([(["<image> is ", ImageSlot(0), " here"], None)], [Picture(picture(80, 80))])
    prepared = make().prepare(conversation)
    assert prepared.token_ids.count(tokenizer.token_to_id(CONTEXT)) == TOKENS_PER_TILE
    assert "<image> is " in tokenizer.decode(prepared.token_ids)


@pytest.mark.parametrize(("marks", "images"), [(0, 1), (2, 1), (1, 0), (1, 2)])
def test_marks_and_images_must_be_as_many(make, marks, images):
    with pytest.raises(InvalidRequestError, match=rf"{marks} <image> marks? in the conversation, but {images} image"):
        make().prepare(ask("<image>" * marks, *[picture(80, 80)] * images))


def test_the_checkpoints_system_message_stands_unless_another_is_given(make, tokenizer):
    processor = make(system_message="Look closely.")
    assert "Look closely." in tokenizer.decode(processor.count(ask("x")).token_ids)
    assert "Look closely." not in tokenizer.decode(processor.count(ask("x", system="Be brief.")).token_ids)
    assert "Be brief." in tokenizer.decode(processor.count(ask("x", system="Be brief.")).token_ids)
    empty = processor.count(ask("x", system="")).token_ids
    assert len(empty) < len(processor.count(ask("x", system="Be brief.")).token_ids)


def test_an_unknown_template_names_the_nearest(make):
    with pytest.raises(ConfigError, match="did you mean 'internvl2_5'"):
        make(template="internvl2_6")


# --- tiles ---


def test_tiles_are_those_of_the_public_function(make):
    image = Image.fromarray(picture(250, 150))
    tiles, grid = make().tile(image)
    assert grid == (3, 2)
    assert np.array_equal(tiles, tile_image(image, 84, 1, 6, True))
    tiles, grid = make(use_thumbnail=False).tile(image, 3)
    assert grid == (2, 1)
    assert np.array_equal(tiles, tile_image(image, 84, 1, 3, False))


@pytest.mark.parametrize("pad2square", [False, True])
def test_a_checkpoint_without_dynamic_tiling_sees_one_tile(make, pad2square):
    image = Image.fromarray(picture(250, 60))
    processor = make(dynamic_image_size=False, pad2square=pad2square)
    tiles, grid = processor.tile(image, 12)
    assert (grid, len(tiles)) == ((1, 1), 1)
    assert np.array_equal(tiles, tile_static(image, 84, pad2square=pad2square))
    assert np.array_equal(tiles, tile_static(image, 84)) != pad2square
    assert processor.count(ask("<image>", image), max_tiles=12).num_tiles == [1]


def test_all_images_together_keep_to_their_total(make):
    images = [picture(300, 100), picture(300, 200), picture(80, 80)]
    prepared = make().prepare(ask("<image>" * 3, *images))
    assert prepared.num_tiles == [4, 7, 1]
    prepared = make().prepare(ask("<image>" * 3, *images), total_max_tiles=8)
    assert prepared.num_tiles == [4, 3, 1]
    with pytest.raises(InvalidRequestError, match="total_max_tiles=2 is too few for 3 image"):
        make().prepare(ask("<image>" * 3, *images), total_max_tiles=2)


def test_an_image_may_have_more_tiles_than_the_checkpoint_gives_by_itself(make):
    wide = [Picture(picture(800, 80), 12), Picture(picture(800, 80))]
    conversation = Conversation([("<image><image>", None)], wide)
    assert make().prepare(conversation).num_tiles == [11, 7]
    assert make().prepare(conversation, max_tiles=8).num_tiles == [9, 9]


def test_one_image_with_a_low_cap_leaves_the_least_tiles_of_the_others_alone(make):
    processor = make(min_dynamic_patch=4)
    pictures = [Picture(picture(80, 80), 1), Picture(picture(80, 80))]
    prepared = processor.prepare(Conversation([("<image><image>", None)], pictures))
    assert prepared.num_tiles == [1, 5]
    for total in (6, 20):
        assert processor.prepare(Conversation([("<image><image>", None)], pictures), total_max_tiles=total).num_tiles
    prepared = processor.prepare(ask("<image>", picture(80, 80)), max_tiles=2, total_max_tiles=9)
    assert prepared.num_tiles == [len(prepared.tiles[0])]
    assert prepared.num_tiles[0] <= 3


# --- refusals, before anything is decoded ---


def test_too_long_a_prompt_is_refused_before_an_image_is_decoded(make, monkeypatch):
    monkeypatch.setattr(image_module, "_to_rgb", refuse_to_decode)
    processor = make(max_model_len=100)
    with pytest.raises(
        CapacityError, match=r"the prompt has \d+ tokens, 63 of them from images; the context holds 100"
    ):
        processor.prepare(ask("<image>" + "word " * 60, encoded(300, 200, "PNG")))


def test_a_prompt_must_leave_room_for_one_token(make):
    length = len(make().count(ask("hello")).token_ids)
    assert make(max_model_len=length + 1).count(ask("hello")).usage.prompt_tokens == length
    make(max_model_len=length + 1).prepare(ask("hello"))
    with pytest.raises(CapacityError):
        make(max_model_len=length).prepare(ask("hello"))
    assert make(max_model_len=length).count(ask("hello")).usage.prompt_tokens == length


def test_too_many_images_are_refused_before_one_is_opened(make):
    with pytest.raises(InvalidRequestError, match="3 images exceed the limit of 2 per prompt"):
        make(max_images=2).prepare(ask("<image>" * 3, "/nowhere", "/nowhere", "/nowhere"))


def test_errors_name_the_image_counted_from_one(make):
    with pytest.raises(InvalidRequestError, match=r"^image 2: no such file: '/nowhere.png'$"):
        make().prepare(ask("<image><image>", picture(80, 80), "/nowhere.png"))


def test_limits_are_checked_before_an_image_is_decoded(make, monkeypatch):
    monkeypatch.setattr(image_module, "_to_rgb", refuse_to_decode)
    processor = make(limits=ImageLimits(max_pixels=10_000, max_aspect_ratio=5))
    with pytest.raises(InvalidRequestError, match="image 1: 200x100 exceeds the limit of 10000 pixels"):
        processor.prepare(ask("<image>", encoded(200, 100, "PNG")))
    with pytest.raises(InvalidRequestError, match="image 1: 60x10 exceeds the aspect ratio limit of 5"):
        processor.prepare(ask("<image>", encoded(60, 10, "PNG")))
