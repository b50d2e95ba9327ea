"""What a job said, kept in its run: logs/ATTEMPT/NUMBER.txt, which outlive the cluster that it ran on."""

import re
import threading

from vaejob.errors import VaejobError
from vaejob.storage.bucket import Bucket

PART_BYTES = 1 << 18
"""Of a finished part. Stores do not append, so the one that grows is written anew each time."""
_OURS = re.compile(r"logs/(?P<attempt>[^/]+)/\d{6,}\.txt")


class KeptLog:
    """A text that grows. Any thread may add to it while one keeps it."""

    def __init__(self, run: Bucket, *, attempt: str) -> None:
        self._run, self._attempt = run, attempt
        self._adding = threading.Lock()
        self._rest = b""
        """What is in no finished part."""
        self._number = 0
        """Of the part that grows."""
        self._kept = 0
        """Bytes of it that are in the bucket."""

    def add(self, data: bytes) -> None:
        with self._adding:
            self._rest += data

    def keep(self) -> bool:
        """Brings the bucket up to date; False where it does not take it now: what is missing goes with the next call."""
        try:
            while len(self._rest) > self._kept:
                self._write(part := self._rest[:PART_BYTES])
                if len(part) < PART_BYTES:
                    self._kept = len(part)
                    break
                with self._adding:
                    self._rest = self._rest[PART_BYTES:]
                self._number, self._kept = self._number + 1, 0
        except VaejobError:  # also where the cluster has no credentials, which the job itself will say
            return False
        return True

    def _write(self, part: bytes) -> None:
        self._run.write(f"logs/{self._attempt}/{self._number:06d}.txt", part)


def read_log(run: Bucket) -> str | None:
    """The newest log that the run keeps; None if it keeps none."""
    ours = [match for key in run.keys("logs/") if (match := _OURS.fullmatch(key))]
    if not ours:
        return None
    newest = max(match["attempt"] for match in ours)
    parts = (run.read(match[0]) for match in ours if match["attempt"] == newest)
    return b"".join(parts).decode(errors="replace")
