"""The `vitrail` command. Long work shows a bar on a terminal and none in a pipe; `--json` is for programs.

A caller's mistake prints one line on stderr, an unknown option its usage, and exits with status 2.
"""

import importlib
import json
import math
import platform
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .cli_contrastive import embed, evaluate
from .cli_export import export_app
from .cli_kernels import build_kernels
from .cli_options import AsJson, Device, Dtype, Model, Quantization, VisionQuantization, console, fail, load_runtime
from .cli_plan import plan
from .cli_quantize import quantize, verify
from .cli_serve import serve
from .errors import VitrailError
from .request import GenerationConfig

if TYPE_CHECKING:
    from .config import InternVLConfig

app = typer.Typer(
    name="vitrail",
    help="Inference runtime for the InternVL vision-language family.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
MaxNewTokens = Annotated[int, typer.Option(help="The longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; sampling from above it.")]
MaxTiles = Annotated[int | None, typer.Option(help="The most tiles an image may take.")]


def main() -> None:
    """Run the command line; mistakes of the caller end in one line and exit status 2."""
    warnings.formatwarning = lambda message, *_: f"vitrail: {message}\n"  # the place in the code helps no user
    try:
        app()
    except VitrailError as error:
        fail(str(error))


app.command()(embed)
app.add_typer(evaluate, name="eval")
app.add_typer(export_app, name="export")
app.command()(build_kernels)
app.command()(plan)
app.command()(quantize)
app.command()(verify)
app.command()(serve)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The question; `<image>` marks where an image goes.")],
    image: Annotated[list[str] | None, typer.Option("--image", "-i", help="An image file; may be repeated.")] = None,
    video: Annotated[str | None, typer.Option(help="A video file; frames are sampled from it.")] = None,
    pdf: Annotated[str | None, typer.Option(help="A PDF file; each page is an image.")] = None,
    model: Model = "nano",
    system: Annotated[str | None, typer.Option(help="A system message in place of the checkpoint's.")] = None,
    max_tiles: MaxTiles = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write a timeline in Chrome's trace format.")] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    quantization: Quantization = None,
    vision_quantization: VisionQuantization = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question, about images if there are any."""
    if sum((bool(image), video is not None, pdf is not None)) > 1:
        fail("give --image, --video or --pdf, not several of them")
    # Before the model: a mistake should not cost the minutes that loading takes.
    config = GenerationConfig(
        max_tiles=max_tiles, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    images: list[Any] = list(image or [])
    if pdf is not None:
        from .pdf import render_pages

        images = list(render_pages(pdf))
    keywords: dict[str, Any] = {"video": video, "system": system, "generation_config": config}
    loaded = load_runtime(model, dtype, device, quantization=quantization, vision_quantization=vision_quantization)
    with loaded as runtime, runtime.trace(trace) if trace else nullcontext():
        if stream and not as_json:
            for delta in runtime.stream(prompt, images, **keywords):
                print(delta.text, end="", flush=True)
            print()
            return
        output = runtime.generate(prompt, images, **keywords)
        if as_json:
            print(json.dumps({"model": model, "load_ms": runtime.load_ms, **output.to_dict()}, ensure_ascii=False))
            return
        print(output.text)
        usage, metrics = output.usage, output.metrics
        # The answer alone goes to stdout, so that it can be piped on.
        print(
            f"{_counted(usage.image_tiles, 'tile')}, {usage.prompt_tokens} prompt tokens "
            f"({usage.image_tokens} of images), {_counted(usage.completion_tokens, 'token')} of answer\n"
            f"load {runtime.load_ms:.0f} ms, preprocess {metrics.preprocess_ms:.1f} ms, "
            f"vision {metrics.vision_ms:.1f} ms, first token {metrics.ttft_ms:.1f} ms, "
            f"then {metrics.tpot_ms:.2f} ms a token, in all {metrics.e2e_ms:.1f} ms",
            file=sys.stderr,
        )


@app.command()
def chat(
    model: Model = "nano",
    image: Annotated[list[str] | None, typer.Option("--image", "-i", help="An image for the first question.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message in place of the checkpoint's.")] = None,
    max_tiles: MaxTiles = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    quantization: Quantization = None,
    vision_quantization: VisionQuantization = None,
) -> None:
    """Talk to a model; answers stream. /image FILE adds an image to the next question, /reset forgets, /quit ends."""
    config = GenerationConfig(max_tiles=max_tiles, max_new_tokens=max_new_tokens, temperature=temperature)
    history: list[tuple[str, str]] = []
    images: list[Any] = []
    pending: list[Any] = list(image or [])
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 are refused as a question, not here
    loaded = load_runtime(model, dtype, device, quantization=quantization, vision_quantization=vision_quantization)
    with loaded as runtime:
        while True:
            line = _read_line()
            if line is None or line == "/quit":
                return
            if line == "/reset":
                history, images, pending = [], [], []
                continue
            command, _, argument = line.partition(" ")
            if command == "/image":
                if argument:
                    pending.append(argument.strip())
                else:
                    print("vitrail: /image needs a file", file=sys.stderr)
                continue
            if not line:
                continue
            question = _numbered(line, len(images), len(pending))
            try:
                answer = ""
                for delta in runtime.stream(
                    question, [*images, *pending], history=history, system=system, generation_config=config
                ):
                    print(delta.text, end="", flush=True)
                    answer += delta.text
                print()
            except VitrailError as error:
                # The conversation goes on without the question that was refused, and without its images.
                print(f"vitrail: {error}", file=sys.stderr)
                pending = []
                continue
            history.append((question, answer))
            images, pending = [*images, *pending], []


def _numbered(line: str, shown: int, added: int) -> str:
    """A question with places for the images added to it, numbered on from those shown before."""
    from .prompt import IMAGE_MARK

    if not added or IMAGE_MARK in line:
        return line
    if shown + added == 1:
        return f"{IMAGE_MARK}\n{line}"
    return "".join(f"Image-{shown + number}: {IMAGE_MARK}\n" for number in range(1, added + 1)) + line


def _read_line() -> str | None:
    """The next line, None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id or `nano`.")] = "nano",
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is: its halves, parameters, memory at each dtype, tokens per image."""
    from .config import ContrastiveConfig, InternVLConfig, load_any_config
    from .quantization.formats.detect import stored_format
    from .weights import expected_tensors, resolve_checkpoint

    folder = resolve_checkpoint(model)
    config, stored = load_any_config(folder), stored_format(folder)
    vision = config.vision if isinstance(config, InternVLConfig | ContrastiveConfig) else config
    shapes = expected_tensors(config)
    sizes = {"vision": 0, "projector": 0, "language": 0}
    for name, shape in shapes.items():
        sizes[_half(name)] += math.prod(shape)
    total = sum(sizes.values())
    facts: dict[str, Any] = {
        "folder": str(folder),
        "architecture": f"InternViT {vision.hidden_size} x {vision.num_hidden_layers} blocks",
        "tensors": len(expected_tensors(folder)),
        "quantization": None if stored is None else stored.describe(),
        "parameters": {**sizes, "total": total},
        "weight_bytes": {"float32": 4 * total, "bfloat16": 2 * total, "int8": total, "int4": total // 2},
    }
    rows = [("image", f"{vision.image_size} px, {vision.grid_size**2} patches")]
    if isinstance(config, InternVLConfig):
        facts |= _chat_facts(config)
        most = facts["tokens_per_image"]["most"] // config.tokens_per_tile
        rows = [
            ("template", config.template),
            ("KV cache", f"{_bytes(config.llm.kv_bytes_per_token)} a token in 16 bits"),
            ("context", f"{config.llm.max_model_len} tokens"),
            ("tiles", f"{config.tile_size} px, {config.tokens_per_tile} tokens each, at most {most} an image"),
        ]
    elif isinstance(config, ContrastiveConfig):
        llm = config.llm
        facts["architecture"] += f", QLLaMA {llm.hidden_size} x {llm.num_hidden_layers} layers"
        facts |= {"embed_dim": config.embed_dim, "queries": config.num_query_tokens}
        grounded = f", and G by {config.num_query_tokens} queries" if config.num_query_tokens else " alone"
        rows.append(("embeddings", f"{config.embed_dim} numbers; InternVL-C{grounded}"))
    if as_json:
        print(json.dumps({**facts, "config": asdict(config)}, ensure_ascii=False))
        return
    table = Table(show_header=False, box=None)
    table.add_row("checkpoint", str(folder))
    table.add_row("architecture", facts["architecture"])
    table.add_row("parameters", ", ".join(f"{half} {_millions(size)}" for half, size in sizes.items() if size))
    table.add_row("in all", f"{_millions(total)} in {facts['tensors']} tensors")
    if stored is not None:
        table.add_row("quantised", stored.describe())
    for dtype, size in facts["weight_bytes"].items():
        table.add_row(f"weights in {dtype}", _bytes(size))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _half(tensor: str) -> str:
    """Which half of a model a checkpoint's tensor belongs to."""
    part = tensor.removeprefix("model.").partition(".")[0]
    if part in ("vision_model", "vision_tower", "embeddings", "encoder"):
        return "vision"
    if part in ("blocks", "cls_token", "pos_embed", "patch_embed"):  # of InternVL-C's original file
        return "vision"
    language = ("language_model", "qllama", "query_tokens", "transformer", "embed_tokens", "layers", "norm", "lm_head")
    return "language" if part in language else "projector"


def _chat_facts(config: "InternVLConfig") -> dict[str, Any]:
    tiles = config.max_dynamic_patch if config.dynamic_image_size else 1
    most = tiles + 1 if config.use_thumbnail and tiles > 1 else tiles
    llm = config.llm
    return {
        "architecture": f"InternViT {config.vision.hidden_size} x {config.vision_depth} blocks, "
        f"{llm.architecture} {llm.hidden_size} x {llm.num_hidden_layers} layers",
        "template": config.template,
        "kv_bytes_per_token": llm.kv_bytes_per_token,
        "context": llm.max_model_len,
        "tile_size": config.tile_size,
        "tokens_per_tile": config.tokens_per_tile,
        "tokens_per_image": {"least": config.tokens_per_tile, "most": most * config.tokens_per_tile},
    }


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Report GPU, driver, versions, and which kernels and extras are active."""
    import torch

    gpus: list[dict[str, Any]] = [
        {
            "name": properties.name,
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        }
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    extras = {
        "cuda": ("triton", "cuda-python", "cuda-core"),
        "quant": ("bitsandbytes",),
        "export": ("onnx", "onnxscript", "onnxruntime"),
        "tensorrt": ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"),
        "video": ("av",),
        "pdf": ("pypdfium2",),
        "structured": ("llguidance",),
        "server": ("fastapi", "uvicorn", "prometheus-client"),
        "otel": ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
        "ray": ("ray",),
    }
    report: dict[str, Any] = {
        "vitrail": version("vitrail"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece")},
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "driver": _driver() if gpus else None,
        "cuda": torch.version.cuda,
        "kernels": _kernels(),
        "extras": {extra: {name: _version(name) for name in names} for extra, names in extras.items()},
    }
    if as_json:
        print(json.dumps(report))
        return
    table = Table(show_header=False, box=None)
    table.add_row("vitrail", f"{report['vitrail']} on Python {report['python']}")
    table.add_row("packages", ", ".join(f"{name} {found}" for name, found in report["packages"].items()))
    table.add_row("CPU threads", str(report["cpu_threads"]))
    if gpus:
        for gpu in gpus:
            table.add_row("GPU", f"{gpu['name']}, {_bytes(gpu['memory'])}, sm_{gpu['capability'].replace('.', '')}")
        table.add_row("driver", f"{report['driver']}; PyTorch was built for CUDA {report['cuda']}")
    else:
        table.add_row("GPU", "none seen: everything runs on the CPU")
    for what, state in report["kernels"].items():
        table.add_row(what, state)
    for extra, packages in report["extras"].items():
        found = [f"{name} {number}" for name, number in packages.items() if number]
        missing = [name for name, number in packages.items() if not number]
        if missing:
            found.append(f"missing {', '.join(missing)} (pip install 'vitrail[{extra}]')")
        table.add_row(f"extra {extra}", ", ".join(found))
    console.print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context, name: Annotated[str, typer.Argument(help="A script of bench/.")]) -> None:
    """Run a benchmark script; what follows its name are the script's own options."""
    from .. import bench as scripts

    files = [file for folder in scripts.__path__ for file in sorted(Path(folder).glob("*.py"))]
    # What scripts share has no `main`; `report` writes the tables of this repository.
    known = [file.stem for file in files if "\ndef main(" in file.read_text("utf-8") and file.stem != "report"]
    if name not in known:
        fail(f"bench: no script {name!r}; known: {', '.join(known)}")
    sys.argv = [f"vitrail bench {name}", *context.args]
    try:
        script = importlib.import_module(f"{scripts.__name__}.{name}")
    except ModuleNotFoundError as error:
        fail(f"bench {name} needs the package {error.name}: pip install 'vitrail[dev]'")
    sys.exit(script.main() or 0)  # the status of those that have marks to keep


def _kernels() -> dict[str, str]:
    """What runs the operations on each kind of device, in words; what is missing, with what is lost for it."""
    from ..kernels import cpu_extension, dispatch
    from ..kernels.language import HAS_TRITON
    from ..kernels.pack import packs

    names = [str(pack.folder) for pack in packs()]
    compiler = f"Triton {_version('triton')}" if HAS_TRITON else "no Triton: plain torch unless a kernel pack is there"
    pack = f"in {', '.join(names)}" if names else "none: kernels are compiled when first used (vitrail build-kernels)"
    tables = [str(found) for found in dispatch.user_tables()]
    table = f"measured here: {', '.join(tables)}" if tables else "shipped (vitrail bench tune measures this GPU)"
    if cpu_extension.extension is None:
        cpu = f"none, {cpu_extension.missing_because}: images are resized by Pillow and quantised models run slowly"
    else:
        cpu = ", ".join(cpu_extension.extension.instruction_sets())
    return {
        "GPU kernels": compiler,
        "kernel pack": pack,
        "dispatch table": table,
        "CPU extension": cpu,
    }


def _driver() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _millions(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
