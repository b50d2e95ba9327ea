"""Indexing: a manifest for Parquet files that are already there, which are read once and then used in place.

names --> splits; footers --> rows; each file, once: image column --decoded--> digests, all of it --> checksums --> manifest

Each split becomes a data set in a folder of its name; nothing is written into the files. Which split a file is of:

    train-00000-of-00003-0a1b2c3d.parquet    its name without its number, and what follows the number: train
    00000.parquet, part-0000.parquet         such a name says nothing: that of its folder
    train/..., test/...                      files in several folders: that of its folder; a folder called data is none

What was found in a file is kept until the manifest is there, so repeating an interrupted run goes on where it was.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from vaejob.data.ahead import map_ahead
from vaejob.data.fingerprint import fingerprint
from vaejob.data.groups import shards_bucket
from vaejob.data.inplace import Kind, Result, count_rows, find_kind, read_file
from vaejob.data.manifest import (
    MANIFEST_KEY,
    ROW_GROUP,
    Manifest,
    Shard,
    read_manifest,
    write_manifest,
    write_row_groups,
)
from vaejob.data.progress import counter
from vaejob.data.sources.content import Content, version_of
from vaejob.data.sources.files import files_in, is_file
from vaejob.errors import BucketError, DataError, ObjectMissing
from vaejob.storage import Bucket, absolute, join, open_bucket, split_address

FILES_AT_ONCE = 2
_INDEXING = "indexing/"

_NUMBERED = re.compile(r"(?P<split>.*?)((^|[-_.])\d+|\d{4,})(-of-\d+)?(-[0-9a-f-]{6,})?(\.\w+)*", re.IGNORECASE)
_SAY_NOTHING = ("", "part", "shard", "chunk", "file", "data")


class Indexed(NamedTuple):
    """A split that has its manifest."""

    address: str
    manifest: Manifest
    was_there: bool
    """Nothing had to be done."""


def index(
    dest: str,
    *,
    column: str | None = None,
    split: str | None = None,
    out: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Indexed]:
    """Makes the splits of the Parquet files at an address into data sets, in folders of `out` or beside the files.

    Raises DataError, in one line, for files that cannot be used in place or that are others than were indexed before.
    """
    folder, versions = _parquet_files(dest)
    target = folder if out is None else absolute(out)
    if out is None and open_bucket(folder).size(MANIFEST_KEY) is not None:
        manifest = _unchanged(open_bucket(folder), folder, versions, column=column)
        return {manifest.split: Indexed(folder, manifest, was_there=True)}
    named = _chosen(splits_of(versions, folder=folder), split=split, dest=dest)
    found, work = dict[str, Indexed](), dict[str, _Work]()
    for name, keys in named.items():
        bucket, files = open_bucket(join(target, name)), {key: versions[key] for key in keys}
        if bucket.size(MANIFEST_KEY) is not None:
            found[name] = Indexed(bucket.url, _unchanged(bucket, folder, files, column=column), was_there=True)
            _forget(bucket)
        else:
            work[name] = _prepare(bucket, name, folder=folder, files=files, column=column)
    report = counter(on_progress, total=sum(one.images for one in work.values()))
    for name, one in work.items():
        at = "" if out is None and all(key.startswith(f"{name}/") for key in named[name]) else ".."
        manifest = _index_split(one, source=dest, shards_at=at if out is None else folder, on_images=report)
        found[name] = Indexed(one.bucket.url, manifest, was_there=False)
    return {name: found[name] for name in named}


def splits_of(keys: Iterable[str], *, folder: str) -> dict[str, list[str]]:
    """The files of each split, by the rule above, both in the order of their names. Raises DataError if it is not clear."""
    by_folder = dict[str, dict[str, list[str]]]()
    for key in sorted(keys):
        *parents, name = key.split("/")
        inside = "/".join(parent for parent in parents if parent != "data")
        by_folder.setdefault(inside, {}).setdefault(_split_in(name), []).append(key)
    if len(by_folder) == 1:
        [(inside, named)] = by_folder.items()
        fallback = (inside or folder.rstrip("/")).rpartition("/")[2] or "train"
        return {name or fallback: files for name, files in sorted(named.items())}
    splits = dict[str, list[str]]()
    for inside, named in by_folder.items():
        name = inside.rpartition("/")[2]
        if len(named) > 1 or not name or name in splits:
            raise DataError(
                f"{folder} holds Parquet files of several splits in several folders ({', '.join(by_folder) or '.'}); "
                "index them apart, by a folder or a pattern each"
            )
        splits[name] = next(iter(named.values()))
    return splits


def _split_in(file: str) -> str:
    stem = file[: -len(".parquet")]
    numbered = _NUMBERED.fullmatch(stem)
    name = numbered["split"] if numbered else stem
    return "" if name.lower() in _SAY_NOTHING else name


def _parquet_files(dest: str) -> tuple[str, dict[str, str]]:
    """The folder of the files, and their versions by their path in it."""
    if is_file(dest):
        parent, name = split_address(dest)
        return absolute(parent), {name: version_of(dest)}
    folder, versions = files_in(dest)
    files = {key: version for key, version in versions.items() if key.lower().endswith(".parquet")}
    if not files:
        raise DataError(f"{dest} holds no Parquet files; name a folder, a file or a pattern of them")
    return absolute(folder), files


def _chosen(splits: dict[str, list[str]], *, split: str | None, dest: str) -> dict[str, list[str]]:
    if split is None:
        return splits
    if split in splits:
        return {split: splits[split]}
    if len(splits) > 1:
        raise DataError(f"{dest} holds the splits {', '.join(splits)}; --split is {split}, it must be one of them")
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise DataError(f"--split is {split!r}; it must be a name, such as train")
    return {split: next(iter(splits.values()))}


def _unchanged(bucket: Bucket, folder: str, files: dict[str, str], *, column: str | None) -> Manifest:
    """The manifest that is there. Raises DataError if it is of other files, or of another column."""
    manifest = read_manifest(bucket)
    at = shards_bucket(bucket, manifest).url
    before = {join(at, shard.key): shard.size for shard in manifest.shards}
    now = {join(folder, key): int(version.split()[0]) for key, version in files.items()}
    way_out = f"delete {join(bucket.url, MANIFEST_KEY)}, or choose another --out"
    if changed := sorted(before.items() ^ now.items()):
        raise DataError(f"{bucket.url} was indexed when its files were others, such as {changed[0][0]}; {way_out}")
    if column is not None and column not in (manifest.column, manifest.column.rpartition(".")[0]):
        raise DataError(f"{bucket.url} was indexed by its column {manifest.column}, --column is {column}; {way_out}")
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A split to be indexed."""

    bucket: Bucket
    split: str
    folder: str
    files: list[tuple[str, str]]
    """(path in the folder, version) of each."""
    first_ids: list[int]
    """Sample id of each file's first row, and the number of images."""
    kind: Kind

    @property
    def images(self) -> int:
        return self.first_ids[-1]


def _prepare(bucket: Bucket, split: str, *, folder: str, files: dict[str, str], column: str | None) -> _Work:
    contents = [Content(join(folder, key), version) for key, version in files.items()]
    rows = list(map_ahead(count_rows, contents))
    kind = find_kind(contents[0], column=column)
    try:  # what cannot be written is better known before everything was read
        bucket.write(f"{_INDEXING}split.json", json.dumps({"folder": folder, "split": split}).encode())
    except BucketError as error:
        raise BucketError(f"{error}; --out ADDRESS puts the manifests elsewhere") from error
    first_ids = list(accumulate(rows, initial=0))
    return _Work(
        bucket=bucket, split=split, folder=folder, files=list(files.items()), first_ids=first_ids, kind=kind
    )  # fmt: skip


def _index_split(work: _Work, *, source: str, shards_at: str, on_images: Callable[[int], None]) -> Manifest:
    results = list(
        map_ahead(lambda number: _index_file(work, number, on_images), range(len(work.files)), threads=FILES_AT_ONCE)
    )
    table = np.array([tuple(row) for result in results for row in result.row_groups], dtype=ROW_GROUP)
    channels, height, width = work.kind.shape
    inside = f"{work.split}/" if shards_at == "" else ""
    manifest = Manifest(
        split=work.split,
        images=work.images,
        channels=channels,
        height=height,
        width=width,
        encoding=work.kind.encoding,
        layout="parquet",
        column=work.kind.column,
        shards_at=shards_at,
        fingerprint=fingerprint(sum(result.digests for result in results)),
        source=f"parquet {source} (column {work.kind.column}): {work.images} images, indexed in place",
        row_groups_sha256=write_row_groups(work.bucket, table),
        shards=tuple(
            result.shard.model_copy(update={"key": result.shard.key.removeprefix(inside)}) for result in results
        ),
    )
    write_manifest(work.bucket, manifest)  # the data set exists once its manifest does
    _forget(work.bucket)
    return manifest


def _index_file(work: _Work, number: int, on_images: Callable[[int], None]) -> Result:
    """One file's result, which may be there already."""
    (key, version), first_id = work.files[number], work.first_ids[number]
    about = [key, version, first_id, work.first_ids[number + 1] - first_id, *work.kind[:2], *work.kind.shape]
    kept = f"{_INDEXING}{number:06d}.json"
    if (result := _kept(work.bucket, kept, about)) is not None:
        on_images(result.shard.rows)
        return result
    result = read_file(Content(join(work.folder, key), version), key, work.kind, first_id=first_id, on_images=on_images)
    found = {"about": about, **result._asdict(), "shard": result.shard.model_dump(), "digests": f"{result.digests:x}"}
    work.bucket.write(kept, json.dumps(found).encode())
    return result


def _kept(bucket: Bucket, name: str, about: list[Any]) -> Result | None:
    try:
        found = json.loads(bucket.read(name))
        if found["about"] != about:
            return None
        return Result(Shard.model_validate(found["shard"]), found["row_groups"], int(found["digests"], 16))
    except (ObjectMissing, ValueError, LookupError, TypeError):
        return None


def _forget(bucket: Bucket) -> None:
    for key in bucket.keys(_INDEXING):
        bucket.delete(key)
