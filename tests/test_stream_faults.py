"""An epoch through a failing network is the images that were packed, or one line in time that names object and fault."""

import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import obstore
import pytest

import vaejob
from tests.s3.faultproxy import FaultProxy, Rule
from tests.s3.server import S3Server, client
from vaejob.config import DataConfig
from vaejob.data.batches import Batch
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import BucketError, DataError, VaejobError
from vaejob.storage.remote import DEADLINE_S, REQUEST_S, RemoteBucket
from vaejob.storage.retry import retries_so_far

pytestmark = [pytest.mark.s3, pytest.mark.timeout(90)]

MIB = 2**20
IMAGES = 900
ROW_GROUP_BYTES = 4 * 2**10
SHORT_DEADLINE_S, SHORT_REQUEST_S = 6.0, 1.0
PATIENT_DEADLINE_S, PATIENT_REQUEST_S = 60.0, 10.0  # where no request of a busy machine may come too late by itself
UNHURRIED_REQUEST_S = 3.0  # the same, where there is an end after all
SLACK_S = 5  # for a busy machine; less than a deadline, so that two in a row are noticed
SHARD = r"/train/\d+"
ALREADY_READ = 12  # requests that pass before a store fails for good: what opens the data set, and a few row groups


class Packed(NamedTuple):
    """Shards in a bucket, what was packed into them, and the ids that each batch of an epoch should have."""

    address: str
    pixels: np.ndarray
    planned: list[list[int]]


@pytest.fixture(scope="module", params=["raw", "encoded"])
def packed(request: pytest.FixtureRequest, s3_env: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return packed_noise(s3_env, tmp_path_factory.mktemp("packed"), encoding=request.param)


@pytest.fixture(scope="module")
def raw(s3_env: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return packed_noise(s3_env, tmp_path_factory.mktemp("raw"), encoding="raw")


def packed_noise(
    server: S3Server,
    folder: Path,
    *,
    encoding: Any,
    images: int = IMAGES,
    shape: tuple[int, int, int] = (3, 12, 11),
    row_group_bytes: int = ROW_GROUP_BYTES,
) -> Packed:
    """Packed into a bucket, and into a folder whose epoch, which no fault can touch, says what is planned."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, *shape), dtype=np.uint8)
    bucket = f"vaejob-{secrets.token_hex(6)}"
    client(server).create_bucket(Bucket=bucket)
    for dest in (str(folder), f"s3://{bucket}"):
        pack(
            ArraySource("noise", pixels),
            dest,
            encoding="raw" if encoding == "raw" else "keep",
            shard_bytes=20 * row_group_bytes,
            row_group_bytes=row_group_bytes,
        )
    manifest = vaejob.open_data(str(folder / "train")).manifest
    assert manifest.encoding == encoding
    planned = [batch.ids.tolist() for batch in epoch(str(folder / "train"), images=images)]
    assert sorted(sample for ids in planned for sample in ids) == list(range(images))
    return Packed(f"s3://{bucket}/train", pixels, planned)


def epoch(
    address: str, *, images: int = IMAGES, after_first_batch: Callable[[], object] = lambda: None
) -> Iterator[Batch]:
    config = DataConfig(train=address, global_batch=32, lanes=2, window_rows=16, prefetch_batches=1)
    batches = vaejob.open_data(address).training_batches(config, seed=0, images_seen=0, until=images)
    yield next(batches)
    after_first_batch()
    yield from batches


def check(packed: Packed, batches: list[Batch]) -> None:
    assert [batch.ids.tolist() for batch in batches] == packed.planned
    for batch in batches:
        assert batch.images.tobytes() == packed.pixels[batch.ids].tobytes()


@pytest.fixture
def proxy(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What every bucket is reached through from now on, with short deadlines."""
    with FaultProxy(upstream=s3_env.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        set_deadlines(monkeypatch, deadline_s=SHORT_DEADLINE_S, request_s=SHORT_REQUEST_S)
        yield proxy
        proxy.strike()
        while any(thread.name.startswith("fetch") for thread in threading.enumerate()):
            time.sleep(0.01)  # what an epoch that has ended leaves behind would be counted with the next test's


def set_deadlines(patch: pytest.MonkeyPatch, **defaults: float) -> None:
    for name, seconds in defaults.items():
        patch.setitem(RemoteBucket.__init__.__kwdefaults__, name, seconds)


SLOW_DOWN: Rule = {"fault": "status", "code": 503, "s3code": "SlowDown"}
INTERNAL: Rule = {"fault": "status", "code": 500, "s3code": "InternalError"}
CLOSED = "the connection was closed before the end of the reply"
RESET, SLOW_REPLY, NO_ANSWER = "connection reset by peer", "the reply took too long", "no answer in time"

SURVIVED: dict[str, tuple[Rule, str | None]] = {
    "503 once": ({**SLOW_DOWN, "skip": 4, "count": 1}, "503 SlowDown"),
    "503 first": ({**SLOW_DOWN, "count": 2}, "503 SlowDown"),
    "503 burst": ({**SLOW_DOWN, "skip": 4, "count": 30}, "503 SlowDown"),
    "503 in 20 %": ({**SLOW_DOWN, "chance": 0.2}, "503 SlowDown"),
    "500 once": ({**INTERNAL, "skip": 4, "count": 1}, "500 InternalError"),
    "500 burst": ({**INTERNAL, "skip": 4, "count": 30}, "500 InternalError"),
    "500 in 20 %": ({**INTERNAL, "chance": 0.2}, "500 InternalError"),
    "429 once": ({"fault": "status", "code": 429, "s3code": "TooManyRequests", "count": 1}, "429 TooManyRequests"),
    "reset before reply once": ({"fault": "reset", "skip": 4, "count": 1}, RESET),
    "reset before reply in 20 %": ({"fault": "reset", "chance": 0.2}, RESET),
    "closed before reply once": ({"fault": "close", "skip": 4, "count": 1}, CLOSED),
    "reset in mid-body once": ({"fault": "reset_mid", "at": 1000, "path": SHARD, "count": 1}, RESET),
    "FIN in mid-body once": ({"fault": "fin_mid", "at": 1000, "path": SHARD, "count": 1}, CLOSED),
    "stall in mid-body once": ({"fault": "stall_mid", "at": 1000, "path": SHARD, "count": 1}, SLOW_REPLY),
    "stall in mid-body in 20 %": ({"fault": "stall_mid", "at": 1000, "path": SHARD, "chance": 0.2}, SLOW_REPLY),
    "blackhole once": ({"fault": "blackhole", "skip": 4, "count": 1}, NO_ANSWER),
    "blackhole in 5 %": ({"fault": "blackhole", "chance": 0.05}, NO_ANSWER),
    "truncated once": ({"fault": "short_length", "at": 1000, "path": SHARD, "count": 1}, "short reply"),
    "flipped byte once": ({"fault": "corrupt", "at": 1000, "path": SHARD, "count": 1}, "damaged bytes"),
    "latency below the time-out": ({"fault": "delay", "seconds": 0.5, "count": 40}, None),
    "latency above the time-out": ({"fault": "delay", "seconds": 2.5, "skip": 4, "count": 8}, NO_ANSWER),
}


@pytest.mark.parametrize("fault", SURVIVED)
def test_what_passes_changes_no_image_and_is_counted_by_cause(
    packed: Packed, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    rule, cause = SURVIVED[fault]
    told_by_time = cause in (SLOW_REPLY, NO_ANSWER)
    if not told_by_time:
        set_deadlines(monkeypatch, deadline_s=PATIENT_DEADLINE_S, request_s=PATIENT_REQUEST_S)
    proxy.strike(rule)
    before = retries_so_far()
    check(packed, list(epoch(packed.address)))
    struck = sum(request["fault"] is not None for request in proxy.log)
    counted = retries_so_far() - before
    assert struck > 0
    if told_by_time:  # a busy machine may be late once more
        assert counted[cause] >= struck
        assert counted.keys() <= {SLOW_REPLY, NO_ANSWER}
    else:
        assert counted == (Counter({cause: struck}) if cause else Counter())


ENDS: dict[str, tuple[Rule, str]] = {
    "503": (SLOW_DOWN, "the store answered HTTP 503 SlowDown"),
    "500": (INTERNAL, "the store answered HTTP 500 InternalError"),
    "reset before reply": ({"fault": "reset"}, "Connection reset by peer"),
    "closed before reply": ({"fault": "close"}, CLOSED),
    "reset in mid-body": ({"fault": "reset_mid", "at": 0}, "Connection reset by peer"),
    "FIN in mid-body": ({"fault": "fin_mid", "at": 0}, CLOSED),
    "stall in mid-body": ({"fault": "stall_mid", "at": 0}, SLOW_REPLY),
    "trickle": ({"fault": "throttle", "bytes_per_s": 500}, SLOW_REPLY),
    "blackhole": ({"fault": "blackhole"}, NO_ANSWER),
    "truncated": ({"fault": "short_length", "at": 1000}, r"1000 bytes came, \d+ were due"),
}


@pytest.mark.parametrize("fault", ENDS)
def test_what_never_ends_is_one_line_within_one_deadline(
    raw: Packed, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """One, though several threads read, and though the reader asks again for what it could not read."""
    rule, said = ENDS[fault]
    if said not in (SLOW_REPLY, NO_ANSWER):
        set_deadlines(monkeypatch, deadline_s=SHORT_DEADLINE_S, request_s=UNHURRIED_REQUEST_S)
    proxy.strike({**rule, "skip": ALREADY_READ})
    error, seconds = end_of(raw)
    assert isinstance(error, BucketError)
    assert re.fullmatch(rf"{raw.address}/\d+\S*: gave up after \d+ s and \d+ attempts?: {said}", str(error))
    assert seconds < SHORT_DEADLINE_S + SHORT_REQUEST_S + SLACK_S


def test_a_store_that_goes_down_for_good_is_one_line_within_one_deadline(
    raw: Packed, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_deadlines(monkeypatch, deadline_s=SHORT_DEADLINE_S, request_s=UNHURRIED_REQUEST_S)
    error, seconds = end_of(raw, after_first_batch=lambda: proxy.refuse(seconds=60))
    assert isinstance(error, BucketError)
    assert re.fullmatch(rf"{raw.address}/\d+\S*: gave up after .*: Connection refused", str(error))
    assert seconds < SHORT_DEADLINE_S + SHORT_REQUEST_S + SLACK_S


REFUSED: dict[str, tuple[Rule, str]] = {
    "403 once": ({"code": 403, "s3code": "AccessDenied", "count": 1}, r": access denied \(AccessDenied\)"),
    "403": ({"code": 403, "s3code": "AccessDenied"}, r": access denied \(AccessDenied\)"),
    "404": ({"code": 404, "s3code": "NoSuchKey"}, r" is gone; .*"),
    "flipped byte": ({"fault": "corrupt", "at": 1000}, " row group .*checksum .*"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_no_repetition_mends_is_one_line_at_once(packed: Packed, proxy: FaultProxy, fault: str) -> None:
    rule, said = REFUSED[fault]
    proxy.strike({"fault": "status", "path": SHARD, "skip": ALREADY_READ, **rule})
    error, seconds = end_of(packed)
    assert re.fullmatch(rf"{packed.address}/\d+\.\w+{said}", str(error))
    assert seconds < SLACK_S


def test_an_object_that_is_deleted_meanwhile_is_named(raw: Packed, proxy: FaultProxy, s3_env: S3Server) -> None:
    check(raw, list(epoch(raw.address)))
    bucket, _, key = proxy.log[-1]["target"].lstrip("/").partition("/")  # the shard that is needed last
    store = client(s3_env)
    shard = store.get_object(Bucket=bucket, Key=key)["Body"].read()
    try:
        error, seconds = end_of(raw, after_first_batch=lambda: store.delete_object(Bucket=bucket, Key=key))
    finally:
        store.put_object(Bucket=bucket, Key=key, Body=shard)
    assert isinstance(error, DataError)
    assert re.fullmatch(rf"s3://{bucket}/{key} is gone; .*", str(error))
    assert seconds < SLACK_S


def end_of(packed: Packed, **how: Any) -> tuple[VaejobError, float]:
    """The one line that ends an epoch, and after how many seconds; the batches before it are right."""
    whole: list[Batch] = []
    started = time.monotonic()
    with pytest.raises(VaejobError) as ended:
        whole.extend(epoch(packed.address, **how))
    seconds = time.monotonic() - started
    check(packed._replace(planned=packed.planned[: len(whole)]), whole)
    assert "\n" not in str(ended.value)
    return ended.value, seconds


def test_a_restart_of_15_seconds_is_waited_for_by_default(
    raw: Packed, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_deadlines(monkeypatch, deadline_s=DEADLINE_S, request_s=REQUEST_S)
    before, started = retries_so_far(), time.monotonic()
    check(raw, list(epoch(raw.address, after_first_batch=lambda: proxy.refuse(seconds=15))))
    assert time.monotonic() - started < 15 + 5 + SLACK_S  # 5: the longest pause
    assert (retries_so_far() - before)["connection refused"] > 0


@pytest.fixture(scope="module")
def large(s3_env: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Row groups of 1 MiB, as by default."""
    folder = tmp_path_factory.mktemp("large")
    return packed_noise(s3_env, folder, encoding="raw", images=2**11, shape=(1, 64, 64), row_group_bytes=MIB)


LINES: dict[str, tuple[Rule, float, str]] = {
    "1 MB/s": ({"fault": "throttle", "bytes_per_s": 1e6}, 3, SLOW_REPLY),  # eight at once need 8 s
    "reset after 300 kB": ({"fault": "reset_mid", "at": 300_000}, 5, RESET),
    "FIN after 300 kB": ({"fault": "fin_mid", "at": 300_000}, 5, CLOSED),
    "stall after 300 kB": ({"fault": "stall_mid", "at": 300_000}, 0.5, SLOW_REPLY),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_carries_no_row_group_in_one_request_delivers_them(
    large: Packed, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    rule, request_s, cause = LINES[line]
    set_deadlines(monkeypatch, deadline_s=30, request_s=request_s)
    proxy.strike({**rule, "path": SHARD})
    before = retries_so_far()
    check(large, list(epoch(large.address, images=len(large.pixels))))
    assert (retries_so_far() - before)[cause] > 0


def test_a_piece_that_takes_longer_than_a_request_may_is_delivered(proxy: FaultProxy, raw: Packed) -> None:
    bucket, data = RemoteBucket(raw.address, deadline_s=60, request_s=1), secrets.token_bytes(MIB) * 33
    bucket.write("large", data)
    proxy.strike({"fault": "throttle", "bytes_per_s": 6e6})
    assert bucket.read("large") == data


def test_a_piece_goes_on_with_the_same_object_or_begins_anew(proxy: FaultProxy, raw: Packed) -> None:
    """Replaced while its reply is broken off: no mixture, even where both are as long."""
    bucket, blobs = RemoteBucket(raw.address, deadline_s=60, request_s=1), (b"old" * MIB, b"new" * MIB)
    bucket.write("replaced", blobs[0])
    proxy.strike({"fault": "stall_mid", "at": MIB, "method": "GET", "count": 1})
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(bucket.read, "replaced")
        while not proxy.log:
            time.sleep(0.01)
        bucket.write("replaced", blobs[1])
        assert reading.result() == blobs[1]


def test_callers_wait_for_a_dead_store_together(proxy: FaultProxy, raw: Packed) -> None:
    """Each of many threads asks three times in a row; a store that lives again is waited for anew."""
    bucket = RemoteBucket(raw.address)
    bucket.write("a", b"x")
    proxy.strike({"fault": "blackhole"})

    def three_times(_: int) -> list[str]:
        said = []
        for _ in range(3):
            with pytest.raises(BucketError) as error:
                bucket.read("a")
            said.append(str(error.value))
        return said

    started = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        said = [line for lines in pool.map(three_times, range(16)) for line in lines]
    assert time.monotonic() - started < SHORT_DEADLINE_S + 2 * SHORT_REQUEST_S + SLACK_S
    assert all(
        re.fullmatch(rf"{raw.address}/a: gave up after \d+ s and \d+ attempts?: {NO_ANSWER}", line) for line in said
    )
    proxy.strike({**SLOW_DOWN, "count": 3})
    with pytest.raises(BucketError):
        bucket.read("a")  # one attempt, since the store has still not answered
    assert RemoteBucket(raw.address).read("a") == b"x"


class Clock:
    """Time that passes only by sleeping, and by requests that take their whole time."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("request_takes_s", [0, REQUEST_S / 3, REQUEST_S])
def test_by_default_a_dead_store_is_given_up_within_two_minutes(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, request_takes_s: float
) -> None:
    set_deadlines(monkeypatch, deadline_s=DEADLINE_S, request_s=REQUEST_S)
    clock = Clock()
    monkeypatch.setattr("vaejob.storage.retry.time", clock)

    def fail(*_: object, **__: object) -> None:
        clock.sleep(request_takes_s)
        raise TimeoutError("struck")

    for verb in ("get", "head"):
        monkeypatch.setattr(obstore, verb, fail)

    def waited_s(call: Callable[[str], object]) -> float:
        started = clock.now
        with pytest.raises(BucketError, match="gave up"):
            call("key")
        return clock.now - started

    bucket = RemoteBucket("s3://bucket")
    assert (DEADLINE_S, REQUEST_S) == (120, 30)
    assert DEADLINE_S - REQUEST_S <= waited_s(bucket.read) <= DEADLINE_S
    assert waited_s(bucket.size) == request_takes_s, "the store is still out: no second deadline"
    clock.sleep(60)
    assert waited_s(bucket.read) >= DEADLINE_S - REQUEST_S, "an outage of a while ago says nothing about this one"
