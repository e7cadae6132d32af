import json
from pathlib import Path

from vitrail.bench import report

ENVIRONMENT = {
    "commit": "abc123",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
    "command": "bench/latency.py",
    "cpu": "CPU",
    "threads": 2,
    "gpu": None,
    "driver": None,
    "versions": {"torch": "2.13.0", "numpy": "2.4"},
}
ROWS = [{"step": "decode", "vitrail_ms": 1.23456, "ratio": 0.5}, {"step": "a|b", "vitrail_ms": 123.456, "ratio": None}]


def results(folder: Path, device: str = "cpu") -> Path:
    (folder / device).mkdir(parents=True)
    document = {"title": "Latency", "notes": "Lower is better.", "environment": ENVIRONMENT, "rows": ROWS}
    (folder / device / "latency.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def page(body: str = "", columns: str = "") -> str:
    return f"before\n<!-- results:latency{columns} -->\n{body}<!-- end -->\nafter\n"


def test_a_region_is_filled_from_the_raw_results_and_the_rest_stays(tmp_path: Path) -> None:
    text = report.refresh(page("an old table\n"), results(tmp_path))
    assert text.splitlines() == [
        "before",
        "<!-- results:latency -->",
        "**Latency**",
        "",
        "| step | vitrail ms | ratio |",
        "|---|---:|---:|",
        "| decode | 1.23 | 0.5 |",
        "| a\\|b | 123.5 |  |",
        "",
        "Lower is better. Measured by `bench/latency.py` on 2026-01-02: CPU, 2 threads; torch 2.13.0, commit abc123.",
        "<!-- end -->",
        "after",
    ]


def test_refreshing_twice_changes_nothing(tmp_path: Path) -> None:
    once = report.refresh(page(), results(tmp_path))
    assert report.refresh(once, tmp_path) == once


def test_every_device_gets_its_table_and_columns_can_be_chosen(tmp_path: Path) -> None:
    results(results(tmp_path), "h200")
    text = report.refresh(page(columns=" columns=step,ratio"), tmp_path)
    assert text.count("| step | ratio |") == 2
    assert "vitrail" not in text


def test_what_was_simulated_is_not_said_to_be_measured(tmp_path: Path) -> None:
    text = report.refresh(page(), results(tmp_path, "simulated"))
    said = "Lower is better. Simulated by `bench/latency.py` on 2026-01-02, commit abc123."
    assert said in text.splitlines()
    assert "Measured" not in text and "CPU" not in text


def test_what_was_not_measured_is_said_and_never_invented(tmp_path: Path) -> None:
    assert report.refresh(page("| 1 |\n"), tmp_path) == page("Not measured yet.\n")


def test_the_documents_agree_with_the_committed_results() -> None:
    assert report.main(["--check"]) == 0
