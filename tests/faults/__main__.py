"""What becomes of real jobs when something dies under them, or their bucket fails.

    python -m tests.faults [--times 20] [--seed 0] [--only TEXT]... [--at-once 3] [--json FILE] [--readme]

Every job trains on scikit-learn's digits out of a bucket on a real S3 server (Ceph radosgw where it is installed), and keeps
its run there. Each kind of fault is injected so many times into one run, at random moments drawn from the seed; where the job
ends, its command is given again. At last it is killed once more, given an end, and left alone until it is done, and its run is
compared with that of a job of the same length that nothing was done to: the same images in every batch, no damage, and where the number of workers is
the same also the same weights, bit for bit.

Seconds are from the fault to the first report of newly trained images, median [least, most]; the start of a process that
imports torch, and of a Ray cluster where the job brings its own, are among them. A job that only its bucket fails goes on by
itself: seconds are then to the first checkpoint that was begun after the fault.

FILE keeps what was found of every kind, also of earlier calls; with --readme it becomes the table in README.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.tables import around_markers, write_between_markers
from tests.faults.kinds import KINDS, Kind

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- faults -->"
HEADER = """| fault | injected | trained again after, seconds | images trained twice | images lost | command repeated | wrong |
|---|---|---|---|---|---|---|"""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--times", type=int, default=20, help="injections of each kind")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", action="append", help="kinds whose name holds this, or one of these")
    arguments.add_argument("--at-once", type=int, default=1, help="kinds that are under way at the same time")
    arguments.add_argument("--json", type=Path, help="every injection, written after each kind")
    arguments.add_argument("--readme", action="store_true", help="write the table into README.md, between its markers")
    options = arguments.parse_args()
    if options.readme:
        around_markers(README, begin=BEGIN)  # before hours of work
    found: dict[str, Any] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    writing = threading.Lock()

    def run(kind: Kind) -> None:
        result = injections(kind, times=options.times, seed=options.seed)
        with writing:
            found[kind.name] = result
            print(line(kind.name, **result), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))

    chosen = [kind for kind in KINDS if any(text in kind.name for text in options.only or [""])]
    chosen.sort(key=lambda kind: kind.workers, reverse=True)  # the longest first
    # Of those that start a cluster one is under way at a time: the machine is small, and Ray gives a node 30 s to start.
    lanes = [[kind for kind in chosen if kind.workers], *([kind] for kind in chosen if not kind.workers)]
    print(HEADER)
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda lane: [run(kind) for kind in lane], lanes))
    if options.readme:
        write_between_markers(README, table(found), begin=BEGIN)
    return int(any(found[kind.name]["wrong"] for kind in chosen))


def injections(kind: Kind, *, times: int, seed: int) -> dict[str, Any]:
    """What a process of its own found, even if it ended before its time."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "outcomes"
        into.touch()
        command = [sys.executable, "-m", "tests.faults.inject", kind.name, f"--times={times}", f"--seed={seed}"]
        # A session of its own has a share of its own where a machine is busy.
        status = subprocess.run(
            [*command, f"--into={into}"], cwd=README.parent, check=False, start_new_session=True
        ).returncode
        lines = [json.loads(text) for text in into.read_text().splitlines()]
    outcomes = [each for each in lines if "wrong" not in each]
    ends = [each["wrong"] for each in lines if "wrong" in each] or [f"ended with status {status}"]
    return {"outcomes": outcomes, "wrong": ends[0], "on": f"{datetime.now(UTC):%Y-%m-%d}"}


def table(found: dict[str, Any]) -> str:
    kinds = [kind.name for kind in KINDS if kind.name in found]
    outcomes = [each for name in kinds for each in found[name]["outcomes"]]
    days = sorted({found[name]["on"] for name in kinds})
    lost, wrong = sum(each["lost"] for each in outcomes), sum(bool(found[name]["wrong"]) for name in kinds)
    head = f"{' to '.join(dict.fromkeys([days[0], days[-1]]))}: {len(outcomes)} injections of {len(kinds)} kinds, "
    head += f"{lost} images of checkpoints lost, kinds with something wrong: {wrong}."
    return "\n".join([head, "", HEADER, *(line(name, **found[name]) for name in kinds)])


def line(name: str, *, outcomes: list[dict[str, Any]], wrong: str, on: str) -> str:
    wrong = " ".join(wrong.split())[-300:].replace("|", "/") or "nothing"
    if not outcomes:
        return f"| {name} | 0 | | | | | {wrong} |"
    seconds, twice = ([each[field] for each in outcomes] for field in ("seconds", "twice"))
    return (
        f"| {name} | {len(outcomes)} | {spread(seconds, '.1f')} | {spread(twice, ',.0f')} "
        f"| {sum(each['lost'] for each in outcomes)} | {sum(each['repeated'] for each in outcomes)} | {wrong} |"
    )


def spread(values: Iterable[float], form: str) -> str:
    values = list(values)
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


if __name__ == "__main__":
    sys.exit(main())
