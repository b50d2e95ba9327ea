"""What is in a data set: its shards, their row groups and checksums, the shape of its images, and its fingerprint.

A data set is a folder of Parquet shards and one manifest.json, which is written last: without it there is no data set.
Row i of the data set, counted over the shards in their order, is the sample with id i.
"""

from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vaejob.errors import DataError, ObjectMissing
from vaejob.storage import Bucket, join

MANIFEST_KEY = "manifest.json"
FORMAT: Final = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RowGroup(_Part):
    """Consecutive rows of a shard that are fetched together."""

    rows: int = Field(ge=1)
    offset: int = Field(ge=0)
    """First byte of the row group's column chunks in the shard's file."""
    size: int = Field(ge=1)
    """Bytes of the row group's column chunks."""
    crc32: int = Field(ge=0, lt=2**32)
    """zlib.crc32 of those bytes."""


class Shard(_Part):
    """One Parquet file."""

    key: str
    """File name in the data set's folder."""
    size: int = Field(ge=1)
    sha256: str
    footer_size: int = Field(ge=1)
    """Bytes at the end of the file that hold Parquet's footer, its length and its magic: file[size - footer_size:]."""
    footer_crc32: int = Field(ge=0, lt=2**32)
    """zlib.crc32 of those bytes; a damaged footer is not to reach Parquet's parser, which may end the process."""
    row_groups: tuple[RowGroup, ...] = Field(min_length=1)

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)


class Manifest(_Part):
    """The one description of a data set that everything else reads."""

    format: Literal[1] = FORMAT
    split: str
    images: int = Field(ge=1)
    channels: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    encoding: Literal["raw", "encoded"]
    """raw: column `image` holds C*H*W bytes, planar; encoded: it holds a PNG, JPEG or WebP file."""
    fingerprint: str
    """Sum over the samples of sha256(id, shape, pixels) modulo 2^256, in hex: the same however they are sharded or encoded."""
    source: str
    """What was packed, for people."""
    plan: str = ""
    """Hash of the source's samples and the settings of `vaejob pack`; empty for shards that were indexed where they lay."""
    shards: tuple[Shard, ...] = Field(min_length=1)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def dims(self) -> int:
        """Dimensions of one image: channels x height x width."""
        return self.channels * self.height * self.width

    def row_group_rows(self) -> np.ndarray:
        """Rows of every row group of the data set, in order; shape [row groups], int64."""
        return np.array([group.rows for shard in self.shards for group in shard.row_groups], dtype=np.int64)


def read_manifest(bucket: Bucket) -> Manifest:
    """The manifest of the data set in this bucket. Raises DataError if it is missing, damaged, or does not add up."""
    address = join(bucket.url, MANIFEST_KEY)
    try:
        text = bucket.read(MANIFEST_KEY)
    except ObjectMissing:
        raise DataError(_no_manifest(bucket)) from None
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


def write_manifest(bucket: Bucket, manifest: Manifest) -> None:
    bucket.write(MANIFEST_KEY, manifest.model_dump_json(indent=1).encode())


def _no_manifest(bucket: Bucket) -> str:
    splits = [name for name in bucket.folders() if bucket.size(f"{name}/{MANIFEST_KEY}") is not None]
    if splits:
        return f"{bucket.url} holds no manifest.json, but its folders do: use {' or '.join(join(bucket.url, s) for s in splits)}"
    return f"{bucket.url} holds no shards: no manifest.json is there; make it with: vaejob pack SOURCE {bucket.url}"
