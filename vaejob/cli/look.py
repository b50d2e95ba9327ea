"""The verbs that look at runs: runs, show."""

import io
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from vaejob.cli.terminal import bits, nats, say, say_json, warn, what_it_is_of

if TYPE_CHECKING:
    from vaejob.config import JobConfig
    from vaejob.metrics import LikelihoodTotals
    from vaejob.storage import Bucket
    from vaejob.storage.runs import Record, Row

RUNS_AT_ONCE = 8

Json = Annotated[bool, typer.Option("--json", help="The result as one JSON value.")]


class Look(NamedTuple):
    """One run, as far as it got."""

    address: str
    job: "JobConfig"
    records: "list[Record]"
    """Every checkpoint, oldest first."""
    rows: "list[Row]"
    attempts: list[str]
    problems: list[str]

    @property
    def images_seen(self) -> int:
        """The last thing that is known of it: of a checkpoint, or of a report beyond it."""
        return max([record.images_seen for record in self.records] + [row["images_seen"] for row in self.rows], default=0)

    @property
    def finished(self) -> bool:
        return bool(self.records) and self.records[-1].images_seen >= self.job.training.images

    @property
    def best(self) -> "Record | None":
        """The checkpoint with the best held-out bound."""
        from vaejob.storage.runs import held_out_nats

        return min((record for record in self.records if record.held_out), key=held_out_nats, default=None)

    def newest(self, split: str) -> "Row | None":
        return next((row for row in reversed(self.rows) if row["split"] == split), None)


def runs(
    bucket: Annotated[str, typer.Argument(help="The folder or bucket that holds runs.")], as_json: Json = False
) -> None:
    """Every run in a bucket: state, progress, and the best held-out bound among its checkpoints.

    \b
    Example:
      vaejob runs s3://models
    """
    from vaejob.errors import RunError
    from vaejob.storage import join, open_bucket
    from vaejob.storage.runs import JOB_KEY

    home = open_bucket(bucket)
    names = [name for name in home.folders() if home.size(f"{name}/{JOB_KEY}") is not None]
    if not names:
        is_run = home.size(JOB_KEY) is not None
        raise RunError(f"{home.url} is one run; use: vaejob show {bucket}" if is_run else f"{home.url} holds no runs")
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        found = list(pool.map(_look_or_say_why_not, (join(home.url, name) for name in names)))
    looks = [look for look in found if isinstance(look, Look)]
    for line in [line for line in found if isinstance(line, str)] + [line for look in looks for line in look.problems]:
        warn(line)
    epochs = _epochs(looks)
    if as_json:
        say_json([_summary(look, epochs.get(look.address)) for look in looks])
    else:
        _say_table(looks, epochs)


def show(
    run: Annotated[str, typer.Argument(help="The run's address: BUCKET/NAME.")], as_json: Json = False
) -> None:
    """One run: settings, checkpoints, its newest numbers, and how fast it went.

    \b
    Example:
      vaejob show s3://models/mnist-iwae-1
    """
    look = _look(run, whole_history=True)
    epochs = _epochs([look]).get(look.address)
    for line in look.problems:
        warn(line)
    if as_json:
        say_json(_everything(look, epochs))
    else:
        _say_run(look, epochs)


def likelihood_numbers(totals: "LikelihoodTotals") -> dict[str, int | float]:
    """Means per image and their standard errors, in nats and in bits/dim, at full precision."""
    from vaejob.likelihood.units import bits_per_dim

    dims = totals.dims / totals.images
    numbers: dict[str, int | float] = {"images": totals.images, "dims": totals.dims}
    for name, in_bits in (
        ("negative_bound", "bits_per_dim"),
        ("distortion", "distortion_bits_per_dim"),
        ("rate", "rate_bits_per_dim"),
    ):
        mean, error = totals.mean(name), totals.standard_error(name)
        numbers |= {f"{name}_nats": mean, f"{name}_nats_standard_error": error}
        numbers |= {in_bits: bits_per_dim(mean, dims), f"{in_bits}_standard_error": bits_per_dim(error, dims)}
    return numbers


def _look(address: str, *, whole_history: bool) -> Look:
    from vaejob.errors import CheckpointError
    from vaejob.storage import open_bucket
    from vaejob.storage.runs import newest_record, read_job, read_record, read_rows, recorded_images

    run = open_bucket(address)
    job = read_job(run)
    _, problems = newest_record(run)
    records = []
    for images_seen in recorded_images(run):
        try:
            records.append(read_record(run, images_seen))
        except CheckpointError as error:
            problems = problems if str(error) in problems else [*problems, str(error)]
    rows = read_rows(run) if whole_history else _newest_rows(run)
    attempts = [key.removeprefix("attempts/").removesuffix(".txt") for key in run.keys("attempts/")]
    return Look(run.url, job, records, rows, attempts, problems)


def _look_or_say_why_not(address: str) -> Look | str:
    from vaejob.errors import VaejobError

    try:
        return _look(address, whole_history=False)
    except VaejobError as error:
        return str(error)


def _newest_rows(run: "Bucket") -> "list[Row]":
    """Those of the last report: its file's name sorts behind all others."""
    import pyarrow.parquet as pq

    keys = run.keys("metrics/")
    return pq.read_table(io.BytesIO(run.read(keys[-1]))).to_pylist() if keys else []
