"""What differs between two runs, against their own records; and the order of the reports of a run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import vaejob
from vaejob.cli import diff as verb
from vaejob.cli.overview import look_at
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.metrics import LikelihoodTotals
from vaejob.storage import open_bucket
from vaejob.storage.runs import choose_record, read_rows, write_rows

app = typer.Typer()
app.command()(verb.diff)

RUNS = {"plain": [], "wider": ["model.hidden=[8]", "checkpoint.keep_last=2"], "k3": ["training.evaluate_samples=3"]}


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None, result.exception
    return result.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 4, 4), dtype=np.uint8)
    pack(ArraySource("noise", images), str(folder / "noise"), split="train=0.8,test=0.2")
    for name, own in RUNS.items():
        settings = [
            f"run.bucket={folder}", f"run.name={name}", f"data.train={folder}/noise/train", f"data.test={folder}/noise/test",
            "model.hidden=[4]", "model.latent=2", "training.images=256", "cluster.workers=0",
        ]  # fmt: skip
        vaejob.train(vaejob.load_config("quickstart", *settings, *own))
    return folder


def between(home: Path, first: str, second: str) -> Any:
    return json.loads(said(str(home / first), str(home / second), "--json"))


def test_settings_that_differ_are_named_with_whether_they_decide(home: Path) -> None:
    found = {one["setting"]: one for one in between(home, "plain", "wider")["settings"]}
    assert set(found) == {"model.hidden", "checkpoint.keep_last"}
    assert (found["model.hidden"]["first"], found["model.hidden"]["second"]) == ([4], [8])
    assert found["model.hidden"]["default"] == [200, 200]
    assert found["model.hidden"]["decides_the_result"]
    assert not found["checkpoint.keep_last"]["decides_the_result"]


def test_the_difference_is_that_of_the_records_with_errors_added_in_squares(home: Path) -> None:
    first, second = (LikelihoodTotals.from_dict(choose_record(open_bucket(f"{home}/{name}"), "best").held_out or {}) for name in ("plain", "wider"))  # fmt: skip
    found = between(home, "plain", "wider")["result"]["difference"]
    assert found["negative_bound_nats"] == second.mean("negative_bound") - first.mean("negative_bound")
    errors = [one.standard_error("negative_bound") for one in (first, second)]
    assert found["negative_bound_nats_standard_error"] == pytest.approx(math.sqrt(sum(e**2 for e in errors)), rel=1e-12)
    assert "unpaired" in said(f"{home}/plain", f"{home}/wider")


def test_bounds_that_do_not_compare_have_a_reason_and_no_difference(home: Path) -> None:
    result = between(home, "plain", "k3")["result"]
    assert result["difference"] is None
    assert result["why_not"] == ["bound: elbo and iwae", "samples: 1 and 3"]
    words = said(f"{home}/plain", f"{home}/k3")
    assert "not comparable: bound: elbo and iwae" in words
    assert "second minus first" not in words


def test_a_run_does_not_differ_from_itself(home: Path) -> None:
    found = between(home, "plain", "plain")
    assert (found["settings"], found["versions"], found["data_fingerprints"]) == ([], [], [])
    assert found["result"]["difference"]["bits_per_dim"] == 0.0


def test_the_last_report_is_of_the_last_start_whatever_its_clock_said(home: Path) -> None:
    bucket = open_bucket(f"{home}/k3")
    row = next(row for row in read_rows(bucket) if row["split"] == "train")
    later = {**row, "attempt": "0-by-a-slow-clock", "attempt_started_at_images": 0, "images_seen": 77}
    write_rows(bucket, [later], sequence=0, begun=99)
    assert look_at(f"{home}/k3", whole_history=False).rows == read_rows(bucket)[-1:]
    assert look_at(f"{home}/k3", whole_history=False).rows[-1]["images_seen"] == 77
