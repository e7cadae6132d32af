"""Zero-shot retrieval and classification over a data set, as the paper's tables measure them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .contrastive import ContrastiveCalls
from .datasets import Sample
from .errors import InvalidRequestError, VitrailError
from .retrieval import retrieval_recall
from .zero_shot import ClassNames, class_prompts


@dataclass(frozen=True)
class Retrieval:
    """Recall in percent, text to image and image to text; for videos also after re-ranking by dual softmax."""

    num_images: int
    num_texts: int
    recall: dict[str, dict[str, float]]
    dual_softmax: dict[str, dict[str, float]] | None
    failed: dict[str, str]  # name -> why it could not be read

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Accuracy:
    """Zero-shot accuracy in percent. `mean_per_class` weighs every class that occurs alike."""

    num_images: int
    num_classes: int
    top1: float
    top5: float
    mean_per_class: float
    failed: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_retrieval(
    runtime: ContrastiveCalls,
    samples: Iterable[Sample],
    *,
    ks: Sequence[int] = (1, 5, 10),
    dual_softmax: bool | None = None,
    progress: bool | None = None,
    **keywords: Any,
) -> Retrieval:
    """Recall of images by their captions and of captions by their images.

    keywords: of `Runtime.embed_each`; images are stretched unless `crop=True`, as in the reference. dual_softmax: also
    report it; None means for videos. Samples that cannot be read are left out, with their captions.
    """
    kept, images, failed = _embedded(runtime, samples, progress, {"crop": False, **keywords})
    for sample in kept:
        if not sample.captions:
            raise InvalidRequestError(f"{sample.name}: has no caption, which retrieval needs")
    captions = [caption for sample in kept for caption in sample.captions]
    owners = [index for index, sample in enumerate(kept) for _ in sample.captions]
    texts = runtime.embed(texts=captions)
    reranks = kept[0].is_video if dual_softmax is None else dual_softmax
    return Retrieval(
        len(kept),
        len(captions),
        retrieval_recall(images, texts, owners, ks),
        retrieval_recall(images, texts, owners, ks, dual_softmax=True) if reranks else None,
        failed,
    )


def evaluate_classification(
    runtime: ContrastiveCalls,
    samples: Iterable[Sample],
    class_names: ClassNames | None = None,
    templates: str | Sequence[str] | None = None,
    *,
    progress: bool | None = None,
    **keywords: Any,
) -> Accuracy:
    """Top-1 and top-5 accuracy. class_names, templates: as `Runtime.classify`; None takes the labels for names.

    A label is a class name, or the number of one, counted from 0. Where it is neither, and there are as many labels as
    classes, labels in their alphabetical order are the classes in theirs (ImageNet's folders).
    """
    if class_names is not None:
        class_prompts(class_names, templates)  # a mistake is refused before the data is read
    kept, images, failed = _embedded(runtime, samples, progress, keywords)
    labels = []
    for sample in kept:
        if sample.label is None:
            raise InvalidRequestError(f"{sample.name}: has no label, which classification needs")
        labels.append(sample.label)
    if class_names is None:
        class_names = sorted(set(labels))
    names, _ = class_prompts(class_names, templates)
    targets = torch.tensor(_label_indices(labels, names))
    order = (images @ runtime.classifier(class_names, templates).T).topk(min(5, len(names))).indices
    hits = order == targets[:, None]
    right = hits[:, 0].double()
    per_class = [right[targets == target].mean() for target in targets.unique()]
    return Accuracy(
        len(kept),
        len(names),
        100 * right.mean().item(),
        100 * hits.any(1).double().mean().item(),
        100 * torch.stack(per_class).mean().item(),
        failed,
    )


def _label_indices(labels: Sequence[str], names: Sequence[str]) -> list[int]:
    found = sorted(set(labels))
    if set(found) <= set(names):
        indices = {name: index for index, name in enumerate(names)}
    elif all(label.isascii() and label.isdigit() and int(label) < len(names) for label in found):
        indices = {label: int(label) for label in found}
    elif len(found) == len(names):
        indices = {label: index for index, label in enumerate(found)}
    else:
        unknown = next(label for label in found if label not in names)
        raise InvalidRequestError(
            f"label {unknown!r} is none of the {len(names)} classes, and {len(found)} labels are not as many as those"
        )
    return [indices[label] for label in labels]


def _embedded(
    runtime: ContrastiveCalls, samples: Iterable[Sample], progress: bool | None, keywords: dict[str, Any]
) -> tuple[list[Sample], Tensor, dict[str, str]]:
    """The samples that could be read, without their bytes, with their unit embeddings, and why others could not."""
    source = iter(samples)
    first = next(source, None)
    if first is None:
        raise InvalidRequestError("the data set holds no images and no videos")
    kind = "video" if first.is_video else "image"
    drawn: list[Sample] = []

    def draw() -> Iterator[Any]:
        for sample in chain([first], source):
            if sample.is_video != first.is_video:
                raise InvalidRequestError(f"{sample.name}: images and videos do not go together in one evaluation")
            drawn.append(replace(sample, source=b""))
            yield sample.source

    kept: list[Sample] = []
    rows: list[Tensor] = []
    failed: dict[str, str] = {}
    embedded = runtime.embed_each(draw(), kind=kind, **keywords)
    with tqdm(embedded, desc="embedding", unit=kind, disable=None if progress is None else not progress) as bar:
        for index, row in enumerate(bar):
            if isinstance(row, VitrailError):
                failed[drawn[index].name] = str(row)
            else:
                kept.append(drawn[index])
                rows.append(row)
    if not kept:
        raise InvalidRequestError(f"none of {len(drawn)} {kind}s can be read; the first: {next(iter(failed.values()))}")
    return kept, F.normalize(torch.stack(rows), dim=-1), failed
