"""The one exception users are meant to see: a sentence that names the bad value and the remedy.

The commands print it as a single line and exit with status 2; everything else is a defect and keeps its traceback.
"""


class KestrelError(ValueError):
    """Something the user gave us cannot work; the message says what, and what to do instead."""
