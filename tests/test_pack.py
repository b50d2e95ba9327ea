"""Packed data is what was put in, in bytes that depend on the source and the settings alone."""

import hashlib
import io
import itertools
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vaejob.data.batches import open_data
from vaejob.data.decode import decode_image, encode_png
from vaejob.data.manifest import Manifest, read_manifest, read_row_groups
from vaejob.data.pack import pack
from vaejob.data.shards import plain_images
from vaejob.data.sources import ArraySource
from vaejob.data.verify import verify
from vaejob.errors import DataError
from vaejob.storage import open_bucket

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
SOURCE = ArraySource("noise", IMAGES)
MANY_SHARDS = {"shard_bytes": 3000, "row_group_bytes": 1000}
_addresses = (f"memory://test-pack-{i}" for i in itertools.count())


def tree_of(folder: Path, images: np.ndarray, kind: str = "PNG") -> str:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:04d}.{kind.lower()}", kind)
    return str(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_packing_twice_gives_the_same_bytes(tmp_path):
    source = tree_of(tmp_path / "in", IMAGES)
    for dest in ("a", "b"):
        pack(source, str(tmp_path / dest), split="train=0.75,test=0.25", **MANY_SHARDS)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert len(content(tmp_path / "a")) > 4


# A list of settings in which every pair of values occurs would do; hypothesis finds more.
@settings(max_examples=30, deadline=None)
@given(
    shard_bytes=st.integers(1, 20_000),
    row_group_bytes=st.integers(1, 20_000),
    encoding=st.sampled_from(["raw", "keep", "auto"]),
)
def test_the_fingerprint_depends_on_the_pixels_alone(shard_bytes, row_group_bytes, encoding):
    dest = next(_addresses)
    manifest = pack(
        SOURCE, dest, encoding=encoding, shard_bytes=shard_bytes, row_group_bytes=row_group_bytes
    )["train"]  # fmt: skip
    digests = (
        hashlib.sha256(i.to_bytes(8, "little") + np.array(image.shape, "<u4").tobytes() + image.tobytes()).digest()
        for i, image in enumerate(IMAGES)
    )
    assert manifest.fingerprint == f"{sum(int.from_bytes(d, 'big') for d in digests) % 2**256:064x}"
    assert verify(open_bucket(f"{dest}/train")) == manifest


@pytest.mark.parametrize(("a", "b"), [(0, 1), (0, 59)])
def test_the_fingerprint_sees_two_images_change_places(a, b):
    swapped = IMAGES.copy()
    swapped[[a, b]] = IMAGES[[b, a]]
    fingerprints = {pack(ArraySource("noise", x), next(_addresses))["train"].fingerprint for x in (IMAGES, swapped)}
    assert len(fingerprints) == 2


@pytest.mark.parametrize("encoding", ["raw", "keep"])
def test_row_groups_are_exactly_where_the_manifest_says(encoding):
    dest = next(_addresses)
    manifest = pack(SOURCE, dest, encoding=encoding, **MANY_SHARDS)["train"]
    bucket = open_bucket(f"{dest}/train")
    assert len(manifest.shards) > 3
    assert read_manifest(bucket) == manifest
    table, seen = read_row_groups(bucket, manifest), 0
    for shard in manifest.shards:
        data = bucket.read(shard.key)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.size, shard.sha256)
        assert shard.footer_size == int.from_bytes(data[-8:-4], "little") + 8
        assert shard.footer_crc32 == zlib.crc32(data[-shard.footer_size :])
        own, table = table[: shard.row_groups], table[shard.row_groups :]
        expected = pq.ParquetFile(io.BytesIO(data))  # a second path to the same images
        assert own["rows"].tolist() == [expected.metadata.row_group(i).num_rows for i in range(len(own))]
        for index, (rows, size, offset, crc32) in enumerate(own.tolist()):
            body = data[offset : offset + size]
            assert zlib.crc32(body) == crc32
            images = plain_images("group", body, rows=rows, image_bytes=192 if encoding == "raw" else None)
            columns = expected.read_row_group(index)
            assert columns["id"].to_pylist() == list(range(seen, seen + rows))
            assert [bytes(image) for image in images] == columns["image"].to_pylist()
            for row, image in zip(range(seen, seen + rows), images, strict=True):
                pixels = image.reshape(3, 8, 8) if encoding == "raw" else decode_image(image, "key")
                np.testing.assert_array_equal(pixels, IMAGES[row])
            seen += rows
    assert seen == len(IMAGES)


def test_shards_and_row_groups_keep_to_their_sizes():
    dest = next(_addresses)
    manifest = pack(SOURCE, dest, encoding="raw", shard_bytes=2000, row_group_bytes=600)["train"]
    # 8 * 8 * 3 = 192 bytes: 3 rows are 576, and 3 such row groups are 1728.
    assert set(open_data(f"{dest}/train").row_group_rows) == {3}
    assert [shard.row_groups for shard in manifest.shards] == [3] * 6 + [2]
    assert [shard.key for shard in manifest.shards] == [f"{i:05d}.parquet" for i in range(7)]


def test_images_are_taken_from_their_bytes_without_a_copy():
    body = IMAGES.tobytes()
    images = plain_images("group", body, rows=60, image_bytes=192)
    assert isinstance(images, np.ndarray)
    assert images.shape == (60, 192)
    assert images.ctypes.data == np.frombuffer(body, dtype=np.uint8).ctypes.data


def test_shards_open_in_pyarrow_and_pandas(tmp_path):
    manifest = pack(SOURCE, str(tmp_path), **MANY_SHARDS)["train"]
    paths = [str(tmp_path / "train" / shard.key) for shard in manifest.shards]
    table = pq.read_table(paths)
    frame = pd.concat(map(pd.read_parquet, paths))
    assert table.column_names == list(frame.columns) == ["id", "key", "image"]
    assert table["id"].to_pylist() == list(range(60))
    assert frame["key"].tolist() == [f"{i:08d}" for i in range(60)]
    for column in (table["image"].to_pylist(), frame["image"]):
        assert b"".join(column) == IMAGES.tobytes()
    # Plain bytes at their place in the file, for whoever reads it next.
    column = pq.read_metadata(paths[0]).row_group(0).column(2)
    assert (column.compression, column.has_dictionary_page) == ("UNCOMPRESSED", False)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_kept_files_are_stored_as_they_were(kind, tmp_path):
    source = tree_of(tmp_path / "in", IMAGES[:5], kind)
    manifest = pack(source, str(tmp_path / "out"), encoding="keep")["train"]
    table = pq.read_table(tmp_path / "out" / "train" / "00000.parquet")
    assert manifest.encoding == "encoded"
    assert dict(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True)) == content(tmp_path / "in")


@pytest.mark.parametrize(("kind", "stored"), [("BMP", b"\x89PNG"), ("PNG", b"\x89PNG"), ("JPEG", b"\xff\xd8\xff")])
def test_large_images_are_kept_encoded_and_small_ones_raw(kind, stored, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 65, 64), dtype=np.uint8)
    large = pack(tree_of(tmp_path / "large", pixels, kind), str(tmp_path / "a"))["train"]
    small = pack(tree_of(tmp_path / "small", pixels[:, :, :64], kind), str(tmp_path / "b"))["train"]
    assert (large.encoding, small.encoding) == ("encoded", "raw")
    image = pq.read_table(tmp_path / "a" / "train" / "00000.parquet")["image"][0].as_py()
    assert image.startswith(stored)


def test_resized_images_are_the_same_raw_and_as_png(tmp_path):
    source = tree_of(tmp_path / "in", np.random.default_rng(0).integers(0, 256, (4, 3, 30, 20), dtype=np.uint8), "JPEG")
    raw, kept = (pack(source, next(_addresses), size=10, encoding=encoding)["train"] for encoding in ("raw", "keep"))
    assert raw.shape == kept.shape == (3, 10, 10)
    assert raw.fingerprint == kept.fingerprint
    assert raw.source.endswith("4 images, cropped and resized to 10 x 10")


def test_each_split_is_a_data_set_of_its_own():
    dest = next(_addresses)
    manifests = pack(SOURCE, dest, split="train=0.5,test=0.5")
    found = {}
    for split, manifest in manifests.items():
        bucket = open_bucket(f"{dest}/{split}")
        assert verify(bucket) == manifest
        table = pq.read_table(io.BytesIO(bucket.read("00000.parquet")))
        assert table["id"].to_pylist() == list(range(manifest.images))
        found |= dict(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True))
    assert found == {f"{i:08d}": image.tobytes() for i, image in enumerate(IMAGES)}


def test_a_split_that_would_be_empty_is_refused():
    dest = next(_addresses)
    with pytest.raises(DataError, match="split test would be empty; 2 images are too few for --split train=1,test=0"):
        pack(ArraySource("noise", IMAGES[:2]), dest, split="train=1,test=0")
    assert open_bucket(f"{dest}/train").keys() == []


def test_progress_ends_with_every_image():
    told = []
    pack(SOURCE, next(_addresses), on_progress=lambda done, total: told.append((done, total)), **MANY_SHARDS)
    assert told == sorted(told)
    assert told[-1] == (60, 60)


def test_what_is_packed_already_is_not_packed_again():
    dest, told = next(_addresses), []
    first = pack(SOURCE, dest)
    again = pack(ArraySource("the same noise", IMAGES.copy()), dest, on_progress=lambda *done: told.append(done))
    assert (first, told) == (again, [])


@pytest.mark.parametrize("change", [{"shard_bytes": 999}, {"size": 4}, {"encoding": "keep"}, {"source": IMAGES[:50]}])
def test_other_data_is_not_overwritten(change):
    dest = next(_addresses)
    pack(SOURCE, dest)
    source = ArraySource("other noise", change.pop("source", IMAGES))
    with pytest.raises(DataError, match=r"was packed from other .* \(noise\); delete it, or choose another DEST"):
        pack(source, dest, **change)


def test_a_foreign_parquet_file_is_not_overwritten(tmp_path):
    (tmp_path / "train").mkdir()
    foreign = tmp_path / "train" / "00000.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(foreign)
    before = foreign.read_bytes()
    with pytest.raises(DataError, match=r"00000.parquet was not written by vaejob pack; choose another DEST"):
        pack(SOURCE, str(tmp_path))
    assert foreign.read_bytes() == before


def interrupted(dest: str, **options: object) -> Manifest:
    """Packs, and takes the manifest away: what a run leaves that was stopped at its very end."""
    manifest = pack(SOURCE, dest, **options)["train"]
    open_bucket(f"{dest}/train").delete("manifest.json")
    return manifest


def test_shards_of_other_settings_are_replaced_and_strays_deleted():
    dest, fresh = next(_addresses), next(_addresses)
    interrupted(dest, shard_bytes=700, row_group_bytes=100)
    assert pack(SOURCE, dest, **MANY_SHARDS) == pack(SOURCE, fresh, **MANY_SHARDS)
    kept, expected = open_bucket(f"{dest}/train"), open_bucket(f"{fresh}/train")
    assert {key: kept.read(key) for key in kept.keys()} == {key: expected.read(key) for key in expected.keys()}  # noqa: SIM118


@settings(max_examples=30, deadline=None)
@example(encoding="keep", place=0.90625, bit=0)  # in the mark that tells our shards
@given(encoding=st.sampled_from(["raw", "keep"]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_damaged_shard_is_written_again(encoding, place, bit):
    dest = next(_addresses)
    manifest = interrupted(dest, encoding=encoding, **MANY_SHARDS)
    bucket = open_bucket(f"{dest}/train")
    data = bytearray(bucket.read("00002.parquet"))
    data[int(place * len(data))] ^= 1 << bit
    bucket.write("00002.parquet", bytes(data))
    assert pack(SOURCE, dest, encoding=encoding, **MANY_SHARDS)["train"] == manifest
    assert verify(bucket) == manifest


def test_packing_killed_in_the_middle_is_finished_by_repeating_it(tmp_path):
    source = tree_of(tmp_path / "in", np.random.default_rng(2).integers(0, 256, (80, 3, 16, 16), dtype=np.uint8))
    script = (
        "import sys, time; from vaejob.data.pack import pack\n"
        "pack(sys.argv[1], sys.argv[2], shard_bytes=3000, row_group_bytes=1000, on_progress=lambda *_: time.sleep(0.05))"
    )
    root, killed = Path(__file__).parents[1], tmp_path / "killed" / "train"
    with subprocess.Popen([sys.executable, "-c", script, source, str(tmp_path / "killed")], cwd=root) as process:
        while not (killed / "00003.parquet").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in sorted(killed.glob("*.parquet"))}
    assert 3 <= len(before) < 20

    pack(source, str(tmp_path / "killed"), shard_bytes=3000, row_group_bytes=1000)
    pack(source, str(tmp_path / "whole"), shard_bytes=3000, row_group_bytes=1000)
    packed = {name: data for name, data in content(tmp_path / "killed").items() if ".vaejob-" not in name}
    assert packed == content(tmp_path / "whole")
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.s3
def test_packing_between_buckets_is_packing_between_folders(tmp_path, s3_bucket):
    tree, remote = tree_of(tmp_path / "in", IMAGES), open_bucket(f"{s3_bucket}/in")
    for name, data in content(tmp_path / "in").items():
        remote.write(name, data)
    here = pack(tree, str(tmp_path / "out"), **MANY_SHARDS)["train"]
    there = pack(f"{s3_bucket}/in", f"{s3_bucket}/out", **MANY_SHARDS)["train"]
    assert (there.fingerprint, there.row_groups_sha256, there.shards) == (
        here.fingerprint,
        here.row_groups_sha256,
        here.shards,
    )
    assert verify(open_bucket(f"{s3_bucket}/out/train")) == there


def test_a_changed_source_starts_over(tmp_path):
    source = Path(tree_of(tmp_path / "in", IMAGES))
    options = {"shard_bytes": 3000, "row_group_bytes": 1000}
    pack(str(source), str(tmp_path / "out"), **options)
    (tmp_path / "out" / "train" / "manifest.json").unlink()
    (source / "0000.png").write_bytes(encode_png(IMAGES[0] ^ 1))
    pack(str(source), str(tmp_path / "out"), **options)
    pack(str(source), str(tmp_path / "fresh"), **options)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
