"""A thousand workers on paper: what a job of 1,024 costs beside its steps, with the real order, manifest, ledger and records.

    python tests/benchmarks/thousand_workers.py [--workers 1024] [--steps 2000] [--json FILE]

No network and no model runs. A manifest of 10^9 images in 10^5 shards is written to disk (no shard is: none is read).
Start: fresh processes, one for each of a few ranks, open it and plan their first batch, and one in mid-epoch; the bytes are
those of the files that each of them reads. Stream: the same ranks plan for a while, and the reader's rule of what it holds is
followed over the row groups that they need, so the requests and bytes a rank makes are counted, not guessed. Driver: reports
of all workers, as they cross processes, go through the ledger into a bucket in memory. Checkpoint: a state is split, written,
recorded and read back by the real code, and every request is counted.

What a store allows is what Amazon publishes for S3: 5,500 GET and 3,500 PUT a second and prefix.
"""

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from tests.benchmarks.order import GROUPS_OF_MANY, IMAGE_BYTES, MANY_SHARDS, ROWS_OF_MANY, peak_mb, write_description
from vaejob.config import ClusterConfig, DataConfig, JobConfig, RunConfig, TrainingConfig
from vaejob.data.order import RankPlan
from vaejob.data.reader import GROUPS_AHEAD
from vaejob.metrics import LikelihoodTotals
from vaejob.run import restorable
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.runs import state_key, write_state_file
from vaejob.training.checkpoint import share_of
from vaejob.training.ledger import ROWS_OF_A_FILE, Ledger
from vaejob.training.worker import Report

IMAGES_PER_STEP = 32
"""Of one worker."""
IMAGES_PER_SECOND = 330
"""Of one worker: the goal for ImageNet-64 on one H200, the slowest of the shapes; here the images are 32x32."""

STATE_BYTES, STATE_TENSORS = 500_000_000, 1000


def config_of(workers: int) -> DataConfig:
    # A worker has a lane of its own.
    return DataConfig(train="nowhere", lanes=workers, global_batch=IMAGES_PER_STEP * workers)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--workers", type=int, default=1024)
    arguments.add_argument("--steps", type=int, default=2000, help="planned by each of the ranks that are followed")
    arguments.add_argument("--json", help="also write the figures to this file")
    arguments.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--address", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.rank is not None:
        print(json.dumps(start(options.address, rank=options.rank, workers=options.workers, steps=options.steps)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="thousand-") as folder:
        write_description(folder, shards=MANY_SHARDS, groups=np.full(GROUPS_OF_MANY, ROWS_OF_MANY))
        found["description MB"] = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        command = [sys.executable, __file__, "--address", folder, "--workers", str(options.workers)]
        command += ["--steps", str(options.steps)]
        ranks = (0, options.workers // 3, options.workers - 1)
        found["ranks"] = [json.loads(subprocess.check_output([*command, "--rank", str(rank)])) for rank in ranks]
    found["driver"] = driver(options.workers)
    found["checkpoint"] = checkpoint(options.workers)
    if options.json:
        Path(options.json).write_text(json.dumps(found))
    print(json.dumps(found, indent=1))


class Counted:
    """A bucket that counts what is asked of it, and of which sizes."""

    def __init__(self, bucket: Bucket) -> None:
        self.url, self._bucket = bucket.url, bucket
        self.requests, self.bytes = Counter[str](), Counter[str]()
        self._lock = threading.Lock()

    def __getattr__(self, verb: str) -> Any:
        def asked(key: str = "", *arguments: Any, **options: Any) -> Any:
            result = getattr(self._bucket, verb)(key, *arguments, **options)
            moved = result if verb == "read" else arguments[0] if verb in ("write", "create") else b""
            with self._lock:
                self.requests[verb] += 1
                self.bytes[verb] += len(moved)
            return result

        return asked

    def taken(self) -> dict[str, float]:
        """Requests by verb and megabytes moved since this was last asked."""
        found = {**self.requests, "MB": sum(self.bytes.values()) / 1e6}
        self.requests.clear()
        self.bytes.clear()
        return found


def report_of(rank: int, *, workers: int, images_seen: int, **more: Any) -> Report:
    """What a worker says of the images it trained on since its last report."""
    trained = LikelihoodTotals(images=640, dims=3072, negative_bound_nats=1e6 + rank, distortion_nats=9e5, rate_nats=1e5,
                               negative_bound_squares=1.6e9, distortion_squares=1.3e9, rate_squares=1.6e7)  # fmt: skip
    return Report(images_seen=images_seen, attempt="20260101T000000000000-00000000", attempt_started_at_images=0, rank=rank,
                  world_size=workers, train=trained, steps=20, seconds=1.0, **more)  # fmt: skip


def driver(workers: int) -> dict[str, float]:
    """Seconds of the controller for one report of all workers: to read the messages, to add and to write."""
    bucket = Counted(open_bucket("memory://driver"))
    ledger = ledger_of(bucket, workers)
    reading, adding = [], []
    for moment in range(1, ROWS_OF_A_FILE + 1):
        messages = [
            report_of(rank, workers=workers, images_seen=moment * 640 * workers).to_dict() for rank in range(workers)
        ]
        begun = time.process_time()
        reports = [Report.from_dict(message) for message in messages]
        read = time.process_time()
        ledger.add([reports])
        reading.append(read - begun)
        adding.append(time.process_time() - read)
    size = len(pickle.dumps(messages[0]))
    (key,) = bucket.keys("metrics/")
    return {
        "read s": statistics.median(reading),
        "add s, first 10": statistics.median(adding[:10]),
        "add s, last 10, the file full": statistics.median(adding[-10:]),
        "KB of a full file": bucket.size(key) / 1e3,
        "bytes a message": size,
        **bucket.taken(),
    }


def ledger_of(bucket: Counted, workers: int) -> Ledger:
    job = JobConfig(
        run=RunConfig(name="thousand", bucket="memory://"),
        data=config_of(workers),
        training=TrainingConfig(images=10**9),
        cluster=ClusterConfig(workers=workers),
    )
    return Ledger(bucket, job, train_fingerprint="0" * 64, test_fingerprint=None, test_images=None, shape=(3, 32, 32),
                  on_event=lambda event: None)  # fmt: skip


def checkpoint(workers: int) -> dict[str, Any]:
    """A state of 500 MB: every rank's share is written, the record committed, and the state read back by rank 0."""
    bucket = Counted(open_bucket("memory://checkpoint"))
    state = {f"model.{number:04d}": torch.zeros(STATE_BYTES // 4 // STATE_TENSORS) for number in range(STATE_TENSORS)}
    found: dict[str, Any] = {}
    begun, files = time.process_time(), {}
    for rank in range(workers):
        share = share_of(state, rank=rank, world_size=workers)
        key = state_key(640, attempt="20260101T000000000000-00000000", rank=rank, world_size=workers)
        files[rank] = write_state_file(bucket, key, safetensors.torch.save(share))
    found["write"] = {"CPU s, all ranks": time.process_time() - begun, **bucket.taken()}
    begun = time.process_time()
    ledger_of(bucket, workers).add(
        [[report_of(rank, workers=workers, images_seen=640, saved={640: file}) for rank, file in files.items()]]
    )
    (size,) = (bucket.size(key) for key in bucket.keys("records/"))
    found["commit"] = {"CPU s": time.process_time() - begun, "record KB": size / 1e3, **bucket.taken()}
    begun = time.process_time()
    _, tensors, damage = restorable(bucket)
    assert tensors is not None
    assert tensors.keys() == state.keys()
    assert not damage
    found["restore, rank 0"] = {"CPU s": time.process_time() - begun, **bucket.taken()}
    return found  # the other ranks are sent it, and ask the bucket for nothing


def start(address: str, *, rank: int, workers: int, steps: int) -> dict[str, float]:
    """Seconds and peak memory of a rank's start and resume, and what its stream asks of the store."""
    found: dict[str, float] = {"rank": rank}
    begun = time.perf_counter()
    data = vaejob.open_data(address)
    found["open s"] = time.perf_counter() - begun
    config = config_of(workers)
    plan = RankPlan(
        row_group_rows=data.row_group_rows, global_batch=config.global_batch, lanes=config.lanes,
        window_rows=config.window_rows, seed=0, rank=rank, world_size=workers,
    )  # fmt: skip
    images = data.manifest.images
    for name, images_seen in (("first batch s", 0), ("resume s", 3 * images // 2)):
        begun = time.perf_counter()
        _, ids = next(plan.batches(images_seen=images_seen, until=3 * images))
        found[name] = time.perf_counter() - begun
        assert len(ids) == IMAGES_PER_STEP, len(ids)
    found["peak MB"] = peak_mb()
    held = data._groups_held(config, world_size=workers) + GROUPS_AHEAD
    fetched = distinct = seen = 0
    needed: set[int] = set()
    kept: OrderedDict[int, None] = OrderedDict()
    firsts = np.cumsum(data.row_group_rows) - data.row_group_rows
    begun = time.process_time()
    for _, ids in plan.batches(images_seen=images // 2, until=images // 2 + steps * config.global_batch):
        seen += len(ids)
        for group in np.unique(np.searchsorted(firsts, ids, side="right") - 1).tolist():
            fetched += group not in kept
            kept[group] = None
            kept.move_to_end(group)
            needed.add(group)
        while len(kept) > held:
            kept.popitem(last=False)
    distinct = len(needed)
    found |= {"images": seen, "fetched": fetched, "distinct": distinct, "held": held,
              "plan us an image": (time.process_time() - begun) / seen * 1e6,
              "bytes an image": fetched * ROWS_OF_MANY * IMAGE_BYTES / seen}  # fmt: skip
    return found


if __name__ == "__main__":
    main()
