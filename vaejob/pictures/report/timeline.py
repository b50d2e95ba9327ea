"""A run by the clock: its attempts, what each came to, what was done twice, and what it cost."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from vaejob.pictures.report.chart import Chart, Series
from vaejob.pictures.report.curves import MOST_POINTS
from vaejob.pictures.report.reported import ReportedRun
from vaejob.storage.runs import Row

MOST_ATTEMPTS = 60


class Attempt(NamedTuple):
    """One start of the workers, by its reports; the last ones may have been replaced by a later attempt."""

    rows: Sequence[Row]
    lost_images: int
    """Reported, then trained on again by a later attempt."""
    how_it_began: str

    @property
    def began_at(self) -> int:
        images: int = self.rows[0]["attempt_started_at_images"]
        return images

    @property
    def came_to(self) -> int:
        images: int = self.rows[-1]["images_seen"]
        return images

    def total(self, name: str) -> float:
        return sum(row.get(name) or 0 for row in self.rows if row["split"] == "train")


class Cost(NamedTuple):
    """Of all that was done, what was lost included."""

    seconds: float
    """In which workers trained."""
    worker_seconds: float
    images: int
    lost_images: int
    waited_seconds: float


def attempts(run: ReportedRun) -> list[Attempt]:
    """Oldest first: an attempt's name begins with its time."""
    rows: dict[str, list[Row]] = {}
    for row in [*run.rows, *run.lost]:
        rows.setdefault(row["attempt"], []).append(row)
    lost: dict[str, int] = {}
    for row in run.lost:
        if row["split"] == "train":
            lost[row["attempt"]] = lost.get(row["attempt"], 0) + row["images"]
    found: list[Attempt] = []
    for name in sorted(rows):
        own = sorted(rows[name], key=lambda row: row["images_seen"])
        found.append(Attempt(own, lost.get(name, 0), _beginning(own[0], found[-1].rows[-1] if found else None)))
    return found


def cost(run: ReportedRun) -> Cost:
    rows = [row for row in [*run.rows, *run.lost] if row["split"] == "train"]
    return Cost(
        seconds=sum(row["seconds"] or 0 for row in rows),
        worker_seconds=sum((row["seconds"] or 0) * row["world_size"] for row in rows),
        images=sum(row["images"] for row in rows),
        lost_images=sum(row["images"] for row in run.lost if row["split"] == "train"),
        waited_seconds=sum(row["data_wait_seconds"] or 0 for row in rows),
    )


def attempt_rows(found: Sequence[Attempt]) -> list[list[str]]:
    """What a table says of each."""
    return [
        [
            str(number),
            f"{_when(attempt.rows[0]):%Y-%m-%d %H:%M:%S}",
            attempt.how_it_began,
            f"{attempt.began_at:,}",
            f"{attempt.came_to:,}",
            f"{attempt.lost_images:,}",
            str(attempt.rows[-1]["world_size"]),
            f"{attempt.total('retries'):,.0f}",
            f"{attempt.total('skipped_steps'):,.0f}",
            f"{attempt.total('missing_images'):,.0f}",
        ]
        for number, attempt in enumerate(found[-MOST_ATTEMPTS:], start=max(len(found) - MOST_ATTEMPTS, 0) + 1)
    ]


ATTEMPT_HEADERS = (">attempt", "first report (UTC)", "began", ">at images", ">came to", ">of them done again", ">workers",
                   ">requests repeated", ">steps skipped", ">images damaged")  # fmt: skip


def progress_chart(found: Sequence[Attempt]) -> Chart | None:
    """Images seen by the clock, a line for each attempt; None where nothing was reported."""
    if not found:
        return None
    began = min(_when(row) for attempt in found for row in attempt.rows[:1])
    last = max(_when(attempt.rows[-1]) for attempt in found)
    unit, size = _unit((last - began).total_seconds())
    shown = found[-MOST_ATTEMPTS:]
    most = max(MOST_POINTS // len(shown), 2)
    series = []
    for number, attempt in enumerate(shown):
        rows = attempt.rows
        picked = [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)] if len(rows) > most else rows
        series.append(
            Series(
                name=f"attempt {len(found) - len(shown) + number + 1}",
                x=[round((_when(row) - began).total_seconds() / size, 4) for row in picked],
                y=[float(row["images_seen"]) for row in picked],
                color=number,
            )
        )
    note = (
        "" if len(series) == 1 else "An attempt that begins lower than the one before came to does those images again."
    )
    return Chart(title="Progress by the clock", unit="images seen", series=series, x_title=f"{unit} since the first report",
                 form="points", note=note, from_zero=True, digits=1)  # fmt: skip


def duration(seconds: float) -> str:
    unit, size = _unit(seconds)
    return f"{seconds / size:,.1f} {unit}"


def _unit(seconds: float) -> tuple[str, float]:
    return next((unit, size) for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0)) if seconds >= 2 * size or size == 1.0)  # fmt: skip


def _when(row: Row) -> datetime:
    return datetime.fromisoformat(row["written_at"])


def _beginning(first: Row, before: Row | None) -> str:
    """Why it began, as far as rows tell: a job that diverged goes back at half the learning rate."""
    if before is None:
        return "the first"
    if (first.get("halvings") or 0) > (before.get("halvings") or 0):
        return "went back, half the learning rate"
    if first["world_size"] != before["world_size"]:
        return f"began again with {first['world_size']} instead of {before['world_size']} workers"
    return "began again"
