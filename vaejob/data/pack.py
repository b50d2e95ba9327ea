"""Packing: from any source of images to Parquet shards and, last of all, their manifest.

source --bytes or pixels--> image --stored bytes--> rows --> row groups --> shards --> manifest

Each split is a data set of its own. The same images and settings give the same bytes, wherever and by however many machines
they are packed; packing that was interrupted is finished by repeating it: whole shards of the same plan are kept.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from vaejob.data.fingerprint import fingerprint
from vaejob.data.manifest import MANIFEST_KEY, Manifest, read_manifest, write_manifest, write_row_groups
from vaejob.data.part import PACKING_KEY, Packed, Part, begin, pack_here
from vaejob.data.progress import counter
from vaejob.data.recipe import Encoding, choose_recipe, stored_bytes
from vaejob.data.sources import ImageSource, open_source
from vaejob.data.splits import divide, parse_split
from vaejob.errors import DataError
from vaejob.storage import join

SHARD_BYTES = 64 << 20
ROW_GROUP_BYTES = 1 << 20

Packer = Callable[..., Iterator[Packed]]
"""packer(part, on_images=...) writes the shards of a part and gives them in order, like `part.pack_here`."""


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
    packer: Packer = pack_here,
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
    per_image = stored_bytes(images, recipe)
    group_rows = max(1, round(row_group_bytes / per_image))
    shard_rows = max(1, round(shard_bytes / (group_rows * per_image))) * group_rows
    parts = [
        Part(
            source=images,
            split=name,
            indices=indices,
            address=join(dest, name),
            recipe=recipe,
            group_rows=group_rows,
            shard_rows=shard_rows,
            shard_bytes=round(min(shard_rows, len(indices)) * per_image),
        )
        for name, indices in chosen.items()
    ]
    finished = {part.split: manifest for part in parts if (manifest := _finished(part)) is not None}
    report = counter(on_progress, total=sum(len(part.indices) for part in parts if part.split not in finished))
    run = partial(packer, on_images=report)
    return {part.split: finished.get(part.split) or _pack_part(part, run) for part in parts}


def _finished(part: Part) -> Manifest | None:
    """The manifest that is there already. Raises DataError if it is of another plan."""
    if part.bucket.size(MANIFEST_KEY) is None:
        return None
    manifest = read_manifest(part.bucket)
    if manifest.plan != part.plan:
        was = f"{part.bucket.url} was packed from other images or with other settings ({manifest.source})"
        raise DataError(f"{was}; delete it, or choose another DEST")
    return manifest


def _pack_part(part: Part, run: Callable[[Part], Iterator[Packed]]) -> Manifest:
    begin(part)
    packed = list(run(part))
    channels, height, width = part.recipe.shape
    resized = f", cropped and resized to {part.recipe.size} x {part.recipe.size}" if part.recipe.size else ""
    manifest = Manifest(
        split=part.split,
        images=len(part.indices),
        channels=channels,
        height=height,
        width=width,
        encoding=part.recipe.encoding,
        fingerprint=fingerprint(sum(one.digests for one in packed)),
        source=part.source.description + resized,
        plan=part.plan,
        row_groups_sha256=write_row_groups(part.bucket, np.concatenate([one.row_groups for one in packed])),
        shards=tuple(one.shard for one in packed),
    )
    write_manifest(part.bucket, manifest)  # the data set exists once its manifest does
    part.bucket.delete(PACKING_KEY)
    return manifest
