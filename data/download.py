"""Fetching files from the network: the only place that opens a connection (`datasets` opens its own).

A download goes to `<file>.tmp`, is taken up where it stopped when tried again (HTTP Range), checked, flushed to the
disk and renamed into place, so that a file under its own name is whole. Before anything else comes a short look whether
the host answers at all: without a network the error must come in seconds, not after the time-outs of DNS and retries.
"""

import errno
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from data.files import file_sha256, publish
from errors import KestrelError

PROBE_TIMEOUT_S = 4.0
READ_TIMEOUT_S = 30.0
ATTEMPTS = 5
CHUNK = 1 << 20
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
GIVEN_UP = (401, 403, 404, 410)  # trying again will not help
HEADERS = {
    "User-Agent": "kestrel",
    "Accept-Encoding": "identity",
}  # ranges count stored bytes, so nothing compressed on the way


def hub_endpoint() -> str:
    """The hub's address, or that of the mirror in $HF_ENDPOINT."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def is_offline_by_choice() -> bool:
    """Whether $HF_HUB_OFFLINE or $HF_DATASETS_OFFLINE asks to leave the network alone."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(value.strip().lower() in ("1", "true", "yes", "on") for value in values)


def is_reachable(url: str) -> bool:
    """Whether the host of `url` answers anything at all within PROBE_TIMEOUT_S, through proxies if there are any.

    In a thread of its own, since no time-out bounds a DNS look-up; one that hangs is left behind.
    """
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_answers(url)), daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S)
    return bool(answers and answers[0])


def _answers(url: str) -> bool:
    request = urllib.request.Request(url, method="HEAD", headers=HEADERS)
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True  # it refuses this request, but it is there
    except (OSError, HTTPException, ValueError):
        return False
    return True


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    check: Callable[[Path], bool] | None = None,
    progress: Callable[[int], object] = lambda count: None,
    sleep: Callable[[float], object] = time.sleep,
) -> Path:
    """Fetch `url` to `path` unless it is there; up to ATTEMPTS times, 2, 4, 8, … seconds apart.

    sha256     of the whole file; a file that differs is refused
    check      says whether a finished file is what it should be, where no sha256 is known
    progress   told the size of the file so far, again and again
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch(url, temporary, progress)
            break
        except (OSError, HTTPException) as error:
            hopeless = getattr(error, "code", None) in GIVEN_UP or getattr(error, "errno", None) in DISK_ERRORS
            if hopeless or attempt == ATTEMPTS:
                raise KestrelError(f"cannot download {url}: {error} (attempt {attempt} of {ATTEMPTS})") from error
            sleep(2**attempt)
    _check_content(url, temporary, sha256, check)
    publish(temporary, path)
    return path


def _fetch(url: str, temporary: Path, progress: Callable[[int], object]) -> None:
    """Add to `temporary` what is still missing of `url`; OSError unless it is whole afterwards."""
    have = temporary.stat().st_size if temporary.exists() else 0
    request = urllib.request.Request(url, headers=HEADERS | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        response = urllib.request.urlopen(request, timeout=READ_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies beyond what we have: whole, or not the same file
            _settle(temporary, have, error.headers.get("Content-Range", ""))
            return
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with open(temporary, "ab" if resumed else "wb") as handle:
            while chunk := response.read(CHUNK):
                handle.write(chunk)
                progress(handle.tell())
    expected = _expected_size(response, have if resumed else 0)
    if expected is not None and temporary.stat().st_size != expected:
        raise OSError(f"the connection ended after {temporary.stat().st_size} of {expected} bytes")


def _settle(temporary: Path, have: int, content_range: str) -> None:
    if content_range.rpartition("/")[2] != str(have):
        temporary.unlink()
        raise OSError(
            f"the partial file of {have} bytes did not fit what the server has ({content_range or 'unknown size'})"
        )


def _expected_size(response: HTTPResponse, already: int) -> int | None:
    length = response.headers.get("Content-Length")
    return None if length is None else already + int(length)


def _check_content(url: str, temporary: Path, sha256: str | None, check: Callable[[Path], bool] | None) -> None:
    if sha256 is not None and (found := file_sha256(temporary)) != sha256:
        temporary.unlink()
        raise KestrelError(f"what came from {url} is not the expected file: its sha256 is {found}, not {sha256}")
    if check is not None and not check(temporary):
        size = temporary.stat().st_size
        temporary.unlink()
        raise KestrelError(f"what came from {url} is not the expected file ({size} bytes of something else)")
