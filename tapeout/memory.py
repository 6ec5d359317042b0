"""Keep freed memory for the next array."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB that numpy frees, instead of giving it back and faulting it in again page by page.

    The steps of rounding and packing use arrays of a megabyte for a fraction of a millisecond: with glibc's defaults
    four fifths of the time goes into page faults. Other libcs are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 25)
            mallopt(_M_TRIM_THRESHOLD, 1 << 26)
