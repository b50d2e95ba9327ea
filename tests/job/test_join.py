"""A cluster on this machine is there in the end, even where Ray gives it up at first, or is refused in a line."""

import shutil
import subprocess
import sys
from typing import Any

import pytest
import ray

from vaejob.cluster.join import STARTS_OF_A_NODE, cluster_of
from vaejob.config import ClusterConfig
from vaejob.errors import ClusterError

TOO_SLOW = "The current node timed out during startup. This could happen because ..."


@pytest.mark.parametrize(("says", "fails", "comes"), [(TOO_SLOW, 2, True), (TOO_SLOW, 99, False), ("no", 1, False)])
def test_a_node_that_a_busy_machine_starts_too_slowly_is_started_again(
    says: str, fails: int, comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def init(**settings: Any) -> None:
        calls.append(settings)
        if len(calls) <= fails:
            raise RuntimeError(says)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if comes:
        with cluster_of(ClusterConfig()):
            assert len(calls) == fails + 1
    else:
        with (
            pytest.raises(ClusterError, match=f"could be reached at this machine: {says[:10]}"),
            cluster_of(ClusterConfig()),
        ):
            pass
        assert len(calls) == (STARTS_OF_A_NODE if says == TOO_SLOW else 1)


JOIN = """
from vaejob.cluster.join import cluster_of
from vaejob.config import ClusterConfig

with cluster_of(ClusterConfig()):
    pass
"""


def test_shared_memory_that_may_not_be_written_is_named() -> None:
    """Ray would give its node up four times, after thirty seconds each, and blame the time."""
    own_mounts = ["unshare", "--mount", "sh", "-ce", 'mount -t tmpfs -o ro tmpfs /dev/shm; exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*own_mounts, "true"], capture_output=True).returncode:
        pytest.skip("only root may mount another /dev/shm")
    done = subprocess.run([*own_mounts, sys.executable, "-c", JOIN], capture_output=True, text=True, timeout=60)
    assert "ClusterError: no Ray cluster could be reached at this machine: /dev/shm, where Ray keeps" in done.stderr
