"""A process forked from a warm one is one of its own, and what is seen of it is what would be of one just started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import warm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are not forked here")
SHOW = """
import os, sys, train
print(sys.argv[1:], __name__, os.getcwd(), os.environ["WARM"], os.environ.get("OTHER"), sys.stdin.read())
print("complaint", file=sys.stderr)
sys.exit(7)
"""


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*warm.python(), *command], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("how", ["code", "script", "module"])
def test_arguments_folder_environment_streams_and_status_are_its_own(how, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OTHER", "to the server unknown")
    (tmp_path / "show.py").write_text(SHOW)
    command = {"code": ["-c", SHOW], "script": ["show.py"], "module": ["-m", "show"]}[how]
    done = run(*command, "a", "-b c", cwd=tmp_path, env=os.environ | {"WARM": "yes"}, input="typed")
    assert done.stdout == f"['a', '-b c'] __main__ {tmp_path} yes to the server unknown typed\n"
    assert (done.stderr, done.returncode) == ("complaint\n", 7)


def test_an_exception_is_traced_on_stderr():
    done = run("-c", "1 / 0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_nothing_is_done_before_and_nothing_is_left_behind():
    """No random number was drawn, no thread started, and one process does not see what another did."""
    look = "import threading, torch; print(torch.initial_seed(), threading.active_count(), torch.get_num_threads())"
    first = run("-c", f"{look}; torch.manual_seed(5); torch.set_num_threads(3); import sys; sys.modules['x'] = 1")
    second = run("-c", f"{look}; import x")
    assert first.returncode == 0
    assert second.stdout == first.stdout
    assert "No module named 'x'" in second.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("handled", [True, False])
def test_signals_arrive_and_can_end_it(number: signal.Signals, handled: bool):
    code = f"import signal, sys, time; signal.signal({number}, lambda *_: sys.exit(5)) if {handled} else 0"
    code += "; print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen([*warm.python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (5 if handled else -number)


def test_killed_it_takes_the_forked_process_along():
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen([*warm.python(), "-c", code], stdout=subprocess.PIPE)
    forked = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{forked}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_server_ends_with_the_one_that_asked_for_it():
    code = "from tests import warm; print(warm.python()[-1])"
    folder = Path(subprocess.run([sys.executable, "-c", code], cwd=warm.ROOT, capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 30
    while folder.parent.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
