"""TensorBoard's own reader finds in the event files what the run's rows say, and nothing of a way that was not gone on."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vaejob
from vaejob.cli.report import write_report
from vaejob.cli.tensorboard import write_events
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.pictures.events import Shown, event_file
from vaejob.storage import open_bucket
from vaejob.storage.runs import read_rows, recorded_images, write_rows

BITS, RATE = "bound/-ELBO bits per dim", "terms/rate, nats per image"


@pytest.fixture
def run(tmp_path: Path) -> str:
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 4, 4), dtype=np.uint8)
    pack(ArraySource("noise", images), str(tmp_path / "noise"), split="train=0.8,test=0.2")
    settings = [
        f"run.bucket={tmp_path}/runs", f"data.train={tmp_path}/noise/train", f"data.test={tmp_path}/noise/test",
        "model.hidden=[4]", "model.latent=2", "training.images=640", "training.report_every_images=64",
        "training.evaluate_every_images=320", "checkpoint.every_images=320", "cluster.workers=0",
    ]  # fmt: skip
    return vaejob.train(vaejob.load_config("quickstart", *settings))


def read(folder: str, split: str) -> EventAccumulator:
    reader = EventAccumulator(f"{folder}/{split}", size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    reader.Reload()
    return reader


def test_curves_are_the_rows_of_the_run(run: str) -> None:
    folder, rows = write_events(run), read_rows(open_bucket(run))
    assert folder == f"{run}/tensorboard"
    for split, name in (("train", "train"), ("test", "held-out")):
        own = [row for row in rows if row["split"] == split]
        reader = read(folder, name)
        found = reader.Scalars(BITS)
        assert [point.step for point in found] == [row["images_seen"] for row in own]
        assert [point.value for point in found] == pytest.approx(
            [row["negative_bound_nats"] / row["dims"] / math.log(2) for row in own], rel=1e-6
        )
        assert [point.value for point in reader.Scalars(RATE)] == pytest.approx(
            [row["rate_nats"] / row["images"] for row in own], rel=1e-6
        )
        assert found[0].wall_time < found[-1].wall_time


def test_pictures_histograms_and_layers_are_of_the_checkpoints(run: str) -> None:
    train, held_out = (read(write_events(run), name) for name in ("train", "held-out"))
    at = recorded_images(open_bucket(run))
    assert [image.step for image in train.Images("pictures/samples")] == at
    assert [image.step for image in held_out.Images("pictures/reconstructions")] == at
    (weights, *_) = (tag for tag in train.Tags()["histograms"] if tag.startswith("weights/"))
    assert [point.step for point in train.Histograms(weights)] == at
    model, data = vaejob.load(run), vaejob.open_data(f"{Path(run).parents[1]}/noise/test")
    last = held_out.Histograms("images/-ELBO bits per dim")[-1].histogram_value
    assert last.num == data.manifest.images
    assert last.sum / last.num == pytest.approx(model.evaluate(data).bits_per_dim, rel=1e-5)
    rates = held_out.Scalars("layers/rate of layer 1, nats per image")
    assert rates[-1].value == pytest.approx(model.layer_diagnostics(data).rates[0], rel=1e-5)


def test_an_overtaken_way_is_gone_and_writing_again_leaves_one_file(run: str, tmp_path: Path) -> None:
    bucket = open_bucket(run)
    at = recorded_images(bucket)[0]
    kept = [row for row in read_rows(bucket) if row["images_seen"] <= at and row["split"] == "train"]
    row = {**kept[0], "attempt": "0-earlier-by-its-clock", "attempt_started_at_images": at, "images_seen": at + 1}
    for _ in range(2):
        folder = write_events(run, out=str(tmp_path / "events"))
        assert len(list(Path(folder).glob("train/*"))) == 1
        assert read(folder, "train").Scalars(BITS)[-1].step == 640
    write_rows(bucket, [row], sequence=9, begun=99)
    train = read(write_events(run, out=str(tmp_path / "events")), "train")
    assert [point.step for point in train.Scalars(BITS)] == [*(row["images_seen"] for row in kept), at + 1]
    assert [image.step for image in train.Images("pictures/samples")] == [at]


def test_a_histogram_counts_every_finite_value(tmp_path: Path) -> None:
    values = np.array([0.0, 1.0, 1.0, 3.0, np.nan])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "events.out.tfevents.1").write_bytes(event_file([Shown("h", values, 2**40, 5.0)]))
    (point,) = read(str(tmp_path), "train").Histograms("h")
    assert point.step == 2**40
    found = point.histogram_value
    assert (found.num, found.sum, found.sum_squares, found.min, found.max) == (4, 5.0, 11.0, 0.0, 3.0)
    assert sum(found.bucket) == 4
    assert len(found.bucket) == len(found.bucket_limit)


@pytest.mark.parametrize("write", [write_events, lambda run, quiet: write_report([run], quiet=quiet)])
def test_the_bytes_of_a_state_are_told_unless_quiet(
    run: str, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vaejob.cli.terminal._SECONDS_BETWEEN_LINES", 0.0)
    write(run, quiet=False)
    assert "vaejob: reading the checkpoint: " in capsys.readouterr().err
    write(run, quiet=True)
    assert capsys.readouterr() == ("", "")
