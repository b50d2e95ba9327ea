"""The same images give the same data set, whatever they were packed from."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vaejob.data.fingerprint import fingerprint, sample_digest
from vaejob.data.pack import pack
from vaejob.data.sources import open_source
from vaejob.errors import DataError, UserError
from vaejob.storage import open_bucket

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
