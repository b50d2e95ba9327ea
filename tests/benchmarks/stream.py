"""How fast images stream out of a bucket: ours beside its peers, and beside what the machine can do, in one run.

    python tests/benchmarks/stream.py [--rounds 5] [--worker-rounds 5] [--quick] [--only CASE] [--cifar ADDRESS] [--json FILE] [--readme]

Each pass over a case's images is a fresh process, so that memory, CPU seconds and the time to the first batch are its
own; imports are not timed. In a round every loader runs once, in random order; figures are medians over rounds, ratios
are taken within a round, and a goal is met only if the worst round meets it. Every loader reads its own format with the
settings that its documentation recommends, and decodes by the same code.

Beforehand each loader's epoch is held against the source, so that the table can say who drops or repeats images. The
server is a real one on this machine (tests/s3/server.py), and takes CPU time from all alike: CPU microseconds a sample
are the steadier figure. A whole run takes hours; --quick has fewer images and one round. The peers want an environment
of their own, since MosaicML holds numpy back; a peer that is not installed is said to have failed.
"""

import argparse
import json
import os
import platform
import signal
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.peers.loader import LOADERS
from tests.benchmarks.peers.pictures import Case
from tests.benchmarks.peers.rounds import run_case
from tests.benchmarks.peers.tables import Findings, around_markers, report, write_between_markers

README = Path(__file__).parents[2] / "README.md"
CASES = {
    "raw32": Case(kind="raw", side=32, images=60_000),
    "png32": Case(kind="png", side=32, images=60_000),
    "jpeg256": Case(kind="jpeg", side=256, images=5_000),
}
PACKAGES = ("vaejob", "mosaicml-streaming", "litdata", "webdataset", "datasets", "ray", "torch", "numpy", "obstore")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that server and children end with it
    options = parse_options()
    if options.readme:
        around_markers(README)  # before hours of work
    findings = Findings()
    for name in [options.only] if options.only else CASES:
        case = smaller(CASES[name]) if options.quick else CASES[name]
        title = f"{case.images:,} {case.kind.upper()} images of {case.side} x {case.side}"
        run_case(
            case,
            title,
            findings,
            loaders=options.loaders,
            rounds=options.rounds,
            worker_rounds=options.rounds if options.worker_rounds is None else options.worker_rounds,
            slow_workers=options.all,
            grown_from=options.cifar,
        )
        findings.machine = machine_lines(findings.servers, rounds=options.rounds, grown_from=options.cifar)
        print(f"\n{report(findings)}\n", flush=True)
        if options.json:
            options.json.write_text(to_json(findings))
    if options.readme:
        write_between_markers(README, report(findings))


def parse_options() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, help="default: 5, or 1 with --quick")
    arguments.add_argument("--worker-rounds", type=int, help="rounds with 2 workers as well; default: all")
    arguments.add_argument("--quick", action="store_true", help="fewer images")
    arguments.add_argument("--only", choices=CASES, help="one case")
    arguments.add_argument("--loaders", nargs="+", choices=LOADERS, help="default: all but those that take minutes")
    arguments.add_argument("--all", action="store_true", help="also those that take minutes, alone or with workers")
    arguments.add_argument("--cifar", metavar="ADDRESS", help="images to grow the cases from; default: random fields")
    arguments.add_argument("--json", type=Path, help="a file for every single pass")
    arguments.add_argument("--readme", action="store_true", help="write the tables into README.md, between its markers")
    options = arguments.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.loaders = options.loaders or [name for name, about in LOADERS.items() if options.all or not about.is_slow]
    return options


def smaller(case: Case) -> Case:
    part = 10 if case.images > 20_000 else 2
    return replace(case, images=case.images // part, shard_bytes=case.shard_bytes // part)


def machine_lines(servers: set[str], *, rounds: int, grown_from: str | None) -> list[str]:
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    now = f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), load {load}, rounds: {rounds}"
    images = "images grown from a data set" if grown_from else "images made of random fields"
    return [f"{now}; {images}; server on the same machine: {', '.join(sorted(servers))}.", " ".join(versions())]


def versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)},")
        except PackageNotFoundError:
            found.append(f"{package} (not installed),")
    return [*found, f"Python {platform.python_version()}."]


def to_json(findings: Findings) -> str:
    return json.dumps(
        {
            "machine": findings.machine,
            "passes": [asdict(record) for record in findings.records],
            "deliveries": [[*key, found._asdict()] for key, found in findings.deliveries.items()],
            "failures": [[*key, reason] for key, reason in findings.failures.items()],
        },
        indent=1,
    )


if __name__ == "__main__":
    main()
