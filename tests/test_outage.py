"""Training goes on while its bucket is out of reach: what is kept is bounded, and is there when the bucket is back."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
import torch

import vaejob
from tests.s3.faultproxy import FaultProxy
from tests.s3.server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.test_fencing import Start
from tests.test_step import JOB
from tests.test_stream_faults import set_deadlines
from vaejob.config import JobConfig, parse_config
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import BucketError
from vaejob.storage import open_bucket
from vaejob.storage.patience import Patience
from vaejob.storage.retry import StoreDown
from vaejob.storage.runs import newest_record, read_rows, recorded_images
from vaejob.training.checkpoint import StateWriter
from vaejob.training.worker import Event

pytestmark = [pytest.mark.s3, pytest.mark.timeout(120)]

DOWN = {"fault": "status", "code": 503, "s3code": "SlowDown"}


@pytest.fixture
def proxy(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What every bucket is reached through from now on, and given up on after a second or two."""
    with FaultProxy(upstream=s3_env.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        set_deadlines(monkeypatch, deadline_s=2.0, request_s=1.0)
        yield proxy
        proxy.strike()


@pytest.fixture
def job(s3_bucket: str, tmp_path: Path) -> JobConfig:
    """Its images lie in a folder, so that only its run is out of reach."""
    images = np.random.default_rng(0).integers(0, 256, (600, 1, 4, 4), dtype=np.uint8)
    pack(ArraySource("noise", images), str(tmp_path / "noise"))
    return parse_config(
        f"""
        run: {{name: run, bucket: {s3_bucket}}}
        data: {{train: {tmp_path}/noise/train, global_batch: 50}}
        model: {{latent: 2, hidden: [4]}}
        likelihood: {{pixels: bernoulli, binarize: dynamic}}
        training: {{images: 9000, report_every_images: 150}}
        checkpoint: {{every_images: 900, keep_last: 20}}
        cluster: {{workers: 0}}
        """
    )


def notes_of(events: list[Event]) -> list[str]:
    return [event.body["text"] for event in events if event.kind == "note"]


def test_a_ledger_waits_for_its_bucket_and_then_writes_all(s3_bucket: str, proxy: FaultProxy) -> None:
    start = Start(open_bucket(f"{s3_bucket}/run"), "a")
    start.report(10, images=10)
    saved = start.save(20)
    proxy.refuse(seconds=4)
    start.report(20, images=10, saved=saved)
    assert recorded_images(start.run) == [20]
    assert sum(row["images"] for row in read_rows(start.run)) == 20
    down, back = notes_of(start.told)
    assert down.startswith("the bucket is out of reach, reports and checkpoints wait for it: ")
    assert back.startswith("the bucket is back after ")


def test_a_ledger_ends_with_one_line_when_its_patience_does(s3_bucket: str, proxy: FaultProxy) -> None:
    impatient = JOB.model_copy(update={"checkpoint": JOB.checkpoint.model_copy(update={"outage_seconds": 2.0})})
    start = Start(open_bucket(f"{s3_bucket}/run"), "a", job=impatient)
    start.checkpoint(10, images=10)
    proxy.strike(DOWN)
    with pytest.raises(BucketError) as end:
        start.report(20, images=10)
    line = str(end.value)
    assert "\n" not in line
    assert line.startswith("the bucket was out of reach for ")
    assert "checkpoint.outage_seconds is 2: " in line
    assert "a checkpoint at 10 images there" in line


def test_a_writer_keeps_two_states_while_its_bucket_is_out_of_reach(s3_bucket: str, proxy: FaultProxy) -> None:
    run = open_bucket(s3_bucket)
    writer = StateWriter(run, attempt="a", rank=0, world_size=1, outage_seconds=100.0)
    proxy.strike(DOWN)
    for images_seen in (10, 20, 30, 40, 50):
        writer.save(images_seen, {"model.x": torch.full((3,), float(images_seen))})
        assert writer.saved() == {}
    proxy.strike()
    writer.finish()
    saved = writer.saved()
    assert list(saved) == [10, 50]
    assert run.keys("states/") == [file.key for file in saved.values()]
    notes = writer.notes()
    assert [note.partition(":")[0] for note in notes] == [f"no checkpoint at {n} images" for n in (20, 30, 40)]
    assert writer.notes() == ()


def test_a_writer_raises_to_the_loop_when_its_patience_ends(s3_bucket: str, proxy: FaultProxy) -> None:
    writer = StateWriter(open_bucket(s3_bucket), attempt="a", rank=0, world_size=1, outage_seconds=1.0)
    proxy.strike(DOWN)
    writer.save(10, {"model.x": torch.zeros(3)})
    writer.save(20, {"model.x": torch.zeros(3)})
    writer._thread.join()
    acts: list[Callable[[], None]] = [lambda: writer.save(30, {"model.x": torch.zeros(3)}), writer.finish]
    for act in acts:
        with pytest.raises(BucketError, match=r"checkpoint\.outage_seconds is 1: "):
            act()


def test_a_job_trains_on_through_an_outage_and_loses_nothing(job: JobConfig, proxy: FaultProxy) -> None:
    """The bucket comes back only after training has made 30 more reports without it."""
    notes: list[str] = []
    asked = 0

    def mend() -> None:
        if asked >= 40 and notes:
            proxy.strike()

    def on_event(event: Event) -> None:
        notes.extend(notes_of([event]))
        mend()

    def should_stop() -> bool:
        nonlocal asked
        asked += 1  # at every report
        if asked == 10:
            proxy.strike(DOWN)
        mend()
        return False

    address = vaejob.train(job, on_event=on_event, should_stop=should_stop)
    run = open_bucket(address)
    assert [note.partition(" is ")[0] for note in notes[:2]] == ["the bucket", "the bucket"]
    newest, damage = newest_record(run)
    assert newest is not None
    assert (newest.images_seen, damage) == (9000, [])
    rows = read_rows(run)
    assert [row["images_seen"] for row in rows] == list(range(150, 9001, 150))
    assert sum(row["images"] for row in rows) == 9000
    assert {row["attempt_started_at_images"] for row in rows} == {0}


def test_a_job_whose_bucket_never_comes_back_ends_and_goes_on_later(job: JobConfig, proxy: FaultProxy) -> None:
    job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"outage_seconds": 2.0})})

    def strike(event: Event) -> None:
        if event.kind == "record":
            proxy.strike(DOWN)

    with pytest.raises(BucketError, match=r"was out of reach for \d+ s, checkpoint.outage_seconds is 2: ") as end:
        vaejob.train(job, on_event=strike)
    assert "\n" not in str(end.value)
    proxy.strike()
    vaejob.train(job)
    rows = read_rows(open_bucket(f"{job.run.bucket}/run"))
    assert [row["images_seen"] for row in rows] == list(range(150, 9001, 150))


READERS = ("read-ahead", "fetch", "decode")
MAY_DIFFER = ("attempt", "written_at", "seconds", "data_wait_seconds", "retries", "retry_causes")


@pytest.fixture
def remote_job(job: JobConfig, s3_bucket: str, tmp_path: Path) -> JobConfig:
    """Its images lie in the bucket too, and are evaluated as well."""
    images = np.random.default_rng(0).integers(0, 256, (600, 1, 4, 4), dtype=np.uint8)
    pack(ArraySource("noise", images), f"{s3_bucket}/noise")
    data = job.data.model_copy(update={"train": f"{s3_bucket}/noise/train", "test": f"{s3_bucket}/noise/train"})
    training = job.training.model_copy(update={"images": 3000, "evaluate_every_images": 600})
    return job.model_copy(update={"data": data, "training": training})


def history(address: str) -> list[dict[str, object]]:
    return [
        {name: value for name, value in row.items() if name not in MAY_DIFFER}
        for row in read_rows(open_bucket(address))
    ]


@pytest.mark.parametrize("reports", [4, 7])
def test_a_job_waits_for_images_that_are_out_of_reach_and_trains_as_if_they_had_not_been(
    remote_job: JobConfig, proxy: FaultProxy, reports: int
) -> None:
    steady = vaejob.train(remote_job)
    told: list[str] = []
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1  # at every report
        if asked == reports:
            proxy.refuse(seconds=5)
        return False

    disturbed = remote_job.model_copy(update={"run": remote_job.run.model_copy(update={"name": "disturbed"})})
    address = vaejob.train(disturbed, on_event=lambda event: told.extend(notes_of([event])), should_stop=should_stop)
    assert history(address) == history(steady)
    assert any(note.startswith("waited for images: their bucket was out of reach for ") for note in told), told


def test_a_job_whose_images_never_come_back_ends_in_a_line_and_leaves_no_reader(
    remote_job: JobConfig, proxy: FaultProxy
) -> None:
    impatient = remote_job.model_copy(
        update={"checkpoint": remote_job.checkpoint.model_copy(update={"outage_seconds": 2.0})}
    )

    def strike(event: Event) -> None:
        if event.kind == "record":
            proxy.strike({**DOWN, "method": "GET", "path": "parquet"})

    before = set(threading.enumerate())
    with pytest.raises(
        BucketError, match=r"was out of reach for \d+ s, checkpoint.outage_seconds is 2: .*parquet"
    ) as end:
        vaejob.train(impatient, on_event=strike)
    assert "\n" not in str(end.value)
    deadline = time.monotonic() + 10
    while left := [thread for thread in set(threading.enumerate()) - before if thread.name.startswith(READERS)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_threads_that_share_an_outage_tell_of_it_once() -> None:
    told: list[str] = []
    down = threading.Event()
    down.set()
    patience = Patience(60.0, on_outage=lambda error: told.append(str(error)), on_return=lambda _: told.append("back"))

    def call(number: int) -> int:
        if down.is_set():
            raise StoreDown(f"request {number}")
        return number

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(patience.outlast, partial(call, number)) for number in range(8)]
        time.sleep(0.5)
        down.clear()
        assert [future.result() for future in found] == list(range(8))
    assert len(told) == 2
    assert told[1] == "back"

    down.set()
    waiting = threading.Timer(0.3, patience.end)
    waiting.start()
    with pytest.raises(BucketError, match="request 9"):
        patience.outlast(partial(call, 9))


def test_what_may_not_be_deleted_is_noted_once_and_training_goes_on(s3_bucket: str, proxy: FaultProxy) -> None:
    job = JOB.model_copy(update={"checkpoint": JOB.checkpoint.model_copy(update={"keep_last": 1})})
    start = Start(open_bucket(f"{s3_bucket}/run"), "a", job=job)
    start.checkpoint(10, images=10)
    proxy.strike(
        *({"fault": "status", "code": 403, "s3code": "AccessDenied", "method": verb} for verb in ("DELETE", "POST"))
    )
    for images_seen in (20, 30):
        start.checkpoint(images_seen, images=10)
    assert recorded_images(start.run) == [10, 20, 30]
    (note,) = notes_of(start.told)
    assert note.startswith("old checkpoints could not be removed: ")
    proxy.strike()
    start.checkpoint(40, images=10)
    assert recorded_images(start.run) == [40]


def test_pyarrow_copies_nothing_in_silence_and_a_bucket_says_so(
    s3_bucket: str, s3_env: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Why states do not go through pyarrow.fs.copy_files, which is how Ray Train uploads by default."""
    place = s3_bucket.removeprefix("s3://")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "share").write_bytes(b"x" * 1000)
    store = pyarrow.fs.S3FileSystem(
        access_key=ACCESS_KEY, secret_key=SECRET_KEY, endpoint_override=f"127.0.0.1:{proxy.port}", scheme="http",
        region="us-east-1", retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )  # fmt: skip
    proxy.strike({**DOWN, "method": "PUT"})
    pyarrow.fs.copy_files(
        str(tmp_path / "state"), f"{place}/state",
        source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=store,
    )  # fmt: skip
    assert open_bucket(s3_bucket).keys() == []
    with pytest.raises(StoreDown, match="gave up after"):
        open_bucket(s3_bucket).write("state/share", b"x" * 1000)
