"""OpenAI-style message lists, read into a `Conversation`.

Images come from structured parts only: an `<image>` that a user typed into a text part stays text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .engine.processor import Conversation, Picture
from .errors import InvalidRequestError
from .image import ImageLimits
from .prompt import ImageSlot, Question
from .request import GenerationConfig
from .video import frames_of

# What `detail` means in tiles; "auto" is the checkpoint's own maximum.
_DETAIL_TILES = {"low": 1, "auto": None, "high": 12}


@dataclass(frozen=True)
class Clip:
    """The frames of a video part, a tile each."""

    frames: list[Picture]


Part = str | Picture | Clip


def conversation_of(
    messages: Sequence[Mapping[str, Any]], *, media_path: Path | None = None, limits: ImageLimits | None = None
) -> Conversation:
    """Read messages of the roles system, user and assistant; the last one must be the user's.

    media_path: the folder below which `image_url` parts may name files; None: only data URLs are read.
    Raises `InvalidRequestError` naming the message and part.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequestError("messages must be a non-empty list")
    system: str | None = None
    questions: list[list[Part]] = []
    answers: list[str] = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"{where}: must be an object with role and content")
        role = message.get("role")
        parts = _parts(message.get("content"), where, media_path, limits)
        if role == "system" and number == 1:
            system = _text_only(parts, where)
        elif role == "user" and len(questions) == len(answers):
            questions.append(parts)
        elif role == "assistant" and len(questions) == len(answers) + 1:
            answers.append(_text_only(parts, where))
        elif role in ("system", "user", "assistant"):
            raise InvalidRequestError(f"{where}: role {role!r} is out of turn (system first, then user and assistant)")
        else:
            raise InvalidRequestError(f"{where}: unknown role {role!r}; known: system, user, assistant")
    if len(questions) != len(answers) + 1:
        raise InvalidRequestError("the last message must be the user's")

    images = sum(isinstance(part, Picture) for question in questions for part in question)
    shown = 0
    pictures: list[Picture] = []
    turns: list[tuple[Question, str | None]] = []
    for question, answer in zip(questions, [*answers, None], strict=True):
        pieces: list[str | ImageSlot] = []
        for part in question:
            if isinstance(part, str):
                pieces.append(part)
            elif isinstance(part, Clip):
                for number, frame in enumerate(part.frames, start=1):
                    pieces += [f"Frame-{number}: ", ImageSlot(len(pictures)), "\n"]
                    pictures.append(frame)
            else:
                # The official form: a line per image, numbered through the conversation where there are several.
                shown += 1
                pieces += [f"Image-{shown}: " if images > 1 else "", ImageSlot(len(pictures)), "\n"]
                pictures.append(part)
        turns.append((pieces, answer))
    return Conversation(turns, pictures, system)


def _text_only(parts: list[Part], where: str) -> str:
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) != len(parts):
        raise InvalidRequestError(f"{where}: only user messages may hold images")
    return "".join(texts)


def _parts(content: Any, where: str, media_path: Path | None, limits: ImageLimits | None) -> list[Part]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(f"{where}: content must be a string or a list of parts")
    return [_part(part, f"{where}, part {number}", media_path, limits) for number, part in enumerate(content, start=1)]


def _part(part: Any, where: str, media_path: Path | None, limits: ImageLimits | None) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InvalidRequestError(f"{where}: text must be a string")
        return str(part["text"])
    if kind == "image":
        if part.get("image") is None:
            raise InvalidRequestError(f"{where}: `image` is missing")
        return Picture(part["image"], _max_tiles(part, where))
    if kind == "image_url":
        reference = part.get("image_url")
        details = reference if isinstance(reference, Mapping) else {"url": reference}
        return Picture(_url_source(details.get("url"), where, media_path), _max_tiles({**part, **details}, where))
    if kind == "video":
        return Clip([Picture(frame, max_tiles=1) for frame in frames_of(part.get("video"), limits=limits, name=where)])
    raise InvalidRequestError(f"{where}: unknown type {kind!r}; known: text, image_url, image, video")


def _max_tiles(part: Mapping[str, Any], where: str) -> int | None:
    """The most tiles a part allows: `max_dynamic_patch` (or `max_tiles`), else what `detail` stands for."""
    for key in ("max_dynamic_patch", "max_tiles"):
        if part.get(key) is not None:
            try:
                return GenerationConfig(max_tiles=part[key]).max_tiles
            except InvalidRequestError as error:
                raise InvalidRequestError(f"{where}: {error}") from None
    detail = "auto" if part.get("detail") is None else part["detail"]
    if not isinstance(detail, str) or detail not in _DETAIL_TILES:
        raise InvalidRequestError(f"{where}: detail {detail!r} is not known; known: {', '.join(_DETAIL_TILES)}")
    return _DETAIL_TILES[detail]


def _url_source(url: Any, where: str, media_path: Path | None) -> str | Path:
    if not isinstance(url, str):
        raise InvalidRequestError(f"{where}: image_url needs a url string")
    if url[:5].lower() == "data:":
        return url
    if "://" in url and not url.startswith("file://"):
        raise InvalidRequestError(f"{where}: URLs are not fetched; pass a data URL")
    if media_path is None:
        raise InvalidRequestError(f"{where}: local files need allowed_local_media_path")
    try:
        path = Path(unquote(url.removeprefix("file://")) if url.startswith("file://") else url).resolve()
    except (OSError, RuntimeError, ValueError):  # a NUL in the name, links that go in circles
        raise InvalidRequestError(f"{where}: not a usable path") from None
    if not path.is_relative_to(media_path.resolve()):
        raise InvalidRequestError(f"{where}: the file lies outside allowed_local_media_path")
    return path
