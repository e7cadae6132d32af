"""Answers of a given form: a JSON schema, any JSON object, or a regular expression.

llguidance says after each token which tokens may come next, and the sampler rules out the others. Once nothing can
follow, the end token is all that is left.
"""

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidRequestError, UnsupportedError
from .tokenizer import Tokenizer

# A character that no token joins with others.
_NEIGHBOUR = "\x02"


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> Tensor:
        """(vocab,) bool on the CPU: the tokens that may come next; none after an `error`."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool)
        return torch.from_numpy(allowed & (not self._matcher.is_error()))

    def accept(self, token_id: int) -> None:
        """Go on by a token, one of those allowed."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)

    @property
    def error(self) -> str:
        """What is wrong with the grammar, or was too much for the library; empty if nothing is."""
        return _first_line(self._matcher.get_error())

    def copy(self) -> "Matcher":
        """The same state for another answer to the same prompt."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)


class Grammars:
    """Makes matchers for one model: `vocab_size` logits, of which the tokenizer may know fewer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = sorted(end_token_ids)

    def matcher(self, response_format: Mapping[str, Any] | None) -> Matcher | None:
        """The matcher for a `GenerationConfig.response_format`, None where any text will do.

        Raises `InvalidRequestError` for a schema or an expression that is wrong or asks for what cannot be checked,
        `UnsupportedError` without llguidance.
        """
        if response_format is None or response_format["type"] == "text":
            return None
        grammars = _llguidance().LLMatcher
        if response_format["type"] == "regex":
            grammar = grammars.grammar_from_regex(response_format["regex"])
        else:
            wanted = response_format.get("json_schema", {}).get("schema", {"type": "object"})
            try:
                grammar = grammars.grammar_from_json_schema(json.dumps(wanted))
            except (TypeError, ValueError) as error:
                raise InvalidRequestError(f"response_format: not a JSON schema: {_first_line(str(error))}") from None
        matcher = Matcher(grammars(self._known_tokens, grammar, log_level=0), self._vocab_size)
        matcher.allowed()  # some of what is wrong with a grammar shows only here
        if matcher.error:
            raise InvalidRequestError(f"response_format: {matcher.error}")
        return matcher

    @cached_property
    def _known_tokens(self) -> Any:
        library, tokenizer = _llguidance(), self._tokenizer
        wrapper = library.TokenizerWrapper(_Vocabulary(tokenizer, self._end_token_ids[0]))
        return library.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=self._end_token_ids)


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_token_id
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text that stands in the middle of an answer: some tokenizers put a space before the first."""
        ids = self._tokenizer.encode(_NEIGHBOUR + text.decode(), add_bos=False)
        before = b""
        for position, token_id in enumerate(ids, start=1):
            before += self.tokens[token_id]
            if before.endswith(_NEIGHBOUR.encode()):
                return ids[position:]
        return self._tokenizer.encode(text.decode(), add_bos=False)


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UnsupportedError("response_format needs llguidance: pip install 'vitrail[structured]'") from None
    return llguidance


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]
