"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from tapeout.plan import Fit, Planned, Row


def show(plan: Planned) -> Iterator[Table | Text]:
    """What is printed, in order: the files of each target, then each device, then what to know."""
    yield Text(
        f"{plan.model} ({plan.family}), {plan.parameters / 1e9:.3g} billion weights; context {plan.context}, batch {plan.batch}"
    )
    files = Table(
        "target", "scheme", "files", "a token reads", "disk", "export", title="files", title_justify="left"
    )
    for row in plan.rows:
        if row.cannot is None:
            disk = size(row.disk_bytes) + (
                f" + {size(row.scratch_bytes)} for gates" if row.scratch_bytes else ""
            )
            cells = [size(row.artifact_bytes), size(row.bytes_per_token), disk, seconds(row.export_s)]
            files.add_row(row.target, row.scheme, *cells)
    yield files
    for row in plan.rows:
        yield from _said(row)
    for each in plan.unserved:
        yield Text(f"{each}: no target that was planned makes files for it")


def cells_of(fit: Fit) -> tuple[str, str, str]:
    """The memory that is taken and that there is on each card, and the speed."""
    needed = size(fit.weights + fit.cache + fit.work)
    each = " a card" if fit.cards > 1 else ""
    return needed + each, size(fit.room) + each, speed(fit)


def speed(fit: Fit) -> str:
    """The estimate, with what was assumed; a dash where there is none."""
    if fit.tokens_per_s is None:
        return "–"
    (least, most), (low, high) = fit.tokens_per_s, fit.reaches
    if low == high:
        besides = f", {1e3 * fit.besides_s:.2g} ms besides" if fit.besides_s else ""
        return f"≈{least:.3g} at {low:.0%} of the bandwidth{besides}"
    return f"≈{least:.3g} … {most:.3g} at {low:.0%} … {high:.0%}"


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


def seconds(count: float) -> str:
    """A time as people say it."""
    return f"≈{count / 60:.0f} min" if count >= 90 else f"≈{max(1, round(count))} s"


def _said(row: Row) -> Iterator[Table | Text]:
    who = f"{row.target}, {row.scheme}"
    if row.cannot is not None:
        yield Text(f"{who}: {row.cannot}")
        return
    skipped = [(name, why) for name, why in row.gates if why is not None]
    run = [name for name, why in row.gates if why is None]
    title = f"{who}: speed is an estimate, from the bytes that a token reads and the bandwidth"
    table = Table("device", "fits", "memory", "of", "tokens/s", title=title, title_justify="left")
    for fit in row.fits:
        table.add_row(fit.device, "yes" if fit.fits else "no", *cells_of(fit))
    yield table
    for fit in row.fits:
        if fit.instead:
            yield Text(f"  {fit.device}: would fit: {fit.instead}")
    yield Text(f"  gates that can run here: {', '.join(run) or 'none'}")
    reasons: dict[str, list[str]] = {}
    for name, why in skipped:
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        yield Text(f"  not {', '.join(names)}: {why}")
    for note in row.assumed:
        yield Text(f"  {note}")
