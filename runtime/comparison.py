"""How far apart two runtimes of one model are: what they see, what they expect next, what they answer.

They are loaded one after the other, never together. Each sees the same tiles and answers the same prompts greedily;
the second also reads the first one's answers, so that what both expect at every position can be compared.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .api import Runtime
from .calibration import Example, prepare_examples
from .engine.processor import Prepared
from .errors import InvalidRequestError, UnsupportedError
from .layers.parallel import WHOLE
from .layers.rotary import inverse_frequencies

TILES_AT_ONCE = 8


@dataclass(frozen=True)
class Answers:
    """A question, the image's name, and what both runtimes say."""

    image: str
    prompt: str
    a: str
    b: str


@dataclass(frozen=True)
class Comparison:
    """visual_cosine_*: of visual tokens, one against the other. logit_kl: mean of KL(A || B) in nats over all
    positions of A's answers and their ends. equal_answers: share of prompts. equal_tokens: share of the positions of
    the longer answer at which both have the same token. skipped: images that could not be used, with reasons.
    """

    visual_cosine_mean: float
    visual_cosine_min: float
    logit_kl: float
    equal_answers: float
    equal_tokens: float
    answers: list[Answers]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Observed:
    prompt: Prepared
    visual: Tensor  # [visual tokens, hidden], on the CPU
    token_ids: list[int]
    text: str
    log_probs: Tensor  # [positions, vocab], on the CPU; of the answer that was read


def compare(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 32,
    max_tiles: int | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Compare two runtimes, given as keywords of `Runtime.from_pretrained`, on the questions of examples."""
    questions = [replace(example, answer="") for example in examples]
    show = None if progress is None else not progress
    with tqdm(total=2 * len(questions), desc="comparing", unit="prompt", disable=show) as bar:
        first, used, skipped = _observe(a, questions, None, max_new_tokens, max_tiles, bar)
        second, _, _ = _observe(b, used, first, max_new_tokens, max_tiles, bar)
    cosine = torch.cat(
        [
            torch.cosine_similarity(x.visual.float(), y.visual.float(), dim=-1)
            for x, y in zip(first, second, strict=True)
        ]
    )
    kl = torch.cat([distance(x.log_probs, y.log_probs) for x, y in zip(first, second, strict=True)])
    pairs = [(x.token_ids, y.token_ids) for x, y in zip(first, second, strict=True)]
    equal = sum(sum(map(int.__eq__, x, y)) for x, y in pairs)
    longest = sum(max(len(x), len(y)) for x, y in pairs)
    return Comparison(
        visual_cosine_mean=float(cosine.mean()),
        visual_cosine_min=float(cosine.min()),
        logit_kl=float(kl.mean()),
        equal_answers=sum(x == y for x, y in pairs) / len(pairs),
        equal_tokens=equal / longest if longest else 1.0,
        answers=[
            Answers(example.images[0].name, example.prompt, x.text, y.text)
            for example, x, y in zip(used, first, second, strict=True)
        ],
        skipped=skipped,
    )


def distance(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of each row in nats. a, b: (rows, vocab) log-probabilities."""
    return (a.exp() * (a - b)).sum(-1).clamp(min=0)  # rounding takes what is zero below it


def _observe(
    keywords: Mapping[str, Any],
    examples: Sequence[Example],
    follow: Sequence[_Observed] | None,
    max_new_tokens: int,
    max_tiles: int | None,
    bar: Any,
) -> tuple[list[_Observed], list[Example], dict[str, str]]:
    """Load a runtime and ask it everything. follow: whose answers are read; its own if None."""
    with _loaded(keywords) as runtime, torch.inference_mode():
        if runtime.model.part != WHOLE:
            raise UnsupportedError("a comparison reads both halves in this process; load with placement='colocated'")
        found = prepare_examples(runtime.processor, examples, max_tiles)
        bar.total -= (1 if follow else 2) * len(found.skipped)
        if follow is not None and [p.token_ids for p in found.prompts] != [o.prompt.token_ids for o in follow]:
            raise InvalidRequestError(f"{keywords['model']}: reads the prompts as other tokens; compare one model only")
        observed = []
        for index, (prompt, example) in enumerate(zip(found.prompts, found.examples, strict=True)):
            # One at a time: rows of a batch are summed in another order, and answers are to differ by weights alone.
            output = runtime.generate(
                example.prompt, list(example.images), max_new_tokens=max_new_tokens, max_tiles=max_tiles, temperature=0
            )
            visual = _visual_tokens(runtime, prompt)
            read = output.token_ids if follow is None else follow[index].token_ids
            log_probs = _log_probs(runtime, prompt, visual, read, max_new_tokens)
            observed.append(_Observed(prompt, visual.cpu(), output.token_ids, output.text, log_probs.cpu()))
            bar.update()
    return observed, found.examples, found.skipped


def _loaded(keywords: Mapping[str, Any]) -> Runtime:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rounded to nearest")  # what it costs is what is being asked
        return Runtime.from_pretrained(**keywords)


def _visual_tokens(runtime: Runtime, prompt: Prepared) -> Tensor:
    """(visual tokens, hidden), on the runtime's device."""
    tiles = torch.cat([torch.from_numpy(tiles) for tiles in prompt.tiles])
    parts = [runtime.model.encode_tiles(part.to(runtime.device)) for part in tiles.split(TILES_AT_ONCE)]
    return torch.cat(parts).flatten(0, 1)


def _log_probs(runtime: Runtime, prompt: Prepared, visual: Tensor, answer: list[int], max_new_tokens: int) -> Tensor:
    """(len(answer) + 1, vocab) fp32: what is expected at each token of an answer, and behind it."""
    model = runtime.model
    ids = torch.tensor([*prompt.token_ids, *answer], device=runtime.device)
    x = model.splice(ids, visual, runtime.engine.context_token_id)
    planned = len(prompt.token_ids) + max_new_tokens
    inv_freq = inverse_frequencies(model.config.llm, planned).to(runtime.device)
    positions = torch.arange(len(ids), device=runtime.device)[None]
    hidden = model.language_model(x[None], positions, inv_freq)[0, -len(answer) - 1 :]
    return torch.log_softmax(model.language_model.logits(hidden), dim=-1)
