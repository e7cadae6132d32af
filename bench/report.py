"""Tables of the documents, made from the committed raw results.

    python bench/report.py            rewrite what lies between the markers of README.md and docs/*.md
    python bench/report.py --check    change nothing; exit 1 if a document is out of date

`<!-- results:NAME -->` ... `<!-- end -->` in a document holds one table per `bench/results/<device>/NAME.json`;
`<!-- results:NAME columns=a,b -->` keeps only those columns.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
SIMULATED = "simulated"  # the folder of results that no device had a part in
REGION = re.compile(
    r"(?P<open><!-- results:(?P<name>[\w-]+)(?: columns=(?P<columns>[\w,]+))? -->\n).*?(?P<close><!-- end -->)",
    re.DOTALL,
)


def refresh(text: str, results: Path) -> str:
    """`text` with every region between markers rendered anew from the files below `results`."""

    def region(match: re.Match[str]) -> str:
        columns = match["columns"].split(",") if match["columns"] else None
        files = sorted(results.glob(f"*/{match['name']}.json"))
        tables = [
            render(json.loads(file.read_text(encoding="utf-8")), columns, simulated=file.parent.name == SIMULATED)
            for file in files
        ]
        return match["open"] + "\n".join(tables or ["Not measured yet.\n"]) + match["close"]

    return REGION.sub(region, text)


def render(document: Mapping[str, Any], columns: Sequence[str] | None = None, *, simulated: bool = False) -> str:
    """One results file as markdown: caption, table, and a line that says where and with what it was measured.

    simulated: on no device, whose name would say nothing.
    """
    rows = document["rows"]
    keys = list(columns or dict.fromkeys(key for row in rows for key in row))
    lines = [f"**{document['title']}**", ""] if document.get("title") else []
    lines.append("| " + " | ".join(_heading(key) for key in keys) + " |")
    lines.append("|" + "|".join("---:" if _is_numeric(rows, key) else "---" for key in keys) + "|")
    lines += ["| " + " | ".join(_cell(key, row.get(key)) for key in keys) + " |" for row in rows]
    origin = _simulated_by if simulated else _measured_on
    lines += ["", " ".join(part for part in (document.get("notes"), origin(document["environment"])) if part), ""]
    return "\n".join(lines)


def _heading(key: str) -> str:
    """`vitrail_ms` -> `vitrail ms`."""
    return key.replace("_", " ").strip()


def _cell(key: str, value: Any) -> str:
    """An empty cell for None, three significant digits for a measurement, everything else as it is."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    if key.endswith("percent") or abs(value) >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def _is_numeric(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return all(isinstance(row.get(key), int | float | None) for row in rows)


def _measured_on(environment: Mapping[str, Any]) -> str:
    threads = f"{environment['threads']} thread{'' if environment['threads'] == 1 else 's'}"
    machine = environment.get("gpu") or f"{environment['cpu']}, {threads}"
    if environment.get("driver"):
        machine += f", driver {environment['driver']}"
    versions = environment["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if name in versions)
    return (
        f"Measured by `{environment['command']}` on {environment['date'][:10]}: {machine}; {software}"
        f"{_commit(environment)}."
    )


def _simulated_by(environment: Mapping[str, Any]) -> str:
    return f"Simulated by `{environment['command']}` on {environment['date'][:10]}{_commit(environment)}."


def _commit(environment: Mapping[str, Any]) -> str:
    commit = f", commit {environment['commit']}" if environment.get("commit") else ""
    return commit + (" with local changes" if environment.get("dirty") else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Refresh the documents, or with `--check` only compare; the exit status."""
    parser = argparse.ArgumentParser(description="Write the result tables of the documents from the raw results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a document is out of date")
    check = parser.parse_args(argv).check
    stale = 0
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        fresh = refresh(text, RESULTS)
        if fresh == text:
            continue
        stale += 1
        print(f"{path.relative_to(REPOSITORY)}: {'out of date' if check else 'refreshed'}")
        if not check:
            path.write_text(fresh, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
