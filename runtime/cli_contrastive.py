"""`vitrail embed` and `vitrail eval`: contrastive models over folders, tables and webdatasets of any size."""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_options import AsJson, Device, Dtype, Model, console, fail, load_runtime

Mode = Annotated[str, typer.Option(help="c or g: InternVL-C, or InternVL-G, which looks twice.")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels, a multiple of 14; the checkpoint's own if not given.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in one pass.")]
Frames = Annotated[int, typer.Option(min=1, help="Frames sampled from a video.")]
Crop = Annotated[
    bool, typer.Option("--crop/--stretch", help="Cut the middle out of an image, or stretch it to a square.")
]

evaluate = typer.Typer(help="Zero-shot retrieval and classification over a data set.", no_args_is_help=True)


def embed(
    images: Annotated[Path, typer.Argument(help="A folder of images, or a .csv or .tsv with a column `image`.")],
    out: Annotated[Path, typer.Option(help="The .npz to write: embeddings, names, failed, errors.")],
    model: Model,
    mode: Mode = "c",
    image_size: ImageSize = None,
    crop: Crop = True,
    raw: Annotated[bool, typer.Option("--raw", help="Embeddings as they come, not of unit length.")] = False,
    videos: Annotated[bool, typer.Option("--videos", help="Take the videos, not the images.")] = False,
    num_frames: Frames = 8,
    batch_size: BatchSize = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Embed all images of a folder into one .npz.

    A run that was killed goes on where it stood when the same command is given again. Images that cannot be read are
    reported at the end and listed in the file; the others are not held up by them.
    """
    if out.suffix != ".npz":
        fail(f"--out {out}: must end in .npz")
    if out.exists() and not overwrite:
        fail(f"--out {out}: exists already; --overwrite replaces it")
    if not out.parent.is_dir():
        fail(f"--out {out}: its folder does not exist")
    named = _sources(images, videos)
    kind = "video" if videos else "image"
    if not named:
        fail(f"{images}: holds no {kind}s")
    with load_runtime(model, dtype, device, embeds="embed") as runtime:
        from .embedding_file import EmbeddingFile

        keywords: dict[str, Any] = {"mode": mode, "normalize": not raw, "image_size": image_size, "crop": crop}
        keywords |= {"kind": kind, "num_frames": num_frames, "batch_size": batch_size}
        runtime.embed_each((), **keywords)  # a mistake is refused before anything is written
        settings = {"model": model, "dtype": dtype, **keywords}
        file = EmbeddingFile(out, [name for name, _ in named], settings, runtime.model.config.embed_dim)
        _embed_into(file, runtime, [source for _, source in named], keywords)
        failed = {file.names[index]: reason for index, reason in file.failed.items()}
        file.finish()
    if as_json:
        print(json.dumps({"out": str(out), "embedded": len(named) - len(failed), "failed": failed}))
        return
    _report(failed, len(named), kind)
    print(f"{len(named) - len(failed)} embeddings in {out}")


def _sources(images: Path, videos: bool) -> list[tuple[str, Path]]:
    """Names and files of what is to be embedded."""
    from .datasets import IMAGE_SUFFIXES, VIDEO_SUFFIXES, media_files, read_samples

    if images.is_dir():
        files = media_files(images, VIDEO_SUFFIXES if videos else IMAGE_SUFFIXES)
        return [(file.relative_to(images).as_posix(), file) for file in files]
    samples = [sample for sample in read_samples(images) if sample.is_video == videos]
    found = [(sample.name, sample.source) for sample in samples if isinstance(sample.source, Path)]
    if len(found) < len(samples):
        fail(f"{images}: embed reads folders and tables; `vitrail eval` reads webdatasets")
    return found


def _embed_into(file: Any, runtime: Any, sources: list[Path], keywords: dict[str, Any]) -> None:
    """Embed what the file still lacks; it takes whole batches, so that each is the same one in every run."""
    from tqdm import tqdm

    from .errors import VitrailError

    batch: list[Any] = []
    # Taken over from a killed run, `done` is a multiple of the batch.
    rows = runtime.embed_each(sources[file.done :], start=file.done + 1, **keywords)
    with tqdm(
        rows, desc="embedding", unit=keywords["kind"], total=len(sources), initial=file.done, disable=None
    ) as bar:
        for row in bar:
            batch.append(str(row) if isinstance(row, VitrailError) else row.numpy())
            if len(batch) == keywords["batch_size"]:
                file.append(batch)
                batch = []
    if batch:
        file.append(batch)


@evaluate.command()
def retrieval(
    data: Annotated[Path, typer.Argument(help="A folder, a .csv or .tsv, a webdataset; with captions.")],
    model: Model,
    mode: Mode = "c",
    k: Annotated[list[int] | None, typer.Option("--k", min=1, help="Recall at k; 1, 5 and 10 if not given.")] = None,
    image_size: ImageSize = None,
    crop: Crop = False,
    dual_softmax: Annotated[
        bool | None, typer.Option("--dual-softmax/--no-dual-softmax", help="Also re-rank; the default for videos.")
    ] = None,
    num_frames: Frames = 8,
    batch_size: BatchSize = 32,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Recall of images (or videos) by their captions, and of captions by their images."""
    from .datasets import read_samples

    samples = read_samples(data)
    with load_runtime(model, dtype, device, embeds="eval retrieval") as runtime, _plain_warnings():
        from .evaluation import evaluate_retrieval

        found = evaluate_retrieval(
            runtime,
            samples,
            ks=k or (1, 5, 10),
            dual_softmax=dual_softmax,
            mode=mode,
            image_size=image_size,
            crop=crop,
            num_frames=num_frames,
            batch_size=batch_size,
        )
    if as_json:
        print(json.dumps({"model": model, "mode": mode, **found.to_dict()}))
        return
    _report(found.failed, found.num_images + len(found.failed), "image")
    table = Table(title=f"{found.num_images} images, {found.num_texts} captions", title_justify="left")
    columns = list(found.recall["text_to_image"])
    for column in ("", *columns):
        table.add_column(column)
    for name, recalls in (("", found.recall), (", dual softmax", found.dual_softmax or {})):
        for way, values in recalls.items():
            table.add_row(way.replace("_", " ") + name, *(f"{values[column]:.2f}" for column in columns))
    console.print(table)


@evaluate.command()
def classification(
    data: Annotated[Path, typer.Argument(help="A folder of folders, a .csv or .tsv, a webdataset; with labels.")],
    model: Model,
    mode: Mode = "c",
    classes: Annotated[
        str | None, typer.Option(help="A ready-made set (imagenet, cifar10-zh ...) or a file, a name a line.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="A language (en, zh, ja, ar, it), one prompt with {}, or a file of them.")
    ] = None,
    image_size: ImageSize = None,
    crop: Crop = True,
    batch_size: BatchSize = 32,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Zero-shot accuracy. Without --classes the labels of the data are the class names."""
    from .datasets import read_samples

    samples = read_samples(data)
    names, forms = _class_names(classes), _lines_or_value(templates)
    with load_runtime(model, dtype, device, embeds="eval classification") as runtime, _plain_warnings():
        from .evaluation import evaluate_classification

        found = evaluate_classification(
            runtime, samples, names, forms, mode=mode, image_size=image_size, crop=crop, batch_size=batch_size
        )
    if as_json:
        print(json.dumps({"model": model, "mode": mode, **found.to_dict()}))
        return
    _report(found.failed, found.num_images + len(found.failed), "image")
    table = Table(title=f"{found.num_images} images, {found.num_classes} classes", title_justify="left")
    for column in ("top 1", "top 5", "mean per class"):
        table.add_column(column)
    table.add_row(*(f"{value:.2f}" for value in (found.top1, found.top5, found.mean_per_class)))
    console.print(table)


def _lines_or_value(value: str | None) -> str | list[str] | None:
    """The lines of a file that are not empty; any other value as it is."""
    if value is None or not Path(value).is_file():
        return value
    try:
        lines = Path(value).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        fail(f"{value}: not readable as text")
    return [line.strip() for line in lines if line.strip()]


def _class_names(value: str | None) -> str | list[str | list[str]] | None:
    """A ready-made set, or the classes of a file: one a line, several names of one separated by `|`."""
    lines = _lines_or_value(value)
    if lines is None or isinstance(lines, str):
        return lines
    return [[name.strip() for name in line.split("|")] for line in lines]


def _report(failed: dict[str, str], total: int, kind: str) -> None:
    """What could not be read, on stderr: the first few, and how many."""
    for name, reason in list(failed.items())[:5]:
        print(f"vitrail: {name}: {reason}", file=sys.stderr)
    if failed:
        print(f"vitrail: {len(failed)} of {total} {kind}s could not be read", file=sys.stderr)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in the code that gave them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(f"vitrail: {warning.message}", file=sys.stderr)
