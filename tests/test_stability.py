"""A step with a wild gradient changes nothing; a job that cannot go on goes back; replicas are proven equal."""

import io
import math
import statistics
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vaejob
import vaejob.training.loop
from tests.ranks import leave
from tests.test_checkpoint import GlooWorker, assert_equal
from tests.test_step import IDS, IMAGES, JOB
from vaejob.config import JobConfig, OptimizerConfig
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import ConfigError
from vaejob.run import begin, make_ledger, open_inputs, work
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.directory import DirectoryBucket
from vaejob.storage.runs import Record, read_record, read_rows, recorded_images, write_record
from vaejob.training.checkpoint import StateWriter, TrainState, read_state
from vaejob.training.stability import GradientGuard, replica_checksum
from vaejob.training.step import make_optimizer, make_scorer, train_step
from vaejob.training.worker import Event, Report

NAN, INF = math.nan, math.inf


# The guard alone: one weight, whose gradient is its norm.


class Plain:
    """The same rules in plain Python."""

    def __init__(self, *, factor: float, clip: float) -> None:
        self.factor, self.clip = factor, clip
        self.norms: list[float] = []
        self.large_in_a_row = 0

    def __call__(self, norm: float) -> float | None:
        """What the gradient is divided by, or None where the step is skipped."""
        if not math.isfinite(norm):
            return None
        bound = self.clip
        if (
            len(self.norms) == 64
            and self.factor
            and norm > (largest := self.factor * statistics.median_low(self.norms))
        ):
            self.large_in_a_row += 1
            if self.large_in_a_row <= 8:
                return None
            bound, self.norms = min(bound or INF, largest), []
        else:
            self.norms = [*self.norms, norm][-64:]
        self.large_in_a_row = 0
        return max(1.0, norm / bound) if bound else 1.0


def lone_weight(config: OptimizerConfig, *, on_host: bool | None = None):
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    return weight, make_optimizer(config, nn.ParameterList([weight])), GradientGuard(config, on_host=on_host)


def everything(weight: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        weight.detach().clone(),
        *(torch.as_tensor(part).clone() for part in optimizer.state.get(weight, {}).values()),
    ]


def rough_norms(seed: int, steps: int = 400) -> list[float]:
    """Mostly near 1, with runs of values that are too large or not finite."""
    chance = np.random.default_rng(seed)
    norms: list[float] = []
    while len(norms) < steps:
        match chance.integers(12):
            case 0:
                norms += [float(10 ** chance.uniform(1, 6))] * int(chance.integers(1, 14))
            case 1:
                norms += [float(chance.choice([NAN, INF, 1e6])) for _ in range(int(chance.integers(1, 30)))]
            case _:
                norms += chance.lognormal(0, 0.5, size=20).tolist()
    return [float(np.float32(norm)) for norm in norms[:steps]]


@pytest.mark.parametrize("name", ["adam", "adamw", "adamax"])
@pytest.mark.parametrize(("factor", "clip"), [(10.0, 0.0), (4.0, 1.5), (0.0, 0.0)])
def test_steps_are_taken_clipped_and_skipped_as_by_plain_rules(name: str, factor: float, clip: float) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.01, skip_factor=factor, clip=clip, weight_decay=0.1)
    weight, optimizer, guard = lone_weight(config)
    expected, plain_optimizer, _ = lone_weight(config)
    rules, taken, skipped = Plain(factor=factor, clip=clip), [], 0
    for step, norm in enumerate(rough_norms(3)):
        direction = torch.tensor([0.6, -0.8 if step % 2 else 0.8])
        weight.grad = direction * norm
        found = guard.step(optimizer)
        divisor = rules(norm := float(torch.nn.utils.get_total_norm([direction * norm])))
        assert found == (divisor is None), step
        if divisor is None:
            skipped += 1
        else:
            expected.grad = direction * norm / divisor
            plain_optimizer.step()
            taken.append(norm)
        torch.testing.assert_close(
            everything(weight, optimizer), everything(expected, plain_optimizer), rtol=1e-4, atol=1e-6
        )
    counts = guard.counts()
    assert (counts.steps, counts.skipped) == (400, skipped)
    assert counts.norms == pytest.approx(sum(taken))
    assert 20 < skipped < 380
    guard.restart()
    assert guard.counts()[:4] == (0, 0, 0, 0.0)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_decision_left_to_the_fused_step_changes_no_bit(name: str) -> None:
    """A GPU decides on the device, without waiting; torch's CPU step knows the same two tensors."""
    config = OptimizerConfig(name=name, learning_rate=0.01, clip=3.0, weight_decay=0.1)
    (weight, optimizer, guard), (other, fused, on_device) = lone_weight(config), lone_weight(config, on_host=False)
    weight.grad = other.grad = torch.tensor([0.1, 0.2])
    assert guard.step(optimizer) == on_device.step(fused) == 0  # from now on both have moments
    for norm in rough_norms(4):
        weight.grad, other.grad = (torch.tensor([0.6, 0.8]) * norm for _ in range(2))
        assert guard.step(optimizer) == on_device.step(fused)
        assert all(map(torch.equal, everything(weight, optimizer), everything(other, fused)))
    assert guard.counts() == on_device.counts()
    assert guard.counts().skipped > 40


def test_model_is_never_frozen() -> None:
    """Gradients that grow for good are followed again after 8 steps, the first of them no further than the limit."""
    weight, optimizer, guard = lone_weight(OptimizerConfig(learning_rate=0.01))
    fates = []
    for norm in [1.0] * 64 + [1000.0] * 80:
        weight.grad = torch.tensor([norm, 0.0])
        fates.append(int(guard.step(optimizer)))
        if len(fates) == 73:
            assert weight.grad.tolist() == [10.0, 0.0]
    assert fates == [0] * 64 + [1] * 8 + [0] * 72


@settings(max_examples=10)
@given(cut=st.integers(0, 400), seed=st.integers(0, 5))
def test_resumed_guard_decides_as_the_uninterrupted_one(cut: int, seed: int) -> None:
    config = OptimizerConfig()
    weight, optimizer, guard = lone_weight(config)
    other, fellow, cut_guard = lone_weight(config)
    for step, norm in enumerate(rough_norms(seed)):
        if step == cut:
            kept = {name: tensor.clone() for name, tensor in cut_guard.tensors().items()}
            cut_guard = GradientGuard(config)
            cut_guard.load(kept)
        weight.grad, other.grad = (torch.tensor([0.0, norm]) for _ in range(2))
        assert guard.step(optimizer) == cut_guard.step(fellow)
    assert_equal(guard.tensors(), cut_guard.tensors())


# A step of a model.


def one_step(state: TrainState, *, epoch: int) -> Tensor:
    return train_step(
        state.scorer, state.optimizer, torch.from_numpy(IMAGES), IDS, job=JOB, pixels=state.scorer.pixels, epoch=epoch,
        beta=1.0, learning_rate=0.01, weight=1 / 3, guard=state.guard,
    ).skipped  # fmt: skip


@pytest.mark.parametrize("wild", [1e6, NAN])
def test_one_wild_gradient_leaves_no_trace(wild: float) -> None:
    state, calm = (TrainState.begin(JOB.optimizer, make_scorer(JOB, shape=(1, 4, 4))) for _ in range(2))
    for epoch in range(70):
        assert not one_step(state, epoch=epoch)
        assert not one_step(calm, epoch=epoch)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    hook = next(state.scorer.parameters()).register_hook(lambda gradient: gradient * wild)
    assert one_step(state, epoch=70)
    hook.remove()
    after = state.tensors()
    for name in ("guard.counts", "guard.norms") if wild == 1e6 else ("guard.counts",):
        del before[name], after[name]  # one of them counts the steps skipped in a row
    assert_equal({name: after[name] for name in before}, before)
    assert one_step(state, epoch=71) == one_step(calm, epoch=71) == 0
    assert_equal(state.tensors(), calm.tensors())


def test_norm_is_clipped_as_torch_clips_it() -> None:
    job = JOB.model_copy(update={"optimizer": OptimizerConfig(name="adamax", clip=0.25)})
    state = TrainState.begin(job.optimizer, make_scorer(job, shape=(1, 4, 4)))
    parameters = list(state.scorer.parameters())
    chance = torch.Generator().manual_seed(0)
    gradients = [torch.randn(parameter.shape, generator=chance) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    state.guard.step(state.optimizer)
    clipped = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    norm = nn.utils.clip_grad_norm_(parameters, 0.25)
    assert norm > 1
    assert state.guard.counts().norms == pytest.approx(norm.item())
    torch.testing.assert_close(clipped, [parameter.grad for parameter in parameters], rtol=1e-5, atol=0)


# Whole jobs.


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_digits(tmp_path_factory.mktemp("digits"))


def pack_digits(folder: Path) -> Path:
    images = (load_digits().images * (255 / 16)).round().astype("uint8")[:, None]
    pack(ArraySource("digits", images), str(folder), split="train=0.8,test=0.2")
    return folder


def small_job(digits: Path, bucket: Path, *overrides: str) -> JobConfig:
    return vaejob.load_config(
        "quickstart", f"data.train={digits}/train", f"data.test={digits}/test", f"run.bucket={bucket}", "run.name=run",
        "cluster.workers=0", "model.hidden=[16]", "model.latent=4", "data.global_batch=64", "training.images=2560",
        "training.report_every_images=640", "training.evaluate_every_images=0", "checkpoint.every_images=640",
        "checkpoint.keep_last=9", *overrides,
    )  # fmt: skip


def newest_state(run: Bucket) -> dict[str, Tensor]:
    return read_state(run, read_record(run, recorded_images(run)[-1]))


def plant(run: Bucket, record: Record, tensors: dict[str, Tensor]) -> None:
    """A checkpoint of these tensors, in the place of a recorded one."""
    writer = StateWriter(run, attempt="planted", rank=0, world_size=1)
    writer.save(record.images_seen, tensors)
    writer.finish()
    files = (writer.saved()[record.images_seen],)
    write_record(run, record.model_copy(update={"files": files, "attempt": "planted", "world_size": 1}))


def test_job_goes_back_to_a_good_checkpoint_at_half_the_learning_rate(digits: Path, tmp_path: Path) -> None:
    """The newest state is poisoned. What follows is the job that went on from the one before it at half the rate."""
    jobs = {name: small_job(digits, tmp_path / name) for name in ("poisoned", "halved")}
    told: list[Event] = []
    for name, job in jobs.items():
        vaejob.train(job.model_copy(update={"training": job.training.model_copy(update={"images": 1280})}))
        run = open_bucket(f"{tmp_path}/{name}/run")
        assert recorded_images(run) == [640, 1280]
        if name == "poisoned":
            record = read_record(run, 1280)
            tensors = read_state(run, record)
            plant(run, record, {**tensors, "model.vae.output.bias": tensors["model.vae.output.bias"] * NAN})
        else:
            record = read_record(run, 640)
            plant(run, record, {**read_state(run, record), "guard.counts": torch.tensor([0, 0, 1])})
            run.delete("records/000000001280.json")
        vaejob.train(job, on_event=told.append if name == "poisoned" else lambda event: None)
    poisoned, halved = (open_bucket(f"{tmp_path}/{name}/run") for name in jobs)
    assert recorded_images(poisoned) == recorded_images(halved) == [640, 1280, 1967, 2560]
    assert_equal(newest_state(poisoned), newest_state(halved))
    assert newest_state(poisoned)["guard.counts"].tolist() == [0, 0, 1]

    notes = [event.body["text"] for event in told if event.kind == "note"]
    assert notes[-1:] == [
        "the gradients of 21 steps in a row were not finite at 2560 images seen: went back to the checkpoint at 640 images, "
        "the learning rate times 0.5"
    ]
    rows = [row for row in read_rows(poisoned) if row["split"] == "train"]
    assert [(row["images_seen"], row["halvings"], row["learning_rate"]) for row in rows] == [
        (640, 0, 1e-3), (1280, 1, 5e-4), (1967, 1, 5e-4), (2560, 1, 5e-4)
    ]  # fmt: skip
    assert sum(row["images"] for row in rows) == 2560
    assert not any(row["non_finite"] for row in rows)


def test_job_without_a_checkpoint_starts_anew_and_ends_after_three_times(digits: Path, tmp_path: Path) -> None:
    job = small_job(digits, tmp_path, "optimizer.learning_rate=1e6", "checkpoint.every_images=0")
    told: list[Event] = []
    with pytest.raises(
        ConfigError, match=r"steps in a row were not finite at .* after the learning rate was halved 3 times"
    ) as end:
        vaejob.train(job, on_event=told.append)
    assert "\n" not in str(end.value)
    run = open_bucket(f"{tmp_path}/run")
    rows = [row for key in run.keys("metrics/") for row in pq.read_table(io.BytesIO(run.read(key))).to_pylist()]
    assert sorted({(row["halvings"], row["learning_rate"]) for row in rows}) == [
        (0, 1e6),
        (1, 5e5),
        (2, 2.5e5),
        (3, 1.25e5),
    ]
    assert all(row["non_finite_steps"] for row in rows)
    notes = [event.body["text"] for event in told if event.kind == "note"]
    assert sum("went back to the initial weights" in note for note in notes) == 3


def test_skipped_step_is_counted_and_does_not_end_the_job(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def sometimes_poisoned(model: nn.Module, *arguments: Any, **settings: Any) -> Any:
        nonlocal steps
        steps += 1
        bias = settings["pixels"] and model.vae.output.bias.data
        kept = bias.clone()
        if steps in (5, 6, 15):
            bias.fill_(NAN)
        terms = train_step(model, *arguments, **settings)
        if steps in (5, 6, 15):
            assert bias.isnan().all()
            bias.copy_(kept)
        return terms

    monkeypatch.setattr(vaejob.training.loop, "train_step", sometimes_poisoned)
    told: list[Event] = []
    vaejob.train(small_job(digits, tmp_path), on_event=told.append)
    assert [event.body["text"] for event in told if event.kind == "note"] == [
        "at 640 images seen 2 of the last 10 steps were skipped",
        "at 1,280 images seen 1 of the last 10 steps were skipped",
    ]
    run = open_bucket(f"{tmp_path}/run")
    rows = [row for row in read_rows(run) if row["split"] == "train"]
    shown = [event.body["images_seen"] for event in told if event.kind == "row" and event.body["split"] == "train"]
    assert shown == [640, 1280, 1967, 2560]
    assert [(row["steps"], row["skipped_steps"], row["non_finite_steps"], row["non_finite"]) for row in rows] == [
        (10, 2, 2, 128), (10, 1, 1, 64), (11, 0, 0, 0), (10, 0, 0, 0)
    ]  # fmt: skip
    assert all(0 < row["gradient_norms"] < 1e4 for row in rows)
    held_out = read_record(run, 2560).held_out
    assert held_out is not None
    assert not held_out["non_finite"]


# Several ranks.


class WorkerWithLedger(GlooWorker):
    """Rank 0 keeps it."""

    def __init__(self, job: JobConfig, *, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self.ledger = make_ledger(job, open_inputs(job), on_event=lambda event: None) if rank == 0 else None

    def report(self, report: Report) -> None:
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(report.to_dict(), gathered)
        if self.ledger is not None and gathered is not None:
            self.ledger.add([[Report.from_dict(plain) for plain in gathered]])


def rank_of_job(rank: int, world_size: int, folder: str, job: JobConfig, disturbed_step: int | None = None) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    steps = 0

    def disturbed(model: nn.Module, *arguments: Any, **settings: Any) -> Any:
        nonlocal steps
        steps += 1
        terms = train_step(model, *arguments, **settings)
        if rank == 1 and steps == disturbed_step:
            weight = next(model.parameters()).data.view(torch.int32)
            weight[3, 5] ^= 1  # its last bit
        return terms

    vaejob.training.loop.train_step = disturbed
    work(job, WorkerWithLedger(job, rank=rank, world_size=world_size))
    leave()


def rank_that_goes_on(rank: int, world_size: int, folder: str, job: JobConfig) -> None:
    if rank > 0:

        def read(bucket: DirectoryBucket, key: str, *span: int) -> bytes:
            assert not key.startswith("states/"), "only rank 0 reads states"
            return read_as_ever(bucket, key, *span)

        read_as_ever, DirectoryBucket.read = DirectoryBucket.read, read  # type: ignore[method-assign]
    rank_of_job(rank, world_size, folder, job)


def test_ranks_that_go_on_are_sent_the_state_that_the_first_one_reads(digits: Path, tmp_path: Path) -> None:
    """Had one of them other weights or moments, their checksums would differ at the next report, and end the job."""
    settings = "optimizer.ema=500", "optimizer.skip_factor=20"
    vaejob.train(small_job(digits, tmp_path / "whole", *settings))
    vaejob.train(small_job(digits, tmp_path / "again", "training.images=1280", *settings))
    again = small_job(digits, tmp_path / "again", *settings)
    begin(again)
    torch.multiprocessing.spawn(rank_that_goes_on, args=(2, str(tmp_path), again), nprocs=2)
    found, expected = (newest_state(open_bucket(f"{tmp_path}/{name}/run")) for name in ("again", "whole"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("disturbed_step", [None, 25])
def test_replica_that_differs_in_one_bit_ends_the_job(digits: Path, tmp_path: Path, disturbed_step: int | None) -> None:
    job = small_job(digits, tmp_path / "runs", "optimizer.ema=500")
    assert begin(job)
    arguments = (2, str(tmp_path), job, disturbed_step)
    run = open_bucket(f"{tmp_path}/runs/run")
    if disturbed_step is None:
        torch.multiprocessing.spawn(rank_of_job, args=arguments, nprocs=2)
        assert recorded_images(run) == [640, 1280, 1967, 2560]
        return
    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException,
        match="the weights of worker 1 of 2 differ from those of worker 0 at 1967 images seen",
    ):
        torch.multiprocessing.spawn(rank_of_job, args=arguments, nprocs=2)
    assert recorded_images(run)[-1] <= 1280  # where both were the same


@given(
    seed=st.integers(0, 99), shapes=st.lists(st.sampled_from([(), (3,), (2, 5), (4, 1, 3, 3)]), min_size=1, max_size=4)
)
def test_checksum_is_the_sum_of_the_words(seed: int, shapes: list[tuple[int, ...]]) -> None:
    chance = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=chance) for shape in shapes]
    total = 0
    for index, weight in enumerate(weights):
        for value in weight.flatten().tolist():
            total += (2 * index + 1) * struct.unpack("<i", struct.pack("<f", value))[0]
    assert replica_checksum(weights) == total % 2**64
    assert (
        replica_checksum(
            [weight.transpose(-1, 0).contiguous().transpose(-1, 0) if weight.ndim else weight for weight in weights]
        )
        == total % 2**64
    )
    other = [weight.clone() for weight in weights]
    other[seed % len(other)].view(-1).view(torch.int32)[0] ^= 1 << seed % 32
    assert replica_checksum(other) != total % 2**64
