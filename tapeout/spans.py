"""Where in the files of a directory tensors lie, by the readers of the formats' owners."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tapeout.errors import TapeoutError

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Span:
    """Bytes of a file that are one tensor."""

    path: str
    offset: int
    size: int
    name: str

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.size


def find(directory: Path, paths: Iterable[str]) -> dict[str, list[Span]]:
    """The tensors of each safetensors and GGUF file and of ONNX's external data, in the order of the file.

    Files of other formats have none, nor those that their reader refuses or that has no reader here: nobody's loss but a finer view.
    Of tensors that share bytes the first counts, and none that its file is too short for.
    """
    every = set(paths)
    found: set[Span] = set()
    for path in sorted(every):
        read = _READERS.get(PurePosixPath(path).suffix)
        if read is None:
            continue
        try:
            found |= {span for span in read(directory, path) if span.path in every and span.size > 0}
        except (TapeoutError, ImportError, OSError, ValueError, LookupError) as error:
            log.info("no tensors are seen in %s: %s", directory / path, error)
    files: dict[str, list[Span]] = {path: [] for path in every}
    for span in sorted(found):
        before = files[span.path]
        begin = before[-1].end if before else 0
        if begin <= span.offset and span.end <= (directory / span.path).stat().st_size:
            before.append(span)
    return files


def _safetensors(directory: Path, path: str) -> list[Span]:
    from tapeout.models.checkpoint import read_header

    tensors, _ = read_header(directory / path)
    return [Span(path, each.offset, each.nbytes, name) for name, each in tensors.items()]


def _gguf(directory: Path, path: str) -> list[Span]:
    from tapeout.models.gguf_header import read

    tensors = read(directory / path).tensors
    return [Span(path, int(each.data_offset), int(each.n_bytes), each.name) for each in tensors]


def _onnx(directory: Path, path: str) -> list[Span]:
    from tapeout.exporters.onnx.reader import places

    folder = PurePosixPath(path).parent
    return [
        Span((folder / file).as_posix(), offset, size, name)
        for name, (file, offset, size) in places(directory / path).items()
    ]


_READERS = {".safetensors": _safetensors, ".gguf": _gguf, ".onnx": _onnx}
