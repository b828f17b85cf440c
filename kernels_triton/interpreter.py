"""One line of Triton's interpreter mended: in Triton 3.6 a loop bound cannot become a Python int under NumPy 2.4 or newer.

https://github.com/triton-lang/triton/pull/9172 is the fix. TODO once we need triton>=3.7: delete this file.
"""

from typing import Any

import triton.runtime.interpreter as interpreter

_original = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: type, scope: Any) -> None:
    """The original, then an index taken from the one element instead of from an array."""
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def mend() -> None:
    interpreter._patch_lang_tensor = _patch_lang_tensor
