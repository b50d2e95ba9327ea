"""How a job's progress and its numbers look in a terminal."""

import json
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Self, TextIO

from vaejob.likelihood.units import density_bits

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from vaejob.config import JobConfig, LikelihoodConfig
    from vaejob.totals import LikelihoodTotals
    from vaejob.training.worker import Event

_SECONDS_BETWEEN_LINES = 5.0
SHOW_CURSOR = "\x1b[?25h"
READING = "reading the checkpoint"


def say(text: str = "", *, indent: int | None = None) -> None:
    """indent: in a terminal the line is broken between words, and goes on so many columns to the right."""
    print(text if indent is None else _folded(text, sys.stdout, indent), flush=True)


def warn(text: str) -> None:
    print(_folded(f"vaejob: {text}", sys.stderr, indent=8), file=sys.stderr, flush=True)


def _folded(text: str, stream: TextIO, indent: int) -> str:
    """Addresses stay whole, for who copies them; so does all where no terminal is."""
    if not stream.isatty():
        return text
    fold = textwrap.TextWrapper(
        max(shutil.get_terminal_size().columns, indent + 40), subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(fold.fill(line) for line in text.split("\n"))


def say_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def bound_name(samples: int, *, own_codes: bool = False) -> str:
    return "-log p(x | z)" if own_codes else "-ELBO" if samples == 1 else f"-IWAE-{samples}"


def bits_and_nats(totals: "LikelihoodTotals", likelihood: "LikelihoodConfig") -> str:
    """Negative bound per dimension and per image, each with its standard error; or why there is none."""
    if totals.non_finite:
        return f"not finite for {totals.non_finite:,} of {totals.images:,} images"
    added = density_bits(likelihood)
    return (
        f"{totals.bits_per_dim + (added or 0.0):.5f} ± {totals.bits_per_dim_standard_error:.5f} bits/dim"
        f"{'' if added is None else f' (density + {added:.4f})'}, "
        f"{totals.mean('negative_bound'):.4f} ± {totals.standard_error('negative_bound'):.4f} nats"
        f"{'' if added is None else ' (density)'}"
    )


CONDITIONAL = "conditional on each image's own code: no bound on log p(x)"


def what_it_is_of(
    job: "JobConfig",
    totals: "LikelihoodTotals",
    *,
    samples: int,
    data: str,
    fingerprint: str,
    own_codes: bool = False,
) -> str:
    """The words that make a likelihood comparable, or not. own_codes: given codes that belong to the images."""
    bound = "-ELBO" if samples == 1 else f"-IWAE bound of {samples} samples"
    if own_codes:
        bound = f"-log p(x | z), {CONDITIONAL},"
    pixels = f"{job.likelihood.pixels} pixels, {job.likelihood.bits} bits"
    if job.likelihood.pixels == "bernoulli":
        pixels = f"bernoulli pixels, {job.likelihood.binarize} binarisation"
    if density_bits(job.likelihood) is not None:
        pixels += ", a density of x in [0, 1] that may exceed 1"
    return f"{bound} of {totals.images:,} images, {pixels}, data {data} ({fingerprint[:12]})"


class Progress:
    """Tells the events of a job, one line each; as a context in a terminal, also where it is, in lines that stay below."""

    def __init__(self, job: "JobConfig", *, quiet: bool, epoch_images: int | None = None) -> None:
        """epoch_images: images of the training data, where epochs are to be told."""
        self._job, self._quiet, self._epoch_images = job, quiet, epoch_images
        self._began = time.monotonic()
        self._attempt = ""
        self._told = False
        self._newest: dict[str, Any] | None = None  # row of the training images
        self._newest_at = self._began
        self._bits: float | None = None
        self._change: float | None = None  # of the bits/dim, since the row before
        self._retries = 0
        self._saved_at: float | None = None
        self._reading: tuple[int, int] | None = None  # bytes of a state that have come, of how many
        self._reading_began = self._began
        self._lines: Callable[[int, int], None] = lambda done, total: None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        if console.is_terminal and not self._quiet:
            # Where only stdout is a file, what is said goes there as it is.
            redirected = sys.stdout.isatty()
            self._live = Live(
                get_renderable=self._below, console=console, transient=True, refresh_per_second=2,
                redirect_stdout=redirected,
            )  # fmt: skip
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def __call__(self, event: "Event") -> None:
        match event.kind:
            case "note":
                warn(event.body["text"])
            case "reading" if not self._quiet:
                self._take_reading(**event.body)
            case "status" if not self._quiet:
                say(event.body["text"], indent=0)
            case "row" if not self._quiet:
                self._tell_attempt(event.body)
                if event.body["split"] == "train":
                    self._take(event.body)
                say(self._row(event.body), indent=9)
            case "record" if not self._quiet:
                self._saved_at = time.monotonic()
                say(f"{self._at(event.body['images_seen'])}  checkpoint committed")
                self._tell_what_is_held_out(event.body)

    def _take_reading(self, done: int, total: int) -> None:
        if self._reading is None or not done:
            self._reading_began, self._lines = time.monotonic(), _line_now_and_then(READING, _bytes)
        self._reading = (done, total) if done < total else None
        if self._live is None:
            self._lines(done, total)

    def _take(self, row: dict[str, Any]) -> None:
        from vaejob.totals import LikelihoodTotals

        totals = LikelihoodTotals.from_dict(row)
        bits = None if totals.non_finite else totals.bits_per_dim
        self._change = None if bits is None or self._bits is None else bits - self._bits
        self._newest, self._newest_at, self._bits = row, time.monotonic(), bits
        self._retries += row.get("retries", 0)

    def _trend(self) -> list[str]:
        return [] if self._change is None else [f"{self._change:+.4f} since the last"]

    def _facts(self, row: dict[str, Any]) -> list[str]:
        """What a row tells besides its likelihood and its rate."""
        facts: list[str] = []
        workers, now = row.get("world_size", 1), time.monotonic()
        if self._epoch_images:
            epochs = (images / self._epoch_images for images in (row["images_seen"], self._job.training.images))
            facts.append("epoch {:,.1f} of {:,.1f}".format(*epochs))
        if workers > 1:
            facts.append(f"{workers:,} workers")
        if self._retries:
            facts.append(f"{self._retries:,} {'retry' if self._retries == 1 else 'retries'}")
        if self._saved_at is not None:
            facts.append(f"checkpoint {_duration(now - self._saved_at)} old")
        return facts

    def _below(self) -> "RenderableType":
        """The lines that stay at the foot of a terminal, as of now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now, row, total = time.monotonic(), self._newest, self._job.training.images
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        if self._reading:
            came, size = self._reading
            pace = f", {_pace(came, size, _bytes, seconds=now - self._reading_began)}" if came else ""
            bar.add_row(ProgressBar(total=size, completed=came), f"{_bytes(came)} of {_bytes(size)}{pace}")
            return Group(bar, Text(READING))
        if row is None:
            return Text(f"{_duration(now - self._began)} since the start, no report yet")
        seen, rate = row["images_seen"], row["images"] / row["seconds"]
        bar.add_row(ProgressBar(total=total, completed=seen), f"{100 * seen / total:.0f} % of {total:,} images")
        silent = now - self._newest_at
        left = max(0.0, (total - seen) / rate - silent)
        facts = [f"{_duration(left)} left", f"{rate:,.0f} images/s"]
        if self._bits is not None:
            facts.append(f"{self._bits + (density_bits(self._job.likelihood) or 0.0):.4f} bits/dim")
            facts += self._trend()
        return Group(bar, Text(", ".join([*facts, *self._facts(row), f"report {_duration(silent)} old"])))

    def _tell_attempt(self, row: dict[str, Any]) -> None:
        started_at = row["attempt_started_at_images"]
        if row["attempt"] != self._attempt and started_at:
            say(f"continuing from the checkpoint at {started_at:,} images")
        elif self._attempt not in ("", row["attempt"]):
            say("beginning again, since there was no checkpoint yet")
        self._attempt = row["attempt"]

    def _tell_what_is_held_out(self, record: dict[str, Any]) -> None:
        """Once: it is the same for every row."""
        from vaejob.totals import LikelihoodTotals

        if self._told or not record["held_out"]:
            return
        self._told = True
        totals, samples = LikelihoodTotals.from_dict(record["held_out"]), self._job.training.evaluate_samples
        data, fingerprint = self._job.data.test or "unknown", record["test_fingerprint"] or "unknown"
        of = what_it_is_of(self._job, totals, samples=samples, data=data, fingerprint=fingerprint)
        say(f"         held out: {of}", indent=9)

    def _row(self, row: dict[str, Any]) -> str:
        from vaejob.totals import LikelihoodTotals

        totals = LikelihoodTotals.from_dict(row)
        at = self._at(row["images_seen"])
        if row["split"] == "test":
            name = bound_name(self._job.training.evaluate_samples)
            return f"{at}  held out {bits_and_nats(totals, self._job.likelihood)}, {name} of {totals.images:,} images"
        rate = totals.images / row["seconds"]
        left = _duration((self._job.training.images - row["images_seen"]) / rate)
        facts = [f"{rate:,.0f} images/s", f"{left} left"]
        if self._live is None:  # else they stand below
            facts += self._facts(row)
        if totals.non_finite:
            return self._fitting(f"{at}  train {bits_and_nats(totals, self._job.likelihood)}", facts)
        added = density_bits(self._job.likelihood)
        nats, in_bits = (
            ("nats", "bits/dim") if added is None else ("nats (density)", f"bits/dim (density + {added:.4f})")
        )
        likelihood = f"{totals.mean('negative_bound'):.2f} {nats}, {totals.bits_per_dim + (added or 0.0):.4f} {in_bits}"
        own = ["given own codes"] if self._job.objective.own_codes else []
        return self._fitting(f"{at}  train {', '.join([likelihood, *own])}", [*self._trend(), *facts])

    def _fitting(self, line: str, facts: list[str]) -> str:
        """The line with its facts; in a terminal, below which they stand too, with as many of them as fit beside it."""
        for fact in facts:
            if self._live and len(line) + len(", ") + len(fact) > self._live.console.width:
                break
            line += f", {fact}"
        return line

    def _at(self, images_seen: int) -> str:
        total = f"{self._job.training.images:,}"
        return f"{_duration(time.monotonic() - self._began):>7}  {images_seen:>{len(total)},} of {total} images"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def images_done(what: str, *, quiet: bool = False) -> AbstractContextManager[Callable[[int, int], None]]:
    """Tells how many images of how many are done: a bar on a terminal, else a line every few seconds.

    On stderr, so that stdout holds results only.
    """
    return _told(what, _images, quiet=quiet)


def bytes_read(*, quiet: bool = False) -> AbstractContextManager[Callable[[int, int], None]]:
    """Tells likewise how many bytes of a state, of how many, have come."""
    return _told(READING, _bytes, quiet=quiet)


@contextmanager
def _told(what: str, amount: Callable[[float], str], *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield (lambda done, total: None) if quiet else _line_now_and_then(what, amount)
        return
    columns = TextColumn(what), BarColumn(bar_width=None), TextColumn("{task.fields[said]}")
    began = time.monotonic()
    with Bars(*columns, console=console, transient=True, expand=True, redirect_stdout=sys.stdout.isatty()) as bars:
        task = bars.add_task(what, total=None, said="")

        def tell(done: int, total: int) -> None:
            pace = f", {_pace(done, total, amount, seconds=time.monotonic() - began)}" if done else ""
            bars.update(task, completed=done, total=total, said=f"{_done_of(done, total, amount)}{pace}")

        yield tell


def _line_now_and_then(what: str, amount: Callable[[float], str]) -> Callable[[int, int], None]:
    began = last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _SECONDS_BETWEEN_LINES and done:
            last = now
            warn(f"{what}: {_done_of(done, total, amount)}, {_pace(done, total, amount, seconds=now - began)}")

    return tell


def _images(count: float) -> str:
    return f"{count:,.0f}"


def _bytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _done_of(done: int, total: int, amount: Callable[[float], str]) -> str:
    return f"{amount(done)} of {amount(total)}{' images' if amount is _images else ''}"


def _pace(done: int, total: int, amount: Callable[[float], str], *, seconds: float) -> str:
    return f"{amount(done / seconds)}/s, {_duration((total - done) / done * seconds)} left"
