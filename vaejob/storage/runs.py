"""What a run looks like in its bucket: job.yaml, states, records, metrics. A checkpoint exists once its record does."""

import hashlib
import io
import math
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vaejob.config import JobConfig, parse_config
from vaejob.errors import CheckpointError, ObjectMissing, RunError
from vaejob.storage.bucket import Bucket, NotOffered
from vaejob.storage.fence import Token, take_token

READS_OF_DAMAGE = 3
"""A byte may have been flipped on its way here."""

REQUESTS_AT_ONCE = 16
"""A state has a file of each worker."""

JOB_KEY = "job.yaml"

Row = dict[str, Any]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StateFile(_Part):
    """One file of a state, as it was when it was written."""

    key: str
    size: int = Field(ge=0)
    sha256: str

    @field_validator("key")
    @classmethod
    def _of_a_state(cls, key: str) -> str:
        if not key.startswith("states/") or any(part in ("", ".", "..") for part in key.split("/")):
            raise ValueError(f"{key!r} names no file of a state of this run")
        return key


class Record(_Part):
    """One checkpoint: everything needed to go on from it, and to believe its numbers."""

    format: Literal[1] = 1
    images_seen: int = Field(ge=0)
    attempt: str
    begun: int = Field(default=0, ge=0)
    """Number of the start of the job that wrote it, as in attempts/; 0: from before they had numbers."""
    world_size: int = Field(ge=1)
    written_at: str
    shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    job_fingerprint: str
    train_fingerprint: str
    test_fingerprint: str | None
    held_out: dict[str, int | float] | None
    """Sums of the held-out pass at images_seen, if there was one."""
    files: tuple[StateFile, ...] = Field(min_length=1)
    versions: dict[str, str]


def new_attempt() -> str:
    """Name of one start of a job; later ones sort behind earlier ones."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"


def state_key(images_seen: int, *, attempt: str, rank: int, world_size: int) -> str:
    return f"states/{images_seen:012d}/{attempt}-{rank}of{world_size}.safetensors"


def record_key(images_seen: int) -> str:
    return f"records/{images_seen:012d}.json"


def read_job(run: Bucket) -> JobConfig:
    """The configuration of the run, as it was last started. Raises RunError where no run is."""
    try:
        text = run.read(JOB_KEY).decode()
    except ObjectMissing:
        raise RunError(f"{run.url} is no run: no {JOB_KEY} is there; list runs with: vaejob runs BUCKET") from None
    return parse_config(text, source=f"{run.url}/{JOB_KEY}")


class StateOf(NamedTuple):
    """What a state's file is of."""

    images_seen: int
    attempt: str


def attempt_of(key: str) -> StateOf | None:
    """By its key; None for what is no file of a state."""
    match = re.fullmatch(r"states/(\d{12})/(.+)-\d+of\d+\.safetensors", key)
    return StateOf(int(match[1]), match[2]) if match else None


def begin_attempt(run: Bucket, job: JobConfig, *, who: str) -> Token:
    """Notes a start of the job, which ends all earlier ones; job.yaml is its configuration from now on.

    The caller has made sure that it leads to the same results as before; length or workers may differ.
    """
    text = f"# {who}\n{job.to_yaml()}"
    token = take_token(run, text)
    run.write(JOB_KEY, text.encode())
    return token


def write_state_file(run: Bucket, key: str, data: bytes) -> StateFile:
    """Puts one file of a state and proves that the store has all of it. Raises BucketError or CheckpointError."""
    run.write(key, data)
    if (size := run.size(key)) != len(data):
        raise CheckpointError(f"{run.url}/{key} holds {size} bytes after {len(data)} were written")
    return StateFile(key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_state_file(run: Bucket, file: StateFile, *, on_bytes: Callable[[int], None] = lambda more: None) -> bytes:
    """The file, checked. Raises CheckpointError if it is gone or differs from what the record says.

    on_bytes: as Bucket.read's; what is read again is taken back first.
    """
    for _ in range(READS_OF_DAMAGE):
        try:
            data = run.read(file.key, on_bytes=on_bytes)
        except ObjectMissing:
            raise CheckpointError(f"{run.url}/{file.key} is gone; its record still names it") from None
        found = hashlib.sha256(data).hexdigest()
        if found == file.sha256:
            return data
        on_bytes(-len(data))
    raise CheckpointError(f"{run.url}/{file.key}: sha256 is {found[:12]}, its record says {file.sha256[:12]}")


def write_record(run: Bucket, record: Record) -> None:
    """Whatever stands in its place."""
    run.write(record_key(record.images_seen), _to_json(record))


def commit_record(run: Bucket, record: Record, token: Token) -> None:
    """Writes the record of the start that holds the token. Raises TakenOver if there is a later one.

    A record that is already there is this one, whose reply was lost, or is superseded: damaged, or of a way not gone on.
    """
    token.check(run)
    key, data = record_key(record.images_seen), _to_json(record)
    try:
        if token.exclusive and (run.create(key, data) or run.read(key) == data):
            return
    except (NotOffered, ObjectMissing):
        pass
    token.check(run)  # a later start may have written it just now
    run.write(key, data)


def _to_json(record: Record) -> bytes:
    return record.model_dump_json(indent=1).encode()


def read_record(run: Bucket, images_seen: int) -> Record:
    """Raises RunError if there is no such record, CheckpointError if it is damaged."""
    key = record_key(images_seen)
    why = ""
    for _ in range(READS_OF_DAMAGE):
        try:
            record = Record.model_validate_json(run.read(key))
        except ObjectMissing:
            known = ", ".join(str(images) for images in recorded_images(run)) or "none"
            raise RunError(f"{run.url} has no checkpoint at {images_seen} images; it has: {known}") from None
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            continue
        if record.images_seen == images_seen:
            return record
        why = f"it is the record of {record.images_seen} images"
    raise CheckpointError(f"{run.url}/{key} is damaged: {why}")


def recorded_images(run: Bucket) -> list[int]:
    """images_seen of every record, oldest first."""
    found = (re.fullmatch(r"records/(\d{12,})\.json", key) for key in run.keys("records/"))
    return sorted(int(match[1]) for match in found if match)


def newest_record(run: Bucket) -> tuple[Record | None, list[str]]:
    """The newest record whose files are all there in full, and a line for each newer one that was passed over."""
    damage: list[str] = []
    for images_seen in reversed(recorded_images(run)):
        try:
            record = read_record(run, images_seen)
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                sizes = list(pool.map(run.size, (file.key for file in record.files)))
            for file, size in zip(record.files, sizes, strict=True):
                if size != file.size:
                    raise CheckpointError(f"{run.url}/{file.key}: {size} bytes, its record says {file.size}")
            return record, damage
        except RunError:
            continue  # an earlier start that still lived has tidied it away since it was listed
        except CheckpointError as error:
            damage.append(str(error))
    return None, damage


def choose_record(run: Bucket, which: str = "latest") -> Record:
    """The checkpoint called latest, best (held-out bound), or by its number of images. Raises RunError."""
    if which.isdecimal():
        return read_record(run, int(which))
    if which not in ("latest", "best"):
        raise RunError(f"checkpoint is {which!r}; it must be latest, best, or a number of images")
    if which == "latest":
        record, damage = newest_record(run)
        if record is None:
            raise RunError(damage[0] if damage else f"{run.url} has no checkpoint yet")
        return record
    scored = [record for images in recorded_images(run) if (record := read_record(run, images)).held_out]
    if not scored:
        raise RunError(f"{run.url} has no checkpoint with a held-out bound; choose latest, or set data.test")
    return min(scored, key=held_out_nats)


def held_out_nats(record: Record) -> float:
    """Negative held-out bound of the checkpoint, in nats per image; infinite if that of any image is not finite."""
    assert record.held_out is not None
    if record.held_out["non_finite"]:
        return math.inf
    return record.held_out["negative_bound_nats"] / record.held_out["images"]


def delete_checkpoint(run: Bucket, record: Record) -> None:
    """The record goes first: a state without a record is only debris, a record without its state is damage."""
    run.delete(record_key(record.images_seen))
    for file in record.files:
        run.delete(file.key)


ROW_SCHEMA = pa.schema(
    {
        "split": pa.string(),  # train: sums over the images trained on since the row before; test: a held-out pass
        "images_seen": pa.int64(),
        "attempt": pa.string(),
        "attempt_started_at_images": pa.int64(),
        "world_size": pa.int64(),
        "written_at": pa.string(),
        "seconds": pa.float64(),  # of the slowest worker, since the row before
        "data_wait_seconds": pa.float64(),  # of those, the step waited for images
        "missing_images": pa.int64(),  # damaged ones that data.on_corrupt=skip left out
        "retries": pa.int64(),  # requests to the bucket that were repeated, of all workers
        "retry_causes": pa.string(),  # their number by cause, as JSON
        "learning_rate": pa.float64(),
        "halvings": pa.int64(),  # of it, each when the job went back to a checkpoint
        "steps": pa.int64(),  # optimisation steps since the row before, the skipped ones included
        "skipped_steps": pa.int64(),  # their gradient was too large, or not finite
        "non_finite_steps": pa.int64(),  # of the skipped, those whose gradient was not finite
        "gradient_norms": pa.float64(),  # sum of the gradient's norm, before clipping, over the steps taken
        "replica_checksum": pa.string(),  # of the weights' bits, in hex; the same on all workers
        "ids_digest": pa.string(),  # data.order.ids_digest of the images trained on, in hex
        "images": pa.int64(),
        "dims": pa.int64(),
        "non_finite": pa.int64(),
        "objective_nats": pa.float64(),
        "negative_bound_nats": pa.float64(),
        "distortion_nats": pa.float64(),
        "rate_nats": pa.float64(),
        "negative_bound_squares": pa.float64(),
        "negative_bound_squares_rest": pa.float64(),
        "distortion_squares": pa.float64(),
        "distortion_squares_rest": pa.float64(),
        "rate_squares": pa.float64(),
        "rate_squares_rest": pa.float64(),
        "weighed_images": pa.int64(),  # those scored by importance weights, and what their weights are worth
        "effective_samples": pa.float64(),
        "weight_variance": pa.float64(),
        "largest_inverse_ess": pa.float64(),
    }
)
"""Columns of metrics/: sums over images, never means."""


BEGUN, SEQUENCE = b"vaejob.begun", b"vaejob.sequence"


def write_rows(run: Bucket, rows: Sequence[Row], *, sequence: int, begun: int = 0) -> None:
    """Puts reports of one attempt into the run's history as one Parquet file, in place of the one of the same sequence.

    sequence: rises with the files of one start of the job. begun: the number of the start, as in attempts/. The file says both: names go by clocks, which may differ.
    """
    sink = io.BytesIO()
    schema = ROW_SCHEMA.with_metadata({BEGUN: str(begun), SEQUENCE: str(sequence)})
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink)
    run.write(f"metrics/{rows[0]['attempt']}-{sequence:06d}.parquet", sink.getvalue())


def read_rows(run: Bucket) -> list[Row]:
    """The run's history as if it had never been interrupted: an attempt replaces all that came after its start.

    Raises CheckpointError for a file of it that is damaged: without its rows the sums would be others.
    """
    rows: list[Row] = []
    # Those of one place keep the order of their names.
    for _, written in sorted(read_row_files(run, row_keys(run)), key=lambda file: file[0]):
        started_at = written[0]["attempt_started_at_images"]
        attempt = written[0]["attempt"]
        rows = [row for row in rows if row["attempt"] == attempt or row["images_seen"] <= started_at] + written
    return rows


def row_keys(run: Bucket) -> list[str]:
    """Of the files of reports; what else lies beside them is not ours."""
    return [key for key in run.keys("metrics/") if re.fullmatch(r"metrics/[^/]+-\d{6,}\.parquet", key)]


def read_row_files(run: Bucket, keys: Sequence[str]) -> list[tuple[tuple[int, int], list[Row]]]:
    """What parse_rows makes of each. Raises CheckpointError for one that is damaged."""
    files = []
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        for key, data in zip(keys, pool.map(run.read, keys), strict=True):
            try:
                files.append(parse_rows(data))
            except (pa.ArrowException, LookupError, ValueError) as error:
                raise CheckpointError(f"{run.url}/{key} is damaged: {error}") from None
    return files


def parse_rows(data: bytes) -> tuple[tuple[int, int], list[Row]]:
    """One file of reports: (number of its start, its place in it), and its rows.

    By the calling thread alone: Arrow's own threads, which read_table would ask, may let go of the bytes only when the
    interpreter is already ending, and end the process by SIGABRT.
    """
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    said = table.schema.metadata or {}
    begun = int(said.get(BEGUN, 0))
    if not table.num_rows or not {"attempt", "images_seen"} <= set(table.column_names):
        raise ValueError("it holds no reports")
    return (begun, int(said[SEQUENCE]) if begun else 0), table.to_pylist()
