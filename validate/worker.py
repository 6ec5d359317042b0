"""Runs a session in a process of its own: a crash of a runtime is a finding, and may be in another Python environment.

Two pipes carry frames: a header of 12 bytes (little-endian: uint32 length of the JSON, uint64 length of the array), the
JSON, and the array's raw bytes. A request is ``{"call": name, "arguments": {…}}``; a reply has one of ``value``,
``array`` (dtype and shape) or ``error`` (the exception's class, message and traceback). Standard output and error of the
worker are not part of it, since runtimes print there: their last lines go into the message of a crash.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from tapeout import errors, pages
from tapeout.errors import MissingToolchain, RuntimeCrash, TapeoutError
from tapeout.models import Generation
from tapeout.validate.batching import time_arrivals
from tapeout.validate.generate import Said, say
from tapeout.validate.session import (
    BatchedSession,
    EncoderSession,
    Facts,
    Logits,
    ModuleSession,
    Session,
    SessionSpec,
    Shown,
    TracedSession,
)
from tapeout.validate.timing import Timing, measure, measure_encoding, measure_inference

__all__ = ["Timing", "WorkerSession", "borrow", "borrowed", "give_back", "open_session"]

_FRAME = struct.Struct("<IQ")
_TAIL_LINES = 40  # of the worker's output that are kept; the longest native backtraces fit
_EXIT_S = 10.0  # how long a worker may take to die on its own
# Not -m: tapeout.validate may import this module, and Python warns of a module that runs a second time.
_MAIN = "import sys; from tapeout.validate.worker import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"


class WorkerSession:
    """A Session whose runtime lives in a worker process. Close it, or use it in a ``with``.

    Every call raises RuntimeCrash when the worker dies in it or the runtime raises; an error of tapeout's own tree that is
    raised in the worker is raised here again. After a crash every further call is one too.
    """

    facts: Facts

    def __init__(self, spec: SessionSpec) -> None:
        self._name = spec.factory
        self.process = spec.process
        self._busy = False
        self._stopped = ""
        self._tail: deque[bytes] = deque(maxlen=_TAIL_LINES)
        command = [spec.python or sys.executable, "-P", "-c", _MAIN]
        # A worker runs what is on disk: it never fetches, and a tokenizer that forks threads has nothing to warn of.
        given = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **spec.environment}
        from_parent, to_worker = os.pipe()
        from_worker, to_parent = os.pipe()
        self._to, self._from = os.fdopen(to_worker, "wb", 0), os.fdopen(from_worker, "rb", 0)
        try:
            self._process = subprocess.Popen(
                [*command, str(from_parent), str(to_parent)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **given},
                pass_fds=(from_parent, to_parent),
                process_group=0,  # Ctrl-C is for the parent, which then closes the session
            )
        except OSError as error:
            self._to.close()
            self._from.close()
            raise MissingToolchain(
                f"{command[0]} cannot be started for {self._name}: {error.strerror}."
            ) from error
        finally:
            os.close(from_parent)
            os.close(to_parent)
        self._drain = threading.Thread(target=self._tail.extend, args=(self._process.stdout,), daemon=True)
        self._drain.start()
        try:
            self.open(spec.arguments)
        except BaseException:
            self.close()
            raise

    def open(self, arguments: Mapping[str, Any]) -> None:
        """Let the factory open another session in the same process, which has paid for its imports; the first must be released."""
        # A worker that was here before began elsewhere: a relative path is the caller's.
        call = {"factory": self._name, "arguments": dict(arguments), "directory": str(Path.cwd())}
        self.facts = Facts(**self._call("open", **call))

    def release(self) -> None:
        """Free the model but keep the process, for ``open``."""
        self._call("release")

    @property
    def ended(self) -> bool:
        """Whether the worker is gone, so that every further call would be a crash."""
        return self._to.closed

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence at once; return float32 [tokens, vocab], the logits after each."""
        return cast(Logits, self._call("prefill", ids=[int(token) for token in ids]))

    def append(self, ids: Sequence[int]) -> Logits:
        """``prefill`` whose last row alone is asked for: float32 [1, vocab] of a session that can leave out the others."""
        return cast(Logits, self._call("append", ids=[int(token) for token in ids]))

    def encode(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> Logits:
        """What an encoder gives of a batch; see EncoderSession."""
        rows, seen = ([[int(value) for value in row] for row in each] for each in (ids, mask))
        return cast(Logits, self._call("encode", ids=rows, mask=seen))

    def decode(self, token: int) -> Logits:
        """Append one token by the runtime's token-by-token road; return float32 [vocab]."""
        return cast(Logits, self._call("decode", token=int(token)))

    def trace(self, ids: Sequence[int], out: str, **settings: Any) -> dict[str, Shown]:
        """Let a TracedSession write what it makes of a sequence on its way; see there."""
        shown = self._call("trace", ids=[int(token) for token in ids], out=out, **settings)
        return {name: Shown(op, rounding, tuple(reads)) for name, (op, rounding, reads) in shown.items()}

    def peaks(self) -> dict[str, float]:
        """The largest magnitude so far of each value that the device holds as float16; see Lowering."""
        return cast(dict[str, float], self._call("peaks"))

    def reset(self) -> None:
        """Begin a new sequence with an empty cache."""
        self._call("reset")

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` by the artifact's own tokenizer."""
        return cast(list[int], self._call("tokenize", text=text))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids by the artifact's own tokenizer, special tokens kept."""
        return cast(str, self._call("detokenize", ids=[int(token) for token in ids]))

    def say(self, strings: Sequence[str], prompts: Sequence[str], generation: Generation) -> Said:
        """Run ``say`` in the worker: thousands of calls, one trip."""
        return Said(
            **self._call("say", strings=list(strings), prompts=list(prompts), generation=asdict(generation))
        )

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def time(
        self,
        prompt_tokens: int,
        new_tokens: int,
        repeats: int,
        chunk: int | None = None,
        warm: bool = True,
    ) -> Timing:
        """Run ``measure`` in the worker, so that no pipe is in the figures."""
        raw = self._call(
            "time",
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            chunk=chunk,
            warm=warm,
        )
        return Timing(tuple(raw["prefill_s"]), tuple(map(tuple, raw["decode_s"])))

    def time_arrivals(
        self, arrive_s: Sequence[float], prompt_tokens: int, new_tokens: int
    ) -> list[tuple[float, float]]:
        """Run ``batching.time_arrivals`` in the worker, whose session is a BatchedSession."""
        given = {"arrive_s": list(arrive_s), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        return [(first, last) for first, last in self._call("time_arrivals", **given)]

    def roof(self) -> dict[str, Any] | None:
        """What the session's device computes, where that is not the machine's processor; see ``device_peaks.roof``."""
        return cast("dict[str, Any] | None", self._call("roof"))

    def cache_bytes(self, tokens: int) -> int | None:
        """Bytes of keys and values of that many tokens, as the runtime lays them out; None: the session does not say."""
        return cast("int | None", self._call("cache_bytes", tokens=tokens))

    def stop(self, reason: str) -> None:
        """End the worker at once, from any thread: the call that it is in raises TapeoutError for that reason."""
        self._stopped = reason
        self._process.kill()

    def time_encoding(self, batch: int, tokens: int, repeats: int) -> list[float]:
        """Run ``measure_encoding`` in the worker."""
        return cast(list[float], self._call("time_encoding", batch=batch, tokens=tokens, repeats=repeats))

    def infer(self, sample: int, output: int) -> Logits:
        """What a module gives of a sample; see ModuleSession."""
        return cast(Logits, self._call("infer", sample=sample, output=output))

    def time_inference(self, samples: int, repeats: int) -> list[float]:
        """Run ``measure_inference`` in the worker."""
        return cast(list[float], self._call("time_inference", samples=samples, repeats=repeats))

    def close(self) -> None:
        """Free the model and end the worker, by force when it does not answer; may be called twice."""
        if not self._busy and not self._to.closed:
            with contextlib.suppress(TapeoutError):  # what a dying runtime says is of no use to anyone by now
                self._call("close")
        self._to.close()
        self._from.close()
        if self._busy:  # in the middle of a call (Ctrl-C) the worker would first finish it
            self._process.kill()
        self._reap()

    def __enter__(self) -> WorkerSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, name: str, **arguments: Any) -> Any:
        if self._to.closed:
            raise RuntimeCrash(f"{self._name}: {name} was called after the worker had ended.")
        if self._busy:  # an exception (Ctrl-C) left it there: the next reply is that call's
            raise RuntimeCrash(f"{self._name}: {name} was called in the middle of another call.")
        self._busy = True
        try:
            _send(self._to, {"call": name, "arguments": arguments})
            reply, array = _receive(self._from)
        except (EOFError, BrokenPipeError):
            raise self._crash(name) from None
        self._busy = False
        if array is not None:
            return array
        if (error := reply.get("error")) is None:
            return reply["value"]
        raise self._error(name, error)

    def _error(self, name: str, error: dict[str, Any]) -> TapeoutError:
        """The exception that the worker met, as one of ours, with the worker's traceback for those who debug."""
        kind = getattr(errors, error["kind"], None)
        if isinstance(kind, type) and issubclass(kind, TapeoutError):
            mapped: TapeoutError = kind(error["message"], page=error["page"])
        else:
            mapped = RuntimeCrash(f"{self._name} raised {error['kind']} in {name}: {error['message']}")
        mapped.add_note(f"In the worker:\n{error['traceback']}")
        return mapped

    def _crash(self, name: str) -> TapeoutError:
        """What a worker that ended in the middle of a call died of."""
        self._busy = False
        self._to.close()
        self._from.close()
        status = self._reap()
        if self._stopped:
            return TapeoutError(self._stopped)
        said = b"".join(self._tail).decode("utf-8", "replace").strip()
        if "No module named 'tapeout'" in said:
            python = self._process.args[0] if isinstance(self._process.args, list) else ""
            return MissingToolchain(
                f"{python} has no tapeout to run {self._name} with: {python} -m pip install tapeout"
            )
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                how += " (out of memory, if nobody sent it)"
        else:
            how = f"exited with status {status}"
        words = f" Its last words:\n{said}" if said else ""
        return RuntimeCrash(f"{self._name}: the worker {how} in {name}.{words}")

    def _reap(self) -> int:
        try:
            status = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        # A process that the runtime itself left behind may hold the pipe open: do not wait for that one.
        self._drain.join(1.0)
        if self._process.stdout and not self._drain.is_alive():
            self._process.stdout.close()
        return status


def open_session(spec: SessionSpec) -> WorkerSession:
    """Open a session in a worker process.

    Raises:
        MissingToolchain: the interpreter, tapeout in it, or the runtime's package is not there.
        RuntimeCrash: the runtime died, or refused the model in words of its own.
        TapeoutError: as the factory raised it.
    """
    return WorkerSession(spec)


_idle: dict[object, WorkerSession] = {}
"""Workers that hold no model, by what a process must share: importing a runtime takes longer than loading a small model."""


def borrow(spec: SessionSpec) -> WorkerSession:
    """Open a session in a worker that an earlier one left, or in a new one."""
    worker = _idle.pop(spec.process, None)
    if worker is None or worker.ended:
        return open_session(spec)
    try:
        worker.open(spec.arguments)
    except BaseException as error:
        _after(error, worker)
        raise
    return worker


def give_back(worker: WorkerSession) -> None:
    """Free the model; its process is kept for the next session of its kind, in this validation or a later one."""
    if not isinstance(worker, WorkerSession) or worker.ended or worker.process in _idle:
        worker.close()
        return
    try:
        worker.release()
    except TapeoutError:  # what a dying runtime says is of no use to anyone by now
        worker.close()
        return
    if not _idle:
        atexit.register(_dismiss)
    _idle[worker.process] = worker


@contextlib.contextmanager
def borrowed(spec: SessionSpec) -> Iterator[WorkerSession]:
    """``borrow``, and ``give_back`` at the end; after a crash the worker is closed."""
    session = borrow(spec)
    try:
        yield session
    except BaseException as error:
        _after(error, session)
        raise
    give_back(session)


def _after(error: BaseException, worker: WorkerSession) -> None:
    """Keep a worker whose caller met an error that is about what it was given; one that a runtime crashed in is closed."""
    if isinstance(error, TapeoutError) and not isinstance(error, RuntimeCrash):
        give_back(worker)
    else:
        worker.close()


def _dismiss() -> None:
    while _idle:
        _idle.popitem()[1].close()


def serve(requests: int, replies: int) -> None:
    """Be the worker: answer the calls that come in on one file descriptor on another, until the parent goes away."""
    threading.Thread(target=_exit_with_parent, args=(replies,), daemon=True).start()
    source, sink = os.fdopen(requests, "rb", 0), os.fdopen(replies, "wb", 0)
    session: Session | BatchedSession | EncoderSession | ModuleSession | TracedSession | None = None
    factory = ""
    while True:
        try:
            request, _ = _receive(source)
        except EOFError:
            os._exit(1)
        name, arguments = request["call"], request["arguments"]
        value: Any = None
        try:
            if name == "open":
                factory = arguments["factory"]
                os.chdir(arguments["directory"])
                session = SessionSpec(factory).imported()(**arguments["arguments"])
                value = asdict(session.facts) if session else None
            elif name == "release":
                if session:
                    session.close()
                session = None
                # What is left is the runtime's own and stays: no later collection need look through it.
                gc.collect()
                gc.freeze()
            elif name == "append":
                one = cast(Session, session)
                value = getattr(one, name, one.prefill)(**arguments)[-1:]
            elif name == "time":
                value = asdict(measure(cast(Session, session), **arguments))
            elif name == "time_arrivals":
                value = time_arrivals(cast(BatchedSession, session), **arguments)
            elif name in ("cache_bytes", "roof"):
                known = getattr(session, name, None)
                value = known(**arguments) if known else None
            elif name == "time_encoding":
                value = measure_encoding(cast(EncoderSession, session), **arguments)
            elif name == "time_inference":
                value = measure_inference(cast(ModuleSession, session), **arguments)
            elif name == "say":
                arguments["generation"]["stop_token_ids"] = tuple(arguments["generation"]["stop_token_ids"])
                generation = Generation(**arguments.pop("generation"))
                value = vars(say(cast(Session, session), generation=generation, **arguments))
            else:
                value = getattr(session, name)(**arguments) if session else None
        except ModuleNotFoundError as error:
            needs = (
                f"{factory} needs the Python package '{error.name}', which {sys.executable} does not have."
            )
            _send(sink, _described(MissingToolchain(needs)))
        except Exception as error:
            _send(sink, _described(error))
        else:
            if isinstance(value, np.ndarray):
                _send(sink, {}, value)
            else:
                _send(sink, {"value": value})
        if name == "close":
            sys.stdout.flush()
            os._exit(0)  # everything is freed; libraries that crash when Python takes them down prove nothing


def _described(error: Exception) -> dict[str, Any]:
    kind = type(error).__name__
    return {
        "error": {
            "kind": kind,
            "message": str(error),
            "page": pages.explaining(error) if isinstance(error, TapeoutError) else None,
            "traceback": "".join(traceback.format_exception(error)),
        }
    }


def _exit_with_parent(replies: int) -> None:
    """End the process as soon as nobody can read its replies, even in the middle of a native call.

    Not PR_SET_PDEATHSIG: it fires when the *thread* that started the worker ends.
    """
    poll = select.poll()
    poll.register(replies, 0)  # POLLERR is always reported: the reading end is closed
    poll.poll()
    os._exit(1)


def _send(sink: BinaryIO, header: dict[str, Any], array: npt.NDArray[Any] | None = None) -> None:
    body = b""
    if array is not None:
        array = np.ascontiguousarray(array)
        header = {"array": [array.dtype.str, array.shape]}
    body = json.dumps(header).encode()
    _write(sink, memoryview(_FRAME.pack(len(body), 0 if array is None else array.nbytes) + body))
    if array is not None and array.nbytes:
        _write(sink, array.reshape(-1).data.cast("B"))


def _write(sink: BinaryIO, view: memoryview) -> None:
    while view:
        view = view[sink.write(view) :]


def _receive(source: BinaryIO) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
    """Read a frame: the JSON, and the array if it brings one. EOFError when the other side is gone."""
    length, nbytes = _FRAME.unpack(_read(source, bytearray(_FRAME.size)))
    header: dict[str, Any] = json.loads(bytes(_read(source, bytearray(length))))
    if "array" not in header:
        return header, None
    dtype, shape = header["array"]
    array = np.empty(shape, dtype)
    if nbytes:
        _read(source, array.reshape(-1).data.cast("B"))
    return header, array


def _read(source: BinaryIO, buffer: bytearray | memoryview) -> bytearray | memoryview:
    view = memoryview(buffer)
    while view:
        count = source.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]
    return buffer
