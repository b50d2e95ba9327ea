"""What of a run is kept when a checkpoint has been added: the newest, the best, and what a live attempt is writing.

What no listing shows (uploads that were broken off) is removed at the next start: see Bucket.remove_leftovers.
"""

from collections.abc import Sequence

from vaejob.config import CheckpointConfig
from vaejob.errors import CheckpointError
from vaejob.storage import Bucket
from vaejob.storage.fence import Token
from vaejob.storage.runs import (
    Record,
    attempt_of,
    delete_checkpoint,
    held_out_nats,
    read_record,
    record_key,
    recorded_images,
)


def tidy(run: Bucket, config: CheckpointConfig, *, newest: Record, started_at_images: int, token: Token) -> None:
    """Deletes checkpoints that are not to be kept, and files that belong to none.

    newest: the record that was just added; its attempt began at started_at_images, so that records of earlier starts which
    lie behind that were passed over, or came late from a start that had been taken over. Raises TakenOver, and what the
    bucket raises; to be cut short does no harm.
    """
    records, damaged = _all_records(run)
    stored = run.keys("states/")
    token.check(run)  # so all that was listed is of this start, or of earlier ones, whose attempts are over
    behind = [record for record in records if record.images_seen > started_at_images and record.begun < newest.begun]
    live = [record for record in records if record not in behind]
    kept = kept_records(live, config)
    for images_seen in damaged:
        if images_seen > started_at_images and images_seen != newest.images_seen:
            run.delete(record_key(images_seen))
    for record in records:
        if record not in kept:
            delete_checkpoint(run, record)
    may_be_of_damaged = {images_seen for images_seen in damaged if images_seen <= started_at_images}
    named = {file.key for record in records for file in record.files}
    for key in stored:
        of = attempt_of(key)
        if of is None or key in named or of.images_seen >= newest.images_seen:
            continue
        if of.attempt != newest.attempt and of.images_seen not in may_be_of_damaged:
            run.delete(key)


def kept_records(records: Sequence[Record], config: CheckpointConfig) -> list[Record]:
    """The newest and the best of records that come oldest first."""
    scored = sorted((record for record in records if record.held_out), key=held_out_nats)
    return [*records[-config.keep_last :], *scored[: config.keep_best]]


def _all_records(run: Bucket) -> tuple[list[Record], list[int]]:
    """Those that can be read, oldest first, and images_seen of the others."""
    records, damaged = [], []
    for images_seen in recorded_images(run):
        try:
            records.append(read_record(run, images_seen))
        except CheckpointError:
            damaged.append(images_seen)
    return records, damaged
