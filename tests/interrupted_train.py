"""train.py that sends itself SIGTERM when its n-th step begins: `python -m tests.interrupted_train N …`.

Exact where a timer would not be, and through the real signal handler.
"""

import os
import signal
import sys

import train
from config import run_command
from training import loop

steps_left = int(sys.argv.pop(1))
one_step = loop.one_step


def counted_step(*args: object) -> object:
    global steps_left
    steps_left -= 1
    if steps_left == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return one_step(*args)


loop.one_step = counted_step
run_command("train", train.main)
