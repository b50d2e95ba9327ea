"""Fresh processes that start their work together and answer in one line of JSON each."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[3]
LIMIT_SECONDS = 300
GRACE_SECONDS = 3
READY = "ready"


class PassError(Exception):
    """A pass that did not end well: the last line of what its process wrote."""


def run_together(tasks: Sequence[str], *, environment: Mapping[str, str], log: Path) -> list[Any]:
    """Each task's answer. Raises PassError if one of them fails or takes too long."""
    environment = {**environment, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    with contextlib.ExitStack() as stack, log.open("w+") as written:
        processes = [stack.enter_context(child(task, environment=environment, log=written)) for task in tasks]
        answers = [process.stdout.readline() for process in processes]
        if all(answer and json.loads(answer) == READY for answer in answers):
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            answers = [process.stdout.readline() for process in processes]
        if not all(answers):
            written.seek(0)
            raise PassError(last_line(written.read()))
        return [json.loads(answer) for answer in answers]


@contextlib.contextmanager
def child(task: str, *, environment: Mapping[str, str], log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """A process and whatever it starts; all of them are gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.peers.task", task],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    limit = threading.Timer(LIMIT_SECONDS, process.kill)
    limit.start()
    try:
        yield process
    finally:
        limit.cancel()
        end_group(process)


def end_group(process: subprocess.Popen[str]) -> None:
    """Python's resource tracker, a process of the group, first removes the shared memory that was left behind."""
    deadline = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            process.poll()  # a process that has ended stays in its group until it is asked for
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def last_line(text: str) -> str:
    lines = [each.strip() for each in text.splitlines() if each.strip()]
    errors = [each for each in lines if "Error" in each or "Exception" in each]
    return (errors or lines or ["it said nothing"])[-1][:160].replace("|", "/")
