"""What MLflow and Weights & Biases hold of a run is what the run's own rows say, and they cannot end a job."""

import hashlib
import json
import math
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import wandb
from mlflow import MlflowClient
from wandb.proto.wandb_internal_pb2 import Record

import vaejob
from vaejob.cli.trackers import tracked
from vaejob.config import JobConfig
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import UserError
from vaejob.storage import open_bucket
from vaejob.storage.runs import Row, read_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # theirs


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobConfig]:
    for name, value in {
        "MLFLOW_TRACKING_URI": f"{tmp_path}/mlflow",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_API_KEY": "",
    }.items():
        monkeypatch.setenv(name, value)
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 4, 4), dtype=np.uint8)
    pack(ArraySource("noise", images), str(tmp_path / "noise"), split="train=0.8,test=0.2")
    settings = [
        f"run.bucket={tmp_path}/runs", f"data.train={tmp_path}/noise/train", f"data.test={tmp_path}/noise/test",
        "model.hidden=[4]", "model.latent=2", "training.images=640", "training.report_every_images=64",
        "training.evaluate_every_images=320", "checkpoint.every_images=320", "cluster.workers=0",
    ]  # fmt: skip
    yield vaejob.load_config("quickstart", *settings)
    wandb.teardown()


def changed(job: JobConfig, *, images: int | None = None, trackers: tuple[str, ...]) -> JobConfig:
    settings = job.model_dump()
    settings["run"]["trackers"] = trackers
    settings["training"]["images"] = images or job.training.images
    return JobConfig.model_validate(settings)


def train(job: JobConfig) -> tuple[list[Row], list[str]]:
    """The rows that the run then has, and what was warned of."""
    warned: list[str] = []
    with tracked(job, lambda event: None, warn=warned.append) as on_event:
        run = vaejob.train(job, on_event=on_event)
    return read_rows(open_bucket(run)), warned


def bits_of(rows: list[Row], split: str) -> dict[int, float]:
    return {
        row["images_seen"]: row["negative_bound_nats"] / row["dims"] / math.log(2)
        for row in rows
        if row["split"] == split
    }


def identity(job: JobConfig) -> str:
    return hashlib.sha256(f"{job.run.bucket}/{job.run.name}".encode()).hexdigest()[:32]


def test_mlflow_holds_the_rows_and_a_later_start_goes_on_in_the_same_run(job: JobConfig) -> None:
    client = MlflowClient()
    for images in (640, 960):
        rows, warned = train(changed(job, images=images, trackers=("mlflow",)))
        assert warned == []
        experiment = client.get_experiment_by_name("vaejob")
        assert experiment
        (run,) = client.search_runs([experiment.experiment_id])
        assert (run.info.run_name, run.info.status) == ("quickstart", "FINISHED")
        assert run.data.tags["vaejob.run"] == f"{job.run.bucket}/{job.run.name}"
        for split, name in (("train", "train"), ("test", "held_out")):
            history = client.get_metric_history(run.info.run_id, f"{name}/bits_per_dim")
            assert {point.step: point.value for point in history} == pytest.approx(bits_of(rows, split), rel=1e-12)
            assert len(history) == len(bits_of(rows, split))
    assert run.data.params["training.images"] == "640"
    assert run.data.tags["training.images"] == "960"
    assert run.data.params["run.seed"] == str(job.run.seed)


def test_wandb_holds_the_rows_over_images_seen(job: JobConfig, tmp_path: Path) -> None:
    rows, warned = train(changed(job, trackers=("wandb",)))
    assert warned == []
    (file,) = tmp_path.glob(f"wandb/offline-run-*/run-{identity(job)}.wandb")
    held = wandb_history(file)
    for split, name in (("train", "train"), ("test", "held_out")):
        assert held[f"{name}/bits_per_dim"] == pytest.approx(bits_of(rows, split), rel=1e-12)


def wandb_history(file: Path) -> dict[str, dict[int, float]]:
    """Name: {images_seen: value} of what an offline run would be synchronised from."""
    held = defaultdict[str, dict[int, float]](dict)
    for data in records(file.read_bytes()):
        history = Record.FromString(data).history
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        for name, value in values.items():
            held[name][values["images_seen"]] = value
    return held


def records(log: bytes) -> Iterator[bytes]:
    """LevelDB's log format behind a header of 7 bytes: (crc32, length, whole | first | middle | last) in blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        if -at % 32768 < 7 and at % 32768:  # no header fits into the rest of the block
            at += -at % 32768
        _, length, kind = struct.unpack_from("<IHB", log, at)
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_a_tracker_that_is_not_there_is_told_once_and_the_job_is_done(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound, and never listened to
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        rows, warned = train(changed(job, trackers=("mlflow",)))
    assert rows[-1]["images_seen"] == 640
    (line,) = warned
    assert line.startswith("mlflow: ")
    assert line.endswith("; nothing more is sent there by this start of the job, the run has it all")


def test_wandb_without_a_key_is_refused_before_anything_is_trained(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    with pytest.raises(UserError, match="wandb, which has no key here: set WANDB_API_KEY, or WANDB_MODE=offline"):
        train(changed(job, trackers=("wandb",)))
    assert not Path(job.run.bucket).exists()


def test_a_missing_package_is_one_line(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaejob.cli.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlflow, which is not installed here: pip install 'vaejob\[mlflow\]'"):
        train(changed(job, trackers=("mlflow",)))


def test_trackers_do_not_make_another_run(job: JobConfig) -> None:
    assert changed(job, trackers=("mlflow", "wandb")).fingerprint == job.fingerprint
