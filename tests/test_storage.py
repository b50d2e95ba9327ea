"""Every bucket keeps the same promises, and an object store keeps them while the network and the server do not."""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.s3.faultproxy import FaultProxy
from tests.s3.server import S3Server, client
from vaejob.errors import BucketError, ObjectMissing, UserError
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.directory import DirectoryBucket
from vaejob.storage.remote import RemoteBucket
from vaejob.storage.retry import retries_so_far

MIB = 2**20
SLACK_S = 4  # for a busy machine


@pytest.fixture(params=["directory", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    match request.param:
        case "directory":
            return open_bucket(str(tmp_path / "made" / "by the first write"))
        case "memory":
            return open_bucket(f"memory://{secrets.token_hex(4)}")
        case _:
            return open_bucket(f"{request.getfixturevalue('s3_bucket')}/some/folder")


class TestEveryBucket:
    def test_what_is_written_is_read(self, bucket: Bucket) -> None:
        for data in (b"hello", b"", b"shorter than before"):
            bucket.write("a/b/c", data)
            assert (bucket.read("a/b/c"), bucket.size("a/b/c")) == (data, len(data))

    def test_a_range_is_the_slice_of_the_whole(self, bucket: Bucket) -> None:
        bucket.write("a", b"0123456789")
        for start in (None, 0, 3, 10):
            for stop in (None, 10, *range(start or 0, 10, 3)):
                assert bucket.read("a", start, stop) == b"0123456789"[start:stop]

    def test_a_range_past_the_end_is_an_error(self, bucket: Bucket) -> None:
        bucket.write("a", b"0123456789")
        for start, stop in ((0, 11), (10, 11), (11, 12), (11, None), (11, 11)):
            with pytest.raises(BucketError, match=r"has 10 bytes; 1[12] were expected"):
                bucket.read("a", start, stop)

    def test_a_missing_key_is_told_apart(self, bucket: Bucket) -> None:
        bucket.write("a/b", b"")
        for key in ("nothing", "a", "a/c", "a/b/c"):
            assert bucket.size(key) is None
            bucket.delete(key)
            for start, stop in ((None, None), (0, 0), (2, 5)):
                with pytest.raises(ObjectMissing, match=key):
                    bucket.read(key, start, stop)

    def test_keys_start_with_the_prefix_letter_by_letter(self, bucket: Bucket) -> None:
        keys = ["a/1", "a/2/deep/er", "ab", "ab-c", "b/1", "z"]
        for key in reversed(keys):
            bucket.write(key, b"x")
        assert bucket.keys() == keys
        for prefix in ("a", "a/", "ab", "ab-", "a/2", "a/2/d", "b/", "c", "c/", "a/1/"):
            assert bucket.keys(prefix) == [key for key in keys if key.startswith(prefix)], prefix

    def test_versions_are_those_of_the_keys(self, bucket: Bucket) -> None:
        keys = ["a/1", "a/2/deep/er", "ab", "ab-c", "b/1", "odd/a%20b", "odd/a+b", "odd/grüße", "odd/{x}[y]*~", "z"]
        for key in reversed(keys):
            bucket.write(key, key.encode())
        for prefix in ("", "a", "a/", "ab", "ab-", "a/2", "a/2/d", "b/", "c", "c/", "a/1/", "z", *keys):
            found = bucket.versions(prefix)
            assert list(found) == bucket.keys(prefix), prefix
            assert [int(version.split()[0]) for version in found.values()] == [len(key.encode()) for key in found]

    def test_a_version_changes_with_its_blob_alone(self, bucket: Bucket) -> None:
        bucket.write("a/b", b"before")
        bucket.write("a/c", b"as ever")
        before = bucket.versions()
        assert bucket.versions("a/") == before
        time.sleep(0.05)  # a file system's clock ticks slowly
        bucket.write("a/b", b"behind")
        after = bucket.versions("a/")
        assert (after["a/b"] == before["a/b"], after["a/c"] == before["a/c"]) == (False, True)
        bucket.delete("a/c")
        assert bucket.versions() == {"a/b": after["a/b"]}

    def test_folders_are_one_level_and_hold_keys(self, bucket: Bucket) -> None:
        for key in ("a/1", "a/2/deep/er", "ab/3", "b", "gone/1/2"):
            bucket.write(key, b"x")
        bucket.delete("gone/1/2")
        assert (bucket.folders(), bucket.folders("a/"), bucket.folders("none/")) == (["a", "ab"], ["2"], [])

    def test_an_empty_bucket_lists_nothing(self, bucket: Bucket) -> None:
        assert (bucket.keys(), bucket.keys("a/b"), bucket.folders(), bucket.size("a")) == ([], [], [], None)
        assert (bucket.versions(), bucket.versions("a/b")) == ({}, {})

    def test_a_deleted_key_is_missing(self, bucket: Bucket) -> None:
        bucket.write("a/b", b"x")
        bucket.write("a/c", b"y")
        bucket.delete("a/b")
        bucket.delete("a/b")
        assert (bucket.size("a/b"), bucket.keys()) == (None, ["a/c"])

    def test_create_does_not_replace(self, bucket: Bucket) -> None:
        assert bucket.create("a/b", b"first")
        assert not bucket.create("a/b", b"second")
        assert not bucket.create("a/b", b"first")
        assert bucket.read("a/b") == b"first"

    def test_one_of_many_creators_wins(self, bucket: Bucket) -> None:
        for round_number in range(5):
            key, start = f"lease/{round_number}", threading.Barrier(8)

            def race(writer: int, key: str = key, start: threading.Barrier = start) -> bool:
                start.wait()
                return bucket.create(key, b"writer %d" % writer)

            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(race, range(8)))
            assert won.count(True) == 1
            assert bucket.read(key) == b"writer %d" % won.index(True)

    def test_a_reader_never_sees_a_mixture(self, bucket: Bucket) -> None:
        blobs = [bytes([value]) * (MIB + value) for value in range(4)]
        bucket.write("a", blobs[0])
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(lambda: [bucket.write("a", blob) for _ in range(8) for blob in blobs])
            while not writing.done():
                assert bucket.read("a") in blobs
            writing.result()

    def test_odd_names_are_kept(self, bucket: Bucket) -> None:
        keys = sorted(["a b", "a%20b", "a+b", "a#b?c", "grüße", "a&b=c", "{x}[y]*", ".hidden", "~", "a..b", "a\\b"])
        for key in keys:
            bucket.write(f"odd/{key}", key.encode())
        assert bucket.keys("odd/") == [f"odd/{key}" for key in keys]
        assert [bucket.read(f"odd/{key}").decode() for key in keys] == keys

    @pytest.mark.parametrize("key", ["", "/etc/passwd", "../a", "a/../../b", "a//b", "a/", ".", "a\nb", "a\0b"])
    def test_a_key_cannot_leave_the_bucket(self, bucket: Bucket, key: str) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: bucket.read(key),
            lambda: bucket.write(key, b""),
            lambda: bucket.create(key, b""),
            lambda: bucket.size(key),
            lambda: bucket.delete(key),
        ]
        for call in calls:
            with pytest.raises(BucketError, match="is no key"):
                call()


class TestDirectory:
    def test_a_file_in_place_of_the_folder_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for where in ("file", "file/below"):
            bucket = DirectoryBucket(str(tmp_path / where))
            with pytest.raises(BucketError, match=rf"{where}/key cannot be written: one of the folders above it is a"):
                bucket.write("key", b"")
        with pytest.raises(BucketError, match="file is a file; a bucket must be a folder"):
            DirectoryBucket(str(tmp_path / "file")).keys()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bucket = DirectoryBucket(str(tmp_path))
        bucket.write("a", b"old")
        full = os.open("/dev/full", os.O_WRONLY)
        monkeypatch.setattr("vaejob.storage.directory._open_new", lambda path: full)
        with pytest.raises(BucketError, match=r"^\S+/a cannot be written: No space left on device$"):
            bucket.write("a", b"new")
        assert (bucket.read("a"), bucket.keys(), list(tmp_path.iterdir())) == (b"old", ["a"], [tmp_path / "a"])

    def test_a_killed_writer_leaves_the_old_blob_or_the_new(self, tmp_path: Path) -> None:
        script = (
            "import itertools, sys; from vaejob.storage.directory import DirectoryBucket\n"
            "for n in itertools.count(): DirectoryBucket(sys.argv[1]).write('a/b', bytes([n % 256]) * 4_000_000)"
        )
        bucket = DirectoryBucket(str(tmp_path))
        for pause_s in (0.0, 0.003, 0.011, 0.02, 0.033):
            writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
            while bucket.size("a/b") is None:
                time.sleep(0.001)
            time.sleep(pause_s)
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            data = bucket.read("a/b")
            assert data == data[:1] * 4_000_000
            assert bucket.keys() == ["a/b"]
            bucket.delete("a/b")


@pytest.mark.s3
class TestObjectStore:
    def test_a_second_client_sees_the_same(self, s3_bucket: str, s3_env: S3Server) -> None:
        open_bucket(f"{s3_bucket}/x").write("a b/c", b"hello")
        found = client(s3_env).get_object(Bucket=s3_bucket.removeprefix("s3://"), Key="x/a b/c")["Body"].read()
        assert found == b"hello"

    def test_a_large_blob_goes_in_parts_and_comes_in_pieces(self, s3_bucket: str) -> None:
        bucket, data = open_bucket(s3_bucket), secrets.token_bytes(MIB) * 40 + b"tail"
        bucket.write("big", data)
        assert bucket.size("big") == len(data)
        assert bucket.read("big") == data
        assert bucket.read("big", 5, 20 * MIB + 7) == data[5 : 20 * MIB + 7]
        assert bucket.read("big", 33 * MIB) == data[33 * MIB :]
        with pytest.raises(BucketError, match="were expected"):
            bucket.read("big", 0, len(data) + 1)

    def test_a_large_blob_replaced_while_it_is_read_is_one_of_the_two(self, s3_bucket: str) -> None:
        bucket, blobs = open_bucket(s3_bucket), [bytes([value]) * (18 * MIB) for value in range(2)]
        bucket.write("big", blobs[0])
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(lambda: [bucket.write("big", blob) for _ in range(3) for blob in reversed(blobs)])
            while not writing.done():
                assert bucket.read("big") in blobs
            writing.result()

    def test_a_bucket_that_does_not_exist_fails_at_once(self, s3_env: S3Server) -> None:
        bucket = open_bucket("s3://vaejob-nowhere/folder")
        for call in every_verb(bucket):
            started = time.monotonic()
            with pytest.raises(BucketError, match=r"^s3://vaejob-nowhere does not exist$"):
                call()
            assert time.monotonic() - started < SLACK_S

    def test_a_wrong_secret_fails_at_once(
        self, s3_bucket: str, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if s3_env.kind == "moto":
            pytest.skip("moto checks no signatures")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        for call in every_verb(open_bucket(s3_bucket)):
            started = time.monotonic()
            with pytest.raises(
                BucketError, match=rf"^{s3_bucket} refuses: access denied( \(SignatureDoesNotMatch\))?$"
            ):
                call()
            assert time.monotonic() - started < SLACK_S

    def test_a_server_that_is_down_is_one_line_within_the_deadline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        set_endpoint(monkeypatch, "http://127.0.0.1:9")
        for error, seconds in outcomes(RemoteBucket("s3://bucket", deadline_s=2)):
            assert isinstance(error, BucketError)
            assert re.fullmatch(r"s3://bucket/\w*: gave up after \d s and \d+ attempts: Connection refused", str(error))
            assert seconds < 2 + SLACK_S

    def test_plain_http_stays_on_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        set_endpoint(monkeypatch, "http://192.0.2.1:9000")
        with pytest.raises(UserError, match="must be https, or AWS_ALLOW_HTTP=true"):
            open_bucket("s3://bucket")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        open_bucket("s3://bucket")

    def test_missing_credentials_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        set_endpoint(monkeypatch, "http://127.0.0.1:9", AWS_EC2_METADATA_DISABLED="true")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        with pytest.raises(
            UserError, match=r"^s3://bucket needs credentials and there are none; set AWS_ACCESS_KEY_ID"
        ):
            open_bucket("s3://bucket")

    def test_a_profile_is_enough(self, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        profile = f"[me]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        (tmp_path / "credentials").write_text(profile)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_PROFILE", "me")
        open_bucket(s3_bucket).write("a", b"x")
        assert open_bucket(s3_bucket).keys() == ["a"]

    @pytest.mark.parametrize("address", ["s3://", "s3:///folder", "s3://bucket/../other", "ftp://host/folder"])
    def test_an_address_that_names_no_place_is_refused(self, address: str) -> None:
        with pytest.raises(UserError, match=r"no place|no address"):
            open_bucket(address)


@pytest.fixture
def struck(
    s3_bucket: str, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RemoteBucket, FaultProxy]]:
    """A bucket behind a proxy that strikes its requests, and the proxy."""
    with FaultProxy(upstream=s3_env.port) as proxy:
        set_endpoint(monkeypatch, f"http://127.0.0.1:{proxy.port}")
        yield RemoteBucket(s3_bucket, deadline_s=60, request_s=1.5), proxy  # a busy machine may be late many times


ONCE: list[dict[str, Any]] = [
    {"fault": "status", "code": 503},
    {"fault": "status", "code": 500, "s3code": "InternalError"},
    {"fault": "reset"},
    {"fault": "close"},
    {"fault": "blackhole"},
]
MID_REPLY: list[dict[str, Any]] = [
    {"fault": "reset_mid", "at": MIB},
    {"fault": "fin_mid", "at": MIB},
    {"fault": "stall_mid", "at": MIB},
    {"fault": "short_length", "at": MIB},
]
MID_REQUEST: list[dict[str, Any]] = [
    {"fault": "req_reset", "at": MIB},
    {"fault": "req_stall", "at": MIB},
    {"fault": "req_corrupt", "at": MIB},
    {"fault": "reset_after"},
]


def fault_name(rule: dict[str, Any]) -> str:
    return f"{rule['fault']}{rule.get('code', '')}"


@pytest.mark.s3
class TestUnderFaults:
    @pytest.mark.parametrize("rule", ONCE + MID_REPLY, ids=fault_name)
    @pytest.mark.parametrize("mib", [2, 17])
    def test_a_read_survives(self, struck: tuple[RemoteBucket, FaultProxy], rule: dict[str, Any], mib: int) -> None:
        bucket, proxy = struck
        data = secrets.token_bytes(MIB) * mib
        bucket.write("a", data)
        proxy.strike({**rule, "method": "GET", "count": 1})
        before = retries_so_far()
        assert bucket.read("a") == data
        assert (retries_so_far() - before).total() > 0

    @pytest.mark.parametrize("rule", ONCE + MID_REQUEST, ids=fault_name)
    @pytest.mark.parametrize("mib", [2, 17])
    def test_a_write_survives(
        self, struck: tuple[RemoteBucket, FaultProxy], s3_env: S3Server, rule: dict[str, Any], mib: int
    ) -> None:
        bucket, proxy = struck
        if rule["fault"] == "req_corrupt" and s3_env.kind == "moto":
            pytest.skip("moto stores damaged bytes without a word")
        data = secrets.token_bytes(MIB) * mib
        proxy.strike({**rule, "method": "PUT", "count": 1})
        bucket.write("a", data)
        assert bucket.read("a") == data

    @pytest.mark.parametrize("rule", [*ONCE, {"fault": "ok_error", "s3code": "InternalError"}], ids=fault_name)
    def test_the_end_of_a_large_write_survives(
        self, struck: tuple[RemoteBucket, FaultProxy], rule: dict[str, Any]
    ) -> None:
        bucket, proxy = struck
        data = secrets.token_bytes(MIB) * 17
        proxy.strike({**rule, "method": "POST", "path": "uploadId", "count": 1})
        bucket.write("a", data)
        assert bucket.read("a") == data

    def test_creating_survives_a_lost_reply(self, struck: tuple[RemoteBucket, FaultProxy]) -> None:
        bucket, proxy = struck
        proxy.strike({"fault": "reset_after", "method": "PUT", "count": 1})
        assert bucket.create("lease", b"mine")
        proxy.strike({"fault": "reset_after", "method": "PUT", "count": 1})
        assert not bucket.create("lease", b"another's")
        assert bucket.read("lease") == b"mine"

    def test_creating_tries_again_after_a_conflict_that_created_nothing(
        self, struck: tuple[RemoteBucket, FaultProxy]
    ) -> None:
        bucket, proxy = struck
        proxy.strike({"fault": "status", "code": 409, "s3code": "ConditionalRequestConflict", "count": 1})
        assert bucket.create("lease", b"mine")
        assert bucket.read("lease") == b"mine"

    @pytest.mark.parametrize("rule", ONCE, ids=fault_name)
    def test_listing_and_deleting_survive(self, struck: tuple[RemoteBucket, FaultProxy], rule: dict[str, Any]) -> None:
        bucket, proxy = struck
        bucket.write("a/b", b"x")
        for call, found in ((bucket.keys, ["a/b"]), (bucket.folders, ["a"]), (lambda: bucket.size("a/b"), 1)):
            proxy.strike({**rule, "count": 1})
            assert call() == found
        proxy.strike({**rule, "count": 1})
        bucket.delete("a/b")
        assert bucket.keys() == []

    def test_a_listing_of_versions_is_one_request_per_page(self, struck: tuple[RemoteBucket, FaultProxy]) -> None:
        bucket, proxy = struck
        keys = [f"many/{number:04d}" for number in range(1100)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: bucket.write(key, b"x"), keys))
        for prefix, requests in (("many/", 2), ("many/0500", 1), ("many/1099", 1)):
            proxy.strike()
            assert list(bucket.versions(prefix)) == [key for key in keys if key.startswith(prefix)]
            assert len(proxy.log) == requests
        proxy.strike({"fault": "reset", "skip": 1, "count": 1})
        assert list(bucket.versions()) == keys
        assert len(proxy.log) == 3, "the first page was asked for again"

    @pytest.mark.parametrize(
        ("rule", "reason"),
        [
            ({"fault": "status", "code": 503}, "the store answered HTTP 503"),
            ({"fault": "reset"}, "Connection reset by peer"),
            ({"fault": "blackhole"}, "no answer in time"),
        ],
        ids=["503", "reset", "blackhole"],
    )
    def test_what_never_ends_is_one_line_within_the_deadline(
        self, struck: tuple[RemoteBucket, FaultProxy], rule: dict[str, Any], reason: str
    ) -> None:
        request_s = 1 if rule["fault"] == "blackhole" else 2  # where a busy machine is not to be too late by itself
        bucket, proxy = RemoteBucket(struck[0].url, deadline_s=4, request_s=request_s), struck[1]
        proxy.strike(rule)
        for error, seconds in outcomes(bucket):
            assert isinstance(error, BucketError)
            assert re.fullmatch(rf"{bucket.url}/\w*: gave up after \d+ s and \d+ attempts: {reason}[ \w]*", str(error))
            assert seconds < 4 + SLACK_S


def every_verb(bucket: Bucket) -> list[Callable[[], Any]]:
    return [
        lambda: bucket.read("key"),
        lambda: bucket.write("key", b"data"),
        lambda: bucket.write("key", bytes(17 * MIB)),
        lambda: bucket.create("key", b"data"),
        lambda: bucket.size("key"),
        bucket.keys,
        bucket.versions,
        bucket.folders,
        lambda: bucket.delete("key"),
    ]


def outcomes(bucket: Bucket) -> list[tuple[BaseException | None, float]]:
    """What each verb raises and after how many seconds; all at once, to spend their deadlines side by side."""

    def outcome(call: Callable[[], Any]) -> tuple[BaseException | None, float]:
        started = time.monotonic()
        try:
            call()
        except Exception as error:
            return error, time.monotonic() - started
        return None, time.monotonic() - started

    calls = every_verb(bucket)
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def set_endpoint(patch: pytest.MonkeyPatch, endpoint: str, **more: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"} if "AWS_ACCESS_KEY_ID" not in os.environ else {}
    for name, value in {"AWS_ENDPOINT_URL": endpoint, **keys, **more}.items():
        patch.setenv(name, value)
