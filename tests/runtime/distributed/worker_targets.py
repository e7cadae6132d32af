"""What workers of the tests run: functions that another process can import."""

import time

import numpy as np

from vitrail.runtime.distributed.worker import open_shared
from vitrail.runtime.errors import CheckpointError


def echo(channel, *args):
    channel.send(args)
    while True:
        channel.send(channel.recv())


def fill(channel, fd, num_bytes):
    np.frombuffer(open_shared(fd, num_bytes), np.uint8)[:] = 7
    channel.send("filled")


def fail(_, kind):
    raise {"ours": CheckpointError("no such tensor"), "other": ZeroDivisionError("a\n b")}[kind]


def hang(channel):
    channel.send("hanging")
    time.sleep(600)
