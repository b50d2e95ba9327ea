"""pack, inspect, verify: images into shards, and what is in them."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from vaejob.data.manifest import Manifest

_SECONDS_BETWEEN_LINES = 5.0

Data = Annotated[str, typer.Argument(help="Folder of a manifest.json, or the folder above its splits; local or in a bucket.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="Images: a folder tree, zip, tar or WebDataset, Parquet with a column of images, npz, MNIST idx or "
            "CIFAR .bin; local or in a bucket. The last part may be a pattern, such as 'data/train-*.parquet'."
        ),
    ],
    dest: Annotated[str, typer.Argument(help="Folder for the shards, local or in a bucket; each split gets a folder in it.")],
    split: Annotated[str, typer.Option(help="Name of the split, or names with fractions: train=0.9,test=0.1.")] = "train",
    size: Annotated[int | None, typer.Option(min=1, help="Crop to the centre square and resize to this many pixels.")] = None,
    encoding: Annotated[
        Literal["auto", "raw", "keep"],
        typer.Option(help="raw: pixels; keep: PNG, JPEG and WebP as they are, others as PNG; auto: raw up to 64x64."),
    ] = "auto",
    column: Annotated[
        str | None, typer.Option(help="Parquet column, npz array or WebDataset extension that holds the images.")
    ] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Size of a shard, about.")] = 64 << 20,
    row_group_bytes: Annotated[int, typer.Option(min=1, help="Size of what is fetched at once, about.")] = 1 << 20,
) -> None:
    """Turn images into Parquet shards with a manifest. Repeating the command finishes what was interrupted.

    Example: vaejob pack photos.zip s3://bucket/photos --split train=0.9,test=0.1 --size 64
    """
    from vaejob.data import pack as packing
    from vaejob.data.sources import open_source
    from vaejob.data.verify import data_sets
    from vaejob.storage import join

    images = open_source(source, column=column)
    before = {bucket.url for bucket in data_sets(dest)}
    with _progress("packing") as on_progress:
        manifests = packing.pack(
            images,
            dest,
            split=split,
            size=size,
            encoding=encoding,
            shard_bytes=shard_bytes,
            row_group_bytes=row_group_bytes,
            on_progress=on_progress,
        )
    print(images.description)
