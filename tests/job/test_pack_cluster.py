"""`vaejob pack --cluster` writes what `vaejob pack` writes, byte for byte, whatever happens on the way."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.job.conftest import ROOT, Vaejob, kill_tree
from vaejob.cluster.pack import _until_interrupted
from vaejob.data.pack import pack
from vaejob.data.verify import verify
from vaejob.storage import open_bucket

pytestmark = [pytest.mark.ray, pytest.mark.s3]

IMAGES, SIDE = 1800, 320  # as many as take longer to pack than a busy machine takes to send a signal
WISHES = ["--size", "32", "--encoding", "keep", "--shard-bytes", "40000", "--row-group-bytes", "10000"]

PACK_ALL = """
import json, sys
from functools import partial
from vaejob.cluster.pack import cluster_packer
from vaejob.config import ClusterConfig
from vaejob.data.pack import pack
from vaejob.data.sources import open_source
from vaejob.errors import VaejobError
from vaejob.storage import open_bucket

bucket, told = sys.argv[1], []
for at_once in (1, 2, 4):
    with cluster_packer(ClusterConfig(), at_once=at_once) as packer:
        for encoding in ("raw", "keep"):
            pack(f"{bucket}/in", f"{bucket}/{encoding}-{at_once}", encoding=encoding, packer=packer, split="a=0.8,b=0.2",
                 shard_bytes=20_000, row_group_bytes=4_000, on_progress=lambda *done: told.append(done))

def error(source, dest):
    with cluster_packer(ClusterConfig()) as packer:
        try:
            pack(source, dest, packer=packer)
        except VaejobError as error:
            return [type(error).__name__, str(error)]

elsewhere = error(f"{bucket}/in", "memory://one-machine")
listed = open_source(f"{bucket}/in")
open_bucket(f"{bucket}/in").delete("0007.png")
print(json.dumps({"told": told, "elsewhere": elsewhere, "gone": error(listed, f"{bucket}/gone")}))
"""


@pytest.fixture(scope="module")
def jpegs() -> bytes:
    """A tar file of pictures that take a while to decode, as sizes go."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(IMAGES):
            pixels = np.kron(rng.integers(0, 256, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8), np.ones((16, 16, 1)))
            _add(archive, f"{number:04d}.jpg", _encoded(pixels.astype(np.uint8), "JPEG"))
    return file.getvalue()


@pytest.fixture
def source(s3_bucket: str, jpegs: bytes) -> str:
    open_bucket(s3_bucket).write("jpegs.tar", jpegs)
    return f"{s3_bucket}/jpegs.tar"


def _encoded(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def hashes(address: str) -> dict[str, str]:
    bucket = open_bucket(address)
    return {key: hashlib.sha256(bucket.read(key)).hexdigest() for key in bucket.keys()}  # noqa: SIM118


def pack_here(source: str, dest: str) -> dict[str, str]:
    """What the local packer makes of the same wishes."""
    pack(source, dest, size=32, encoding="keep", shard_bytes=40_000, row_group_bytes=10_000)
    return hashes(dest)


@contextmanager
def packing(source: str, dest: Path) -> Iterator[subprocess.Popen[str]]:
    """`vaejob pack --cluster` in a Ray of its own, once the first shard is there."""
    command = [sys.executable, "-m", "vaejob", "pack", source, str(dest), "--cluster", *WISHES]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:  # fmt: skip
        family = []
        try:
            while not list(dest.rglob("*.parquet")):
                assert process.poll() is None, process.stderr
                time.sleep(0.01)
            family = psutil.Process(process.pid).children(recursive=True)
            yield process
        finally:
            kill_tree(process.pid)
            _, orphans = psutil.wait_procs(family, timeout=5)  # some of Ray's agents take a minute to miss their parent
            for orphan in orphans:
                with suppress(psutil.NoSuchProcess):
                    orphan.kill()
    assert family


def test_the_cluster_packs_the_same_bytes_however_many_shards_at_once(ray_head: dict[str, str], s3_bucket: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (150, 12, 12, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        open_bucket(f"{s3_bucket}/in").write(f"{number:04d}.png", _encoded(image, "PNG"))
    for encoding in ("raw", "keep"):
        pack(
            f"{s3_bucket}/in", f"{s3_bucket}/{encoding}-here", encoding=encoding, split="a=0.8,b=0.2",
            shard_bytes=20_000, row_group_bytes=4_000,
        )  # fmt: skip
    command = [sys.executable, "-c", PACK_ALL, s3_bucket]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **ray_head}, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    said = json.loads(ended.stdout)

    for encoding in ("raw", "keep"):
        expected = hashes(f"{s3_bucket}/{encoding}-here")
        assert len(expected) > 6
        for at_once in (1, 2, 4):
            assert hashes(f"{s3_bucket}/{encoding}-{at_once}") == expected
    assert verify(open_bucket(f"{s3_bucket}/raw-4/a")).images > 100
    assert [done for done in said["told"] if done[0] == done[1]] == [[150, 150]] * 6
    assert said["elsewhere"][0] == "DataError"
    assert "memory://one-machine/train/00000.parquet was written on another machine" in said["elsewhere"][1]
    assert said["gone"][0] == "ObjectMissing"
    assert f"{s3_bucket}/in/0007.png" in said["gone"][1]
    assert set(hashes(f"{s3_bucket}/gone")) == {"train/packing.json"}


def test_packing_whose_driver_was_killed_is_finished_by_repeating_it(
    source: str, s3_bucket: str, vaejob: Vaejob, tmp_path: Path
) -> None:
    dest = tmp_path / "out"
    with packing(source, dest) as process:
        process.kill()
    kept = {path: path.stat().st_mtime_ns for path in dest.rglob("*.parquet")}
    assert not (dest / "train" / "manifest.json").exists()
    assert 1 <= len(kept) < 30

    again = vaejob("pack", source, dest, "--cluster", *WISHES)
    assert again.returncode == 0, again.stderr
    assert hashes(str(dest)) == pack_here(source, f"{s3_bucket}/here")
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_packing_goes_on_when_a_worker_is_killed(source: str, s3_bucket: str, tmp_path: Path) -> None:
    with packing(source, tmp_path / "out") as process:
        killed = False
        while not killed and process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                if child.name().startswith("ray::Map") or "_pack_one" in " ".join(child.cmdline()):
                    child.kill()
                    killed = True
                    break
        _, told = process.communicate(timeout=120)
    assert killed
    assert process.returncode == 0, told
    assert hashes(str(tmp_path / "out")) == pack_here(source, f"{s3_bucket}/here")


def test_ctrl_c_ends_packing_with_one_line(source: str, tmp_path: Path) -> None:
    with packing(source, tmp_path / "out") as process:
        os.killpg(process.pid, signal.SIGINT)
        out, told = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, ""), told
    lines = [line for line in told.splitlines() if not line.startswith("vaejob: packing: ")]  # progress
    assert lines == ["vaejob: stopped; repeat the command to go on"]
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_is_not_lost_in_a_finaliser() -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)  # what it raises goes no further than this method

    def rows() -> Iterator[dict[str, int]]:
        yield {"number": 0}
        held = [Finalised()]
        held.clear()
        yield {"number": 1}

    outside, found = signal.signal(signal.SIGINT, signal.default_int_handler), []
    try:
        with pytest.raises(KeyboardInterrupt):
            found.extend(row["number"] for row in _until_interrupted(rows()))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)
    assert found == [0]


def test_an_image_that_cannot_be_used_is_one_line(
    s3_bucket: str, jpegs: bytes, ray_head: dict[str, str], vaejob: Vaejob
) -> None:
    file = io.BytesIO(jpegs)
    with tarfile.open(fileobj=file, mode="a") as archive:
        _add(archive, "9999.jpg", b"\xff\xd8\xff but no picture")
    open_bucket(s3_bucket).write("bad.tar", file.getvalue())
    packed = vaejob("pack", f"{s3_bucket}/bad.tar", f"{s3_bucket}/out", "--cluster", "--size", "32", env=ray_head)
    assert (packed.returncode, packed.stdout) == (2, "")
    assert packed.stderr.startswith("vaejob: 9999.jpg")
    assert packed.stderr.count("\n") == 1
    left = set(hashes(f"{s3_bucket}/out"))
    assert "train/packing.json" in left
    assert "train/manifest.json" not in left
