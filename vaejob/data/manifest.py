"""What is in a data set: its shards, their row groups and checksums, the shape of its images, and its fingerprint.

A data set is a folder of Parquet shards, row_groups.npy, and one manifest.json, which is written last: without it there
is no data set. Row i of the data set, counted over the shards in their order, is the sample with id i. Row groups are kept
apart as plain numbers, since there may be millions of them.
"""

import hashlib
import io
import re
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vaejob.errors import DataDamaged, DataError, ObjectMissing
from vaejob.storage import Bucket, join
from vaejob.storage.retry import read_whole

MANIFEST_KEY = "manifest.json"
ROW_GROUPS_KEY = "row_groups.npy"
FORMAT: Final = 2
_SEAL = b',\n "sha256": "'
ROW_GROUP = np.dtype([("rows", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("crc32", "<u4")])
"""One row group: its rows, and where in its shard its images lie: bytes [offset, offset + size), with their zlib.crc32."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Part):
    """One Parquet file."""

    key: str
    """File name in the folder of the shards."""
    size: int = Field(ge=1)
    sha256: str
    footer_size: int = Field(ge=1)
    """Bytes at the end of the file that hold Parquet's footer, its length and its magic: file[size - footer_size:]."""
    footer_crc32: int = Field(ge=0, lt=2**32)
    """zlib.crc32 of those bytes; a damaged footer is not to reach Parquet's parser, which may end the process."""
    rows: int = Field(ge=1)
    row_groups: int = Field(ge=1)


class Manifest(_Part):
    """The one description of a data set that everything else reads."""

    format: Literal[2] = FORMAT
    split: str
    images: int = Field(ge=1)
    channels: int = Field(ge=1, le=4)
    height: int = Field(ge=1, le=2**15)
    width: int = Field(ge=1, le=2**15)
    encoding: Literal["raw", "encoded"]
    """raw: column `image` holds C*H*W bytes, planar; encoded: it holds a PNG, JPEG or WebP file."""
    layout: Literal["plain", "parquet"] = "plain"
    """plain: a row group's bytes are its images alone, end to end (encoded: each after its length, 4 bytes little-endian).
    parquet: they are the column's chunk as some other program wrote it, which takes the footer and a Parquet reader."""
    column: str = "image"
    """Parquet path of the images, such as image or image.bytes."""
    shards_at: str = Field(default="", pattern=r"^(|\.\.|/.*|[a-z0-9]+://.+)$")
    """Where the shards lie: empty for this folder, '..' for the one above, or an address."""
    fingerprint: str
    """Sum over the samples of sha256(id, shape, pixels) modulo 2^256, in hex: the same however they are sharded or encoded."""
    source: str
    """What was packed, for people."""
    plan: str = ""
    """Hash of the source's samples and the settings of `vaejob pack`; empty for shards that were indexed where they lay."""
    row_groups_sha256: str
    """Of the file row_groups.npy."""
    shards: tuple[Shard, ...] = Field(min_length=1)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def dims(self) -> int:
        """Dimensions of one image: channels x height x width."""
        return self.channels * self.height * self.width

    @property
    def row_groups(self) -> int:
        return sum(shard.row_groups for shard in self.shards)


def read_manifest(bucket: Bucket) -> Manifest:
    """The manifest of the data set in this bucket. Raises DataError if it is missing, damaged, or does not add up."""
    address = join(bucket.url, MANIFEST_KEY)
    text = read_whole(lambda: _read_sealed(bucket, address))
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise DataError(f"{address} is damaged: {where}: {problem['msg']}; pack the data again") from None
    if (rows := sum(shard.rows for shard in manifest.shards)) != manifest.images:
        raise DataError(
            f"{address} is damaged: its shards hold {rows} rows, it says {manifest.images} images; pack again"
        )
    return manifest


def read_row_groups(bucket: Bucket, manifest: Manifest) -> np.ndarray:
    """Every row group of a data set, in order; shape [row groups], dtype ROW_GROUP.

    Raises DataError if the file is missing, damaged, or does not fit the manifest.
    """
    address, count = join(bucket.url, ROW_GROUPS_KEY), manifest.row_groups
    data = read_whole(lambda: _read_row_groups(bucket, address, manifest))
    if len(data) < count * ROW_GROUP.itemsize:
        raise DataError(f"{address} has {len(data)} bytes, too few for {count} row groups; pack the data again")
    table = np.frombuffer(data, dtype=ROW_GROUP, offset=len(data) - count * ROW_GROUP.itemsize)
    rows = np.add.reduceat(table["rows"].astype(np.int64), _firsts(manifest))
    plain_raw = manifest.layout == "plain" and manifest.encoding == "raw"
    if plain_raw and (table["size"] != table["rows"].astype(np.int64) * manifest.dims).any():
        raise DataError(f"{address}: its row groups do not hold images of {manifest.dims} bytes; pack the data again")
    if not np.array_equal(rows, [shard.rows for shard in manifest.shards]) or not table["rows"].all():
        raise DataError(f"{address}: its row groups do not add up to the shards of the manifest; pack the data again")
    return table


def write_row_groups(bucket: Bucket, table: np.ndarray) -> str:
    """Puts row_groups.npy, and returns its sha256; the manifest is written after it."""
    file = io.BytesIO()
    np.save(file, table.astype(ROW_GROUP, copy=False))
    bucket.write(ROW_GROUPS_KEY, file.getvalue())
    return hashlib.sha256(file.getvalue()).hexdigest()


def write_manifest(bucket: Bucket, manifest: Manifest) -> None:
    bucket.write(MANIFEST_KEY, _sealed(manifest.model_dump_json(indent=1).encode()))


def _sealed(text: bytes) -> bytes:
    """A JSON object with one more member, the sha256 of all bytes before that member."""
    content = text[: text.rindex(b"\n}")]
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode() + b'"\n}'


def _read_sealed(bucket: Bucket, address: str) -> bytes:
    """The manifest without its seal. Raises DataDamaged if that does not fit."""
    try:
        text = bucket.read(MANIFEST_KEY)
    except ObjectMissing:
        raise DataError(_no_manifest(bucket)) from None
    content, seal, _ = text.rpartition(_SEAL)
    if not seal and (found := re.match(rb'\{\s*"format":\s*(\d+)', text)) and int(found[1]) != FORMAT:
        other = f"{address} has format {int(found[1])}, this vaejob reads {FORMAT}"
        raise DataError(f"{other}; pack the data again, or use the vaejob that packed it")
    if _sealed(content + b"\n}") != text:
        raise DataDamaged(f"{address} is damaged or was edited: its sha256 does not fit; pack the data again")
    return content + b"\n}"


def _read_row_groups(bucket: Bucket, address: str, manifest: Manifest) -> bytes:
    try:
        data = bucket.read(ROW_GROUPS_KEY)
    except ObjectMissing:
        raise DataError(f"{address} is gone; pack the data again") from None
    if (found := hashlib.sha256(data).hexdigest()) != manifest.row_groups_sha256:
        raise DataDamaged(f"{address}: sha256 is {found}, the manifest says {manifest.row_groups_sha256}; pack again")
    return data


def _firsts(manifest: Manifest) -> np.ndarray:
    """The number of each shard's first row group; shape [shards], int64."""
    counts = np.array([shard.row_groups for shard in manifest.shards], dtype=np.int64)
    return np.cumsum(counts) - counts


def _no_manifest(bucket: Bucket) -> str:
    splits = [name for name in bucket.folders() if bucket.size(f"{name}/{MANIFEST_KEY}") is not None]
    if splits:
        return f"{bucket.url} holds no manifest.json, but its folders do: use {' or '.join(join(bucket.url, s) for s in splits)}"
    return f"{bucket.url} holds no shards: no manifest.json is there; make it with: vaejob pack SOURCE {bucket.url}"
