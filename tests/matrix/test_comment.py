"""The comment of a pull request, over HTTP to a server that answers as GitHub's and GitLab's do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tapeout.errors import TapeoutError
from tapeout.matrix.comment import MARK, comment, place, shortened


class Forge:
    """Comments that are kept; ``user`` answers who asks, None: the token is no user's."""

    def __init__(self, comments: list[dict[str, Any]], user: dict[str, Any] | None, status: int = 0) -> None:
        self.comments, self.asked = comments, list[tuple[str, str, str]]()
        forge = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or "null")
                token = self.headers.get("Authorization") or self.headers.get("PRIVATE-TOKEN") or ""
                forge.asked.append((self.command, self.path, token))
                code, found = forge.do(self.command, self.path, body)
                if status and self.command != "GET":
                    code, found = status, {"message": "Resource not accessible"}
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(found).encode())

            do_GET = do_POST = do_PATCH = do_PUT = answer  # noqa: N815 - the library's names

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.user, self.server = user, ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def do(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/user":
            return (200, self.user) if self.user else (403, {"message": "not accessible by integration"})
        if method == "GET":
            page = int(re.search(r"[?&]page=(\d+)", path)[1])  # type: ignore[index]
            return 200, self.comments[(page - 1) * 100 : page * 100]
        if method == "POST":
            who = {"author": self.user} if self.user else {"user": {"type": "Bot"}}
            self.comments.append({"id": 9000 + len(self.comments), **body, **who})
            return 201, self.comments[-1]
        (one,) = (each for each in self.comments if str(each["id"]) == path.rpartition("/")[2])
        one.update(body)
        return 200, one


@pytest.fixture
def forges() -> Iterator[Any]:
    made: list[Forge] = []

    def make(*arguments: Any) -> Forge:
        made.append(Forge(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.server.shutdown()
        each.server.server_close()


def github(forge: Forge) -> dict[str, str]:
    return {
        "GITHUB_TOKEN": "t",
        "GITHUB_REPOSITORY": "a/b",
        "PULL_REQUEST": "7",
        "GITHUB_API_URL": forge.address,
    }


def test_one_comment_that_is_changed_each_time(forges: Any) -> None:
    # 150 others, and a person who writes our mark, so that the second page has to be looked at and its author, too.
    others = [{"id": n, "body": "hello", "user": {"type": "User"}} for n in range(150)]
    forge = forges([*others, {"id": 500, "body": MARK + "fake", "user": {"type": "User"}}], None)
    assert comment("first\n", place(github(forge))) is True
    assert comment("second\n", place(github(forge))) is False
    assert [each["body"] for each in forge.comments if each["body"].startswith(MARK)] == [
        MARK + "fake",
        MARK + "second\n",
    ]
    assert {token for _, _, token in forge.asked} == {"Bearer t"}
    assert ("PATCH", "/repos/a/b/issues/comments/9151", "Bearer t") in forge.asked


def test_gitlab_knows_us_by_name(forges: Any) -> None:
    forge = forges([{"id": 1, "body": MARK + "fake", "author": {"username": "eve"}}], {"username": "bot"})
    where = place(
        {
            "CI_API_V4_URL": forge.address,
            "CI_PROJECT_ID": "3",
            "CI_MERGE_REQUEST_IID": "4",
            "TAPEOUT_TOKEN": "t",
        }
    )
    assert [comment("first", where), comment("second", where)] == [True, False]
    assert [each["body"] for each in forge.comments] == [MARK + "fake", MARK + "second"]
    assert forge.asked[-1][:2] == ("PUT", "/projects/3/merge_requests/4/notes/9001")


@pytest.mark.parametrize(
    "repository",
    ["git@github.com:o-1/n.x.git", "https://github.com/o-1/n.x.git", "https://github.com/o-1/n.x"],
)
def test_buildkite_comments_on_github(repository: str) -> None:
    where = place({"BUILDKITE_REPO": repository, "BUILDKITE_PULL_REQUEST": "5", "GITHUB_TOKEN": "t"})
    assert where.comments == "https://api.github.com/repos/o-1/n.x/issues/5/comments"


def test_what_is_refused_and_what_is_missing(forges: Any) -> None:
    with pytest.raises(
        TapeoutError, match="no comment can be written: PULL_REQUEST, GITHUB_TOKEN is not set"
    ):
        place({"GITHUB_REPOSITORY": "a/b"})
    with pytest.raises(
        TapeoutError, match=r"the comment was refused with status 403: .*Resource not accessible"
    ):
        comment("x", place(github(forges([], None, 403))))
    nowhere = place({**github(forges([], None)), "GITHUB_API_URL": "http://127.0.0.1:1"})
    with pytest.raises(TapeoutError, match=r"the comment could not be written: .*refused"):
        comment("x", nowhere)


def test_a_text_that_is_too_long_is_cut_at_a_line() -> None:
    line = "| é漢 | cell |\n"
    cut = shortened(line * 10_000)
    kept, _, rest = cut.partition("\n\n")
    assert set(kept.splitlines()) == {line.strip()}
    assert len(MARK + cut) <= 65_536
    assert "artifact" in rest
    assert shortened(line) == line


def test_as_a_job_calls_it(forges: Any, tmp_path: Any) -> None:
    (tmp_path / "index.md").write_text("✅ passed\n")
    forge = forges([], None)
    command = [sys.executable, "-P", "-m", "tapeout.matrix.comment", "index.md"]
    done = subprocess.run(
        command, cwd=tmp_path, env=github(forge), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "wrote the comment\n")
    assert forge.comments[0]["body"] == MARK + "✅ passed\n"
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("tapeout: no comment can be written")
