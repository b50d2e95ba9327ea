"""The driver's book: adds all workers' totals, writes one row per report and one record per checkpoint.

Only a ledger writes rows and records, and only sums over all workers: no worker's own number appears in a run.
"""

import itertools
import json
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from vaejob.config import JobConfig
from vaejob.errors import BucketError, CheckpointError, ClusterError
from vaejob.metrics import LikelihoodTotals
from vaejob.storage import Bucket
from vaejob.storage.fence import NOBODY, Token
from vaejob.storage.patience import Patience
from vaejob.storage.retry import StoreDown
from vaejob.storage.runs import Record, Row, StateFile, commit_record, write_rows
from vaejob.training.tidy import tidy
from vaejob.training.worker import Event, Report
from vaejob.version import VERSION

ROWS_OF_A_FILE = 500


class Ledger:
    """Takes the reports of all ranks, together, in the order they were made.

    It writes with the token of its start of the job, and only while no later start has taken one.
    """

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
        token: Token = NOBODY,
    ) -> None:
        self._run, self._job, self._token = run, job, token
        self._fingerprints = train_fingerprint, test_fingerprint
        self._test_images = test_images
        self._shape = shape
        self._on_event = on_event
        self._file: list[Row] = []
        self._sequence = 0
        self._held_out: dict[tuple[str, int], LikelihoodTotals] = {}
        self._shares: dict[tuple[str, int], dict[int, StateFile]] = {}
        self._committed: int | None = None
        self._not_tidied = ""
        self._patience = Patience(
            job.checkpoint.outage_seconds, on_outage=self._tell_of_outage, on_return=self._tell_of_return
        )
        if not token.exclusive:
            text = (
                f"{run.url}: this store has no conditional writes; if two jobs of this run are started at the same moment, "
                "nothing keeps one from replacing records of the other"
            )
            self._on_event(Event("note", {"text": text}))

    def add(self, moments: Sequence[Sequence[Report]]) -> None:
        """For each moment, in order, one report of every rank; waits while the bucket is out of reach.

        Raises TakenOver once a later start of the job writes to the run, and what the bucket raises.
        """
        for reports in moments:
            _refuse_unequal_replicas(reports)
        rows = [row for reports in moments for row in self._rows(reports)]
        # A file of rows is of one attempt; a job that goes back to a checkpoint begins another.
        for _, of_attempt in itertools.groupby(rows, key=lambda row: row["attempt"]):
            self._write_rows(list(of_attempt))
        for row in rows:
            self._tell(row)
        for reports in moments:
            self._take_shares(reports)

    def _write_rows(self, rows: list[Row]) -> None:
        """A file is written anew, with what it held, until it is full: else a long job would leave millions."""
        if self._file and (self._file[0]["attempt"] != rows[0]["attempt"] or len(self._file) >= ROWS_OF_A_FILE):
            self._file, self._sequence = [], self._sequence + 1
        self._file += rows

        def write() -> None:
            self._token.check(self._run)
            write_rows(self._run, self._file, sequence=self._sequence, begun=self._token.number)

        self._outlast(write)

    def _outlast(self, write: Callable[[], None]) -> None:
        try:
            self._patience.outlast(write)
        except BucketError as error:
            newest = "no checkpoint" if self._committed is None else f"a checkpoint at {self._committed:,} images"
            raise BucketError(
                f"{error}; since it was started this job has left {newest} there: repeat the command to go on"
            ) from error

    def _tell_of_outage(self, error: StoreDown) -> None:
        text = f"the bucket is out of reach, reports and checkpoints wait for it: {error}"
        self._on_event(Event("note", {"text": text}))

    def _tell_of_return(self, seconds: float) -> None:
        self._on_event(Event("note", {"text": f"the bucket is back after {seconds:.0f} s; what waited is written"}))

    def _tell(self, row: Row) -> None:
        if row["split"] == "train" and row["skipped_steps"]:
            text = f"at {row['images_seen']:,} images seen {row['skipped_steps']} of the last {row['steps']} steps were skipped"
            self._on_event(Event("note", {"text": text}))
        self._on_event(Event("row", row))

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
                files = [shares[rank] for rank in sorted(shares)]
                self._commit(*key, files, started_at_images=first.attempt_started_at_images)
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
                    "halvings": first.halvings,
                    "steps": first.steps,
                    "skipped_steps": first.skipped_steps,
                    "non_finite_steps": first.non_finite_steps,
                    "gradient_norms": first.gradient_norms,
                    "replica_checksum": f"{first.replica_checksum:016x}",
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

    def _commit(self, attempt: str, images_seen: int, files: Sequence[StateFile], *, started_at_images: int) -> None:
        held_out = self._held_out.pop((attempt, images_seen), None)
        train_fingerprint, test_fingerprint = self._fingerprints
        record = Record(
            images_seen=images_seen,
            attempt=attempt,
            begun=self._token.number,
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
        self._outlast(lambda: commit_record(self._run, record, self._token))
        self._committed = images_seen
        self._on_event(Event("record", record.model_dump()))
        self._tidy(record, started_at_images=started_at_images)

    def _tidy(self, newest: Record, *, started_at_images: int) -> None:
        """What cannot be deleted stays, and is tried again with the next checkpoint."""
        try:
            tidy(
                self._run,
                self._job.checkpoint,
                newest=newest,
                started_at_images=started_at_images,
                token=self._token,
            )
        except BucketError as error:
            if self._not_tidied != str(error):
                self._not_tidied = str(error)
                self._on_event(Event("note", {"text": f"old checkpoints could not be removed: {error}"}))


def _refuse_unequal_replicas(reports: Sequence[Report]) -> None:
    """Raises ClusterError: workers that no longer hold the same weights train different models."""
    (usual, _), *others = Counter(report.replica_checksum for report in reports).most_common()
    if others:
        first = next(report for report in reports if report.replica_checksum == usual)
        differ = [str(report.rank) for report in reports if report.replica_checksum != usual]
        raise ClusterError(
            f"the weights of worker{'s' if len(differ) > 1 else ''} {', '.join(differ)} of {first.world_size} differ from "
            f"those of worker {first.rank} at {first.images_seen} images seen; repeat the command to continue from the "
            "newest checkpoint, where they were equal"
        )


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
