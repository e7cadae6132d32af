"""Zero-shot classes: prompts in five languages, ready-made lists of names, and what a classification gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .class_names import CIFAR10, IMAGENET
from .errors import InvalidRequestError

ClassNames = str | Sequence[str | Sequence[str]]

# How a picture of something is spoken of. `{}` is the name's place.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of one {}.",
        "a photo of many {}.",
        "a blurry photo of a {}.",
        "a sharp photo of a {}.",
        "a dark photo of a {}.",
        "a bright photo of the {}.",
        "a close-up of a {}.",
        "a {} seen from far away.",
        "a part of a {}.",
        "a small {} in a photo.",
        "a large {} in a photo.",
        "a black and white photo of a {}.",
        "a drawing of a {}.",
        "a painting of the {}.",
        "a {} in a video game.",
        "a toy {}.",
        "an old {}.",
        "{}.",
    ),
    "zh": (
        "一张{}的照片。",
        "一张{}的图片。",
        "照片里有{}。",
        "一张模糊的{}的照片。",
        "一张清晰的{}的照片。",
        "一张{}的特写。",
        "一幅{}的画。",
        "{}。",
    ),
    "ja": (
        "{}の写真。",
        "{}が写っている写真。",
        "ぼやけた{}の写真。",
        "{}を近くから撮った写真。",
        "小さな{}の写真。",
        "{}の絵。",
        "白黒の{}の写真。",
        "{}。",
    ),
    "ar": (
        "صورة {}.",
        "صورة فوتوغرافية تظهر {}.",
        "صورة ضبابية {}.",
        "صورة قريبة {}.",
        "رسم {}.",
        "{}.",
    ),
    "it": (
        "una foto di {}.",
        "una foto in cui si vede {}.",
        "una foto sfocata di {}.",
        "un primo piano di {}.",
        "una foto in bianco e nero di {}.",
        "un disegno di {}.",
        "un dipinto di {}.",
        "{}.",
    ),
}

# Ready-made lists, in the order of the data sets' own labels: name -> (language, names).
CLASS_SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "imagenet": ("en", IMAGENET),
    **{f"cifar10-{language}": (language, names) for language, names in CIFAR10.items()},
}


@dataclass(frozen=True, eq=False)
class Classification:
    """What `classify` found: for each image a probability of each class."""

    class_names: list[str]
    probabilities: Tensor  # [images, classes], float32

    @property
    def labels(self) -> list[str]:
        """The name of the likeliest class of each image."""
        return [self.class_names[index] for index in self.probabilities.argmax(-1).tolist()]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image the k likeliest classes, best first, with their probabilities."""
        best = self.probabilities.topk(min(k, len(self.class_names)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self.class_names[index], value) for index, value in zip(*row, strict=True)] for row in pairs]


def class_prompts(
    class_names: ClassNames, templates: str | Sequence[str] | None = None
) -> tuple[list[str], tuple[tuple[str, ...], ...]]:
    """The name that stands for each class, and its prompts: every one of its names in every template."""
    language = "en"
    if isinstance(class_names, str):
        if class_names not in CLASS_SETS:
            known = ", ".join(CLASS_SETS)
            raise InvalidRequestError(f"class_names={class_names!r}: no such set; known: {known}; or give a list")
        language, class_names = CLASS_SETS[class_names]
    synonyms = [_names(number, entry) for number, entry in enumerate(_listed("class_names", class_names), start=1)]
    forms = _templates(language if templates is None else templates)
    prompts = tuple(tuple(form.replace("{}", name) for name in names for form in forms) for names in synonyms)
    return [names[0] for names in synonyms], prompts


def _templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str):
        if templates in TEMPLATES:
            return TEMPLATES[templates]
        if "{}" not in templates:
            raise InvalidRequestError(
                f"templates={templates!r}: must hold a {{}} for the class name, or be one of {', '.join(TEMPLATES)}"
            )
        return (templates,)
    forms = tuple(_listed("templates", templates))
    for number, form in enumerate(forms, start=1):
        if not isinstance(form, str) or "{}" not in form:
            raise InvalidRequestError(f"templates: entry {number}, {form!r}, has no {{}} for the class name")
    return forms


def _names(number: int, entry: str | Sequence[str]) -> tuple[str, ...]:
    names = (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, list | tuple) else ()
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InvalidRequestError(f"class_names: entry {number} must be a name or a list of names, not {entry!r}")
    return names


def _listed(what: str, values: Any) -> Sequence[Any]:
    if not isinstance(values, list | tuple) or not values:
        raise InvalidRequestError(f"{what}: must be a list that is not empty, not {values!r}")
    return values
