"""A run's rows as curves. Where there are too many, neighbours are added up: sums travel, so a thinned point is exact."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vaejob.metrics import LikelihoodTotals, Quantity
from vaejob.pictures.report.chart import Chart, Series
from vaejob.pictures.report.reported import ReportedRun
from vaejob.storage.runs import Row

MOST_POINTS = 240
"""On one chart, of all runs together."""
NAN = math.nan
MINUS = "\u2212"


class Window(NamedTuple):
    """Consecutive reports on the images trained on."""

    rows: Sequence[Row]

    @property
    def images_seen(self) -> int:
        seen: int = self.rows[-1]["images_seen"]
        return seen

    def sum(self, name: str) -> float:
        """NaN where any report lacks it."""
        values = [row.get(name) for row in self.rows]
        return math.fsum(NAN if value is None else value for value in values) if all(v is None or math.isfinite(v) for v in values) else NAN  # fmt: skip

    def ratio(self, above: str, below: str) -> float:
        divisor = self.sum(below)
        return self.sum(above) / divisor if divisor else NAN

    def per_image(self, name: str) -> float:
        """Nats per image; NaN where the sums lack images that were not finite."""
        return NAN if self.sum("non_finite") else self.ratio(name, "images")

    @property
    def gradient_norm(self) -> float:
        """Mean over the steps taken."""
        taken = self.sum("steps") - self.sum("skipped_steps")
        return self.sum("gradient_norms") / taken if taken else NAN


def thinned(rows: Sequence[Row], most: int) -> list[Window]:
    """At most so many windows of equally many reports, the last of fewer."""
    size = math.ceil(len(rows) / most) if rows else 1
    return [Window(rows[start : start + size]) for start in range(0, len(rows), size)]


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows from all over, with the first, the last and that of the lowest bound."""
    if len(rows) <= most:
        return list(rows)
    even = {round(i * (len(rows) - 1) / (most - 2)) for i in range(most - 1)}
    best = min(range(len(rows)), key=lambda i: _bound(rows[i]))
    return [rows[i] for i in sorted(even | {best})]


def training_windows(run: ReportedRun, *, of_runs: int = 1) -> list[Window]:
    return thinned([row for row in run.rows if row["split"] == "train"], max(MOST_POINTS // of_runs, 12))


def held_out_rows(run: ReportedRun, *, of_runs: int = 1) -> list[Row]:
    return spread([row for row in run.rows if row["split"] == "test"], max(MOST_POINTS // of_runs, 12))


def charts_of_one(run: ReportedRun) -> list[Chart]:
    """Everything that its rows tell over progress."""
    windows, tests = training_windows(run), held_out_rows(run)
    if not windows and not tests:
        return []
    nats = "nats per image (density)" if run.density_bits is not None else "nats per image"
    note, markers = thinning_note([run]), restarts(run)
    dotted = "Dotted: workers began again from there." if markers else ""
    bound = [_trained(run, windows, "negative_bound_nats"), _held_out(run, tests, "negative_bound")]
    one_frame = run.train_name == run.held_out_name
    charts = (
        [Chart(title="Negative bound", unit=nats, series=bound, note=f"{run.train_name.replace('-', MINUS, 1)}; band: \u00b1 1 s.e. over images. {dotted} {note}".strip().replace("  ", " "), markers=markers)]
        if one_frame
        else [
            Chart(title=f"Training, {run.train_name.replace('-', MINUS, 1)}", unit=nats, series=bound[:1], note=f"{dotted} {note}".strip(), markers=markers),
            Chart(title=f"Held out, {run.held_out_name.replace('-', MINUS, 1)}", unit=nats, series=bound[1:], note="Band: \u00b1 1 s.e. over images.", markers=markers),
        ]
    )  # fmt: skip
    for title, name, quantity in (("Rate, KL(q || p)", "rate_nats", "rate"), ("Distortion, \u2212log p(x | z)", "distortion_nats", "distortion")):  # fmt: skip
        unit = nats if quantity == "distortion" else "nats per image"
        lines = [_trained(run, windows, name), _held_out(run, tests, quantity)]  # type: ignore[arg-type]
        charts.append(Chart(title=title, unit=unit, series=lines, note=note, markers=markers))
    for kind in MEASURES:
        line = Series(name="train", x=_seen(windows), y=[kind.of(window) for window in windows])
        charts.append(Chart(title=kind.title, unit=kind.unit, series=[line], note=note, markers=markers, from_zero=kind.from_zero))  # fmt: skip
    return [_without_empty(chart) for chart in charts if any(line.x for line in chart.series)]


def charts_of_several(runs: Sequence[ReportedRun]) -> list[Chart]:
    """The same quantities, a line for each of the runs, whose likelihoods compare."""
    nats = "nats per image" if runs[0].density_bits is None else "nats per image (density)"
    note = thinning_note(runs)
    charts = []
    for title, quantity in (("Held-out negative bound", "negative_bound"), ("Held-out rate", "rate"), ("Held-out distortion", "distortion")):  # fmt: skip
        lines = [
            _held_out(run, held_out_rows(run, of_runs=len(runs)), quantity, name=run.name, color=i)  # type: ignore[arg-type]
            for i, run in enumerate(runs)
        ]
        charts.append(Chart(title=title, unit=nats, series=lines, note="Band: \u00b1 1 s.e. over images."))
    # What is minimised compares only where it is the same: not an IWAE with an ELBO, nor another weight of the rate.
    one_goal = len({run.job.objective.model_dump_json() for run in runs}) == 1
    for kind in MEASURES if one_goal else MEASURES[1:]:
        lines = []
        for i, run in enumerate(runs):
            windows = training_windows(run, of_runs=len(runs))
            lines.append(Series(name=run.name, x=_seen(windows), y=[kind.of(window) for window in windows], color=i))
        charts.append(Chart(title=kind.title, unit=kind.unit, series=lines, note=note, from_zero=kind.from_zero))
    return [_without_empty(chart) for chart in charts if any(line.x for line in chart.series)]


class Measure(NamedTuple):
    """A curve of one line for each run."""

    title: str
    unit: str
    of: Callable[[Window], float]
    from_zero: bool = False


OBJECTIVE = Measure("Objective minimised", "nats per image", lambda window: window.per_image("objective_nats"))
MEASURES = (
    OBJECTIVE,
    Measure("Gradient norm", "mean over steps taken, before clipping", lambda window: window.gradient_norm),
    Measure("Steps skipped", "% of steps", lambda window: 100 * window.ratio("skipped_steps", "steps"), True),
    Measure("Learning rate", "at the end of a report", lambda window: Window(window.rows[-1:]).sum("learning_rate"), True),
    Measure("Throughput", "images/s, all workers", lambda window: window.ratio("images", "seconds"), True),
    Measure("Waiting for images", "% of the time", lambda window: 100 * window.ratio("data_wait_seconds", "seconds"), True),
)  # fmt: skip


def restarts(run: ReportedRun) -> list[tuple[float, str]]:
    """Where attempts but the first began."""
    began: dict[str, int] = {row["attempt"]: row["attempt_started_at_images"] for row in run.rows}
    return [(images, f"began again at {images:,} images") for images in list(began.values())[1:]]


def thinning_note(runs: Sequence[ReportedRun]) -> str:
    """Empty where every report is a point of its own."""
    sizes = [len(window.rows) for run in runs for window in training_windows(run, of_runs=len(runs))[:1]]
    if max(sizes, default=1) == 1:
        return ""
    each = f"{max(sizes):,}" if len(set(sizes)) == 1 else f"up to {max(sizes):,}"
    return f"Thinned: each training point is the mean over the images of {each} reports."


def _trained(run: ReportedRun, windows: Sequence[Window], name: str) -> Series:
    return Series(name="train", x=_seen(windows), y=[window.per_image(name) for window in windows], color=0)


def _held_out(
    run: ReportedRun, rows: Sequence[Row], quantity: Quantity, *, name: str = "held out", color: int = 1
) -> Series:
    totals = [LikelihoodTotals.from_dict(row) for row in rows]
    return Series(
        name=name,
        x=[row["images_seen"] for row in rows],
        y=[NAN if total.non_finite else total.mean(quantity) for total in totals],
        error=[NAN if total.non_finite else total.standard_error(quantity) for total in totals],
        color=color,
    )


def _without_empty(chart: Chart) -> Chart:
    lines = [line for line in chart.series if line.x]
    return Chart(**{**vars(chart), "series": lines})


def _seen(windows: Sequence[Window]) -> list[float]:
    return [float(window.images_seen) for window in windows]


def _bound(row: Row) -> float:
    return math.inf if row["non_finite"] else row["negative_bound_nats"] / row["images"]
