"""Hostile bytes: whatever a bucket holds, the answer is pixels or one clear line, in bounded memory, from a living process."""

import hashlib
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vaejob.config import DataConfig
from vaejob.data.batches import DataSet, open_data
from vaejob.data.manifest import ROW_GROUP, write_row_groups
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import DataError, VaejobError

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)

# In a process of its own: a decoder that crashes shows as a signal, one that allocates without bound as a MemoryError.
DECODE_ALL = """
import resource, struct, sys
import numpy as np
from vaejob.data.decode import decode_image
from vaejob.errors import DataError
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
outcomes = {"pixels": 0, "refused": 0}
while length := sys.stdin.buffer.read(4):
    data = sys.stdin.buffer.read(struct.unpack("<I", length)[0])
    try:
        image = decode_image(data, "key")
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in (1, 3), image.shape
        outcomes["pixels"] += 1
    except DataError as error:
        assert "\\n" not in str(error) and str(error).startswith("key "), error
        outcomes["refused"] += 1
# Not ru_maxrss, which begins with that of the process before exec.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(outcomes["pixels"], outcomes["refused"], peak)
"""


def decode_all(files: list[bytes]) -> tuple[int, int, int]:
    """How many were decoded and refused, and the most memory, in kB, that took."""
    sent = b"".join(struct.pack("<I", len(file)) + file for file in files)
    run = subprocess.run([sys.executable, "-c", DECODE_ALL], input=sent, capture_output=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    pixels, refused, peak = map(int, run.stdout.split())
    assert pixels + refused == len(files)
    return pixels, refused, peak


def image_file(kind: str, **options: Any) -> bytes:
    ramp = np.add.outer(np.arange(40), np.arange(48))[:, :, None] * np.array([1, 2, 3])
    file = io.BytesIO()
    Image.fromarray((ramp % 256).astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


KINDS = {
    "PNG": image_file("PNG"),
    "JPEG": image_file("JPEG"),
    "progressive JPEG": image_file("JPEG", progressive=True),
    "WebP": image_file("WEBP"),
    "lossless WebP": image_file("WEBP", lossless=True),
    "BMP": image_file("BMP"),
    "GIF": image_file("GIF"),
    "TIFF": image_file("TIFF", compression="tiff_lzw"),
    "PPM": image_file("PPM"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_images_are_decoded_or_refused(kind: str) -> None:
    """Flipped bits, cut ends, overwritten stretches, repeated stretches: 800 of them."""
    whole, dice = KINDS[kind], np.random.default_rng(1)
    files = [whole]
    for _ in range(800):
        data = bytearray(whole)
        for _ in range(int(dice.integers(1, 4))):
            place, length = int(dice.integers(len(data))), int(dice.integers(1, 9))
            match dice.integers(4):
                case 0:
                    data[place] ^= 1 << int(dice.integers(8))
                case 1:
                    data = data[: max(1, place)]
                case 2:
                    data[place : place + length] = dice.bytes(length)
                case _:
                    data[place:place] = data[place : place + length]
        files.append(bytes(data))
    pixels, refused, peak = decode_all(files)
    assert pixels >= 1
    assert refused >= 50
    assert peak < 600_000


def png(*, width: int, height: int, pixels: bytes = b"", before: tuple[bytes, bytes] | None = None) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + (chunk(*before) if before else b"")
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def test_bombs_take_little_memory() -> None:
    """Absurd dimensions, and streams that inflate to a gigabyte where a few bytes are due."""
    packer = zlib.compressobj(9)
    inflates = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1000)) + packer.flush()
    bombs = [png(width=w, height=h) for w, h in ((2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (60_000, 60_000), (0, 0))]
    bombs += [png(width=8, height=8, pixels=inflates)]
    bombs += [
        png(width=8, height=8, pixels=zlib.compress(bytes(8 * 25)), before=(name, text + inflates))
        for name, text in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"))
    ]
    # The dimensions that a small JPEG, WebP, BMP or GIF claims.
    for kind, place, code in (("BMP", 18, "<ii"), ("GIF", 6, "<HH")):
        data = bytearray(KINDS[kind])
        struct.pack_into(code, data, place, *((30_000, 30_000) if code == "<ii" else (65_535, 65_535)))
        bombs.append(bytes(data))
    jpeg = bytearray(KINDS["JPEG"])
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 65_500, 65_500)
    bombs.append(bytes(jpeg))
    _, refused, peak = decode_all(bombs)
    assert refused >= len(bombs) - 1  # what follows the last pixel may be left unread
    assert peak < 400_000


def packed(folder: Path, encoding: str = "keep") -> DataSet:
    pack(ArraySource("noise", PIXELS), str(folder), encoding=encoding, row_group_bytes=2000, shard_bytes=6000)  # type: ignore[arg-type]
    return open_data(f"{folder}/train")


def read_all(address: str) -> None:
    """Evaluation and an epoch of training; right pixels, or one line."""
    data = open_data(address)
    for ids, images in data.evaluation_blocks():
        assert np.array_equal(images, PIXELS[ids])
    config = DataConfig(train=address, global_batch=16, lanes=4, window_rows=8)
    for batch in data.training_batches(config, seed=0, images_seen=0, until=len(PIXELS)):
        assert np.array_equal(batch.images, PIXELS[batch.ids])


def refused_or_right(address: str) -> None:
    refusal: VaejobError | None = None
    try:
        read_all(address)
    except VaejobError as error:
        refusal = error
    elsewhere = "/etc/passwd"  # where a manifest may claim that its shards lie, be it a folder or not
    assert refusal is None or address in str(refusal) or elsewhere in str(refusal), refusal
    assert "\n" not in str(refusal), refusal


@pytest.fixture(scope="module", params=["raw", "keep"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(packed(tmp_path_factory.mktemp("whole"), request.param).bucket.url)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_files_of_a_data_set_give_right_pixels_or_one_line(whole: Path, data: st.DataObject) -> None:
    """One file at a time, and put back afterwards; its checksums stay as they were."""
    names = ("manifest.json", "row_groups.npy", "00000.parquet", "00001.parquet")
    path = whole / data.draw(st.sampled_from(names))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
    mutated = {
        "flip": content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :],
        "cut": content[:place],
        "insert": content[:place] + b"\0\xff" + content[place:],
        "zero": content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :],
    }[change]
    try:
        path.write_bytes(mutated)
        refused_or_right(str(whole))
    finally:
        path.write_bytes(content)


def seal(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with the checksum that a liar would not forget."""
    content = json.dumps({name: value for name, value in manifest.items() if name != "sha256"}, indent=1)
    content = content.removesuffix("\n}")
    return f'{content},\n "sha256": "{hashlib.sha256(content.encode()).hexdigest()}"\n}}'


ABSURD = st.sampled_from(
    [0, 1, 2, 2**15, 2**31, 2**32 - 1, 2**32, 2**63, 10**30, -1, "", "../..", "/etc/passwd", None, 1.5]
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value in a JSON document."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in inner for found in [(*path, key), *places(value, (*path, key))]]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_manifests_that_lie_are_refused(whole: Path, data: st.DataObject) -> None:
    path = whole / "manifest.json"
    content = path.read_text()
    manifest = json.loads(content)
    del manifest["sha256"]
    for *parents, last in data.draw(st.lists(st.sampled_from(places(manifest)), min_size=1, max_size=2)):
        inner = manifest
        try:
            for key in parents:
                inner = inner[key]
            inner[last] = data.draw(ABSURD)
        except (TypeError, KeyError, IndexError):  # the first lie took this place away
            continue
    try:
        path.write_text(seal(manifest))
        refused_or_right(str(whole))
    finally:
        path.write_text(content)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_row_groups_that_lie_are_refused(whole: Path, data: st.DataObject) -> None:
    """With the right checksum of the lie in the manifest."""
    manifest_text, table_bytes = (whole / "manifest.json").read_text(), (whole / "row_groups.npy").read_bytes()
    table = np.load(whole / "row_groups.npy").copy()
    assert table.dtype == ROW_GROUP
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(["rows", "size", "offset", "crc32"]))
        largest = 2**64 - 1 if name == "offset" else 2**32 - 1
        value = data.draw(st.sampled_from([0, 1, 1999, 10**6, 2**31, largest]) | st.integers(0, largest))
        table[name][data.draw(st.integers(0, len(table) - 1))] = value
    try:
        data_set = open_data(str(whole))
        manifest = json.loads(manifest_text)
        manifest["row_groups_sha256"] = write_row_groups(data_set.bucket, table)
        if data.draw(st.booleans()):  # the counts agree with the lie
            ends = np.cumsum([shard["row_groups"] for shard in manifest["shards"]])
            for shard, rows in zip(manifest["shards"], np.split(table["rows"], ends[:-1]), strict=True):
                shard["rows"] = int(rows.sum(dtype=np.int64))
            manifest["images"] = sum(shard["rows"] for shard in manifest["shards"])
        (whole / "manifest.json").write_text(seal(manifest))
        if manifest["images"] < 10**6:  # else an epoch of refusals would take the day: one block is as good
            refused_or_right(str(whole))
        else:
            with pytest.raises(VaejobError):
                for _ in open_data(str(whole)).evaluation_blocks():
                    pass
    finally:
        (whole / "manifest.json").write_text(manifest_text)
        (whole / "row_groups.npy").write_bytes(table_bytes)


def test_an_absurd_shape_is_refused_before_memory_is_taken(whole: Path) -> None:
    text = (whole / "manifest.json").read_text()
    try:
        manifest = json.loads(text) | {"height": 2**15, "width": 2**15}
        (whole / "manifest.json").write_text(seal(manifest))
        with pytest.raises(DataError):
            read_all(str(whole))
    finally:
        (whole / "manifest.json").write_text(text)
