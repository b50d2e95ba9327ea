"""What becomes of real jobs when something dies under them.

    python -m tests.faults [--times 20] [--seed 0] [--only TEXT] [--json FILE]

Every job trains on scikit-learn's digits out of a bucket on a real S3 server (Ceph radosgw where it is installed), and keeps
its run there. Each kind of fault is injected so many times into one run, at random moments drawn from the seed; where the job
ends, its command is given again. At last the job is left alone until it is done, and its run is compared with that of a job
of the same length that nothing was done to: the same images in every batch, no damage, and where the number of workers is
the same also the same weights, bit for bit.

Seconds are from the fault to the first report of newly trained images, median [least, most]; the start of a process that
imports torch, and of a Ray cluster where the job brings its own, are among them.
"""

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tests.faults.jobs import Outcome, Went, batches, state_digests
from tests.faults.kinds import KINDS, Kind, Place
from tests.job.conftest import pack_digits
from tests.s3.faultproxy import FaultProxy
from tests.s3.server import client, running, which_server


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--times", type=int, default=20, help="injections of each kind")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", default="", help="kinds whose name holds this")
    arguments.add_argument("--json", help="also write every injection to this file")
    options = arguments.parse_args()
    found: dict[str, list[Outcome]] = {}
    with place() as here:
        for kind in (kind for kind in KINDS if options.only in kind.name):
            found[kind.name] = []
            wrong = ""
            try:
                for outcome in injected([kind] * options.times, here, name=kind.name, seed=options.seed):
                    found[kind.name].append(outcome)
                    print(f"{kind.name}: {outcome}", file=sys.stderr, flush=True)
            except Went as error:
                wrong = str(error)
            print(line(kind.name, found[kind.name], wrong), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({name: [asdict(each) for each in all] for name, all in found.items()}))
    return 0


IMAGES_BETWEEN = 20_000
"""Trained from one injection to the next, at least."""

HEADER = """| fault | injected | trained again after, seconds | images trained twice | lost | command repeated | wrong |
|---|---|---|---|---|---|---|"""


def line(name: str, outcomes: list[Outcome], wrong: str) -> str:
    if not outcomes:
        return f"| {name} | 0 | | | | | {wrong} |"
    seconds, twice = ([getattr(each, field) for each in outcomes] for field in ("seconds", "twice"))
    return (
        f"| {name} | {len(outcomes)} | {statistics.median(seconds):.1f} [{min(seconds):.1f}, {max(seconds):.1f}] "
        f"| {statistics.median(twice):.0f} [{min(twice)}, {max(twice)}] | {sum(each.lost for each in outcomes)} "
        f"| {sum(each.repeated for each in outcomes)} | {wrong or 'nothing'} |"
    )


@contextmanager
def place() -> Iterator[Place]:
    """A server, a proxy before it, and the digits in a bucket."""
    kind = which_server()
    assert kind, "no S3 server is installed"
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, running(kind, Path(folder) / "s3") as server:
        client(server).create_bucket(Bucket="faults")
        with server.as_environment(), FaultProxy(upstream=server.port) as proxy:
            pack_digits("s3://faults/digits")
            yield Place(Path(folder), proxy)


def injected(kinds: Sequence[Kind], here: Place, *, name: str, seed: int) -> Iterator[Outcome]:
    """The outcome of each, one after the other in one job. Raises Went if it did what it must not do, in the end too."""
    images = IMAGES_BETWEEN * (len(kinds) + 1)
    chance, name = random.Random(f"{seed} {name}"), re.sub("[^A-Za-z0-9]+", "-", name)
    job = here.job(name, images=images, workers=kinds[0].workers, standing=kinds[0].standing)
    try:
        for kind in kinds:
            job.train_a_while(IMAGES_BETWEEN // 4)
            time.sleep(chance.uniform(0, 1))
            yield kind.injure(job, here, chance)
        job.finish()
    finally:
        job.end()
    calm = here.job(f"{name}-calm", images=images, workers=0)
    try:
        calm.finish()
    finally:
        calm.end()
    if batches(job.run.url) != batches(calm.run.url):
        raise Went("its batches are not those of the job that nothing was done to")
    if kinds[0].workers == 0 and state_digests(job.run.url) != state_digests(calm.run.url):
        raise Went("its weights are not those of the job that nothing was done to")


if __name__ == "__main__":
    sys.exit(main())
