"""Packing: from any source of images to Parquet shards and, last of all, their manifest.

source --bytes or pixels--> image --stored bytes--> rows --> row groups --> shards --> manifest

Each split is a data set of its own. The same source and settings give the same bytes, so packing that was interrupted is
finished by repeating it: the complete shards of the same plan are checked and kept.
"""

import re
from collections.abc import Callable

from vaejob.data.fingerprint import fingerprint
from vaejob.data.manifest import MANIFEST_KEY, Manifest, read_manifest, write_manifest
from vaejob.data.part import Part, packed_shards
from vaejob.data.recipe import Encoding, choose_recipe
from vaejob.data.sources import ImageSource, open_source
from vaejob.data.splits import divide, parse_split
from vaejob.errors import DataError
from vaejob.storage import Bucket, join, open_bucket

SHARD_BYTES = 64 << 20
ROW_GROUP_BYTES = 1 << 20


def pack(
    source: ImageSource | str,
    dest: str,
    *,
    split: str = "train",
    size: int | None = None,
    encoding: Encoding = "auto",
    shard_bytes: int = SHARD_BYTES,
    row_group_bytes: int = ROW_GROUP_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Manifest]:
    """Packs a source into the folders dest/<split>, and returns their manifests.

    Raises DataError for an image that cannot be used, and where other data is in the way.
    """
    images = open_source(source) if isinstance(source, str) else source
    fractions = parse_split(split)
    if not images.samples:
        raise DataError(f"{images.description}: there is nothing to pack")
    chosen = divide([sample.key for sample in images.samples], fractions)
    if empty := [name for name, indices in chosen.items() if not indices]:
        raise DataError(
            f"split {empty[0]} would be empty; {len(images.samples)} images are too few for --split {split}"
        )
    recipe = choose_recipe(images, size=size, encoding=encoding)
    parts = [
        Part(
            source=images,
            split=name,
            indices=indices,
            bucket=open_bucket(join(dest, name)),
            recipe=recipe,
            shard_bytes=shard_bytes,
            row_group_bytes=row_group_bytes,
        )
        for name, indices in chosen.items()
    ]
    finished = {part.split: manifest for part in parts if (manifest := _finished(part)) is not None}
    report = _progress(on_progress, total=sum(len(part.indices) for part in parts if part.split not in finished))
    return {part.split: finished.get(part.split) or _pack_part(part, on_images=report) for part in parts}


def _finished(part: Part) -> Manifest | None:
    """The manifest that is there already. Raises DataError if it is of another plan."""
    if part.bucket.size(MANIFEST_KEY) is None:
        return None
    manifest = read_manifest(part.bucket)
    if manifest.plan != part.plan():
        was = f"{part.bucket.url} was packed from other images or with other settings ({manifest.source})"
        raise DataError(f"{was}; delete it, or choose another DEST")
    return manifest


def _pack_part(part: Part, *, on_images: Callable[[int], None]) -> Manifest:
    plan = part.plan()
    packed = list(packed_shards(part, plan, on_images=on_images))
    _delete_strays(part.bucket, kept={shard.key for shard, _ in packed})
    channels, height, width = part.recipe.shape
    resized = f", cropped and resized to {part.recipe.size} x {part.recipe.size}" if part.recipe.size else ""
    manifest = Manifest(
        split=part.split,
        images=len(part.indices),
        channels=channels,
        height=height,
        width=width,
        encoding=part.recipe.encoding,
        fingerprint=fingerprint(sum(digests for _, digests in packed)),
        source=part.source.description + resized,
        plan=plan,
        shards=tuple(shard for shard, _ in packed),
    )
    write_manifest(part.bucket, manifest)  # the data set exists once its manifest does
    return manifest


def _delete_strays(bucket: Bucket, *, kept: set[str]) -> None:
    """Removes what an earlier run with smaller shards left behind."""
    for key in bucket.keys():  # noqa: SIM118 - a bucket is no dict
        if re.fullmatch(r"\d{5,}\.parquet", key) and key not in kept:
            bucket.delete(key)


def _progress(on_progress: Callable[[int, int], None] | None, *, total: int) -> Callable[[int], None]:
    done = 0

    def add(images: int) -> None:
        nonlocal done
        done += images
        if on_progress is not None:
            on_progress(done, total)

    return add
