"""Images that stay on the device make up the same batches as streamed ones, and so the same run, bit for bit."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st

import vaejob
from tests.ranks import leave
from tests.test_checkpoint import GlooWorker
from tests.test_stability import WorkerWithLedger
from tests.test_stream import damage_a_row_group
from vaejob.cluster.doctor import room
from vaejob.cluster.doctor.results import StepMemory
from vaejob.config import JobConfig, parse_config
from vaejob.data.batches import DataSet, open_data
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.run import begin, work
from vaejob.storage import open_bucket
from vaejob.storage.runs import Row, newest_record, read_rows
from vaejob.training.resident import batches_on_device, resident_bytes
from vaejob.training.worker import Event

IMAGES = 90
BYTES = IMAGES * 3 * 4 * 4
PIXELS = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 4, 4), dtype=np.uint8)
LOST = {"raw": 21, "keep": 14}
"""Images of the row groups 1 and 4 of the damaged sets."""


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the same images: raw or as files, whole or with two damaged row groups."""
    folder = tmp_path_factory.mktemp("noise")
    for encoding in ("raw", "keep"):
        for name in (encoding, f"damaged {encoding}"):
            source = ArraySource("noise", PIXELS)
            pack(source, f"{folder}/{name}", encoding=encoding, row_group_bytes=500, shard_bytes=2000)
        for group in (1, 4):
            damage_a_row_group(open_data(f"{folder}/damaged {encoding}/train"), group)
    return {name: f"{folder}/{name}/train" for name in ("raw", "keep", "damaged raw", "damaged keep")}


def job_on(address: str, *overrides: str, bucket: str = "memory://nowhere") -> JobConfig:
    return parse_config(
        f"""
run: {{name: run, bucket: {bucket}}}
data: {{train: {address}, test: {address.replace("damaged ", "")}, global_batch: 16, lanes: 4, window_rows: 20}}
model: {{latent: 3, hidden: [7]}}
training: {{images: 250, report_every_images: 1}}
checkpoint: {{every_images: 60}}
cluster: {{workers: 0}}
""",
        overrides,
    )


# Batches.


class Ranks:
    """Threads in the place of a job's processes."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._parts: dict[int, torch.Tensor] = {}

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._parts[threading.get_ident()] = tensor.clone()
        self._barrier.wait()
        total = torch.stack([*self._parts.values()]).sum(0, dtype=tensor.dtype)
        self._barrier.wait()
        tensor.copy_(total)

    def batches(self, data: DataSet, job: JobConfig, *, images_seen: int) -> list[list[Any]]:
        """Of each rank, all that is told of each of its batches."""

        def of_rank(rank: int) -> list[Any]:
            found = batches_on_device(data, job, GlooWorker(rank, self.world_size), images_seen=images_seen)
            return [
                (
                    batch.place,
                    batch.ids.tolist(),
                    images.numpy().tobytes(),
                    images.stride() if len(images) else None,
                    batch.missing,
                    batch.notes,
                )
                for batch, images in found
            ]

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(self.world_size) as pool:
            patch.setattr(torch.distributed, "all_reduce", self.all_reduce)
            return list(pool.map(of_rank, range(self.world_size)))


@settings(max_examples=12)
@given(
    name=st.sampled_from(["raw", "keep", "damaged raw", "damaged keep"]),
    world_size=st.integers(1, 3),
    global_batch=st.integers(3, 100),
    images_seen=st.integers(0, 2 * IMAGES),
    seed=st.integers(0, 5),
)
def test_resident_batches_are_the_streamed_ones(
    addresses: dict[str, str], name: str, world_size: int, global_batch: int, images_seen: int, seed: int
) -> None:
    """Of any number of workers, from the start or resumed anywhere, with damaged images left out and counted."""
    data, ranks = open_data(addresses[name]), Ranks(world_size)
    common = f"data.global_batch={global_batch}", f"run.seed={seed}", "training.images=260", "data.on_corrupt=skip"
    streamed = ranks.batches(data, job_on(addresses[name], *common), images_seen=images_seen)
    limit = f"data.resident_bytes={BYTES}"
    resident = ranks.batches(data, job_on(addresses[name], *common, limit), images_seen=images_seen)
    assert [[told[:-1] for told in batches] for batches in resident] == [
        [told[:-1] for told in batches] for batches in streamed
    ]
    for with_notes, without in zip(resident, streamed, strict=True):
        notes, expected = ({line for told in batches for line in told[-1]} for batches in (with_notes, without))
        kept = {line for line in notes if "is resident from" in line}
        assert len(kept) == (images_seen // IMAGES * IMAGES + IMAGES < 260)
        assert notes - kept <= {*expected, *(line for other in streamed for told in other for line in told[-1])}


def test_images_that_do_not_fit_are_streamed_and_that_is_said_once(addresses: dict[str, str]) -> None:
    job = job_on(addresses["raw"], f"data.resident_bytes={BYTES - 1}")
    data = open_data(addresses["raw"])
    (batches,) = Ranks(1).batches(data, job, images_seen=0)
    (plain,) = Ranks(1).batches(data, job_on(addresses["raw"]), images_seen=0)
    assert [told[:-1] for told in batches] == [told[:-1] for told in plain]
    says = f"data.train is streamed in each epoch: its images take {BYTES} bytes, data.resident_bytes is {BYTES - 1}"
    assert [told[-1] for told in batches] == [(says,), *[()] * (len(batches) - 1)]
    assert resident_bytes(data, job) == 0
    fits = f"data.resident_bytes={BYTES}"
    assert resident_bytes(data, job_on(addresses["raw"], fits)) == BYTES
    assert resident_bytes(data, job_on(addresses["raw"], fits, f"training.images={IMAGES}")) == 0  # one epoch


def test_doctor_counts_resident_images() -> None:
    memory = StepMemory(weights=100, gradients=100, moments=200, averaged=0, fixed=0, per_image=1)
    common = {"images": 100, "free": 1000, "where": "here"}
    assert room.of_memory(memory, resident=0, **common).level == "ok"
    found = room.of_memory(memory, resident=600, **common)
    assert found.level == "fail"
    assert "resident images 600 B" in found.found
    assert "data.resident_bytes=0" in found.advice


# Whole jobs.


def outcome(address: str) -> tuple[list[Row], list[str]]:
    """What was reported but for when and how fast, and the digests of the last state."""
    run = open_bucket(address)
    free = {
        "attempt",
        "attempt_started_at_images",
        "written_at",
        "seconds",
        "data_wait_seconds",
        "retries",
        "retry_causes",
    }
    record, damage = newest_record(run)
    assert record is not None
    assert not damage
    rows = [{key: value for key, value in row.items() if key not in free} for row in read_rows(run)]
    return rows, [file.sha256 for file in record.files]


@pytest.fixture
def job_of(addresses: dict[str, str], tmp_path: Path) -> Iterator[Any]:
    def make(name: str, *overrides: str, data: str = "damaged keep") -> JobConfig:
        settings = f"run.name={name}", "data.on_corrupt=skip", *overrides
        return job_on(addresses[data], *settings, bucket=str(tmp_path))

    return make


def test_resident_run_is_the_streamed_one_also_when_it_is_resumed_in_an_epoch(job_of: Any, tmp_path: Path) -> None:
    told: list[Event] = []
    limit = f"data.resident_bytes={BYTES}"
    vaejob.train(job_of("streamed"))
    vaejob.train(job_of("resident", limit), on_event=told.append)
    vaejob.train(job_of("resumed", "training.images=138"))
    vaejob.train(job_of("resumed", limit), on_event=told.append)
    notes = [event.body["text"] for event in told if event.kind == "note" and "is resident" in event.body["text"]]
    assert [note.split(" images seen")[0] for note in notes] == [
        "data.train is resident from 90", "data.train is resident from 180"
    ]  # fmt: skip
    expected = outcome(f"{tmp_path}/streamed")
    assert outcome(f"{tmp_path}/resident") == expected
    rows, digests = outcome(f"{tmp_path}/resumed")
    assert digests == expected[1]
    # The shorter run ended at 138 with a held-out pass of its own.
    assert [row for row in rows if row["split"] == "train" or row["images_seen"] != 138] == expected[0]


def rank_of_jobs(rank: int, world_size: int, folder: str, jobs: list[JobConfig]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    for job in jobs:
        if rank == 0:
            begin(job)
        torch.distributed.barrier()
        work(job, WorkerWithLedger(job, rank=rank, world_size=world_size))
    leave()
