"""`vitrail plan`: what it prints, its JSON, and one line with status 2 for every mistake."""

import json
from pathlib import Path

import pytest

from vitrail.runtime.distributed import plan as plan_module
from vitrail.runtime.distributed.gpus import GPUS

from .command_line import vitrail

V15 = ("plan", "InternVL-Chat-V1-5", "--gpu", "a100-80gb")


def refused(*arguments) -> str:
    ran = vitrail(*arguments)
    assert (ran.status, ran.out) == (2, ""), ran.err
    return ran.err


def test_the_best_placement_comes_first_with_its_memory_and_the_runners_up() -> None:
    ran = vitrail(*V15, "--num-gpus", 2)
    assert ran.status == 0, ran.err
    assert ran.out.startswith("InternVL-Chat-V1-5 on 2 x a100-80gb, LLM bf16, vision bf16\n")
    assert "requests: 7 tiles, 1856 tokens with them, 256 of answer" in ran.out
    assert "costs: the roofline, not measured; shares of the datasheet are published rates" in ran.out
    assert "best: split, 1 for vision, 1 for the LLM (1), max_num_seqs 74" in ran.out
    assert "a GPU for vision: vision weights 11.3" in ran.out
    assert "a GPU for the LLM: LLM weights 39.7" in ran.out
    rows = ran.out.partition("placement  ")[2].splitlines()[1:]
    assert [row.split("  ")[0].strip() for row in rows] == [
        "split, 1 for vision, 1 for the LLM (1)",
        "2 replicas",
        "tensor parallel, 1 x TP2, vision data-parallel",
    ]


def test_the_json_says_all_of_it() -> None:
    options = ("--num-gpus", 1, "--quantization", "int8", "--vision-quantization", "int8", "--rate", 1, "--json")
    ran = vitrail(*V15, *options)
    assert ran.status == 0, ran.err
    report = json.loads(ran.out)
    assert (report["quantization"], report["vision_quantization"], report["num_gpus"]) == ("int8", "int8", 1)
    assert report["workload"] | {"ttft_ms": 0} == {
        **{"tiles": 7, "prompt_tokens": 1856, "output_tokens": 256, "rate": 1, "ttft_ms": 0, "itl_ms": None}
    }
    (one,) = report["placements"]
    assert one["kind"] == "colocated"
    assert one["requests_per_s"] == pytest.approx(2.0, abs=0.02)
    assert one["simulated_requests_per_s"] / one["requests_per_s"] - 1 == pytest.approx(one["difference"])
    assert abs(one["difference"]) < 0.05
    assert one["memory"]["language_weights"] == pytest.approx(21.0, abs=0.05)
    assert one["simulated_ttft_ms"]["mean"] < one["simulated_ttft_ms"]["p99"]
    again = vitrail(*V15, *options)
    assert json.loads(again.out) == report


def test_without_simulation_nothing_simulated_is_printed() -> None:
    ran = vitrail(*V15, "--num-gpus", 4, "--no-simulate", "--json")
    assert ran.status == 0, ran.err
    assert [one["simulated_requests_per_s"] for one in json.loads(ran.out)["placements"]] == [None] * 4


def test_targets_decide_who_is_best_and_the_status() -> None:
    options = ("--num-gpus", 2, "--no-simulate", "--rate", 1)
    free = json.loads(vitrail(*V15, *options, "--json").out)["placements"]
    assert free[0]["kind"] == "split"
    held = json.loads(vitrail(*V15, *options, "--ttft", 600, "--json").out)["placements"]
    assert held[0]["kind"] == "tensor parallel"  # two GPUs run the prompt in half the time
    assert [one["meets_targets"] for one in held] == [True, False, False]
    ran = vitrail(*V15, *options, "--itl", 5, "--ttft", 600)
    assert ran.status == 1
    assert "targets (TTFT 600 ms, ITL 5 ms for 99 %): NOT kept by any placement" in ran.out


def test_a_workload_file_takes_the_place_of_options(tmp_path: Path) -> None:
    file = tmp_path / "w.jsonl"
    file.write_text(
        '{"tiles": 13, "prompt": 64, "output": 128, "rate": 0.5}\n{"tiles": 0, "prompt": 99, "output": 9, "rate": 1}'
    )
    ran = vitrail(*V15, "--num-gpus", 2, "--workload", file, "--no-simulate", "--json")
    assert json.loads(ran.out)["workload"]["rate"] == 1.5
    assert json.loads(ran.out)["workload"]["tiles"] == pytest.approx(13 / 3)
    assert "--tiles does not go with it" in refused(*V15, "--workload", file, "--tiles", 3)
    assert "have rates of their own, 1.5 in all" in refused(*V15, "--workload", file, "--rate", 3)
    file.write_text('{"tiles": 1, "prompt": 2, "output": 3}\n{"tiles": "x", "prompt": 2, "output": 3}')
    assert "w.jsonl, line 2: `tiles` is 'x'" in refused(*V15, "--workload", file)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("plan", "nano", "--gpu", "b200"), "--gpu b200: unknown; known: a100-40gb, a100-80gb, h100, h200, l40s"),
        (("plan", "InternVL-Chat-V1-5", "--gpu", "a100-40gb"), "18.4 GB are short. 2 GPUs would do and --quantization"),
        ((*V15, "--num-gpus", 8, "--rate", 50), "50 requests a second are more than 8 x a100-80gb can answer: at best"),
        ((*V15, "--rate", 1e9), "1024 of them would not do either"),
        ((*V15, "--quantization", "fp8"), "a100-80gb has no kernels for fp8"),
        ((*V15, "--quantization", "int5"), "'int5' is not known"),
        ((*V15, "--vision-quantization", "int4"), "the vision half cannot be int4"),
        ((*V15, "--quantization", "nf4"), "nothing is known of what nf4 costs"),
        ((*V15, "--prompt", 40000), "exceeds the model's context of 32768"),
        ((*V15, "--tiles", 0, "--prompt", 0), "the request would be empty"),
        ((*V15, "--costs", "/nowhere/costs.json"), "/nowhere/costs.json: No such file"),
        (("plan", "nobody/nothing", "--gpu", "h200"), "nobody/nothing"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(arguments, complaint) -> None:
    said = refused(*arguments)
    assert complaint in said
    assert said.count("\n") == 1


def test_measured_costs_come_first_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = {"model": "InternVL-Chat-V1-5", "quantization": None, "vision_quantization": None}
    rows = [
        {"stage": "vision", "tiles": 1, "ms": 50.0},
        {"stage": "prefill", "tokens": 512, "ms": 80.0},
        {"stage": "decode", "rows": 32, "ms": 30.0, "context": 2048},
        {"stage": "beside", "tokens": 512, "rows": 32, "ms": 10.0, "context": 2048},
        {"stage": "kv", "ms": 1e-4},
        {"stage": "pair", "ms": 0.0},
        {"stage": "prompt", "ms": 0.5},
        {"stage": "wake", "tiles": 0, "ms": 2.0},
    ]
    folder = tmp_path / GPUS["a100-80gb"].devices[0]
    folder.mkdir()
    (folder / "costs.json").write_text(json.dumps({"rows": [{**label, **row} for row in rows]}))
    monkeypatch.setattr(plan_module, "RESULTS", tmp_path)
    assert f"costs: measured: {folder / 'costs.json'}\n" in vitrail(*V15, "--no-simulate").out
    assert "costs: the roofline" in vitrail(*V15, "--no-simulate", "--quantization", "int8").out
    assert "costs: measured" in vitrail(*V15, "--no-simulate", "--costs", folder / "costs.json").out


def test_a_contrastive_model_is_refused(tmp_path: Path) -> None:
    from ..random_checkpoints import contrastive_config

    (tmp_path / "config.json").write_text(json.dumps(contrastive_config()))
    assert "this needs a chat model" in refused("plan", tmp_path, "--gpu", "h200")
