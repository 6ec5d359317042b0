"""The documentation's site: built without a warning, complete, every link leads somewhere, and nothing comes from another host."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tapeout.cli import registered

Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SCREENSHOTS = ROOT / "build" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# What a browser fetches by itself, by tag.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    """The links of a page, its anchors, and what a browser fetches for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[key] or "" for key in ("id", "name") if key in given}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        if tag in FETCHED and (found := given.get(FETCHED[tag])):
            self.fetched.append(found)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def site(once: Once) -> Path:
    def build(work: Path) -> str:
        command = [
            sys.executable,
            "-P",
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(work / "site"),
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    place, said = once("site", build)
    assert said == "", "mkdocs has something to say"
    return place / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_every_page_is_in_it(site: Path, pages: dict[str, Page]) -> None:
    docs = ROOT / "docs"
    written = {path.relative_to(docs).with_suffix(".html").as_posix() for path in docs.rglob("*.md")}
    assert set(pages) == written | {"404.html"}
    home = {urlsplit(link).path for link in pages["index.html"].links}
    assert written - {"index.html"} <= home, "mkdocs.yml has no place for it in nav"


def test_every_link_leads_somewhere(site: Path, pages: dict[str, Page]) -> None:
    lost, seen = [], 0
    for name, page in pages.items():
        if name == "404.html":  # served at any depth, so its links begin with a slash
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme == "https", link
                continue
            seen += 1
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            if not target.is_file():
                lost.append(f"{name}: {link}")
            elif target.suffix == ".html":
                inside = target.resolve().relative_to(site.resolve()).as_posix()
                if unquote(parts.fragment) not in pages[inside].anchors:
                    lost.append(f"{name}: {link}")
    assert lost == []
    assert seen > 1000


def test_nothing_comes_from_another_host(site: Path, pages: dict[str, Page]) -> None:
    foreign = [
        f"{name}: {each}" for name, page in pages.items() for each in page.fetched if urlsplit(each).netloc
    ]
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        foreign += [
            f"{style.name}: {each}"
            for each in re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)", text)
        ]
    assert foreign == []


def test_the_reference_is_made_of_what_is_installed(pages: dict[str, Page]) -> None:
    commands = " ".join(pages["reference/commands.html"].words)
    for verb in registered():
        assert verb.startswith("-") or f"tapeout {verb}" in commands, verb
    assert "--sliding-window" in commands, "a target's own flag"
    pipeline = pages["reference/pipeline.html"]
    assert {"tapeout.build.export", "tapeout.pack.Package", "tapeout.doctor.diagnose"} <= pipeline.anchors
    assert "A package whose gates failed is written all the same" in " ".join(pipeline.words)
    errors = pages["reference/errors.html"].anchors
    assert {"tapeout.errors.TapeoutError", "tapeout.errors.NotFinite"} <= errors


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=site)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("screen", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_in_a_browser(served: str, screen: tuple[int, int]) -> None:
    """No request to another host, no message, no sideways scroll of a page; what a wide table's row is about stays when it is scrolled."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: make test installs it with apt-get where it runs as root on Debian")
    api = pytest.importorskip("playwright.sync_api")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    asked: list[str] = []
    said: list[str] = []
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport=dict(zip(("width", "height"), screen, strict=True)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        for name in ("index", "targets", "tutorials/export-engineer", "reference/commands"):
            page.goto(f"{served}/{name}.html", wait_until="networkidle")
            over = page.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert over == 0, name
            page.screenshot(path=SCREENSHOTS / f"site-{name.replace('/', '-')}-{screen[0]}.png")
        page.goto(f"{served}/targets.html", wait_until="networkidle")
        moved = page.evaluate(
            """() => { const table = document.querySelector("table[data-wide]"), box = table.closest(".md-typeset__scrollwrap");
            const left = () => table.querySelector("td").getBoundingClientRect().left;
            const before = left(); box.scrollLeft = 300; return [box.scrollLeft, left() - before]; }"""
        )
        assert moved[0] == 300
        assert abs(moved[1]) <= screen[0] * 0.05  # it may go as far as the box's own edge
        chromium.close()
    assert asked
    assert [url for url in asked if not url.startswith(served)] == []
    assert said == []
