"""What tells requests about one picture from others, without reading the picture."""

import json
from hashlib import sha256
from typing import Any

_PICTURES = ("image_url", "video_url", "video")


def picture_key(body: bytes) -> str:
    """A digest of the first picture that a body names, as it stands there; empty where there is none.

    A conversation keeps its first picture: its later turns go where the keys and values of the earlier ones are.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""  # whoever reads the request will say what is wrong
    if not isinstance(request, dict):
        return ""
    contents = [message.get("content") for message in _list(request.get("messages")) if isinstance(message, dict)]
    for part in (part for content in (*contents, request.get("input")) for part in _list(content)):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _PICTURES:
            place = part.get(kind)
            url = place.get("url") if isinstance(place, dict) else place
            return sha256(json.dumps(url).encode()).hexdigest() if url else ""
    return ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
