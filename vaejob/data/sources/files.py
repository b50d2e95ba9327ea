"""Which files an address names."""

import fnmatch
import re

from vaejob.data.decode import IMAGE_SUFFIXES
from vaejob.data.sources.content import local_path
from vaejob.storage import open_bucket, split_address


def is_file(address: str) -> bool:
    if (path := local_path(address)) is not None:
        return path.is_file()
    parent, name = split_address(address)
    return not parent.endswith(":/") and open_bucket(parent).size(name) is not None


def files_in(address: str) -> tuple[str, dict[str, str]]:
    """A folder's address and the versions of the files below it, by name, from one listing.

    The last part of the address may be a pattern such as *.tar.
    """
    parent, pattern = split_address(address)
    is_pattern = re.search(r"[*?\[]", pattern) is not None
    folder = parent if is_pattern else address
    versions = {name: version for name, version in open_bucket(folder).versions().items() if not is_hidden(name)}
    return folder, {name: versions[name] for name in fnmatch.filter(versions, pattern)} if is_pattern else versions


def is_hidden(name: str) -> bool:
    """Whether a path is one of the files that file managers and macOS archives leave beside images."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def describe(kind: str, address: str, images: int, files: int) -> str:
    """What an archive or a folder holds."""
    others = f", {files - images} other files left out" if files > images else ""
    return f"{kind} {address}: {images} images{others}"


def is_image(name: str) -> bool:
    """Whether a member of an archive is an image to pack."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name.removeprefix("./"))
