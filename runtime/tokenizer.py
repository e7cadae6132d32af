"""Text to token ids and back, from a checkpoint's own files and without running its code.

The ids are those of the slow tokenizers that the official code asks for. A `vocabulary` encodes the runs of text, and
`Tokenizer` places the added tokens between them. What a user types stays text: only a `Control` piece of a prompt
becomes a control token, and no string does, whatever its characters are.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, InvalidRequestError, UnsupportedError
from .vocabulary import BytePairVocabulary, SentencePieceVocabulary, Vocabulary, qwen2_description

# These open, fill and close image places, whether or not a checkpoint's files call them special.
_IMAGE_TOKENS = frozenset({"<img>", "</img>", "<IMG_CONTEXT>"})
# The official grounding prompts are typed by users ("Where is <ref>the dog</ref>?"), so these are words, although the
# files call them special. They end no turn and claim no image.
_MARKUP = frozenset({"<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"})
_CONTROL_SHAPE = re.compile(r"<\|[^|<>\s]+\|>")

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Control:
    """A control token in a prompt, such as `<|im_end|>`. The same characters in a `str` are text."""

    token: str


@dataclass(frozen=True)
class AddedToken:
    """A token that a checkpoint adds to its vocabulary. `lstrip`, `rstrip`: it takes up the white space beside it."""

    id: int
    text: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False

    @property
    def is_word(self) -> bool:
        """Whether text that reads like this token is this token: Qwen3's `<think>`, InternVL's `<ref>`."""
        return not _is_control(self.text, self.special)


class Tokenizer:
    """Encodes prompts and decodes answers.

    `special_ids` are left out of decoded text. `vocab_size` is the largest id plus one; a model may have more rows.
    """

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        added: Sequence[AddedToken],
        *,
        specials: Iterable[str],
        bos: str | None,
        eos: str | None,
        adds_bos: bool,
    ) -> None:
        self._name = name
        self._vocabulary = vocabulary
        self._added = {token.text: token for token in added}
        self._added_bytes = {token.id: token.text.encode() for token in added}
        named = {index for index in map(self.token_to_id, specials) if index is not None}
        self.special_ids = frozenset(vocabulary.special_ids() | named | {t.id for t in added if t.special})
        self.vocab_size = max([vocabulary.size, *(token.id + 1 for token in added)])
        self.bos_token_id = None if bos is None else self.token_to_id(bos)
        self.eos_token_id = None if eos is None else self.token_to_id(eos)
        self._prefix = [self.bos_token_id] if adds_bos and self.bos_token_id is not None else []
        words = sorted((token.text for token in added if token.is_word), key=len, reverse=True)
        self._words = re.compile("|".join(map(re.escape, words))) if words else None

    def token_to_id(self, token: str) -> int | None:
        """The id of an added token or of a piece of the vocabulary, None if there is none."""
        return self._added[token].id if token in self._added else self._vocabulary.token_to_id(token)

    def token_bytes(self, index: int) -> bytes:
        """What an id adds to a text, empty for an id that stands for nothing."""
        return self._added_bytes[index] if index in self._added_bytes else self._vocabulary.token_bytes(index)

    def encode(self, pieces: str | Sequence[str | Control], *, add_bos: bool = True) -> list[int]:
        """The ids of a prompt; strings that stand side by side are one text.

        `add_bos=False` leaves out the `<s>` with which some tokenizers begin. None ends a prompt with an end token.

        Raises:
            InvalidRequestError: a string that has no UTF-8 form.
            CheckpointError: a `Control` that this tokenizer does not have.
        """
        items: list[str | AddedToken] = []
        for piece in _joined([pieces] if isinstance(pieces, str) else pieces):
            items += [self._control(piece.token)] if isinstance(piece, Control) else self._split(piece)
        ids = list(self._prefix) if add_bos else []
        for position, item in enumerate(items):
            if isinstance(item, AddedToken):
                ids.append(item.id)
            elif text := _stripped(items, position, item):
                ids += self._vocabulary.encode(text, at_start=position == 0)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids that stand for nothing add nothing."""
        decoder = self.stream(skip_special_tokens=skip_special_tokens)
        return decoder.push(ids) + decoder.flush()

    def stream(self, *, skip_special_tokens: bool = True) -> "IncrementalDecoder":
        """A decoder for the ids of one answer, which arrive a few at a time."""
        special_ids = self.special_ids
        return IncrementalDecoder(self._vocabulary, self._added_bytes, special_ids, skip_special=skip_special_tokens)

    def _control(self, text: str) -> AddedToken:
        if text in self._added:
            return self._added[text]
        index = self._vocabulary.token_to_id(text)
        if index is None:
            raise CheckpointError(f"{self._name}: its tokenizer has no token {text!r}, which the prompt needs")
        return AddedToken(index, text)

    def _split(self, text: str) -> list[str | AddedToken]:
        """`text` cut at the words that the checkpoint added, the longest where several fit."""
        if self._words is None:
            return [text]
        items: list[str | AddedToken] = []
        end = 0
        for match in self._words.finditer(text):
            items += [text[end : match.start()], self._added[match.group()]]
            end = match.end()
        items.append(text[end:])
        return [item for item in items if item != ""]


class IncrementalDecoder:
    """Turns ids into text as they arrive, in constant time for each. All it returns, joined, is `Tokenizer.decode`."""

    def __init__(
        self, vocabulary: Vocabulary, added: Mapping[int, bytes], special_ids: frozenset[int], *, skip_special: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._added = added
        self._special_ids = special_ids
        self._skip_special = skip_special
        self._spaces = vocabulary.dropped_spaces  # leading spaces still to be dropped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The characters that `ids` complete. The bytes of an incomplete one wait for the next call."""
        return self._utf8.decode(b"".join(map(self._bytes, ids)))

    def flush(self) -> str:
        """U+FFFD if the answer ended inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, index: int) -> bytes:
        if self._skip_special and index in self._special_ids:
            return b""
        if index in self._added or index in self._special_ids:
            # what encoding put after a control token is taken away after one that is shown
            self._spaces = self._vocabulary.dropped_spaces if self._vocabulary.prefixes_runs else 0
            return self._added[index] if index in self._added else self._vocabulary.token_bytes(index)
        data = self._vocabulary.token_bytes(index)
        if self._spaces and data.startswith(b" "):
            data = data[1:]
            self._spaces -= 1
        if data:
            self._spaces = 0
        return data


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, read from the first of these that stands there.

    `tokenizer.model`; `vocab.json` with `merges.txt`; `tokenizer.json`. The official code asks for the slow tokenizer,
    which reads the first or the second, and the third is known to differ from them (spaces after control tokens). So
    `tokenizer.json` gives the vocabulary only where it is alone. Its added tokens count in any case.

    Raises:
        CheckpointError: files that are missing, unreadable, or disagree on the id of an added token.
        UnsupportedError: a vocabulary of a kind that no InternVL checkpoint uses.
    """
    folder = Path(folder)
    config = _read_object(folder / "tokenizer_config.json")
    fast = _read_object(folder / "tokenizer.json")
    named = _named_tokens(folder / "special_tokens_map.json", _read_object(folder / "special_tokens_map.json"))
    for role, texts in _named_tokens(folder / "tokenizer_config.json", config).items():
        named[role] = texts if role in _NAMED else named.get(role, []) + texts
    specials = {text for texts in named.values() for text in texts}
    added = _added_tokens(folder, config, fast, specials)
    control_ids = {token.id for token in added if not token.is_word}

    def reserved(piece: str, index: int) -> bool:
        return index in control_ids or _is_control(piece, piece in specials)

    kind = str(config.get("tokenizer_class", ""))
    vocabulary: Vocabulary
    bos: str | None
    eos: str | None
    if (folder / "tokenizer.model").is_file():
        vocabulary = SentencePieceVocabulary(
            folder / "tokenizer.model",
            # InternLM's tokenizers know no other form; for LLaMA's slow one, absent and null mean the legacy form
            legacy=kind.startswith("InternLM") or config.get("legacy") is not False,
            prefix_space=config.get("add_prefix_space") is not False,
            reserved=reserved,
        )
        bos, eos, adds_bos = "<s>", "</s>", config.get("add_bos_token") is not False
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() and _is_qwen2(kind):
        description = qwen2_description(_read_object(folder / "vocab.json"), _read_text(folder / "merges.txt"))
        vocabulary = BytePairVocabulary(folder / "vocab.json", description, reserved)
        bos, eos, adds_bos = None, "<|endoftext|>", False
    elif fast:
        vocabulary = BytePairVocabulary(folder / "tokenizer.json", fast, reserved)
        bos, eos = vocabulary.leading_token, None
        adds_bos = bos is not None if config.get("add_bos_token") is None else bool(config["add_bos_token"])
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        raise UnsupportedError(f"{folder}: vocab.json and merges.txt of a {kind}; vitrail knows Qwen2Tokenizer's")
    else:
        raise CheckpointError(
            f"{folder}: no tokenizer there: looked for tokenizer.model, vocab.json with merges.txt, and tokenizer.json"
        )
    return Tokenizer(
        str(folder),
        vocabulary,
        added,
        specials=specials,
        bos=named.get("bos_token", [bos])[0],
        eos=named.get("eos_token", [eos])[0],
        adds_bos=adds_bos,
    )


def _is_control(token: str, special: bool) -> bool:
    is_special = special and token not in _MARKUP
    return is_special or token in _IMAGE_TOKENS or _CONTROL_SHAPE.fullmatch(token) is not None


def _is_qwen2(kind: str) -> bool:
    return kind in ("", "Qwen2Tokenizer", "Qwen2TokenizerFast")


def _joined(pieces: Iterable[str | Control]) -> list[str | Control]:
    """`pieces` with strings that stand side by side joined, and empty ones left out."""
    joined: list[str | Control] = []
    for is_control, group in itertools.groupby(pieces, lambda piece: isinstance(piece, Control)):
        if is_control:
            joined += group
        elif text := "".join(_encodable(str(piece)) for piece in group):
            joined.append(text)
    return joined


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InvalidRequestError(
            f"prompt: not valid UTF-8: lone surrogate U+{code:04X} at character {error.start}"
        ) from None
    return text


def _stripped(items: Sequence[str | AddedToken], position: int, text: str) -> str:
    """`text` without the white space that its neighbours take up (Phi-3's `<|user|>` takes what follows it)."""
    before = items[position - 1] if position else None
    after = items[position + 1] if position + 1 < len(items) else None
    if isinstance(before, AddedToken) and before.rstrip:
        text = text.lstrip()
    if isinstance(after, AddedToken) and after.lstrip:
        text = text.rstrip()
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as text: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not a {type(value).__name__}")
    return value


def _named_tokens(path: Path, source: dict[str, Any]) -> dict[str, list[str]]:
    """The special tokens that a file names, by role: one for `bos_token` and its like, several for the lists."""
    named: dict[str, list[str]] = {}
    for role in (*_NAMED, *_LISTED):
        value = source.get(role)
        if isinstance(value, dict) and role in _LISTED:
            value = list(value.values())
        entries = value if isinstance(value, list) else [] if value is None else [value]
        texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
        if not all(isinstance(text, str) for text in texts):
            raise CheckpointError(f"{path}: {role} is neither a token nor a list of tokens")
        if texts:
            named[role] = list(map(str, texts))
    return named


def _added_tokens(folder: Path, config: dict[str, Any], fast: dict[str, Any], specials: set[str]) -> list[AddedToken]:
    """The added tokens of all files of `folder`. Of a token told twice the first file's flags are believed.

    Raises CheckpointError where one token has two ids, or one id two tokens.
    """
    sources = (
        ("tokenizer_config.json", config.get("added_tokens_decoder") or {}),
        ("tokenizer.json", fast.get("added_tokens") or []),
        ("added_tokens.json", _read_object(folder / "added_tokens.json")),
    )
    by_text: dict[str, AddedToken] = {}
    by_id: dict[int, AddedToken] = {}
    file_of: dict[int, str] = {}
    for file, entries in sources:
        for token in _parsed(folder / file, entries, specials):
            other = by_text.get(token.text, token)
            if other.id != token.id:
                raise CheckpointError(
                    f"{folder / file}: added token {token.text!r} has id {token.id}, "
                    f"but {other.id} in {file_of[other.id]}"
                )
            other = by_id.get(token.id, token)
            if other.text != token.text:
                raise CheckpointError(
                    f"{folder / file}: added token {token.text!r} has id {token.id}, "
                    f"which {file_of[token.id]} gives to {other.text!r}"
                )
            by_text.setdefault(token.text, token)
            by_id.setdefault(token.id, token)
            file_of.setdefault(token.id, file)
    return list(by_text.values())


def _parsed(path: Path, entries: Any, specials: set[str]) -> list[AddedToken]:
    """Added tokens in any of the three forms that files have: `{id: token}`, `[token with id]`, `{text: id}`."""
    try:
        if isinstance(entries, dict):
            entries = [
                {"content": key, "id": value} if isinstance(value, int) else {"id": key, **value}
                for key, value in entries.items()
            ]
        tokens = [
            AddedToken(
                int(entry["id"]),
                entry["content"],
                special=bool(entry.get("special")) or entry["content"] in specials,
                lstrip=bool(entry.get("lstrip")),
                rstrip=bool(entry.get("rstrip")),
            )
            for entry in entries
        ]
        if not all(isinstance(token.text, str) and token.text and token.id >= 0 for token in tokens):
            raise ValueError("each needs a text and an id")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: added tokens that cannot be read: {error!r}") from error
    return tokens
