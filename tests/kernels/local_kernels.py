"""Kernels of a test's own: from source text, or a real source file with one line replaced."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_kernels(file: Path, source: str, name: str | None = None) -> ModuleType:
    """The module of that source, written to `file`, where Triton and the processes that compile look for it."""
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name or file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_line_replaced(module: ModuleType, line: str, by: str, folder: Path) -> ModuleType:
    """A copy of a kernel file in which `line`, which must stand there once, is replaced."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    places = [index for index, text in enumerate(lines) if text.strip() == line]
    assert len(places) == 1, f"{Path(module.__file__).name} has {len(places)} lines that read {line!r}"
    indent = lines[places[0]][: -len(line)]
    lines[places[0]] = indent + by
    stem = module.__name__.rpartition(".")[2]
    # A name inside the room, by which its relative imports find the other files.
    return load_kernels(folder / f"{stem}_mutated.py", "\n".join(lines) + "\n", f"{module.__name__}_mutated")
