"""Vocabularies: plain text to ids and an id to bytes, with no added tokens and no way to write a control token.

`SentencePieceVocabulary` reads a `tokenizer.model`, `BytePairVocabulary` a `tokenizer.json` of type BPE.
`tokenizer.py` puts the added tokens on top.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from .errors import CheckpointError, UnsupportedError

_SPACE = "▁"  # how sentencepiece writes a space
# Appended to a serialised sentencepiece model: a second `normalizer_spec` (field 3), which protobuf merges into the
# first, with `add_dummy_prefix` (its field 3) false. It spares a dependency on protobuf.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Reserved = Callable[[str, int], bool]
"""Tells of a piece and its id whether plain text must never become it."""


class Vocabulary(Protocol):
    """What a tokenizer needs of its vocabulary.

    `dropped_spaces` is how many leading spaces of a decoded text are not the text's own. `prefixes_runs` says whether
    `encode` puts such a space before every run of text, or at most before the first of a prompt.
    """

    size: int
    dropped_spaces: int
    prefixes_runs: bool

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Ids of a run of text that stands between added tokens; `at_start`: nothing stands before it."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece."""

    def token_bytes(self, index: int) -> bytes:
        """What an id adds to a text, empty for an id that stands for nothing."""

    def special_ids(self) -> set[int]:
        """Ids that the vocabulary itself calls special."""


class SentencePieceVocabulary:
    """A `tokenizer.model`.

    Each run of text is encoded by the model as it is (InternLM2, InternLM, LLaMA's legacy form). With `legacy=False`
    (LLaMA since) the model adds no spaces; a run that starts the prompt is given one if `prefix_space`.
    """

    def __init__(self, path: Path, *, legacy: bool, prefix_space: bool, reserved: Reserved) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes() + (b"" if legacy else _NO_DUMMY_PREFIX))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable sentencepiece model") from error
        self.size = self._model.GetPieceSize()
        self._pieces = self._model.IdToPiece(list(range(self.size)))
        self._ids = {piece: index for index, piece in enumerate(self._pieces)}
        self._unknown = self._model.unk_id()
        # The unknown token stays: it is what text becomes that the model cannot spell.
        self._reserved = {i for piece, i in self._ids.items() if i != self._unknown and reserved(piece, i)}
        self._legacy = legacy
        self._prefix = " " if prefix_space and not legacy else ""
        self._guard = self._pieces[self._unknown]
        self._guard_length = len(self._model.Encode(self._guard, out_type=int))
        self.dropped_spaces = max(self._model_drops(), len(self._prefix))
        self.prefixes_runs = legacy

    def encode(self, text: str, at_start: bool) -> list[int]:
        ids: list[int]
        if self._legacy:
            ids = self._model.Encode(text, out_type=int)
        else:
            text = (self._prefix if at_start else "") + text.replace(_SPACE, " ")
            # Some models drop leading spaces; behind other text, cut off again, they keep them.
            guard, length = (self._guard, self._guard_length) if text.startswith(" ") else ("", 0)
            ids = self._model.Encode(guard + text, out_type=int)[length:]
        if self._reserved.isdisjoint(ids):
            return ids
        return [part for index in ids for part in (self._spelt(index) if index in self._reserved else (index,))]

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def token_bytes(self, index: int) -> bytes:
        if not 0 <= index < self.size:
            return b""
        piece = self._pieces[index]
        return bytes.fromhex(piece[3:5]) if self._model.IsByte(index) else piece.replace(_SPACE, " ").encode()

    def special_ids(self) -> set[int]:
        control = self._model.IsControl(list(range(self.size)))
        return {self._unknown, *(index for index, is_control in enumerate(control) if is_control)}

    def _model_drops(self) -> int:
        # The processor does not tell its normaliser's settings, but decoding two spaces shows what it drops.
        space = self._ids.get(_SPACE)
        return 0 if space is None else (sys.maxsize, 1, 0)[len(self._model.Decode([space, space]))]

    def _spelt(self, index: int) -> list[int]:
        """A piece character by character: how text is written that the model holds as one reserved piece."""
        ids: list[int] = []
        for character in self._pieces[index]:
            if character in self._ids:
                ids.append(self._ids[character])
            else:
                ids += [self._ids.get(f"<0x{byte:02X}>", self._unknown) for byte in character.encode()]
        return ids


class BytePairVocabulary:
    """A `tokenizer.json` of type BPE, given as the object in it.

    It is built without added tokens, without the reserved pieces and without the merges that touch those, so that no
    text can become one; their names and ids are still known. `leading_token` is the one that its post-processor puts
    before every text, if any.
    """

    def __init__(self, source: Path, description: dict[str, Any], reserved: Reserved) -> None:
        model = description.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
            raise CheckpointError(f"{source}: no vocabulary in it")
        if model.get("type", "BPE") != "BPE" or not isinstance(model["vocab"], dict):
            raise UnsupportedError(f"{source}: a vocabulary of type {model.get('type')!r}; vitrail reads BPE")
        decoder = description.get("decoder")
        if not _types(decoder) & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise UnsupportedError(f"{source}: its decoder is neither byte-level nor sentencepiece's")
        self._ids: dict[str, int] = model["vocab"]
        self._unknown = model.get("unk_token")
        self._from_byte = _byte_of_character() if "ByteLevel" in _types(decoder) else None
        try:
            self._pieces = {index: piece for piece, index in self._ids.items()}
            bare = {
                **description,
                "added_tokens": [],
                "post_processor": None,
                "truncation": None,
                "padding": None,
                "model": _without(model, {t for t, i in self._ids.items() if t != self._unknown and reserved(t, i)}),
            }
            # Metaspace's "first" means the start of the prompt, which a later run is not.
            later = _replaced(bare, {"type": "Metaspace", "prepend_scheme": "first"}, {"prepend_scheme": "never"})
            self._first = tokenizers.Tokenizer.from_str(json.dumps(bare))
            self._later = self._first if later == bare else tokenizers.Tokenizer.from_str(json.dumps(later))
            self.leading_token = _leading_token(description.get("post_processor"))
            self.dropped_spaces = _leading_strip(decoder)
        except Exception as error:  # the library, which checks most of it, raises nothing narrower
            raise CheckpointError(f"{source}: not a readable tokenizer: {error}") from error
        self.size = 1 + max(self._pieces, default=-1)
        self.prefixes_runs = b"".join(map(self.token_bytes, self.encode("a", at_start=False))).startswith(b" ")

    def encode(self, text: str, at_start: bool) -> list[int]:
        ids: list[int] = (self._first if at_start else self._later).encode(text, add_special_tokens=False).ids
        return ids

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def token_bytes(self, index: int) -> bytes:
        piece = self._pieces.get(index, "")
        if self._from_byte is None:
            is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
            return bytes.fromhex(piece[3:5]) if is_byte else piece.replace(_SPACE, " ").encode()
        try:
            return bytes(self._from_byte[character] for character in piece)
        except KeyError:  # a token that is not written in byte characters stands for itself
            return piece.encode()

    def special_ids(self) -> set[int]:
        return {self._ids[self._unknown]} if self._unknown in self._ids else set()


def qwen2_description(vocab: dict[str, Any], merges: str) -> dict[str, Any]:
    """The `tokenizer.json` that Qwen2's `vocab.json` and `merges.txt` stand for: NFC, its words, byte-level BPE."""
    split = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    lines = [line for line in merges.split("\n") if line.strip() and not line.startswith("#version")]
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": lines},
    }


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: the byte that each character of a byte-level token stands for.

    Printable Latin-1 stands for itself; the other bytes are, in order, the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _without(model: dict[str, Any], dropped: set[str]) -> dict[str, Any]:
    """A BPE model that cannot write the dropped pieces: neither they nor the merges that touch them are in it."""

    def stays(merge: str | list[str]) -> bool:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        return dropped.isdisjoint((*parts, "".join(parts)))

    vocab = {piece: index for piece, index in model["vocab"].items() if piece not in dropped}
    return {**model, "vocab": vocab, "merges": [merge for merge in model.get("merges", []) if stays(merge)]}


def _types(component: Any) -> set[str]:
    """The type of a component of a `tokenizer.json`, with those of its members."""
    if isinstance(component, list):
        return set().union(*map(_types, component))
    if not isinstance(component, dict):
        return set()
    return {str(component.get("type"))}.union(*map(_types, component.values()))


def _replaced(component: Any, pattern: dict[str, Any], change: dict[str, Any]) -> Any:
    """A copy of `component` in which every object that holds `pattern` is updated with `change`."""
    if isinstance(component, list):
        return [_replaced(member, pattern, change) for member in component]
    if not isinstance(component, dict):
        return component
    # a model holds no such components, and is large
    copy = {key: value if key == "model" else _replaced(value, pattern, change) for key, value in component.items()}
    return copy | change if pattern.items() <= component.items() else copy


def _leading_strip(decoder: Any) -> int:
    """How many leading spaces a `tokenizer.json`'s decoder takes off."""
    if not isinstance(decoder, dict):
        return 0
    if decoder.get("type") == "Strip" and decoder.get("content") == " ":
        return int(decoder.get("start", 0))
    if decoder.get("type") == "Metaspace":
        older = "always" if decoder.get("add_prefix_space", True) else "never"
        return int(decoder.get("prepend_scheme", older) != "never")
    return sum(map(_leading_strip, decoder.get("decoders", [])))


def _leading_token(post_processor: Any) -> str | None:
    """The token that a `tokenizer.json`'s post-processor puts before every text."""
    if not isinstance(post_processor, dict):
        return None
    for part in post_processor.get("processors", []):
        if token := _leading_token(part):
            return token
    single = post_processor.get("single") or [{}]
    token = single[0].get("SpecialToken", {}).get("id")
    return None if token is None else str(token)
