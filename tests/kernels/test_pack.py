"""Kernel packs without a GPU: cuda-python is replaced by a stand-in that notes what it would load and launch."""

import ctypes
import importlib
import json
import pkgutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import vitrail.kernels
from vitrail.kernels import dispatch, gemm, norm, pack
from vitrail.kernels.build import Compiled, check, compile_launches
from vitrail.kernels.language import Kernel
from vitrail.kernels.launch import launch
from vitrail.kernels.resources import Resources
from vitrail.kernels.signature import Launch
from vitrail.runtime.errors import UnsupportedError

from .measure import random

LaunchConfig = pytest.importorskip("cuda.core").LaunchConfig

RESOURCES = Resources(32, 0, 32, warps=4, ctas_per_sm=8, instructions=100, opcodes={})


class FakeDriver:
    """What stands for `cuda.core` and `cuda.bindings.driver`, and all that was asked of it."""

    def __init__(self) -> None:
        self.loaded: list[tuple[bytes, str]] = []
        self.launched: list[tuple[Any, Any, Any, tuple[Any, ...]]] = []
        self.attributes: list[tuple[Any, ...]] = []
        self.contexts: list[tuple[int, str]] = []
        self.load_seconds = 0.0

    def modules(self) -> dict[str, ModuleType]:
        cuda, core, bindings, driver = (ModuleType(name) for name in ("cuda", "core", "bindings", "driver"))
        cuda.core, cuda.bindings, bindings.driver = core, bindings, driver
        core.LaunchConfig = LaunchConfig  # the real one, which checks its keywords
        core.ObjectCode = SimpleNamespace(from_cubin=self.from_cubin)
        core.launch = lambda stream, config, kernel, *args: self.launched.append((stream, config, kernel, args))
        core.Device = lambda index: SimpleNamespace(
            set_current=lambda: self.contexts.append((index, threading.current_thread().name))
        )
        driver.CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="max shared")
        driver.CUresult = SimpleNamespace(CUDA_SUCCESS="success")
        driver.cuKernelSetAttribute = self.set_attribute
        return {"cuda": cuda, "cuda.core": core, "cuda.bindings": bindings, "cuda.bindings.driver": driver}

    def from_cubin(self, cubin: bytes) -> Any:
        time.sleep(self.load_seconds)
        if cubin == b"not a cubin":
            raise ValueError("CUDA_ERROR_INVALID_IMAGE")

        def get_kernel(name: str) -> Any:
            self.loaded.append((cubin, name))
            return SimpleNamespace(handle=f"handle of {name}")

        return SimpleNamespace(get_kernel=get_kernel)

    def set_attribute(self, *args: Any) -> tuple[Any]:
        self.attributes.append(args)
        return ("success" if args[1] <= 232448 else SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE"),)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A machine with an H200, whose memory is the CPU's."""
    fake = FakeDriver()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dispatch, "cuda_target", lambda device: dispatch.H200)
    monkeypatch.setattr(norm, "target_of", lambda *tensors: dispatch.H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **kw: empty(*shape, **kw))
    forget(monkeypatch)
    return fake


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    pack.packs.cache_clear()
    monkeypatch.setattr(pack, "_loaded", {})
    monkeypatch.setattr(pack, "_threads", threading.local())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the process looks for its only pack, not yet written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VITRAIL_KERNEL_PACK", str(tmp_path / "pack"))
    return tmp_path / "pack"


class Untouchable:
    """Triton's side of a kernel that must not be used."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"Triton was asked for {name}")

    def __getitem__(self, grid: Any) -> Any:
        raise AssertionError("Triton was asked to launch")


def recorded(call: Callable[[], Any]) -> Launch:
    launches: list[Launch] = []
    with dispatch.simulate(dispatch.H200, launches):
        call()
    return launches[0]


def compiled(launch: Launch, **values: Any) -> Compiled:
    defaults = {"cubin": b"binary", "function": launch.name, "hidden_parameters": 2, "resources": RESOURCES}
    return Compiled(launch, "sm_90", "3.9.0", **defaults | values)


def scale_fn(x_ptr, y_ptr, bias_ptr, rows, stride, factor, BLOCK):  # noqa: N803
    """Never run: only its signature matters here."""


scale = Kernel(scale_fn, unspecialized=("rows",))
scale.triton = Untouchable()


def scale_launch(x: Any, y: Any, rows: int = 7, **options: Any) -> tuple[Any, ...]:
    return (scale, (3, 2), x, y, None, rows, 2**40, 0.5), {"BLOCK": 8, "num_warps": 4, **options}


def scale_recorded(x: Any, y: Any, **options: Any) -> Launch:
    args, keywords = scale_launch(x, y, **options)
    return recorded(lambda: launch(*args, **keywords))


def test_a_launch_served_from_a_pack_never_touches_triton(driver, folder, monkeypatch) -> None:
    x, weight = torch.ones(5, 64), torch.ones(64)
    pack.write_pack(folder, [compiled(recorded(lambda: norm.rms_norm(x, weight, 1e-6)))], "3.9.0")
    monkeypatch.setattr(norm._norm_kernel, "triton", Untouchable())
    out = norm.rms_norm(x, weight, 1e-6)
    _, config, _, args = driver.launched[0]
    assert driver.loaded == [(b"binary", "_norm_kernel")]
    assert config.grid == (5, 1, 1)
    # x, weight, out; hidden, x_stride, eps; then two scratch pointers that this kernel leaves alone
    assert [getattr(arg, "value", arg) for arg in args[:-3]] == [
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        64,
        64,
    ]
    assert args[-3].value == pytest.approx(1e-6)
    assert args[-2:] == (0, 0)


def test_arguments_go_in_order_with_the_widths_of_the_signature(driver, folder) -> None:
    x, y = torch.ones(8), torch.ones(8)
    pack.write_pack(folder, [compiled(scale_recorded(x, y))], "3.9.0")
    args, keywords = scale_launch(x, y)
    launch(*args, **keywords)
    values = driver.launched[0][3]
    assert [type(value) for value in values] == [int, int, ctypes.c_int32, ctypes.c_int64, ctypes.c_float, int, int]
    assert [getattr(v, "value", v) for v in values] == [x.data_ptr(), y.data_ptr(), 7, 2**40, 0.5, 0, 0]


def test_the_configuration_is_the_binarys_and_the_stream_is_torchs(driver, folder) -> None:
    x = torch.ones(8)
    # Warp specialisation has added eight warps to the four that were asked for.
    resources = replace(RESOURCES, warps=12, shared=1000)
    pack.write_pack(folder, [compiled(scale_recorded(x, x), resources=resources)], "3.9.0")
    args, keywords = scale_launch(x, x)
    launch(*args, **keywords)
    stream, config, _, _ = driver.launched[0]
    assert stream == "stream of cuda:0"
    assert (config.grid, config.block, config.shmem_size) == ((3, 2, 1), (384, 1, 1), 1000)
    assert not config.programmatic_stream_serialization
    assert driver.attributes == []


def test_more_than_48_kb_of_shared_memory_are_asked_for_once(driver, folder) -> None:
    x = torch.ones(8)
    resources = replace(RESOURCES, shared=100_000)
    pack.write_pack(folder, [compiled(scale_recorded(x, x), resources=resources)], "3.9.0")
    args, keywords = scale_launch(x, x)
    launch(*args, **keywords)
    launch(*args, **keywords)
    assert driver.attributes == [("max shared", 100_000, "handle of scale_fn", 0)]
    assert len(driver.loaded) == 1
    assert [config.shmem_size for _, config, _, _ in driver.launched] == [100_000] * 2


def test_what_the_device_refuses_is_an_error_that_names_the_binary(driver, folder) -> None:
    x = torch.ones(8)
    resources = replace(RESOURCES, shared=300_000)
    pack.write_pack(folder, [compiled(scale_recorded(x, x), resources=resources)], "3.9.0")
    args, keywords = scale_launch(x, x)
    with pytest.raises(UnsupportedError, match=r"scale_fn-.*300000 bytes of shared memory refused"):
        launch(*args, **keywords)


def test_a_launch_that_may_overlap_its_predecessor_says_so(driver, folder) -> None:
    x = torch.ones(8)
    pack.write_pack(folder, [compiled(scale_recorded(x, x, launch_pdl=True))], "3.9.0")
    args, keywords = scale_launch(x, x, launch_pdl=True)
    launch(*args, **keywords)
    assert driver.launched[0][1].programmatic_stream_serialization


def test_scratch_memory_is_given_for_every_program(driver, folder, monkeypatch) -> None:
    x = torch.ones(8)
    pack.write_pack(folder, [compiled(scale_recorded(x, x), scratch_size=128)], "3.9.0")
    given = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: given.append(empty(*shape, **kw)) or given[-1])
    args, keywords = scale_launch(x, x)
    launch(*args, **keywords)
    assert [(tensor.numel(), tensor.dtype) for tensor in given] == [(3 * 2 * 128, torch.uint8)]
    assert driver.launched[0][3][-2:] == (given[0].data_ptr(), 0)


def test_a_launch_the_pack_does_not_have_is_left_to_triton(driver, folder, monkeypatch) -> None:
    x = torch.ones(8)
    pack.write_pack(folder, [compiled(scale_recorded(x, x))], "3.9.0")
    asked = []
    monkeypatch.setattr(scale, "triton", {(3, 2): lambda *args, **keywords: asked.append((args, keywords))})
    monkeypatch.setattr("vitrail.kernels.launch.triton.set_allocator", lambda allocate: None)
    args, keywords = scale_launch(x, x, num_stages=3)
    launch(*args, **keywords)
    assert driver.launched == []
    assert asked == [(args[2:], {"BLOCK": 8, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True})]
    monkeypatch.setattr(scale, "triton", None)
    with pytest.raises(RuntimeError, match=r"has no scale_fn\(.*stages=3, and Triton is not installed"):
        launch(*args, **keywords)


def test_without_a_pack_a_launch_is_not_even_described(driver, folder, monkeypatch) -> None:
    x = torch.ones(8)
    asked = []
    monkeypatch.setattr(scale, "triton", {(3, 2): lambda *args, **keywords: asked.append((args, keywords))})
    monkeypatch.setattr("vitrail.kernels.launch.triton.set_allocator", lambda allocate: None)
    args, keywords = scale_launch(x, x, launch_pdl=True)
    with monkeypatch.context() as patch:
        patch.setattr(Launch, "of", lambda *args, **options: pytest.fail("a launch was described"))
        launch(*args, **keywords)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True, "launch_pdl": True}
    assert asked == [(args[2:], {"BLOCK": 8, **options})]
    # A pack that is written later serves the processes that begin after that.
    pack.write_pack(folder, [compiled(scale_recorded(x, x, launch_pdl=True))], "3.9.0")
    launch(*args, **keywords)
    assert driver.launched == []
    forget(monkeypatch)
    launch(*args, **keywords)
    assert len(driver.launched) == 1


def test_what_differs_for_the_compiler_has_a_key_of_its_own(folder) -> None:
    x, odd = torch.ones(8), torch.ones(9)[1:]
    keys = {
        scale_recorded(x, x).key,
        scale_recorded(odd, x).key,
        scale_recorded(x.bfloat16(), x).key,
        scale_recorded(x, x, num_warps=8).key,
        scale_recorded(x, x, num_stages=4).key,
        scale_recorded(x, x, launch_pdl=True).key,
    }
    assert len(keys) == 6
    assert scale_recorded(x, x, rows=7) == scale_recorded(x, x, rows=16)
    assert scale_recorded(x, x) == scale_recorded(x.to("meta"), x.to("meta"))


def test_a_pack_of_other_sources_is_ignored_with_one_warning(driver, folder, monkeypatch) -> None:
    x = torch.ones(8)
    pack.write_pack(folder, [compiled(scale_recorded(x, x))], "3.9.0")
    monkeypatch.setattr(pack, "sources_digest", lambda: "of other sources")
    asked = []
    monkeypatch.setattr(scale, "triton", {(3, 2): lambda *args, **keywords: asked.append(args)})
    monkeypatch.setattr("vitrail.kernels.launch.triton.set_allocator", lambda allocate: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (7, 8):
            args, keywords = scale_launch(x, x, rows=rows)
            launch(*args, **keywords)
    assert len(asked) == 2
    assert [str(warning.message) for warning in caught] == [
        f"the kernel pack {folder} is not used: it was built from other sources; {pack.REMEDY}"
    ]


def test_the_digest_changes_with_every_source_of_the_room(tmp_path, monkeypatch) -> None:
    for file in Path(pack.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(pack, "__file__", str(tmp_path / "pack.py"))
    digests = [pack.sources_digest.__wrapped__()]
    assert digests == [pack.sources_digest()]
    for name in ("norm.py", "language.py"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        digests.append(pack.sources_digest.__wrapped__())
    (tmp_path / "new.py").touch()
    digests.append(pack.sources_digest.__wrapped__())
    assert len(set(digests)) == 4


def test_without_cuda_python_a_pack_is_ignored_with_a_warning(driver, folder, monkeypatch) -> None:
    x = torch.ones(8)
    pack.write_pack(folder, [compiled(scale_recorded(x, x))], "3.9.0")
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.warns(UserWarning, match=r"needs cuda-python \(pip install 'vitrail\[cuda\]'\)"):
        assert pack.find(torch.device("cuda", 0), scale_recorded(x, x)) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index.write_text(index.read_text()[:-40]),
        lambda index: index.write_text("[]"),
        lambda index: index.write_text(index.read_text().replace('"shared"', '"shard"')),
        lambda index: index.write_bytes(b"\xff\xfe"),
    ],
)
def test_a_damaged_index_is_an_error_that_names_it_until_it_is_built_anew(driver, folder, damage) -> None:
    x = torch.ones(8)
    wanted = scale_recorded(x, x)
    pack.write_pack(folder, [compiled(wanted)], "3.9.0")
    damage(folder / "index.json")
    with pytest.raises(UnsupportedError, match=rf"kernel pack {folder}/index.json is damaged .*build it anew"):
        pack.find(torch.device("cuda", 0), wanted)
    pack.write_pack(folder, [compiled(wanted)], "3.9.0")
    assert pack.find(torch.device("cuda", 0), wanted) is not None


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda file: file.write_bytes(b"other"), "SHA-256"),
        (lambda file: file.unlink(), "FileNotFoundError"),
    ],
)
def test_a_damaged_binary_is_an_error_that_names_it(driver, folder, damage, complaint) -> None:
    x = torch.ones(8)
    wanted = scale_recorded(x, x)
    pack.write_pack(folder, [compiled(wanted)], "3.9.0")
    file = folder / "sm_90" / f"{wanted.file_stem}.cubin"
    damage(file)
    with pytest.raises(UnsupportedError, match=rf"{file} cannot be loaded .*{complaint}"):
        pack.find(torch.device("cuda", 0), wanted)


def test_a_binary_the_driver_refuses_is_an_error_that_names_it(driver, folder) -> None:
    x = torch.ones(8)
    wanted = scale_recorded(x, x)
    pack.write_pack(folder, [compiled(wanted, cubin=b"not a cubin")], "3.9.0")
    with pytest.raises(UnsupportedError, match=r"\.cubin cannot be loaded \(ValueError: CUDA_ERROR_INVALID_IMAGE\)"):
        pack.find(torch.device("cuda", 0), wanted)


def test_threads_that_launch_at_once_load_a_binary_once_and_each_have_a_context(driver, folder) -> None:
    x = torch.ones(8)
    pack.write_pack(folder, [compiled(scale_recorded(x, x))], "3.9.0")
    driver.load_seconds = 0.05
    args, keywords = scale_launch(x, x)

    def launch_twice() -> None:
        launch(*args, **keywords)
        launch(*args, **keywords)

    threads = [threading.Thread(target=launch_twice, name=f"thread {number}") for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.loaded) == 1
    assert len(driver.launched) == 16
    assert sorted(driver.contexts) == [(0, f"thread {number}") for number in range(8)]


def test_packs_are_asked_in_their_order(driver, folder, tmp_path, monkeypatch) -> None:
    x = torch.ones(8)
    both, second = scale_recorded(x, x), scale_recorded(x, x, num_warps=8)
    pack.write_pack(folder, [compiled(both, cubin=b"named")], "3.9.0")
    user = tmp_path / "cache" / "vitrail" / "pack"
    user.mkdir(parents=True)
    pack.write_pack(user, [compiled(both, cubin=b"user's"), compiled(second, cubin=b"user's other")], "3.9.0")
    for wanted in (both, second):
        pack.find(torch.device("cuda", 0), wanted)
    assert [cubin for cubin, _ in driver.loaded] == [b"named", b"user's other"]


def test_a_device_finds_only_binaries_of_its_architecture(driver, folder, monkeypatch) -> None:
    x = torch.ones(8)
    wanted = scale_recorded(x, x)
    binaries = [compiled(wanted, cubin=b"hopper"), replace(compiled(wanted, cubin=b"ampere"), arch="sm_80")]
    pack.write_pack(folder, binaries[:1], "3.9.0")
    targets = [dispatch.H200, dispatch.A100]
    monkeypatch.setattr(dispatch, "cuda_target", lambda device: targets[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (8, 0))[index])
    assert pack.find(torch.device("cuda", 1), wanted) is None
    forget(monkeypatch)
    pack.write_pack(folder, binaries[1:], "3.9.0")
    for index in range(2):
        assert pack.find(torch.device("cuda", index), wanted) is not None
    assert [cubin for cubin, _ in driver.loaded] == [b"hopper", b"ampere"]


@pytest.mark.parametrize(("capability", "shared", "fits"), [((8, 6), 99 * 1024, True), ((8, 6), 99 * 1024 + 1, False)])
def test_smaller_gpus_of_the_same_generation_take_what_fits_them(driver, folder, monkeypatch, capability, shared, fits):
    x = torch.ones(8)
    binary = replace(compiled(scale_recorded(x, x), resources=replace(RESOURCES, shared=shared)), arch="sm_80")
    pack.write_pack(folder, [binary], "3.9.0")
    monkeypatch.setattr(dispatch, "cuda_target", lambda device: dispatch.A100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert (pack.find(torch.device("cuda", 0), binary.launch) is not None) == fits


def test_building_again_adds_to_a_pack_and_replaces_one_of_another_triton(folder) -> None:
    x = torch.ones(8)
    launches = [scale_recorded(x, x, num_warps=warps) for warps in (1, 2, 4)]
    for one in launches[:2]:
        pack.write_pack(folder, [compiled(one)], "3.9.0")
    held = pack.read_pack(folder)
    assert held is not None
    assert set(held.binaries["sm_90"]) == {one.key for one in launches[:2]}
    pack.write_pack(folder, [compiled(launches[2])], "3.6.0")
    held = pack.read_pack(folder)
    assert held is not None
    assert held.triton_version == "3.6.0"
    assert set(held.binaries["sm_90"]) == {launches[2].key}
    assert [file.stem for file in folder.glob("*/*")] == [launches[2].file_stem]


def test_an_index_says_what_it_was_built_with(folder) -> None:
    x = torch.ones(8)
    pack.write_pack(folder, [compiled(scale_recorded(x, x))], "3.9.0")
    index = json.loads((folder / "index.json").read_text())
    assert index["triton"] == "3.9.0"
    assert index["sources"] == pack.sources_digest()


def test_kernels_have_names_of_their_own() -> None:
    # A launch is known by its kernel's name.
    names = [
        value.name
        for info in pkgutil.iter_modules(vitrail.kernels.__path__)
        for module in [importlib.import_module(f"vitrail.kernels.{info.name}")]
        for value in vars(module).values()
        if isinstance(value, Kernel) and value.fn.__module__ == module.__name__
    ]
    assert "_norm_kernel" in names
    assert sorted(names) == sorted(set(names))


def test_a_process_without_triton_runs_on_a_pack(folder, tmp_path) -> None:
    x, weight = torch.ones(5, 64), torch.ones(64)
    pack.write_pack(folder, [compiled(recorded(lambda: norm.rms_norm(x, weight, 1e-6)))], "3.9.0")
    code = """
    import sys
    sys.modules["triton"] = None
    from types import SimpleNamespace
    import cuda.core, torch
    from contextlib import nullcontext
    from vitrail.kernels import dispatch, norm
    launched = []
    cuda.core.ObjectCode = SimpleNamespace(from_cubin=lambda cubin: SimpleNamespace(get_kernel=lambda name: name))
    cuda.core.Device = lambda index: SimpleNamespace(set_current=lambda: None)
    cuda.core.launch = lambda stream, config, kernel, *args: launched.append(kernel)
    dispatch.cuda_target = lambda device: dispatch.H200
    torch.cuda.get_device_capability = lambda index: (9, 0)
    norm.target_of = lambda *tensors: dispatch.H200
    torch.cuda.current_device, torch.cuda.current_stream = lambda: 0, lambda device: None
    torch.cuda.device = lambda device: nullcontext()
    norm.rms_norm(torch.ones(5, 64), torch.ones(64), 1e-6)
    print(launched)
    """
    done = subprocess.run(
        (sys.executable, "-P", "-c", textwrap.dedent(code)), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.stdout.strip(), done.returncode) == ("['_norm_kernel']", 0), done.stderr


@pytest.mark.gpu
def test_on_a_gpu_a_pack_gives_what_triton_gives(folder, monkeypatch) -> None:
    device = torch.device("cuda", 0)
    target = dispatch.cuda_target(device)
    assert target is not None
    x, weight = (random(*shape).to(device, torch.bfloat16) for shape in ((300, 3200), (3200,)))
    fc1, bias = random(1280, 3200, seed=1).to(device, torch.bfloat16), random(1280, seed=2).to(device, torch.bfloat16)
    # More than 48 KB of shared memory, and on Hopper scratch memory for tensor descriptors.
    choice = next(choice for choice in gemm.CONFIGS[target.arch] if choice["implementation"] != "torch")

    def run() -> list[torch.Tensor]:
        return [
            norm.rms_norm(x, weight, 1e-6),
            *norm.residual_norm(x, x, weight, weight, None, 1e-6),
            gemm.gemm("gelu", target, x, fc1, bias, choice),
        ]

    forget(monkeypatch)
    expected = run()  # by Triton: there is no pack yet
    launches: list[Launch] = []
    with dispatch.simulate(target, launches):
        run()
    built = [binary for _, binary in compile_launches([(wanted, target.arch) for wanted in launches])]
    for binary in built:
        check(binary)
    pack.write_pack(folder, built, built[0].triton_version)
    forget(monkeypatch)
    for wanted in launches:
        monkeypatch.setattr(wanted.kernel, "triton", Untouchable())

    results = {"here": run()}
    thread = threading.Thread(target=lambda: results.update({"in a thread": run()}))
    thread.start()
    thread.join()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        results["in a stream"] = run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    results["in a graph"] = captured
    torch.cuda.synchronize(device)
    for where, result in results.items():
        for ours, theirs in zip(result, expected, strict=True):
            assert torch.equal(ours, theirs), where
