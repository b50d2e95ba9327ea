"""The order of samples: what it costs for a billion images, and how well it mixes beside the shufflers of its peers.

    python tests/benchmarks/order.py [--plot FILE.png] [--json FILE] [--seeds 5]

Scale: a manifest of 10^9 images in 10^5 shards is written to disk (no shard is: none is read); a fresh process opens it
and plans batches. Imports are not timed; memory is the whole process's peak.

Mixing: a million rows sorted by class, the worst case of a folder of classes, are laid in order by us and by our peers'
rules, which are written out here from their sources with their defaults. The order in which a *global* batch is handed
out does not matter to a step, so figures are about which rows share a batch, and where in the epoch it comes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from tests.benchmarks.peers.shufflers import (
    ROWS,
    SHARD_ROWS,
    huggingface,
    litdata,
    mosaicml,
    permutation,
    unshuffled,
    webdataset,
)
from vaejob.config import DataConfig
from vaejob.data.batches import DataSet
from vaejob.data.manifest import ROW_GROUP, Manifest, Shard, write_manifest, write_row_groups
from vaejob.data.order import RankPlan
from vaejob.storage import open_bucket

IMAGE_BYTES = 3 * 32 * 32

# Scale.
MOST_SECONDS, MOST_MB = 1.0, 500
MANY_SHARDS, GROUPS_OF_MANY, ROWS_OF_MANY = 10**5, 10, 1000
STEPS = ("open_data", "plan of the first batch", "plan from images_seen = 1.5e9")

# Mixing.
GROUP_ROWS, CLASSES, BATCH = 340, 100, 256
BATCHES = ROWS // BATCH
MATCHES_BY_CHANCE = (BATCH - 1) / (ROWS - 1)

Order = Callable[[int, int], np.ndarray]
"""(seed, epoch) to the epoch's row numbers, in the order they are seen."""
Unit = Literal["shard", "row group", "row"]


def write_description(address: str, *, shards: int, groups: np.ndarray) -> None:
    """A data set whose shards all have row groups of these many rows, and do not exist."""
    bucket, random = open_bucket(address), np.random.default_rng(0)
    table = np.zeros(shards * len(groups), dtype=ROW_GROUP)
    table["rows"] = np.tile(groups, shards)
    table["size"] = table["rows"] * IMAGE_BYTES
    table["offset"] = np.tile(4 + (np.cumsum(groups) - groups) * IMAGE_BYTES, shards)
    table["crc32"] = random.integers(2**32, size=len(table))
    rows = int(groups.sum())
    entries = tuple(
        Shard(
            key=f"train-{number:06d}-of-{shards:06d}.parquet",
            size=rows * IMAGE_BYTES + 4096,
            sha256=random.bytes(32).hex(),
            footer_size=4000,
            footer_crc32=int(random.integers(2**32)),
            rows=rows,
            row_groups=len(groups),
        )
        for number in range(shards)
    )
    manifest = Manifest(
        split="train",
        images=shards * rows,
        channels=3,
        height=32,
        width=32,
        encoding="raw",
        fingerprint=random.bytes(32).hex(),
        source="a benchmark",
        row_groups_sha256=write_row_groups(bucket, table),
        shards=entries,
    )
    write_manifest(bucket, manifest)


def measure_scale(rounds: int) -> list[dict[str, float]]:
    """Each round's seconds by step and peak MB, each from a process of its own."""
    with tempfile.TemporaryDirectory(prefix="order-") as folder:
        write_description(folder, shards=MANY_SHARDS, groups=np.full(GROUPS_OF_MANY, ROWS_OF_MANY))
        command = [sys.executable, __file__, "--open", folder]
        return [json.loads(subprocess.check_output(command)) for _ in range(rounds)]


def open_and_plan(address: str) -> dict[str, float]:
    """Seconds of each step by the clock and on the CPU, and this process's peak memory."""
    found = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        found[name], found[f"{name}, CPU"] = time.perf_counter() - wall, time.process_time() - cpu
        return result

    def first_batch(data: DataSet, *, images_seen: int) -> np.ndarray:
        plan = RankPlan(
            row_group_rows=data.row_group_rows,
            global_batch=4096,
            lanes=defaults().lanes,
            window_rows=defaults().window_rows,
            seed=0,
            rank=3,
            world_size=8,
        )
        return next(plan.batches(images_seen=images_seen, until=3 * data.manifest.images))[1]

    data = timed(STEPS[0], lambda: vaejob.open_data(address))
    for name, images_seen in zip(STEPS[1:], (0, 3 * data.manifest.images // 2), strict=True):
        ids = timed(name, partial(first_batch, data, images_seen=images_seen))
        assert len(np.unique(ids)) == 512, len(ids)
    return {**found, "peak MB": peak_mb()}


def peak_mb() -> float:
    # ru_maxrss would do, but a child inherits its parent's.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def scale_table(rounds: Sequence[dict[str, float]]) -> str:
    def cell(name: str) -> str:
        column = [each[name] for each in rounds]
        return f"{statistics.median(column):.2f} [{min(column):.2f}, {max(column):.2f}]"

    peaks = [each["peak MB"] for each in rounds]
    lines = [
        f"10^9 images, {MANY_SHARDS:,} shards, {MANY_SHARDS * GROUPS_OF_MANY:,} row groups; rank 3 of 8, batches of 4,096; "
        f"{len(rounds)} fresh processes, median [least, most].",
        "",
        "| step | seconds | CPU seconds | goal |",
        "|---|---|---|---|",
        *(f"| {name} | {cell(name)} | {cell(f'{name}, CPU')} | < {MOST_SECONDS:.0f} s |" for name in STEPS),
        f"| peak memory of the process | {statistics.median(peaks):.0f} MB | | < {MOST_MB} MB |",
    ]
    return "\n".join(lines)


def defaults() -> DataConfig:
    return DataConfig(train="nowhere")


def group_rows() -> np.ndarray:
    """Rows of the row groups of one shard: the last is what is left."""
    full, rest = divmod(SHARD_ROWS, GROUP_ROWS)
    return np.array([GROUP_ROWS] * full + [rest] * (rest > 0))


def ours(seed: int, epoch: int, *, lanes: int, window_rows: int) -> np.ndarray:
    plan = RankPlan(
        row_group_rows=np.tile(group_rows(), ROWS // SHARD_ROWS),
        global_batch=BATCH,
        lanes=lanes,
        window_rows=window_rows,
        seed=seed,
    )
    return np.concatenate([ids for _, ids in plan.batches(images_seen=epoch * ROWS, until=(epoch + 1) * ROWS)])


@dataclass(frozen=True)
class Method:
    """A way to shuffle, and what it fetches at once."""

    name: str
    family: str
    order: Order
    unit: Unit = "shard"
    buffer: int = 0
    """Rows held besides units that are begun."""
    is_drawn: bool = True


def our_method(lanes: int, window_rows: int) -> Method:
    name = f"ours, {lanes} lanes x {window_rows:,} rows"
    return Method(name, "ours", partial(ours, lanes=lanes, window_rows=window_rows), "row group")


OURS = [(defaults().lanes, defaults().window_rows), (64, 4096), (16, 1024)]
REFERENCE = Method("a true permutation", "", permutation, "row")
METHODS = [
    REFERENCE,
    *(our_method(*setting) for setting in OURS),
    Method("MosaicML py1s, 64 nodes", "MosaicML", partial(mosaicml, nodes=64)),
    Method("MosaicML py2s, 64 nodes", "MosaicML", partial(mosaicml, nodes=64, twice=True), is_drawn=False),
    Method("MosaicML py1e, block 2^18", "MosaicML", partial(mosaicml, nodes=1, block=2**18)),
    Method("MosaicML py1e, block 4,000,000", "MosaicML", partial(mosaicml, nodes=1, block=4_000_000)),
    Method("LitData, 1 reader, full", "LitData", partial(litdata, readers=1, block=SHARD_ROWS)),
    Method("LitData, 10 readers, full", "LitData", partial(litdata, readers=10, block=SHARD_ROWS)),
    Method("LitData, 10 readers, window 256", "LitData", partial(litdata, readers=10, block=256)),
    Method("WebDataset, 1 reader", "buffers", partial(webdataset, readers=1), "row", 1000),
    Method("WebDataset, 10 readers", "buffers", partial(webdataset, readers=10), "row", 10_000),
    Method("Hugging Face, 1 input", "buffers", partial(huggingface, inputs=1), "row group", is_drawn=False),
    Method("Hugging Face, 10 inputs", "buffers", partial(huggingface, inputs=10), "row group"),
    Method("no shuffle", "", unshuffled, "row"),
]
FAMILIES = {"ours": "Ours", "MosaicML": "MosaicML", "LitData": "LitData", "buffers": "WebDataset, Hugging Face"}
# Blue, vermilion and green of Okabe and Ito, told apart also by their dashes.
LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."))


class Mixing(NamedTuple):
    """Figures of one method and seed."""

    classes: float
    """Distinct classes in a batch, mean over batches."""
    classes_spread: float
    """Their standard deviation over batches."""
    variation: float
    """Total variation distance of a batch's classes from uniform, mean over batches."""
    distance: float
    """Median distance in the epoch of rows that are neighbours in the data, as a part of the epoch."""
    together: float
    """How often such neighbours share a batch, over how often any two rows do."""
    correlation: float
    """Of the rows' places in two epochs, its magnitude."""
    held: float
    """Most rows at once in units that are begun and not used up, and in buffers."""


def mixing(method: Method, *, seed: int) -> Mixing:
    order, next_order = (method.order(seed, epoch) for epoch in (0, 1))
    places, next_places = np.argsort(order), np.argsort(next_order)
    assert np.array_equal(order[places], np.arange(ROWS)), method.name
    counts = classes_by_batch(order)
    distinct, neighbours = (counts > 0).sum(axis=1), places // BATCH
    return Mixing(
        classes=float(distinct.mean()),
        classes_spread=float(distinct.std()),
        variation=float(np.abs(counts / BATCH - 1 / CLASSES).sum(axis=1).mean() / 2),
        distance=float(np.median(np.abs(np.diff(places)))) / ROWS,
        together=float((np.diff(neighbours) == 0).mean()) / MATCHES_BY_CHANCE,
        correlation=abs(float(np.corrcoef(places, next_places)[0, 1])),
        held=method.buffer + most_held(places, unit=method.unit),
    )


def classes_by_batch(order: np.ndarray) -> np.ndarray:
    """How often each class is in each whole batch; shape [batches, classes]."""
    classes = order[: BATCHES * BATCH] * CLASSES // ROWS
    cells = np.repeat(np.arange(BATCHES), BATCH) * CLASSES + classes
    return np.bincount(cells, minlength=BATCHES * CLASSES).reshape(BATCHES, CLASSES)


def most_held(places: np.ndarray, *, unit: Unit) -> int:
    if unit == "row":
        return 0
    rows = np.tile(group_rows(), ROWS // SHARD_ROWS) if unit == "row group" else np.full(ROWS // SHARD_ROWS, SHARD_ROWS)
    starts = np.cumsum(rows) - rows
    change = np.zeros(ROWS + 1, dtype=np.int64)
    np.add.at(change, np.minimum.reduceat(places, starts), rows)
    np.add.at(change, np.maximum.reduceat(places, starts) + 1, -rows)
    return int(np.cumsum(change).max())


def mixing_table(found: Mapping[str, Sequence[Mixing]]) -> str:
    expected = statistics.mean(each.variation for each in found[REFERENCE.name])
    seeds = len(found[REFERENCE.name])
    lines = [
        f"{ROWS:,} rows sorted by {CLASSES} classes, shards of {SHARD_ROWS:,} rows, row groups of {GROUP_ROWS}, batches of "
        f"{BATCH}; mean and standard deviation over {seeds} seeds.",
        "",
        "| order | classes in a batch | their spread over batches | class histogram's distance from uniform, permutation = 1 "
        "| median distance of neighbours / N | neighbours in one batch, chance = 1 | abs(correlation) of two epochs "
        "| rows held |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, columns in ((name, Mixing(*zip(*rows, strict=True))) for name, rows in found.items()):
        variation = [each / expected for each in columns.variation]
        cells = [
            around(columns.classes, 1),
            f"{statistics.mean(columns.classes_spread):.1f}",
            around(variation, 2),
            around(columns.distance, 4),
            around(columns.together, 1),
            around(columns.correlation, 3),
            f"{statistics.mean(columns.held):,.0f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def around(column: Sequence[float], digits: int) -> str:
    return f"{statistics.mean(column):.{digits}f} ± {statistics.pstdev(column):.{digits}f}"


def cost_table(settings: Sequence[tuple[int, int]]) -> str:
    """What mixing costs us: row groups that the first batch needs, and the bytes that a rank's reader may hold."""
    address = "memory://order"
    write_description(address, shards=ROWS // SHARD_ROWS, groups=group_rows())
    data = vaejob.open_data(address)
    lines = [
        f"Rows of {IMAGE_BYTES:,} bytes, row groups of {GROUP_ROWS * IMAGE_BYTES / 1e6:.1f} MB.",
        "",
        "| lanes x window_rows | row groups that the first batch touches | reader_bytes, 1 rank | reader_bytes, each of 8 |",
        "|---|---|---|---|",
    ]
    for lanes, window_rows in settings:
        config = DataConfig(train=address, global_batch=BATCH, lanes=lanes, window_rows=window_rows)
        first = ours(0, 0, lanes=lanes, window_rows=window_rows)[:BATCH]
        groups = len(np.unique(np.searchsorted(np.cumsum(data.row_group_rows), first, side="right")))
        sizes = (f"{data.reader_bytes(config, world_size=ranks) / 1e6:,.0f} MB" for ranks in (1, 8))
        lines.append(f"| {lanes} x {window_rows:,} | {groups} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def plot(file: Path, found: Mapping[str, Sequence[Mixing]]) -> None:
    """A column for each family: where in the epoch each part of the data is seen, and how far neighbours are thrown."""
    from matplotlib.figure import Figure  # not where memory is measured

    figure = Figure(figsize=(15, 14), layout="constrained")
    grid = figure.subplots(4, len(FAMILIES), gridspec_kw={"height_ratios": [1, 1, 1, 1.25]})
    expected = statistics.mean(each.classes for each in found[REFERENCE.name])
    even = neighbour_distances(REFERENCE.order(0, 0))
    for column, (family, title) in zip(grid.T, FAMILIES.items(), strict=True):
        below = column[-1]
        below.plot(*even, color="black", linestyle=":", label=REFERENCE.name)
        drawn = [method for method in METHODS if method.family == family and method.is_drawn]
        for panel, method, (color, line) in zip(column, drawn, LINES, strict=False):
            order = method.order(0, 0)
            image = panel.imshow(
                density(order), origin="lower", extent=(0, 100, 0, 100), vmin=0, vmax=3, cmap="cividis"
            )
            classes = statistics.mean(each.classes for each in found[method.name])
            panel.set_title(
                f"{method.name}\n{classes:.0f} classes in a batch (permutation: {expected:.0f})", fontsize=10
            )
            panel.set(aspect="auto", xlabel="place in the epoch, %", ylabel="place in the data, %")
            below.plot(*neighbour_distances(order), color=color, linestyle=line, label=method.name)
        below.axvline(BATCH, color="grey", linewidth=0.8)
        below.annotate(
            "a batch", (BATCH, 0.5), (-4, 0), textcoords="offset points", rotation=90, ha="right", color="grey"
        )
        below.set(xscale="log", xlim=(1, ROWS), ylim=(0, 1), xlabel="distance in the epoch, images")
        below.set_ylabel("part of neighbours no further apart")
        below.set_title(f"{title}:\nhow far neighbours in the data are thrown", fontsize=10)
        below.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    bar = figure.colorbar(image, ax=grid[:3], shrink=0.5, extend="max")
    bar.set_label("rows of this part of the data, even share = 1")
    figure.suptitle(
        f"{ROWS:,} rows sorted by class, shards of {SHARD_ROWS:,}, batches of {BATCH}. Even grey: mixed over the whole epoch; "
        "yellow on blue: read from one part of the data at a time"
    )
    figure.savefig(file, dpi=110)


def density(order: np.ndarray, *, bins: int = 100) -> np.ndarray:
    """How much of each part of the data is in each part of the epoch, even share = 1; shape [data, epoch]."""
    cells = order * bins // ROWS * bins + np.arange(ROWS) * bins // ROWS
    return np.bincount(cells, minlength=bins**2).reshape(bins, bins) * (bins**2 / ROWS)


def neighbour_distances(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A distance in the epoch, and the part of neighbouring rows that are no further apart."""
    apart = np.sort(np.abs(np.diff(np.argsort(order))))
    distances = np.unique(np.geomspace(1, ROWS, 400).astype(np.int64))
    return distances, np.searchsorted(apart, distances, side="right") / len(apart)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of the orders")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="a file for every single figure")
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--open", metavar="ADDRESS", help=argparse.SUPPRESS)  # what each fresh process does
    options = arguments.parse_args()
    if options.open:
        print(json.dumps(open_and_plan(options.open)))
        return
    scale = measure_scale(rounds=3)
    print(f"{scale_table(scale)}\n\nLoad {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n", flush=True)
    found = {method.name: [mixing(method, seed=seed) for seed in range(options.seeds)] for method in METHODS}
    print(f"{mixing_table(found)}\n\n{cost_table(OURS)}")
    if options.json:
        figures = {name: [each._asdict() for each in seeds] for name, seeds in found.items()}
        options.json.write_text(json.dumps({"scale": scale, "mixing": figures}, indent=1))
    if options.plot:
        plot(options.plot, found)


if __name__ == "__main__":
    main()
