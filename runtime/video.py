"""Video frames, sampled as the reference samples them and decoded by PyAV (extra `video`).

A file is read twice: once packet by packet for its timeline, which decodes nothing, and once for the frames chosen, by
way of the key frame before each of them where the container can seek exactly.
"""

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .errors import InvalidRequestError, UnsupportedError
from .image import ImageLimits, ImageSource, check_size, local_file

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# A file, its bytes, or frames that were sampled already.
Video = str | os.PathLike[str] | bytes | Sequence[ImageSource]

MAX_FRAMES = 256  # of one request
MAX_SOURCE_FRAMES = 1_000_000  # of one file: nine hours at 30 a second
MAX_SAMPLED_PIXELS = 2**30  # of all frames of a request: 4 GiB as Pillow holds them

# Containers that hold their own pictures: no playlist, nothing that opens a further file or address.
_DEMUXERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
# Containers whose packets carry the timestamps of their frames and whose index leads to key frames.
_SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

_ROTATIONS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}  # degrees counter-clockwise, as the file and Pillow both count them


@dataclass(frozen=True)
class _Timeline:
    """The frames of a file in display order, as its header and packets tell."""

    width: int
    height: int
    num_frames: int
    fps: float | None
    timestamps: list[int]  # one per frame; empty where frames can only be counted
    key_timestamps: list[int]  # those of the frames from which decoding may start


def frame_indices(num_source_frames: int, num_frames: int, first: int = 0, last: int | None = None) -> list[int]:
    """Indices of `num_frames` frames spread evenly over [first, last]; they may repeat."""
    last = num_source_frames - 1 if last is None else min(last, num_source_frames - 1)
    segment = (last - first) / num_frames
    return [int(first + segment / 2 + round(segment * k)) for k in range(num_frames)]  # `round`: half to even


def interval_indices(num_source_frames: int, num_frames: int, first: int = 0, last: int | None = None) -> list[int]:
    """The middles of intervals of ceil(n / num_frames) frames, as the reference's video retrieval takes them.

    They stop short of the end by up to an interval. Of a video so short that they overrun it `frame_indices`.
    """
    last = num_source_frames - 1 if last is None else min(last, num_source_frames - 1)
    interval = -(-(last - first + 1) // num_frames)
    indices = [first + interval * k + interval // 2 for k in range(num_frames)]
    return indices if indices[-1] <= last else frame_indices(num_source_frames, num_frames, first, last)


def frames_of(video: Video, *, limits: ImageLimits | None = None, name: str = "video") -> list[ImageSource]:
    """The frames of a video: sampled evenly from a file or its bytes, or those of a list, which are sampled already."""
    if isinstance(video, str | os.PathLike | bytes):
        return list(sample_frames(video, limits=limits, name=name))
    if not isinstance(video, list | tuple) or not video:
        raise InvalidRequestError(f"{name}: a path, bytes or a non-empty list of frames is expected")
    return list(video)


def sample_frames(
    source: str | os.PathLike[str] | bytes,
    num_frames: int = 8,
    start: float | None = None,
    end: float | None = None,
    *,
    choose: Callable[[int, int, int, int], list[int]] = frame_indices,
    limits: ImageLimits | None = None,
    name: str = "video",
) -> list[Image.Image]:
    """`num_frames` RGB frames, upright, spread evenly over the video or over its seconds `start` to `end`.

    choose: what says which, `frame_indices` (chat) or `interval_indices` (retrieval).
    Raises `InvalidRequestError` for a file that cannot be decoded, a time outside it or a size beyond the limits, and
    `UnsupportedError` where PyAV is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise UnsupportedError("reading videos needs PyAV: pip install 'vitrail[video]'") from None
    if not 1 <= num_frames <= MAX_FRAMES:
        raise InvalidRequestError(f"{name}: 1 to {MAX_FRAMES} frames can be sampled, got {num_frames}")
    limits = limits or ImageLimits()
    data = source if isinstance(source, bytes) else local_file(source, name)
    try:
        with _opened(data) as (container, stream):
            width, height = stream.width, stream.height
            check_size(width, height, limits, name)
            if num_frames * width * height > MAX_SAMPLED_PIXELS:
                raise InvalidRequestError(
                    f"{name}: {num_frames} frames of {width}x{height} exceed {MAX_SAMPLED_PIXELS} pixels, sample fewer"
                )
            timeline = _read_timeline(container, stream, name)
        indices = choose(timeline.num_frames, num_frames, *_bounds(timeline, start, end, name))
        chosen = sorted(set(indices))
        frames = _decode_by_seeking(data, timeline, chosen) if timeline.timestamps else {}
        if len(frames) < len(chosen):
            frames = _decode_in_order(data, timeline, chosen)
        return [frames[index] for index in indices]
    except InvalidRequestError:
        raise
    except Exception:  # PyAV's errors are of many kinds, and their text stays here
        raise InvalidRequestError(f"{name}: cannot decode") from None


@contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """The container and its main video stream; PyAV is handed an open file, so that it resolves no name itself."""
    import av

    options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "none"}
    with (
        io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file,
        av.open(file, "r", options=options) as container,
    ):
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream):
            raise ValueError("no video stream")
        stream.thread_type = "AUTO"
        yield container, stream


def _read_timeline(container: "InputContainer", stream: "VideoStream", name: str) -> _Timeline:
    seekable = container.format.name in _SEEKABLE
    count, timed, keys = 0, set[int](), []
    for packet in container.demux(stream):
        if packet.is_corrupt and seekable:  # shorter than the index says
            raise InvalidRequestError(f"{name}: cannot decode: the file is cut off")
        if packet.size == 0 or packet.is_discard:  # the flush at the end, and what an edit list leaves out
            continue
        count += 1
        if count > MAX_SOURCE_FRAMES:
            raise InvalidRequestError(f"{name}: more than {MAX_SOURCE_FRAMES} frames")
        if packet.pts is not None:
            timed.add(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    if count == 0:
        raise InvalidRequestError(f"{name}: cannot decode: no frames")
    timestamps = sorted(timed) if seekable and len(timed) == count else []
    fps = float(stream.average_rate) if stream.average_rate else None
    return _Timeline(stream.width, stream.height, count, fps, timestamps, sorted(keys))


def _bounds(timeline: _Timeline, start: float | None, end: float | None, name: str) -> tuple[int, int]:
    """First and last frame index of the seconds asked for."""
    first, last = 0, timeline.num_frames - 1
    if start is None and end is None:
        return first, last
    if timeline.fps is None:
        raise InvalidRequestError(f"{name}: has no frame rate, so no part of it can be chosen by time")
    begin = 0.0 if start is None else start
    duration = timeline.num_frames / timeline.fps
    if not 0 <= begin < duration or not (end is None or end >= begin):
        raise InvalidRequestError(f"{name}: no time from {start} to {end} in a video of {duration:.2f} seconds")
    if end is not None and end < duration:
        last = min(last, round(end * timeline.fps))
    return min(round(begin * timeline.fps), last), last


def _decode_by_seeking(source: Path | bytes, timeline: _Timeline, chosen: list[int]) -> dict[int, Image.Image]:
    """The chosen frames by index; those whose key frame the container's index does not lead to are missing."""
    images: dict[int, Image.Image] = {}
    with _opened(source) as (container, stream):
        frames = container.decode(stream)
        reached = -1  # timestamp of the last frame decoded
        for index in chosen:
            target = timeline.timestamps[index]
            before = bisect_right(timeline.key_timestamps, target)
            key = timeline.key_timestamps[before - 1] if before else timeline.timestamps[0]
            if key > reached:
                container.seek(key, stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                if frame.pts is None:
                    break
                reached = frame.pts
                if reached >= target:
                    if reached == target:
                        images[index] = _upright(frame, timeline)
                    break
    return images


def _decode_in_order(source: Path | bytes, timeline: _Timeline, chosen: list[int]) -> dict[int, Image.Image]:
    """The chosen frames by index, every frame up to the last of them decoded and counted."""
    wanted, images = set(chosen), {}
    with _opened(source) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                images[index] = _upright(frame, timeline)
            if index == chosen[-1]:
                break
    return images


def _upright(frame: "VideoFrame", timeline: _Timeline) -> Image.Image:
    # The size that was checked: a stream may change its own on the way.
    image = Image.fromarray(frame.to_ndarray(format="rgb24", width=timeline.width, height=timeline.height))
    turn = _ROTATIONS.get(frame.rotation)
    return image if turn is None else image.transpose(turn)
