"""Compiling the kernels of some work side by side, before that work is done.

Triton compiles a kernel when it is first launched, one after the other, and holds Python's lock meanwhile. Here the work
is done once in vain: what is not compiled yet is not launched, and a forked process compiles it for Triton's cache on
disk instead. When all have ended the same work finds every kernel there. What it computed is worth nothing, so it must
not matter: no weights may be in place yet, and nothing may ask the device for a number.

A note in Triton's cache says what has been compiled so, and the next start skips it.
"""

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

import torch
import triton

SAY_EVERY_S = 2.0
WAIT_S = 120.0  # for another rank

rehearsing = False  # `launch` launches nothing meanwhile, not even what is compiled: it could write to weights


class Compilers:
    """Child processes, each of which compiles one kernel and is gone."""

    def __init__(self, at_once: int, say: Callable[[str], None]) -> None:
        self.at_once, self.say = at_once, say
        self.seen: set[tuple] = set()
        self.running: set[int] = set()
        self.failed = 0
        self.began = self.said = time.monotonic()

    def hook(self, *, key: object, fn: object, **_: object) -> bool:
        """As triton.knobs.runtime.jit_cache_hook, asked before a kernel is compiled: True means that it is left."""
        kernel = fn.jit_function
        if (known := (id(kernel), str(key))) in self.seen:
            return True
        self.seen.add(known)
        while len(self.running) >= self.at_once:
            self.wait_for_one()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads live; the child takes no lock of theirs
            child = os.fork()
        if child == 0:
            kernel.compile = compile_and_leave(kernel.compile)
            return False
        self.running.add(child)
        return True

    def wait_for_one(self) -> None:
        child, status = self.first_to_end()
        self.running.discard(child)
        self.failed += status != 0
        if time.monotonic() - self.said > SAY_EVERY_S:
            self.said = time.monotonic()
            self.say(f"compiling kernels: {len(self.seen) - len(self.running)} of {len(self.seen)} so far")

    def first_to_end(self) -> tuple[int, int]:
        """Whichever of ours ends first; children that others started are left to them."""
        while True:
            for child in self.running:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    return ended, status
            time.sleep(0.005)

    def finish(self) -> None:
        while self.running:
            self.wait_for_one()


def compile_and_leave(compile_kernel: Callable) -> Callable:
    """What a child does: nothing after compiling, whether that went well or not."""

    def then_leave(*args: object, **options: object) -> None:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # the parent says it when it compiles this
                compile_kernel(*args, **options)
            code = 0
        finally:
            os._exit(code)

    return then_leave


@contextmanager
def compiling_ahead(say: Callable[[str], None], at_once: int | None = None) -> Iterator[Compilers]:
    """While this lasts kernels that are not compiled yet are not launched; at its end all are in Triton's cache.

    say       told how it goes, now and then, and at the end if anything was compiled
    at_once   processes; None: one for each core
    """
    global rehearsing
    with suppress(ImportError):  # half a second, which every child would take again: a hash over all of Triton
        from triton.runtime.cache import triton_key
        triton_key()
    runtime = triton.knobs.runtime
    compilers, before = Compilers(at_once or os.cpu_count() or 1, say), runtime.jit_cache_hook
    runtime.jit_cache_hook, rehearsing = compilers.hook, True
    try:
        yield compilers
    finally:
        runtime.jit_cache_hook, rehearsing = before, False
        compilers.finish()
    if compilers.seen:
        say(f"compiled {len(compilers.seen)} kernels in {time.monotonic() - compilers.began:.1f} s")


def note_of(what: object) -> Path:
    """The file that says that the kernels for `what` are in Triton's cache, if they are."""
    digest = hashlib.sha256(f"{triton.__version__} {what}".encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return Path(triton.knobs.cache.dir) / f"kestrel-{digest.hexdigest()[:32]}"


def compile_once(what: object, work: Callable[[], None], say: Callable[[str], None]) -> None:
    """Have the kernels that `work` launches compiled, unless a note says that they are. One rank of a machine does it.

    Whatever goes wrong is no error here: each kernel is then compiled when it is launched, and says itself what is wrong.
    """
    note = note_of(what)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        began = time.time()
        while not note.exists() and time.time() < began + WAIT_S:
            with suppress(OSError, ValueError):
                if float(gave_up(note).read_text()) > began - WAIT_S:
                    return
            time.sleep(0.05)
        return
    if note.exists():
        return
    done = False
    try:
        with compiling_ahead(say) as compilers:
            work()
        done = not compilers.failed
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(f"kernels are compiled one by one, as they are needed ({reason})")
    finally:
        with suppress(OSError):  # where nothing can be noted, nothing was cached
            note.parent.mkdir(parents=True, exist_ok=True)
            if done:
                note.touch()
            else:
                gave_up(note).write_text(str(time.time()))


def gave_up(note: Path) -> Path:
    """Beside a note that was not written: when its rank ended without it, for those that wait."""
    return note.with_suffix(".failed")
