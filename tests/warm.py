"""Processes with their imports behind them, for tests that start many: a mistake in a command takes 0.3 s, not 3.4.

`python()` stands in a command where `sys.executable` would: what follows, a script, `-m module` or `-c code` with its
arguments, runs in a process forked from one that has imported what our commands import, and done nothing else. It has
an environment, a folder, streams, signals and an exit status of its own. What a test says about starting itself needs
`sys.executable` still.

What a test starts this way is the small tests/warm_client.py. It hands its streams to the server, passes signals on
and ends as the forked process does; when it is killed, so is that one.
"""

import atexit
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLIENT = Path(__file__).with_name("warm_client.py")
IMPORTED = (
    "train", "infer", "matplotlib.backends.backend_agg", "matplotlib.figure", "torch.distributed.run",
    "torch.fx.experimental.symbolic_shapes",  # by torch.empty_like of a meta tensor
)  # fmt: skip


@cache
def python() -> list[str]:
    """The first words of a command. The server ends with the process that asked for it."""
    if sys.platform != "linux":
        return [sys.executable]
    address = str(Path(tempfile.mkdtemp(prefix="kestrel-warm-")) / "socket")
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm", address],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads would not be forked
        start_new_session=True,
    )
    atexit.register(server.stdin.close)
    assert server.stdout.readline() == b"ready\n"
    return [sys.executable, "-I", "-S", str(CLIENT), address]


def run_ranks(module: str, world_size: int, *arguments: object) -> None:
    """main(rank, *arguments) of a module, in a process for each rank; all must end well."""
    codes = [f"from {module} import main; main{(rank, *arguments)!r}" for rank in range(world_size)]
    ranks = [
        subprocess.Popen([*python(), "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace")
        for code in codes
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)


def serve(address: str) -> dict | None:
    """Fork whenever a client comes → what to run, in the forked process; None at the end."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    for name in IMPORTED:
        import_module(name)
    gc.collect()
    gc.freeze()  # so that collecting garbage does not copy all pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    os.write(1, b"ready\n")
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:  # the one who asked is gone
            shutil.rmtree(Path(address).parent)
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return supervise(connection)
        connection.close()


def supervise(connection: socket.socket) -> dict:
    """Fork again → what to run, in the child; the parent ends when it does."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    asked = json.loads(connection.recv(int.from_bytes(head), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        connection.close()
        for stream, number in zip(streams, range(3)):
            os.dup2(stream, number)
            os.close(stream)
        return asked
    for number in (*streams, 0, 1, 2):
        os.close(number)
    end = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([connection, end], [], [])
        if end in ready:
            _, status = os.waitpid(child, 0)
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        number = connection.recv(1)
        signal.pidfd_send_signal(end, number[0] if number else signal.SIGKILL)


def become(command: list[str], environment: dict[str, str], folder: str) -> None:
    """Run the command as a Python that was just started would."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if path not in (str(ROOT), "")]
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path.insert(0, folder if command[0] in ("-c", "-m") else str(Path(command[0]).resolve().parent))
    kind, name, *_ = [*command, ""]
    sys.argv[:] = command[1:] if kind == "-m" else ["-c", *command[2:]] if kind == "-c" else command
    if kind == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(name, vars(sys.modules["__main__"]))
    else:
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    asked = serve(sys.argv[1])
    if asked is not None:
        become(**asked)
