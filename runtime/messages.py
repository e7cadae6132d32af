"""OpenAI-style message lists, read into a `Conversation`.

Images come from structured parts only: an `<image>` that a user typed into a text part stays text. Everything is
checked before the first URL is fetched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .engine.processor import Conversation, Picture
from .errors import InvalidRequestError
from .image import ImageLimits, ImageSource
from .media import MediaPolicy, fetch_all
from .prompt import ImageSlot, Question
from .request import GenerationConfig
from .video import MAX_FRAMES, frames_of

# What `detail` means in tiles; "auto" is the checkpoint's own maximum.
_DETAIL_TILES = {"low": 1, "auto": None, "high": 12}
_FRAMES_URL = "data:video/jpeg;base64,"  # JPEG frames with commas between them


@dataclass(frozen=True)
class Reference:
    """A URL of media, and the message and part that named it."""

    url: str
    where: str


@dataclass(frozen=True)
class Shown:
    """An image of a part, fetched or not yet, and the most tiles it may take."""

    source: ImageSource | Reference
    max_tiles: int | None = None


@dataclass(frozen=True)
class Clip:
    """The frames of a video part, a tile each."""

    frames: list[Shown]


Part = str | Shown | Clip


def conversation_of(
    messages: Sequence[Mapping[str, Any]],
    *,
    media: MediaPolicy | None = None,
    limits: ImageLimits | None = None,
    max_images: int | None = None,
    urls_only: bool = False,
) -> Conversation:
    """Read messages of the roles system (or developer), user and assistant; the last one must be the user's.

    media: what URLs may name; None: data URLs alone. max_images: frames counted, checked before anything is fetched.
    urls_only: the messages come from another machine, where a path or an object of Python's has no meaning: `image`
    parts are unknown, and a `video` part is a list of URLs.
    Blocks while media are fetched. Raises `InvalidRequestError` naming the message and part.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequestError("messages must be a non-empty list")
    reader = _PartReader(limits, urls_only)
    system: str | None = None
    questions: list[list[Part]] = []
    answers: list[str] = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"{where}: must be an object with role and content")
        role = message.get("role")
        parts = reader.parts(message.get("content"), where)
        if role in ("system", "developer") and number == 1:
            system = _text_only(parts, where)
        elif role == "user" and len(questions) == len(answers):
            questions.append(parts)
        elif role == "assistant" and len(questions) == len(answers) + 1:
            answers.append(_text_only(parts, where))
        elif role in ("system", "developer", "user", "assistant"):
            raise InvalidRequestError(f"{where}: role {role!r} is out of turn (system first, then user and assistant)")
        else:
            raise InvalidRequestError(f"{where}: unknown role {role!r}; known: system, user, assistant")
    if len(questions) != len(answers) + 1:
        raise InvalidRequestError("the last message must be the user's")

    images = sum(isinstance(part, Shown) for question in questions for part in question)
    number_shown = 0
    shown: list[Shown] = []
    turns: list[tuple[Question, str | None]] = []
    for question, answer in zip(questions, [*answers, None], strict=True):
        pieces: list[str | ImageSlot] = []
        for part in question:
            if isinstance(part, str):
                pieces.append(part)
            elif isinstance(part, Clip):
                for number, frame in enumerate(part.frames, start=1):
                    pieces += [f"Frame-{number}: ", ImageSlot(len(shown)), "\n"]
                    shown.append(frame)
            else:
                # The official form: a line per image, numbered through the conversation where there are several.
                number_shown += 1
                pieces += [f"Image-{number_shown}: " if images > 1 else "", ImageSlot(len(shown)), "\n"]
                shown.append(part)
        turns.append((pieces, answer))
    if max_images is not None and len(shown) > max_images:
        raise InvalidRequestError(f"{len(shown)} images exceed the limit of {max_images} per prompt")
    return Conversation(turns, _pictures(shown, media or MediaPolicy()), system)


def _pictures(shown: Sequence[Shown], media: MediaPolicy) -> list[Picture]:
    """What is shown, all of it fetched."""
    sources = [one.source for one in shown]
    references = [source for source in sources if isinstance(source, Reference)]
    fetched = iter(fetch_all([(reference.url, reference.where) for reference in references], media))
    return [Picture(next(fetched) if isinstance(one.source, Reference) else one.source, one.max_tiles) for one in shown]


def _text_only(parts: list[Part], where: str) -> str:
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) != len(parts):
        raise InvalidRequestError(f"{where}: only user messages may hold images")
    return "".join(texts)


class _PartReader:
    """Reads the contents of messages."""

    def __init__(self, limits: ImageLimits | None, urls_only: bool) -> None:
        self.limits = limits
        self.urls_only = urls_only

    def parts(self, content: Any, where: str) -> list[Part]:
        if isinstance(content, str):
            return [content]
        if not isinstance(content, list | tuple):
            raise InvalidRequestError(f"{where}: content must be a string or a list of parts")
        return [self._part(part, f"{where}, part {number}") for number, part in enumerate(content, start=1)]

    def _part(self, part: Any, where: str) -> Part:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise InvalidRequestError(f"{where}: text must be a string")
            return str(part["text"])
        if kind == "image" and not self.urls_only:
            if part.get("image") is None:
                raise InvalidRequestError(f"{where}: `image` is missing")
            return Shown(part["image"], _max_tiles(part, where))
        if kind == "image_url":
            details = _details(part, kind)
            return Shown(_reference(details, kind, where), _max_tiles({**part, **details}, where))
        if kind == "video":
            return Clip(self._frames(part.get("video"), where))
        if kind == "video_url":
            return Clip(_frames_of_url(_reference(_details(part, kind), kind, where)))
        known = "text, image_url, video, video_url" if self.urls_only else "text, image_url, image, video, video_url"
        raise InvalidRequestError(f"{where}: unknown type {kind!r}; known: {known}")

    def _frames(self, video: Any, where: str) -> list[Shown]:
        if not self.urls_only:
            return [Shown(frame, max_tiles=1) for frame in frames_of(video, limits=self.limits, name=where)]
        if not isinstance(video, list) or not video or not all(isinstance(frame, str) for frame in video):
            raise InvalidRequestError(f"{where}: a non-empty list of the URLs of frames is expected")
        return [Shown(Reference(frame, where), max_tiles=1) for frame in video]


def _details(part: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The object under a part's own name; a bare URL stands for one."""
    value = part.get(kind)
    return value if isinstance(value, Mapping) else {"url": value}


def _reference(details: Mapping[str, Any], kind: str, where: str) -> Reference:
    if not isinstance(details.get("url"), str):
        raise InvalidRequestError(f"{where}: {kind} needs a url string")
    return Reference(details["url"], where)


def _frames_of_url(reference: Reference) -> list[Shown]:
    """The frames of a data URL of JPEGs; films are never decoded on behalf of a URL."""
    head, frames = reference.url[: len(_FRAMES_URL)], reference.url[len(_FRAMES_URL) :]
    if head.lower() != _FRAMES_URL:
        raise InvalidRequestError(f"{reference.where}: a video URL must read {_FRAMES_URL}<frame>,<frame>,...")
    if frames.count(",") >= MAX_FRAMES:
        raise InvalidRequestError(f"{reference.where}: more than {MAX_FRAMES} frames")
    return [
        Shown(Reference(f"data:image/jpeg;base64,{frame}", reference.where), max_tiles=1) for frame in frames.split(",")
    ]


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
