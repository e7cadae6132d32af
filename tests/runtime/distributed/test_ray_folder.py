"""The folder of a Ray of our own: gone at the end, and at the next start when its owner was killed; no other ever."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vitrail.runtime.distributed.ray_folder import ray_folder

OWNER = """
import sys, time
from pathlib import Path
from vitrail.runtime.distributed.ray_folder import ray_folder
with ray_folder(Path(sys.argv[1])) as folder:
    (Path(folder) / "session").mkdir()
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """A process that has a folder with files, and that folder."""
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_the_folder_is_gone_after_its_block_however_that_ends(tmp_path):
    def fail():
        with ray_folder(tmp_path) as folder:
            (Path(folder) / "session").mkdir()
            assert os.stat(folder).st_mode & 0o777 == 0o700
            raise ValueError("an end")

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="an end"):
        fail()
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_is_deleted_at_the_next_start_once_its_owner_was_killed_and_not_before(tmp_path, owner):
    process, left = owner
    with ray_folder(tmp_path) as ours:
        assert {*tmp_path.iterdir()} == {left, Path(ours)}
    process.kill()
    process.wait()
    assert (left / "session").is_dir()
    with ray_folder(tmp_path) as ours:
        assert {*tmp_path.iterdir()} == {Path(ours)}


def test_what_is_not_certainly_ours_is_left_alone(tmp_path, owner, monkeypatch):
    process, left = owner
    process.kill()
    process.wait()

    with tempfile.TemporaryDirectory(prefix="vitrail-", dir=tmp_path) as without_a_lock:
        link = tmp_path / "vitrail-link"
        link.symlink_to(left)
        lock_is_a_link = tmp_path / "vitrail-lock"
        lock_is_a_link.mkdir(0o700)
        (lock_is_a_link / "owner.lock").symlink_to(left / "owner.lock")
        left.chmod(0o770)
        there = {*tmp_path.iterdir()}
        assert {left, link, lock_is_a_link, Path(without_a_lock)} == there
        with ray_folder(tmp_path) as ours:
            assert {*tmp_path.iterdir()} == {*there, Path(ours)}
        left.chmod(0o700)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getuid", lambda: left.stat().st_uid + 1)
            with ray_folder(tmp_path):
                assert left.exists()
        with ray_folder(tmp_path):
            assert not left.exists()
