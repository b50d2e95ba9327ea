"""Parquet files that other programs wrote are used in place: every pixel, no byte written into them, no harm done."""

import gc
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vaejob.cli import app
from vaejob.config import DataConfig
from vaejob.data import index as index_module
from vaejob.data.batches import open_data
from vaejob.data.decode import encode_png
from vaejob.data.foreign import parquet_images, parse_footer
from vaejob.data.groups import RowGroups
from vaejob.data.index import index, splits_of
from vaejob.data.manifest import MANIFEST_KEY
from vaejob.data.pack import pack
from vaejob.data.pages import check_pages
from vaejob.data.sources import ArraySource
from vaejob.data.verify import verify
from vaejob.errors import BucketError, DataError
from vaejob.storage import open_bucket

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 7), dtype=np.uint8)
FILES = [encode_png(image) for image in IMAGES]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def as_struct(files: list[bytes | None]) -> pa.Array:
    rows = [None if file is None else {"bytes": file, "path": f"{i}.png"} for i, file in enumerate(files)]
    return pa.array(rows, STRUCT)


def write(path: Path, files: list[bytes | None], **options: object) -> Path:
    """As Hugging Face writes it: a struct of bytes and path, snappy, between other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"caption": [f"number {i}" for i in range(len(files))], "image": as_struct(files)})
    pq.write_table(table.append_column("label", pa.array(range(len(files)))), path, **{"row_group_size": 7, **options})
    return path


def hub(folder: Path) -> Path:
    """The layout of a data set on the Hugging Face hub."""
    for number, start in enumerate((0, 20)):
        write(folder / "data" / f"train-{number:05d}-of-00002-0a1b2c3d4e5f6071.parquet", FILES[start : start + 20])
    write(folder / "data" / "test-00000-of-00001.parquet", FILES[40:])
    return folder


def refusal(dest: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        index(str(dest), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_one_line(error: Exception) -> None:
    assert "\n" not in str(error)


def pixels(address: str) -> np.ndarray:
    data = open_data(address)
    return np.concatenate([images for _, images in data.evaluation_blocks()])


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*.parquet")}


def test_a_hub_data_set_is_used_in_place(tmp_path):
    before = content(hub(tmp_path))
    told = []
    found = index(str(tmp_path), on_progress=lambda done, total: told.append((done, total)))
    assert content(tmp_path) == before
    assert {p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".parquet"} == {
        "manifest.json",
        "row_groups.npy",
    }
    assert list(found) == ["test", "train"]
    assert told == sorted(told)
    assert told[-1] == (60, 60)
    for split, expected in (("train", IMAGES[:40]), ("test", IMAGES[40:])):
        bucket = open_bucket(found[split].address)
        assert bucket.url == str(tmp_path / split)
        assert verify(bucket) == found[split].manifest
        np.testing.assert_array_equal(pixels(bucket.url), expected)


def test_training_batches_hold_the_same_pixels_indexed_and_packed(tmp_path):
    hub(tmp_path / "hub")
    indexed = index(str(tmp_path / "hub"))["train"]
    packed = pack(str(tmp_path / "hub" / "data" / "train-*"), str(tmp_path / "packed"), row_group_bytes=7 * 168)[
        "train"
    ]
    assert indexed.manifest.fingerprint == packed.fingerprint
    config = DataConfig(train="unused", global_batch=16, lanes=2, window_rows=20)
    batches = [
        list(open_data(address).training_batches(config, seed=1, images_seen=0, until=100))
        for address in (indexed.address, str(tmp_path / "packed" / "train"))
    ]
    seen = [np.concatenate([batch.images for batch in one]) for one in batches]
    ids = np.concatenate([batch.ids for batch in batches[0]])
    np.testing.assert_array_equal(seen[0], IMAGES[ids])
    assert sorted(ids[:40].tolist()) == list(range(40))
    assert len(seen[1]) == len(seen[0])


SPLITS = {
    "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001-abcdef01.parquet": {
        "train": 2,
        "test": 1,
    },
    "train.parquet validation.parquet": {"train": 1, "validation": 1},
    "jpeg-train.parquet jpeg-test.parquet": {"jpeg-train": 1, "jpeg-test": 1},
    "clip-512-train-00.parquet clip-512-test-00.parquet": {"clip-512-train": 1, "clip-512-test": 1},
    "cifar10-train-00.parquet cifar10-test-00.parquet": {"cifar10-train": 1, "cifar10-test": 1},
    "train0000.parquet train0001.parquet": {"train": 2},
    "train_1.parquet train_2.parquet": {"train": 2},
    "0000.parquet 0001.parquet": {"photos": 2},
    "part-00000-0a1b2c3d-aaaa-bbbb-cccc-0123456789ab.c000.snappy.parquet": {"photos": 1},
    "train/0000.parquet train/0001.parquet test/0000.parquet": {"train": 2, "test": 1},
    "train/part-0000.parquet test/part-0000.parquet": {"train": 1, "test": 1},
    "default/train/0000.parquet default/test/0000.parquet": {"train": 1, "test": 1},
    "default/train-0000.parquet default/test-0000.parquet": {"train": 1, "test": 1},
    "train/0000.parquet": {"train": 1},
}


@pytest.mark.parametrize("names", SPLITS)
def test_the_split_is_told_by_the_names(names):
    found = splits_of(names.split(), folder="/somewhere/photos")
    assert {name: len(files) for name, files in found.items()} == SPLITS[names]


@pytest.mark.parametrize(
    "names", ["en/train-0.parquet en/test-0.parquet de/train-0.parquet", "a/train/0.parquet b/train/0.parquet",
              "0.parquet train/0.parquet"],
)  # fmt: skip
def test_splits_are_never_mixed_by_guessing(names):
    with pytest.raises(DataError, match="several splits in several folders"):
        splits_of(names.split(), folder="somewhere")


def test_folders_of_splits_hold_their_own_manifests_and_may_be_moved(tmp_path):
    write(tmp_path / "here" / "train" / "0000.parquet", FILES[:30])
    write(tmp_path / "here" / "test" / "0000.parquet", FILES[30:])
    manifests = {name: found.manifest for name, found in index(str(tmp_path / "here")).items()}
    assert {manifest.shards_at for manifest in manifests.values()} == {""}
    (tmp_path / "here").rename(tmp_path / "there")
    for split, manifest in manifests.items():
        assert verify(open_bucket(str(tmp_path / "there" / split))) == manifest


@pytest.mark.parametrize("dest", ["data/test-00000-of-00001.parquet", "data/te*.parquet"])
def test_a_file_and_a_pattern_are_indexed_alone(tmp_path, dest):
    found = index(str(hub(tmp_path) / dest), split="held-out")
    assert list(found) == ["held-out"]
    np.testing.assert_array_equal(pixels(str(tmp_path / "data" / "held-out")), IMAGES[40:])


def test_split_chooses_one_of_several(tmp_path):
    assert list(index(str(hub(tmp_path)), split="test")) == ["test"]
    assert "holds the splits test, train; --split is dev, it must be one of them" in refusal(tmp_path, split="dev")


def test_out_leaves_the_files_folder_alone(tmp_path, monkeypatch):
    hub(tmp_path / "public")
    monkeypatch.chdir(tmp_path)
    found = index("public", out="mine")["train"]
    assert {path.suffix for path in (tmp_path / "public").rglob("*") if path.is_file()} == {".parquet"}
    assert found.address == str(tmp_path / "mine" / "train")
    assert found.manifest.shards_at == str(tmp_path / "public")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pixels(found.address), IMAGES[:40])


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_read(tmp_path):
    hub(tmp_path)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "indexing").write_bytes(b"a file is in the way")
    with mock.patch.object(index_module, "read_file") as read, pytest.raises(BucketError, match="--out ADDRESS puts"):
        index(str(tmp_path), split="test")
    assert not read.called


def test_repeating_does_nothing_and_changed_files_are_refused(tmp_path):
    first = index(str(hub(tmp_path)))
    with mock.patch.object(index_module, "read_file") as read:
        again = index(str(tmp_path))
        inside = index(str(tmp_path), column="image", split="train")
    assert not read.called
    assert {name: one._replace(was_there=False) for name, one in again.items()} == first
    assert inside["train"] == again["train"]
    assert "was indexed by its column image.bytes, --column is label" in refusal(tmp_path, column="label")
    write(tmp_path / "data" / "train-00002-of-00003.parquet", FILES[:3])
    assert "train was indexed when its files were others, such as" in refusal(tmp_path)
    assert "train-00002-of-00003.parquet; delete" in refusal(tmp_path)
    (tmp_path / "train" / MANIFEST_KEY).unlink()
    assert index(str(tmp_path))["train"].manifest.images == 43


def test_indexing_killed_in_the_middle_goes_on(tmp_path):
    for number in range(12):
        write(tmp_path / "killed" / f"train-{number:05d}.parquet", FILES[number * 5 : number * 5 + 5])
    script = (
        "import sys, time; from vaejob.data.index import index\n"
        "index(sys.argv[1], on_progress=lambda *_: time.sleep(0.1))"
    )
    kept = tmp_path / "killed" / "train" / "indexing"
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")], cwd=root) as process:
        while not (kept / "000003.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (kept.parent / MANIFEST_KEY).exists()
    write(tmp_path / "killed" / "train-00001.parquet", [*FILES[5:9], FILES[0]])  # another version: it is read again
    whole = [path.name for path in kept.glob("0*.json")]
    with mock.patch.object(index_module, "read_file", wraps=index_module.read_file) as read:
        found = index(str(tmp_path / "killed"))["train"]
    assert read.call_count == 12 - len(whole) + 1
    assert not kept.exists()
    expected = IMAGES.copy()
    expected[9] = IMAGES[0]
    assert (
        found.manifest.fingerprint
        == pack(ArraySource("noise", expected), "memory://test-index-killed")["train"].fingerprint
    )
    assert verify(open_bucket(found.address)) == found.manifest


def test_an_image_of_another_shape_is_named_with_what_makes_them_equal(tmp_path):
    files = [*FILES[:9], encode_png(IMAGES[9, :, :5])]
    write(tmp_path / "train-0.parquet", files)
    message = refusal(tmp_path)
    assert "train-0.parquet row 9 is 3 x 5 x 7 (channels x height x width), the first image is 3 x 8 x 7" in message
    assert "vaejob pack --size N makes them equal" in message
    write(tmp_path / "train-0.parquet", [*FILES[:3], encode_png(IMAGES[9, :1])])
    assert "train-0.parquet row 3 is 1 x 8 x 7" in refusal(tmp_path)


@pytest.mark.parametrize("nothing", [None, b""])
def test_a_row_without_an_image_is_named(tmp_path, nothing):
    write(tmp_path / "train-0.parquet", [*FILES[:17], nothing, *FILES[18:20]])
    assert f"{tmp_path}/train-0.parquet" in (message := refusal(tmp_path))
    assert "row 17 " in message


def test_null_bytes_in_a_whole_struct_are_named(tmp_path):
    rows = [{"bytes": file, "path": "x"} for file in FILES[:9]] + [{"bytes": None, "path": "elsewhere.png"}]
    pq.write_table(pa.table({"image": pa.array(rows, STRUCT)}), tmp_path / "train-0.parquet")
    assert "row 9 holds no image" in refusal(tmp_path)


def test_raw_pixels_are_refused_unless_they_are_ours(tmp_path):
    raw = pa.array([image.tobytes() for image in IMAGES], pa.binary(168))
    pq.write_table(pa.table({"image": raw}), tmp_path / "train-0.parquet")
    assert "holds 168 bytes for every image; raw pixels have no shape" in refusal(tmp_path)

    packed = pack(ArraySource("noise", IMAGES), str(tmp_path / "ours"), row_group_bytes=1000, shard_bytes=4000)["train"]
    assert index(str(tmp_path / "ours"))["train"].was_there
    found = index(str(tmp_path / "ours"), out=str(tmp_path / "out"))["train"]
    assert (found.manifest.layout, found.manifest.shape) == ("parquet", (3, 8, 7))
    assert found.manifest.fingerprint == packed.fingerprint
    np.testing.assert_array_equal(pixels(found.address), IMAGES)
    (tmp_path / "ours" / "train" / MANIFEST_KEY).unlink()
    assert "raw pixels have no shape" in refusal(tmp_path / "ours")


def test_empty_row_groups_are_passed_over_and_empty_files_refused(tmp_path):
    table = pa.table({"image": as_struct(FILES[:20])})
    with pq.ParquetWriter(tmp_path / "train-0.parquet", table.schema) as writer:
        for start, rows in ((0, 0), (0, 8), (8, 0), (8, 12), (20, 0)):
            writer.write_table(table.slice(start, rows))
    assert pq.read_metadata(tmp_path / "train-0.parquet").num_row_groups == 5
    found = index(str(tmp_path))["train"]
    assert found.manifest.row_groups == 2
    assert verify(open_bucket(found.address)) == found.manifest
    np.testing.assert_array_equal(pixels(found.address), IMAGES[:20])
    pq.write_table(table.slice(0, 0), tmp_path / "test-0.parquet")
    assert "test-0.parquet has no rows" in refusal(tmp_path)


def test_files_that_do_not_fit_together_are_named(tmp_path):
    write(tmp_path / "train-0.parquet", FILES[:5])
    pq.write_table(pa.table({"picture": FILES[:5]}), tmp_path / "train-1.parquet")
    assert "train-1.parquet has no column image.bytes; its columns are: picture" in refusal(tmp_path)
    for other in (pa.array(range(5)), pa.array([[file] for file in FILES[:5]]), pa.array([b"x" * 9] * 5, pa.binary(9))):
        pq.write_table(pa.table({"image": pa.array(FILES[:5])}), tmp_path / "train-0.parquet")
        pq.write_table(pa.table({"image": other}), tmp_path / "train-1.parquet")
        assert "train-1.parquet" in refusal(tmp_path)
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 and not much else")
    assert "train-1.parquet is no complete Parquet file" in refusal(tmp_path)
    (tmp_path / "train-1.parquet").write_bytes(b"")
    assert "train-1.parquet" in refusal(tmp_path)
    assert "holds no Parquet files" in refusal(tmp_path / "nowhere")


@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_file_ends_in_one_line_or_in_a_data_set(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("flipped")
    path = write(folder / "train-0.parquet", FILES[:9])
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = index(str(folder))["train"]
    except DataError as error:
        check_one_line(error)
    else:
        assert verify(open_bucket(found.address)) == found.manifest


def test_damage_since_the_indexing_is_found(tmp_path):
    found = index(str(hub(tmp_path)))["test"]
    path = tmp_path / "data" / "test-00000-of-00001.parquet"
    whole = path.read_bytes()
    place = int(open_data(found.address).row_groups[1]["offset"])
    for at in (place, len(whole) - 20):  # in a row group, in the footer
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"test-00000-of-00001.parquet.*checksum is"):
            pixels(found.address)
        with pytest.raises(DataError, match=r"test-00000-of-00001.parquet"):
            verify(open_bucket(found.address))


@pytest.mark.s3
def test_a_bucket_is_indexed_like_a_folder(tmp_path, s3_bucket):
    remote = open_bucket(f"{s3_bucket}/photos")
    for name, (_, data) in content(hub(tmp_path)).items():
        remote.write(name, data)
    here, there = index(str(tmp_path)), index(f"{s3_bucket}/photos")
    elsewhere = index(f"{s3_bucket}/photos", out=str(tmp_path / "out"))
    for split in ("train", "test"):
        expected = here[split].manifest
        for found in (there[split], elsewhere[split]):
            assert (found.manifest.fingerprint, found.manifest.shards) == (expected.fingerprint, expected.shards)
            assert verify(open_bucket(found.address)) == found.manifest
    np.testing.assert_array_equal(pixels(f"{s3_bucket}/photos/train"), IMAGES[:40])


def test_the_command_line_says_one_line_for_each_split(tmp_path):
    run, dest = CliRunner().invoke, str(hub(tmp_path))
    first, again = run(app, ["index", dest]), run(app, ["index", dest])
    assert first.exit_code == again.exit_code == 0
    lines = first.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["test", "train", "train on it with"]
    assert lines[1].startswith("train: 40 images of 3 x 8 x 7")
    assert lines[2].endswith(f"data.train={tmp_path}/train")
    assert again.stdout.count("already indexed, ") == 2
    told = json.loads(run(app, ["index", dest, "--json"]).stdout)["splits"]
    looked = json.loads(run(app, ["inspect", dest, "--json"]).stdout)["splits"]
    assert told == [split | {"was_there": True} for split in looked]
    assert "vaejob index s3://bucket/photos" in run(app, ["index", "-h"]).stdout
    wrong = run(app, ["index", str(tmp_path / "nowhere")])
    assert (type(wrong.exception), wrong.exception.exit_status) == (DataError, 2)


# What other writers write, against Parquet's own reader of the whole file.

TYPES = {
    "struct": as_struct(FILES + FILES[:20]),
    "binary": pa.array(FILES + FILES[:20], pa.binary()),
    "large_binary": pa.array(FILES + FILES[:20], pa.large_binary()),
    "fixed": pa.array([image.tobytes() for image in IMAGES[[*range(60), *range(20)]]], pa.binary(168)),
}


def written(kind: str, **options: object) -> tuple[bytes, str]:
    file = io.BytesIO()
    table = pa.table({"label": range(80), "image": TYPES[kind], "after": range(80)})
    pq.write_table(table, file, **{"row_group_size": 30, "write_batch_size": 4, **options})
    return file.getvalue(), "image.bytes" if kind == "struct" else "image"


def chunk_of(data: bytes, column: str, group: int) -> tuple[int, bytes]:
    """Where the column's chunk begins, and its bytes."""
    metadata = pq.read_metadata(io.BytesIO(data)).row_group(group)
    [chunk] = [metadata.column(i) for i in range(metadata.num_columns) if metadata.column(i).path_in_schema == column]
    start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    return start, data[start : start + chunk.total_compressed_size]


def read_group(data: bytes, body: bytes, column: str, *, group: int, start: int) -> list[bytes]:
    footer = parse_footer("file", data[-8 - int.from_bytes(data[-8:-4], "little") :], column=column)
    rows = min(30, 80 - 30 * group)
    images = parquet_images("file", body, footer=footer, index=group, rows=rows, offset=start, file_size=len(data))
    return [bytes(image) for image in images]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("use_dictionary", [False, True])
@pytest.mark.parametrize("data_page_version", ["1.0", "2.0"])
@pytest.mark.parametrize("data_page_size", [500, 1 << 20])
def test_every_encoding_reads_as_by_parquets_own_reader(
    kind, compression, use_dictionary, data_page_version, data_page_size
):  # fmt: skip
    data, column = written(
        kind,
        compression=compression,
        use_dictionary=use_dictionary,
        data_page_version=data_page_version,
        data_page_size=data_page_size,
    )
    whole = pq.read_table(io.BytesIO(data))["image"].combine_chunks()
    expected = (whole.field("bytes") if kind == "struct" else whole).to_pylist()
    found = []
    for group in range(3):
        start, body = chunk_of(data, column, group)
        found += read_group(data, body, column, group=group, start=start)
    assert found == expected


@settings(max_examples=300)
@given(
    kind=st.sampled_from(["struct", "binary", "fixed"]),
    options=st.fixed_dictionaries(
        {
            "compression": st.sampled_from(["none", "snappy", "zstd", "gzip"]),
            "use_dictionary": st.booleans(),
            "data_page_version": st.sampled_from(["1.0", "2.0"]),
        }
    ),
    place=st.floats(0, 1, exclude_max=True),
    near=st.booleans(),
    flip=st.integers(1, 255),
)
def test_damaged_pages_are_images_or_one_line_and_take_no_memory(kind, options, place, near, flip):
    data, column = written(kind, data_page_size=500, **options)
    start, body = chunk_of(data, column, 1)
    damaged = bytearray(body)
    damaged[int(place * (60 if near else len(body)))] ^= flip  # near: in the first page's header
    before = pa.default_memory_pool().max_memory()
    try:
        assert len(read_group(data, bytes(damaged), column, group=1, start=start)) == 30
    except DataError as error:
        check_one_line(error)
    assert pa.default_memory_pool().max_memory() - before < 10 * len(data)


def test_a_chunk_is_let_go_as_soon_as_its_images_are():
    data, column = written("binary", compression="snappy", use_dictionary=False)
    start, body = chunk_of(data, column, 1)
    gc.collect()
    gc.disable()
    try:
        before = sys.getrefcount(body), pa.total_allocated_bytes()
        read_group(data, body, column, group=1, start=start)
        deadline = time.monotonic() + 5  # a thread of Arrow's may still be letting go of it
        while (now := (sys.getrefcount(body), pa.total_allocated_bytes())) != before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert now == before
    finally:
        gc.enable()


def page(*, values: int = 1, unpacked: int = 1, stored: int = 1, kind: int = 0) -> bytes:
    """A page of one byte whose header says all that, in Thrift's compact protocol."""

    def number(value: int) -> bytes:
        rest, out = value << 1 if value >= 0 else (-value << 1) - 1, b"\x15"
        while rest > 127:
            out, rest = out + bytes([rest & 127 | 128]), rest >> 7
        return out + bytes([rest])

    step = bytes([{0: 2, 2: 4, 3: 5}[kind] << 4 | 12])
    return number(kind) + number(unpacked) + number(stored) + step + number(values) + b"\0\0x"


@pytest.mark.parametrize("kind", [0, 2, 3])
@pytest.mark.parametrize("what", ["values", "unpacked", "stored"])
@pytest.mark.parametrize("absurd", [-(2**31), -1, 2**31 - 1, 2**62])
def test_a_page_that_says_it_is_absurdly_large_is_refused(kind, what, absurd):
    check_pages(page(kind=2) + page() + page(kind=3), values=2, unpacked_bytes=100)
    with pytest.raises(ValueError, match="page"):
        check_pages(page() + page(kind=kind, **{what: absurd}), values=2, unpacked_bytes=100)


@given(st.binary(max_size=60))
def test_any_bytes_are_pages_or_a_value_error(body):
    for prefix in (b"", b"\x15\x00\x15\x02\x15\x02"):
        try:
            check_pages(prefix + body, values=1, unpacked_bytes=100)
        except ValueError as error:
            check_one_line(error)


def test_footers_are_fetched_once_and_kept_on_disk(tmp_path):
    from vaejob.data.cache import DiskCache

    data = open_data(index(str(hub(tmp_path / "hub")))["train"].address)
    for reads in ([2 + len(data.row_groups)], [0]):  # a footer for each of two files, once
        cache = DiskCache(tmp_path / "cache", limit_bytes=1 << 24, data_set="one")
        groups = RowGroups(data.bucket, data.manifest, data.row_groups, cache=cache)
        with mock.patch.object(groups._bucket, "read", wraps=groups._bucket.read) as read:
            for _, group in itertools.product(range(2), range(len(data.row_groups))):
                groups.read(group)
        assert read.call_count == reads[0]
