"""The committed tables of compiled kernels: complete, sound, true for a sample. `make kernels` compiles them all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitrail.bench import kernel_resources
from vitrail.bench.kernel_resources import (
    DOCUMENT,
    DOCUMENTED_TRITON,
    SCALED,
    compare,
    differences,
    read_table,
    record,
    refresh,
    table_file,
)
from vitrail.kernels import dispatch
from vitrail.kernels.build import Compiled
from vitrail.kernels.resources import Resources
from vitrail.kernels.signature import Launch
from vitrail.runtime.kernel_pack import find_config, record_launches

triton = pytest.importorskip("triton")

ROW = {"kernel": "norm", "without": [], "constants": {"BLOCK": 64}, "models": ["nano"], "ctas_per_sm": 8}
ROW |= {"registers": 100, "stack": 0, "shared": 1000, "warps": 4, "instructions": 400}
ROW |= {"opcodes": {"HMMA": 100, "LDG": 8, "LDG.128": 8}}


@pytest.fixture(scope="module")
def recorded() -> list[tuple[Launch, dispatch.Arch, list[str]]]:
    return record()


@pytest.mark.parametrize("arch", dispatch.ARCHS)
def test_the_documented_table_holds_what_is_launched_and_nothing_else(recorded, arch) -> None:
    launched = {launch.key for launch, of, _ in recorded if of == arch}
    assert set(read_table(DOCUMENTED_TRITON)[arch]) == launched


@pytest.mark.parametrize("arch", dispatch.ARCHS)
def test_no_documented_kernel_spills_or_is_too_large(arch) -> None:
    limit = {"sm_80": 166_912, "sm_90": 232_448}[arch]
    for key, row in read_table(DOCUMENTED_TRITON)[arch].items():
        assert row["stack"] == 0, key
        assert not {"LDL", "STL"} & set(row["opcodes"]), key
        assert row["shared"] <= limit, key
        assert row["ctas_per_sm"] >= 1, key


def test_a_sample_compiles_into_what_the_table_says(recorded) -> None:
    if not table_file(triton.__version__).exists():
        pytest.skip(f"no table for Triton {triton.__version__}")
    names = ("_norm_kernel", "_scaled_residual_kernel")
    nano = [(launch, arch, models) for launch, arch, models in recorded if models == ["nano"]]
    sample = [
        next(one for one in nano if one[0].name == name and one[1] == arch) for name in names for arch in dispatch.ARCHS
    ]
    rows, faulty = kernel_resources.measure(sample)
    assert faulty == []
    table = read_table(triton.__version__)
    for arch in dispatch.ARCHS:
        assert len(rows[arch]) == len(names)
        assert differences({key: table[arch][key] for key in rows[arch]}, rows[arch]) == []


def test_the_document_shows_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert refresh(text) == text, "python bench/kernel_resources.py --docs writes it anew"
    assert text.count("| norm") >= 2


@pytest.mark.parametrize("arch", dispatch.ARCHS)
def test_every_kernel_that_the_dispatch_tables_choose_is_compiled(recorded, arch) -> None:
    compiled = {
        (launch.name, launch.num_warps, launch.num_stages, launch.constants) for launch, of, _ in recorded if of == arch
    }

    def name_of(operation: str, implementation: str) -> str:
        if implementation == "triton":
            return f"_{operation.removesuffix('_int8')}_kernel"
        return f"_scaled_{implementation}_kernel" if operation in SCALED else f"_{implementation}_kernel"

    for operation, rows in dispatch.read_table(dispatch.TABLES / f"{arch}.json").items():
        for row in rows:
            choice = dict(row["choice"])
            implementation = choice.pop("implementation")
            if implementation in ("torch", "flash", "cudnn"):
                continue
            name = name_of(operation, implementation)
            warps, stages = choice.pop("num_warps"), choice.pop("num_stages")
            choice.pop("programs_per_sm", None)
            assert any(
                (name, warps, stages) == (of, *options) and choice.items() <= dict(constants).items()
                for of, *options, constants in compiled
            ), row


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"registers": 105, "shared": 950, "instructions": 420, "ctas_per_sm": 7}, None),
        ({"registers": 106}, "k: registers 106, in the table 100"),
        ({"registers": 94}, "k: registers 94, in the table 100"),
        ({"shared": 1051}, "k: shared 1051, in the table 1000"),
        ({"instructions": 421}, "k: instructions 421, in the table 400"),
        ({"stack": 8}, "k: stack 8, in the table 0"),
        ({"warps": 12}, "k: warps 12, in the table 4"),
        ({"opcodes": {"HMMA": 95, "LDG": 20, "LDG.128": 1}}, None),
        ({"opcodes": {"HMMA": 94, "LDG": 8, "LDG.128": 8}}, "k: 94 HMMA instructions, in the table 100"),
        ({"opcodes": {"HMMA": 100, "LDG": 64}}, "k: 0 LDG.128 instructions, in the table 8"),
    ],
)
def test_what_a_compiler_may_change_and_what_not(changed, complaint) -> None:
    assert differences({"k": ROW}, {"k": ROW | changed}) == ([complaint] if complaint else [])


def test_new_and_lost_launches_are_differences() -> None:
    assert differences({"old": ROW}, {"new": ROW}) == [
        "new: is not in the table",
        "old: is in the table and no longer launched",
    ]


def test_patch_releases_share_a_table() -> None:
    assert table_file("3.9.0") == table_file("3.9.1")
    assert table_file("3.9.0").name == "triton-3.9.json"


def test_a_difference_and_a_fault_fail_the_command(monkeypatch, tmp_path: Path, capsys) -> None:
    rows = {arch: {"k": ROW} for arch in dispatch.ARCHS}
    monkeypatch.setattr(kernel_resources, "TABLES", tmp_path)
    monkeypatch.setattr(kernel_resources, "DOCUMENT", tmp_path / "kernels.md")
    monkeypatch.setattr(kernel_resources, "DOCUMENTED_TRITON", triton.__version__)
    (tmp_path / "kernels.md").write_text("# Kernels\n<!-- kernels:resources -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(kernel_resources, "record", list)
    monkeypatch.setattr(kernel_resources, "measure", lambda wanted: (rows, []))
    assert kernel_resources.main(["--write"]) == 0
    assert "old" not in (tmp_path / "kernels.md").read_text()
    assert kernel_resources.main([]) == 0
    worse = {"sm_80": {"k": ROW | {"stack": 16}}, "sm_90": {"k": ROW}}
    monkeypatch.setattr(kernel_resources, "measure", lambda wanted: (worse, []))
    capsys.readouterr()
    assert kernel_resources.main([]) == 1
    assert "sm_80 k: stack 16, in the table 0\n" in capsys.readouterr().out
    nano = record_launches(find_config("nano"), dispatch.A100, torch.bfloat16)[0]
    monkeypatch.setattr(
        kernel_resources, "measure", lambda wanted: (rows, [Compiled(nano, "sm_80", faults=("it died",))])
    )
    assert kernel_resources.main([]) == 1
    assert f"sm_80 {nano.key}: it died\n" in capsys.readouterr().out
    assert kernel_resources.main(["--write"]) == 1


def test_a_fault_counts_unless_the_table_knows_of_its_stack() -> None:
    nano = record_launches(find_config("nano"), dispatch.A100, torch.bfloat16)[0]
    spilling = Compiled(nano, "sm_80", resources=Resources(255, 8, 0, 4, 2, 400, {}), faults=("8 bytes of stack",))
    row = {nano.key: ROW | {"stack": 8}}
    table = {"sm_80": row, "sm_90": {}}
    assert compare(table, table, [spilling]) == []
    assert compare(table, table, [replace(spilling, resources=replace(spilling.resources, stack=16))]) != []
    clean = {"sm_80": {nano.key: ROW}, "sm_90": {}}
    assert compare(clean, table, [spilling]) == [
        f"sm_80 {nano.key}: 8 bytes of stack",
        f"sm_80 {nano.key}: stack 8, in the table 0",
    ]
    # What did not compile is one complaint, not two.
    assert compare(clean, {"sm_80": {}, "sm_90": {}}, [Compiled(nano, "sm_80", faults=("it died",))]) == [
        f"sm_80 {nano.key}: it died"
    ]


def test_without_a_table_only_faults_count(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(kernel_resources, "TABLES", tmp_path)
    monkeypatch.setattr(kernel_resources, "record", list)
    monkeypatch.setattr(kernel_resources, "measure", lambda wanted: ({arch: {"k": ROW} for arch in dispatch.ARCHS}, []))
    assert kernel_resources.main([]) == 0
    assert "there is no triton-" in capsys.readouterr().out
