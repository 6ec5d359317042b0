"""What the tests of the worker run in it: sessions that answer, print, raise and die."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tapeout.errors import MissingToolchain
from tapeout.validate.session import Facts, Logits

VOCAB = 7


class Echo:
    """Logits that are a function of token and position alone, with every kind of float32 among them."""

    def __init__(self, context: int = 100) -> None:
        self.facts = Facts("echo 1", "none", 0.5, 123, context)
        self.ids: list[int] = []

    def prefill(self, ids: Sequence[int]) -> Logits:
        return np.array([self.decode(token) for token in ids], np.float32).reshape(-1, VOCAB)

    def decode(self, token: int) -> Logits:
        self.ids.append(token)
        odd = [np.inf, -np.inf, np.nan, -0.0, np.float32(1e-45), np.float32(1 / 3)]
        return np.array([token * 1000 + len(self.ids), *odd], np.float32)

    def reset(self) -> None:
        self.ids = []

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()

    def close(self) -> None:
        sys.stdout.write("closed")


class Where(Echo):
    """Says where relative paths begin."""

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(Path.cwd())


class Broken(Echo):
    """Prints to both streams; then does what the token says."""

    def decode(self, token: int) -> Logits:
        os.write(1, b"a word on stdout\n")
        os.write(2, b"the runtime's last words\n")
        if token < 0:
            raise MissingToolchain("install the thing")
        if token == 0:
            raise ValueError("not that one")
        os.kill(os.getpid(), token)
        time.sleep(60)
        raise AssertionError


class Slow(Echo):
    """Writes down who it is, and never comes back from a call."""

    def __init__(self, pid_file: str) -> None:
        super().__init__()
        Path(pid_file).write_text(str(os.getpid()))

    def decode(self, token: int) -> Logits:
        time.sleep(600)
        raise AssertionError


def needs_a_package() -> Echo:
    importlib.import_module("surely_not_installed")
    return Echo()


def dies_at_once() -> Echo:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Echo()


def exits() -> Echo:
    sys.exit("enough")
