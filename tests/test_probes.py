"""The doctor's probes in one process: what they count is there, and what they leave is nothing."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vaejob.cluster.doctor.probes import (
    GROUPS_OF_A_WORKER,
    free_memory,
    interface_of,
    own_address,
    sample_data,
    sampled_groups,
    use_bucket,
)
from vaejob.cluster.doctor.step import Trial, estimate_memory, measure_curve, timed_step
from vaejob.config import JobConfig, parse_config
from vaejob.data.batches import open_data
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import DataError
from vaejob.storage import open_bucket
from vaejob.storage.memory import MemoryBucket

JOB = """
run: {{name: run, bucket: nowhere}}
data: {{train: {data}, global_batch: 8}}
model: {{family: mlp, latent: 3, hidden: [5]}}
likelihood: {{pixels: bernoulli, binarize: dynamic}}
training: {{images: 100}}
"""


@pytest.fixture
def job(tmp_path: Path) -> JobConfig:
    """Of 40 images of 4x4 pixels in row groups of 4."""
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    source = ArraySource("noise", images, [f"image-{index}" for index in range(40)])
    pack(source, str(tmp_path / "data"), split="train=1.0", row_group_bytes=64, shard_bytes=400)
    return parse_config(JOB.format(data=tmp_path / "data" / "train"))


class Forgetful(MemoryBucket):
    """A store that takes no notice of conditions."""

    def create(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True


def test_a_bucket_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    for bucket in (open_bucket(str(tmp_path / "folder")), open_bucket("memory://doctor")):
        bucket.write("kept", b"of the job")
        use = use_bucket(bucket, left_by_driver="kept")
        verbs = ["put", "get", "list", "conditional put", "second conditional put", "delete"]
        assert [(request.verb, request.error) for request in use.requests] == [(verb, "") for verb in verbs]
        assert (use.conditional, use.sees_driver) == ("kept", True)
        assert bucket.keys() == ["kept"]
    assert use_bucket(bucket, left_by_driver="elsewhere").sees_driver is False


def test_a_store_that_only_pretends_to_have_conditions_is_found_out() -> None:
    bucket = Forgetful("memory://forgetful")
    assert use_bucket(bucket).conditional == "ignored"
    assert bucket.keys() == []


def test_a_bucket_that_cannot_be_written_is_told_by_its_first_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    use = use_bucket(open_bucket(str(tmp_path / "file")))
    assert [request.verb for request in use.requests] == ["put"]
    assert "is a file" in use.requests[0].error
    assert use.conditional == "untried"


@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 1 << 28))
def test_samples_reach_from_the_first_row_group_to_the_last(row_groups: int, world_size: int, largest: int) -> None:
    def sampled(rank: int) -> list[int]:
        return sampled_groups(row_groups, largest=largest, rank=rank, world_size=world_size)

    chosen = {group for rank in range(world_size) for group in sampled(rank)}
    assert chosen <= set(range(row_groups))
    assert 0 in chosen
    if world_size > 1 or largest <= 1 << 25:
        assert row_groups - 1 in chosen
    if row_groups <= GROUPS_OF_A_WORKER * world_size and largest <= 1 << 23:
        assert chosen == set(range(row_groups))
    assert all(1 <= len(sampled(rank)) <= GROUPS_OF_A_WORKER for rank in range(world_size))


def test_sampled_row_groups_are_read_against_their_checksums(job: JobConfig) -> None:
    data = open_data(job.data.train)
    sample = sample_data(job.data.train, rank=0, world_size=2)
    assert (sample.images, sample.shape, sample.row_groups) == (40, (1, 4, 4), 10)
    assert sample.fingerprint == data.manifest.fingerprint
    assert sample.read == sum(int(data.row_groups["size"][group]) for group in sample.checked)
    shard = Path(job.data.train) / data.manifest.shards[-1].key
    damaged = bytearray(shard.read_bytes())
    damaged[int(data.row_groups["offset"][-1])] ^= 1
    shard.write_bytes(damaged)
    assert 9 not in sample.checked  # which is of the other rank
    assert sample_data(job.data.train, rank=0, world_size=2).checked == sample.checked
    with pytest.raises(DataError, match=f"{shard} row group [0-9]: checksum is"):
        sample_data(job.data.train, rank=1, world_size=2)


def test_a_steps_memory_is_that_of_its_tensors(job: JobConfig) -> None:
    """Weights and biases of 16-5-3x2 and 3-5-16; Adam keeps two moments of each and one counter of each tensor."""
    parameters = [16 * 5, 5, 5 * 6, 6, 3 * 5, 5, 5 * 16, 16]
    trial = Trial(job)
    memory = trial.memory()
    names = {name: tuple(tensor.shape) for name, tensor in trial.state.scorer.named_parameters()}
    assert sum(math.prod(shape) for shape in names.values()) == sum(parameters), names
    assert memory.weights == memory.gradients == 4 * sum(parameters)
    assert memory.moments == 8 * sum(parameters) + 4 * len(names)
    assert memory.averaged == 0
    assert memory.fixed < 4 * 16 * 5, "weights that are kept for the backward pass count once"
    averaged = job.model_copy(update={"optimizer": job.optimizer.model_copy(update={"ema": 10.0})})
    assert estimate_memory(averaged).averaged == memory.gradients


def test_what_a_step_keeps_grows_with_the_batch_as_estimated(job: JobConfig) -> None:
    trial = Trial(job)
    memory = trial.memory()
    for images in (8, 32, 100):
        assert trial._kept(images) == pytest.approx(memory.fixed + images * memory.per_image, rel=0.02)
    # each of two hidden layers and the code are kept at least once, in float32
    assert memory.per_image >= 4 * (5 + 5 + 3)


def test_larger_batches_are_tried_until_the_machine_would_be_full(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, free = estimate_memory(job), free_memory()
    # Other tests take memory meanwhile, and give it back.
    monkeypatch.setattr("vaejob.cluster.doctor.step.free_memory", lambda: free)
    per_image = int(0.8 * free) // 12  # so that with the weights 11 images fit, and 12 do not
    pieces = job.model_copy(update={"training": job.training.model_copy(update={"micro_batch": 1})})
    assert estimate_memory(pieces) == memory
    curve = measure_curve(job, memory._replace(per_image=per_image), processes=1)
    assert [step.images for step in curve.steps] == [1, 2, 4, 8, 10, 11]
    assert (curve.ended, curve.refused) == ("estimate", 12)
    assert all(step.seconds > 0 and step.peak is None for step in curve.steps)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute:UserWarning")  # torch's own
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("images", "world_size"), [(8, 1), (4, 2)])
def test_the_step_is_timed_as_the_job_will_take_it(
    job: JobConfig, images: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()  # what tests before have compiled, or were refused
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert timed_step(job, images=images, world_size=world_size).compile_seconds is None
    torch._dynamo.utils.counters.clear()
    compiled = job.model_copy(update={"training": job.training.model_copy(update={"compile": True})})
    step = timed_step(compiled, images=images, world_size=world_size)
    assert step.compile_seconds is not None
    assert step.compile_seconds > step.seconds
    assert (graphs := torch._dynamo.utils.counters["stats"]["unique_graphs"]) > 0
    assert estimate_memory(compiled) == estimate_memory(job)
    curve = measure_curve(compiled, estimate_memory(job), processes=1)
    assert {step.compile_seconds for step in curve.steps} == {None}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_the_way_to_this_machine_is_its_loopback() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") == ""
