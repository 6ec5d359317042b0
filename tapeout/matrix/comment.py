"""A text as the one comment of a pull request: written the first time, and written anew each time after.

    python -m tapeout.matrix.comment packages/index.md

Which pull request, of which system, and the token are in the variables that CI systems set; see ``place``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapeout.errors import TapeoutError

MARK = "<!-- tapeout matrix -->\n"
"""Starts our comment, so that the next run finds it."""
_MOST = 65_000
"""Letters of a comment: GitHub takes 65536."""
_PAGE = 100
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Place:
    """Where comments are: the address of the list of them, of one (``{id}``), how one is changed, who we are, and what proves it."""

    comments: str
    one: str
    change: str
    user: str
    headers: Mapping[str, str]


def place(environment: Mapping[str, str]) -> Place:
    """The comments of the pull request that this job is for.

    GitHub: ``GITHUB_TOKEN``, ``GITHUB_REPOSITORY``, ``PULL_REQUEST`` and ``GITHUB_API_URL``; Buildkite's ``BUILDKITE_REPO`` and
    ``BUILDKITE_PULL_REQUEST`` stand for two of them. GitLab: ``TAPEOUT_TOKEN`` and its own ``CI_…``.

    Raises:
        TapeoutError: one is missing.
    """
    if "CI_API_V4_URL" in environment:
        api, project, number, token = _given(
            environment, "CI_API_V4_URL", "CI_PROJECT_ID", "CI_MERGE_REQUEST_IID", "TAPEOUT_TOKEN"
        )
        notes = f"{api}/projects/{urllib.parse.quote(project, safe='')}/merge_requests/{number}/notes"
        return Place(notes, f"{notes}/{{id}}", "PUT", f"{api}/user", {"PRIVATE-TOKEN": token})
    given = dict(environment)
    if "BUILDKITE_REPO" in given:
        # git@github.com:owner/name.git and https://github.com/owner/name.git
        found = re.search(r"[:/]([^/:]+/[^/]+?)(?:\.git)?/?$", given["BUILDKITE_REPO"])
        given.setdefault("GITHUB_REPOSITORY", found[1] if found else "")
        given.setdefault("PULL_REQUEST", given.get("BUILDKITE_PULL_REQUEST", ""))
    repository, number, token = _given(given, "GITHUB_REPOSITORY", "PULL_REQUEST", "GITHUB_TOKEN")
    api = given.get("GITHUB_API_URL", "https://api.github.com")
    issues = f"{api}/repos/{repository}/issues"
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/vnd.github+json"}
    return Place(f"{issues}/{number}/comments", f"{issues}/comments/{{id}}", "PATCH", f"{api}/user", headers)


def _given(environment: Mapping[str, str], *names: str) -> list[str]:
    if absent := [name for name in names if not environment.get(name)]:
        raise TapeoutError(f"no comment can be written: {', '.join(absent)} is not set.")
    return [environment[name] for name in names]


def comment(text: str, where: Place) -> bool:
    """Write ``text`` as our comment; whether it is a new one. TapeoutError: the system refused, in its own words."""
    body = {"body": MARK + shortened(text)}
    known = _ours(where)
    if known is None:
        _ask(where, "POST", where.comments, body)
    else:
        _ask(where, where.change, where.one.format(id=known), body)
    return known is None


def shortened(text: str) -> str:
    """As many whole lines as a comment takes."""
    if len(text) <= _MOST:
        return text
    return f"{text[:_MOST].rpartition(chr(10))[0]}\n\nThe rest is too long for a comment: the artifact of the index job has all of it.\n"


def _ours(where: Place) -> int | None:
    """The number of our comment, if there is one. Anybody may write our mark, so who wrote it counts too."""
    try:
        user = _ask(where, "GET", where.user)
        name = user.get("login") or user.get("username")
    except TapeoutError:  # a job's own token is no user's: what it writes is a bot's
        name = None
    for page in range(1, 100):
        found = _ask(where, "GET", f"{where.comments}?per_page={_PAGE}&page={page}")
        for each in found:
            author = each.get("user") or each.get("author") or {}
            ours = (
                name in (author.get("login"), author.get("username")) if name else author.get("type") == "Bot"
            )
            if ours and each["body"].startswith(MARK):
                return int(each["id"])
        if len(found) < _PAGE:
            return None
    return None


def _ask(where: Place, method: str, address: str, body: Any = None) -> Any:
    headers = {**where.headers, "Content-Type": "application/json", "User-Agent": "tapeout"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            words = error.read(500).decode(errors="replace")
        raise TapeoutError(f"the comment was refused with status {error.code}: {words}") from None
    except (OSError, ValueError) as error:
        raise TapeoutError(f"the comment could not be written: {error}.") from error


def main() -> None:
    """Comment with the text of a file; exit status 2: that was refused."""
    try:
        new = comment(Path(sys.argv[1]).read_text(encoding="utf-8"), place(os.environ))
    except TapeoutError as error:
        sys.stderr.write(f"tapeout: {error}\n")
        sys.exit(error.status)
    sys.stderr.write(f"{'wrote' if new else 'changed'} the comment\n")


if __name__ == "__main__":
    main()
