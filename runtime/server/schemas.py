"""The bodies of requests and answers: what OpenAI's API has, and what is vitrail's own.

Types are strict and unknown fields are refused with the nearest name, since a setting that is passed over in silence
changes answers. Fields that OpenAI's clients send and that change no answer are accepted. Ranges that a schema cannot
say are `GenerationConfig`'s to check.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ..request import (
    MAX_COMPLETIONS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    MAX_STRING_LENGTH,
    MAX_STRINGS,
    MAX_TILES,
    GenerationConfig,
)
from ..video import MAX_FRAMES
from .errors import ApiError

MAX_MESSAGES = 2048
MAX_PARTS = 1024
MAX_PROMPTS = 128
MAX_INPUTS = 2048
MAX_TOKENS = 2**31 - 1

ShortText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STRING_LENGTH)]
ShortTexts = Annotated[list[ShortText], Field(max_length=MAX_STRINGS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TileCap = Annotated[int, Field(ge=1, le=MAX_TILES)]


class Body(BaseModel):
    """What a caller sends."""

    model_config = ConfigDict(extra="forbid", strict=True)


# --- Messages ---


class TextPart(Body):
    """A piece of text. What reads like a placeholder in it is text."""

    type: Literal["text"]
    text: str

    @property
    def urls(self) -> list[str]:
        return []


class MediaUrl(Body):
    """Where an image or a video is: a data URL, or a URL or a file if the server allows it."""

    url: str
    detail: Literal["low", "auto", "high"] | None = Field(None, description="low: 1 tile, high: at most 12")
    max_dynamic_patch: TileCap | None = Field(None, description="The most tiles, without the thumbnail")


class ImagePart(Body):
    """An image."""

    type: Literal["image_url"]
    image_url: MediaUrl | str
    max_dynamic_patch: TileCap | None = None

    @property
    def urls(self) -> list[str]:
        return [_url(self.image_url)]


class VideoUrlPart(Body):
    """A video as one data URL of its frames: data:video/jpeg;base64,FRAME,FRAME,..."""

    type: Literal["video_url"]
    video_url: MediaUrl | str

    @property
    def urls(self) -> list[str]:
        return [_url(self.video_url)]


class FramesPart(Body):
    """A video as the URLs of its frames."""

    type: Literal["video"]
    video: Annotated[list[str], Field(min_length=1, max_length=MAX_FRAMES)]

    @property
    def urls(self) -> list[str]:
        return self.video


Part = Annotated[TextPart | ImagePart | VideoUrlPart | FramesPart, Field(discriminator="type")]


class Message(Body):
    """One turn. What an answer of ours has beside these fields may stand here as null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


def urls_of(messages: list[Message]) -> list[str]:
    """The URLs of all media of a conversation."""
    return [url for one in messages if not isinstance(one.content, str) for part in one.content for url in part.urls]


def _url(media: MediaUrl | str) -> str:
    return media if isinstance(media, str) else media.url


# --- Settings of an answer ---


class JsonSchema(Body):
    """A JSON schema that the answer keeps to."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """An answer of a given schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class PlainFormat(Body):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class RegexFormat(Body):
    """An answer that a regular expression matches."""

    type: Literal["regex"]
    regex: str


class StreamOptions(Body):
    """What else a stream carries."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class MmProcessorKwargs(Body):
    """As vLLM's users write the most tiles an image may take."""

    max_dynamic_patch: TileCap


class GenerationBody(Body):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(None, description="512 if not given")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="greedy if not given")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: ShortText | ShortTexts | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIASES),
        ]
        | None
    ) = None
    response_format: Annotated[JsonSchemaFormat | PlainFormat | RegexFormat, Field(discriminator="type")] | None = None
    user: str | None = Field(None, description="accepted and not used")

    top_k: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    bad_words: ShortTexts | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: ShortText | None = Field(None, description="what is cached is shared with those of the same salt alone")

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def urls(self) -> list[str]:
        """Of all media."""
        return []

    @property
    def num_answers(self) -> int:
        """To each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def generation_config(self, **others: Any) -> GenerationConfig:
        """The settings as the engine takes them. Raises `InvalidRequestError` where two of them contradict."""
        shared = (
            *("max_tokens", "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty"),
            *("logit_bias", "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "bad_words"),
            *("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "cache_salt"),
        )
        given: dict[str, Any] = {name: getattr(self, name) for name in shared}
        if isinstance(self.response_format, JsonSchemaFormat):
            schema = self.response_format.json_schema.schema_
            given["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        elif self.response_format is not None:
            given["response_format"] = self.response_format.model_dump()
        return GenerationConfig(**given | others)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tiles: TileCap | None = Field(None, description="of every image, without its thumbnail")
    total_max_tiles: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(None, description="of all images")
    mm_processor_kwargs: MmProcessorKwargs | None = None

    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="not supported")
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def urls(self) -> list[str]:
        return urls_of(self.messages)

    def config(self) -> GenerationConfig:
        """The settings as the engine takes them."""
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens are two names of one setting: give one of them"
            raise ApiError(400, message, param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        processor = self.mm_processor_kwargs
        caps = [cap for cap in (self.max_tiles, processor and processor.max_dynamic_patch) if cap]
        return self.generation_config(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            max_tiles=min(caps, default=None),
            total_max_tiles=self.total_max_tiles,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions: text to be gone on with, as it stands, without the model's chat template."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="the prompt before each answer")
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    def config(self) -> GenerationConfig:
        """The settings as the engine takes them."""
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo does not go with logprobs: those of prompts are not kept", param="echo")
        return self.generation_config(logprobs=self.logprobs)


class EmbeddingBody(Body):
    """POST /v1/embeddings, for contrastive models (InternVL-C/G): texts, and images as the parts of a message."""

    model: str | None = None
    input: str | Annotated[list[str | TextPart | ImagePart], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(None, description="the model's own only")
    user: str | None = Field(None, description="accepted and not used")
    mode: Literal["c", "g"] | None = Field(None, description="InternVL-C or InternVL-G, for images; c if not given")


class TokenizeBody(Body):
    """POST /tokenize: a prompt as it stands, or messages as the model's template writes them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    max_tiles: TileCap | None = None
    total_max_tiles: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None


# --- Answers. They are written by hand, for speed; these say what they look like. ---


class ErrorDetail(BaseModel):
    """What was wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens: those computed before, those of images, and the tiles these were made of."""

    cached_tokens: int
    image_tokens: int
    image_tiles: int


class UsageBody(BaseModel):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ImageTiles(BaseModel):
    """How an image was cut."""

    grid: Annotated[list[int], Field(min_length=2, max_length=2, description="columns, rows")]
    thumbnail: bool
    tiles: int


class Extras(BaseModel):
    """What vitrail tells beside: how images were cut, and milliseconds by stage."""

    images: list[ImageTiles]
    metrics: dict[str, float]


class TokenLogprob(BaseModel):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token of an answer, and the likeliest ones at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities, a token each."""

    content: list[ChosenLogprob]


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    vitrail: Extras


class TextLogprobs(BaseModel):
    """Log-probabilities in the form of plain completions."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of the answers; those to the first prompt come first."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    """How prompts go on."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody


class Embedding(BaseModel):
    """One row: numbers, or in base64 their bytes as little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """Embeddings in the order of the input."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(BaseModel):
    """A prompt as the model sees it. `images` says how many tiles each image takes."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    image_tokens: int
    image_tiles: int
    images: list[ImageTiles]


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    kind: Literal["chat", "contrastive"]


class ModelList(BaseModel):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(BaseModel):
    """How the server is."""

    status: Literal["loading", "ready", "draining", "dead"]


class Version(BaseModel):
    """The version of vitrail."""

    version: str
