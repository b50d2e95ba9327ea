"""Images inside tar files, WebDataset's among them. Nothing is extracted, so no member's path can do harm."""

import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from vaejob.data.sources.content import Content, ContentFile, open_content
from vaejob.data.sources.files import describe, is_image
from vaejob.data.sources.source import MOST_IMAGE_BYTES, Reopened, Sample, printable
from vaejob.errors import DataError

_MOST_HEADER_BYTES = 1 << 20


class TarMember(NamedTuple):
    """Where a file lies."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarSource(Reopened):
    """The images of a tar file, by name."""

    content: Content
    members: list[TarMember]
    description: str

    @cached_property
    def samples(self) -> list[Sample]:
        version = self.content.version
        return [Sample(printable(name), f"{size} {offset} {version}") for name, offset, size in self.members]

    def read(self, index: int) -> bytes:
        _, offset, size = self.members[index]
        return self.content.read(offset, offset + size)


def open_tar(address: str, *, member: str | None = None, version: str | None = None) -> TarSource:
    """A tar file; `member` names the extension of the image where a WebDataset's samples hold several."""
    content = open_content(address, version)
    try:
        files = {found.name: found for found in _members(content)}  # the last of a name, as if they were extracted
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{address} is no complete tar file: {error}") from error
    images = sorted(_one_image_per_sample(address, list(files), member=member))
    for name in images:
        if files[name].size > MOST_IMAGE_BYTES:
            size = f"{files[name].size} bytes; an image has at most {MOST_IMAGE_BYTES}"
            raise DataError(f"{address}: {printable(name)} has {size}")
    return TarSource(content, [files[name] for name in images], describe("tar", address, len(images), len(files)))


def _members(content: Content) -> Iterator[TarMember]:
    """Every plain file; links, devices and folders are passed over."""
    with tarfile.open(fileobj=ContentFile(content, most_bytes=_MOST_HEADER_BYTES), mode="r:") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            name = printable(info.name)
            if info.size < 0:
                raise tarfile.ReadError(f"{name} has {info.size} bytes")  # and the next header would be this one
            if info.isreg() and info.offset_data + info.size > content.size:
                raise tarfile.ReadError(f"it is cut off within {name}")
            if info.issparse():
                raise tarfile.ReadError(f"{name} is stored as a sparse file; make the tar file without --sparse")
            if info.isreg():
                yield TarMember(info.name, info.offset_data, info.size)
        end = archive.offset
    if any(content.read(end, min(end + tarfile.BLOCKSIZE, content.size))):  # tarfile takes damage for the end
        raise tarfile.ReadError(f"no header is at byte {end}")


def _one_image_per_sample(address: str, names: list[str], *, member: str | None) -> list[str]:
    """The images to pack: all of them, or in a WebDataset that of each sample, which shares its stem with other files."""
    images = list(filter(is_image, names))
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
