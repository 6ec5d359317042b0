"""Write quantize/data/calibration.txt: the text that calibration reads unless the user gives another.

    python3.11 scripts/calibration_text.py

A mix of what Python 3.11's own standard library holds: source code, prose (docstrings, sections of ``pydoc_data.topics``), lines in
other scripts, numbers. The same library gives the same bytes. Left out is what the project measures with: paragraphs of
validate/data/evaluation.txt, and files that share a line with what ``stdlib-llama-6m`` held out.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "quantize" / "data" / "calibration.txt"
EVALUATION = ROOT / "validate" / "data" / "evaluation.txt"
HELD_OUT = ROOT.parent / "shared" / "models" / "stdlib-llama-6m" / "heldout.txt"

# Characters of each part: a half, a third, and the rest.
CODE, PROSE, NUMBERS = 172_000, 115_000, 45_000
PIECE = 6_000  # characters of a document at most, so that any stretch of the text holds several kinds
LONG = 60  # a line longer than this is told from chance


def main() -> None:
    if sys.version_info[:2] != (3, 11):
        sys.exit(
            f"The text comes from Python 3.11's standard library; this is {sys.version_info[0]}.{sys.version_info[1]}."
        )
    draw = random.Random(20240)
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = python_files(library)
    code = taken([stretch(text, draw) for text in shuffled(sources, draw)], CODE)
    prose = topics() + [text for source in sources for text in docstrings(source)]
    prose = taken(shuffled(prose, draw), PROSE)
    numbers = taken([arithmetic(draw) for _ in range(200)], NUMBERS // 2)
    numbers += taken(shuffled(number_files(library), draw), NUMBERS // 2)
    documents = shuffled([*code, *prose, *numbers, *other_scripts(library)], draw)
    text = "\n\n".join(document.strip("\n") for document in documents) + "\n"
    check(text)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(text, encoding="utf-8")
    print(f"{OUT.stat().st_size} bytes, {len(documents)} documents")


def python_files(library: Path) -> list[str]:
    """The library's modules under Python's own licence, none of which was held out."""
    held_out = long_lines(HELD_OUT.read_text(encoding="utf-8")) if HELD_OUT.exists() else set()
    kept = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if {"site-packages", "pydoc_data", "__pycache__", "lib2to3", "encodings"} & set(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        # Some modules came with a licence of their own, and say so.
        if len(text) < 1000 or re.search("copyright|licen[sc]e", text, re.IGNORECASE):
            continue
        if not long_lines(text) & held_out:
            kept.append(text)
    return kept


def topics() -> list[str]:
    """Sections of the reference manuals from which the evaluation text took no paragraph."""
    from pydoc_data.topics import topics as all_topics

    seen = {plain(paragraph) for paragraph in EVALUATION.read_text(encoding="utf-8").split("\n\n")}
    kept = []
    for _, text in sorted(all_topics.items()):
        paragraphs = text.split("\n\n")
        if not seen & {plain(paragraph) for paragraph in paragraphs}:
            kept.append(text[:PIECE])
    return kept


def docstrings(source: str) -> list[str]:
    """Docstrings of some length, without their indentation; examples of a session are code, not prose."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) > 300 and ">>>" not in text:
                found.append(text[:PIECE])
    return found


def number_files(library: Path) -> list[str]:
    """Some pages of the library's tables of floating-point numbers."""
    pages = []
    for name in ("formatfloat_testcases.txt", "math_testcases.txt", "cmath_testcases.txt", "ieee754.txt"):
        path = library / "test" / name
        if not path.exists():
            path = library / "test" / "mathdata" / name
        lines = path.read_text(encoding="utf-8").splitlines()
        pages += ["\n".join(lines[first : first + 40]) for first in range(0, len(lines), 40)]
    return pages


def arithmetic(draw: random.Random) -> str:
    """Lines as a pupil writes them: sums, products, a list, a table, prices, dates."""
    lines = []
    for _ in range(12):
        a, b, c = draw.randrange(2, 1000), draw.randrange(2, 100), draw.randrange(1, 13)
        lines.append(
            draw.choice(
                (
                    f"{a} + {b} = {a + b}",
                    f"{a}-{b}={a - b}",
                    f"{b} * {c} = {b * c}",
                    f"{a * b} / {b} = {a}",
                    f"{a / b:.3f}, {b / a:.6f}, {a * b * 1.5e3:.3e}",
                    f"20{b:02d}-{c:02d}-{1 + a % 28:02d} {a % 24:02d}:{b % 60:02d}:{c:02d}",
                    f"{c} x {b}.{a % 100:02d} = {c * (b + (a % 100) / 100):.2f}",
                    "\t".join(str(a * k) for k in range(1, 8)),
                    f"0x{a * b:08x} = 0b{b:b}",
                )
            )
        )
    return "\n".join(lines)


def other_scripts(library: Path) -> list[str]:
    """Chinese, Japanese and Korean from the tests of the codecs, each text once; and lines of tests in any other script."""
    found: dict[str, str] = {}
    for path in sorted((library / "test" / "cjkencodings").glob("*-utf8.txt")):
        text = path.read_text(encoding="utf-8")
        found.setdefault(text[:20], text)  # several codecs are tested with one text
    documents = list(found.values())
    for name in ("test_unicode.py", "test_re.py", "test_str.py", "test_unicodedata.py", "test_traceback.py"):
        path = library / "test" / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        foreign = [line.strip() for line in lines if sum(ord(c) > 0x24F for c in line) > 2]
        if foreign:
            documents.append("\n".join(foreign)[:PIECE])
    return documents


def stretch(text: str, draw: random.Random) -> str:
    """Whole lines from somewhere in a file."""
    if len(text) <= PIECE:
        return text
    first = text.find("\n", draw.randrange(len(text) - PIECE)) + 1
    return text[first : first + PIECE].rpartition("\n")[0]


def taken(documents: list[str], most: int) -> list[str]:
    """The first documents, until there are so many characters."""
    kept: list[str] = []
    while documents and sum(map(len, kept)) < most:
        kept.append(documents[len(kept)])
    return kept


def shuffled(documents: list[str], draw: random.Random) -> list[str]:
    return draw.sample(documents, len(documents))


def plain(paragraph: str) -> str:
    return " ".join(paragraph.split())


def long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) > LONG}


def check(text: str) -> None:
    """Stop when the text holds any of what the project measures with."""
    spaceless = plain(text)
    for paragraph in EVALUATION.read_text(encoding="utf-8").split("\n\n"):
        if plain(paragraph) and plain(paragraph) in spaceless:
            sys.exit(f"The text holds a paragraph of {EVALUATION}: {plain(paragraph)[:80]}")
    if HELD_OUT.exists() and (shared := long_lines(text) & long_lines(HELD_OUT.read_text(encoding="utf-8"))):
        sys.exit(f"The text holds lines of {HELD_OUT}: {sorted(shared)[:3]}")


if __name__ == "__main__":
    main()
