"""The first thing a person runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import opened
from tests.job.conftest import Vaejob, picture_size

OFFLINE = ["unshare", "--net", "--uts", "sh", "-ce", 'ip link set lo up; hostname no-such-host; exec "$@"', "sh"]


def offline_if_allowed() -> list[str]:
    """What takes the network from a command, where this machine lets us: root, iproute2."""
    try:
        return OFFLINE if subprocess.run([*OFFLINE, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


@pytest.mark.ray
def test_quickstart_ends_with_the_run_its_likelihood_and_a_picture(vaejob: Vaejob, tmp_path: Path) -> None:
    command = [*offline_if_allowed(), sys.executable, "-m", "vaejob", "quickstart", "--bucket", str(tmp_path / "home")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr  # Ray says at length where it finds no address but of this machine
    assert "packed 1,444 train, 353 test images of handwritten digits" in done.stdout
    assert done.stdout.count("checkpoint committed") == 4
    assert f"run       {tmp_path}/home/quickstart" in done.stdout
    held_out = re.search(r"held out  ([\d.]+) ± ([\d.]+) bits/dim", done.stdout)
    assert held_out
    assert 1.85 < float(held_out[1]) < 2.05
    assert 0 < float(held_out[2]) < 0.03
    picture = re.search(r"pictures  (\S+)", done.stdout)
    assert picture
    assert min(picture_size(picture[1])) > 200
    assert "Traceback" not in done.stderr
    report = re.search(r"^report    (\S+)\Z", done.stdout.rstrip(), flags=re.MULTILINE)  # the last line
    assert report
    with opened(Path(report[1]), width=1440, scheme="light") as watched:
        assert f"{held_out[1]}" in watched.page.inner_text("body")
        assert not watched.said
        assert not watched.requests

    again = vaejob("quickstart", "--bucket", tmp_path / "home")
    assert again.returncode == 0
    assert "checkpoint committed" not in again.stdout  # nothing was left to do
    assert held_out[0] in again.stdout

    told = json.loads(vaejob("quickstart", "--bucket", tmp_path / "home", "--json", "--quiet").stdout)
    assert told["run"] == f"{tmp_path}/home/quickstart"
    assert f"{told['bits_per_dim']:.5f}" == held_out[1]
