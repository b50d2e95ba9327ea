"""What is wrong with the input is said in one line, with the exit status of its kind, and nothing is left behind."""

import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.job.conftest import Vaejob
from tests.s3.server import S3Server


def refused(vaejob: Vaejob, *arguments: object, status: int = 2, env: dict[str, str] | None = None) -> str:
    """The one line a refused command says."""
    result = vaejob(*arguments, env=env)
    assert result.returncode == status, result.stdout + result.stderr
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("vaejob: ")
    return lines[0]


def of_cluster(kind: str, ray_head: dict[str, str]) -> list[dict[str, Any]]:
    """What Ray knows of its actors or placement groups, those that are gone too."""
    address = f"{ray_head['RAY_API_SERVER_ADDRESS']}/api/v0/{kind}?limit=10000"
    with urllib.request.urlopen(address, timeout=30) as answer:
        listed: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
    return listed


def worker_actors(ray_head: dict[str, str]) -> int:
    return sum(actor["class_name"] == "RayTrainWorker" for actor in of_cluster("actors", ray_head))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("training.imges=5", "training.imges is not a setting; did you mean training.images?"),
        ("trainig.images=5", "trainig is not a setting; did you mean training?"),
        ("data.global_batch=0", "data.global_batch is 0; it must be greater than or equal to 1"),
        ("data.global_batch=many", "data.global_batch is 'many'; it must be a valid integer"),
        (
            "model.family=cnn",
            "model.family is 'cnn'; it must be 'mlp', 'conv', 'tied', 'hierarchical' or 'decoder-only'",
        ),
        ("run.name=a/b", "run.name is 'a/b'; it must"),
        ("run.bucket=ftp://x", "ftp://x/run is no address"),
        ("likelihood.pixels=bernoulli", "choose binarize=threshold, static or dynamic"),
        ("training.images", "'training.images' is not a setting; it must read section.key=value"),
    ],
)
def test_wrong_setting_is_named_with_what_would_be_right(
    setting: str, says: str, vaejob: Vaejob, job_file: Path, tmp_path: Path
) -> None:
    assert says in refused(vaejob, "train", job_file, setting)
    assert not (tmp_path / "runs").exists()


def test_configuration_that_is_not_there(vaejob: Vaejob) -> None:
    assert "neither a configuration file nor a recipe (" in refused(vaejob, "train", "nowhere.yaml")


def test_folder_without_shards(vaejob: Vaejob, job_file: Path, tmp_path: Path) -> None:
    line = refused(vaejob, "train", job_file, f"data.train={tmp_path}/empty")
    assert "empty holds no shards: no manifest.json is there" in line


def test_folder_above_the_splits(vaejob: Vaejob, job_file: Path, digits: str) -> None:
    assert f"use {digits}/test or {digits}/train" in refused(vaejob, "train", job_file, f"data.train={digits}")


def test_bucket_that_cannot_be_written(vaejob: Vaejob, job_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    line = refused(vaejob, "train", job_file, f"run.bucket={tmp_path}/file", status=3)
    assert f"{tmp_path}/file" in line


def test_name_of_another_configuration(vaejob: Vaejob, job_file: Path) -> None:
    assert vaejob("train", job_file, "training.images=500").returncode == 0
    line = refused(vaejob, "train", job_file, "optimizer.learning_rate=0.01")
    assert "belongs to a run with other settings (optimizer.learning_rate: 0.001 -> 0.01)" in line


def test_name_of_a_run_on_other_images(vaejob: Vaejob, job_file: Path, digits: str) -> None:
    assert vaejob("train", job_file, "training.images=500").returncode == 0
    line = refused(vaejob, "train", job_file, f"data.train={digits}/test", "training.images=1000")
    assert "belongs to a run on other images: the fingerprint of data.train was" in line


@pytest.mark.parametrize("damage", ["empty", "flipped", "gone"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_damaged_shard(
    damage: str, workers: int, vaejob: Vaejob, job_file: Path, digits: str, tmp_path: Path, ray_head: dict[str, str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    shard = data / "train/00001.parquet"
    if damage == "gone":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content if damage == "flipped" else b"")
    settings = [f"data.train={data}/train", "--quiet", f"cluster.workers={workers}"]
    before = worker_actors(ray_head)
    line = refused(vaejob, "train", job_file, *settings, env=ray_head)
    assert "train/00001.parquet" in line
    # They are not started again, which would find the same shard and, as the job ends meanwhile, leave places taken.
    assert worker_actors(ray_head) == before + workers
    assert {group["state"] for group in of_cluster("placement_groups", ray_head)} <= {"REMOVED"}


@pytest.mark.ray
def test_more_workers_than_the_cluster_holds(vaejob: Vaejob, job_file: Path, ray_head: dict[str, str]) -> None:
    settings = ["--quiet", "cluster.workers=9", "cluster.wait_seconds=1"]
    line = refused(vaejob, "train", job_file, *settings, status=3, env=ray_head)
    assert "cluster.workers is 9: they ask for 9 CPUs, the cluster has 4 CPUs (4 free)" in line
    gpus = refused(vaejob, "train", job_file, *settings, "cluster.gpus_per_worker=1", status=3, env=ray_head)
    assert "9 GPUs, the cluster has 4 CPUs (4 free) and 0 GPUs (0 free)" in gpus


@pytest.mark.ray
def test_cluster_that_is_not_there(vaejob: Vaejob, job_file: Path) -> None:
    line = refused(
        vaejob,
        "train",
        job_file,
        "--quiet",
        "cluster.workers=1",
        "cluster.address=127.0.0.1:1",
        "cluster.wait_seconds=1",
        status=3,
    )
    assert "no Ray cluster could be reached at 127.0.0.1:1" in line
    submit = refused(vaejob, "submit", job_file, "--address", "http://127.0.0.1:1", status=3)
    assert "no Ray cluster takes jobs at http://127.0.0.1:1" in submit


@pytest.mark.s3
@pytest.mark.parametrize("setting", ["run.bucket", "data.train"])
def test_bucket_that_does_not_exist(setting: str, vaejob: Vaejob, job_file: Path, s3_env: S3Server) -> None:
    line = refused(vaejob, "train", job_file, f"{setting}=s3://vaejob-no-such-bucket/somewhere", status=3)
    assert "s3://vaejob-no-such-bucket does not exist" in line


@pytest.mark.s3
def test_bucket_that_may_not_be_written(
    vaejob: Vaejob, job_file: Path, s3_bucket: str, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if s3_env.kind == "moto":
        pytest.skip("moto checks no secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    line = refused(vaejob, "train", job_file, f"run.bucket={s3_bucket}", status=3)
    assert "access denied" in line
