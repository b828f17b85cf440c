"""A console that goes away takes nothing with it."""

import os
import signal
import sys
from pathlib import Path

import pytest

from training.console import LastingStream, lasting_console
from training.loop import StopRequest


def test_a_reader_that_leaves_is_told_of_once_and_then_forgotten(monkeypatch, capsys):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with lasting_console():
        print("heard", flush=True)
        assert os.read(reader, 100) == b"heard\n"
        os.close(reader)
        for _ in range(3):
            print("not heard", flush=True)
    sys.stdout.flush()  # as Python does when it exits
    sys.stdout.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "standard output cannot be written (Broken pipe): training goes on without it" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_a_full_disk_left_in_the_buffer_does_not_come_up_again():
    full = open("/dev/full", "w")  # noqa: SIM115
    stream = LastingStream(full, "standard error")
    stream.write("text")
    stream.flush()
    stream.write("more")
    full.close()


def test_a_console_that_was_never_there_is_no_reason_to_stop(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_console():
        assert not sys.stdout.isatty()
        print("nobody hears this", flush=True)
    assert sys.stdout is None
    assert capsys.readouterr().err.count("\n") == 1


def test_a_character_the_console_cannot_show_is_a_question_mark(tmp_path: Path):
    with open(tmp_path / "out.txt", "w", encoding="ascii") as file:
        LastingStream(file, "standard output").write("é and e")
    assert (tmp_path / "out.txt").read_text() == "? and e"


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_a_terminal_that_hangs_up_asks_to_stop_unless_that_is_to_be_ignored(ignored: bool):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == (None if ignored else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
