"""What a job may ask of the stream: a disk cache, going on without damaged images, memory that is bounded and stated."""

import os
import subprocess
import sys
import threading
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from vaejob.config import DataConfig
from vaejob.data.batches import Batch, DataSet, open_data
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import DataError
from vaejob.storage import Bucket

IMAGES = 400
PIXELS = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 8, 6), dtype=np.uint8)


@pytest.fixture(params=["raw", "keep"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> DataSet:
    source = ArraySource("noise", PIXELS)
    pack(source, str(tmp_path), encoding=request.param, row_group_bytes=144 * 20, shard_bytes=144 * 100)
    return open_data(f"{tmp_path}/train")


def epoch(data: DataSet, **settings: object) -> list[Batch]:
    config = DataConfig.model_validate(
        {"train": "unused", "global_batch": 64, "lanes": 4, "window_rows": 50, **settings}
    )
    return list(data.training_batches(config, seed=1, images_seen=0, until=IMAGES))


def pixels(batches: list[Batch]) -> dict[int, bytes]:
    assert sum(len(batch.ids) for batch in batches) == len({int(i) for batch in batches for i in batch.ids})
    return {int(i): image.tobytes() for b in batches for i, image in zip(b.ids, b.images, strict=True)}


EXPECTED = {i: image.tobytes() for i, image in enumerate(PIXELS)}


class Counting:
    """A bucket that counts the reads of shards, and can fail the test over any."""

    def __init__(self, bucket: Bucket) -> None:
        self.url = bucket.url
        self.reads = Counter[str]()
        self._bucket = bucket
        self._lock = threading.Lock()

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        with self._lock:
            self.reads[key] += 1
        return self._bucket.read(key, start, stop)

    def __getattr__(self, name: str) -> object:
        return getattr(self._bucket, name)


def counting(data: DataSet) -> tuple[DataSet, Counting]:
    bucket = Counting(data.bucket)
    return replace(data, bucket=bucket), bucket  # type: ignore[arg-type]


def test_an_epoch_reads_each_row_group_once_and_nothing_else(data: DataSet) -> None:
    data, bucket = counting(data)
    assert pixels(epoch(data)) == EXPECTED
    assert bucket.reads.total() == len(data.row_groups)


def test_the_second_epoch_reads_nothing_from_the_store(data: DataSet, tmp_path: Path) -> None:
    data, bucket = counting(data)
    for _ in range(2):
        assert pixels(epoch(data, cache_dir=str(tmp_path / "cache"))) == EXPECTED
    assert bucket.reads.total() == len(data.row_groups)


def test_what_the_cache_has_damaged_is_fetched_again(data: DataSet, tmp_path: Path) -> None:
    data, bucket = counting(data)
    assert pixels(epoch(data, cache_dir=str(tmp_path / "cache"))) == EXPECTED
    entries = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 100]
    assert len(entries) == len(data.row_groups)
    for damaged in entries[:3]:
        content = bytearray(damaged.read_bytes())
        content[50] ^= 1
        damaged.write_bytes(content)
    assert pixels(epoch(data, cache_dir=str(tmp_path / "cache"))) == EXPECTED
    assert bucket.reads.total() == len(data.row_groups) + 3


def test_a_cache_of_other_data_is_not_taken_for_this(tmp_path: Path) -> None:
    """Both data sets have row groups of the same numbers."""
    for name, images in (("a", PIXELS), ("b", PIXELS ^ 1)):
        pack(ArraySource(name, images), str(tmp_path / name), row_group_bytes=144 * 20)
        batches = epoch(open_data(f"{tmp_path}/{name}/train"), cache_dir=str(tmp_path / "cache"))
        assert pixels(batches) == {i: image.tobytes() for i, image in enumerate(images)}


def test_a_cache_that_cannot_be_kept_is_told_and_harmless(data: DataSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    batches = epoch(data, cache_dir=str(tmp_path / "file"))
    assert pixels(batches) == EXPECTED
    (note,) = {note for batch in batches for note in batch.notes}
    assert str(tmp_path / "file") in note


def damage_a_row_group(data: DataSet, group: int) -> range:
    """Flips a byte of it; the ids of its images."""
    shard, own = 0, group
    while own >= data.manifest.shards[shard].row_groups:
        own, shard = own - data.manifest.shards[shard].row_groups, shard + 1
    path = Path(data.bucket.url) / data.manifest.shards[shard].key
    content = bytearray(path.read_bytes())
    content[int(data.row_groups["offset"][group]) + 9] ^= 1
    path.write_bytes(content)
    first = int(data.row_group_rows[:group].sum())
    return range(first, first + int(data.row_group_rows[group]))


def test_damaged_images_end_the_job_by_default(data: DataSet) -> None:
    damage_a_row_group(data, 7)
    with pytest.raises(DataError, match=r"parquet row group \d+: checksum is"):
        epoch(data)


def test_damaged_images_are_left_out_counted_and_named_where_that_is_asked_for(data: DataSet) -> None:
    lost = {*damage_a_row_group(data, 3), *damage_a_row_group(data, 9)}
    batches = epoch(data, on_corrupt="skip")
    assert pixels(batches) == {i: image for i, image in EXPECTED.items() if i not in lost}
    assert sum(batch.missing for batch in batches) == len(lost)
    assert [batch.place.images for batch in batches] == [len(batch.ids) + batch.missing for batch in batches]
    named = {line for batch in batches for line in batch.notes}
    assert len(named) == 2
    assert all("row group" in line and "checksum" in line and "\n" not in line for line in named)


def test_an_image_that_does_not_decode_is_left_out_alone(tmp_path: Path) -> None:
    """Its bytes are those that were packed: pack never writes such a shard, but a foreign one may hold it."""
    pack(ArraySource("noise", PIXELS), str(tmp_path), encoding="keep", row_group_bytes=144 * 20)
    data = open_data(f"{tmp_path}/train")
    path = Path(data.bucket.url) / "00000.parquet"
    content = bytearray(path.read_bytes())
    rows, size, offset, _ = data.row_groups[4].tolist()
    content[offset + 4 + 20] ^= 1  # the height that the first PNG of the row group claims
    path.write_bytes(content)
    table = data.row_groups.copy()
    table["crc32"][4] = zlib.crc32(content[offset : offset + size])
    data, lost = replace(data, row_groups=table), int(data.row_group_rows[:4].sum())
    assert rows > 1
    batches = epoch(data, on_corrupt="skip")
    assert pixels(batches) == {i: image for i, image in EXPECTED.items() if i != lost}
    (line,) = {line for batch in batches for line in batch.notes}
    assert f"00000.parquet image {lost}" in line
    with pytest.raises(DataError, match=f"00000.parquet image {lost}"):
        epoch(data)


def test_evaluation_never_leaves_an_image_out(data: DataSet) -> None:
    damage_a_row_group(data, 3)
    with pytest.raises(DataError, match="checksum"):
        list(data.evaluation_blocks())


STREAM = """
import sys
from vaejob.config import DataConfig
from vaejob.data.batches import open_data
data = open_data(sys.argv[1])
config = DataConfig(train=sys.argv[1], global_batch=8, lanes=4, window_rows=50)
for batch in data.training_batches(config, seed=0, images_seen=0, until=10**9):
    print(batch.place.stop, flush=True)
"""


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="looks into /dev/shm")
def test_a_killed_reader_leaves_no_process_no_file_and_no_shared_memory(data: DataSet, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    before = set(Path("/dev/shm").iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", STREAM, data.bucket.url], stdout=subprocess.PIPE, text=True, env=environment
    ) as reader:
        assert reader.stdout
        for _ in range(100):
            reader.stdout.readline()
        assert psutil.Process(reader.pid).children(recursive=True) == []
        reader.kill()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert {path for path in set(Path("/dev/shm").iterdir()) - before if str(reader.pid) in path.name} == set()


MEMORY = """
import sys, resource
import numpy as np
from vaejob.config import DataConfig
from vaejob.data.batches import open_data
data = open_data(sys.argv[1])
config = DataConfig(train=sys.argv[1], global_batch=64, lanes=4, window_rows=256)
def rss(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
list(data.images(np.arange(10)))
before, after = rss(), []
images = data.manifest.images
for batch in data.training_batches(config, seed=0, images_seen=0, until=20 * images):
    if batch.place.stop == images:
        after.append(rss() - before)
print(data.reader_bytes(config), data.manifest.images * data.manifest.dims, *after)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_below_its_stated_bound_over_twenty_epochs(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12_000, 3, 64, 64), dtype=np.uint8)
    pack(ArraySource("noise", images), str(tmp_path), row_group_bytes=2**20)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, f"{tmp_path}/train"], capture_output=True, text=True, check=True, timeout=300
    )
    bound, whole, *epochs = map(int, run.stdout.split())
    assert bound < 0.6 * whole  # else the test would show nothing
    assert len(epochs) == 20
    assert max(epochs) < bound + 40e6  # threads, clients and the allocator's slack
    assert max(epochs[10:]) < max(epochs[:10]) + 10e6
