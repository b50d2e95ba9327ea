"""How the whole job's rate grows over machines: 2 nodes with 2 workers each, every node with a network of its own.

    sudo python tests/benchmarks/machines.py [--rounds 3] [--seconds 30] [--data ADDRESS] [--json FILE] [--set KEY=VALUE ...]

The nodes are network namespaces of this machine, linked by a bridge: addresses, sockets and gradients are as between two
machines, the cores are not. Images, reports and checkpoints go over the bridge to a real S3 server. Each worker has batches of
100 images of the dense model of mnist-iwae-1, as in job.py. Efficiency is the rate of N workers over N times that of one;
where N workers share fewer cores, over as many times as there are cores: more cannot be had, and less is lost.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.job import BUCKET, Moment, slope
from tests.benchmarks.loop import pack_digits
from tests.benchmarks.paired import spread
from tests.job.network import Network
from tests.s3.server import client, running, which_server
from vaejob.storage import open_bucket

NODES, WORKERS_OF_A_NODE = 2, 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=30.0, help="of each number of workers in every round")
    arguments.add_argument("--data", help="address of packed 28x28 images; default: scikit-learn's digits, enlarged")
    arguments.add_argument("--json", type=Path, help="a file for every single rate")
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of the job")
    options = arguments.parse_args()
    kind = which_server()
    assert kind, "no S3 server is installed"
    with tempfile.TemporaryDirectory() as folder, running(kind, Path(folder) / "s3") as server, server.as_environment():
        client(server).create_bucket(Bucket=BUCKET)
        local = open_bucket(options.data or pack_digits(folder, images=20_000))
        remote = open_bucket(f"s3://{BUCKET}/train")
        for key in local.keys():  # noqa: SIM118 - a bucket is no dict
            remote.write(key, local.read(key))
        network = Network(store_port=server.port, cpus=WORKERS_OF_A_NODE)
        try:
            network.add(NODES)
            rounds = [rates(network, remote.url, options) for _ in range(options.rounds)]
        finally:
            network.shutdown()
    for workers in rounds[0]:
        cores = min(workers, os.cpu_count() or 1)
        found = spread([one[workers] / one[1] / cores for one in rounds])
        print(f"{workers} workers: {spread([one[workers] for one in rounds]).median:,.0f} images/s, efficiency {found}")
    if options.json:
        options.json.write_text(json.dumps(rounds))


def rates(network: Network, data: str, options: argparse.Namespace) -> dict[int, float]:
    """Images a second by the clock, by number of workers."""
    found = {}
    for workers in (1, WORKERS_OF_A_NODE, NODES * WORKERS_OF_A_NODE):
        found[workers] = rate(network.enter, network.env, workers, data, options)
        print(f"{workers} workers: {found[workers]:,.0f} images/s; load {os.getloadavg()[0]:.1f}", flush=True)
    return found


def rate(enter: list[str], env: Mapping[str, str], workers: int, data: str, options: argparse.Namespace) -> float:
    """Of the job, whose driver runs on the head."""
    command = [
        *enter, sys.executable, str(Path(__file__).with_name("job.py")), "--side", "ours", "--workers", str(workers),
        "--data", data, "--seconds", str(options.seconds), "--set", *options.set,
    ]  # fmt: skip
    answer = subprocess.run(
        command, env={**os.environ, **env, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    return slope([Moment(*moment) for moment in json.loads(answer.stdout.splitlines()[-1])]).by_clock


if __name__ == "__main__":
    main()
