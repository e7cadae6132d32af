"""What workers of the tests run: functions that another process can import."""

import os
import time

import numpy as np
import torch

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


def load_namer():
    """A vision half that says of each tile its first byte, with how many it came, and where it was encoded."""

    def encode(tiles):
        time.sleep(0.05)
        rows = [[float(tile[0, 0, 0]), len(tiles), os.getpid()] for tile in tiles]
        return torch.tensor(rows, dtype=torch.float64)

    return encode
