"""Batches hold the pixels that were packed, whatever the workers; damage is refused, or healed by reading again."""

import contextlib
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from vaejob.config import DataConfig
from vaejob.data.batches import Batch, DataSet, open_data
from vaejob.data.decode import decode_into
from vaejob.data.groups import RowGroups
from vaejob.data.manifest import read_manifest, read_row_groups, write_row_groups
from vaejob.data.pack import pack
from vaejob.data.reader import RowGroupReader
from vaejob.data.sources import ArraySource
from vaejob.errors import BucketError, DataError, VaejobError
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.retry import retries_so_far

IMAGES = 700


class Packed(NamedTuple):
    """Pixels, and the address of the shards that hold them."""

    pixels: np.ndarray
    address: str


@pytest.fixture(scope="module", params=["raw grey", "encoded RGB"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    encoding, colours = request.param.split()
    channels = 3 if colours == "RGB" else 1
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, channels, 6, 5), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("packed")
    pack(
        ArraySource("noise", pixels),
        str(folder),
        split="train",
        encoding="raw" if encoding == "raw" else "keep",
        shard_bytes=200 * 30,
        row_group_bytes=37 * 30,
    )
    data = open_data(str(folder / "train"))
    assert data.manifest.encoding == encoding
    assert len(data.manifest.shards) > 2
    assert len(data.row_groups) > 10
    return Packed(pixels, data.bucket.url)


@pytest.fixture
def copy(packed: Packed, tmp_path: Path) -> Path:
    """The packed data in a folder of the test's own, to be damaged."""
    return Path(shutil.copytree(packed.address, tmp_path / "copy"))


def config(**settings: int) -> DataConfig:
    return DataConfig.model_validate({"train": "unused", "global_batch": 64, "lanes": 4, "window_rows": 50, **settings})


def epochs(
    data: DataSet, *, rank: int = 0, world_size: int = 1, until: int = IMAGES + 100, **settings: int
) -> Iterator[Batch]:
    return data.training_batches(
        config(**settings), seed=3, images_seen=0, until=until, rank=rank, world_size=world_size
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_hold_the_pixels_that_were_packed(packed: Packed, world_size: int) -> None:
    data, seen = open_data(packed.address), []
    for rank in range(world_size):
        for batch in epochs(data, rank=rank, world_size=world_size):
            assert batch.images.dtype == np.uint8
            assert np.array_equal(batch.images, packed.pixels[batch.ids])
            seen.append((batch.place.epoch, batch.ids))
    first = np.concatenate([ids for epoch, ids in seen if epoch == 0])
    assert sorted(first) == list(range(IMAGES))
    assert sum(len(ids) for _, ids in seen) == IMAGES + 100


@pytest.mark.parametrize("world_size", [2, 3, 100])
def test_world_size_does_not_change_the_images(packed: Packed, world_size: int) -> None:
    """With more workers than images in a batch, some get an empty part of the right shape."""
    data = open_data(packed.address)
    ranks = [epochs(data, rank=rank, world_size=world_size, until=150) for rank in range(world_size)]
    for whole, *parts in zip(epochs(data, until=150), *ranks, strict=True):
        order = np.argsort(np.concatenate([part.ids for part in parts]))
        assert np.array_equal(np.concatenate([part.images for part in parts])[order], whole.images)


@pytest.mark.parametrize("prefetch_batches", [1, 16])
def test_reading_ahead_changes_nothing(packed: Packed, prefetch_batches: int) -> None:
    data = open_data(packed.address)
    for batch, again in zip(epochs(data), epochs(data, prefetch_batches=prefetch_batches), strict=True):
        assert batch.place == again.place
        assert np.array_equal(batch.images, again.images)


def test_row_groups_that_do_not_fit_are_read_again(packed: Packed) -> None:
    data = open_data(packed.address)
    reader = RowGroupReader(RowGroups(data.bucket, data.manifest, data.row_groups), groups_held=1)
    plan = [(seed, np.sort(np.random.default_rng(seed).integers(0, IMAGES, 50))) for seed in range(20)]
    for read, (seed, ids) in zip(reader.batches(plan, prefetch=3), plan, strict=True):
        assert read.tag == seed
        assert np.array_equal(read.ids, ids)
        assert np.array_equal(read.images, packed.pixels[ids])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_sees_each_image_exactly_once(packed: Packed, world_size: int) -> None:
    """In blocks that do not depend on the number of workers; some may get none."""
    data = open_data(packed.address)
    parts = [list(data.evaluation_blocks(rank=rank, world_size=world_size)) for rank in range(world_size)]
    blocks = [block for part in parts for block in part]
    assert [len(ids) for ids, _ in blocks] == [256, 256, 188]
    assert np.array_equal(np.concatenate([ids for ids, _ in blocks]), np.arange(IMAGES))
    assert np.array_equal(np.concatenate([images for _, images in blocks]), packed.pixels)


def test_images_are_found_by_id_in_any_order(packed: Packed) -> None:
    ids = np.array([699, 0, 350, 0, 12])
    assert np.array_equal(open_data(packed.address).images(ids), packed.pixels[ids])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_a_pixel(folder: Path) -> None:
    data = open_data(str(folder))
    flip(folder / "00001.parquet", int(data.row_groups["offset"][data.manifest.shards[0].row_groups]) + 20)


def cut_off_a_shard(folder: Path) -> None:
    shard = folder / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:1000])


def lose_a_shard(folder: Path) -> None:
    (folder / "00001.parquet").unlink()


def swap_two_shards(folder: Path) -> None:
    """Each is whole, but its rows are others than the manifest says."""
    first, second = folder / "00000.parquet", folder / "00001.parquet"
    first.rename(folder / "other")
    second.rename(first)
    (folder / "other").rename(second)


def write_sealed(path: Path, edit: Callable[[dict[str, object]], None]) -> None:
    """Changes a manifest as somebody would who also mends its checksum."""
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    edit(manifest)
    content = json.dumps(manifest, indent=1).removesuffix("\n}")
    seal = hashlib.sha256(content.encode()).hexdigest()
    path.write_text(f'{content},\n "sha256": "{seal}"\n}}')


def edit_manifest(folder: Path, edit: Callable[[dict[str, object]], None]) -> None:
    write_sealed(folder / "manifest.json", edit)


def count_one_image_less(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(images=IMAGES - 1))


def claim_another_shape(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(height=7))


def flip_the_row_groups(folder: Path) -> None:
    flip(folder / "row_groups.npy", 140)


def lose_the_row_groups(folder: Path) -> None:
    (folder / "row_groups.npy").unlink()


def write_other_row_groups(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    bucket = open_bucket(str(folder))
    table = read_row_groups(bucket, read_manifest(bucket)).copy()
    change(table)
    digest = write_row_groups(bucket, table)
    edit_manifest(folder, lambda manifest: manifest.update(row_groups_sha256=digest))


def move_a_row_to_the_next_row_group(folder: Path) -> None:
    def move(table: np.ndarray) -> None:
        table["rows"][0] -= 1
        table["rows"][1] += 1

    write_other_row_groups(folder, move)


def move_a_row_to_the_next_shard(folder: Path) -> None:
    def move(table: np.ndarray) -> None:
        table["rows"][0] -= 1
        table["rows"][-1] += 1

    write_other_row_groups(folder, move)


def point_beyond_the_shard(folder: Path) -> None:
    def move(table: np.ndarray) -> None:
        table["offset"][0] = 2**60

    write_other_row_groups(folder, move)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_a_pixel, "00001.parquet row group 0"),
        (cut_off_a_shard, "00001.parquet"),
        (lose_a_shard, "00001.parquet"),
        (swap_two_shards, "00000.parquet"),
        (count_one_image_less, "manifest.json"),
        (claim_another_shape, ""),
        (flip_the_row_groups, "row_groups.npy"),
        (lose_the_row_groups, "row_groups.npy"),
        (move_a_row_to_the_next_row_group, ""),
        (move_a_row_to_the_next_shard, "row_groups.npy"),
        (point_beyond_the_shard, "00000.parquet"),
    ],
)
def test_damage_is_refused_in_one_line_that_names_it(copy: Path, damage: Callable[[Path], None], named: str) -> None:
    damage(copy)
    with pytest.raises((DataError, BucketError)) as refused:
        for _ in open_data(str(copy)).evaluation_blocks():
            pass
    assert f"{copy}/{named}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_flipped_byte_of_a_shard_gives_other_pixels(copy: Path, packed: Packed) -> None:
    """Every 7th byte of the last shard, flipped one at a time, is refused or does no harm."""
    shard, ids = copy / open_data(str(copy)).manifest.shards[-1].key, np.arange(IMAGES - 30, IMAGES)
    whole = shard.read_bytes()
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        shard.write_bytes(flipped)
        with contextlib.suppress(DataError):
            assert np.array_equal(open_data(str(copy)).images(ids), packed.pixels[ids])


class FlipsFirstReads:
    """A bucket that damages the first few reads on their way: of shards, or of another file."""

    def __init__(self, bucket: Bucket, times: int, ending: str = ".parquet") -> None:
        self.url = bucket.url
        self._bucket = bucket
        self._left = times
        self._ending = ending
        self._lock = threading.Lock()

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        data = bytearray(self._bucket.read(key, start, stop))
        with self._lock:
            if self._left and key.endswith(self._ending):
                self._left -= 1
                data[len(data) // 2] ^= 16
        return bytes(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._bucket, name)


@pytest.mark.parametrize("times", [1, 2])
def test_bytes_damaged_on_the_way_are_read_again(packed: Packed, times: int) -> None:
    data = open_data(packed.address)
    data = replace(data, bucket=FlipsFirstReads(data.bucket, times))  # type: ignore[arg-type]
    assert np.array_equal(data.images(np.arange(10)), packed.pixels[:10])


@pytest.mark.parametrize("ending", ["manifest.json", "row_groups.npy"])
def test_a_manifest_damaged_on_the_way_is_read_again(packed: Packed, ending: str) -> None:
    bucket, before = open_bucket(packed.address), retries_so_far()
    flipping: Bucket = FlipsFirstReads(bucket, 2, ending)  # type: ignore[assignment]
    assert np.array_equal(read_row_groups(flipping, read_manifest(flipping)), open_data(packed.address).row_groups)
    assert retries_so_far() - before == {"damaged bytes": 2}


def test_bytes_that_stay_damaged_are_refused(packed: Packed) -> None:
    data = open_data(packed.address)
    data = replace(data, bucket=FlipsFirstReads(data.bucket, 10**6))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"00000\.parquet row group 0: checksum"):
        data.images(np.arange(10))


def threads_of_readers() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("fetch", "decode", "read-ahead"))
    ]


def no_thread_is_left() -> bool:
    deadline = time.monotonic() + 5
    while threads_of_readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not threads_of_readers()


def test_no_thread_is_left_once_the_batches_are_closed(packed: Packed) -> None:
    batches = epochs(open_data(packed.address))
    next(batches)
    assert threads_of_readers()
    batches.close()  # type: ignore[attr-defined]
    assert no_thread_is_left()


def test_no_thread_is_left_after_the_last_batch_or_an_error(copy: Path) -> None:
    data = open_data(str(copy))
    for _ in epochs(data):
        pass
    assert no_thread_is_left()
    lose_a_shard(copy)
    with pytest.raises(VaejobError):
        for _ in epochs(data):
            pass
    assert no_thread_is_left()


@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (3, 2), (1000, 1)])
def test_cores_are_shared_by_the_processes_that_decode_on_them(
    processes: int, threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3, 72, 72), dtype=np.uint8)
    pack(ArraySource("noise", pixels), str(tmp_path), split="train", encoding="keep")
    data = replace(open_data(str(tmp_path / "train")), processes_here=processes)
    decoding = set[str]()

    def note(*arguments: Any) -> None:
        decoding.add(threading.current_thread().name)
        time.sleep(0.01)  # so that no thread is done with all before the others have begun
        decode_into(*arguments)

    monkeypatch.setattr("vaejob.data.reader._cores", lambda: 8)
    monkeypatch.setattr("vaejob.data.reader.decode_into", note)
    batches = data.training_batches(config(global_batch=200), seed=0, images_seen=0, until=200)
    assert [len(batch.images) for batch in batches] == [200]
    assert len(decoding) == threads
