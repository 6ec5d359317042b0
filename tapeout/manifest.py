"""What a package says of itself, read before anything of it is trusted: bounded JSON, known types, paths that stay inside, no links."""

from __future__ import annotations

import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from tapeout.errors import PackageError

FORMAT_VERSION = 1
MANIFEST = "tapeout.json"
SIGNATURE = "model.sig"
"""The signature, a Sigstore bundle under the name that model-signing gives it; no part of what it signs."""
DEVICE_REPORT = "device_report.json"
"""What a script of the package writes on a device; no part of the package, but it may stand in its directory."""
BESIDE = (SIGNATURE, DEVICE_REPORT)
"""What may stand in a package's directory without being part of it."""

MAX_JSON_BYTES = 64 << 20
"""Of a file that is parsed: a mixture of 256 experts in 61 layers has a manifest of 8 MB."""
_MAX_SIZE = 2**53 - 1  # what every reader of JSON keeps exactly
_MAX_PATH, _MAX_PART = 1024, 255  # bytes of UTF-8: what file systems take
_MAX_ENTRIES = 1_000_000


def read_json(path: Path) -> Any:
    """Read a JSON document that a stranger may have written.

    Raises:
        FileNotFoundError: there is none. PackageError: a link or no ordinary file, more than ``MAX_JSON_BYTES``, not UTF-8, not JSON,
            nested too deep, a key twice in one object, a number that JSON has not (NaN), half a surrogate pair.
    """
    try:
        # Neither follows a link nor waits for the other end of a pipe.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise PackageError(f"{path} is not an ordinary file.")
            with os.fdopen(handle, "rb", closefd=False) as file:
                raw = file.read(MAX_JSON_BYTES + 1)
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise
    except OSError as error:
        link = " (a symbolic link, which a package has none of)" if path.is_symlink() else ""
        raise PackageError(f"{path} cannot be read: {error.strerror}{link}.") from error
    if len(raw) > MAX_JSON_BYTES:
        raise PackageError(
            f"{path} has {path.stat().st_size} bytes; a document of a package has at most {MAX_JSON_BYTES}."
        )
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
        json.dumps(found, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except RecursionError:
        raise PackageError(f"{path} is nested too deep to be a document of a package.") from None
    except ValueError as error:  # of JSON, of UTF-8, of an integer with thousands of digits
        raise PackageError(f"{path} is not JSON that can be trusted: {error}.") from None
    return found


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def safe_path(path: str) -> str:
    """Return the path of a file in a package; ValueError when it is not one that stays inside on every system."""
    why = None
    if not path or len(path.encode("utf-8", "replace")) > _MAX_PATH:
        why = f"has {len(path)} characters"
    elif any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for c in path):
        why = "holds characters that do not show"
    elif "\\" in path:
        why = "holds a backslash"
    elif path.startswith("/") or re.match(r"[A-Za-z]:", path):
        why = "is absolute"
    elif any(part in ("", ".", "..") for part in path.split("/")):
        why = "leaves its folder or has an empty part"
    elif any(len(part.encode()) > _MAX_PART for part in path.split("/")):
        why = f"has a part of more than {_MAX_PART} bytes"
    elif not unicodedata.is_normalized("NFC", path):
        why = "is not in Unicode's composed form (NFC), so that other systems read another name"
    if why:
        shown = path if len(path) <= 60 else f"{path[:60]}…"
        raise ValueError(f"the path {shown!a} {why}")
    return path


def check_distinct(paths: Iterable[str]) -> None:
    """ValueError for two paths that are one file where case does not count (macOS, Windows), or of which one lies below the other."""
    seen: dict[str, str] = {}
    for path in paths:
        same = unicodedata.normalize("NFC", path.casefold())
        if same in seen:
            raise ValueError(f"the paths {seen[same]!a} and {path!a} are one file on some systems")
        seen[same] = path
    for same, path in seen.items():
        parts = same.split("/")
        for count in range(1, len(parts)):
            if "/".join(parts[:count]) in seen:
                raise ValueError(f"the path {path!a} lies below a file")


def check_paths(paths: Iterable[str], what: str) -> None:
    """PackageError unless every path names a file of its own below the directory that it is relative to; ``what`` said so."""
    every = list(paths)
    try:
        check_distinct(map(safe_path, every))
    except ValueError as error:
        raise PackageError(f"{what} names what is no file inside of a package: {error}.") from None


def _shows(text: str) -> str:
    if any(unicodedata.category(c) == "Cc" for c in text):
        raise ValueError("a name holds control characters")
    return text


Name = Annotated[str, StringConstraints(max_length=1024), AfterValidator(_shows)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Bytes = Annotated[int, Field(ge=0, le=_MAX_SIZE)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
FilePath = Annotated[str, AfterValidator(safe_path)]


class _Part(BaseModel):
    # Keys that a later tapeout adds within a format are left alone.
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class _Entry(_Part):
    sha256: Digest
    size: Bytes


class _Model(_Part):
    name: Name
    family: Name
    licence: Name | None
    source_sha256: Digest
    output: Literal["last_hidden_state", "sentence_embedding", "logits"] | None = None
    labels: list[str] | None = None


class _Target(_Part):
    name: Name
    options: dict[str, Any]


class _Artifact(_Part):
    format: Name
    files: Annotated[list[FilePath], Field(min_length=1)]
    context: Count
    bytes_per_token: Bytes
    containers: dict[str, str]
    notes: list[str]
    tokenizer_limits: list[str] = []


class _Generation(_Part):
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: Count
    stop_token_ids: list[int]


class _Needs(_Part):
    runtime: Name
    memory_bytes: Bytes
    key_value_cache_bytes: Bytes
    distributions: list[Name] = []


class _Calibration(_Part):
    text: str | None
    sequences: Count
    length: Count
    seed: int
    device: str | None = None


class _Recipe(_Part):
    calibration: _Calibration | None
    limits: dict[str, Any]
    text: str | None
    tokens: Count


class _Manifest(_Part):
    format_version: Annotated[int, Field(ge=1)]
    tapeout: Name
    model: _Model
    graph: Name = "built"
    scheme: Name
    rounding: Name
    calibration_sha256: Digest | None
    codes_sha256: Digest
    schemes: dict[str, str]
    recipe: _Recipe
    target: _Target
    artifact: _Artifact
    files: dict[FilePath, _Entry]
    beside: dict[FilePath, _Entry]
    generation: _Generation
    needs: _Needs
    root_sha256: Digest
    passed: bool


def read(directory: Path) -> Mapping[str, Any]:
    """Read the manifest of the package in ``directory``, and look at every name there; no other file is opened.

    Raises:
        PackageError: there is no manifest; ``read_json`` refuses it; it is of a newer format; a field is missing or of another type; a path
            is not safe or stands twice; the directory holds a link, a device or a pipe.
    """
    path = directory / MANIFEST
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise PackageError(f"{directory} is not a package: it has no {MANIFEST}.") from None
    version = found.get("format_version") if isinstance(found, dict) else None
    if type(version) is not int:
        raise PackageError(f"{path} cannot be read as a manifest: it has no format_version.")
    if version > FORMAT_VERSION:
        raise PackageError(
            f"{path} has format_version {_short(version)}; this tapeout reads up to {FORMAT_VERSION}: upgrade it."
        )
    try:
        _Manifest.model_validate(found)
        paths = [*found["files"], *found["beside"]]
        check_distinct([*paths, MANIFEST, *BESIDE])
        if absent := [n for n in found["artifact"]["files"] if f"artifact/{n}" not in found["files"]]:
            raise ValueError(f"artifact/{absent[0]} has no digest")
    except ValidationError as error:
        raise PackageError(
            f"{path} cannot be read as a manifest: {_first(error)}; it was cut short or edited by hand."
        ) from None
    except ValueError as error:
        raise PackageError(
            f"{path} cannot be read as a manifest: {error}; it was cut short or edited by hand."
        ) from None
    for _ in walk(directory):  # for what it refuses
        pass
    return dict(found)


def _short(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in a few words."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "missing":
        return f"it lacks {_short(key)[1:-1]}"
    said = str(first["msg"]).removeprefix("Value error, ")
    return (
        said if first["type"] == "value_error" else f"{_short(key)[1:-1]} is {_short(first['input'])}: {said}"
    )


def walk(directory: Path) -> Iterator[str]:
    """Every file below ``directory``, by its path there, in order; nothing is followed.

    Raises:
        PackageError: a symbolic link, a pipe, a socket or a device; more than a million names.
    """
    pending, count = [""], 0
    while pending:
        below = pending.pop()
        with os.scandir(directory / below) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                path, count = f"{below}{entry.name}", count + 1
                if entry.is_symlink():
                    raise PackageError(
                        f"{directory} has a symbolic link at {path!a}, and what it leads to is no part of the package: copy the files "
                        "themselves (cp -rL), or download them into a folder of their own."
                    )
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{path}/")
                elif not entry.is_file(follow_symlinks=False):
                    raise PackageError(
                        f"{directory} has a pipe, a socket or a device at {path!a}; a package has ordinary files alone."
                    )
                else:
                    yield path
                if count > _MAX_ENTRIES:
                    raise PackageError(
                        f"{directory} has more than {_MAX_ENTRIES} names; a package has hundreds."
                    )
