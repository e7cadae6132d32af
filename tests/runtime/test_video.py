"""`runtime.video`: the frames the reference would choose, exactly those, and a refusal for everything else."""

import io
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.runtime import video
from vitrail.runtime.errors import InvalidRequestError, UnsupportedError
from vitrail.runtime.image import ImageLimits
from vitrail.runtime.video import frame_indices, interval_indices, sample_frames

av = pytest.importorskip("av")

CONTAINERS = [
    ("mp4", "libx264"),
    ("mp4", "mpeg4"),
    ("matroska", "libx264"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("avi", "libx264"),
    ("mpegts", "libx264"),
    ("flv", "libx264"),
]
NUM_FRAMES, FPS, WIDTH, HEIGHT, STRIPE = 40, 10, 96, 64, 16


def encoded(container="mp4", codec="libx264", num_frames=NUM_FRAMES, rotation=0, gop=10):
    """A video with B-frames and several key frames that shows each frame's number as six black or white stripes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size, stream.max_b_frames = gop, 2
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
            for bit in range(6):
                pixels[:, bit * STRIPE : (bit + 1) * STRIPE] = 255 * (number >> bit & 1)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def number_shown(image):
    row = np.asarray(image)[HEIGHT // 2, :, 0]
    return sum(int(row[bit * STRIPE + STRIPE // 2] > 127) << bit for bit in range(6))


@pytest.fixture(scope="module")
def clip():
    return encoded()


def reference_indices(num_source_frames, num_segments, bound=None, fps=0.0):
    """The published sampling, transcribed with numpy's rounding."""
    max_frame = num_source_frames - 1
    start, end = (0, max_frame) if bound is None else (round(bound[0] * fps), min(round(bound[1] * fps), max_frame))
    size = float(end - start) / num_segments
    return [int(start + size / 2 + np.round(size * k)) for k in range(num_segments)]


@given(num_source_frames=st.integers(1, 100_000), num_frames=st.integers(1, 256))
@settings(max_examples=300)
def test_indices_follow_the_published_formula_and_stay_inside(num_source_frames, num_frames):
    indices = frame_indices(num_source_frames, num_frames)
    assert indices == reference_indices(num_source_frames, num_frames)
    assert indices == sorted(indices)
    assert set(indices) <= set(range(num_source_frames))


def test_halves_are_rounded_to_even():
    # Segments of 2.5 frames: 0, 2.5, 5, 7.5 become 0, 2, 5, 8 before half a segment is added.
    assert frame_indices(11, 4) == [1, 3, 6, 9]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (80, [5, 15, 25, 35, 45, 55, 65, 75]),
        (77, [5, 15, 25, 35, 45, 55, 65, 75]),  # intervals of ceil(77 / 8) = 10
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_retrieval_takes_the_middles_of_intervals(frames: int, expected: list[int]) -> None:
    assert interval_indices(frames, 8) == expected
    assert [index - 3 for index in interval_indices(frames + 9, 8, 3, frames + 2)] == expected


@given(frames=st.integers(1, 500), count=st.integers(1, 40))
def test_intervals_never_leave_the_video(frames: int, count: int) -> None:
    indices = interval_indices(frames, count)
    assert len(indices) == count
    assert all(0 <= index < frames for index in indices)
    interval = -(-frames // count)
    if interval * (count - 1) + interval // 2 >= frames:
        assert indices == frame_indices(frames, count)


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_the_frames_of_every_container_are_those_of_the_formula(container, codec, tmp_path):
    path = tmp_path / "clip.bin"  # recognised by content
    path.write_bytes(encoded(container, codec))
    for source in (path, str(path), path.read_bytes()):
        images = sample_frames(source, 8)
        assert [number_shown(image) for image in images] == reference_indices(NUM_FRAMES, 8)
        assert all(image.mode == "RGB" and image.size == (WIDTH, HEIGHT) for image in images)


@pytest.mark.parametrize(("container", "codec"), CONTAINERS[:5])
def test_seeking_finds_the_same_pixels_as_decoding_everything(container, codec, monkeypatch):
    data = encoded(container, codec, gop=7)
    sought = {count: sample_frames(data, count) for count in (1, 3, 8, 40, 100)}
    monkeypatch.setattr(video, "_SEEKABLE", ())
    for count, images in sought.items():
        in_order = sample_frames(data, count)
        assert all(np.array_equal(a, b) for a, b in zip(images, in_order, strict=True))


def test_few_frames_of_a_long_video_are_reached_by_seeking(clip, monkeypatch):
    decoded = []
    to_image = video._upright
    monkeypatch.setattr(video, "_decode_in_order", lambda *arguments: pytest.fail("decoded everything"))
    monkeypatch.setattr(video, "_upright", lambda *arguments: decoded.append(1) or to_image(*arguments))
    assert [number_shown(image) for image in sample_frames(clip, 2)] == reference_indices(NUM_FRAMES, 2)
    assert len(decoded) == 2


def test_frames_without_reliable_timestamps_are_counted(clip, monkeypatch):
    monkeypatch.setattr(video, "_decode_by_seeking", lambda *arguments: {})
    assert [number_shown(image) for image in sample_frames(clip, 5)] == reference_indices(NUM_FRAMES, 5)


@pytest.mark.parametrize(
    ("start", "end"), [(None, None), (0, 4), (1, 3), (1.25, 3.25), (None, 2), (2, None), (0, 100), (3.9, 4), (1, 1)]
)
def test_seconds_bound_the_frames_as_published(clip, start, end):
    bound = (start or 0, 1e6 if end is None else end)
    expected = reference_indices(NUM_FRAMES, 6, bound, FPS)
    assert [number_shown(image) for image in sample_frames(clip, 6, start, end)] == expected


@pytest.mark.parametrize(
    ("start", "end"), [(-1, 2), (3, 2), (4, None), (100, 200), (float("nan"), 1), (0, float("nan"))]
)
def test_seconds_outside_the_video_are_refused(clip, start, end):
    with pytest.raises(InvalidRequestError, match=r"^video: no time from .* in a video of 4\.00 seconds"):
        sample_frames(clip, 4, start, end)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_rotated_video_comes_upright(rotation):
    plain = sample_frames(encoded(num_frames=3), 1)[0]
    turned = sample_frames(encoded(num_frames=3, rotation=rotation), 1)[0]
    assert np.array_equal(turned, np.rot90(np.asarray(plain), rotation // 90))  # both counter-clockwise


@pytest.mark.parametrize("num_frames", [0, -1, 257])
def test_the_number_of_frames_is_bounded(clip, num_frames):
    with pytest.raises(InvalidRequestError, match=f"1 to 256 frames can be sampled, got {num_frames}"):
        sample_frames(clip, num_frames)


def test_sizes_beyond_the_limits_are_refused(clip, monkeypatch):
    with pytest.raises(InvalidRequestError, match=r"^clip 1: 96x64 exceeds the limit of 6143 pixels"):
        sample_frames(clip, limits=ImageLimits(max_pixels=6143), name="clip 1")
    monkeypatch.setattr(video, "MAX_SAMPLED_PIXELS", 8 * WIDTH * HEIGHT - 1)
    with pytest.raises(InvalidRequestError, match=r"^video: 8 frames of 96x64 exceed"):
        sample_frames(clip, 8)
    monkeypatch.setattr(video, "MAX_SOURCE_FRAMES", NUM_FRAMES - 1)
    with pytest.raises(InvalidRequestError, match=r"^video: more than 39 frames"):
        sample_frames(clip, 4)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    "data", [b"", b"abc", b"<html>", bytes(1000), PLAYLIST, b"ffconcat version 1.0\nfile 'clip.mp4'\n"]
)
def test_what_is_no_video_cannot_be_decoded(data, tmp_path):
    with pytest.raises(InvalidRequestError, match=r"^video 2: cannot decode$"):
        sample_frames(data, name="video 2")
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    with pytest.raises(InvalidRequestError, match=r"^video 2: "):
        sample_frames(path, name="video 2")


def test_sound_alone_is_no_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(InvalidRequestError, match=r"^video: cannot decode$"):
        sample_frames(buffer.getvalue())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_mp4_cannot_be_decoded(clip, share):
    with pytest.raises(InvalidRequestError, match=r"^video: cannot decode"):
        sample_frames(clip[: int(share * len(clip))])


@pytest.mark.parametrize(("first", "count"), [(0, 20), (15, 20), (23, 10)])
def test_frames_that_an_edit_list_leaves_out_do_not_count(clip, first, count):
    at = clip.index(b"elst") + 12  # behind the version and the number of entries: duration in ms, first moment in ticks
    (shift,) = struct.unpack_from(">i", clip, at + 4)
    trimmed = bytearray(clip)
    struct.pack_into(">Ii", trimmed, at, 1000 * count // FPS, shift + 10240 * first // FPS)
    shown = [number_shown(image) for image in sample_frames(bytes(trimmed), 5)]
    assert shown == [first + index for index in reference_indices(count, 5)]


def test_an_mp4_without_its_last_frames_is_cut_off(clip, tmp_path):
    index_first = tmp_path / "clip.mp4"
    with (
        av.open(io.BytesIO(clip)) as source,
        av.open(index_first, "w", options={"movflags": "faststart"}) as copy,
    ):
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    data = index_first.read_bytes()
    assert len(sample_frames(data, 4)) == 4
    with pytest.raises(InvalidRequestError, match=r"^video: cannot decode: the file is cut off"):
        sample_frames(data[: len(data) - 300])


@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
@settings(max_examples=50)
def test_a_damaged_byte_gives_frames_or_a_refusal(clip, position, byte):
    data = bytearray(clip)
    data[int(position * len(data))] = byte
    try:
        images = sample_frames(bytes(data), 4)
    except InvalidRequestError as error:
        images = [error] * 4
    assert len(images) == 4


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    for source, reason in (
        (tmp_path / "none.mp4", "no such file"),
        (tmp_path, "is a directory"),
        ("https://example.org/clip.mp4", "URLs are not fetched here"),
        (7, "a path or bytes are expected, got int"),
    ):
        with pytest.raises(InvalidRequestError, match=rf"^video: .*{reason}"):
            sample_frames(source)


def test_without_pyav_the_extra_is_named(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'vitrail\[video\]'"):
        sample_frames(clip)
