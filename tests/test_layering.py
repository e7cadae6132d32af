"""The layering of the rooms, read from the source: who may import whom.

Every import statement counts, also one inside a function or under `TYPE_CHECKING`: what is imported late or for its
types alone is a dependency all the same, and the reader has to follow it.
"""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "runtime", "export", "bench")
FACES = {"vitrail", "vitrail.runtime"}  # their `__init__` offers names of every room; no room imports them

# A module may import from its own layer and from those above it in this table.
LAYERS = (
    ("runtime.config", "runtime.config_forms", "runtime.model_config", "runtime.request", "runtime.errors"),
    ("kernels",),
    ("runtime.layers", "runtime.quantization"),
    ("runtime.models",),
    (
        *("runtime.weights", "runtime.checkpoint_map", "runtime.tokenizer", "runtime.vocabulary", "runtime.prompt"),
        *("runtime.inventory", "runtime.model_builder"),
        *("runtime.image", "runtime.media", "runtime.video", "runtime.pdf", "runtime.sampler", "runtime.backends"),
        *("runtime.resize", "runtime.prefetch", "runtime.texts", "runtime.zero_shot", "runtime.class_names"),
        *("runtime.retrieval", "runtime.datasets", "runtime.structured"),
        *("runtime.part_loader", "runtime.checkpoint_folder", "runtime.quantization_report"),
    ),
    (
        *("runtime.engine", "runtime.captions", "runtime.beam", "runtime.kernel_pack"),
        *("runtime.calibration", "runtime.smoothing", "runtime.block_quantizer"),
    ),
    ("runtime.distributed",),
    (
        *("runtime.api", "runtime.messages", "runtime.options"),
        *("runtime.loaded", "runtime.features", "runtime.contrastive", "runtime.evaluation", "runtime.embedding_file"),
        *("runtime.comparison", "runtime.quantizer", "runtime.vision_backend"),
    ),
    (
        *("runtime.server", "runtime.cli", "runtime.cli_options"),
        *("runtime.cli_contrastive", "runtime.cli_kernels", "runtime.cli_plan", "runtime.cli_quantize"),
        *("runtime.cli_serve", "runtime.cli_export", "runtime.cli_export_tensorrt", "runtime.export_check"),
        "runtime.distributed.ray_app",  # whose deployments are servers
    ),
)
# The exporters are beside that line: they see the models and what carries them, never the engine.
EXPORT_SEES = (
    *(part for layer in LAYERS[:4] for part in layer),
    *("runtime.weights", "runtime.checkpoint_map", "runtime.inventory", "runtime.backends"),
    *("runtime.tokenizer", "runtime.prompt", "runtime.texts", "export"),
)
# What asks them to export: commands, and a vision half that is exported when it is first needed.
SEE_EXPORT = ("runtime.cli_export", "runtime.cli_export_tensorrt", "runtime.export_check", "runtime.vision_backend")
PUBLIC = {"vitrail", "vitrail.runtime", "vitrail.runtime.errors", "vitrail.runtime.image"}
TORCH_FREE = (
    "vitrail",
    "vitrail.runtime",
    "vitrail.runtime.errors",
    "vitrail.runtime.config",
    "vitrail.runtime.request",
    "vitrail.runtime.engine.batch",
    "vitrail.runtime.engine.block_manager",
    "vitrail.runtime.engine.scheduler",
    "vitrail.runtime.engine.vision_cache",
    "vitrail.runtime.engine.recorder",
)


def sources(root: Path) -> dict[str, Path]:
    """Dotted name -> file, for the root's face and every module of the rooms."""
    files = [root / "__init__.py", *(file for room in ROOMS for file in sorted((root / room).rglob("*.py")))]
    return {".".join(["vitrail", *parts(file.relative_to(root))]): file for file in files}


def parts(path: Path) -> list[str]:
    names = list(path.with_suffix("").parts)
    return names[:-1] if names[-1] == "__init__" else names


def imports(name: str, file: Path, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The dotted name and line of everything that the module `name` imports, relative names resolved."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield (submodule if submodule in modules else base), node.lineno


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def layer_of(name: str) -> int | None:
    """The layer of the longest name in the table that a module is within."""
    found = [
        (len(part), rank) for rank, layer in enumerate(LAYERS) for part in layer if within(name, f"vitrail.{part}")
    ]
    return max(found)[1] if found else None


def may_import(importer: str, target: str) -> bool:
    if target in FACES:
        return within(importer, "vitrail.bench")
    if within(importer, "vitrail.bench"):
        return True
    if (importer, target) == ("vitrail.runtime.cli", "vitrail.bench"):
        return True  # `vitrail bench NAME` looks the script up in that folder
    if within(importer, "vitrail.export"):
        return any(within(target, f"vitrail.{part}") for part in EXPORT_SEES)
    if within(target, "vitrail.export"):
        return any(within(importer, f"vitrail.{part}") for part in SEE_EXPORT)
    above, below = layer_of(importer), layer_of(target)
    return above is not None and below is not None and below <= above


def violations(root: Path) -> list[str]:
    """Every import below `root` that the layering forbids, and every module that has no place in it."""
    modules = sources(root)
    found = []
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        if name in FACES:
            continue
        where = file.relative_to(root)
        if layer_of(name) is None and not within(name, "vitrail.export") and not within(name, "vitrail.bench"):
            found.append(f"{where}: no layer is given for {name}")
            continue
        for target, line in imports(name, file, modules):
            if target.split(".")[0] in ROOMS:
                found.append(f"{where}:{line}: {target} is named without vitrail")
            if not within(target, "vitrail"):
                continue
            if not may_import(name, target):
                found.append(f"{where}:{line}: {name} imports {target}")
            if target in modules and target != name:
                graph.setdefault(name, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("import cycle: " + " <- ".join(error.args[1]))
    return found


def absolute_inside_rooms(root: Path) -> list[str]:
    """Imports by absolute name from one room of the package to another, which type checkers do not resolve."""
    found = []
    for file in (file for room in ("kernels", "runtime", "export") for file in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            found += [f"{file.relative_to(root)}:{node.lineno}: {name}" for name in names if within(name, "vitrail")]
    return found


def test_every_import_points_down() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("planted_in", "statement", "complaint"),
    [
        (
            "runtime/models/internvl.py",
            "from ..api import Runtime",
            "vitrail.runtime.models.internvl imports vitrail.runtime",
        ),
        ("runtime/models/internvl.py", "from .. import engine", "imports vitrail.runtime.engine"),
        ("runtime/weights.py", "from . import Runtime", "vitrail.runtime.weights imports vitrail.runtime"),
        ("kernels/norm.py", "from ..runtime.layers import norm", "vitrail.kernels.norm imports vitrail.runtime.layers"),
        ("kernels/norm.py", "def late():\n    from ..runtime.models import internvl", "imports vitrail.runtime.models"),
        ("kernels/norm.py", "if TYPE_CHECKING:\n    from ..runtime import weights", "imports vitrail.runtime.weights"),
        ("export/__init__.py", "from ..runtime.engine import loop", "vitrail.export imports vitrail.runtime.engine"),
        ("runtime/config.py", "import vitrail.runtime.models.internvl", "imports vitrail.runtime.models.internvl"),
        ("runtime/api.py", "import kernels.norm", "kernels.norm is named without vitrail"),
        ("runtime/utils.py", "", "no layer is given for vitrail.runtime.utils"),
        ("kernels/norm.py", "from .attention import attention\n", "import cycle"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, planted_in: str, statement: str, complaint: str) -> None:
    for file in sources(ROOT).values():
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    if complaint == "import cycle":
        with (tmp_path / "kernels/attention.py").open("a", encoding="utf-8") as file:
            file.write("\nfrom .norm import rms_norm\n")
    with (tmp_path / planted_in).open("a", encoding="utf-8") as file:
        file.write(f"\n{statement}\n")
    assert any(complaint in found for found in violations(tmp_path))


def test_rooms_import_one_another_by_relative_names() -> None:
    assert absolute_inside_rooms(ROOT) == []


def test_the_rooms_are_never_imported_by_their_bare_names() -> None:
    found = []
    for folder in ("tests", "examples", "tools", "docs"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            names = [name for name, _ in imports("of.some.script", file, {})]  # relative names are of that folder's
            found += [f"{file.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in (*ROOMS, "tests")]
    assert found == []


def test_examples_use_only_the_public_names() -> None:
    found = []
    for file in sorted((ROOT / "examples").rglob("*.py")):
        names = {name for name, _ in imports("example", file, sources(ROOT)) if within(name, "vitrail")}
        found += [f"{file.relative_to(ROOT)}: {name}" for name in sorted(names - PUBLIC)]
    assert found == []


@pytest.mark.parametrize("package", ["__init__.py", "kernels/__init__.py"])
def test_the_packages_that_every_import_runs_have_no_side_effects(package: str) -> None:
    docstring, *rest = ast.parse((ROOT / package).read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    allowed = {"__version__"} if package == "__init__.py" else set()
    for statement in rest:
        assert isinstance(statement, ast.Assign), ast.dump(statement)
        assert isinstance(statement.value, ast.Constant)
        assert {target.id for target in statement.targets if isinstance(target, ast.Name)} <= allowed


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_describes_a_request_loads_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
