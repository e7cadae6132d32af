"""What callers ask for and what they get back: the sampling settings and the answers. Needs no torch."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack

from .errors import InvalidRequestError

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]

# One generated token: its own log-probability, then pairs (token id, log-probability), best first.
TokenLogprobs = list[float | tuple[int, float]]

# Bounds on what one request may make the engine do; a model's own limits are checked where the model is known.
MAX_COMPLETIONS = 128
MAX_LOGPROBS = 20
MAX_STRINGS, MAX_STRING_LENGTH = 64, 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_TILES = 256


# --- Readers: each takes a setting's name and what the caller gave, and returns what is stored or raises. ---

Reader = Callable[[str, Any], Any]


def _show(value: object) -> str:
    """`value` as it may stand in a one-line message."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a caller's own repr, or an integer past Python's limit of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(name: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}={_show(value)}: must be {allowed}")


def _is(value: object, kind: type) -> bool:
    """Whether `value` is a number of this kind; True and False, which Python takes for integers, are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _integer(low: int, high: int | None = None) -> Reader:
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"

    def read(name: str, value: Any) -> int:
        if not _is(value, Integral) or value < low or (high is not None and value > high):
            raise _refuse(name, value, allowed)
        return int(value)

    return read


def _number(low: float, high: float, *, above: bool = False) -> Reader:
    """Reads a number in [low, high], or in (low, high] if `above`."""
    allowed = f"a number above {low:g} and up to {high:g}" if above else f"a number from {low:g} to {high:g}"

    def read(name: str, value: Any) -> float:
        # written so that NaN, for which every comparison is false, is refused too
        if not _is(value, Real) or not low <= value <= high or (above and value == low):
            raise _refuse(name, value, allowed)
        return float(value)

    return read


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "True or False")
    return value


def _collection(name: str, value: Any, kind: str, most: int) -> Collection[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, Set)) or len(value) > most:
        raise _refuse(name, value, f"a list of at most {most} {kind}")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    values = _collection(name, [value] if isinstance(value, str) else value, "strings", MAX_STRINGS)
    for index, text in enumerate(values):
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STRING_LENGTH:
            raise _refuse(f"{name}[{index}]", text, f"a string of 1 to {MAX_STRING_LENGTH} characters")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _refuse(f"{name}[{index}]", text, "valid Unicode, without lone surrogates")
    return tuple(values)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    read = _integer(0)
    values = _collection(name, value, "token ids", MAX_STOP_TOKEN_IDS)
    return tuple(read(f"{name}[{index}]", token) for index, token in enumerate(values))


def _salt(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_STRING_LENGTH:
        raise _refuse(name, value, f"a string of 1 to {MAX_STRING_LENGTH} characters")
    return value


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping) or len(value) > MAX_LOGIT_BIASES:
        raise _refuse(name, value, f"a mapping of at most {MAX_LOGIT_BIASES} token ids to numbers from -100 to 100")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # JSON objects have only string keys
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 19 else key
        biases[_integer(0)(f"{name}: token id", token)] = _number(-100, 100)(f"{name}[{_show(key)}]", bias)
    return biases


def _response_format(name: str, value: Any) -> dict[str, Any]:
    """One of the forms OpenAI's API has, or our own for a regular expression; whether it can be kept is told later."""
    forms = (
        '{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {...}}} '
        'or {"type": "regex", "regex": "..."}'
    )
    if not isinstance(value, Mapping):
        raise _refuse(name, value, f"None, {forms}")
    kind, fields = value.get("type"), value.keys() - {"type"}
    if kind in ("text", "json_object") and not fields:
        return {"type": kind}
    if kind == "regex" and fields == {"regex"} and isinstance(value["regex"], str):
        return dict(value)
    described = value.get("json_schema")
    if kind == "json_schema" and fields == {"json_schema"} and isinstance(described, Mapping):
        schema = described.get("schema")
    else:
        schema = None
    if isinstance(schema, Mapping | bool):
        return dict(value)
    raise _refuse(name, value, forms)


# --- Settings ---


class GenerationKeywords(TypedDict, total=False):
    """What callers may write: every field of `GenerationConfig` and its aliases. None stands for the default."""

    max_new_tokens: int | None
    max_tokens: int | None
    min_new_tokens: int | None
    min_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    random_seed: int | None
    stop: str | Collection[str] | None
    stop_words: str | Collection[str] | None
    stop_token_ids: Collection[int] | None
    bad_words: str | Collection[str] | None
    ignore_eos: bool | None
    n: int | None
    logprobs: int | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    response_format: Mapping[str, Any] | None
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None
    max_tiles: int | None
    total_max_tiles: int | None
    cache_salt: str | None


ALIASES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "random_seed": "seed", "stop_words": "stop"}


def _setting(default: Any, read: Reader, *, hashed: bool = True) -> Any:
    return field(default=default, hash=hashed, metadata={"read": read})


@dataclass(frozen=True, init=False)
class GenerationConfig:
    """How to generate; each field stands with its default and the values it may take. Greedy unless asked otherwise.

    Aliases: `max_tokens`, `min_tokens`, `random_seed` and `stop_words`; both spellings of one setting are an error.
    None as a value means the default. Raises `InvalidRequestError` for a value out of range and
    `TypeError`, naming the nearest keyword, for an unknown one.
    """

    max_new_tokens: int = _setting(512, _integer(1))
    min_new_tokens: int = _setting(0, _integer(0))  # no end token and no stop string counts before these
    do_sample: bool | None = _setting(None, _flag)  # None: sample if temperature > 0, top_p, top_k or min_p was given
    temperature: float | None = _setting(None, _number(0, 100))  # 0 is greedy; sampling without one uses 1
    top_p: float | None = _setting(None, _number(0, 1, above=True))
    top_k: int | None = _setting(None, _integer(1, 2**31 - 1))
    min_p: float | None = _setting(None, _number(0, 1))
    repetition_penalty: float = _setting(1.0, _number(0.01, 100))  # of tokens in the prompt and the answer
    presence_penalty: float = _setting(0.0, _number(-2, 2))  # of tokens in the answer
    frequency_penalty: float = _setting(0.0, _number(-2, 2))  # of tokens in the answer, each time they occur
    seed: int | None = _setting(None, _integer(-(2**63), 2**64 - 1))
    stop: tuple[str, ...] = _setting((), _strings)
    stop_token_ids: tuple[int, ...] = _setting((), _token_ids)
    bad_words: tuple[str, ...] = _setting((), _strings)
    ignore_eos: bool = _setting(False, _flag)
    n: int = _setting(1, _integer(1, MAX_COMPLETIONS))
    logprobs: int | None = _setting(None, _integer(0, MAX_LOGPROBS))  # alternatives beside the chosen token
    logit_bias: Mapping[int, float] | None = _setting(None, _logit_bias, hashed=False)
    response_format: Mapping[str, Any] | None = _setting(None, _response_format, hashed=False)
    skip_special_tokens: bool = _setting(True, _flag)
    include_stop_str_in_output: bool = _setting(False, _flag)
    max_tiles: int | None = _setting(None, _integer(1, MAX_TILES))  # per image, without its thumbnail
    total_max_tiles: int | None = _setting(None, _integer(1))  # over all images of the request
    cache_salt: str | None = _setting(None, _salt)  # requests share what is cached with those of the same salt alone

    def __init__(self, **keywords: Unpack[GenerationKeywords]) -> None:
        given = _canonical(keywords)
        for setting in fields(self):
            value = given.get(setting.name)
            value = setting.default if value is None else setting.metadata["read"](setting.name, value)
            object.__setattr__(self, setting.name, value)
        if self.min_new_tokens > self.max_new_tokens:
            allowed = f"at most max_new_tokens, which is {self.max_new_tokens}"
            raise _refuse("min_new_tokens", self.min_new_tokens, allowed)
        if self.do_sample is False and (named := self._sampling_fields()):
            contradicted = f"{named[0]}={getattr(self, named[0])}"
            raise InvalidRequestError(f"do_sample=False contradicts {contradicted}, which samples: give one of them")
        if self.ignore_eos and self.response_format not in (None, {"type": "text"}):
            raise InvalidRequestError("ignore_eos contradicts response_format, whose answers end: give one of them")
        if self.do_sample and self.temperature == 0:
            raise InvalidRequestError("do_sample=True contradicts temperature=0, which is greedy: give one of them")

    @classmethod
    def from_kwargs(
        cls, base: "GenerationConfig | None", keywords: Mapping[str, Any], *, also_known: Iterable[str] = ()
    ) -> Self:
        """`base`, or the defaults, with `keywords` on top.

        `also_known` are keywords of the calling function itself, so that a misspelling of one of those is named too.
        """
        if base is not None and not isinstance(base, GenerationConfig):
            raise TypeError(f"generation_config must be a GenerationConfig, not {type(base).__name__}")
        kept = {} if base is None else {setting.name: getattr(base, setting.name) for setting in fields(base)}
        return cls(**{**kept, **_canonical(keywords, also_known)})

    def replace(self, **keywords: Unpack[GenerationKeywords]) -> "GenerationConfig":
        """The config with `keywords`, aliases included, in place of its own values."""
        return self.from_kwargs(self, keywords)

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one."""
        if self.do_sample is not None:
            return not self.do_sample
        return self.temperature == 0 or not self._sampling_fields()

    @property
    def sampling_temperature(self) -> float:
        """The temperature to sample at: 0 if greedy, 1 unless one was given."""
        if self.greedy:
            return 0.0
        return 1.0 if self.temperature is None else self.temperature

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises `InvalidRequestError` for a token id that is not below `vocab_size`.

        To be called before a request joins a batch: the sampler relies on it.
        """
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias or {})):
            for token in ids:
                if token >= vocab_size:
                    allowed = f"below the vocabulary size {vocab_size}"
                    raise InvalidRequestError(f"{name}: token id {token} must be {allowed}")

    def _sampling_fields(self) -> list[str]:
        """The names of the given fields that ask for sampling."""
        asking = [name for name in ("top_p", "top_k", "min_p") if getattr(self, name) is not None]
        return ["temperature", *asking] if self.temperature else asking


SamplingParams = GenerationConfig

GENERATION_KEYWORDS = frozenset(GenerationKeywords.__annotations__)


def _canonical(keywords: Mapping[str, Any], also_known: Iterable[str] = ()) -> dict[str, Any]:
    """`keywords` by the names of the fields they set. Raises `TypeError` for an unknown one, or two for one field."""
    given: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, value in keywords.items():
        if name not in GENERATION_KEYWORDS:
            nearest = difflib.get_close_matches(name, sorted({*GENERATION_KEYWORDS, *also_known}), n=1, cutoff=0.0)[0]
            raise TypeError(f"unknown keyword {_show(name)}; the nearest one is '{nearest}'")
        canonical = ALIASES.get(name, name)
        if canonical in spelled:
            raise TypeError(f"{spelled[canonical]} and {name} are two names of one setting: give one of them")
        spelled[canonical] = name
        given[canonical] = value
    return given


# --- Answers ---


@dataclass(frozen=True)
class Usage:
    """What a request cost, in tokens and tiles. `prompt_tokens` includes `image_tokens` and `cached_tokens`.

    `cached_tokens` is what the engine happened to have computed before: it counts for no comparison.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    image_tokens: int = 0
    image_tiles: int = 0
    cached_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Metrics:
    """Where a request's time went, in milliseconds. `tpot_ms` is the mean time of an output token after the first.

    Passes are counted whole, whoever shared them: times of requests that ran together do not add up. `preprocess_ms`
    includes `image_decode_ms` and `tile_ms`, `vision_ms` includes `projector_ms`, which is 0 on a GPU.
    """

    queue_ms: float = 0.0
    preprocess_ms: float = 0.0
    image_decode_ms: float = 0.0
    tile_ms: float = 0.0
    transfer_ms: float = 0.0
    vision_ms: float = 0.0
    projector_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    e2e_ms: float = 0.0


@dataclass(frozen=True)
class Completion:
    """One answer to a prompt. `logprobs` has an entry a token where `logprobs=k` was asked for."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class RequestFailure:
    """Why a request ended with the finish reason "error"."""

    code: str
    message: str


@dataclass(frozen=True)
class GenerationOutput:
    """The answers to one prompt: `n` of them in `outputs`; `text` and its siblings are the first one's."""

    outputs: list[Completion]
    prompt_token_ids: list[int]
    num_tiles: list[int]  # one number an image, thumbnail included
    usage: Usage
    metrics: Metrics = Metrics()
    error: RequestFailure | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    def to_dict(self) -> dict[str, Any]:
        """The output in plain types that JSON can hold, top-level mirrors of the first completion included."""
        body = asdict(self)
        return {**body["outputs"][0], **body}


@dataclass(frozen=True)
class StreamDelta:
    """What one step added to completion `index`: the text that is now certain, and the new tokens."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    index: int = 0


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """One image as the language model sees it."""

    tokens: "torch.Tensor"  # [num_tiles * tokens_per_tile, llm_hidden]
    num_tiles: int  # thumbnail included
    grid: tuple[int, int]  # (columns, rows)


@dataclass(frozen=True, eq=False)
class VisionFeatures:
    """Hidden states of one InternViT block for n images, as probes and segmentation heads use them."""

    class_token: "torch.Tensor"  # [n, hidden]
    patches: "torch.Tensor"  # [n, rows, columns, hidden]
    pooled: "torch.Tensor"  # [n, 2 * hidden]: the class token, then the mean patch
