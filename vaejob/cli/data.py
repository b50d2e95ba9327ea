"""pack, index, inspect, verify: images into data sets, and what is in them."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vaejob.cli.terminal import images_done, say, say_json, warn

if TYPE_CHECKING:
    from vaejob.data.manifest import Manifest
    from vaejob.data.pack import Packer

_LARGE_ROW_GROUP = 256 << 20

Data = Annotated[
    str, typer.Argument(help="Folder of a manifest.json, or the folder above its splits; local or in a bucket.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only warnings and the result.")]


def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="Images: a folder tree, zip, tar or WebDataset, Parquet with a column of images, npz, MNIST idx or "
            "CIFAR .bin; local or in a bucket. The last part may be a pattern, such as 'data/train-*.parquet'."
        ),
    ],
    dest: Annotated[
        str, typer.Argument(help="Folder for the shards, local or in a bucket; each split gets a folder in it.")
    ],
    split: Annotated[
        str, typer.Option(help="Name of the split, or names with fractions: train=0.9,test=0.1.")
    ] = "train",
    size: Annotated[
        int | None, typer.Option(min=1, help="Crop to the centre square and resize to this many pixels.")
    ] = None,
    encoding: Annotated[
        Literal["auto", "raw", "keep"],
        typer.Option(help="raw: pixels; keep: PNG, JPEG and WebP as they are, others as PNG; auto: raw up to 64x64."),
    ] = "auto",
    column: Annotated[
        str | None, typer.Option(help="Parquet column, npz array or WebDataset extension that holds the images.")
    ] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Size of a shard, about.")] = 64 << 20,
    row_group_bytes: Annotated[int, typer.Option(min=1, help="Size of what is fetched at once, about.")] = 1 << 20,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Pack by Ray Data: on the cluster of RAY_ADDRESS, else on all of this machine."),
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster of --cluster, HOST:6379; default RAY_ADDRESS.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Turn images into Parquet shards with a manifest. Repeating the command finishes what was interrupted.

    \b
    Examples:
      vaejob pack photos.zip s3://bucket/photos --split train=0.9,test=0.1
      vaejob pack 's3://bucket/photos/*.tar' s3://bucket/packed --cluster
    """
    from vaejob.data.manifest import MANIFEST_KEY
    from vaejob.data.pack import pack as pack_images
    from vaejob.data.sources import open_source
    from vaejob.data.verify import data_sets
    from vaejob.storage import absolute, join, open_bucket

    if cluster or address:  # whose workers have working directories of their own
        source, dest = absolute(source), absolute(dest)
    images = open_source(source, column=column)
    there_before = {found.url for found in data_sets(dest) if found.size(MANIFEST_KEY) is not None}
    try:
        with (
            _packer(cluster=cluster, address=address, source=source, dest=dest) as packer,
            images_done("packing", quiet=quiet) as on_progress,
        ):
            manifests = pack_images(
                images,
                dest,
                split=split,
                size=size,
                encoding=encoding,
                shard_bytes=shard_bytes,
                row_group_bytes=row_group_bytes,
                on_progress=on_progress,
                packer=packer,
            )
    except KeyboardInterrupt:
        warn("stopped; repeat the command to go on")
        raise typer.Exit(130) from None
    for name, manifest in manifests.items():
        was_there = open_bucket(join(dest, name)).url in there_before
        say(f"{name}: {'already packed, ' if was_there else ''}{_describe(manifest)}", indent=2)
    say(f"look at it with: vaejob inspect {dest}")


def index(
    dest: Annotated[
        str,
        typer.Argument(
            help="Parquet files with a column of image files, as Hugging Face lays them out: a folder, a file, or a "
            "pattern such as 'photos/data/train-*.parquet'; local or in a bucket."
        ),
    ],
    column: Annotated[
        str | None, typer.Option(help="The column of images, where its name or type does not tell.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Only this split; of files whose names tell of no more than one, its name.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder for the manifests, where they cannot lie beside the files.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a manifest for Parquet files that are already there, which are read once and used in place.

    A split is what comes before the number in a file's name (train-00000-of-00003.parquet), or else its folder
    (train/0000.parquet); each becomes a data set in a folder of its name. Repeating the command finishes what was
    interrupted.

    \b
    Example:
      vaejob index s3://bucket/photos
      vaejob train job.yaml data.train=s3://bucket/photos/train
    """
    from vaejob.data.index import index as index_files

    with images_done("indexing", quiet=quiet) as on_progress:
        splits = index_files(dest, column=column, split=split, out=out, on_progress=on_progress)
    for name, found in splits.items():
        if note := _memory_note(found.address):
            warn(f"{name}: {note}")
    if as_json:
        found_there = [_summary(one.address, one.manifest) | {"was_there": one.was_there} for one in splits.values()]
        say_json({"splits": found_there})
        return
    for name, found in splits.items():
        say(f"{name}: {'already indexed, ' if found.was_there else ''}{_describe(found.manifest)}", indent=2)
    first = splits.get("train") or next(iter(splits.values()))
    say(f"train on it with: vaejob train CONFIG data.train={first.address}")


def inspect(data: Data, as_json: AsJson = False) -> None:
    """Show what is in a data set, from its manifest alone.

    \b
    Example:
      vaejob inspect s3://bucket/photos
    """
    from vaejob.data.manifest import read_manifest
    from vaejob.data.verify import data_sets

    found = {bucket.url: read_manifest(bucket) for bucket in data_sets(data)}
    if as_json:
        say_json({"splits": [_summary(url, manifest) for url, manifest in found.items()]})
        return
    for url, manifest in found.items():
        say(f"{manifest.split}: {_describe(manifest)}", indent=2)
        say(f"  at     {url}\n  source {manifest.source}")


def verify(data: Data, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Read all of a data set: check every size, checksum and id, decode every image, recompute the fingerprint.

    \b
    Example:
      vaejob verify s3://bucket/photos
    """
    from vaejob.data.verify import data_sets
    from vaejob.data.verify import verify as verify_all

    checked = []
    for bucket in data_sets(data):
        with images_done(f"verifying {bucket.url.rstrip('/').rsplit('/', 1)[-1]}", quiet=quiet) as on_progress:
            manifest = verify_all(bucket, on_progress=on_progress)
        checked.append(_summary(bucket.url, manifest) | {"verified": True})
        if not as_json:
            say(f"{manifest.split}: all is as it was packed: {_describe(manifest)}", indent=2)
    if as_json:
        say_json({"splits": checked})


def _memory_note(address: str) -> str | None:
    """What a worker will need, where row groups are larger than one would choose."""
    from vaejob.config import DataConfig
    from vaejob.data.batches import open_data

    data = open_data(address)
    if (largest := int(data.row_groups["size"].max())) <= _LARGE_ROW_GROUP:
        return None
    needed = data.reader_bytes(DataConfig(train=address)) / 2**30
    return (
        f"its row groups hold up to {largest / 2**20:,.0f} MiB of images; with the settings' defaults one worker needs "
        f"{needed:,.1f} GiB to read them: lower data.lanes, or use vaejob pack"
    )


def _packer(*, cluster: bool, address: str | None, source: str, dest: str) -> "AbstractContextManager[Packer]":
    """What packs the shards: threads of this process, or the tasks of a Ray cluster."""
    if not (cluster or address):
        from vaejob.data.part import pack_here

        return nullcontext(pack_here)
    from vaejob.cluster.pack import cluster_packer
    from vaejob.config import ClusterConfig

    return cluster_packer(ClusterConfig(address=address), addresses=(source, dest), on_note=warn)


def _summary(url: str, manifest: "Manifest") -> dict[str, Any]:
    return {
        "address": url,
        "split": manifest.split,
        "images": manifest.images,
        "shape": list(manifest.shape),
        "encoding": manifest.encoding,
        "shards": len(manifest.shards),
        "row_groups": manifest.row_groups,
        "bytes": sum(shard.size for shard in manifest.shards),
        "fingerprint": manifest.fingerprint,
        "source": manifest.source,
    }


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _describe(manifest: "Manifest") -> str:
    found = _summary("", manifest)
    shape = " x ".join(map(str, manifest.shape))
    groups, size = found["row_groups"], found["bytes"] / 2**20
    return (
        f"{manifest.images:,} images of {shape} (channels x height x width), {manifest.encoding}, "
        f"{_many(len(manifest.shards), 'shard')}, {_many(groups, 'row group')}, {size:,.1f} MiB, "
        f"fingerprint {manifest.fingerprint[:12]}"
    )
