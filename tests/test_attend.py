"""A submitted job's driver is attended: what it says outlives the cluster, and it is started again where it fails."""

import sys
import threading
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaejob.cluster.attend import attend
from vaejob.errors import BucketError, UserError, VaejobError
from vaejob.storage import logs
from vaejob.storage.fence import TakenOver
from vaejob.storage.logs import KeptLog, read_log
from vaejob.storage.memory import MemoryBucket

DIES_TWICE = """
import os, signal, sys, time
from pathlib import Path
starts = Path(sys.argv[1])
count = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(count + 1))
print("start", count + 1, flush=True)
if count == 0:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(3 if count == 1 else int(sys.argv[2]))
"""


def attended(
    starts: Path, *, last: int, retries: int, stopping: threading.Event | None = None
) -> tuple[int, list[str]]:
    """Of a driver that is killed, then ends with 3, then with `last`; its status, and what was heard."""
    said: list[bytes] = []
    status = attend(
        [sys.executable, "-c", DIES_TWICE, str(starts), str(last)],
        retries=retries,
        hear=said.append,
        stopping=stopping or threading.Event(),
        pause_seconds=0.01,
    )
    return status, b"".join(said).decode().splitlines()


@pytest.mark.parametrize("last", [0, 1, 2, TakenOver.exit_status, 85])
def test_a_driver_that_dies_is_started_again_and_its_own_end_is_the_jobs(tmp_path: Path, last: int) -> None:
    status, said = attended(tmp_path / "starts", last=last, retries=3)
    assert status == last
    assert said == [
        "start 1",
        "vaejob: the driver was killed (SIGKILL); starting it again, 1 of 3",
        "start 2",
        "vaejob: the driver ended with status 3; starting it again, 2 of 3",
        "start 3",
    ]


@pytest.mark.parametrize(("retries", "how"), [(0, "was killed (SIGKILL)"), (1, "ended with status 3")])
def test_it_is_not_started_for_ever(tmp_path: Path, retries: int, how: str) -> None:
    status, said = attended(tmp_path / "starts", last=0, retries=retries)
    assert status == 3
    assert said[-1] == f"vaejob: the driver {how}; started again {retries} times, as deploy.retries says, it ends here"
    assert sum(line.startswith("start ") for line in said) == retries + 1


def test_a_job_that_was_asked_to_stop_is_not_started_again(tmp_path: Path) -> None:
    stopping = threading.Event()
    stopping.set()
    status, said = attended(tmp_path / "starts", last=0, retries=3, stopping=stopping)
    assert (status, said) == (3, ["start 1"])


class Refusing(MemoryBucket):
    """A bucket that takes nothing now and then."""

    open = True
    why: VaejobError = BucketError("closed")

    def write(self, key: str, data: bytes) -> None:
        if not self.open:
            raise self.why
        super().write(key, data)


@given(
    why=st.sampled_from([BucketError("closed"), UserError("no credentials")]),
    steps=st.lists(st.one_of(st.binary(max_size=25), st.sampled_from(["keep", "open", "close"]))),
)
def test_all_that_was_said_is_kept_whenever_the_bucket_takes_it(why: VaejobError, steps: list[bytes | str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "PART_BYTES", 10)
        bucket = Refusing(f"memory://{uuid.uuid4()}")
        bucket.why = why
        log, said, kept = KeptLog(bucket, attempt="20261129T220000-b"), b"", b""
        KeptLog(bucket, attempt="20261129T210000-a").add(b"of an earlier start")
        for step in steps:
            match step:
                case bytes():
                    log.add(step)
                    said += step
                case "keep":
                    assert log.keep() is (bucket.open or said == kept)
                    kept = said if bucket.open else kept
                case _:
                    bucket.open = step == "open"
        bucket.open = True
        assert log.keep()
        if said:
            assert read_log(bucket) == said.decode(errors="replace")
            assert [bucket.size(key) for key in bucket.keys("logs/")][:-1] == [10] * ((len(said) - 1) // 10)


def test_the_newest_log_is_read_and_files_of_others_are_not() -> None:
    bucket = MemoryBucket(f"memory://{uuid.uuid4()}")
    assert read_log(bucket) is None
    for attempt in ("20261129T220000-b", "20261129T210000-a"):
        log = KeptLog(bucket, attempt=attempt)
        log.add(f"{attempt}\n".encode())
        assert log.keep()
    bucket.write("logs/readme", b"of others")
    assert read_log(bucket) == "20261129T220000-b\n"
