"""What the scheduler knows of requests, and what it decides for one step. Plain Python: no torch, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..request import FinishReason


@dataclass(eq=False)
class Image:
    """The place of an image in a prompt, and how many of its tiles have become visual tokens.

    key: 32 bytes that name what the model sees; two images of one key are the same image.
    num_sent: tiles given to the vision half; num_encoded: those, from the first on, whose visual tokens are there.
    kept: its visual tokens stay at hand whatever happens to the request.
    """

    start: int
    num_tokens: int
    num_tiles: int
    key: bytes = b""
    num_sent: int = 0
    num_encoded: int = 0
    kept: bool = False

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def tokens_per_tile(self) -> int:
        return self.num_tokens // self.num_tiles

    @property
    def num_unsent(self) -> int:
        return 0 if self.kept else self.num_tiles - self.num_sent

    @property
    def available(self) -> int:
        """The first position whose visual token is not there yet."""
        return self.start + self.num_encoded * self.tokens_per_tile


def image_places(
    token_ids: Sequence[int], context_token_id: int, num_tiles: Sequence[int], tokens_per_tile: int
) -> list[Image]:
    """Where each image of a prompt stands: stretches of the context token, which no text of a user becomes."""
    images: list[Image] = []
    for tiles in num_tiles:
        start = token_ids.index(context_token_id, images[-1].end if images else 0)
        images.append(Image(start, tiles * tokens_per_tile, tiles))
    return images


@dataclass(eq=False)
class SequenceState:
    """One completion. token_ids: the answer so far; num_computed: tokens of prompt and answer that are in the cache."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_computed: int = 0
    block_keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed


@dataclass(eq=False)
class RequestState:
    """A request as the scheduler sees it; `planned_length`: tokens of the prompt and of the longest answer.

    prefix_key: 32 bytes of everything that keys and values depend on beside tokens and images.
    started: the prompt has been run, and every completion has a row of its own.
    """

    arrival: int
    prompt_token_ids: list[int]
    planned_length: int
    images: list[Image]
    sequences: Sequence[SequenceState]
    prefix_key: bytes = bytes(32)
    started: bool = False
    num_cached_tokens: int = 0

    @property
    def live(self) -> list[SequenceState]:
        """The sequences that need rows; until the prompt has been run one of them stands for all."""
        sequences = self.sequences if self.started else self.sequences[:1]
        return [sequence for sequence in sequences if sequence.finish_reason is None]

    @property
    def num_rows(self) -> int:
        return len(self.live) if self.started else len(self.sequences)

    def length(self, sequence: SequenceState) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt_token_ids) + len(sequence.token_ids)

    def tokens(self, sequence: SequenceState, start: int, end: int) -> list[int]:
        """The token ids at positions start .. end of prompt and answer."""
        prompt = len(self.prompt_token_ids)
        return [
            *self.prompt_token_ids[start:end],
            *sequence.token_ids[max(0, start - prompt) : max(0, end - prompt)],
        ]


R = TypeVar("R", bound=RequestState)


@dataclass(frozen=True, eq=False)
class Tiles(Generic[R]):
    """Tiles first .. first + count of the image at `place` of a request, to be encoded.

    Sent again after a preemption, the same tiles are another of these.
    """

    request: R
    place: int
    first: int
    count: int


@dataclass(frozen=True)
class Chunk(Generic[R]):
    """Positions start .. end of a sequence, to be run; `samples`: the last of them gives the sequence's next token."""

    request: R
    index: int
    start: int
    end: int
    samples: bool
    decodes: bool = False


@dataclass
class Batch(Generic[R]):
    """One step: blocks to be copied (source, target), then tiles to be encoded, then chunks to be run in one pass."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    tiles: list[Tiles[R]] = field(default_factory=list)
    chunks: list[Chunk[R]] = field(default_factory=list)
    preempted: list[R] = field(default_factory=list)

    @property
    def requests(self) -> list[R]:
        """The requests that this step moves, each once."""
        moved = [*(tiles.request for tiles in self.tiles), *(chunk.request for chunk in self.chunks)]
        return list({id(request): request for request in moved}.values())

    @property
    def num_tiles(self) -> int:
        return sum(tiles.count for tiles in self.tiles)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)
