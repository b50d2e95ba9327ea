"""Attends the driver of a submitted job, on the cluster: keeps what it says in its run, and starts it again where it fails.

python -m vaejob.cluster.attend job.yaml ATTEMPT
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from vaejob.config import parse_config
from vaejob.errors import STOPPED_STATUS, OutsideError
from vaejob.storage import join, open_bucket
from vaejob.storage.logs import KeptLog

KEEP_SECONDS = 15.0
"""What is said later than that before an abrupt end of the node is not kept."""
AGAIN_SECONDS = 5.0


def attend(
    command: Sequence[str],
    *,
    retries: int,
    hear: Callable[[bytes], None],
    stopping: threading.Event,
    pause_seconds: float = AGAIN_SECONDS,
) -> int:
    """Runs the driver to its end, and again where it was killed or something outside failed; its exit status.

    hear: all that it says, and what is said of it. stopping: set once all processes of the job were asked to stop.
    """
    for again in range(retries + 1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as driver:
            assert driver.stdout is not None
            for line in driver.stdout:
                hear(line)
        status = driver.returncode
        if not (status < 0 or status == OutsideError.exit_status) or stopping.is_set():
            break
        how = f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"
        if again == retries:
            hear(
                f"vaejob: the driver {how}; started again {retries} times, as deploy.retries says, it ends here\n".encode()
            )
            break
        hear(f"vaejob: the driver {how}; starting it again, {again + 1} of {retries}\n".encode())
        if stopping.wait(pause_seconds):
            return STOPPED_STATUS
    return status if status >= 0 else OutsideError.exit_status


def main(job_file: str, attempt: str) -> int:
    job = parse_config(Path(job_file).read_text(), source=job_file)
    stopping, ended = threading.Event(), threading.Event()
    # Ray sends it to every process of the job, so the driver has it already.
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.set())
    log = KeptLog(open_bucket(join(job.run.bucket, job.run.name)), attempt=attempt)

    def hear(line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        log.add(line)

    def keep() -> None:
        while not ended.wait(KEEP_SECONDS):
            log.keep()

    keeper = threading.Thread(target=keep, name="keep-log")
    keeper.start()
    command = [sys.executable, "-u", "-m", "vaejob", "train", job_file]
    try:
        return attend(command, retries=job.deploy.retries, hear=hear, stopping=stopping)
    finally:
        ended.set()
        keeper.join()
        if not log.keep():
            hear(b"vaejob: the bucket did not take the end of this log\n")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
