"""The MNIST table of Burda et al. (2016), shortened to what a CPU hour holds, and what its whole length would give.

    python tests/benchmarks/iwae.py --mnist FOLDER [--runs BUCKET] [--points FILE] [--only 1-50 ...] [--part 1]
    python tests/benchmarks/iwae.py --points FILE --table [--readme]

FOLDER holds packed images in train/ and test/. Each recipe mnist-iwae-LAYERS-CODES trains on one core for the images of HOUR,
which are about a CPU hour, and for a quarter of them, its schedule with all eight stages squeezed into them; 1-1 for a
sixteenth and a 64th, too (--part: of that). The figure is the negative IWAE bound of 5,000 codes on the 10,000 test images; of
shorter runs, that of 50 codes, and what 5,000 change of it on every fifth image. What is measured goes into FILE (default
iwae-points.json) as it comes, and runs are resumed: a call that was killed is repeated.

The whole length, 3,280 epochs, is extrapolated. Of 1-1 by a power law, nats = a + b images^-c, through its three longest runs;
every other recipe is taken to gain as much as 1-1 from the same epochs on. (A law of its own for each promises far too
much where the shortest run has 2 epochs: 74 nats for 2-50.) How well that does is told by what it foretells of runs that
it has not seen.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from tests.benchmarks.peers.tables import around_markers, line, write_between_markers
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource

README, BEGIN = Path(__file__).parents[2] / "README.md", "<!-- iwae benchmark -->"
PUBLISHED = {"1-1": 86.76, "1-5": 85.54, "1-50": 84.78, "2-1": 85.33, "2-5": 83.89, "2-50": 82.90}
HOUR = {"1-1": 15_000_000, "1-5": 12_600_000, "1-50": 2_820_000, "2-1": 12_000_000, "2-5": 7_200_000, "2-50": 1_800_000}
"""Images of a CPU hour, about."""
WHOLE, EPOCH = 3_280 * 60_000, 60_000
LAW, STEP = "1-1", 4
"""The recipe whose law serves all; each of its lengths is so many times the one before."""
SHORTER = {LAW: (64, 16, 4)}
"""Parts of the images that a recipe is trained for, too."""
SAMPLES, FEW = 5_000, 50


@dataclass(frozen=True, kw_only=True)
class Point:
    """A recipe's bound after so many images, its schedule squeezed into them."""

    recipe: str
    images: int
    nats: float
    error: float
    """Standard error over images."""
    cpu_seconds: float
    """Of training; of a run that was killed, since it went on."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--mnist", help="folder or bucket of packed MNIST")
    arguments.add_argument("--runs", default="runs", help="bucket for the runs")
    arguments.add_argument("--points", type=Path, default=Path("iwae-points.json"), help="file of what was measured")
    arguments.add_argument("--only", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), metavar="L-K")
    arguments.add_argument("--part", type=float, default=1.0, help="of an hour's images")
    arguments.add_argument("--table", action="store_true", help="measure nothing")
    arguments.add_argument("--readme", action="store_true", help="write the table into README.md, between its markers")
    options = arguments.parse_args()
    if options.readme:
        around_markers(README, begin=BEGIN)  # before hours of work
    points = [Point(**each) for each in json.loads(options.points.read_text())] if options.points.exists() else []
    if not options.table:
        for recipe in options.only:
            for part in (*SHORTER.get(recipe, (4,)), 1):
                images = int(HOUR[recipe] * options.part) // part
                if not any((point.recipe, point.images) == (recipe, images) for point in points):
                    points.append(measured(recipe, images, in_full=part == 1, options=options))
                    options.points.write_text(json.dumps([asdict(point) for point in points], indent=1))
                    print(points[-1], flush=True)
    report = "\n".join(table(points))
    print(report)
    if options.readme:
        write_between_markers(README, report, begin=BEGIN)


def measured(recipe: str, images: int, *, in_full: bool, options: argparse.Namespace) -> Point:
    name = f"iwae-{recipe}-{images}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call(
        "train", f"mnist-iwae-{recipe}", f"run.name={name}", f"run.bucket={options.runs}", "cluster.workers=0",
        f"data.train={options.mnist}/train", f"data.test={options.mnist}/test", f"training.images={images}",
        "training.compile=true", "training.evaluate_every_images=0", f"training.report_every_images={EPOCH}",
        f"checkpoint.every_images={max(images // 40, EPOCH)}",
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    run = f"{options.runs}/{name}"
    if in_full:
        found = bound(run, f"{options.mnist}/test", SAMPLES)
        return Point(recipe=recipe, images=images, nats=found["nats"], error=found["error"], cpu_seconds=seconds)
    fifth = f"{options.points.absolute().parent}/every-fifth"
    if not Path(fifth).exists():
        test = vaejob.open_data(f"{options.mnist}/test")
        pack(ArraySource("every fifth test image", test.images(np.arange(0, test.manifest.images, 5))), fifth)
    many, few = (bound(run, f"{fifth}/train", samples) for samples in (SAMPLES, FEW))
    all_few = bound(run, f"{options.mnist}/test", FEW)
    return Point(
        recipe=recipe,
        images=images,
        nats=all_few["nats"] + many["nats"] - few["nats"],
        error=all_few["error"],
        cpu_seconds=seconds,
    )


def bound(run: str, data: str, samples: int) -> dict[str, float]:
    found = json.loads(
        call("evaluate", run, "--samples", str(samples), "--data", data, "--compile", "--json", "--quiet")
    )
    return {"nats": found["negative_bound_nats"], "error": found["negative_bound_nats_standard_error"]}


def call(*command: str) -> str:
    """vaejob on one core; its progress goes to the terminal."""
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-m", "vaejob", *command], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return answer.stdout


def law_of(points: Iterable[Point]) -> Callable[[int], float] | None:
    """Nats by images: the power law through three points, each STEP times as long as the one before; None where none goes through."""
    shortest, middle, longest = sorted(points, key=lambda point: point.images)
    gained, gained_last = shortest.nats - middle.nats, middle.nats - longest.nats
    if not 0 < gained_last < gained:
        return None
    ratio = gained / gained_last  # STEP^c
    end, power = longest.nats - gained_last / (ratio - 1), math.log(ratio, STEP)
    return lambda images: float(end + (longest.nats - end) * (images / longest.images) ** -power)


def table(points: Iterable[Point]) -> list[str]:
    ordered = sorted(points, key=lambda point: point.images)
    runs = {recipe: own for recipe in PUBLISHED if (own := [point for point in ordered if point.recipe == recipe])}
    law = law_of(runs[LAW][-3:]) if len(runs.get(LAW, [])) >= 3 else None
    head = ["layers, codes", "epochs of 3,280", "CPU minutes", "-IWAE-5000", "all epochs, extrapolated", "published"]
    lines, checks = [f"{datetime.now(UTC):%Y-%m-%d}, one core.", "", line(head), line(["---"] * len(head))], []
    for recipe, (*shorter, longest) in runs.items():
        name = recipe.replace("-", ", ")
        cells = [name, f"{longest.images / EPOCH:.0f}", f"{longest.cpu_seconds / 60:.0f}"]
        cells += [f"{longest.nats:.2f} ± {longest.error:.2f}", f"{foretold(longest, WHOLE, law):.1f}" if law else ""]
        lines.append(line([*cells, f"{PUBLISHED[recipe]:.2f}"]))
        seen = law if recipe != LAW else law_of(shorter[-3:]) if len(shorter) >= 3 else None  # not the longest of LAW
        if shorter and seen:
            told = foretold(shorter[-1], longest.images, seen)
            checks.append(f"{told:.1f} and {longest.nats:.1f} for {name}")
    return [*lines, "", *([f"Foretold from a quarter of a run, and found: {'; '.join(checks)}.", ""] if checks else [])]


def foretold(run: Point, images: int, law: Callable[[int], float]) -> float:
    """Its nats, had it been as long: it gains what the law gains."""
    return run.nats - law(run.images) + law(images)


if __name__ == "__main__":
    main()
