"""Where images come from: folder trees, zip and tar files, Parquet, arrays; all behind one ImageSource."""

import re
from collections.abc import Callable

from vaejob.data.ahead import map_ahead
from vaejob.data.decode import IMAGE_SUFFIXES
from vaejob.data.sources.arrays import ArraySource, open_cifar, open_idx, open_npz
from vaejob.data.sources.files import describe, files_in, is_file
from vaejob.data.sources.folder import FolderSource, JoinedSource
from vaejob.data.sources.parquet import open_parquet
from vaejob.data.sources.source import ImageSource, Sample
from vaejob.data.sources.tars import open_tar
from vaejob.data.sources.zips import open_zip
from vaejob.errors import DataError
from vaejob.storage import join

__all__ = ["ArraySource", "FolderSource", "ImageSource", "JoinedSource", "Sample", "open_source"]

_KINDS = {
    "images": "|".join(re.escape(suffix) + "$" for suffix in IMAGE_SUFFIXES),
    "zip files": r"\.zip$",
    "tar files": r"\.(tar|tar\.gz|tgz)$",
    "Parquet files": r"\.parquet$",
    "npz files": r"\.npz$",
    "CIFAR records": r"(^|/)(data_batch_\d|test_batch|train|test)\.bin$",
    "idx files": r"(^|/)(?!.*labels)[^/]*(ubyte|\.idx\d?)(\.gz)?$",
}
_HELD_OUT = re.compile(r"(test|t10k|val|valid|validation|dev|eval)(?![a-z])", re.IGNORECASE)


def open_source(address: str, *, column: str | None = None) -> ImageSource:
    """The images at an address: a file, a folder, or a pattern of files in a folder.

    Raises DataError for what is missing, damaged or ambiguous.
    """
    if is_file(address):
        return _open_file(address, column=column)
    folder, versions = files_in(address)
    names = list(versions)
    by_kind = {kind: [name for name in names if _kind(name) == kind] for kind in _KINDS}
    found = {kind: chosen for kind, chosen in by_kind.items() if chosen}
    if not found:
        what = f"holds no images among its {len(names)} files" if names else "does not exist or is empty"
        raise DataError(
            f"{address} {what}; a source is a folder, zip or tar of images, Parquet, npz, idx or CIFAR records"
        )
    if len(found) > 1:
        counts = " and ".join(f"{len(chosen)} {kind}" for kind, chosen in found.items())
        raise DataError(f"{address} holds {counts}; name one kind, such as {join(folder, '*' + _suffix(found))}")
    kind, chosen = found.popitem()
    _refuse_mixed_splits(folder, chosen, kind=kind)
    if kind == "images":
        description = describe("folder", address, len(chosen), len(names))
        return FolderSource(folder, {name: versions[name] for name in chosen}, description)
    opened = map_ahead(lambda name: _open_file(join(folder, name), column=column, version=versions[name]), chosen)
    return JoinedSource(f"{address}: {len(chosen)} {kind}", dict(zip(chosen, opened, strict=True)))


def _open_file(address: str, *, column: str | None, version: str | None = None) -> ImageSource:
    openers: dict[str, Callable[[], ImageSource]] = {
        "zip files": lambda: open_zip(address, version=version),
        "tar files": lambda: open_tar(address, member=column, version=version),
        "Parquet files": lambda: open_parquet(address, column=column, version=version),
        "npz files": lambda: open_npz(address, column=column, version=version),
        "CIFAR records": lambda: open_cifar(address, version=version),
        "idx files": lambda: open_idx(address, version=version),
    }
    kind = _kind(address)
    if kind not in openers:
        raise DataError(
            f"{address} is no zip, tar, Parquet, npz, idx images or CIFAR .bin file; name one, or a folder of images"
        )
    return openers[kind]()


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name, re.IGNORECASE)), None)


def _suffix(found: dict[str, list[str]]) -> str:
    return "." + next(iter(found.values()))[0].rpartition(".")[2]


def _refuse_mixed_splits(folder: str, names: list[str], *, kind: str) -> None:
    """Held-out images must not slip into the training set because both lie in one folder."""
    tops = sorted({name.split("/")[0] for name in names if "/" in name or kind != "images"})
    held_out = [top for top in tops if _HELD_OUT.match(top)]
    rest = [top for top in tops if top not in held_out]
    if held_out and rest:
        pattern = join(folder, re.split(r"[^A-Za-z]", rest[0])[0] + "*")
        found = f"held-out images ({held_out[0]}) beside others ({rest[0]})"
        raise DataError(f"{folder} holds {found}; pack them apart, by a pattern such as '{pattern}'")
