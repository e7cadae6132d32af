"""What the commands share: options that several have, the console, and how a mistake ends."""

import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from .api import Runtime

# Wide in a pipe, so that no line of a table is cut where nobody resizes it.
console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)

Model = Annotated[str, typer.Option("--model", "-m", help="A local folder, a hub id or `nano`.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the best present if not given.")]
Quantization = Annotated[str | None, typer.Option(help="Round the language half while loading: int8, int4 ...")]
VisionQuantization = Annotated[str | None, typer.Option(help="Round the vision half while loading: int8 ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def fail(message: str) -> NoReturn:
    """Say what was wrong in one line on stderr and exit with status 2."""
    print(f"vitrail: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def load_runtime(
    model: str,
    dtype: str,
    device: str | None,
    *,
    embeds: str | None = None,
    quantization: str | None = None,
    vision_quantization: str | None = None,
) -> "Runtime":
    """The Runtime of a chat model; loading it imports torch, which no command should before its options are read.

    embeds: the call that needs a contrastive model instead. A model of the wrong kind is refused by its config alone.
    """
    from .api import Runtime
    from .config import load_any_config
    from .loaded import require_chat, require_contrastive
    from .weights import resolve_checkpoint

    config = load_any_config(resolve_checkpoint(model))
    if embeds is None:
        require_chat(config, model)
    else:
        require_contrastive(config, model, embeds)
    return Runtime.from_pretrained(
        model, dtype=dtype, device=device, quantization=quantization, vision_quantization=vision_quantization
    )
