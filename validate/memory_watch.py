"""Memory while something is measured: what has room, and a worker that ends before the memory does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import psutil

from tapeout.errors import MemoryShort, TapeoutError
from tapeout.validate.machine_state import memory_at_hand
from tapeout.validate.worker import WorkerSession

__all__ = ["room_for", "watched"]

_WATCH_S = 0.05


def room_for(count: int, root: Path = Path("/")) -> str | None:
    """Why so many bytes more are not to be taken; None: there is room."""
    left = memory_at_hand(root) - _reserve()
    if count <= left:
        return None
    return f"it takes {count / 1e9:.3g} GB more, and {max(0, left) / 1e9:.3g} GB of memory are at hand"


@contextmanager
def watched(session: WorkerSession, name: str, root: Path) -> Iterator[None]:
    """End the worker when less memory than the reserve is left, before the system ends something of its own choice."""
    over, low = Event(), Event()

    def watch() -> None:
        while not over.wait(_WATCH_S):
            if (left := memory_at_hand(root)) < _reserve():
                low.set()
                session.stop(
                    f"{name} was stopped: {left / 1e6:.0f} MB of memory were left, less than the {_reserve() / 1e6:.0f} MB in reserve"
                )
                return

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except TapeoutError as error:
        if low.is_set():
            raise MemoryShort(str(error)) from None
        raise
    finally:
        over.set()
        thread.join()


def _reserve() -> int:
    """What is left to the system: as much as a process can fill between two looks (at 4 GB/s), but no more than a 16th of the memory."""
    return min(200 << 20, psutil.virtual_memory().total // 16)
