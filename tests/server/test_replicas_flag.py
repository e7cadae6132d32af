"""`vitrail serve --replicas`: what the command does before it starts anything."""

import sys
import tomllib

import pytest

from ..runtime.command_line import vitrail


def test_the_flags_are_printed_and_read_from_a_file(tmp_path):
    printed = vitrail("serve", "--replicas", 3, "--vision-replicas", 2, "--print-config").out
    assert (tomllib.loads(printed)["replicas"], tomllib.loads(printed)["vision_replicas"]) == (3, 2)
    file = tmp_path / "server.toml"
    file.write_text("replicas = 4\n")
    assert tomllib.loads(vitrail("serve", "--config", file, "--print-config").out)["replicas"] == 4


@pytest.mark.parametrize("flags", [("--replicas", 2), ("--vision-replicas", 1)])
def test_without_ray_replicas_are_refused_in_one_line(monkeypatch, flags):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = vitrail("serve", "nano", *flags)
    assert (done.status, done.out) == (2, "")
    assert done.err == "vitrail: serve with replicas needs the package ray: pip install 'vitrail[server,ray]'\n"


def test_a_number_of_replicas_that_cannot_be_is_refused():
    done = vitrail("serve", "nano", "--replicas", 0)
    assert (done.status, done.err) == (2, "vitrail: replicas must be an integer of at least 1, not 0\n")
