"""Two things mended in Triton's interpreter.

In Triton 3.6 a loop bound cannot become a Python int under NumPy 2.4 or newer:
https://github.com/triton-lang/triton/pull/9172. TODO once we need triton>=3.7: delete that half.

Up to 3.9 it converts to 8-bit floating point wrongly where rounding carries into the exponent, and neither saturates nor
knows infinity and NaN, as GPUs do. PyTorch does it right, so it does it here.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

_original = interpreter._patch_lang_tensor
_convert_original = interpreter._convert_float

WIDE = {tl.float32: torch.float32, tl.float16: torch.float16}
NARROW = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def _patch_lang_tensor(tensor: type, scope: Any) -> None:
    """The original, then an index taken from the one element instead of from an array."""
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert_float(values: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
    """To and from 8 bits as a GPU does: to the nearest, the largest value for what is larger."""
    if from_type in WIDE and to_type in NARROW:
        wide = torch.from_numpy(np.ascontiguousarray(values)).view(WIDE[from_type])
        largest = torch.finfo(NARROW[to_type]).max
        return wide.float().clamp(-largest, largest).to(NARROW[to_type]).view(torch.uint8).numpy()
    if from_type in NARROW and to_type in WIDE:
        narrow = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8)).view(NARROW[from_type])
        return narrow.to(WIDE[to_type]).numpy()
    return _convert_original(values, from_type, to_type, rounding)


def mend() -> None:
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter._convert_float = _convert_float
