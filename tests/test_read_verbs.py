"""What the verbs that read say of a small run, trained in this process, against the run's own records."""

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner, Result

import vaejob
from vaejob.cli import look, use
from vaejob.cli.overview import settings_in_use
from vaejob.config import JobConfig
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import DataError, RunError, UserError, VaejobError
from vaejob.pictures.run_pictures import write_run_pictures
from vaejob.storage import open_bucket
from vaejob.storage.runs import choose_record, read_rows

app = typer.Typer()
for verb in (look.runs, look.show, use.evaluate, use.sample, use.reconstruct):
    app.command()(verb)


def result_of(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def said(*arguments: str) -> str:
    result = result_of(*arguments)
    assert result.exception is None, result.exception
    return result.stdout


def said_json(*arguments: str) -> Any:
    return json.loads(said(*arguments, "--json"))


def error_of(*arguments: str) -> VaejobError:
    result = result_of(*arguments)
    assert isinstance(result.exception, VaejobError), result.exception or result.output
    assert "\n" not in str(result.exception)
    assert result.stdout == ""
    return result.exception


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two splits of digits, and other images of another shape."""
    folder = tmp_path_factory.mktemp("home")
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype("uint8")[:, None]
    pack(ArraySource("digits", images), str(folder / "digits"), split="train=0.7,test=0.3")
    pack(ArraySource("black", np.zeros((9, 3, 8, 8), dtype=np.uint8)), str(folder / "black"), split="test")
    return folder


@pytest.fixture(scope="module")
def job(home: Path) -> JobConfig:
    return vaejob.load_config(
        "quickstart",
        f"run.bucket={home}/runs",
        "run.name=digits",
        f"data.train={home}/digits/train",
        f"data.test={home}/digits/test",
        "model.hidden=[32]",
        "training.images=4000",
        "training.report_every_images=1000",
        "training.evaluate_every_images=2000",
        "checkpoint.every_images=2000",
        "cluster.workers=0",
    )


@pytest.fixture(scope="module")
def finished_run(job: JobConfig) -> str:
    return vaejob.train(job)


@pytest.fixture
def copy(finished_run: str, tmp_path: Path) -> Path:
    """The run alone in a bucket of the test's own, to be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / "digits"))


def test_runs_lists_what_the_records_say(finished_run: str, home: Path) -> None:
    (run,) = said_json("runs", f"{home}/runs")
    best = choose_record(open_bucket(finished_run), "best")
    assert best.held_out is not None
    assert run["run"] == finished_run
    assert (run["finished"], run["images_seen"], run["images"], run["attempts"]) == (True, 4000, 4000, 1)
    assert run["epochs"] == 4000 / vaejob.open_data(f"{home}/digits/train").manifest.images
    assert run["best"]["images_seen"] == best.images_seen
    assert (
        run["best"]["held_out"]["negative_bound_nats"] == best.held_out["negative_bound_nats"] / best.held_out["images"]
    )
    assert 0 <= run["last_report_age_seconds"] < 3600


def test_runs_prints_a_table_with_units_counts_and_errors(finished_run: str, home: Path) -> None:
    table = said("runs", f"{home}/runs")
    for words in ("digits", "finished", "4,000", "bits/dim", "nats", "±", "-ELBO of", "ago"):
        assert words in table


def test_settings_and_runs_fit_a_terminal_of_eighty_columns(
    finished_run: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(len(line.rstrip()) for line in said("runs", f"{home}/runs").splitlines()) <= 80
    shown = said("show", finished_run).partition("\ntrain ")[0].splitlines()[3:]
    assert max(map(len, shown)) <= 80
    settings = settings_in_use(vaejob.load(finished_run).job.optimizer)
    optimizer = "\n".join(shown).partition("\noptimizer ")[2].partition("\ndata ")[0].split()
    assert [setting.partition("=")[0] for setting in optimizer] == list(settings)


def test_looking_at_runs_loads_no_torch(finished_run: str, home: Path) -> None:
    look = "import sys; from vaejob.cli import app; app(sys.argv[1:], standalone_mode=False); print('torch' in sys.modules)"
    for verb, address in (("runs", f"{home}/runs"), ("show", finished_run), ("diff", f"{finished_run} {finished_run}")):
        done = subprocess.run(
            [sys.executable, "-c", look, verb, *address.split()], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "False", verb


def test_runs_lists_a_run_without_a_record(copy: Path) -> None:
    shutil.rmtree(copy / "records")
    shutil.rmtree(copy / "metrics")
    (run,) = said_json("runs", str(copy.parent))
    assert (run["finished"], run["images_seen"], run["best"], run["last_report_at"]) == (False, 0, None, None)
    assert "none yet" in said("runs", str(copy.parent))
    assert "unfinished, 0 of 4,000" in said("show", str(copy))


def test_an_unreadable_run_does_not_hide_the_others(copy: Path) -> None:
    shutil.copytree(copy, copy.parent / "broken")
    (copy.parent / "broken" / "job.yaml").write_text("run: [")
    result = result_of("runs", str(copy.parent), "--json")
    assert [run["name"] for run in json.loads(result.stdout)] == ["digits"]
    assert "broken/job.yaml is not YAML" in result.stderr


def test_damage_is_told_and_the_checkpoint_before_it_counts(copy: Path) -> None:
    newest = sorted((copy / "states").iterdir())[-1]
    shutil.rmtree(newest)
    result = result_of("runs", str(copy.parent), "--json")
    assert json.loads(result.stdout)[0]["finished"] is False
    assert newest.name in result.stderr


def test_data_out_of_reach_costs_only_the_epochs(copy: Path, home: Path) -> None:
    text = (copy / "job.yaml").read_text()
    (copy / "job.yaml").write_text(text.replace(f"{home}/digits/train", f"{home}/gone"))
    (run,) = said_json("runs", str(copy.parent))
    assert run["epochs"] is None
    assert run["finished"]


def test_a_run_made_longer_is_as_long_as_it_was_last_asked_to_be(copy: Path) -> None:
    here = (f"run.bucket={copy.parent}", f"run.name={copy.name}")
    vaejob.train(vaejob.load_config(str(copy / "job.yaml"), *here, "training.images=4500"))
    (run,) = said_json("runs", str(copy.parent))
    assert (run["finished"], run["images_seen"], run["images"], run["attempts"]) == (True, 4500, 4500, 2)


def test_an_address_without_runs_is_one_line(finished_run: str, tmp_path: Path) -> None:
    assert "holds no runs" in str(error_of("runs", str(tmp_path)))
    assert f"vaejob show {finished_run}" in str(error_of("runs", finished_run))
    assert "is no run" in str(error_of("show", str(tmp_path)))


def test_show_has_settings_checkpoints_numbers_and_speed(finished_run: str, job: JobConfig, home: Path) -> None:
    run = said_json("show", finished_run)
    held_out = [row for row in read_rows(open_bucket(finished_run)) if row["split"] == "test"][-1]
    assert JobConfig.model_validate(run["settings"]) == job
    assert [checkpoint["images_seen"] for checkpoint in run["checkpoints"]][-1] == 4000
    assert all(checkpoint["bytes"] > 10_000 for checkpoint in run["checkpoints"])
    assert run["held_out"]["negative_bound_nats"] == held_out["negative_bound_nats"] / held_out["images"]
    assert run["train"]["images_per_second"] > 0
    assert 0 <= run["train"]["data_wait_share"] <= 1
    for split in ("train", "test"):
        assert run["fingerprints"][split] == vaejob.open_data(f"{home}/digits/{split}").manifest.fingerprint


def test_show_says_what_each_number_is_of(finished_run: str, home: Path) -> None:
    words = said("show", finished_run)
    held_out = vaejob.open_data(f"{home}/digits/test").manifest
    assert f"-ELBO of {held_out.images} images, discretized-logistic pixels, 4 bits" in words
    assert held_out.fingerprint[:12] in words
    for word in ("latent=16", "global_batch=64", "bits/dim", "±", "images/s with 1 worker", "waiting for images", "MB"):
        assert word in words


def test_evaluate_repeats_what_training_recorded(finished_run: str, home: Path) -> None:
    """To the last bit: the noise belongs to the images."""
    result = said_json("evaluate", finished_run)
    record = choose_record(open_bucket(finished_run), "latest")
    assert record.held_out is not None
    images = record.held_out["images"]
    assert result["negative_bound_nats"] == record.held_out["negative_bound_nats"] / images
    assert result["negative_bound_nats"] == pytest.approx(result["distortion_nats"] + result["rate_nats"], abs=1e-12)
    assert result["bits_per_dim"] == pytest.approx(result["negative_bound_nats"] / 64 / math.log(2), rel=1e-12)
    assert (result["images"], result["split"], result["bits"], result["bound"]) == (images, "test", 4, "elbo")
    assert result["fingerprint"] == record.test_fingerprint


def test_evaluate_says_everything_that_makes_it_comparable(finished_run: str, home: Path) -> None:
    words = said("evaluate", finished_run, "--samples", "3", "--checkpoint", "best")
    assert words.startswith("-IWAE-3 ")
    for word in (
        "nats",
        "bits/dim",
        "±",
        "IWAE bound of 3 samples",
        "4 bits",
        f"{home}/digits/test",
        "split       test",
    ):
        assert word in words


def test_more_samples_tighten_the_bound(finished_run: str) -> None:
    one, many = (said_json("evaluate", finished_run, "--samples", samples) for samples in ("1", "20"))
    assert many["negative_bound_nats"] < one["negative_bound_nats"]
    assert many["distortion_nats"] == one["distortion_nats"]
    assert (many["bound"], many["samples"]) == ("iwae", 20)


def test_evaluate_takes_other_data_and_an_older_checkpoint(finished_run: str, home: Path) -> None:
    older = said_json("show", finished_run)["checkpoints"][0]["images_seen"]
    result = said_json("evaluate", finished_run, "--data", f"{home}/digits/train", "--checkpoint", str(older))
    manifest = vaejob.open_data(f"{home}/digits/train").manifest
    assert older < 4000
    assert (result["checkpoint"], result["images"], result["split"]) == (older, manifest.images, "train")


def test_data_that_does_not_fit_is_one_line(finished_run: str, home: Path) -> None:
    error = error_of("evaluate", finished_run, "--data", f"{home}/black/test")
    assert isinstance(error, DataError)
    assert "images of 3x8x8; this model's have 1x8x8" in str(error)
    assert "no checkpoint at 7 images" in str(error_of("evaluate", finished_run, "--checkpoint", "7"))
    assert "no manifest.json" in str(error_of("reconstruct", finished_run, "--out", "x.png", "--data", f"{home}/none"))


def test_a_run_without_held_out_images_asks_for_some(copy: Path) -> None:
    job = vaejob.load_config(str(copy / "job.yaml"), "data.test=null")
    (copy / "job.yaml").write_text(job.to_yaml())
    error = error_of("evaluate", str(copy))
    assert isinstance(error, RunError)
    assert "--data" in str(error)
    assert Path(write_run_pictures(str(copy))["reconstructions"]).exists()


def test_samples_are_written_and_depend_on_the_seed_alone(finished_run: str, tmp_path: Path) -> None:
    out = [tmp_path / "new" / "folder" / f"{name}.png" for name in ("one", "two", "three")]
    for path, seed in zip(out, "112", strict=True):
        assert said("sample", finished_run, "--out", str(path), "--seed", seed, "--count", "6") == f"{path}\n"
    one, two, three = (path.read_bytes() for path in out)
    assert one == two != three
    with Image.open(io.BytesIO(one)) as picture:
        assert picture.mode == "L"
        assert len(np.unique(np.asarray(picture))) <= 17  # 16 levels, and the separators


def test_reconstructions_show_the_originals_as_the_model_sees_them(finished_run: str, tmp_path: Path) -> None:
    said("reconstruct", finished_run, "--out", str(tmp_path / "pairs.png"), "--count", "1")
    with Image.open(tmp_path / "pairs.png") as picture:
        scale = picture.height // 8
        original = np.asarray(picture)[scale // 2 :: scale, scale // 2 : 8 * scale : scale]
    first = vaejob.open_data(vaejob.load(finished_run).job.data.test or "").images(np.array([0]))[0, 0]
    assert np.array_equal(original, ((first >> 4) * 17))  # 4 bits


def test_an_unwritable_out_is_one_line(finished_run: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "x.png"):
        error = error_of("sample", finished_run, "--out", str(out), "--count", "1")
        assert isinstance(error, UserError)
        assert f"--out is {out}" in str(error)


def test_the_pictures_of_a_run_lie_in_its_bucket(copy: Path) -> None:
    pictures = write_run_pictures(str(copy))
    assert set(pictures) == {"samples", "reconstructions", "samples-beside-reconstructions"}
    for name, address in pictures.items():
        assert address == str(copy / "pictures" / f"{name}.png")
        with Image.open(address) as picture:
            assert picture.format == "PNG"
            assert 500 <= picture.width <= 1300


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
def test_workers_do_not_change_what_evaluate_says(finished_run: str) -> None:
    """To the last bit, with more workers than there are CPUs or blocks of images."""
    arguments = ("evaluate", finished_run, "--samples", "2")
    assert said_json(*arguments, "--workers", "4") == said_json(*arguments)


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
def test_progress_of_workers_never_falls_and_ends_with_all_images(finished_run: str) -> None:
    from vaejob.cluster.evaluate import evaluate_on_cluster

    model, told = vaejob.load(finished_run), list[tuple[int, int]]()
    data = model.job.data.test
    assert data is not None
    totals = evaluate_on_cluster(
        finished_run, data, checkpoint="latest", samples=1, precision="fp32", compiled=False, workers=3,
        cluster=model.job.cluster, on_progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == sorted(told)
    assert told[-1] == (totals.images, totals.images)
