"""The same images give the same data set, whatever they were packed from, and no file can do harm."""

import gzip
import hashlib
import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.s3.faultproxy import FaultProxy
from tests.s3.server import S3Server
from vaejob.data.fingerprint import fingerprint, sample_digest
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource, ImageSource, arrays, content, open_source, probe
from vaejob.data.sources.content import BLOCK_BYTES, Content, ContentFile
from vaejob.data.sources.probe import safe_metadata
from vaejob.data.sources.recent import Recent
from vaejob.errors import BucketError, DataError, UserError
from vaejob.storage import open_bucket
from vaejob.storage.memory import MemoryBucket

GREY = np.random.default_rng(0).integers(0, 256, (20, 1, 6, 5), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)


def png(image: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, kind, **options)
    return file.getvalue()


def files(images: np.ndarray) -> dict[str, bytes]:
    return {f"class-{i % 2}/{i // 2:03d}.png": png(image) for i, image in enumerate(images)}


def in_name_order(images: np.ndarray) -> np.ndarray:
    return np.concatenate([images[0::2], images[1::2]])


def write_folder(path: Path, content: dict[str, bytes]) -> str:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return str(path)


def write_zip(path: Path, content: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return str(path)


def write_tar(path: Path, content: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def write_parquet(path: Path, **columns: object) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return str(path)


def idx(images: np.ndarray) -> bytes:
    count, _, height, width = images.shape
    return np.array([0x803, count, height, width], dtype=">u4").tobytes() + images.tobytes()


def packed_fingerprint(source: str, tmp_path: Path, **options: object) -> str:
    return pack(open_source(source, **options), str(tmp_path / "packed"))["train"].fingerprint


def expected(images: np.ndarray) -> str:
    return fingerprint(sum(sample_digest(i, image) for i, image in enumerate(images)))


WRITERS = {
    "folder": lambda path: write_folder(path / "tree", files(GREY)),
    "zip": lambda path: write_zip(path / "images.zip", files(GREY)),
    "tar": lambda path: write_tar(path / "images.tar", files(GREY)),
    "tar.gz": lambda path: write_tar(path / "images.tar.gz", files(GREY)),
    "shuffled tgz": lambda path: write_tar(path / "images.tgz", dict(sorted(files(GREY).items(), key=lambda f: f[0][-7:]))),
    "webdataset": lambda path: write_tar(
        path / "shard-0.tar", {f"{name[:-4]}.{ext}": data if ext == "png" else b"0" for name, data in files(GREY).items() for ext in ("cls", "png")}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_named_files_are_packed_in_the_order_of_their_names(kind, tmp_path):
    assert packed_fingerprint(WRITERS[kind](tmp_path), tmp_path) == expected(in_name_order(GREY))


def test_rows_of_parquet_are_packed_in_their_order(tmp_path):
    data = [png(image) for image in COLOUR]
    structs = [{"bytes": image, "path": None} for image in data]
    addresses = [
        write_parquet(tmp_path / "bytes.parquet", label=list(range(20)), jpeg=data),
        write_parquet(tmp_path / "struct.parquet", image=structs, other=data),
        write_parquet(tmp_path / "only.parquet", pixels=data, name=["x"] * 20),
    ]
    for address in addresses:
        target = tmp_path / Path(address).stem
        assert packed_fingerprint(address, target) == expected(COLOUR)


def test_parquet_files_of_a_folder_follow_one_another(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00002.parquet", image=[png(image) for image in COLOUR[:12]])
    write_parquet(folder / "train-00001-of-00002.parquet", image=[png(image) for image in COLOUR[12:]])
    assert packed_fingerprint(str(folder), tmp_path) == expected(COLOUR)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte"])
def test_idx_files_are_read_packed_or_not(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(idx(GREY)) if name.endswith(".gz") else idx(GREY))
    assert packed_fingerprint(str(tmp_path / name), tmp_path) == expected(GREY)


def test_npz_holds_grey_or_channels_last_images(tmp_path):
    np.savez(tmp_path / "grey.npz", images=GREY[:, 0], labels=np.arange(20))
    np.savez_compressed(tmp_path / "colour.npz", images=COLOUR.transpose(0, 2, 3, 1))
    assert packed_fingerprint(str(tmp_path / "grey.npz"), tmp_path / "a") == expected(GREY)
    assert packed_fingerprint(str(tmp_path / "colour.npz"), tmp_path / "b") == expected(COLOUR)


@pytest.mark.parametrize("labels", [1, 2])
def test_cifar_records_are_a_label_and_planes(labels, tmp_path):
    records = b"".join(b"\7" * labels + image.tobytes() for image in COLOUR)
    (tmp_path / "data_batch_1.bin").write_bytes(records[: len(records) // 2])
    (tmp_path / "data_batch_2.bin").write_bytes(records[len(records) // 2 :])
    assert packed_fingerprint(str(tmp_path / "data_batch_*.bin"), tmp_path) == expected(COLOUR)


def test_sources_are_read_from_buckets_too(tmp_path):
    archive = Path(write_zip(tmp_path / "images.zip", files(GREY))).read_bytes()
    open_bucket("memory://sources/zips").write("images.zip", archive)
    for name, data in files(GREY).items():
        open_bucket("memory://sources/tree").write(name, data)
    assert packed_fingerprint("memory://sources/zips/images.zip", tmp_path / "a") == expected(in_name_order(GREY))
    assert packed_fingerprint("memory://sources/tree", tmp_path / "b") == expected(in_name_order(GREY))


def test_files_that_are_no_images_are_counted_not_packed(tmp_path):
    content = files(GREY) | {"README.txt": b"hello", ".DS_Store": b"x", "__MACOSX/class-0/._000.png": b"x"}
    source = open_source(write_folder(tmp_path / "tree", content))
    assert len(source.samples) == 20
    assert "20 images, 1 other files left out" in source.description
    assert len(open_source(write_zip(tmp_path / "images.zip", content)).samples) == 20


def test_a_path_that_climbs_out_of_an_archive_writes_nothing(tmp_path):
    (tmp_path / "work").mkdir()
    address = write_tar(tmp_path / "work" / "evil.tar", {"../../evil.png": png(GREY[0]), "good.png": png(GREY[1])})
    before = set(tmp_path.rglob("*"))
    assert [sample.key for sample in open_source(address).samples] == ["good.png"]
    assert set(tmp_path.rglob("*")) == before


def test_a_webdataset_with_several_images_per_sample_asks_which(tmp_path):
    content = {f"{i:04d}.{ext}": data for i in range(20) for ext, data in (("png", png(GREY[i])), ("mask.png", png(GREY[0])), ("cls", b"3"))}  # fmt: skip
    address = write_tar(tmp_path / "shard.tar", content)
    with pytest.raises(DataError, match=r"several images per sample: mask.png, png; name one with --column"):
        open_source(address)
    assert packed_fingerprint(address, tmp_path, column="png") == expected(GREY)


def test_an_ambiguous_parquet_column_is_refused_with_the_candidates(tmp_path):
    address = write_parquet(tmp_path / "a.parquet", left=[png(GREY[0])], right=[png(GREY[1])])
    with pytest.raises(DataError, match=r"several columns of bytes: left, right; name one with --column"):
        open_source(address)
    assert packed_fingerprint(address, tmp_path, column="right") == expected(GREY[1:2])
    with pytest.raises(DataError, match=r"no column of image bytes named middle; its columns are: left binary, right"):
        open_source(address, column="middle")


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["train/1.png", "test/2.png"],
        ["data_batch_1.bin", "test_batch.bin"],
        ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte"],
    ],
)
def test_held_out_images_are_not_packed_among_training_images(names, tmp_path):
    write_folder(tmp_path, dict.fromkeys(names, b"x"))
    with pytest.raises(DataError, match=r"holds held-out images \(t.*\) beside others .*; pack them apart"):
        open_source(str(tmp_path))


def test_a_missing_or_unfit_source_is_refused_in_one_line(tmp_path):
    write_folder(tmp_path / "texts", {"a.txt": b"x"})
    write_folder(tmp_path / "both", {"a.png": png(GREY[0]), "b.zip": b"x"})
    write_folder(tmp_path / "files", {"a.txt": b"x", "empty.zip": b"", "cut.zip": b"PK", "cut.tar": b"x" * 700})
    write_folder(tmp_path / "files", {"cut.tar.gz": gzip.compress(b"x" * 9999)[:-9], "cut.parquet": b"PAR1"})
    write_folder(tmp_path / "files", {"labels.idx1-ubyte": b"\0\0\x08\1" + bytes(12), "cut-ubyte": idx(GREY)[:-1]})
    write_folder(tmp_path / "files", {"cut.npz": b"PK", "test.bin": b"x" * 5000})
    refusals = {
        "nothing-here": "does not exist or is empty",
        "texts": "holds no images among its 1 files",
        "both": "holds 1 images and 1 zip files; name one kind",
        "files/a.txt": "is no zip, tar, Parquet",
        "files/empty.zip": "is empty",
        "files/cut.zip": "is no complete zip file",
        "files/cut.tar": "is no complete tar file",
        "files/cut.tar.gz": "is no complete gzip file",
        "files/cut.parquet": "is no complete Parquet file",
        "files/cut-ubyte": "20 images of 6 x 5 need 616",
        "files/cut.npz": "is no npz file",
        "files/test.bin": "CIFAR's records have 3073 or 3074 bytes each",
    }
    for name, says in refusals.items():
        with pytest.raises(UserError, match=says) as caught:
            open_source(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert name.split("/")[-1] in str(caught.value)


def test_idx_labels_are_no_images(tmp_path):
    (tmp_path / "train.idx1-ubyte").write_bytes(b"\0\0\x08\1" + bytes(12))
    with pytest.raises(DataError, match=r"has 1 dimensions; name the idx file of the images"):
        open_source(str(tmp_path / "train.idx1-ubyte"))


def test_damage_inside_an_archive_names_the_image(tmp_path):
    archive = Path(write_zip(tmp_path / "images.zip", {"a.png": png(COLOUR[0]), "b.png": png(COLOUR[1])}))
    data = bytearray(archive.read_bytes())
    data[data.index(b"IDAT") + 40] ^= 255
    archive.write_bytes(data)
    with pytest.raises(DataError, match=r"images.zip: a.png cannot be read: Bad CRC-32"):
        pack(str(archive), str(tmp_path / "packed"))


def sources(path: Path) -> dict[str, str]:
    """An address of every kind of source, all of them with GREY's images or COLOUR's."""
    png_rows = [png(image) for image in COLOUR]
    (path / "hub").mkdir(parents=True)
    for part in range(2):
        write_parquet(path / "hub" / f"{part}.parquet", image=png_rows[part * 10 : part * 10 + 10])
    np.savez(path / "colour.npz", images=COLOUR.transpose(0, 2, 3, 1), labels=np.arange(20))
    (path / "images-ubyte").write_bytes(idx(GREY))
    (path / "images-ubyte.gz").write_bytes(gzip.compress(idx(GREY)))
    (path / "data_batch_1.bin").write_bytes(b"".join(b"\7" + image.tobytes() for image in COLOUR))
    files_of_pixels = ("colour.npz", "images-ubyte", "images-ubyte.gz", "data_batch_1.bin")
    return {
        **{kind: write(path) for kind, write in WRITERS.items()},
        "parquet": write_parquet(path / "images.parquet", image=png_rows),
        "joined parquet": str(path / "hub"),
        **{name: str(path / name) for name in files_of_pixels},
    }


def digest(source: ImageSource) -> str:
    """Of all keys, identities and images, in order."""
    images = (source.read(index) for index in range(len(source.samples)))
    return hashlib.sha256(repr([*source.samples, *map(bytes, images)]).encode()).hexdigest()


def test_a_pickled_source_reads_the_same_images_in_another_process(tmp_path):
    opened = {kind: open_source(address) for kind, address in sources(tmp_path).items()}
    opened["in memory"] = ArraySource("noise", COLOUR)
    script = "import pickle, sys; from tests.test_sources import digest\n" \
             "print(*(digest(s) for s in pickle.load(sys.stdin.buffer)), sep='\\n')"  # fmt: skip
    found = subprocess.run([sys.executable, "-c", script], input=pickle.dumps([*opened.values()]), capture_output=True)
    assert found.stdout.decode().split() == [digest(source) for source in opened.values()], found.stderr.decode()


def test_a_pickled_source_is_small_and_holds_no_pixels(tmp_path):
    for kind, address in sources(tmp_path).items():
        source = open_source(address)
        before = pickle.dumps(source)
        assert len(before) < 200 * len(source.samples), kind
        digest(source)
        assert pickle.dumps(source) == before, f"{kind}: what was opened or worked out travels too"


def test_threads_read_what_one_reads(tmp_path):
    for kind, address in sources(tmp_path).items():
        source, shared = open_source(address), pickle.loads(pickle.dumps(open_source(address)))
        indices = random.Random(0).choices(range(20), k=400)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(shared.read, indices))
        assert all(np.array_equal(f, source.read(i)) for f, i in zip(found, indices, strict=True)), kind


def test_an_identity_changes_with_the_file_alone(tmp_path):
    for kind, address in sources(tmp_path).items():
        files_below = [path for path in tmp_path.rglob("*") if path.is_file() and f"{path}/".startswith(f"{address}/")]
        before = open_source(address).samples
        assert open_source(address).samples == before
        if kind != "zip":  # which has checksums of its own
            for path in files_below:
                os.utime(path, ns=(0, 0))
            after = open_source(address).samples
            assert [a.key for a in after] == [b.key for b in before]
            assert not {a.identity for a in after} & {b.identity for b in before}, kind


class Requests(list[tuple[str, int]]):
    """The name and the number of bytes of every read; the number of listings."""

    listings = 0
    sizes = 0

    def of_bytes(self) -> int:
        return sum(size for _, size in self)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    """What is asked of buckets in memory from now on."""
    seen, read, versions, size = Requests(), MemoryBucket.read, MemoryBucket.versions, MemoryBucket.size

    def counting_read(self, key, start=None, stop=None):
        data = read(self, key, start, stop)
        seen.append((key, len(data)))
        return data

    def counting_versions(self, prefix=""):
        seen.listings += 1
        return versions(self, prefix)

    def counting_size(self, key):
        seen.sizes += 1
        return size(self, key)

    monkeypatch.setattr(MemoryBucket, "read", counting_read)
    monkeypatch.setattr(MemoryBucket, "versions", counting_versions)
    monkeypatch.setattr(MemoryBucket, "size", counting_size)
    return seen


def large(megabytes: int) -> bytes:
    return random.Random(megabytes).randbytes(megabytes << 20)


def test_a_remote_tar_is_listed_by_its_headers(tmp_path, requests):
    images = {f"{i}.png": large(40 + i) for i in range(3)}
    data = Path(write_tar(tmp_path / "a.tar", images)).read_bytes()
    open_bucket("memory://large-tar").write("a.tar", data)
    source = open_source("memory://large-tar/a.tar")
    assert len(source.samples) == 3
    assert requests.of_bytes() < len(data) / 3
    requests.clear()
    assert source.read(1) == images["1.png"]
    assert requests.of_bytes() == len(images["1.png"]), "the image, and nothing beside it"


def test_a_remote_zip_is_listed_by_its_directory(tmp_path, requests):
    images = {f"{i}.png": large(20 + i) for i in range(3)}
    data = Path(write_zip(tmp_path / "a.zip", images)).read_bytes()
    open_bucket("memory://large-zip").write("a.zip", data)
    source = open_source("memory://large-zip/a.zip")
    assert requests.of_bytes() <= BLOCK_BYTES
    requests.clear()
    assert source.read(1) == images["1.png"]
    assert requests.of_bytes() < len(images["1.png"]) + BLOCK_BYTES + 10_000, "the image, and the block of its header"


def test_of_a_remote_parquet_file_only_the_images_are_read(tmp_path, requests):
    images, masks = [large(3 + i) for i in range(4)], [large(9 + i) for i in range(4)]
    file = write_parquet(tmp_path / "a.parquet", mask=masks, image=images, other=masks)
    data = Path(file).read_bytes()
    open_bucket("memory://large-parquet").write("a.parquet", data)
    source = open_source("memory://large-parquet/a.parquet", column="image")
    assert requests.of_bytes() < 100_000
    requests.clear()
    assert [source.read(index) for index in range(4)] == images
    assert requests.of_bytes() < sum(map(len, images)) + BLOCK_BYTES < len(data) / 2


def test_small_images_of_a_remote_tar_are_fetched_in_blocks_once(tmp_path, requests):
    images = {f"{i:03d}.png": random.Random(i).randbytes(100_000) for i in range(300)}
    data = Path(write_tar(tmp_path / "a.tar", images)).read_bytes()
    open_bucket("memory://blocks").write("a.tar", data)
    source = pickle.loads(pickle.dumps(open_source("memory://blocks/a.tar")))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, range(300))) == list(images.values())
    assert sorted(size for _, size in requests) == sorted(
        min(BLOCK_BYTES, len(data) - start) for start in range(0, len(data), BLOCK_BYTES)
    )


def test_a_remote_folder_is_one_listing(requests):
    bucket = open_bucket("memory://one-listing/tree")
    for name, data in files(GREY).items():
        bucket.write(name, data)
    assert len(open_source("memory://one-listing/tree").samples) == 20
    assert (requests.listings, requests.sizes, list(requests)) == (1, 1, [])


@pytest.mark.s3
def test_a_folder_in_an_object_store_is_listed_without_a_request_per_image(s3_bucket, s3_env: S3Server, monkeypatch):
    with FaultProxy(upstream=s3_env.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        bucket = open_bucket(f"{s3_bucket}/tree")
        for name, data in files(GREY).items():
            bucket.write(name, data)
        proxy.strike()
        source = open_source(f"{s3_bucket}/tree")
        assert len({sample.identity for sample in source.samples}) == 20
        assert [entry["method"] for entry in proxy.log if "list-type=2" not in entry["target"]] == ["HEAD"]
        assert len(proxy.log) <= 3, "is it a file, is there such a bucket, what is in it"
        assert source.read(0) == bucket.read("class-0/000.png")


@pytest.mark.s3
def test_every_kind_is_read_from_an_object_store_by_another_process(s3_bucket, s3_env: S3Server, tmp_path):
    bucket, local = open_bucket(s3_bucket), sources(tmp_path)
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            bucket.write(str(path.relative_to(tmp_path)), path.read_bytes())
    remote = [open_source(address.replace(str(tmp_path), s3_bucket)) for address in local.values()]
    script = "import pickle, sys; from tests.test_sources import digest\n" \
             "print(*(digest(s) for s in pickle.load(sys.stdin.buffer)), sep='\\n')"  # fmt: skip
    found = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(remote), capture_output=True)
    assert found.stdout.decode().split() == [digest(source) for source in remote], found.stderr.decode()
    for source, address in zip(remote, local.values(), strict=True):
        original = open_source(address)
        assert [sample.key for sample in source.samples] == [sample.key for sample in original.samples]
        assert all(np.array_equal(source.read(i), original.read(i)) for i in range(20))


@pytest.mark.s3
def test_a_file_that_is_replaced_while_it_is_read_is_refused(s3_bucket, tmp_path):
    for bucket, address in ((open_bucket(s3_bucket), s3_bucket), (open_bucket(str(tmp_path)), str(tmp_path))):
        for replacement in (bytes(20 << 20), b"short"):
            bucket.write("a", b"1" * (20 << 20))
            found = Content(f"{address}/a")
            assert found.read(0, 5) == b"11111"
            bucket.write("a", replacement)
            says = r"/a (was changed since it was listed: its size and version are|has 5 bytes; \d+ were)"
            for start, stop in ((8 << 20, 9 << 20), (0, 20 << 20)):
                if address == s3_bucket:
                    with pytest.raises((DataError, BucketError), match=says):
                        found.read(start, stop)
                else:  # the file that was opened is still there under no name
                    assert found.read(start, stop) == b"1" * (stop - start)
            with pytest.raises((DataError, BucketError), match=says):
                Content(found.address, "20971520 0").read(9 << 20, 10 << 20)


def test_a_local_file_that_is_overwritten_or_cut_off_in_place_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"1" * 100_000)
    for change in (lambda file: file.write(b"2"), lambda file: file.truncate(10)):
        found = Content(str(tmp_path / "a"))
        assert found.read(90_000, 90_005) == b"11111"
        time.sleep(0.05)  # a file system's clock ticks slowly
        with (tmp_path / "a").open("r+b") as file:
            change(file)
        with pytest.raises(DataError, match="a was changed since it was listed"):
            found.read(90_000, 90_005)


def test_any_range_is_the_slice_of_the_whole(monkeypatch):
    monkeypatch.setattr(content, "BLOCK_BYTES", 16)
    data = bytes(range(100))
    open_bucket("memory://ranges").write("a", data)
    found, dice = Content("memory://ranges/a"), random.Random(0)
    for _ in range(500):
        start, stop = sorted(dice.choices(range(101), k=2))
        assert found.read(start, stop) == found.read_once(start, stop) == data[start:stop]
    file = ContentFile(found)
    assert (file.seek(-30, os.SEEK_END), file.read(10), file.tell(), file.read()) == (70, data[70:80], 80, data[80:])


def test_what_is_costly_is_made_once_and_few_are_kept():
    made, recent = [], Recent[int, int](most=2)
    start = threading.Barrier(8)

    def make(key: int) -> int:
        time.sleep(0.01)
        made.append(key)
        return -key

    def ask(_: int) -> list[int]:
        start.wait()
        return [recent.get(key, lambda key=key: make(key)) for key in (1, 2)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [[-1, -2]] * 8
    assert made == [1, 2]
    recent.get(1, lambda: make(1))
    recent.get(3, lambda: make(3))
    assert (1 in recent, 2 in recent, 3 in recent, made) == (True, False, True, [1, 2, 3])
    with pytest.raises(ZeroDivisionError):
        recent.get(4, lambda: 1 // 0)
    assert recent.get(4, lambda: make(4)) == -4


def tar_member(name: str, data: bytes = b"", **fields: object) -> bytes:
    """A header and its data; fields are those of TarInfo, true or not."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


END = bytes(1024)


def test_links_devices_and_strange_names_in_a_tar_are_harmless(tmp_path):
    image = png(GREY[0])
    members = [
        tar_member("good.png", image),
        tar_member("/etc/absolute.png", image),
        tar_member("a/../up.png", image),
        tar_member("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        tar_member("hard.png", type=tarfile.LNKTYPE, linkname="good.png"),
        tar_member("device.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        tar_member("pipe.png", type=tarfile.FIFOTYPE),
        tar_member("folder.png", type=tarfile.DIRTYPE),
        tar_member("twice.png", b"before"),
        tar_member("twice.png", image),
        tar_member("n\udcff\n\x1b[2J.png", image),
    ]
    (tmp_path / "a.tar").write_bytes(b"".join(members) + END)
    source = open_source(str(tmp_path / "a.tar"))
    found = {sample.key: source.read(index) for index, sample in enumerate(source.samples)}
    assert set(found) == {"/etc/absolute.png", "good.png", "twice.png", "n\\udcff\n\x1b[2J.png"}
    assert set(found.values()) == {image}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.tar"]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([tar_member("a.png", size=1 << 40)], "no complete tar file: it is cut off within a.png"),
        ([tar_member("a.png", size=2**60), END], "no complete tar file: it is cut off within a.png"),
        ([tar_member("ok.png"), tar_member("a.png", size=-1024), END], "a.png has -1024 bytes"),
        ([tar_member("a", bytes(3 << 20), type=tarfile.GNUTYPE_LONGNAME), END], "bytes at 512 are a header"),
        ([tar_member("a", size=-512, type=tarfile.GNUTYPE_LONGNAME), bytes(9 << 20)], "are a header"),
        ([tar_member("a", b"11 size=-99\n", type=tarfile.XHDTYPE), tar_member("b.png"), END], "no complete tar file"),
        ([tar_member("a", b"x\0", type=tarfile.GNUTYPE_LONGNAME)] * 2000 + [END], "no complete tar file"),
        ([tar_member("a.png", b"1"), b"x" * 512, tar_member("b.png", b"2"), END], "no header is at byte 1024"),
        ([tar_member("a.png", type=tarfile.GNUTYPE_SPARSE), END], "a.png is stored as a sparse file"),
    ],
    ids=["size", "huge size", "negative size", "long name", "negative name", "pax size", "nested", "damaged", "sparse"],
)
def test_a_malicious_tar_is_refused_in_one_line(members, says, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"".join(members))
    with pytest.raises(DataError, match=says) as caught:
        open_source(str(tmp_path / "a.tar"))
    assert "\n" not in str(caught.value)


def test_an_image_beyond_a_gigabyte_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(tar_member("a.png", size=1_000_000_001))
        file.seek(1_000_001_536)
        file.write(END)
    with pytest.raises(DataError, match=r"a.png has 1000000001 bytes; an image has at most 1000000000"):
        open_source(str(tmp_path / "a.tar"))


def zip_of(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def patched(path: Path, offset_in_entry: int, form: str, value: int) -> str:
    """The zip file with a number of its only directory entry changed."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.rindex(b"PK\1\2") + offset_in_entry, value)
    path.write_bytes(data)
    return str(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_strange_names_in_a_zip_are_harmless(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    names = ("/etc/absolute.png", "a/../../up.png", "C:\\windows.png", "twice.png", "twice.png")
    members = [(link, b"/etc/passwd"), *((name, png(GREY[i])) for i, name in enumerate(names))]
    source = open_source(str(zip_of(tmp_path / "a.zip", *members)))
    assert [sample.key for sample in source.samples] == ["/etc/absolute.png", "C:\\windows.png", "twice.png"]
    assert source.read(2) == png(GREY[4])
    assert list(tmp_path.iterdir()) == [tmp_path / "a.zip"]


@pytest.mark.parametrize(
    ("method", "size", "says"),
    [
        (zipfile.ZIP_DEFLATED, 1000, "should have 1000 bytes and has more"),
        (zipfile.ZIP_BZIP2, 1000, "should have 1000 bytes and has more"),
        (zipfile.ZIP_DEFLATED, 60 << 20, "should have 62914560 bytes and has only 52428800"),
        (zipfile.ZIP_DEFLATED, 1_000_000_001, "an image has at most 1000000000"),
        (zipfile.ZIP_LZMA, 50 << 20, "is compressed by method 14; it must be stored, deflate or bzip2"),
    ],
)
def test_a_zip_bomb_needs_no_more_memory_than_its_directory_says(method, size, says, tmp_path):
    bomb = zip_of(tmp_path / "a.zip", ("a.png", bytes(50 << 20)), method=method)
    with pytest.raises(DataError, match=says) as caught:
        open_source(patched(bomb, 24, "<I", size)).read(0)
    assert "\n" not in str(caught.value)


def test_an_encrypted_zip_is_refused_when_it_is_opened(tmp_path):
    with pytest.raises(DataError, match=r"a.png is encrypted; make a zip file without a password"):
        open_source(patched(zip_of(tmp_path / "a.zip", ("a.png", b"x")), 8, "<H", 1))


def test_an_npz_bomb_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((1000, 64, 64), np.uint8))
    monkeypatch.setattr(arrays, "_MOST_BYTES", 4_000_000)
    with pytest.raises(DataError, match=r"a.npz holds an array of 4096128 bytes; at most 4000000 are loaded"):
        open_source(str(tmp_path / "a.npz"))
    shape = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 64, 64), }" % 10**12
    header = b"\x93NUMPY\1\0" + struct.pack("<H", len(shape)) + shape
    with pytest.raises(DataError, match=r"b.npz is no npz file of plain arrays"):
        open_source(str(zip_of(tmp_path / "b.npz", ("images.npy", header))))


def complaint(call: Callable[[], object]) -> str:
    """What a call says of its input, which must be one line; empty if it says nothing."""
    try:
        call()
    except (DataError, BucketError) as error:
        return str(error)
    return ""


def flips(data: bytes, *, count: int, seed: int) -> Iterator[bytes]:
    """The bytes with one or two of them changed, or cut off."""
    dice = random.Random(seed)
    for number in range(count):
        changed = bytearray(data)
        for _ in range(1 + number % 2):
            changed[dice.randrange(len(data))] = dice.choice([0, 0x7F, 0x80, 0xFF, dice.randrange(256)])
        yield bytes(changed[: dice.randrange(len(data))] if number % 10 == 9 else changed)


@pytest.mark.parametrize("kind", ["tar", "zip", "tar.gz", "parquet", "colour.npz", "images-ubyte", "data_batch_1.bin"])
def test_damage_anywhere_is_one_line_or_harmless(kind, tmp_path):
    """Of Parquet files, damage in pages too: were pyarrow to end the process over it, it would end this one."""
    path = Path(sources(tmp_path)[kind])
    for damaged in flips(path.read_bytes(), count=200, seed=1):
        path.unlink()
        path.write_bytes(damaged)
        assert "\n" not in complaint(lambda: digest(open_source(str(path))))


def parquet_footers() -> Iterator[bytes]:
    small = [image[0, :2, :2].tobytes() for image in GREY]
    for options in ({}, {"compression": "none", "use_dictionary": False}, {"write_page_index": True}):
        for images in (small, [{"bytes": image, "path": None} for image in small]):
            file = io.BytesIO()
            pq.write_table(pa.table({"label": range(20), "image": images}), file, row_group_size=7, **options)
            data = file.getvalue()
            yield data[-8 - int.from_bytes(data[-8:-4], "little") :]


def test_no_footer_ends_the_process_that_asks_for_its_metadata():
    for seed, footer in enumerate(parquet_footers()):
        assert safe_metadata("whole", b"and before it" + footer).num_rows == 20
        for damaged in flips(footer, count=300, seed=seed):
            said = complaint(lambda damaged=damaged: last_column(safe_metadata("damaged.parquet", damaged)))
            assert re.fullmatch(r"(damaged.parquet is no complete Parquet file: .*)?", said)


def last_column(metadata: pq.FileMetaData) -> list[str]:
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return [group.column(metadata.num_columns - 1).path_in_schema for group in groups]


def test_a_footer_that_ends_the_parser_is_damaged_and_the_next_is_parsed(monkeypatch):
    footer = next(parquet_footers())
    script = "import os, sys; print('ready', flush=True); sys.stdin.buffer.read(8); os.abort()"
    dying = lambda: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with monkeypatch.context() as patch:
        patch.setattr("vaejob.data.sources.probe._child", probe._Child())
        patch.setattr("vaejob.data.sources.probe._started", dying)
        with pytest.raises(DataError, match=r"^a.parquet is no complete Parquet file: its footer is damaged$"):
            safe_metadata("a.parquet", footer)
        patch.undo()
    assert safe_metadata("a.parquet", footer).num_rows == 20


def test_a_footer_that_lies_about_its_rows_is_refused(tmp_path):
    table = pa.table({"image": pa.array([b"x"] * 100_000).dictionary_encode().cast(pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"is no complete Parquet file: its footer says that 100000 rows are in \d+ bytes"
    ):
        open_source(str(tmp_path / "a.parquet"))


def test_the_process_that_parses_footers_ends_with_its_parent():
    script = (
        "import os, sys; sys.path.insert(0, '.')\n"
        "from tests.test_sources import parquet_footers; from vaejob.data.sources import probe\n"
        "probe.safe_metadata('a', next(parquet_footers())); print(probe._child._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    child = Path(f"/proc/{int(found.stdout)}/stat")
    deadline = time.monotonic() + 20
    while child.exists() and child.read_text().split(") ")[1][0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
