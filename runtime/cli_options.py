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
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def fail(message: str) -> NoReturn:
    """Say what was wrong in one line on stderr and exit with status 2."""
    print(f"vitrail: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def load_runtime(model: str, dtype: str, device: str | None) -> "Runtime":
    """The Runtime of a model; loading it imports torch, which no command should before its options are read."""
    from .api import Runtime

    return Runtime.from_pretrained(model, dtype=dtype, device=device)
