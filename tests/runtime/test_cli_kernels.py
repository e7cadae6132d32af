"""`vitrail build-kernels`. What it compiles really is a few small kernels; `make kernels` compiles all."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from vitrail.kernels import build, dispatch, norm, pack
from vitrail.kernels.build import Compiled
from vitrail.kernels.resources import Resources
from vitrail.kernels.signature import Launch
from vitrail.runtime import kernel_pack

from .command_line import vitrail

pytest.importorskip("triton")


def two_launches(config, target, dtype, tuned=True, quantization=None, cache_dtype=None) -> list[Launch]:
    assert tuned
    launches: list[Launch] = []
    x, weight = torch.empty(5, 64, dtype=dtype, device="meta"), torch.empty(64, dtype=dtype, device="meta")
    with dispatch.simulate(target, launches):
        norm.rms_norm(x, weight, 1e-6)
        norm.layer_norm(x, weight, weight, 1e-6)
    return launches


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model launches two kernels only."""
    monkeypatch.setattr(kernel_pack, "record_launches", two_launches)


def test_a_pack_is_built_for_each_architecture_and_not_twice(few, tmp_path: Path) -> None:
    options = ("--arch", "sm_80", "--arch", "sm_90", "--model", "nano", "-o", tmp_path, "--jobs", 1)
    ran = vitrail("build-kernels", *options, "--json")
    assert (ran.status, ran.err) == (0, "")
    report = json.loads(ran.out)
    assert (report["folder"], report["binaries"], len(report["compiled"])) == (str(tmp_path), 4, 4)
    assert all(one["stack"] == 0 and one["registers"] > 8 and one["faults"] == [] for one in report["compiled"])
    held = pack.read_pack(tmp_path)
    assert held is not None
    assert held.triton_version == report["triton"]
    assert {arch: set(keys) for arch, keys in held.binaries.items()} == {
        arch: {launch.key for launch in two_launches(None, dispatch.REPRESENTATIVE[arch], torch.bfloat16)}
        for arch in dispatch.ARCHS
    }
    ran = vitrail("build-kernels", *options)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f"4 binaries for sm_80, sm_90 in {tmp_path}, 0 new\n"


def test_what_is_quantised_reaches_the_recording(few, monkeypatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(kernel_pack, "record_launches", lambda *args, **options: asked.append(options) or [])
    folder = ("--arch", "sm_90", "--model", "nano", "-o", tmp_path)
    assert vitrail("build-kernels", *folder, "--llm", "int8", "--kv-cache-dtype", "int8").status == 0
    assert (asked[-1]["quantization"].llm, asked[-1]["quantization"].vision) == ("int8", None)
    assert asked[-1]["cache_dtype"] == torch.int8
    assert vitrail("build-kernels", *folder).status == 0
    assert (asked[-1]["quantization"], asked[-1]["cache_dtype"]) == (None, None)
    for option in (("--llm", "int5"), ("--vision", "int4"), ("--kv-cache-dtype", "int5")):
        ran = vitrail("build-kernels", *folder, *option)
        assert (ran.status, ran.err.count("\n")) == (2, 1)
        assert option[1] in ran.err


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Launch, dispatch.Arch]]:
    """Stands for the compiler: what it was asked for. It does not like LayerNorm."""
    asked = []

    def compile_launches(wanted, jobs):
        asked.extend(wanted)
        for index, (launch, arch) in reversed(list(enumerate(wanted))):
            if dict(launch.constants)["RMS"]:
                resources = Resources(32, 0, 32, 4, 8, instructions=100, opcodes={})
                yield index, Compiled(launch, arch, "3.9.0", b"binary", launch.name, 0, 2, resources)
            else:
                yield index, Compiled(launch, arch, faults=("it does not compile: no",))

    monkeypatch.setattr(build, "compile_launches", compile_launches)
    return asked


def test_without_a_folder_the_pack_goes_where_it_is_looked_for(few, compiler, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VITRAIL_KERNEL_PACK", raising=False)
    vitrail("build-kernels", "--arch", "sm_90", "--model", "nano")
    assert dispatch.kernel_pack_folders() == [tmp_path / "vitrail" / "pack"]


def test_what_is_not_asked_for_is_both_architectures_all_known_shapes_in_bf16(few, compiler, tmp_path: Path) -> None:
    vitrail("build-kernels", "-o", tmp_path)
    kinds = {(launch.signature[0], arch) for launch, arch in compiler}
    assert kinds == {("*bf16:16", "sm_80"), ("*bf16:16", "sm_90")}
    assert len(compiler) == 4  # every model launches the same two
    compiler.clear()
    vitrail("build-kernels", "-o", tmp_path, "--dtype", "float32", "--dtype", "float16", "--arch", "sm_80")
    assert {launch.signature[0] for launch, _ in compiler} == {"*fp16:16", "*fp32:16"}


def test_the_gpus_of_this_machine_count_too(few, compiler, tmp_path: Path, monkeypatch) -> None:
    here = dispatch.Target("sm_90", 114, "NVIDIA H100 PCIe")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dispatch, "cuda_target", lambda device: here)
    asked = []
    monkeypatch.setattr(kernel_pack, "record_launches", lambda config, target, dtype, **_: asked.append(target) or [])
    vitrail("build-kernels", "-o", tmp_path, "--model", "nano")
    assert asked == [dispatch.A100, dispatch.H200, here]
    asked.clear()
    vitrail("build-kernels", "-o", tmp_path, "--model", "nano", "--arch", "sm_80")
    assert asked == [dispatch.A100]


def test_a_faulty_kernel_is_left_out_and_named(few, compiler, tmp_path: Path) -> None:
    ran = vitrail("build-kernels", "--arch", "sm_80", "--model", "nano", "-o", tmp_path)
    assert ran.status == 1
    key = two_launches(None, dispatch.A100, torch.bfloat16)[1].key
    assert ran.err == f"vitrail: left out: {key} for sm_80: it does not compile: no\n"
    *_, row, summary = ran.out.splitlines()
    assert row.split() == ["norm_kernel", "sm_80", "32", "0", "32", "4", "8", "100"]
    assert summary == f"1 binary for sm_80 in {tmp_path}, 1 new"
    held = pack.read_pack(tmp_path)
    assert held is not None
    assert len(held.binaries["sm_80"]) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--arch", "sm_70"), "--arch sm_70: unknown; known: sm_80, sm_90"),
        (("--dtype", "int8"), "--dtype int8: unknown; known: bfloat16, float16, float32"),
        (("--model", "./nowhere"), "./nowhere: no local folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(few, tmp_path: Path, options, complaint) -> None:
    ran = vitrail("build-kernels", "-o", tmp_path / "pack", *options)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith(f"vitrail: {complaint}")
    assert ran.err.count("\n") == 1


def test_without_triton_it_says_what_to_install(few, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    ran = vitrail("build-kernels", "-o", tmp_path)
    assert (ran.status, ran.err) == (2, "vitrail: build-kernels needs Triton: pip install 'vitrail[cuda]'\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_compiled(few, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    ran = vitrail("build-kernels", "-o", tmp_path / "pack")
    assert (ran.status, ran.err) == (2, f"vitrail: --output {tmp_path}/pack: Permission denied\n")


def test_a_file_in_the_folders_place_is_refused(few, tmp_path: Path) -> None:
    (tmp_path / "pack").touch()
    ran = vitrail("build-kernels", "-o", tmp_path / "pack")
    assert (ran.status, ran.err) == (2, f"vitrail: --output {tmp_path}/pack: File exists\n")
