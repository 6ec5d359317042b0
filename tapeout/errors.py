"""The one tree of errors. The command line prints one as a paragraph and the page that explains it, and exits with its ``status``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TapeoutError(Exception):
    """Something the user can act on. The message is one paragraph: what was found, and what would fit.

    Attributes:
        status: the command line's exit status.
        page: of the documentation, that explains it, for ``tapeout docs PAGE``: its kind's, or the one given with the message. What
            the code that raised it is about may say more: see ``pages.explaining``.
    """

    status = 2
    page = "errors"

    def __init__(self, message: str = "", *, page: str | None = None) -> None:
        super().__init__(message)
        if page:
            self.page = page


class ModelError(TapeoutError):
    """The model cannot be read or is not what it says: what was found, what was expected, in which file."""

    page = "models"


class SchemeError(TapeoutError):
    """A scheme is unknown, does not fit a tensor, or a target cannot carry it."""

    page = "quantization"


class RecipeError(TapeoutError):
    """A recipe is malformed: the key, and the closest known one."""

    page = "recipes"


class OutputError(TapeoutError):
    """The output cannot be written: it exists, is locked by another process, is read-only, or the disk is full."""


class PackageError(TapeoutError):
    """A package or a store is not whole: a file is missing, differs from its digest, or is of a newer format."""

    page = "package"


class NewerFormat(PackageError):
    """A file is of a newer format than this version reads."""


class RegistryError(TapeoutError):
    """A registry cannot be reached, refuses, or gives what its manifest does not say."""

    page = "registry"


class MissingToolchain(TapeoutError):
    """A runtime or toolchain is not installed; the message holds the command that installs it."""

    status = 3
    page = "doctor"


class MemoryShort(TapeoutError):
    """The machine has less memory than is needed; nothing was loaded, or it was stopped in time."""

    status = 3


class RuntimeCrash(TapeoutError):
    """A runtime died or refused in its worker process: a finding about the runtime, not a crash of ours."""

    status = 1


class NotFinite(RuntimeCrash):
    """A model gave NaN or an infinite number."""

    page = "diff"


class GateFailed(TapeoutError):
    """At least one gate failed."""

    status = 1
    page = "gates"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, if there is one, and the list of known words.

    Example:
        >>> nearest("int4-g23", ["int4-g32", "nf4"])
        "; did you mean 'int4-g32'? (known: int4-g32, nf4)"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (known: {', '.join(names)})"
