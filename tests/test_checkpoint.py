"""A state split over any ranks comes back whole, or not at all."""

import secrets
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_step import JOB
from vaejob.errors import CheckpointError
from vaejob.run import restorable
from vaejob.storage import open_bucket
from vaejob.storage.runs import Record, record_key, write_record
from vaejob.training.checkpoint import StateWriter, load_state, read_state, share_of, state_tensors
from vaejob.training.step import make_optimizer, make_scorer


def trained_state() -> dict[str, torch.Tensor]:
    scorer = make_scorer(JOB, shape=(1, 4, 4))
    optimizer = make_optimizer(JOB.optimizer, scorer)
    for _ in range(3):
        sum(parameter.square().sum() for parameter in scorer.parameters()).backward()
        optimizer.step()
    return state_tensors(scorer, optimizer)


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
        assert torch.equal(found[name], tensor), name


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


def test_weights_and_moments_are_put_back() -> None:
    tensors = {name: tensor.clone() for name, tensor in trained_state().items()}
    scorer = make_scorer(JOB.model_copy(update={"run": JOB.run.model_copy(update={"seed": 9})}), shape=(1, 4, 4))
    optimizer = make_optimizer(JOB.optimizer, scorer)
    load_state(tensors, scorer, optimizer)
    assert_equal(state_tensors(scorer, optimizer), tensors)
    assert any(name.endswith("/exp_avg_sq") for name in tensors)


def test_state_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"has shape .*, this model needs"):
        load_state(trained_state(), make_scorer(JOB, shape=(1, 5, 5)), None)


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
    assert len(notes) == 1
    assert notes[0].startswith("passed over the checkpoint at 20 images: ")
    assert path.name in notes[0]


def test_run_of_which_nothing_can_be_restored_does_not_start_over(tmp_path: Path) -> None:
    record = commit(tmp_path, trained_state(), images_seen=10, world_size=1)
    (tmp_path / record.files[0].key).unlink()
    with pytest.raises(CheckpointError, match="none of 1 checkpoints can be restored"):
        restorable(open_bucket(str(tmp_path)))
    assert restorable(open_bucket(f"memory://{secrets.token_hex(4)}")) == (None, None, [])


def test_file_that_is_not_tensors_is_refused_without_running_it(tmp_path: Path) -> None:
    import hashlib
    import pickle

    record = commit(tmp_path, trained_state(), images_seen=10, world_size=1)
    hostile = pickle.dumps(print)
    (tmp_path / record.files[0].key).write_bytes(hostile)
    file = record.files[0].model_copy(update={"size": len(hostile), "sha256": hashlib.sha256(hostile).hexdigest()})
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        read_state(open_bucket(str(tmp_path)), record.model_copy(update={"files": (file,)}))


def test_failed_upload_is_raised_to_the_loop(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file where the folder should be")
    writer = StateWriter(open_bucket(str(tmp_path)), attempt="a", rank=0, world_size=1)
    writer.save(10, {"model.x": torch.zeros(1)})
    with pytest.raises(Exception, match="states"):
        writer.finish()
    assert writer.saved() == {}
    assert safetensors.torch.save({})  # an empty share is a file as well
