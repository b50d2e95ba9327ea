"""Images inside zip files. Nothing is extracted, so no member's path can do harm."""

import bz2
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from vaejob.data.sources.content import Content, ContentFile, open_content
from vaejob.data.sources.files import describe, is_image
from vaejob.data.sources.source import MOST_IMAGE_BYTES, Reopened, Sample, printable
from vaejob.errors import DataError

ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
"""What the parser raises over a damaged zip file."""

_MOST_DIRECTORY_BYTES = 1 << 30
_HEADER_BYTES = 30
_ENCRYPTED = 1
_INFLATERS: dict[int, Callable[[], Any]] = {
    zipfile.ZIP_DEFLATED: lambda: zlib.decompressobj(-zlib.MAX_WBITS),
    zipfile.ZIP_BZIP2: bz2.BZ2Decompressor,
}


class ZipMember(NamedTuple):
    """What the directory of a zip file says of an image."""

    name: str
    header_offset: int
    packed_size: int
    size: int
    crc32: int
    method: int


@dataclass(frozen=True)
class ZipSource(Reopened):
    """The images of a zip file, by name."""

    content: Content
    members: list[ZipMember]
    description: str

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(printable(member.name), f"{member.size} {member.crc32:08x}") for member in self.members]

    def read(self, index: int) -> bytes:
        member = self.members[index]
        try:
            return _unpacked(member, _packed(self.content, member))
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            raise DataError(f"{self.content.address}: {printable(member.name)} cannot be read: {error}") from error


def open_zip(address: str, *, version: str | None = None) -> ZipSource:
    content = open_content(address, version)
    try:
        with zipfile.ZipFile(ContentFile(content, most_bytes=_MOST_DIRECTORY_BYTES)) as archive:
            listed = archive.infolist()
    except ZIP_DAMAGE as error:
        raise DataError(f"{address} is no complete zip file: {error}") from error
    files = {info.filename: info for info in listed if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)}
    members = [_member(address, files[name]) for name in sorted(filter(is_image, files))]
    return ZipSource(content, members, describe("zip", address, len(members), len(files)))


def _member(address: str, info: zipfile.ZipInfo) -> ZipMember:
    name = f"{address}: {printable(info.filename)}"
    if info.flag_bits & _ENCRYPTED:
        raise DataError(f"{name} is encrypted; make a zip file without a password")
    if info.compress_type != zipfile.ZIP_STORED and info.compress_type not in _INFLATERS:
        raise DataError(f"{name} is compressed by method {info.compress_type}; it must be stored, deflate or bzip2")
    if max(info.file_size, info.compress_size) > MOST_IMAGE_BYTES:
        raise DataError(f"{name} has {info.file_size} bytes; an image has at most {MOST_IMAGE_BYTES}")
    return ZipMember(
        info.filename, info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type
    )


def _packed(content: Content, member: ZipMember) -> bytes:
    header = _read(content, member.header_offset, _HEADER_BYTES)
    if not header.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile(f"no header is at byte {member.header_offset}")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return _read(content, member.header_offset + _HEADER_BYTES + name_bytes + extra_bytes, member.packed_size)


def _read(content: Content, start: int, size: int) -> bytes:
    if not 0 <= start <= start + size <= content.size:
        raise zipfile.BadZipFile(f"bytes {start} to {start + size} are outside the file")
    return content.read(start, start + size)


def _unpacked(member: ZipMember, packed: bytes) -> bytes:
    """The image; never more memory than the directory says, however far the bytes would inflate."""
    inflater = _INFLATERS.get(member.method)
    data = packed if inflater is None else inflater().decompress(packed, member.size + 1)
    if len(data) != member.size:
        more = "more" if len(data) > member.size else f"only {len(data)}"
        raise zipfile.BadZipFile(f"it should have {member.size} bytes and has {more}")
    if zlib.crc32(data) != member.crc32:
        raise zipfile.BadZipFile(f"Bad CRC-32: it is {zlib.crc32(data):08x} and should be {member.crc32:08x}")
    return data
