"""What is known of a run from its bucket alone, and its numbers as JSON."""

import io
import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from vaejob.cli.terminal import density_bits
from vaejob.config import JobConfig, LikelihoodConfig
from vaejob.data.batches import open_data
from vaejob.errors import CheckpointError, VaejobError
from vaejob.likelihood.units import bits_per_dim
from vaejob.metrics import LikelihoodTotals
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.runs import (
    Record,
    Row,
    held_out_nats,
    newest_record,
    read_job,
    read_record,
    read_rows,
    recorded_images,
)


class Overview(NamedTuple):
    """One run, as far as it got."""

    address: str
    job: JobConfig
    newest: Record | None
    """The newest checkpoint that is there in full."""
    records: list[Record]
    """Every readable checkpoint, oldest first."""
    rows: list[Row]
    """Its whole history, or only its last report."""
    attempts: list[str]
    """Every start of the job, oldest first."""
    problems: list[str]
    """A line for each checkpoint that is damaged."""

    @property
    def images_seen(self) -> int:
        """By its newest checkpoint, or by a report beyond it."""
        reported: int = self.rows[-1]["images_seen"] if self.rows else 0
        return max(reported, self.newest.images_seen if self.newest else 0)

    @property
    def finished(self) -> bool:
        return self.newest is not None and self.newest.images_seen >= self.job.training.images

    @property
    def best(self) -> Record | None:
        """The checkpoint with the best held-out bound."""
        return min((record for record in self.records if record.held_out), key=held_out_nats, default=None)

    @property
    def last_report_at(self) -> datetime | None:
        return datetime.fromisoformat(self.rows[-1]["written_at"]) if self.rows else None

    def newest_row(self, split: str) -> Row | None:
        return next((row for row in reversed(self.rows) if row["split"] == split), None)


def look_at(address: str, *, whole_history: bool) -> Overview:
    """Raises RunError where no run is."""
    run = open_bucket(address)
    job = read_job(run)
    newest, problems = newest_record(run)
    records = []
    for images_seen in recorded_images(run):
        try:
            records.append(read_record(run, images_seen))
        except CheckpointError as error:
            problems = problems if str(error) in problems else [*problems, str(error)]
    rows = read_rows(run) if whole_history else _last_report(run)
    attempts = [key.removeprefix("attempts/").removesuffix(".yaml") for key in run.keys("attempts/")]
    return Overview(run.url, job, newest, records, rows, attempts, problems)


def training_images(overview: Overview) -> int | None:
    """Images of an epoch; None where the data is out of reach, or no longer what the run was trained on."""
    try:
        manifest = open_data(overview.job.data.train).manifest
    except VaejobError:
        return None
    changed = overview.newest is not None and overview.newest.train_fingerprint != manifest.fingerprint
    return None if changed else manifest.images


def likelihood_numbers(totals: LikelihoodTotals, likelihood: LikelihoodConfig | None = None) -> dict[str, Any]:
    """Means per image with their standard errors, in nats and in bits/dim, at full precision; a density's corrected."""
    numbers: dict[str, Any] = {"images": totals.images, "dims": totals.dims, "non_finite": totals.non_finite}
    if totals.non_finite:
        return numbers
    dims, added = totals.dims / totals.images, density_bits(likelihood)
    if added is not None:
        numbers |= {"density": True, "density_bits_correction": added}
    for name, in_bits in (
        ("negative_bound", "bits_per_dim"),
        ("distortion", "distortion_bits_per_dim"),
        ("rate", "rate_bits_per_dim"),
    ):
        mean, error = totals.mean(name), totals.standard_error(name)  # type: ignore[arg-type]
        numbers |= {f"{name}_nats": mean, f"{name}_nats_standard_error": error}
        numbers |= {
            in_bits: bits_per_dim(mean, dims) + (0.0 if name == "rate" else added or 0.0),
            f"{in_bits}_standard_error": bits_per_dim(error, dims),
        }
    return numbers


def summary(run: Overview, epoch_images: int | None) -> dict[str, Any]:
    """What `vaejob runs --json` says of a run."""
    last = run.last_report_at
    return {
        "run": run.address,
        "name": run.job.run.name,
        "finished": run.finished,
        "images_seen": run.images_seen,
        "images": run.job.training.images,
        "epochs": run.images_seen / epoch_images if epoch_images else None,
        "checkpoints": [record.images_seen for record in run.records],
        "best": _checkpoint(run, run.best) if run.best else None,
        "last_report_at": last.isoformat() if last else None,
        "last_report_age_seconds": age_seconds(last) if last else None,
        "attempts": len(run.attempts),
    }


def everything(run: Overview, epoch_images: int | None) -> dict[str, Any]:
    """What `vaejob show --json` says."""
    return {
        **summary(run, epoch_images),
        "settings": run.job.model_dump(),
        "checkpoints": [_checkpoint(run, record) for record in run.records],
        "train": _speed_and_numbers(run.newest_row("train"), run.job.likelihood),
        "held_out": _speed_and_numbers(run.newest_row("test"), run.job.likelihood),
        "fingerprints": {name: fingerprint for name, _, fingerprint in data_sets(run)},
        "attempts": run.attempts,
        "problems": run.problems,
    }


def _checkpoint(run: Overview, record: Record) -> dict[str, Any]:
    totals = held_out_totals(record)
    return {
        "images_seen": record.images_seen,
        "written_at": record.written_at,
        "world_size": record.world_size,
        "files": len(record.files),
        "bytes": sum(file.size for file in record.files),
        "samples": run.job.training.evaluate_samples if totals else None,
        "held_out": likelihood_numbers(totals, run.job.likelihood) if totals else None,
    }


def _speed_and_numbers(row: Row | None, likelihood: LikelihoodConfig) -> dict[str, Any] | None:
    if row is None:
        return None
    numbers = {"images_seen": row["images_seen"], "written_at": row["written_at"], "world_size": row["world_size"]}
    numbers |= likelihood_numbers(LikelihoodTotals.from_dict(row), likelihood)
    if row["seconds"]:
        numbers["images_per_second"] = row["images"] / row["seconds"]
        numbers["data_wait_share"] = row["data_wait_seconds"] / row["seconds"]
        numbers |= {"missing_images": row["missing_images"], "retries": json.loads(row["retry_causes"] or "{}")}
    return numbers


def data_sets(run: Overview) -> list[tuple[str, str, str | None]]:
    """Split, address and fingerprint of the run's data sets; the fingerprints are known once a checkpoint is."""
    train, test = run.job.data.train, run.job.data.test
    data = [("train", train, run.newest.train_fingerprint if run.newest else None)]
    return [*data, ("test", test, run.newest.test_fingerprint if run.newest else None)] if test else data


def held_out_totals(record: Record) -> LikelihoodTotals | None:
    return LikelihoodTotals.from_dict(record.held_out) if record.held_out else None


def age_seconds(then: datetime) -> float:
    return max((datetime.now(UTC) - then).total_seconds(), 0.0)


def _last_report(run: Bucket) -> list[Row]:
    """Its file's name sorts behind all others."""
    keys = run.keys("metrics/")
    return pq.read_table(io.BytesIO(run.read(keys[-1]))).to_pylist() if keys else []
