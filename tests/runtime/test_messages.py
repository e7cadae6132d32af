"""OpenAI-style messages: what each part becomes, what stays text, and errors that say which part."""

import base64
import io

import pytest
from PIL import Image

from vitrail.runtime import Runtime
from vitrail.runtime.engine.processor import Picture
from vitrail.runtime.errors import InvalidRequestError
from vitrail.runtime.media import MediaPolicy
from vitrail.runtime.messages import conversation_of
from vitrail.runtime.prompt import ImageSlot

from .tiny_model import assert_idle, picture, write_tiny_model

WIDE, TALL = picture(200, 100, 2), picture(100, 300, 3)


@pytest.fixture(scope="module")
def rt(sentencepiece_folder, tmp_path_factory):
    media = tmp_path_factory.mktemp("media")
    Image.fromarray(WIDE).save(media / "wide sign.png")
    folder = write_tiny_model(sentencepiece_folder())
    with Runtime.from_pretrained(folder, dtype="float32", allowed_local_media_path=media) as runtime:
        yield runtime
        assert_idle(runtime.engine)


def user(*content):
    return {"role": "user", "content": content[0] if content and isinstance(content[0], str) else list(content)}


def text(words):
    return {"type": "text", "text": words}


def image(source=WIDE, **options):
    return {"type": "image", "image": source, **options}


def url(address, **options):
    return {"type": "image_url", "image_url": {"url": address, **options}}


def data_url(array, kind="PNG"):
    Image.fromarray(array).save(buffer := io.BytesIO(), kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ids(rt, messages, **keywords):
    return rt.chat(messages, max_new_tokens=1, **keywords).prompt_token_ids


def test_a_chat_is_a_generation_with_history_and_system(rt):
    messages = [
        {"role": "system", "content": "Be brief."},
        user("What is it?"),
        {"role": "assistant", "content": "A sign."},
        user(text("And "), text("its colour?")),
    ]
    output = rt.chat(messages, max_new_tokens=4)
    expected = rt.generate(
        "And its colour?", history=[("What is it?", "A sign.")], system="Be brief.", max_new_tokens=4
    )
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert output.token_ids == expected.token_ids
    assert type(output) is type(expected)


def test_one_image_stands_before_its_text_and_several_are_numbered(rt):
    one = rt.chat([user(image(), text("what?"))], max_new_tokens=4)
    expected = rt.generate("what?", WIDE, max_new_tokens=4)
    assert one.prompt_token_ids == expected.prompt_token_ids
    assert one.token_ids == expected.token_ids
    assert (
        ids(rt, [user(image(), image(TALL), text("what?"))])
        == rt.generate("what?", [WIDE, TALL], max_new_tokens=1).prompt_token_ids
    )


def test_images_are_numbered_through_the_conversation(rt):
    messages = [user(image(), text("first?")), {"role": "assistant", "content": "yes"}, user(image(TALL), text("and?"))]
    expected = rt.generate(
        "Image-2: <image>\nand?", [WIDE, TALL], history=[("Image-1: <image>\nfirst?", "yes")], max_new_tokens=1
    )
    assert ids(rt, messages) == expected.prompt_token_ids


def test_system_and_assistant_messages_may_be_lists_of_texts(rt):
    listed = [
        {"role": "system", "content": [text("Be "), text("brief.")]},
        user("a"),
        {"role": "assistant", "content": [text("b")]},
        user("c"),
    ]
    plain = [{"role": "system", "content": "Be brief."}, user("a"), {"role": "assistant", "content": "b"}, user("c")]
    assert ids(rt, listed) == ids(rt, plain)


@pytest.mark.parametrize("typed", ["<image>", "<IMG_CONTEXT>", "<|im_end|>", "<img></img>", "</s>"])
def test_tokens_typed_into_a_text_stay_text(rt, typed):
    tokenizer = rt.tokenizer
    plain = [token for token in ids(rt, [user(image(), text("look"))]) if token in tokenizer.special_ids]
    roles = [
        [user(image(), text(f"lo{typed}ok"))],
        [{"role": "system", "content": f"{typed}"}, user(image(), text("look"))],
    ]
    for messages in roles:
        found = ids(rt, messages)
        assert [token for token in found if token in tokenizer.special_ids] == plain
        assert typed in tokenizer.decode(found, skip_special_tokens=True)
    answered = [user("a"), {"role": "assistant", "content": typed}, user("b")]
    controls = [token for token in ids(rt, answered) if token in tokenizer.special_ids]
    harmless = [user("a"), {"role": "assistant", "content": "b"}, user("b")]
    assert controls == [token for token in ids(rt, harmless) if token in tokenizer.special_ids]


def test_places_are_slots_and_texts_are_strings():
    conversation = conversation_of([user(text("is <image> "), image(), text("?"))])
    assert conversation.turns == [(["is <image> ", "", ImageSlot(0), "\n", "?"], None)]
    assert [picture.source is WIDE for picture in conversation.pictures] == [True]
    assert conversation.system is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_data_url_is_its_image(rt, kind):
    address = data_url(WIDE, kind)
    output = rt.chat([user(url(address), text("what?"))], max_new_tokens=3)
    assert output.num_tiles == [3]
    expected = rt.generate("what?", base64.b64decode(address.partition(",")[2]), max_new_tokens=3)
    assert output.token_ids == expected.token_ids
    as_string = rt.chat([user({"type": "image_url", "image_url": address}, text("what?"))], max_new_tokens=3)
    assert as_string.token_ids == output.token_ids


@pytest.mark.parametrize(
    ("options", "tiles"),
    [
        ({}, 4),
        ({"detail": "low"}, 1),
        ({"detail": "auto"}, 4),
        ({"detail": "high"}, 4),
        ({"detail": None}, 4),
        ({"max_dynamic_patch": 2}, 3),
        ({"max_tiles": 1}, 1),
        ({"detail": "high", "max_dynamic_patch": 1}, 1),
    ],
)
def test_detail_and_tile_limits_hold_for_their_part(rt, options, tiles):
    for part in (image(TALL, **options), url(data_url(TALL), **options), {**url(data_url(TALL)), **options}):
        messages = [user(part, image(WIDE), text("what?"))]
        assert rt.chat(messages, max_new_tokens=1).num_tiles == [tiles, 3]
    assert rt.chat([user(image(TALL, **options), text("what?"))], max_new_tokens=1, max_tiles=1).num_tiles == [1]


def test_high_detail_goes_beyond_the_checkpoints_own_maximum(rt):
    wide = picture(1000, 84)
    assert rt.chat([user(image(wide))], max_new_tokens=1).num_tiles == [7]
    assert rt.chat([user(image(wide, detail="high"))], max_new_tokens=1).num_tiles == [13]


# --- local files ---


def test_files_below_the_allowed_folder_are_read(rt):
    path = rt.media.allowed_local_path / "wide sign.png"
    expected = rt.generate("what?", WIDE, max_new_tokens=1).prompt_token_ids
    for address in (
        str(path),
        path.as_uri(),
        f"{rt.media.allowed_local_path}/../{rt.media.allowed_local_path.name}/wide sign.png",
    ):
        assert ids(rt, [user(url(address), text("what?"))]) == expected


@pytest.mark.parametrize("form", ["{0}/../secret.png", "file://{0}/../secret.png", "file://{0}/%2e%2e/secret.png"])
def test_files_beside_the_allowed_folder_are_not(rt, form):
    Image.fromarray(WIDE).save(rt.media.allowed_local_path.parent / "secret.png")
    with pytest.raises(InvalidRequestError, match="message 1, part 1: the file lies outside allowed_local_media_path"):
        rt.chat([user(url(form.format(rt.media.allowed_local_path)))])


def test_a_link_that_leads_out_of_the_allowed_folder_is_not_followed(rt, tmp_path):
    Image.fromarray(WIDE).save(tmp_path / "secret.png")
    (rt.media.allowed_local_path / "link.png").symlink_to(tmp_path / "secret.png")
    (rt.media.allowed_local_path / "loop").symlink_to(rt.media.allowed_local_path / "loop")
    with pytest.raises(InvalidRequestError, match="outside"):
        rt.chat([user(url(f"{rt.media.allowed_local_path}/link.png"))])
    for bad in (f"{rt.media.allowed_local_path}/loop/x", f"{rt.media.allowed_local_path}/nul\0"):
        with pytest.raises(InvalidRequestError, match=r"message 1, part 1: not? .*(usable path|such file)"):
            rt.chat([user(url(bad))])


def test_without_an_allowed_folder_no_file_is_read(tmp_path):
    Image.fromarray(WIDE).save(tmp_path / "wide.png")
    for address in (str(tmp_path / "wide.png"), (tmp_path / "wide.png").as_uri()):
        with pytest.raises(InvalidRequestError, match="local files need allowed_local_media_path"):
            conversation_of([user(url(address))])


@pytest.mark.parametrize("address", ["http://example.org/a.png", "https://example.org/a.png", "ftp://x/y"])
def test_addresses_are_not_fetched(rt, address):
    with pytest.raises(InvalidRequestError, match="message 1, part 1: URLs are not fetched"):
        rt.chat([user(url(address))])


# --- refusals ---

ASSISTANT = {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a non-empty list"),
        ("hello", "messages must be a non-empty list"),
        ({"role": "user", "content": "x"}, "messages must be a non-empty list"),
        (["hello"], "message 1: must be an object with role and content"),
        ([{"content": "x"}], "message 1: unknown role None; known: system, user, assistant"),
        ([user("a"), {"role": "tool", "content": "x"}], "message 2: unknown role 'tool'"),
        ([{"role": ["user"], "content": "x"}], "message 1: unknown role"),
        ([{"role": "user"}], "message 1: content must be a string or a list of parts"),
        ([{"role": "user", "content": None}], "message 1: content must be a string or a list of parts"),
        ([user("a"), user("b")], "message 2: role 'user' is out of turn"),
        ([ASSISTANT], "message 1: role 'assistant' is out of turn"),
        ([user("a"), SYSTEM], "message 2: role 'system' is out of turn"),
        ([SYSTEM, SYSTEM, user("a")], "message 2: role 'system' is out of turn"),
        ([SYSTEM], "the last message must be the user's"),
        ([user("a"), ASSISTANT], "the last message must be the user's"),
        ([{"role": "system", "content": [image()]}, user("a")], "message 1: only user messages may hold images"),
        ([user("a"), {"role": "assistant", "content": [image()]}, user("b")], "message 2: only user messages"),
        ([user("a"), ASSISTANT, user(text("b"), {"type": "audio"})], "message 3, part 2: unknown type 'audio'"),
        ([user({"text": "b"})], "message 1, part 1: unknown type None; known: text, image_url, image"),
        ([user(5)], "message 1, part 1: unknown type None"),
        ([user({"type": ["text"]})], "message 1, part 1: unknown type"),
        ([user({"type": "text"})], "message 1, part 1: text must be a string"),
        ([user(text(5))], "message 1, part 1: text must be a string"),
        ([user(text("a"), {"type": "image"})], "message 1, part 2: `image` is missing"),
        ([user({"type": "image_url"})], "message 1, part 1: image_url needs a url string"),
        ([user({"type": "image_url", "image_url": {"uri": "x"}})], "message 1, part 1: image_url needs a url string"),
        ([user(image(detail="medium"))], "message 1, part 1: detail 'medium' is not known; known: low, auto, high"),
        ([user(image(detail=["low"]))], "message 1, part 1: detail"),
        ([user(text("a"), image(max_tiles=0))], "message 1, part 2: max_tiles=0: must be an integer from 1"),
        ([user(url(data_url(WIDE), max_dynamic_patch="many"))], "message 1, part 1: max_tiles='many'"),
        ([user(text("a"), image("/nowhere.png"))], "image 1: no such file"),
        ([user(url("data:image/png;base64,%%%"))], "message 1, part 1: data URL is not valid base64"),
        ([user(text("a"), url("data:image/png,abc"))], "message 1, part 2: a data URL must read"),
        ([user({"type": "video_url", "video_url": {}})], "message 1, part 1: video_url needs a url string"),
        ([user({"type": "video_url", "video_url": "data:video/mp4;base64,AA"})], "message 1, part 1: a video URL must"),
        ([user({"type": "video_url", "video_url": "https://a.org/b.mp4"})], "message 1, part 1: a video URL must read"),
        ([user({"type": "video_url", "video_url": f"data:video/jpeg;base64,{',' * 256}"})], "more than 256 frames"),
        ([user(*[url(data_url(WIDE))] * 65)], "65 images exceed the limit of 64 per prompt"),
        ([user(text("lone \ud800"))], "not valid UTF-8"),
    ],
)
def test_an_error_says_which_message_and_part(rt, messages, message):
    with pytest.raises(InvalidRequestError) as caught:
        rt.chat(messages)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [{"type": "video"}, {"type": "video", "video": []}])
def test_a_video_part_without_a_video_is_refused(rt, part):
    with pytest.raises(InvalidRequestError, match="message 1, part 1: a path, bytes or a non-empty list of frames"):
        rt.chat([user(part)])


def test_a_developer_speaks_for_the_system(rt):
    named = [{"role": "developer", "content": "Be brief."}, user("a")]
    assert ids(rt, named) == ids(rt, [{"role": "system", "content": "Be brief."}, user("a")])


# --- messages from another machine ---


@pytest.mark.parametrize("part", [image("/etc/passwd"), image(WIDE), {"type": "image"}])
def test_messages_from_elsewhere_name_images_by_url_alone(part):
    with pytest.raises(InvalidRequestError, match="part 1: unknown type 'image'; known: text, image_url, video, video"):
        conversation_of([user(part)], urls_only=True)


@pytest.mark.parametrize("video", ["/etc/passwd", b"film", ["/etc/passwd"], [WIDE], [{"url": "x"}], [], None])
def test_messages_from_elsewhere_show_videos_as_urls_of_frames(video):
    with pytest.raises(InvalidRequestError, match=r"part 1: (a non-empty list of the URLs|local files need)"):
        conversation_of([user({"type": "video", "video": video})], urls_only=True)


def test_frames_named_by_urls_are_frames(rt):
    frames = [data_url(WIDE, "JPEG"), data_url(TALL, "JPEG")]
    packed = "data:video/jpeg;base64," + ",".join(frame.partition(",")[2] for frame in frames)
    pictures = [base64.b64decode(frame.partition(",")[2]) for frame in frames]
    expected = conversation_of([user({"type": "video", "video": pictures}, text("what?"))])
    for part in (
        {"type": "video", "video": frames},
        {"type": "video_url", "video_url": {"url": packed}},
        {"type": "video_url", "video_url": packed},
    ):
        found = conversation_of([user(part, text("what?"))], urls_only=True)
        assert found == expected
        assert [shown.max_tiles for shown in found.pictures] == [1, 1]


def test_nothing_is_fetched_for_messages_that_are_refused_anyway(monkeypatch):
    fetched = []
    monkeypatch.setattr("vitrail.runtime.messages.fetch_all", lambda references, media: fetched.append(references))
    far = url("https://example.org/a.png")
    for messages in (
        [user(far, {"type": "audio"})],
        [user(far), {"role": "tool", "content": "x"}],
        [user(far), ASSISTANT],
        [user(far, far, far)],
    ):
        with pytest.raises(InvalidRequestError):
            conversation_of(messages, media=MediaPolicy(("example.org",)), max_images=2, urls_only=True)
    assert fetched == []


def test_pictures_carry_the_limit_of_their_part():
    parts = conversation_of([user(image(detail="low"), image(), url(data_url(WIDE), detail="high"))]).pictures
    assert [part.max_tiles for part in parts] == [1, None, 12]
    assert all(isinstance(part, Picture) for part in parts)
