"""Images inside zip and tar files, WebDataset's among them. Nothing is extracted, so no member's path can do harm."""

import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from mmap import mmap
from typing import Any

import pyarrow as pa

from vaejob.data.decode import IMAGE_SUFFIXES
from vaejob.data.sources.files import is_hidden, map_file
from vaejob.data.sources.source import Sample, printable
from vaejob.errors import DataError


@dataclass(frozen=True)
class ZipSource:
    """The images of a zip file, by name."""

    address: str
    archive: zipfile.ZipFile
    members: list[zipfile.ZipInfo]
    description: str

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(printable(member.filename), f"{member.file_size} {member.CRC:08x}") for member in self.members]

    def read(self, index: int) -> bytes:
        member = self.members[index]
        try:
            return self.archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{self.address}: {member.filename} cannot be read: {error}") from error


@dataclass(frozen=True)
class TarSource:
    """The images of a tar file, by name."""

    address: str
    content: mmap
    members: list[tarfile.TarInfo]
    description: str

    @cached_property
    def samples(self) -> list[Sample]:
        return [
            Sample(printable(member.name), f"{member.size} {zlib.crc32(self.read(i)):08x}")
            for i, member in enumerate(self.members)
        ]

    def read(self, index: int) -> bytes:
        member = self.members[index]
        data = self.content[member.offset_data : member.offset_data + member.size]
        if len(data) != member.size:
            raise DataError(f"{self.address} is cut off: it ends within {member.name}")
        return data


def open_zip(address: str) -> ZipSource:
    try:
        archive = zipfile.ZipFile(_as_file(map_file(address)))
    except zipfile.BadZipFile as error:
        raise DataError(f"{address} is no complete zip file: {error}") from error
    files = {member.filename: member for member in archive.infolist() if not member.is_dir()}
    images = sorted(filter(_is_image, files))
    return ZipSource(address, archive, [files[name] for name in images], _describe("zip", address, images, files))


def open_tar(address: str, *, member: str | None = None) -> TarSource:
    """A tar file; `member` names the extension of the image where a WebDataset's samples hold several."""
    content = map_file(address)
    try:
        with tarfile.open(fileobj=_as_file(content), mode="r:") as archive:
            files = {info.name: info for info in archive if info.isreg()}
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{address} is no complete tar file: {error}") from error
    images = sorted(_one_image_per_sample(address, list(files), member=member))
    return TarSource(address, content, [files[name] for name in images], _describe("tar", address, images, files))


def _one_image_per_sample(address: str, names: list[str], *, member: str | None) -> list[str]:
    """The images to pack: all of them, or in a WebDataset that of each sample, which shares its stem with other files."""
    images = list(filter(_is_image, names))
    if member is not None:
        return [name for name in images if _stem_and_extension(name)[1] == member]
    by_stem = defaultdict[str, set[str]](set)
    for name in images:
        stem, extension = _stem_and_extension(name)
        by_stem[stem].add(extension)
    is_webdataset = any(_stem_and_extension(name)[0] in by_stem for name in set(names) - set(images))
    several = next((extensions for extensions in by_stem.values() if len(extensions) > 1), None)
    if is_webdataset and several:
        found = ", ".join(sorted(several))
        raise DataError(f"{address} holds several images per sample: {found}; name one with --column")
    return images


def _stem_and_extension(name: str) -> tuple[str, str]:
    """WebDataset's rule: a sample's files share their path up to the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name.removeprefix("./"))


def _as_file(content: mmap) -> Any:
    return pa.BufferReader(pa.py_buffer(content))


def _describe(kind: str, address: str, images: list[str], files: Mapping[str, object]) -> str:
    others = f", {len(files) - len(images)} other files left out" if len(files) > len(images) else ""
    return f"{kind} {address}: {len(images)} images{others}"
