"""README.md is executed: its code runs, and what it names exists."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path
from shutil import which
from socket import socket
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [body for named, body in fences if named == language]


def command_lines(program: str) -> list[list[str]]:
    """The words of every line of README's plain blocks that starts with `program`, comments dropped."""
    lines = [line.partition(" #")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line.split() for line in lines if line.startswith(f"{program} ")]


def run_vitrail(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sysconfig.get_path("scripts")) / "vitrail"), *arguments]
    wide = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True, check=False, timeout=300)


def test_the_quick_start_runs_and_answers() -> None:
    quick_start, *_ = blocks("python")
    assert len([line for line in quick_start.splitlines() if line.strip()]) <= 10
    done = subprocess.run(
        [sys.executable, "-c", quick_start], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answer, *_, streamed = done.stdout.splitlines()
    assert answer == streamed == re.search(r"print\(answer\.text\)  # (.+)", quick_start)[1]


def test_the_lines_for_several_devices_run_and_answer() -> None:
    *_, snippet = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.strip() == re.search(r"\.text\)  # (.+)$", snippet, re.MULTILINE)[1], done.stderr


def test_the_lines_for_the_server_are_answered() -> None:
    """By a server on a port that is free; theirs may not be."""
    [curl] = [block for block in blocks("") if block.startswith("curl ")]
    _, snippet, _ = blocks("python")
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sysconfig.get_path("scripts")) / "vitrail"), "serve", "nano", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            wait_until_ready(port, server)
            options: Any = {"cwd": ROOT, "capture_output": True, "text": True, "check": False, "timeout": 60}
            done = subprocess.run([sys.executable, "-c", snippet.replace(":8000", f":{port}")], **options)
            assert done.stdout.strip() == re.search(r"  # (.+)$", snippet)[1], done.stderr
            if which("curl") is not None:
                done = subprocess.run(["sh", "-c", curl.replace(":8000", f":{port}")], **options)
                assert json.loads(done.stdout)["choices"][0]["message"]["content"], done.stderr
        finally:
            server.terminate()
    assert server.returncode == 0


def wait_until_ready(port: int, server: subprocess.Popen[str]) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:
            assert server.poll() is None, server.stdout.read()
            time.sleep(0.1)
    raise AssertionError("the server is not ready within a minute")


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for words in command_lines("make")} | set(re.findall(r"`make ([a-z-]+)`", README))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("command", sorted({words[1] for words in command_lines("vitrail")}))
def test_the_commands_exist_with_the_options_that_are_shown(command: str) -> None:
    done = run_vitrail(command, "--help")
    assert done.returncode == 0, done.stderr
    line = next(line for block in blocks("") for line in block.splitlines() if line.startswith(f"vitrail {command} "))
    for option in re.findall(r"--[a-z][a-z-]*", line):
        assert option in done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


def test_the_map_names_files_that_exist() -> None:
    words = re.findall(r"`([\w/.]+(?:/|\.py))`", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    rooms = ("kernels", "csrc", "runtime", "export", "bench", "tests", "tools", "examples")
    paths = [f"/{path.relative_to(ROOT)}" for room in rooms for path in [ROOT / room, *(ROOT / room).rglob("*")]]
    assert words
    assert [word for word in words if not any(path.endswith(f"/{word.rstrip('/')}") for path in paths)] == []
