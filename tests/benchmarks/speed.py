"""How fast a step is: ours beside what others publish, whole training loops with their loading, in one run.

    python tests/benchmarks/speed.py [--only CASE ...] [--rounds 9] [--starts 3] [--minutes 2] [--eager] [--data ADDRESS]
                                     [--json FILE] [--readme] [--set KEY=VALUE ...]
    python tests/benchmarks/speed.py --of FILE ... [--readme]     the tables of what earlier calls wrote with --json

Each start of a case is a fresh process with one thread. First it proves that both do equal work: the same weights and noise
give the same loss and gradient. Then both train in turns, each in every round once, in random order, each in a fork of that
process, so that what one sets for its allocator or its library does not reach the other. Figures are images per CPU second
of the whole fork (all of its threads) and by the clock, medians over the rounds of all starts; ratios are taken within a
round, and stand with the 95 % interval of their median. A goal is met only if the interval's lower end meets it. Rounds of
one start are alike: VDVAE's step took 25.6 to 30.2 ms an image from start to start, and 2 % more or less within one. So few
starts give an interval that is too narrow.

Ours is the whole job (`vaejob.train`): shards read, checked and mixed, noise that belongs to the image, exact totals,
reports. Starting, compiling and the last checkpoint are outside the passes; what the first pass took more is stated.
pythae is its own trainer and loader; for VDVAE_DIR, a clone of github.com/openai/vdvae, its published step with a fused AdamW
in apex's place and neither MPI nor DDP. A peer that is not there is said to be missing, and its case has no table.

    python tests/benchmarks/scoring.py      held-out likelihood against pythae's get_nll (the case nll is its table)
    python tests/benchmarks/job.py          the whole job on a cluster against the bare step
    python tests/benchmarks/growth.py       how cost grows
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.benchmarks.cases.case import PRECISIONS, Found
from tests.benchmarks.paired import Cost, Spread, spread
from tests.benchmarks.peers.tables import around_markers, line, write_between_markers

ROOT = Path(__file__).parents[2]
README, BEGIN, BEGIN_BRIEF = ROOT / "README.md", "<!-- speed benchmark -->", "<!-- speed benchmark in brief -->"
CASES = {
    "mlp100": "dense",
    "mlp20": "dense",
    "iwae50": "dense",
    "conv": "conv",
    "hierarchical": "ladder",
    "mixture": "mixture",
    "nll": "nll",
}
"""The module of tests/benchmarks/cases/ that each is a function of."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES)
    )
    arguments.add_argument("--rounds", type=int, default=9, help="of each case, in all its starts together")
    arguments.add_argument("--starts", type=int, default=3, help="of each case, with at least 3 rounds each")
    arguments.add_argument(
        "--minutes", type=float, default=2.0, help="of rounds, for each case: fewer rounds if they take longer"
    )
    arguments.add_argument("--eager", action="store_true", help="without what is compiled, which takes minutes")
    arguments.add_argument("--data", help="address of packed 28x28 images; default: scikit-learn's digits, enlarged")
    arguments.add_argument("--json", type=Path, help="a file for every single pass")
    arguments.add_argument(
        "--of", nargs="+", type=Path, metavar="FILE", help="measure nothing: tables of earlier --json"
    )
    arguments.add_argument(
        "--readme", action="store_true", help="write the tables into README.md, between their markers"
    )
    arguments.add_argument("--brief", action="store_true", help="one table of ratios alone, as of a second machine")
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of our jobs")
    arguments.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # one case, in this process, into this file
    options = arguments.parse_args()
    if options.here:
        torch.set_num_threads(1)
        (name,) = options.only
        with tempfile.TemporaryDirectory() as folder:
            getattr(import_module(f"tests.benchmarks.cases.{CASES[name]}"), name)(options, folder)
        return
    begin = BEGIN_BRIEF if options.brief else BEGIN
    if options.readme:
        around_markers(README, begin=begin)  # before minutes of work
    if options.of:
        measured = [json.loads(file.read_text()) for file in options.of]
    else:
        found = [case for name in options.only if (case := over_starts(name, options)) is not None]
        measured = [{"machine": machine_line(), "cases": [asdict(case) for case in found]}]
    report = "\n".join(brief_of(measured) if options.brief else report_of(measured))
    print(f"\n{report}", flush=True)
    if options.json and not options.of:
        options.json.write_text(json.dumps(measured[0]))
    if options.readme:
        write_between_markers(README, report, begin=begin)


def report_of(measured: list[dict[str, Any]]) -> list[str]:
    """The tables of each call, below where and when it was made if that differs from the one before."""
    lines, before = [], None
    for call in measured:
        lines += [] if call["machine"] == before else [call["machine"], ""]
        before = call["machine"]
        lines += [text for case in call["cases"] for text in table(Found.from_dict(case))]
    return lines


def brief_of(measured: list[dict[str, Any]]) -> list[str]:
    """Ratios per CPU second, a case a line."""
    machines = dict.fromkeys(re.sub(", load [^;]*", "", call["machine"]) for call in measured)
    lines = [*machines, "", line(["per CPU s", "peer", *PRECISIONS]), line(["---"] * (len(PRECISIONS) + 2))]
    for found in (Found.from_dict(case) for call in measured for case in call["cases"]):
        reached = {name: str(ratio(found, name, by_cpu)) for name in found.goals}
        # What has no precision of its own is in float32.
        cells = [reached.get(name) or reached.get(name.replace(" fp32", ""), "") for name in PRECISIONS]
        lines.append(line([found.title, found.peer, *cells]))
    return lines


def over_starts(name: str, options: argparse.Namespace) -> Found | None:
    """The rounds of all starts; None where none came to a round."""
    share = ["--rounds", str(-(-options.rounds // options.starts)), "--minutes", str(options.minutes / options.starts)]
    found = [start for _ in range(options.starts) if (start := in_fresh_process(name, share)) is not None]
    return replace(found[0], rounds=[one for start in found for one in start.rounds]) if found else None


def in_fresh_process(name: str, share: list[str]) -> Found | None:
    """None where it did not come to a round; it has said why."""
    kept = [argument for argument in sys.argv[1:] if argument != "--readme"]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "found.json"
        command = [sys.executable, __file__, *kept, *share, "--only", name, "--here", str(answer)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        if subprocess.run(command, env=environment).returncode:
            print(f"{name}: did not end well", flush=True)
        if not answer.exists():
            return None
        return Found.from_dict(json.loads(answer.read_text()))


def table(found: Found) -> list[str]:
    lines = [f"**{found.title}** ({len(found.rounds)} rounds)", ""]
    lines += [f"{text[0].upper()}{text[1:]}." for text in found.proofs] + [""]
    head = ["", "images/s", "images per CPU s", "ratio by the clock", "ratio per CPU s", "start and compile, CPU s"]
    lines += [line(head), line(["---"] * len(head))]
    for name in found.first:
        rates = [spread([rate(one[name]) for one in found.rounds]).median for rate in (by_clock, by_cpu)]
        cells = [name, *(f"{rate:,.{1 if rate < 100 else 0}f}" for rate in rates)]
        cells += [str(ratio(found, name, by_clock)), str(ratio(found, name, by_cpu)), f"{warm_up(found, name):.1f}"]
        lines.append(line(cells))
    lines.append("")
    for name, bound in found.goals.items():
        if name not in found.first:
            continue
        reached = ratio(found, name, by_cpu)
        verdict = "met" if reached.least >= bound else "missed"
        lines.append(f"- {name} / {found.peer} per CPU second: {reached}, goal >= {bound}: {verdict}")
    return [*lines, *(f"- {note}" for note in found.notes), ""]


def by_clock(cost: Cost) -> float:
    return cost.images / cost.wall_seconds


def by_cpu(cost: Cost) -> float:
    return cost.images / cost.cpu_seconds


def ratio(found: Found, name: str, rate: Callable[[Cost], float]) -> Spread:
    return spread([rate(one[name]) / rate(one[found.peer]) for one in found.rounds])


def warm_up(found: Found, name: str) -> float:
    return found.first[name].cpu_seconds - spread([one[name].cpu_seconds for one in found.rounds]).median


def machine_line() -> str:
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.strip()}, {processor()}, {os.cpu_count()} cores, one thread, load {load}; "
        f"torch {version('torch')}, Python {platform.python_version()}."
    )


def processor() -> str:
    named = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")]
    extras = " with AMX" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else ""
    return (named[0].partition(":")[2].strip() if named else platform.machine()) + extras


if __name__ == "__main__":
    main()
