"""Tensors in the safetensors format, written and read as streams.

The format (https://github.com/huggingface/safetensors) is eight bytes of header length, a JSON header with dtype, shape
and offsets of every tensor, then their values. The library of that name reads our files and we read its; we do both
ourselves because then the hash is taken of the very bytes that are written or used, the host holds one tensor of a
GPU's model at a time, and a header is held against the shapes we expect before anything is allocated.
"""

import io
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.manifest import REMEDY, damaged, parse_json
from errors import KestrelError

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]  # tensor name → shape and dtype

CHUNK_BYTES = 1 << 20  # hashing what is still in the processor's cache is twice as fast as 16 MiB at a time
MAX_HEADER_BYTES = 1 << 20  # some 10,000 tensors
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def safetensors_stream(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file in pieces. Wide dtypes come first, so that every tensor is aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        x = tensors[name]
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": CODES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER_BYTES, f"{len(tensors)} tensors need a header of {len(text)} bytes"
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        values = _memory_of(tensors[name].detach().to("cpu").contiguous())
        for start in range(0, len(values), CHUNK_BYTES):
            yield values[start : start + CHUNK_BYTES]


def _memory_of(x: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not a copy of them."""
    return memoryview(x.reshape(-1).view(torch.uint8).numpy())


def read_tensors(
    handle: io.FileIO, size: int, spec: Spec, digest: Any, device: torch.device | str
) -> dict[str, Tensor]:
    """Read a whole file of `size` bytes that should hold exactly the tensors of `spec`; `digest` hashes all of it."""
    names = _read_header(handle, size, spec, digest)
    return {name: _read_tensor(handle, *spec[name], digest).to(device) for name in names}


def _read_header(handle: io.FileIO, size: int, spec: Spec, digest: Any) -> list[str]:
    """Hold the header against `spec` and the size of the file. → tensor names in the order of their values"""
    file = Path(handle.name)
    length = int.from_bytes(_read_into(handle, bytearray(8), digest), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise damaged(file, f"its header claims {length} bytes")
    header = parse_json(_read_into(handle, bytearray(length), digest), file)
    header.pop("__metadata__", None)
    if header.keys() != spec.keys():
        raise _misfit(file, _difference(header.keys(), spec.keys()))
    order = sorted(header, key=lambda name: _offsets(header[name], file))
    end = 0
    for name in order:
        (shape, dtype), found = spec[name], header[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        wanted = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        if any(found.get(key) != value for key, value in wanted.items()):
            raise _misfit(file, f"{name!r:.200} is {_entry_text(found)} and should be {_entry_text(wanted)}")
    if end != size - 8 - length:
        raise damaged(file, f"its tensors take {end} bytes and it holds {size - 8 - length}")
    return order


def _offsets(entry: Any, file: Path) -> tuple[int, int]:
    """Where a tensor's values begin and end; so an empty tensor sorts before the next."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or [type(x) for x in offsets] != [int, int]:
        raise damaged(file, "a tensor in its header has no data_offsets")
    return offsets[0], offsets[1]


def _misfit(file: Path, how: str) -> KestrelError:
    return KestrelError(f"{file} does not fit the configuration it is loaded for: {how}; {REMEDY}")


def _difference(found: Iterable[str], expected: Iterable[str]) -> str:
    """Names on one side only, the first few of them."""
    sides = {"missing": sorted(set(expected) - set(found)), "unexpected": sorted(set(found) - set(expected))}
    firsts = {side: ", ".join(f"{name!r:.80}" for name in names[:3]) for side, names in sides.items()}
    return "; ".join(f"{len(names)} tensors are {side}: {firsts[side]}" for side, names in sides.items() if names)


def _entry_text(entry: dict[str, Any]) -> str:
    return f"{entry.get('dtype')} {entry.get('shape')} at bytes {entry.get('data_offsets')}"[:200]


def _read_tensor(handle: io.FileIO, shape: tuple[int, ...], dtype: torch.dtype, digest: Any) -> Tensor:
    x = torch.empty(shape, dtype=dtype)
    _read_into(handle, _memory_of(x), digest)
    return x


def _read_into(handle: io.FileIO, buffer: bytearray | memoryview, digest: Any) -> bytearray | memoryview:
    """Fill the buffer, hashing each piece while it is in the processor's cache."""
    rest = memoryview(buffer)
    while rest:
        count = handle.readinto(rest[:CHUNK_BYTES])
        if not count:
            raise damaged(Path(handle.name), "it ends early")
        digest.update(rest[:count])
        rest = rest[count:]
    return buffer


def require_finite(tensors: dict[str, Tensor], what: str, consequence: str) -> None:
    """Raise if any value is NaN or infinite."""
    for name, x in tensors.items():
        if x.dtype == torch.float8_e4m3fn:
            x = torch.where(x.view(torch.uint8) & 127 == 127, torch.nan, 0.0)  # it has no infinity, and no arithmetic
        # aminmax passes NaN on and allocates nothing, unlike isfinite
        if x.is_floating_point() and x.numel() and not all(math.isfinite(end) for end in torch.aminmax(x.detach())):
            raise KestrelError(f"{what}: {name!r:.200} holds a value that is not finite; {consequence}")
