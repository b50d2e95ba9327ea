"""One Parquet file that is used where it lies: it is read once, from its first byte to its last, by ranges.

footer --> where the images of each row group lie --decoded--> digests; the whole file --> checksums
"""

import hashlib
import math
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vaejob.data.ahead import map_ahead
from vaejob.data.decode import decode_image, describe_shape
from vaejob.data.fingerprint import sample_digest
from vaejob.data.foreign import Footer, footer_of, parquet_images
from vaejob.data.manifest import MANIFEST_KEY, Shard, read_manifest
from vaejob.data.shards import Images
from vaejob.data.sources.content import Content
from vaejob.data.sources.parquet import open_parquet, read_footer, rows_of_groups
from vaejob.data.sources.probe import safe_metadata
from vaejob.errors import DataError
from vaejob.storage import open_bucket, split_address

_PIECE_BYTES = 8 << 20
_IMAGES_PER_TASK = 32
_MOST_BYTES = 2**32 - 1  # of a row group: what ROW_GROUP can say


class Kind(NamedTuple):
    """What every image of a split must be."""

    column: str
    encoding: Literal["raw", "encoded"]
    shape: tuple[int, int, int]


class Result(NamedTuple):
    """What is found in one file."""

    shard: Shard
    row_groups: list[list[int]]
    """As in ROW_GROUP."""
    digests: int


class _Piece(NamedTuple):
    """Bytes of a file: the images of a row group, or without one anything else."""

    start: int
    stop: int
    group: int | None = None
    """Counted over those that have rows."""
    rows: range = range(0)
    """The file's rows that it holds."""


def read_file(
    content: Content, key: str, kind: Kind, *, first_id: int, on_images: Callable[[int], None]
) -> Result:  # fmt: skip
    """Reads all of a file. Raises DataError for the first thing that keeps it from being used in place."""
    end, metadata = _footer(content)
    footer = _footer_of(content, metadata, kind)
    groups = _row_groups(content, footer, end=content.size - len(end))
    sha256, digests, table = hashlib.sha256(), 0, [[0] * 4 for _ in groups]
    pieces = _all_pieces(groups, content.size)
    read = map_ahead(lambda piece: content.read_once(piece.start, piece.stop), pieces, threads=1)
    for piece, body in zip(pieces, read, strict=True):
        sha256.update(body)
        if piece.group is not None:
            images = _images(content, footer, piece, body)
            digests += _digests(images, content.address, kind, first_id=first_id, rows=piece.rows)
            table[piece.group] = [len(piece.rows), len(body), piece.start, zlib.crc32(body)]
            on_images(len(piece.rows))
    shard = Shard(
        key=key,
        size=content.size,
        sha256=sha256.hexdigest(),
        footer_size=len(end),
        footer_crc32=zlib.crc32(end),
        rows=sum(len(group.rows) for group in groups),
        row_groups=len(groups),
    )
    return Result(shard, table, digests)


def _digests(images: Images, address: str, kind: Kind, *, first_id: int, rows: range) -> int:
    """The sum of the digests of a row group's images. Raises DataError for one that is of another shape."""

    def digest(row: int) -> int:
        name, image = f"{address} row {row}", images[row - rows.start]
        pixels = decode_image(image, name) if isinstance(image, memoryview) else image.reshape(kind.shape)
        if pixels.shape != kind.shape:
            raise DataError(_other_shape(name, pixels.shape, kind.shape))
        return sample_digest(first_id + row, pixels)

    some = (rows[start : start + _IMAGES_PER_TASK] for start in range(0, len(rows), _IMAGES_PER_TASK))
    return sum(map_ahead(lambda few: sum(map(digest, few)), some))


def _other_shape(name: str, found: tuple[int, ...], first: tuple[int, int, int]) -> str:
    what = f"{name} is {describe_shape(found)}, the first image is {describe_shape(first)}"
    if found[0] != first[0]:
        return f"{what}; convert them all to grey or all to RGB"
    return f"{what}; vaejob pack --size N makes them equal"


def _footer(content: Content) -> tuple[bytes, pq.FileMetaData]:
    """A file's last bytes, from its footer on, and what they say. Raises DataError if it is no complete Parquet file."""
    end = read_footer(content)
    return end, safe_metadata(content.address, end)


def count_rows(content: Content) -> int:
    _, metadata = _footer(content)
    rows = sum(rows_of_groups(content, metadata))
    if rows == 0:
        raise DataError(f"{content.address} has no rows; delete it, or name the others by a pattern")
    return rows


def find_kind(content: Content, *, column: str | None) -> Kind:
    """The column of images, found in the first file, and the shape of its first image."""
    end, metadata = _footer(content)
    schema = metadata.schema.to_arrow_schema()
    name = column or "image"
    if name in schema.names and pa.types.is_fixed_size_binary(kind := schema.field(name).type):
        return Kind(name, "raw", _shape_of_ours(content.address, name, image_bytes=kind.byte_width))
    path = open_parquet(content.address, column=column, version=content.version).column
    footer = footer_of(content.address, metadata, column=path)
    first = _row_groups(content, footer, end=content.size - len(end))[0]
    image = _images(content, footer, first, content.read_once(first.start, first.stop))[0]
    channels, height, width = decode_image(image, f"{content.address} row 0").shape
    return Kind(path, "encoded", (channels, height, width))


def _shape_of_ours(address: str, column: str, *, image_bytes: int) -> tuple[int, int, int]:
    folder, key = split_address(address)
    bucket = open_bucket(folder)
    if bucket.size(MANIFEST_KEY) is not None:
        manifest = read_manifest(bucket)
        if (manifest.encoding, manifest.column, manifest.dims) == ("raw", column, image_bytes) and any(
            shard.key == key for shard in manifest.shards
        ):
            return manifest.shape
    raise DataError(
        f"{address}: column {column} holds {image_bytes} bytes for every image; raw pixels have no shape, so only "
        "what vaejob packed can be indexed: pack them from image files, npz or idx"
    )


def _footer_of(content: Content, metadata: pq.FileMetaData, kind: Kind) -> Footer:
    footer = footer_of(content.address, metadata, column=kind.column)
    leaf = metadata.schema.column(footer.number)
    expected = ("FIXED_LEN_BYTE_ARRAY", math.prod(kind.shape)) if kind.encoding == "raw" else ("BYTE_ARRAY", 0)
    if (leaf.physical_type, leaf.length or 0) != expected or leaf.max_repetition_level:
        raise DataError(f"{content.address}: column {kind.column} is of another type than in the first file")
    return footer


def _row_groups(content: Content, footer: Footer, *, end: int) -> list[_Piece]:
    """The images of each row group. Raises DataError if they do not lie before `end`, each by itself."""
    groups, first_row = list[_Piece](), 0
    for index, number in enumerate(footer.row_groups):
        chunk, name = footer.chunk(index), f"{content.address} row group {number}"
        dictionary = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
        start = min(dictionary or chunk.data_page_offset, chunk.data_page_offset)
        stop, rows = start + chunk.total_compressed_size, footer.metadata.row_group(number).num_rows
        if not 0 < start < stop <= end or chunk.num_values != rows:
            found = f"bytes {start} to {stop} of {end} hold {chunk.num_values} images for {rows} rows"
            raise DataError(f"{name} is damaged: its footer says that {found}")
        if (size := max(stop - start, chunk.total_uncompressed_size)) > _MOST_BYTES:
            raise DataError(f"{name} holds {size} bytes of images; at most {_MOST_BYTES} are read at once: pack them")
        groups.append(_Piece(start, stop, index, range(first_row, first_row + rows)))
        first_row += rows
    if any(after.start < before.stop for before, after in pairwise(sorted(groups, key=_start))):
        raise DataError(f"{content.address} is damaged: its footer says that row groups overlap")
    return groups


def _all_pieces(groups: list[_Piece], size: int) -> list[_Piece]:
    """The whole file in order: the row groups' images, and what lies between them in pieces of bounded size."""
    pieces, place = list[_Piece](), 0
    for group in [*sorted(groups, key=_start), _Piece(size, size)]:
        between = range(place, group.start, _PIECE_BYTES)
        pieces += [_Piece(start, min(start + _PIECE_BYTES, group.start)) for start in between]
        pieces += [group] if group.rows else []
        place = group.stop
    return pieces


def _start(piece: _Piece) -> int:
    return piece.start


def _images(content: Content, footer: Footer, piece: _Piece, body: bytes) -> Images:
    assert piece.group is not None
    return parquet_images(
        content.address,
        body,
        footer=footer,
        index=piece.group,
        rows=len(piece.rows),
        offset=piece.start,
        file_size=content.size,
        first_row=piece.rows.start,
    )
