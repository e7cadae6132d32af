"""`vitrail serve`: an OpenAI-compatible server. Its flags are the fields of `server/settings.py`."""

import inspect
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import fail
from .server.settings import Settings, load_settings


def serve(
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings; flags and variables outweigh it.")],
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the settings as such a file and end.")],
    **flags: Any,
) -> None:
    """Serve a model to OpenAI's clients: chat, completions, embeddings, metrics, and a page to try it at /.

    Every flag is a variable as well: VITRAIL_PORT for --port. A flag outweighs the variable, which outweighs the file.
    """
    settings = load_settings(
        {name: None if value in ([], ()) else value for name, value in flags.items()}, config=config
    )
    if print_config:
        print(settings.to_toml(), end="")
        return
    apart = settings.replicas > 1 or settings.vision_replicas > 0
    if apart and find_spec("ray") is None:
        fail("serve with replicas needs the package ray: pip install 'vitrail[server,ray]'")
    try:
        if apart:
            from .server.ray_main import run
        else:
            from .server.main import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "vitrail":
            raise
        fail(f"serve needs the package {error.name}: pip install 'vitrail[server]'")
    raise typer.Exit(run(settings))


def _signature() -> inspect.Signature:
    """The parameters that Typer reads: a flag for every setting, which is None where it was not given."""
    own = inspect.signature(serve).parameters
    parameters = [
        own["config"].replace(default=None),
        own["print_config"].replace(default=False),
    ]
    for one in fields(Settings):
        default: Any = one.default
        kind: Any = {bool: bool, int: int, float: float, tuple: list[str]}.get(type(default), str)
        if one.name == "max_model_len":  # a number without a default
            kind = int
        if one.name == "model":
            option: Any = typer.Argument(help=one.metadata["help"], show_default="nano")
        else:
            dashed = one.name.replace("_", "-")
            names = f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}"
            shown = str(default) if isinstance(default, bool | int | float | str) else False
            option = typer.Option(names, *one.metadata["flags"], help=one.metadata["help"], show_default=shown)
        annotation = Annotated[kind | None, option]
        parameters.append(
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    return inspect.Signature(parameters)


serve.__signature__ = _signature()  # type: ignore[attr-defined]
