"""One kind of fault, injected into one job so many times; in a process of its own, so that kinds cannot disturb each other.

    python -m tests.faults.inject KIND [--times 20] [--seed 0] [--into FILE]

FILE gets a line of JSON for each injection, as it comes, and a last line that says whether all went as it must.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tests.faults.jobs import Outcome, Went, batches, state_digests
from tests.faults.kinds import KINDS, Kind, Place
from tests.job.conftest import pack_digits
from tests.s3.faultproxy import FaultProxy
from tests.s3.server import client, running, which_server

IMAGES_BETWEEN = 2_000
"""Trained from one recovery to the next injection, at least."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("kind", choices=[kind.name for kind in KINDS])
    arguments.add_argument("--times", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--into", type=Path)
    options = arguments.parse_args()
    (kind,) = (kind for kind in KINDS if kind.name == options.kind)

    def say(what: dict[str, object]) -> None:
        print(f"{kind.name}: {what}", file=sys.stderr, flush=True)
        if options.into:
            with options.into.open("a") as file:
                file.write(json.dumps(what) + "\n")

    wrong = ""
    try:
        with place() as here:
            for outcome in injected([kind] * options.times, here, name=kind.name, seed=options.seed):
                say(asdict(outcome))
    except Went as error:
        wrong = str(error)
    except Exception:
        wrong = traceback.format_exc()
    say({"wrong": wrong})
    return 1 if wrong else 0


@contextmanager
def place() -> Iterator[Place]:
    """A server, a proxy before it, and the digits in a bucket."""
    kind = which_server()
    assert kind, "no S3 server is installed"
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, running(kind, Path(folder) / "s3") as server:
        client(server).create_bucket(Bucket="faults")
        with server.as_environment(), FaultProxy(upstream=server.port) as proxy:
            # Ray's processes would wait for all others of a busy machine.
            os.environ.update(RAY_worker_niceness="0")
            pack_digits("s3://faults/digits")
            yield Place(Path(folder), proxy, server.port)


def injected(kinds: Sequence[Kind], here: Place, *, name: str, seed: int) -> Iterator[Outcome]:
    """The outcome of each, one after the other in one job. Raises Went if it did what it must not do, in the end too."""
    chance, name = random.Random(f"{seed} {name}"), re.sub("[^A-Za-z0-9]+", "-", name)
    job = here.job(name, workers=kinds[0].workers, on=kinds[0].on)
    try:
        for kind in kinds:
            job.train_a_while(IMAGES_BETWEEN)
            time.sleep(chance.uniform(0, 1))
            yield kind.injure(job, here, chance)
        images = job.go_on_to_an_end()
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
