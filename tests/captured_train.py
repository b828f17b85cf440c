"""train.py whose steps are recorded and replayed on a CPU: `python -m tests.captured_train N …`.

The last rank sends itself SIGTERM when its n-th step begins; 0: never.
"""

import os
import signal
import sys

import train
from config import run_command
from tests.training.recorded_graph import RecordedGraphs
from training import distributed, loop

steps_left = int(sys.argv.pop(1))
one_step, graphs = loop.one_step, RecordedGraphs()


def counted_step(*args: object) -> object:
    global steps_left
    steps_left -= 1
    if steps_left == 0 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        os.kill(os.getpid(), signal.SIGTERM)
    return one_step(*args)


loop.one_step = counted_step
distributed.choose_cuda_graph = lambda *_: True
train.CudaGraphs = lambda: graphs
run_command("train", train.main)
assert graphs.released
print(f"{graphs.captured} graphs, {graphs.replayed} replays")
