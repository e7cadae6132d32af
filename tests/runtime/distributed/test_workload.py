"""Workloads: averages over kinds, and files whose mistakes are named by line and field."""

import pytest

from vitrail.runtime.distributed.workload import Kind, Workload, read_workload, workload_of
from vitrail.runtime.errors import CapacityError, ConfigError
from vitrail.runtime.kernel_pack import GEOMETRIES

V15 = GEOMETRIES["InternVL-Chat-V1-5"]


def test_averages_weigh_kinds_and_contexts_weigh_answers() -> None:
    workload = Workload((Kind(7, 64, 256, 3), Kind(0, 100, 1, 1)), 256)
    assert workload.tiles == 21 / 4
    assert workload.prompt == (3 * 1856 + 100) / 4
    assert workload.output == (3 * 256 + 1) / 4
    assert workload.longest == 1856 + 256
    # Nearly every row of a decode step is of the long kind.
    assert workload.context == pytest.approx((3 * 256 * 1984 + 100.5) / 769)
    assert workload.held == pytest.approx((3 * 256 * 2112 + 101) / 769)
    assert Workload((Kind(7, 64, 256),), 256).context == 1984


def test_a_request_longer_than_the_context_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"33069 tokens, answer included, exceeds the model's context of 32768"):
        workload_of(V15, [Kind(0, 300, 1), Kind(0, 32769, 300)])


def test_a_file_gives_kinds_with_weights_or_rates(tmp_path) -> None:
    file = tmp_path / "w.jsonl"
    file.write_text(
        '{"tiles": 7, "prompt": 64, "output": 256, "weight": 3}\n\n{"tiles": 0, "prompt": 9, "output": 1}\n'
    )
    assert read_workload(file) == ([Kind(7, 64, 256, 3), Kind(0, 9, 1, 1)], None)
    file.write_text(
        '{"tiles": 7, "prompt": 64, "output": 2, "rate": 1.5}\n{"tiles": 1, "prompt": 0, "output": 1, "rate": 2}'
    )
    assert read_workload(file) == ([Kind(7, 64, 2, 1.5), Kind(1, 0, 1, 2)], 3.5)


GOOD = '{"tiles": 1, "prompt": 2, "output": 3}'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no line describes a request"),
        (f'{GOOD}\n{{"tiles": 1,', "line 2, column 13"),
        (f"{GOOD}\n\n[1]", "line 3: expected an object, found list"),
        ('{"tiles": 1, "prompt": 2}', "line 1: `output` is missing"),
        ('{"tiles": 1, "prompt": 2, "output": 0}', "line 1: `output` is 0; expected a whole number from 1 on"),
        ('{"tiles": -1, "prompt": 2, "output": 3}', "line 1: `tiles` is -1"),
        ('{"tiles": true, "prompt": 2, "output": 3}', "line 1: `tiles` is True"),
        ('{"tiles": 1.5, "prompt": 2, "output": 3}', r"line 1: `tiles` is 1\.5"),
        ('{"tiles": 1, "prompt": "2", "output": 3}', "line 1: `prompt` is '2'"),
        ('{"tiles": 0, "prompt": 0, "output": 3}', "line 1: `prompt` is 0, and there are no tiles"),
        (f'{GOOD[:-1]}, "weight": 0}}', "line 1: `weight` is 0; expected a number above 0"),
        (f'{GOOD[:-1]}, "weight": NaN}}', "line 1: `weight` is nan"),
        (f'{GOOD[:-1]}, "rate": null}}', "line 1: `rate` is None"),
        (f'{GOOD[:-1]}, "rate": 1, "weight": 2}}', "line 1: `weight` and `rate` both"),
        (f'{GOOD[:-1]}, "tile": 1}}', "line 1: unknown field `tile`; known: tiles, prompt, output, weight, rate"),
        (f'{GOOD}\n{GOOD[:-1]}, "rate": 1}}', "`rate` stands in 1 of 2 lines"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_a_mistake_in_a_file_is_named_by_line_and_field(tmp_path, text, complaint) -> None:
    file = tmp_path / "w.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"w.jsonl(, |: ){complaint}"):
        read_workload(file)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: No such file"):
        read_workload(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.jsonl: not a text in UTF-8"):
        read_workload(tmp_path / "binary.jsonl")
