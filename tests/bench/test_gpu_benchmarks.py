"""Benchmarks of a GPU, as far as they can be checked without one: every case is launched on tensors without memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitrail.bench import kernels as kernels_bench
from vitrail.bench import table_g as table_g_bench
from vitrail.bench import tune as tune_bench
from vitrail.bench import vision as vision_bench
from vitrail.bench.models import INTERNVL_CHAT_V1_5
from vitrail.kernels import dispatch

from ..random_checkpoints import build, chat_config, random_weights

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_flops_of_the_encoder_are_those_of_the_published_shape() -> None:
    vision = INTERNVL_CHAT_V1_5.vision
    # 45 blocks at 448 px: 11.336 TFLOP of matrix products and 0.605 of attention a tile.
    assert vision_bench.encoder_flops(vision, 45, 1) == pytest.approx(11.941e12, rel=1e-4)
    assert vision_bench.encoder_flops(vision, 45, 7) == pytest.approx(7 * 11.941e12, rel=1e-4)
    for size, tflop in ((224, 3.073), (336, 7.013), (448, 12.741)):
        tokens = (size // 14) ** 2 + 1
        assert vision_bench.encoder_flops(vision, 48, 1, tokens) == pytest.approx(tflop * 1e12, rel=1e-3)


def test_the_papers_rows_add_up_to_its_pairs_per_second() -> None:
    for size, fps in ((224, 48.9), (336, 24.9), (448, 13.9)):
        ms = {"image": table_g_bench.PAPER_IMAGE[size], "queries": 1.0, "text": table_g_bench.PAPER_TEXT}
        c, g = table_g_bench.rows_of(size, ms, 260e12)
        assert c["paper_A100_FPS"] == c["FPS"] == pytest.approx(fps, abs=0.15)
        assert g["paper_A100_FPS"] < c["paper_A100_FPS"]
        assert 0.7 < c["share"] < 0.8  # what the paper's encoder reached of cuBLAS


@pytest.mark.parametrize("target", [dispatch.A100, dispatch.H200], ids=lambda target: target.arch)
@pytest.mark.parametrize(
    "cases",
    [
        lambda: kernels_bench.vision_cases(7),
        lambda: kernels_bench.quantized_vision_cases(7),
        lambda: kernels_bench.decode_cases(8, 2048),
        lambda: kernels_bench.prefill_cases(1856),
    ],
    ids=["vision", "quantised vision", "decode", "prefill"],
)
def test_every_case_launches_its_kernel(monkeypatch, cases, target) -> None:
    monkeypatch.setattr(kernels_bench, "DEVICE", "meta")
    with dispatch.simulate(target, launches := []):
        for case in cases():
            before = len(launches)
            case.run()
            assert case.flops or case.bytes
            library_alone = case.name.startswith("linear,") or case.shape.endswith(("flash", "cudnn"))
            assert len(launches) > before or library_alone, case.name


@pytest.mark.parametrize("operation", tune_bench.OPERATIONS)
@pytest.mark.parametrize("target", [dispatch.A100, dispatch.H200], ids=lambda target: target.arch)
def test_every_candidate_launches_at_every_shape_it_is_tuned_for(monkeypatch, operation, target) -> None:
    monkeypatch.setattr(tune_bench, "DEVICE", "meta")
    spec = tune_bench.OPERATIONS[operation]
    library = {"torch", "flash", "cudnn"}
    for shape in spec.shapes if spec.configs[target.arch] else ():
        with dispatch.simulate(target, launches := []):
            run = spec.make(shape)
            for choice in spec.configs[target.arch]:
                launches.clear()
                with dispatch.override(operation, choice):
                    run()
                assert launches or choice["implementation"] in library


def test_the_waterfall_swaps_techniques_for_plain_torch_and_back() -> None:
    config = chat_config()
    model = build(config, random_weights(config), torch.float32)
    tiles = torch.randint(0, 256, (2, model.config.tile_size, model.config.tile_size, 3), dtype=torch.uint8)
    names = {
        (module, name): getattr(module, name) for swaps in vision_bench.PLAIN.values() for module, name, _ in swaps
    }
    with torch.inference_mode(), vision_bench.plain_torch(list(vision_bench.PLAIN)):
        for module, name in names:
            assert getattr(module, name) is not names[module, name]
        plain = model.vision_model(tiles)
    assert all(getattr(module, name) is before for (module, name), before in names.items())
    with torch.inference_mode():
        expected = model.vision_model(tiles)
    # On a CPU RMSNorm is C++, whose sums come in another order.
    assert (plain - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
@pytest.mark.parametrize(
    "script",
    [
        "kernels.py",
        *(
            pytest.param(name, marks=pytest.mark.slow(smoke=False))
            for name in ("vision.py", "decode.py", "table_g.py", "tune.py")
        ),
    ],
)
def test_without_a_gpu_the_script_says_so_and_exits_with_status_2(script: str) -> None:
    command = [sys.executable, str(ROOT / "bench" / script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == f"{script}: measures a GPU, and no CUDA device is present\n"


def test_the_suite_refuses_a_section_it_does_not_have(tmp_path) -> None:
    command = ["bash", str(ROOT / "bench" / "gpu_suite.sh"), str(tmp_path / "out"), "kernels", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no section nonsense" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []
