"""A state split over any ranks comes back whole, or not at all."""

import hashlib
import json
import pickle
import secrets
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import leave
from tests.s3.faultproxy import FaultProxy
from tests.s3.server import S3Server
from tests.test_step import JOB
from vaejob.config import OptimizerConfig
from vaejob.errors import CheckpointError
from vaejob.run import restorable
from vaejob.storage import open_bucket
from vaejob.storage.runs import Record, StateFile, newest_record, record_key, write_record
from vaejob.training.checkpoint import StateWriter, TrainState, load_best, read_state, share_of, state_of_first
from vaejob.training.step import make_scorer, move_average
from vaejob.training.worker import Report, Told

AVERAGED = JOB.optimizer.model_copy(update={"ema": 100.0})


def trained_state(config: OptimizerConfig = JOB.optimizer) -> dict[str, torch.Tensor]:
    state = TrainState.begin(config, make_scorer(JOB, shape=(1, 4, 4)))
    for _ in range(3):
        sum(parameter.square().sum() for parameter in state.scorer.parameters()).backward()
        skipped = state.guard.step(state.optimizer)
        if state.averaged is not None:
            move_average(state.averaged, state.scorer, share=0.25, skipped=skipped)
    return state.tensors()


def commit(folder: Path, tensors: dict[str, torch.Tensor], *, images_seen: int, world_size: int) -> Record:
    """What world_size workers and the driver leave in a run."""
    run = open_bucket(str(folder))
    files = []
    for rank in range(world_size):
        writer = StateWriter(run, attempt="attempt", rank=rank, world_size=world_size)
        writer.save(images_seen, tensors)
        writer.finish()
        files.append(writer.saved()[images_seen])
    record = Record(
        images_seen=images_seen, attempt="attempt", world_size=world_size, written_at="now", shape=(1, 4, 4),
        job_fingerprint="", train_fingerprint="", test_fingerprint=None, held_out=None, files=tuple(files), versions={},
    )  # fmt: skip
    write_record(run, record)
    return record


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


@given(sizes=st.lists(st.integers(0, 40), max_size=30), world_size=st.integers(1, 9))
def test_shares_are_a_partition_and_near_equal(sizes: list[int], world_size: int) -> None:
    tensors = {f"t{index}": torch.zeros(size) for index, size in enumerate(sizes)}
    shares = [share_of(tensors, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    loads = [sum(tensor.nbytes for tensor in share.values()) for share in shares]
    assert max(loads) - min(loads) <= 4 * max(sizes, default=0)


@pytest.mark.parametrize("world_size", [1, 3, 50])
def test_what_any_number_of_workers_wrote_comes_back_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    tensors = trained_state()
    record = commit(tmp_path, tensors, images_seen=10, world_size=world_size)
    assert_equal(read_state(open_bucket(str(tmp_path)), record), tensors)


@pytest.mark.parametrize("config", [JOB.optimizer, AVERAGED], ids=["without an average", "with one"])
def test_weights_moments_averages_and_norms_are_put_back(config: OptimizerConfig) -> None:
    tensors = {name: tensor.clone() for name, tensor in trained_state(config).items()}
    tensors["guard.counts"] = torch.tensor([5, 3, 2])
    other = JOB.model_copy(update={"run": JOB.run.model_copy(update={"seed": 9})})
    state = TrainState.begin(config, make_scorer(other, shape=(1, 4, 4)))
    state.load(tensors, images_seen=30)
    assert_equal(state.tensors(), tensors)
    assert (state.images_seen, state.guard.halvings, state.guard.rate_factor) == (30, 2, 0.25)
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"model", "optimizer", "guard"} | ({"ema"} if config.ema else set())
    assert any(name.endswith("/exp_avg_sq") for name in tensors)


def test_state_older_than_the_guard_is_put_back() -> None:
    tensors = {name: tensor for name, tensor in trained_state().items() if not name.startswith("guard.")}
    state = TrainState.begin(JOB.optimizer, make_scorer(JOB, shape=(1, 4, 4)))
    state.load(tensors, images_seen=30)
    assert state.tensors()["guard.norms"].isnan().all()


def test_averaged_weights_are_the_ones_to_use_where_there_are_any() -> None:
    for config, kind in ((JOB.optimizer, "model."), (AVERAGED, "ema.")):
        tensors, scorer = trained_state(config), make_scorer(JOB, shape=(1, 4, 4))
        load_best(tensors, scorer)
        assert_equal({f"{kind}{name}": weight for name, weight in scorer.state_dict().items()},
                     {name: tensor for name, tensor in tensors.items() if name.startswith(kind)})  # fmt: skip
    assert not torch.equal(tensors["ema.vae.output.weight"], tensors["model.vae.output.weight"])


def test_state_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"has shape .*, this model needs"):
        load_best(trained_state(), make_scorer(JOB, shape=(1, 5, 5)))
    with pytest.raises(CheckpointError, match=r"has shape None, this model needs"):
        TrainState.begin(AVERAGED, make_scorer(JOB, shape=(1, 4, 4))).load(trained_state(), images_seen=1)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "torn record"])
def test_damaged_checkpoint_is_passed_over_by_name(damage: str, tmp_path: Path) -> None:
    tensors = trained_state()
    commit(tmp_path, tensors, images_seen=10, world_size=2)
    newest = commit(tmp_path, tensors, images_seen=20, world_size=2)
    path = tmp_path / (record_key(20) if damage == "torn record" else newest.files[1].key)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:-5])
    record, restored, notes = restorable(open_bucket(str(tmp_path)))
    assert record is not None
    assert record.images_seen == 10
    assert restored is not None
    assert_equal(restored, tensors)
    assert restorable(open_bucket(str(tmp_path)), before=10) == (None, None, [])
    assert len(notes) == 1
    assert notes[0].startswith("passed over the checkpoint at 20 images: ")
    assert path.name in notes[0]


def test_run_of_which_nothing_can_be_restored_does_not_start_over(tmp_path: Path) -> None:
    record = commit(tmp_path, trained_state(), images_seen=10, world_size=1)
    (tmp_path / record.files[0].key).unlink()
    with pytest.raises(CheckpointError, match="none of 1 checkpoints can be restored"):
        restorable(open_bucket(str(tmp_path)))
    assert restorable(open_bucket(f"memory://{secrets.token_hex(4)}")) == (None, None, [])


class Bomb:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_file_that_is_not_tensors_is_passed_over_without_running_it(how: str, tmp_path: Path) -> None:
    """Its record vouches for it: size and checksum are right."""
    tensors, ran = trained_state(), tmp_path / "ran"
    commit(tmp_path, tensors, images_seen=10, world_size=1)
    record = commit(tmp_path, tensors, images_seen=20, world_size=1)
    path = tmp_path / record.files[0].key
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(ran)))
    else:
        torch.save({"model.x": Bomb(ran)}, path)
    hostile = path.read_bytes()
    file = record.files[0].model_copy(update={"size": len(hostile), "sha256": hashlib.sha256(hostile).hexdigest()})
    write_record(open_bucket(str(tmp_path)), record.model_copy(update={"files": (file,)}))
    chosen, restored, (note,) = restorable(open_bucket(str(tmp_path)))
    assert chosen is not None
    assert restored is not None
    assert chosen.images_seen == 10
    assert "is no safetensors file" in note
    assert "\n" not in note
    assert not ran.exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"files": [{"key": "../../etc/passwd", "size": 1, "sha256": ""}]}, "names no file of a state of this run"),
        ({"files": [{"key": "states/../../x", "size": 1, "sha256": ""}]}, "names no file of a state of this run"),
        ({"files": [{"key": "/etc/passwd", "size": 1, "sha256": ""}]}, "names no file of a state of this run"),
        ({"files": [{"key": "attempts/000001.yaml", "size": 1, "sha256": ""}]}, "names no file of a state of this run"),
        ({"files": []}, "at least 1 item"),
        ({"images_seen": 30}, "it is the record of 30 images"),
        ({"format": 2}, "should be 1"),
        ({"run_this": "rm"}, "not permitted"),
    ],
)
def test_record_of_elsewhere_is_passed_over_by_name(damage: dict[str, Any], says: str, tmp_path: Path) -> None:
    tensors = trained_state()
    commit(tmp_path, tensors, images_seen=10, world_size=2)
    path = tmp_path / record_key(20)
    path.write_text(json.dumps(commit(tmp_path, tensors, images_seen=20, world_size=2).model_dump() | damage))
    run = open_bucket(str(tmp_path))
    chosen, _, (note,) = restorable(run)
    assert chosen is not None
    assert chosen.images_seen == 10
    assert note.startswith(f"passed over the checkpoint at 20 images: {path} is damaged: ")
    assert says in note
    assert newest_record(run) == (chosen, [note.partition(": ")[2]])


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("optimizer.vae.nowhere/exp_avg", (3,), "is of no weight of this model"),
        ("optimizer.vae.output.bias/exp_avg", (1, 2, 3), r"has shape \(1, 2, 3\), this model needs"),
        ("model.vae.nowhere", (3,), "has shape .*, this model needs None"),
    ],
)
def test_state_with_other_tensors_is_refused_before_training(name: str, shape: tuple[int, ...], says: str) -> None:
    state = TrainState.begin(JOB.optimizer, make_scorer(JOB, shape=(1, 4, 4)))
    with pytest.raises(CheckpointError, match=says):
        state.load({**trained_state(), name: torch.zeros(shape)}, images_seen=1)


@pytest.mark.s3
def test_byte_that_was_flipped_on_its_way_is_no_damage(
    s3_bucket: str, s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tmp_path, trained_state(), images_seen=10, world_size=2)
    for path in tmp_path.rglob("*.*"):
        open_bucket(s3_bucket).write(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    with FaultProxy(upstream=s3_env.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        for where in ("records/", "states/"):
            proxy.strike({"fault": "corrupt", "at": 0, "method": "GET", "path": where, "header": "range", "count": 2})
            record, restored, notes = restorable(open_bucket(s3_bucket))
            assert record is not None
            assert restored is not None
            assert notes == []
            assert [entry["fault"] for entry in proxy.log].count("corrupt") == 2
            assert_equal(restored, trained_state())


def test_each_of_many_states_is_as_it_was_when_it_was_saved(tmp_path: Path) -> None:
    """Though training writes over its tensors at once, and copies take the memory of earlier ones."""
    run = open_bucket(str(tmp_path))
    writer = StateWriter(run, attempt="a", rank=0, world_size=1)
    tensors = {"model.x": torch.zeros(200_000), "optimizer.x/step": torch.tensor(0.0)}
    saved: dict[int, StateFile] = {}
    for images_seen in range(1, 9):
        for tensor in tensors.values():
            tensor.fill_(images_seen)
        writer.save(images_seen, tensors)
        tensors["model.x"].fill_(-1)
        saved |= writer.saved()
    writer.finish()
    saved |= writer.saved()
    assert list(saved) == list(range(1, 9))
    for images_seen, file in saved.items():
        found = safetensors.torch.load(run.read(file.key))
        assert_equal(found, {name: torch.full_like(tensor, images_seen) for name, tensor in tensors.items()})


def test_failed_upload_is_raised_to_the_loop(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file where the folder should be")
    writer = StateWriter(open_bucket(str(tmp_path)), attempt="a", rank=0, world_size=1)
    writer.save(10, {"model.x": torch.zeros(1)})
    with pytest.raises(Exception, match="states"):
        writer.finish()
    assert writer.saved() == {}
    assert safetensors.torch.save({})  # an empty share is a file as well


def sent_to(rank: int, world_size: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    worker = GlooWorker(rank, world_size)
    assert state_of_first(None, worker) is None
    state = state_of_first(tensors_of_all_kinds() if rank == 0 else None, worker)
    assert state is not None
    torch.save(state, Path(folder) / f"{rank}.pt")
    leave()


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 48, dtype=np.uint8))
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
    return {str(kind): bits.clone().view(kind).view(2, -1) for kind in kinds} | {
        "a number": torch.tensor(1.25),
        "nothing": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
    }


def test_state_of_the_first_rank_reaches_the_others_bit_for_bit(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(sent_to, args=(3, str(tmp_path)), nprocs=3)
    expected = tensors_of_all_kinds()
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def listener(told: list[tuple[int, int]]) -> Callable[[int, int], None]:
    return lambda done, total: told.append((done, total))


@pytest.mark.s3
def test_bytes_of_a_state_are_told_as_they_come_and_taken_back_where_they_come_again(
    s3_bucket: str, s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"model.{name}": torch.randn(1_500_000) for name in "abc"}
    written = commit(tmp_path, state, images_seen=10, world_size=2)
    for path in tmp_path.rglob("*.*"):
        open_bucket(s3_bucket).write(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
    with FaultProxy(upstream=s3_env.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.strike({"fault": "corrupt", "at": 0, "method": "GET", "path": "states/", "header": "range", "count": 1})
        for run, least in ((open_bucket(str(tmp_path)), 2), (open_bucket(s3_bucket), 10)):
            told: list[tuple[int, int]] = []
            assert_equal(read_state(run, written, on_progress=listener(told)), state)
            assert {total for _, total in told} == {sum(sizes)}
            assert told[-1] == (sum(sizes), sum(sizes))
            assert max(done for done, _ in told) == sum(sizes)
            assert len(told) >= least
            back = [before - after for (before, _), (after, _) in pairwise(told) if after < before]
            assert back == [] if "://" not in run.url else len(back) == 1 and back[0] in sizes


class GlooWorker:
    """One of several processes on this machine."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.processes_here = rank, world_size, world_size

    def reading(self, done: int, total: int) -> None:
        pass

    def told_by_first(self, value: Told) -> Told:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def should_stop(self) -> bool:
        return False

    def report(self, report: Report) -> None:
        raise AssertionError(report)
