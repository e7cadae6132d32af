"""Worker processes: a channel, errors at the start, deaths, and that none outlives its driver."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vitrail.runtime.distributed.worker import Watch, Worker, end, shared_bytes
from vitrail.runtime.errors import CheckpointError, VitrailError

# By the name under which another process finds it.
from vitrail.tests.runtime.distributed.worker_targets import echo, fail, fill, hang


def is_gone(pid, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def start():
    workers = []

    def make(*arguments, **keywords):
        workers.append(Worker("the worker", *arguments, **keywords))
        return workers[-1]

    yield make
    end(workers)
    assert all(is_gone(worker.pid) for worker in workers)


def test_objects_go_to_a_worker_and_come_back(start):
    worker = start(echo, 1, "two")
    assert worker.ready(30) == (1, "two")
    worker.channel.send({"large": bytes(10**6)})
    assert worker.channel.recv() == {"large": bytes(10**6)}
    assert worker.alive


def test_a_worker_that_fails_at_the_start_says_why(start):
    with pytest.raises(CheckpointError, match=r"^no such tensor$"):
        start(fail, "ours").ready(30)
    with pytest.raises(VitrailError, match=r"^ZeroDivisionError: a b$"):
        start(fail, "other").ready(30)


def test_a_worker_that_dies_at_the_start_or_is_late_is_told_of(start):
    worker = start(hang)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(VitrailError, match=r"^the worker ended: signal 9 \(SIGKILL\)$"):
        worker.ready(30)
    worker = start(hang)
    worker.ready(30)
    with pytest.raises(VitrailError, match=r"not ready within 0.01 s"):
        worker.ready(0.01)


def test_a_worker_ends_though_it_hangs(start):
    worker = start(hang)
    worker.ready(30)
    began = time.monotonic()
    worker.close()
    assert not worker.alive
    assert time.monotonic() - began < 3, "it had to be killed"


def test_only_a_death_that_nobody_asked_for_is_reported(start):
    workers = [start(hang) for _ in range(2)]
    for worker in workers:
        worker.ready(30)
    dead = []
    watched = Watch(workers, dead.append)
    os.kill(workers[1].pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not dead and time.monotonic() < deadline:
        time.sleep(0.01)
    workers[0].close()
    watched.close()
    assert dead == [workers[1]]


def test_memory_is_shared_by_a_descriptor_alone(start):
    fd, memory = shared_bytes(100)
    worker = start(fill, fd, 100, fds=(fd,))
    os.close(fd)
    assert worker.ready(30) == "filled"
    assert bytes(memory) == bytes([7]) * 100


def test_workers_end_with_a_driver_that_is_killed_and_its_script_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(  # with no guard: it must not be imported by the worker
        "import sys, time\n"
        "from vitrail.runtime.distributed.worker import Worker\n"
        "from vitrail.tests.runtime.distributed.worker_targets import hang\n"
        "worker = Worker('w', hang)\n"
        "print(worker.ready(30), worker.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    driver = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    try:
        said, pid = driver.stdout.readline().split()
    finally:
        driver.kill()
        driver.communicate()
    assert said == "hanging"
    assert is_gone(int(pid))
