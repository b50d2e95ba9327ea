"""Starts of one run that overlap never mix: the older one ends with a line that says who took over."""

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vaejob
from tests.test_ledger import moment, totals_of
from tests.test_reader import no_thread_is_left
from tests.test_step import JOB
from vaejob.config import JobConfig, parse_config
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import OutsideError
from vaejob.run import begin
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.fence import NOBODY, TakenOver, Token, newest_token, take_token, token_key
from vaejob.storage.runs import (
    StateFile,
    begin_attempt,
    commit_record,
    read_record,
    read_rows,
    record_key,
    recorded_images,
    state_key,
    write_state_file,
)
from vaejob.training.ledger import Ledger
from vaejob.training.worker import Event


@pytest.fixture(params=["directory", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    match request.param:
        case "directory":
            return open_bucket(str(tmp_path / "run"))
        case "memory":
            return open_bucket(f"memory://{secrets.token_hex(4)}")
        case _:
            return open_bucket(f"{request.getfixturevalue('s3_bucket')}/run")


class Start:
    """One start of the job: its token, its ledger, and a worker that saves."""

    def __init__(self, run: Bucket, who: str, *, job: JobConfig = JOB, started_at: int = 0) -> None:
        self.run, self.who, self.started_at = run, who, started_at
        self.token = begin_attempt(run, job, who=who)
        self.told: list[Event] = []
        self.ledger = Ledger(
            run, job, train_fingerprint="a", test_fingerprint=None, test_images=None, shape=(1, 4, 4),
            on_event=self.told.append, token=self.token,
        )  # fmt: skip

    def save(self, images_seen: int) -> dict[int, StateFile]:
        """What a worker does by itself: no ledger has heard of it yet."""
        key = state_key(images_seen, attempt=self.who, rank=0, world_size=1)
        return {images_seen: write_state_file(self.run, key, f"{self.who} {images_seen}".encode())}

    def report(self, images_seen: int, *, images: int, saved: dict[int, StateFile] | None = None) -> None:
        nats = [totals_of([1] * images)]
        self.ledger.add([
            moment(images_seen, 1, attempt=self.who, started_at=self.started_at, train=nats, saved=[saved or {}])
        ])  # fmt: skip

    def checkpoint(self, images_seen: int, *, images: int) -> None:
        self.report(images_seen, images=images, saved=self.save(images_seen))


def test_starts_have_rising_numbers_whatever_else_lies_there(run: Bucket) -> None:
    run.write("attempts/20260101T000000000000-0badcafe.yaml", b"# from before starts had numbers")
    run.write("attempts/notes.txt", b"")
    assert newest_token(run) == NOBODY
    tokens = [take_token(run, f"# {name}") for name in ("a", "b", "c")]
    assert [(token.number, token.exclusive) for token in tokens] == [(1, True), (2, True), (3, True)]
    assert newest_token(run) == tokens[-1]
    assert run.read(token_key(2)) == b"# b"
    tokens[-1].check(run)
    for token in [NOBODY, *tokens[:-1]]:
        with pytest.raises(TakenOver, match=r"start 3 \(c\) has taken over this run; start \d"):
            token.check(run)


def test_starts_at_one_moment_have_different_numbers(run: Bucket) -> None:
    together = threading.Barrier(8)

    def start(number: int) -> Token:
        together.wait()
        return take_token(run, f"# starter {number}")

    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(start, range(8)))
    assert sorted(token.number for token in tokens) == list(range(1, 9))
    for token in tokens:
        assert run.read(token_key(token.number)).decode() == token.text
        if token.number < 8:
            with pytest.raises(TakenOver):
                token.check(run)
        else:
            token.check(run)


def test_the_older_start_ends_with_a_line_that_says_who_took_over(run: Bucket) -> None:
    old = Start(run, "monday pid 1 on alpha")
    old.checkpoint(10, images=10)
    new = Start(run, "tuesday pid 2 on beta", started_at=10)
    before = run.versions()
    acts: list[Callable[[], None]] = [
        lambda: old.report(20, images=10),
        lambda: old.checkpoint(20, images=10),
    ]
    for act in acts:
        with pytest.raises(TakenOver) as refusal:
            act()
        assert str(refusal.value) == (
            f"{run.url}: start 2 (tuesday pid 2 on beta) has taken over this run; start 1 (monday pid 1 on alpha) ends here"
        )
        assert isinstance(refusal.value, OutsideError)
    left = {key: version for key, version in run.versions().items() if not key.startswith("states/")}
    assert left == {key: version for key, version in before.items() if not key.startswith("states/")}
    new.checkpoint(20, images=10)
    assert [read_record(run, images).begun for images in recorded_images(run)] == [1, 2]


def test_numbers_and_checkpoints_of_overlapping_starts_are_those_of_the_newer(run: Bucket) -> None:
    """The older one's rows and state were on their way when the newer began; its clock is ahead, so its names sort last."""
    old = Start(run, "zz")
    old.checkpoint(10, images=10)
    late = old.save(30)
    old.report(30, images=20)
    new = Start(run, "aa", started_at=10)
    new.report(25, images=15)
    with pytest.raises(TakenOver):
        old.report(40, images=10, saved=late)
    new.checkpoint(30, images=5)
    assert [(row["attempt"], row["images_seen"]) for row in read_rows(run)] == [("zz", 10), ("aa", 25), ("aa", 30)]
    assert sum(row["images"] for row in read_rows(run)) == 30
    assert read_record(run, 30).attempt == "aa"
    assert run.read(read_record(run, 30).files[0].key) == b"aa 30"


def test_a_record_that_came_late_from_an_older_start_is_not_gone_on_from(run: Bucket) -> None:
    old = Start(run, "old")
    old.checkpoint(10, images=10)
    late = read_record(run, 10).model_copy(update={"images_seen": 50, "files": tuple(old.save(50).values())})
    new = Start(run, "new", started_at=10)
    run.write(record_key(50), late.model_dump_json().encode())  # its request was on the way for that long
    new.checkpoint(20, images=10)
    assert recorded_images(run) == [10, 20]
    assert [key for key in run.keys("states/") if "/old-" in key and "000050" in key] == []


def test_a_record_is_written_once_unless_what_is_there_is_superseded(run: Bucket) -> None:
    start = Start(run, "a")
    start.checkpoint(10, images=10)
    record = read_record(run, 10)
    version = run.versions("records/")
    commit_record(run, record, start.token)  # a lost reply makes the driver ask again
    assert run.versions("records/") == version
    run.write(record_key(10), b"{torn")
    commit_record(run, record, start.token)
    assert read_record(run, 10) == record
    Start(run, "b")
    with pytest.raises(TakenOver, match=r"start 2 \(b\) has taken over"):
        commit_record(run, record.model_copy(update={"attempt": "other"}), start.token)
    assert read_record(run, 10) == record


def test_retention_of_a_start_that_was_taken_over_deletes_nothing(run: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken over between its commit and its deletions."""
    job = JOB.model_copy(update={"checkpoint": JOB.checkpoint.model_copy(update={"keep_last": 1, "keep_best": 0})})
    old = Start(run, "old", job=job)
    old.checkpoint(10, images=10)
    listed = type(run).keys

    def keys(bucket: Bucket, prefix: str = "") -> list[str]:
        found = listed(bucket, prefix)
        if prefix == "states/" and newest_token(bucket).number == 1:
            Start(bucket, "new", started_at=20).save(15)
        return found

    monkeypatch.setattr(type(run), "keys", keys)
    with pytest.raises(TakenOver):
        old.checkpoint(20, images=10)
    assert recorded_images(run) == [10, 20]
    assert [key.rpartition("/")[2] for key in run.keys("states/")] == [
        "old-0of1.safetensors", "new-0of1.safetensors", "old-0of1.safetensors",
    ]  # fmt: skip


@pytest.mark.s3
@pytest.mark.parametrize("how", ["said by the settings", "pretended"])
def test_a_store_without_conditions_is_noted_and_still_fenced(
    how: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "said by the settings":
        monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    run = open_bucket(f"{s3_bucket}/run")
    if how == "pretended":

        def create(bucket: Bucket, key: str, data: bytes) -> bool:
            bucket.write(key, data)
            return True

        monkeypatch.setattr(type(run), "create", create)
    old = Start(run, "old")
    assert not old.token.exclusive
    assert run.read(token_key(1)).startswith(b"# old\n")
    (note,) = [event.body["text"] for event in old.told]
    assert "no conditional writes" in note
    old.checkpoint(10, images=10)
    run.write(token_key(1), b"# twin")  # started at the same moment
    with pytest.raises(TakenOver, match=r"start 1 \(twin\) has taken over this run; start 1 \(old\) ends here"):
        old.checkpoint(20, images=10)
    run.write(token_key(1), old.token.text.encode())
    new = Start(run, "new", started_at=10)
    with pytest.raises(TakenOver, match=r"start 2 \(new\)"):
        old.checkpoint(20, images=10)
    new.checkpoint(20, images=10)
    assert [read_record(run, images).attempt for images in recorded_images(run)] == ["old", "new"]


def test_a_job_ends_once_it_was_started_again_elsewhere(digits_job: JobConfig) -> None:
    """The whole job in this process; the other start happens at its first row."""
    others: list[Any] = []

    def start_elsewhere(event: Event) -> None:
        if event.kind == "row" and not others:
            others.append(begin(digits_job))

    with pytest.raises(
        TakenOver, match=r"start 2 \(.* pid \d+ on .*\) has taken over this run; start 1 \(.*\) ends here"
    ) as end:
        vaejob.train(digits_job, on_event=start_elsewhere)
    assert end.value.exit_status == 4, "which no supervisor starts again"
    assert no_thread_is_left(), f"though whoever has {end} has its frames"
    run = open_bucket(f"{digits_job.run.bucket}/{digits_job.run.name}")
    assert others[0] == newest_token(run)
    vaejob.train(digits_job)
    assert recorded_images(run)[-1] == digits_job.training.images
    trained = sum(row["images"] for row in read_rows(run) if row["split"] == "train")
    assert trained == digits_job.training.images


@pytest.fixture
def digits_job(tmp_path: Path) -> JobConfig:
    images = np.random.default_rng(0).integers(0, 256, (600, 1, 4, 4), dtype=np.uint8)
    pack(ArraySource("noise", images), str(tmp_path / "noise"))
    return parse_config(
        f"""
        run: {{name: run, bucket: {tmp_path}}}
        data: {{train: {tmp_path}/noise/train, global_batch: 50}}
        model: {{latent: 2, hidden: [4]}}
        likelihood: {{pixels: bernoulli, binarize: dynamic}}
        training: {{images: 6000, report_every_images: 50}}
        checkpoint: {{every_images: 600}}
        cluster: {{workers: 0}}
        """
    )
