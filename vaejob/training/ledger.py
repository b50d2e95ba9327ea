"""The driver's book: adds all workers' totals, writes one row per report and one record per checkpoint.

Only a ledger writes rows and records, and only sums over all workers: no worker's own number appears in a run.
"""

import json
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from vaejob.config import JobConfig
from vaejob.errors import CheckpointError
from vaejob.metrics import LikelihoodTotals
from vaejob.storage import Bucket
from vaejob.storage.runs import (
    Record,
    Row,
    StateFile,
    delete_checkpoint,
    held_out_nats,
    read_record,
    recorded_images,
    write_record,
    write_rows,
)
from vaejob.training.worker import Event, Report
from vaejob.version import VERSION


class Ledger:
    """Takes the reports of all ranks, together, in the order they were made."""

    def __init__(
        self,
        run: Bucket,
        job: JobConfig,
        *,
        train_fingerprint: str,
        test_fingerprint: str | None,
        test_images: int | None,
        shape: tuple[int, int, int],
        on_event: Callable[[Event], None],
    ) -> None:
        self._run, self._job = run, job
        self._fingerprints = train_fingerprint, test_fingerprint
        self._test_images = test_images
        self._shape = shape
        self._on_event = on_event
        self._sequence = 0
        self._held_out: dict[tuple[str, int], LikelihoodTotals] = {}
        self._shares: dict[tuple[str, int], dict[int, StateFile]] = {}

    def add(self, moments: Sequence[Sequence[Report]]) -> None:
        """For each moment, in order, one report of every rank. Raises what the bucket raises."""
        rows = [row for reports in moments for row in self._rows(reports)]
        if rows:
            write_rows(self._run, rows, sequence=self._sequence)
            self._sequence += 1
        for row in rows:
            self._on_event(Event("row", row))
        for reports in moments:
            self._take_shares(reports)

    def _take_shares(self, reports: Sequence[Report]) -> None:
        """Commits each state of which all ranks have now written their share."""
        first = reports[0]
        for note in dict.fromkeys(note for report in reports for note in report.notes):
            self._on_event(Event("note", {"text": note}))
        for report in reports:
            for images_seen, file in report.saved.items():
                self._shares.setdefault((report.attempt, images_seen), {})[report.rank] = file
        for key, shares in list(self._shares.items()):
            if key[0] != first.attempt:
                del self._shares[key]  # of a group of workers that is gone: its state can no longer become whole
            elif len(shares) == first.world_size:
                self._commit(*key, [shares[rank] for rank in sorted(shares)])
                del self._shares[key]

    def _rows(self, reports: Sequence[Report]) -> list[Row]:
        first = reports[0]
        assert sorted(report.rank for report in reports) == list(range(first.world_size)), reports
        assert {report.images_seen for report in reports} == {first.images_seen}, reports
        common = {
            "images_seen": first.images_seen,
            "attempt": first.attempt,
            "attempt_started_at_images": first.attempt_started_at_images,
            "world_size": first.world_size,
            "written_at": _now(),
        }
        rows: list[Row] = []
        trained = sum((report.train for report in reports), LikelihoodTotals())
        retries = sum((Counter(report.retries) for report in reports), Counter[str]())
        if trained.images:
            rows.append(
                {
                    **common,
                    **trained.to_dict(),
                    "split": "train",
                    "seconds": max(report.seconds for report in reports),
                    "data_wait_seconds": max(report.data_wait_seconds for report in reports),
                    "missing_images": sum(report.missing_images for report in reports),
                    "retries": retries.total(),
                    "retry_causes": json.dumps(dict(retries.most_common())),
                    "learning_rate": first.learning_rate,
                    "objective_nats": sum(report.objective_nats for report in reports),
                    "ids_digest": f"{sum(report.ids_digest for report in reports) % 2**64:016x}",
                }
            )
        parts = [report.held_out for report in reports if report.held_out is not None]
        if parts:
            held_out = sum(parts, LikelihoodTotals())
            if held_out.images != self._test_images:
                raise CheckpointError(
                    f"the held-out pass saw {held_out.images} images, the manifest has {self._test_images}"
                )
            self._held_out[first.attempt, first.images_seen] = held_out
            rows.append({**common, **held_out.to_dict(), "split": "test"})
        return rows

    def _commit(self, attempt: str, images_seen: int, files: Sequence[StateFile]) -> None:
        held_out = self._held_out.pop((attempt, images_seen), None)
        train_fingerprint, test_fingerprint = self._fingerprints
        record = Record(
            images_seen=images_seen,
            attempt=attempt,
            world_size=len(files),
            written_at=_now(),
            shape=self._shape,
            job_fingerprint=self._job.fingerprint,
            train_fingerprint=train_fingerprint,
            test_fingerprint=test_fingerprint,
            held_out=held_out.to_dict() if held_out else None,
            files=tuple(files),
            versions=versions(),
        )
        write_record(self._run, record)
        self._on_event(Event("record", record.model_dump()))
        self._retire()

    def _retire(self) -> None:
        """Deletes checkpoints that are neither among the newest nor among the best."""
        recorded = [read_record(self._run, images_seen) for images_seen in recorded_images(self._run)]
        scored = sorted((record for record in recorded if record.held_out), key=held_out_nats)
        kept = recorded[-self._job.checkpoint.keep_last :] + scored[: self._job.checkpoint.keep_best]
        for record in recorded:
            if record not in kept:
                delete_checkpoint(self._run, record)


def versions() -> dict[str, str]:
    """Of what computes and what stores."""
    packages = ("torch", "ray", "pyarrow", "safetensors", "obstore", "numpy")
    return {
        "vaejob": VERSION,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
