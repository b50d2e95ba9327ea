"""A real Slurm of two nodes on this machine: its daemons, each node with a network, processes and a name of its own.

Needs root, iproute2, and Debian's packages of PACKAGES, unpacked into the folder of VAEJOB_TEST_SLURM: installed, they would
start a Slurm of the machine's own.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.job.network import Wires, wait_until_says, wires_can_be_laid
from tests.s3.faultproxy import FaultProxy

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libhwloc15", "libmunge2")
ROOT = Path(os.environ.get("VAEJOB_TEST_SLURM", "/opt/vaejob-test-slurm"))
LIBRARIES = ROOT / "usr/lib/x86_64-linux-gnu"
FOUND = {"LD_LIBRARY_PATH": f"{LIBRARIES}/slurm-wlm:{LIBRARIES}"}
"""What its programs find their own libraries by."""
CONF = """
ClusterName=test
SlurmctldHost=control({control})
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
KillWait=30
ReturnToService=2
FirstJobId={job}
NodeName=n1 NodeAddr={n1} CPUs=4 RealMemory=8000
NodeName=n2 NodeAddr={n2} CPUs=4 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """What keeps it from running here."""
    if os.geteuid() != 0:
        return "needs root"
    if not wires_can_be_laid():
        return "needs iproute2, and the right to make networks"
    try:
        subprocess.run(
            [ROOT / "usr/sbin/slurmctld-wlm", "-V"], env={**os.environ, **FOUND}, check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs {', '.join(PACKAGES)}, and what they depend on, unpacked below {ROOT}: {error}"
    return None


class Slurm:
    """Two nodes, n1 and n2; files of this machine are files of theirs."""

    def __init__(self, folder: Path, *, store_port: int) -> None:
        self._folder = folder
        self._wires = Wires()
        self._store = FaultProxy(upstream=store_port, host=self._wires.host).__enter__()
        self.endpoint = f"http://{self._wires.host}:{self._store.port}"
        self.next_job = 10_000 + os.getpid() % 50_000
        (folder / "state").mkdir(parents=True)
        self.env = {
            **os.environ,
            **FOUND,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{ROOT}/usr/bin:{os.environ['PATH']}",
            "HOME": str(folder),
        }
        net = self._wires.net
        (folder / "slurm.conf").write_text(
            CONF.format(
                control=self._wires.host, port=6817, plugins=LIBRARIES / "slurm-wlm", folder=folder, job=self.next_job,
                n1=f"{net}.10", n2=f"{net}.11",
            )
        )  # fmt: skip
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        log = folder / "slurmctld.log"
        with log.open("w") as said:
            self._control = subprocess.Popen(
                ["unshare", "--uts", "--fork", "--kill-child", "bash", "-c", f"hostname control; exec {ROOT}/usr/sbin/slurmctld-wlm -D -v"],
                env=self.env, stdout=said, stderr=said,
            )  # fmt: skip
        wait_until_says(log, "Running as primary controller", self._control)
        for name in ("n1", "n2"):
            (folder / name).mkdir()
            (folder / f"{name}-tmp").mkdir()
            scratch = f"/tmp/vaejob-{self.next_job}"  # of the one job, on each node another
            script = f"""
                mkdir -p {scratch}; mount --bind {folder}/{name}-tmp {scratch}
                mount -t tmpfs tmpfs /sys/fs/cgroup; mount -t tmpfs -o size=2g tmpfs /dev/shm
                exec {ROOT}/usr/sbin/slurmd-wlm -D -v -N {name} -d {ROOT}/usr/sbin/slurmstepd-wlm
            """
            self._wires.machine(script, log=folder / f"{name}.log", hostname=name, until=" started on ", env=self.env)

    def call(self, *command: str) -> str:
        """A command of Slurm's, on this machine."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, cwd=self._folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """Of a job, as scontrol shows it."""
        words = self.call("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(
        self, job: str, what: Callable[[dict[str, str]], bool], *, seconds: float, said: Callable[[], str]
    ) -> None:
        deadline = time.monotonic() + seconds
        while not what(state := self.state(job)):
            assert time.monotonic() < deadline, f"{state}\n{said()}"
            time.sleep(0.5)

    def start_again(self, job: str, *, said: Callable[[], str]) -> None:
        """Start a requeued job now, where Slurm would let it wait for two minutes."""
        self.wait(job, lambda state: state["Reason"] == "BeginTime", seconds=120, said=said)  # every step has ended
        time.sleep(2)  # what begins in the second of the last end is refused: "Job credential revoked"
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def shutdown(self) -> None:
        self._wires.remove()
        self._control.kill()
        self._control.wait()
        self._store.__exit__()
        shutil.rmtree(f"/tmp/vaejob-{self.next_job}", ignore_errors=True)
