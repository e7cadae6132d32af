"""Recorded launches compiled ahead of time, on any machine, GPU or not.

Compilation happens in processes of its own: several at once, apart from Triton's interpreter where the caller uses
that, and a crash of the compiler costs one kernel.
"""

import base64
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

from .dispatch import Arch
from .resources import Resources, faults, read_resources
from .signature import ALIGNMENT, Launch, compiler_options

SCRATCH_ALIGNMENT = 256  # bytes: what torch's allocator gives at least


@dataclass(frozen=True)
class Compiled:
    """A launch compiled for one architecture.

    `scratch_size`: bytes of global memory that each program needs besides its arguments. `hidden_parameters`: pointers
    that the binary takes after the launch's own arguments: to that scratch, then to others, null.
    `faults`: why it must not be used, empty if it may. What does not compile has no cubin.
    """

    launch: Launch
    arch: Arch
    triton_version: str = ""
    cubin: bytes = b""
    function: str = ""
    scratch_size: int = 0
    hidden_parameters: int = 0
    resources: Resources | None = None
    faults: tuple[str, ...] = ()


class KernelError(RuntimeError):
    """A kernel that does not compile, or whose binary would run badly or not at all. Names it, and the number."""


def check(compiled: Compiled) -> None:
    """Raise `KernelError` unless the binary is as it should be; see `Compiled.faults`."""
    if compiled.faults:
        raise KernelError(f"{compiled.launch.key} for {compiled.arch}: {'; '.join(compiled.faults)}")


def compile_launches(wanted: Sequence[tuple[Launch, Arch]], jobs: int | None = None) -> Iterator[tuple[int, Compiled]]:
    """Compile and examine launches, `jobs` at a time (default: one a core), in processes of their own.

    Yields the index in `wanted` with its binary, in the order in which they are done.
    """
    if not wanted:
        return
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(wanted))
    requests = [_request(*pair) for pair in wanted]
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(jobs):
            idle.put(stack.enter_context(_Worker()))

        def answer(request: Mapping[str, Any]) -> dict[str, Any]:
            worker = idle.get()
            try:
                return worker.answer(request)
            finally:
                idle.put(worker)

        threads = stack.enter_context(ThreadPoolExecutor(jobs))
        # Left early, by an error or by the caller, it does not start what nobody will take.
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        futures = {threads.submit(answer, request): index for index, request in enumerate(requests)}
        for future in as_completed(futures):
            index = futures[future]
            yield index, _from_answer(*wanted[index], future.result())


class _Worker:
    """A process that compiles: a request a line in, an answer a line out, both JSON."""

    def __enter__(self) -> "_Worker":
        # A file, because nobody reads what compilers print until one dies, and a pipe nobody reads fills up.
        self.errors = tempfile.TemporaryFile()
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # Source lines are two thirds of a binary, and nobody debugs with them.
        environment |= {"OMP_NUM_THREADS": "1", "TRITON_DISABLE_LINE_INFO": "1"}
        self.process = subprocess.Popen(
            # -P: without the current folder, which may hold another package of our name.
            (sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self.process.poll() is not None:  # the last request was too much for it
            self.__exit__()
            self.__enter__()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").splitlines()
        # Compilers print whole programs after their message.
        reason = next((line for line in said if "error" in line.lower()), said[-1] if said else "it said nothing")
        return {"faults": [f"the compiler died with status {status}: {reason}"]}


def _request(launch: Launch, arch: Arch) -> dict[str, Any]:
    for name, value in launch.constants:
        if not isinstance(value, bool | int | float | str | None):
            raise TypeError(f"{launch.name}: {name} is {value!r}; a recorded constant is a number, a string or None")
    return {
        "module": launch.kernel.fn.__module__,
        "file": launch.kernel.fn.__code__.co_filename,
        "arch": arch,
        **{name: value for name, value in vars(launch).items() if name in _REQUESTED},
    }


_REQUESTED = ("name", "signature", "constants", "num_warps", "num_stages", "launch_pdl")


def _from_answer(launch: Launch, arch: Arch, values: dict[str, Any]) -> Compiled:
    if "cubin" in values:
        values["cubin"] = base64.b64decode(values["cubin"])
        values["resources"] = Resources(**values["resources"])
    return Compiled(launch, arch, **values | {"faults": tuple(values["faults"])})


def serve() -> None:
    """Compile what stdin asks for until it ends. Answers go to stdout; what compilers print there, to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    kernel = getattr(_module(request["module"], Path(request["file"])), request["name"])
    values = {name: request[name] for name in _REQUESTED}
    for name in ("signature", "constants"):
        values[name] = tuple(tuple(item) if name == "constants" else item for item in request[name])
    try:
        compiled = compile_launch(Launch(kernel, **values), request["arch"])
    except Exception as error:  # whatever a compiler raises for a kernel it does not like
        cause: BaseException = error
        while cause.__cause__ is not None:  # one for each function on the way, without a message of its own
            cause = cause.__cause__
        # Triton shows the source above its message.
        reason = "".join(traceback.format_exception_only(cause)).strip().splitlines()[-1]
        return {"faults": [f"it does not compile: {reason}"]}
    assert compiled.resources is not None
    return {name: value for name, value in vars(compiled).items() if name not in ("launch", "arch")} | {
        "cubin": base64.b64encode(compiled.cubin).decode(),
        "resources": asdict(compiled.resources),
    }


@cache
def _module(name: str, file: Path) -> ModuleType:
    """The module of a kernel: imported, or read from its file where an import by its name finds another or none."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is not None and spec.origin is not None and Path(spec.origin).samefile(file):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_launch(launch: Launch, arch: Arch) -> Compiled:
    """Compile and examine one launch in this process, which must not be one that runs Triton's interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: this process interprets kernels and cannot compile them")
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = compiler_options(num_warps=launch.num_warps, num_stages=launch.num_stages, launch_pdl=launch.launch_pdl)
    binary = triton.compile(_source(launch), target=target, options=options)
    metadata = binary.metadata
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", binary.asm["ptx"], re.DOTALL)
    assert entry is not None
    resources = read_resources(binary.asm["cubin"], arch, metadata.shared, metadata.num_warps)
    compiled = Compiled(
        launch,
        arch,
        triton.__version__,
        cubin=binary.asm["cubin"],
        function=metadata.name,
        scratch_size=metadata.global_scratch_size,
        hidden_parameters=entry[1].count(".param") - sum(kind != "None" for kind in launch.signature),
        resources=resources,
    )
    found = [
        *faults(resources, arch, launch, binary.asm["ttir"], binary.asm["ttgir"]),
        *_unlaunchable(compiled, metadata),
    ]
    return replace(compiled, faults=tuple(found))


def _source(launch: Launch) -> Any:
    from triton.compiler import ASTSource

    names = launch.kernel.triton.arg_names
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for name, described in zip(launch.kernel.arguments, launch.signature, strict=True):
        types[name], _, aligned = described.partition(":")
        if types[name] == "None":
            types[name], constants[(names.index(name),)] = "constexpr", None
        if aligned:
            attributes[(names.index(name),)] = [["tt.divisibility", ALIGNMENT]]
    for name, value in launch.constants:
        types[name], constants[(names.index(name),)] = "constexpr", value
    return ASTSource(launch.kernel.triton, {name: types[name] for name in names}, constants, attributes)


def _unlaunchable(compiled: Compiled, metadata: Any) -> Iterator[str]:
    """What a kernel pack could not launch as it does."""
    if metadata.profile_scratch_size or metadata.num_ctas > 1 or metadata.launch_cooperative_grid:
        yield "it needs profile scratch, clusters or a cooperative grid"
    if compiled.hidden_parameters != 2:
        yield f"{compiled.hidden_parameters} hidden parameters, where 2 are known"
    if metadata.global_scratch_align > SCRATCH_ALIGNMENT:
        yield f"scratch aligned to {metadata.global_scratch_align} bytes, where torch aligns to {SCRATCH_ALIGNMENT}"
