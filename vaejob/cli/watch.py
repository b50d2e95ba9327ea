"""A run as it goes on, seen from its bucket alone: what `vaejob show --watch` shows."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import NamedTuple

from vaejob.cli.overview import Overview, age_seconds, everything, held_out_totals, look_at, training_images
from vaejob.cli.terminal import _duration, bits_and_nats, bound_name, say
from vaejob.errors import BucketError
from vaejob.likelihood.units import density_bits
from vaejob.storage import open_bucket
from vaejob.storage.runs import Row
from vaejob.totals import LikelihoodTotals

POLL_SECONDS = 2.0
TREND_REPORTS = 10
SILENT_SECONDS = 60.0
BARS = "▁▂▃▄▅▆▇█"


class Look(NamedTuple):
    """What is known of the run now, or since when its bucket is out of reach and why."""

    run: Overview
    problem: str = ""


def looks(address: str, pause: Callable[[], None]) -> Iterator[Look]:
    """A look at each change, and at each end and beginning of an outage; ends with the run.

    Raises what look_at raises at the first look, and RunError once no run is there.
    """
    bucket = open_bucket(address)
    seen: dict[str, str] | None = None
    look: Look | None = None
    while True:
        try:
            listed = {key: version for folder in ("metrics/", "records/", "attempts/") for key, version in bucket.versions(folder).items()}  # fmt: skip
            if listed != seen or (look and look.problem):
                look, seen = Look(look_at(address, whole_history=True)), listed
                yield look
        except BucketError as error:
            if look is None:
                raise
            if not look.problem:
                look = Look(look.run, str(error))
                yield look
        if look and look.run.finished:
            return
        pause()


def watch(address: str, *, as_json: bool) -> None:
    """Ends by itself when the run is done; ctrl-C ends it with status 130 and says nothing."""

    def pause() -> None:
        time.sleep(POLL_SECONDS)

    try:
        if as_json:
            _watch_as_json(address, pause)
        elif sys.stdout.isatty():
            _watch_live(address, pause)
        else:
            for look in looks(address, pause):
                say(one_line(look))
    except KeyboardInterrupt:
        sys.exit(130)


def _watch_as_json(address: str, pause: Callable[[], None]) -> None:
    for look in looks(address, pause):
        said = everything(look.run, training_images(look.run)) | {"out_of_reach": look.problem or None}
        print(json.dumps(said), flush=True)


def _watch_live(address: str, pause: Callable[[], None]) -> None:
    from rich.live import Live
    from rich.text import Text

    looked: list[Look] = []

    def view() -> Text:
        return Text(many_lines(looked[-1]) if looked else f"asking for {address}")

    with Live(get_renderable=view, refresh_per_second=1, vertical_overflow="visible"):
        for look in looks(address, pause):
            looked.append(look)
            del looked[:-1]


def state(look: Look) -> str:
    """As far as a bucket tells: whether workers live is not known, only how long ago they reported."""
    run = look.run
    if look.problem:
        return "out of reach"
    if run.finished:
        return "finished"
    if run.last_report_at is None:
        return "no report yet"
    silent = age_seconds(run.last_report_at)
    usual = max((row["seconds"] or 0.0 for row in run.rows[-TREND_REPORTS:]), default=0.0)
    return f"no report for {_duration(silent)}" if silent > max(SILENT_SECONDS, 3 * usual) else "running"


def seconds_left(run: Overview) -> float | None:
    """At the speed of the newest reports, from the last of them on."""
    recent = _trained(run)[-TREND_REPORTS:]
    seconds = sum(row["seconds"] or 0.0 for row in recent)
    if not seconds or run.finished:
        return None
    rate: float = sum(row["images"] for row in recent) / seconds
    return (run.job.training.images - run.images_seen) / rate


class Trend(NamedTuple):
    """Bits/dim of the newest reports on training images, less those of as many reports before them."""

    reports: int
    change: float
    standard_error: float

    def __str__(self) -> str:
        level = abs(self.change) < 2 * self.standard_error
        arrow = "→ level" if level else "↓ falling" if self.change < 0 else "↑ rising"
        return f"{arrow} ({self.change:+.4f} ± {self.standard_error:.4f} over {self.reports} report{'' if self.reports == 1 else 's'})"


def trend(run: Overview) -> Trend | None:
    """None before two reports, or where a likelihood is not finite."""
    rows = _trained(run)
    count = min(TREND_REPORTS, len(rows) // 2)
    if not count:
        return None
    new, old = (sum(map(LikelihoodTotals.from_dict, part), LikelihoodTotals()) for part in (rows[-count:], rows[-2 * count : -count]))  # fmt: skip
    if new.non_finite or old.non_finite:
        return None
    error = math.hypot(new.bits_per_dim_standard_error, old.bits_per_dim_standard_error)
    return Trend(count, new.bits_per_dim - old.bits_per_dim, error)


def one_line(look: Look) -> str:
    """The time of the last report first, in UTC; ages are at the time of the line."""
    run, rows = look.run, _trained(look.run)
    if look.problem:
        return f"out of reach, watching on: {look.problem}"
    parts = [state(look), f"{run.images_seen:,} of {run.job.training.images:,} images"]
    left = seconds_left(run)
    if left is not None:
        parts.append(f"{_duration(left)} left")
    if rows:
        parts += [_bits(run, rows[-1]), f"{_rate(rows[-1])} images/s"]
    if run.newest:
        parts.append(f"checkpoint at {run.newest.images_seen:,}")
    at = f"{run.last_report_at:%H:%M:%S}" if run.last_report_at else "--:--:--"
    return f"{at}  " + ", ".join(parts)


def many_lines(look: Look) -> str:
    run, rows = look.run, _trained(look.run)
    total, done = run.job.training.images, run.images_seen / run.job.training.images
    left = seconds_left(run)
    lines = [
        f"run         {run.address}",
        f"state       {state(look)}",
        f"progress    {_bar(done)} {done:.1%}, {run.images_seen:,} of {total:,} images"
        + (f", {_duration(left)} left" if left is not None else ""),
    ]
    if rows:
        row, moving = rows[-1], trend(run)
        lines.append(f"trained on  {_bits(run, row)} {_sparkline(rows)}")
        lines += [f"            {moving}"] if moving else []
        lines += [
            f"speed       {_rate(row)} images/s, {row['data_wait_seconds'] / row['seconds']:.1%} of the time waiting for images" if row["seconds"] else "speed       unknown",
            f"workers     {row['world_size']}, {len(run.attempts)} start{'s' if len(run.attempts) != 1 else ''} of the job",
            f"retries     {sum(one['retries'] or 0 for one in rows):,} requests to the bucket repeated, {row['retries'] or 0:,} since the report before",
        ]  # fmt: skip
    if run.best and (totals := held_out_totals(run.best)):
        name = bound_name(run.job.training.evaluate_samples)
        lines.append(f"held out    {bits_and_nats(totals, run.job.likelihood)}")
        lines.append(f"            {name} of {totals.images:,} images, the best of its checkpoints")
    if run.newest:
        written = datetime.fromisoformat(run.newest.written_at)
        lines.append(f"checkpoint  at {run.newest.images_seen:,} images, {_duration(age_seconds(written))} old")
    lines += [f"problem     {problem}" for problem in run.problems]
    if look.problem:
        lines.append(f"bucket      out of reach, what stands above is from before: {look.problem}")
    return "\n".join(lines)


def _trained(run: Overview) -> list[Row]:
    return [row for row in run.rows if row["split"] == "train"]


def _bits(run: Overview, row: Row) -> str:
    totals = LikelihoodTotals.from_dict(row)
    if totals.non_finite:
        return f"not finite for {totals.non_finite:,} of {totals.images:,} images"
    return f"{totals.bits_per_dim + (density_bits(run.job.likelihood) or 0.0):.4f} bits/dim"


def _rate(row: Row) -> str:
    return f"{row['images'] / row['seconds']:,.0f}" if row["seconds"] else "?"


def _bar(done: float, width: int = 20) -> str:
    filled = min(int(done * width), width)
    return "█" * filled + "░" * (width - filled)


def _sparkline(rows: list[Row], width: int = 24) -> str:
    """Bits/dim of the newest reports, between the lowest and the highest of them."""
    totals = [LikelihoodTotals.from_dict(row) for row in rows[-width:]]
    bits = [one.bits_per_dim for one in totals if not one.non_finite]
    if len(bits) < 2 or min(bits) == max(bits):
        return ""
    low, high = min(bits), max(bits)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in bits)
