"""A machine that runs out of memory, for one process of it."""

import os
import time
from pathlib import Path

import psutil


def kill_for_memory(process: psutil.Process) -> bool:
    """The kernel kills it, as its control group may have no memory; where groups cannot be made, SIGKILL does. Which it was."""
    groups = Path("/sys/fs/cgroup/memory")
    limit = groups / "memory.limit_in_bytes" if groups.exists() else Path("/sys/fs/cgroup/memory.max")
    group = limit.parent / f"vaejob-test-{os.getpid()}-{process.pid}"
    try:
        group.mkdir()
        (group / limit.name).write_text("1000000")
        (group / "cgroup.procs").write_text(str(process.pid))
    except OSError:
        process.kill()
        return False
    process.wait(timeout=60)
    for _ in range(50):
        try:
            group.rmdir()
            break
        except OSError:  # its last pages are on their way back
            time.sleep(0.1)
    return True
