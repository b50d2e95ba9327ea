"""cluster.workers=[least, most]: workers come and go while training goes on, and what is learnt stays the same."""

import json
import signal
from pathlib import Path

import pytest

from tests.job.conftest import Vaejob, kill_tree
from tests.job.nodes import Job, nodes
from tests.job.test_resume import batches_seen, history
from vaejob.config import ClusterConfig, JobConfig, parse_config
from vaejob.errors import STOPPED_STATUS, ConfigError
from vaejob.storage import open_bucket
from vaejob.storage.runs import read_rows, recorded_images


@pytest.mark.parametrize(
    ("setting", "least", "most", "elastic"),
    [("0", 0, 0, False), ("4", 4, 4, False), ("[1, 3]", 1, 3, True), ("[2, 2]", 2, 2, True)],
)
def test_workers_are_a_number_or_two(setting: str, least: int, most: int, elastic: bool, job_file: Path) -> None:
    job = parse_config(job_file.read_text(), [f"cluster.workers={setting}"])
    for same in (job, parse_config(job.to_yaml()), JobConfig.model_validate(json.loads(job.model_dump_json()))):
        assert (same.cluster.least_workers, same.cluster.most_workers, same.cluster.elastic) == (least, most, elastic)
        assert same.fingerprint == parse_config(job_file.read_text()).fingerprint


@pytest.mark.parametrize("setting", ["-1", "[0, 3]", "[3, 1]", "[1, 2, 3]", "many", "true", "1.5", "[]"])
def test_other_workers_are_refused_in_one_line(setting: str, job_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cluster\.workers is .*; it must be a number of workers, or \[least, most\]"
    ):
        parse_config(job_file.read_text(), [f"cluster.workers={setting}"])


def test_one_worker_is_the_default() -> None:
    assert ClusterConfig().workers == 1


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
def test_three_two_one_and_three_workers_train_what_one_does(
    vaejob: Vaejob, job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    arguments = [
        job_file, "model.hidden=[1024,1024]", "checkpoint.every_images=1500", "training.evaluate_every_images=0",
    ]  # fmt: skip
    run = tmp_path / "runs/elastic"
    with nodes() as cluster:
        first, second, _ = cluster.add(3)
        elastic = ["run.name=elastic", "cluster.workers=[1,3]", "training.images=10000000"]
        job = Job(*arguments, *elastic, env=cluster.env, log=tmp_path / "log")
        try:
            reached = job.wait_for_checkpoint(run)
            for node, left in ((first, 2), (second, 1)):
                cluster.lose(node)
                job.wait_until_says(f"going on with {left} of 3 workers")
                reached = job.wait_for_checkpoint(run, after=reached)
            cluster.add(2)
            job.wait_until_says("there is room for more than 1 of 3 workers: a checkpoint is kept")
            job.wait_until_says("going on with 3 of 3 workers")
            job.wait_for_checkpoint(run, after=recorded_images(open_bucket(str(run)))[-1])
            job.process.send_signal(signal.SIGTERM)
            assert job.ends() == STOPPED_STATUS, job.said
        finally:
            kill_tree(job.process.pid)
            print(*(line for line in job.said.splitlines() if "images  train" not in line), sep="\n")
    sizes: dict[str, int] = {row["attempt"]: row["world_size"] for row in read_rows(open_bucket(str(run)))}
    assert [size for _, size in sorted(sizes.items())] == [3, 2, 1, 3]

    until = recorded_images(open_bucket(str(run)))[-1] + 1000
    for name in ("elastic", "steady"):
        ends = vaejob("train", *arguments, f"run.name={name}", "cluster.workers=0", f"training.images={until}")
        assert ends.returncode == 0, ends.stderr
    assert batches_seen(str(run)) == batches_seen(f"{tmp_path}/runs/steady")
    final = [
        [row for row in history(f"{tmp_path}/runs/{name}") if row["split"] == "test"][-1]
        for name in ("elastic", "steady")
    ]
    assert final[0]["negative_bound_nats"] == pytest.approx(final[1]["negative_bound_nats"], rel=1e-3)
