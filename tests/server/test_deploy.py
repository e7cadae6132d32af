"""The files of docs/deploy: the dashboard names metrics that exist, and what is mounted, copied and set is there."""

import json
import re
from pathlib import Path

import pytest

from vitrail.runtime.server.settings import Settings

from .conftest import data_url

DEPLOY = Path(__file__).resolve().parent.parent.parent / "docs/deploy"
LABELS = re.compile(r"(vitrail_\w+|process_\w+)\{([^}]*)\}")


def test_every_metric_of_the_dashboard_exists_with_its_labels(server):
    server.chat("What?", data_url())
    exposed = [line for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")]
    # Of contrastive models, and of an engine in a process of its own.
    others = {"vitrail_embeddings_total", "vitrail_engine_process_resident_memory_bytes"}
    names = {re.split(r"[{ ]", line)[0] for line in exposed} | others
    dashboard = json.loads((DEPLOY / "grafana/vitrail.json").read_text("utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 20
    for expression in expressions:
        used = LABELS.findall(expression)
        assert used, expression
        assert {name for name, _ in used} <= names, expression
        for name, matchers in used:
            for label, value in re.findall(r'(\w+)="([^"$]+)"', matchers):
                assert any(line.startswith(f"{name}{{") and f'{label}="{value}"' in line for line in exposed), (
                    expression
                )
        for label in re.findall(r"by \(([^)]*)\)", expression):
            for one in set(label.replace(" ", "").split(",")) - {"le"}:
                name = used[0][0]
                has = [line for line in exposed if line.startswith(f"{name}{{")] or [f'{name}{{kind="'] * (
                    name == "vitrail_embeddings_total"
                )
                assert any(f'{one}="' in line for line in has), expression
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "README.md"])
def test_settings_and_files_that_are_named_exist(name):
    text = (DEPLOY / name).read_text("utf-8")
    known = {f"VITRAIL_{field.upper()}" for field in Settings.__dataclass_fields__}
    assert set(re.findall(r"\bVITRAIL_[A-Z_]+", text)) <= known
    assert {flag.replace("-", "_") for flag in re.findall(r"(?<= --)(?:api-key|otlp-endpoint|host|port)\b", text)} <= {
        *Settings.__dataclass_fields__
    }
    for mounted in re.findall(r"- \./(\S+?):", text):
        assert (DEPLOY / mounted).is_file() or mounted == "api-key"
    for file in re.findall(r"`([\w./-]+\.(?:json|yaml|yml))`|`(Dockerfile)`", text):
        assert (DEPLOY / "".join(file)).is_file()
