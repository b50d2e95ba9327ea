"""`vaejob story` as a person runs it: six runs, one table, and what it shows."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vaejob as package
from tests.job.conftest import Vaejob
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import STOPPED_STATUS
from vaejob.storage import open_bucket
from vaejob.storage.runs import read_rows, recorded_images

TINY = ("--samples", "10", "training.images=700", "training.report_every_images=700", "model.hidden=[16]")
NUMBER = r"(\d+\.\d\d) ± \d+\.\d\d"


@pytest.fixture(scope="module")
def told(vaejob: Vaejob, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The runs' bucket, and what was said."""
    bucket = tmp_path_factory.mktemp("story")
    done = vaejob("story", "--bucket", bucket, *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return bucket, done.stdout


@pytest.fixture(scope="module")
def as_json(vaejob: Vaejob, told: tuple[Path, str]) -> dict[str, Any]:
    done = vaejob("story", "--bucket", told[0], *TINY, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_table_is_that_of_the_json_at_80_columns(told: tuple[Path, str], as_json: dict[str, Any]) -> None:
    said = told[1].partition("scoring story-tied")[2].partition("\n\n")[2]
    table = [line for line in said.splitlines() if re.search(NUMBER, line) and not line.startswith((" ", "-"))]
    assert len(table) == len(as_json["models"]) == 7
    for line, row in zip(table, as_json["models"].values(), strict=True):
        assert line.startswith(f"{row['title']} ")
        assert f" {row['parameters']:,} " in line
        numbers = [row[name]["nats"] for name in ("train", "test", "marginal") if name in row]
        assert re.findall(NUMBER, line) == [f"{nats:.2f}" for nats in numbers]
        assert ("*" in line) == (row["title"] in ("fixed code", "latent table"))
        assert "!" not in line or row["marginal"]["effective_samples"] < 10
    assert "* conditional on each image's own code: no bound on log p(x)" in said
    assert all(len(line) <= 80 for line in said.splitlines() if str(told[0]) not in line)
    findings = " ".join(said.partition("\n\n")[2].split())
    assert findings == " ".join(f"- {found['text']}" for found in as_json["findings"])


def test_the_runs_are_six_and_are_not_trained_twice(told: tuple[Path, str], as_json: dict[str, Any]) -> None:
    runs = [row["run"] for row in as_json["models"].values() if row["run"]]
    assert [Path(run).name for run in runs] == [f"story-{name}" for name in (
        "marginal", "random-pairing", "fixed-code", "latent-table", "vae", "tied")]  # fmt: skip
    for run in runs:
        rows = read_rows(open_bucket(run))
        assert len({row["attempt"] for row in rows}) == 1
        assert sum(row["images"] for row in rows if row["split"] == "train") == 700


def test_numbers_are_those_of_evaluate_and_say_what_they_are(told: tuple[Path, str], as_json: dict[str, Any]) -> None:
    data = {split: package.open_data(as_json["data"][split]["data"]) for split in ("train", "test")}
    for name in ("story-fixed-code", "story-vae"):
        row, model = as_json["models"][name], package.load(str(told[0] / name))
        for samples, column in ((1, "test"), (10, "marginal")):
            expected = model.evaluate(data["test"], samples=samples)
            assert row[column]["nats"] == pytest.approx(expected.mean("negative_bound"), rel=1e-6)
            assert row[column]["images"] == 353
    assert as_json["models"]["story-vae"]["train"]["nats"] == pytest.approx(
        package.load(str(told[0] / "story-vae")).evaluate(data["train"]).mean("negative_bound"), rel=1e-6
    )
    assert as_json["models"]["story-vae"]["train"]["is"] == "-ELBO"
    assert "no bound on log p(x)" in as_json["models"]["story-fixed-code"]["train"]["is"]


def test_findings_are_differences_of_the_table(as_json: dict[str, Any]) -> None:
    models, found = as_json["models"], {one["of"]: one for one in as_json["findings"]}
    for of, name, other, column in (
        ("marginal", "story-marginal", "closed-form", "test"),
        ("random-pairing", "story-random-pairing", "closed-form", "train"),
        ("fixed-code", "story-fixed-code", "closed-form", "train"),
        ("latent-table", "story-latent-table", "closed-form", "test"),
        ("tying", "story-tied", "story-vae", "marginal"),
    ):
        apart = models[name][column]["nats"] - models[other][column]["nats"]
        assert found[of][column]["nats"] == pytest.approx(apart, abs=1e-4)
        assert f"{apart:+.3f}" in found[of]["text"]
    without = [row for name, row in models.items() if name not in ("closed-form", "story-vae", "story-tied")]
    for column in ("test", "marginal"):
        best = min(row[column]["nats"] for row in without)
        assert found["encoder"][column]["nats"] == pytest.approx(best - models["story-vae"][column]["nats"], abs=1e-4)


def test_other_images_are_named_by_their_folder(vaejob: Vaejob, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 5, 7), dtype=np.uint8)
    pack(ArraySource("noise", images), str(tmp_path / "noise"), split="train=0.5,test=0.5")
    done = vaejob("story", "--bucket", tmp_path / "runs", "--data", tmp_path / "noise", "--json", *TINY)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["data"]["train"]["images"] + found["data"]["test"]["images"] == 60
    assert found["models"]["closed-form"]["parameters"] == 35
    assert not (tmp_path / "runs/digits").exists()


def test_a_stopped_story_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vaejob", "story", "--bucket", str(tmp_path), "training.images=10000000"]
    process = subprocess.Popen(
        [*command, "training.report_every_images=500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert any("train " in line for line in process.stdout)  # up to the first report
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == STOPPED_STATUS
    (seen,) = recorded_images(open_bucket(f"{tmp_path}/story-marginal"))
    assert f"stopped {tmp_path}/story-marginal at {seen:,} of 10,000,000 images; repeat the command to go on" in said


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("run.name=all", "run.name=all is given for all six runs; run.name is what tells them apart"),
        ("objective.pairing=random", "objective.pairing is what tells them apart"),
        ("likelihood.bits=9", "likelihood.bits is 9"),
        ("data.test=null", "data.test is null; the story needs held-out images"),
    ],
)
def test_settings_that_end_the_story_are_refused(setting: str, says: str, vaejob: Vaejob, tmp_path: Path) -> None:
    done = vaejob("story", "--bucket", tmp_path / "runs", setting)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert says in line
    assert not (tmp_path / "runs").exists()


def test_pixels_without_a_closed_form_are_refused(vaejob: Vaejob, tmp_path: Path) -> None:
    settings = ("likelihood.pixels=discretized-logistic", "likelihood.binarize=none")
    done = vaejob("story", "--bucket", tmp_path / "runs", *settings)
    assert done.returncode == 2
    assert "likelihood.pixels is discretized-logistic; the story is told of bernoulli pixels" in done.stderr
