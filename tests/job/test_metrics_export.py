"""What Prometheus and a collector of logs read from a node while a job runs is what stands in the run's bucket."""

import json
import math
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.job.conftest import DIGITS_JOB, free_port, kill_tree, wait_until_answers
from tests.job.nodes import Job, worker_processes
from tests.test_observability import OBSERVABILITY, panel_queries
from vaejob.cluster.gauges import METRICS, exported_name
from vaejob.likelihood.units import NATS_PER_BIT
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.runs import Record, Row, newest_record, read_rows

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

Series = dict[tuple[str, str], float]
"""By the exported name, and the value of the label besides the run's."""


class Cluster:
    """One node, which exports its metrics every second."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.metrics_port = free_port()
        node = {"num_cpus": 2, "include_dashboard": False, "metrics_export_port": self.metrics_port}
        often = {"_system_config": {"metrics_report_interval_ms": 1000}}
        self.ray: Any = Cluster(initialize_head=True, head_node_args={**node, **often})
        self.env = {"RAY_ADDRESS": str(self.ray.address), "RAY_AUTH_MODE": "disabled"}

    def scrape(self) -> Series:
        """The job's own metrics, of the run called run."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        series: Series = {}
        for sample in (sample for family in families for sample in family.samples):
            if sample.name.startswith("ray_vaejob_") and sample.labels["run"] == "run":
                own = [sample.labels[name] for name in ("split", "cause") if name in sample.labels]
                assert (sample.name, *own) not in series, "a series twice"
                series[sample.name, own[0] if own else ""] = sample.value
        return series


@contextmanager
def prometheus(metrics_port: int, folder: Path) -> Iterator[str]:
    """A real server that reads the node every second and holds our alerts; its address."""
    program, port = shutil.which("prometheus"), free_port()
    assert program, "no prometheus: it is in Debian's package of that name"
    folder.mkdir()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(OBSERVABILITY / "alerts.yaml")],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/series",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (folder / "log").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        wait_until_answers(f"http://127.0.0.1:{port}/api/v1/status/runtimeinfo", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def answered(server: str, path: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{server}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
        return json.load(answer)["data"]


class Observed(NamedTuple):
    """A job whose workers stand still, as seen from outside and in its bucket."""

    series: Series
    rows: list[Row]
    record: Record
    logs: list[dict[str, Any]]
    """Lines of Ray Train's own logs, of all processes."""
    panels: dict[str, list[Any]]
    """What Prometheus answers to the query of a panel: samples."""
    alerts: list[Any]
    """Those that fire, or are about to."""


@pytest.fixture(scope="module")
def observed(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    folder = tmp_path_factory.mktemp("observed")
    (folder / "job.yaml").write_text(DIGITS_JOB.format(bucket=folder / "runs", digits=digits))
    run = open_bucket(f"{folder}/runs/run")
    settings = ["cluster.workers=2", "training.images=6000000", "checkpoint.every_images=500"]
    before = {process.pid for process in worker_processes()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster()
    try:
        with prometheus(cluster.metrics_port, folder / "prometheus") as server:
            job = Job(folder / "job.yaml", *settings, env=cluster.env, log=folder / "log")
            try:
                job.wait_until(lambda: any(row["split"] == "test" for row in read_rows(run)))
                for worker in (process for process in worker_processes() if process.pid not in before):
                    worker.send_signal(signal.SIGSTOP)  # so that the numbers stand still
                series = scraped_at_rest(cluster, job, run)
                panels, alerts = shown(server, images_seen=series["ray_vaejob_images_seen", ""])
            finally:
                kill_tree(job.process.pid)
                job.process.wait()
        logs = Path(cluster.ray.head_node.get_logs_dir_path()).glob("train/*.log")
        lines = [json.loads(line) for log in sorted(logs) for line in log.read_text().splitlines()]
    finally:
        cluster.ray.shutdown()
    record, _ = newest_record(run)
    assert record is not None
    return Observed(series, read_rows(run), record, lines, panels, alerts)


def shown(server: str, *, images_seen: float) -> tuple[dict[str, list[Any]], list[Any]]:
    """What each panel shows of the run called run, once Prometheus has come to so many images, and the alerts."""
    deadline = time.monotonic() + 60
    while not answered(server, "query", query=f'ray_vaejob_images_seen{{run="run"}} == {images_seen}')["result"]:
        assert time.monotonic() < deadline, "Prometheus has not read what the node exports"
        time.sleep(0.2)
    panels = {}
    for query in panel_queries():
        asked = query.replace("$__rate_interval", "1m").replace("$run", "run")
        panels[query] = answered(server, "query", query=asked)["result"]
    return panels, answered(server, "alerts")["alerts"]


def scraped_at_rest(cluster: Cluster, job: Job, run: Bucket) -> Series:
    """Once the bucket and the exporter have both come to the last report."""
    deadline, settled = time.monotonic() + 120, -1
    while True:
        series, now = cluster.scrape(), read_rows(run)[-1]["images_seen"]
        if settled == now == series.get(("ray_vaejob_images_seen", "")):
            return series
        assert time.monotonic() < deadline, (series, job.said)
        settled = now
        time.sleep(3)


def test_scraped_metrics_are_the_sums_in_the_bucket(observed: Observed) -> None:
    series, rows, record = observed[:3]
    trained, held_out = [[row for row in rows if row["split"] == split] for split in ("train", "test")]
    for split, row in (("train", trained[-1]), ("held_out", held_out[-1])):
        bits = row["negative_bound_nats"] / row["dims"] / NATS_PER_BIT
        assert math.isclose(series["ray_vaejob_bits_per_dim", split], bits, rel_tol=1e-12)
        assert series["ray_vaejob_bound_nats", split] == row["negative_bound_nats"] / row["images"]
        assert series["ray_vaejob_non_finite_images", split] == 0
    last = trained[-1]
    assert series["ray_vaejob_images_per_second", ""] == last["images"] / last["seconds"]
    assert series["ray_vaejob_data_wait_ratio", ""] == last["data_wait_seconds"] / last["seconds"]
    assert series["ray_vaejob_images_wanted", ""] == 6000000
    assert series["ray_vaejob_workers", ""] == series["ray_vaejob_workers_wanted", ""] == 2
    assert series["ray_vaejob_steps_total", ""] == sum(row["steps"] for row in trained)
    assert series["ray_vaejob_attempts_total", ""] == series["ray_vaejob_start_number", ""] == 1

    committed_at = datetime.fromisoformat(record.written_at).timestamp()
    assert series["ray_vaejob_checkpoint_images", ""] == record.images_seen
    assert series["ray_vaejob_checkpoint_timestamp_seconds", ""] == committed_at
    assert series["ray_vaejob_start_timestamp_seconds", ""] < committed_at
    reported_at = next(row["written_at"] for row in trained if row["images_seen"] == record.images_seen)
    took = committed_at - datetime.fromisoformat(reported_at).timestamp()
    assert series["ray_vaejob_checkpoint_commit_seconds", ""] == took

    never_counted = {"vaejob_retries", "vaejob_skipped_steps", "vaejob_non_finite_steps"}
    assert {name for name, _ in series} == {exported_name(name) for name in METRICS.keys() - never_counted}


def test_every_panel_shows_the_job_and_no_alert_fires(observed: Observed) -> None:
    """The dashboard's queries, asked of a Prometheus that read the job."""
    empty = {query for query, samples in observed.panels.items() if not samples}
    assert empty == {query for query in observed.panels if "retries" in query}  # nothing was repeated
    assert observed.alerts == []
    values = {query: [float(sample["value"][1]) for sample in samples] for query, samples in observed.panels.items()}
    for query, numbers in values.items():
        assert all(map(math.isfinite, numbers)), query
    for name in ("bits_per_dim", "bound_nats", "images_seen", "workers", "checkpoint_images"):
        (query,) = [query for query in values if f"ray_vaejob_{name}{{" in query]
        of_series = [value for (series, _), value in observed.series.items() if series == f"ray_vaejob_{name}"]
        assert sorted(values[query]) == sorted(of_series)
    assert [values[query] for query in values if "non_finite_steps" in query or "skipped_steps" in query] == [[0], [0]]


def test_lines_of_the_logs_say_of_which_run_start_attempt_and_rank_they_are(observed: Observed) -> None:
    said = [line for line in observed.logs if "run" in line]
    ours = {(line["split"], line["images_seen"]) for line in said if line["message"] == "row"}
    assert ours == {(row["split"], row["images_seen"]) for row in observed.rows}
    (attempt,) = {row["attempt"] for row in observed.rows}
    assert {(line["run"], line["start"], line["attempt"], line["component"]) for line in said} == {
        ("run", 1, attempt, "controller")
    }
    assert {line["run_name"] for line in observed.logs} == {"run-start-1"}
    of_workers = [line for line in observed.logs if line["component"] == "worker"]
    assert {line["world_rank"] for line in of_workers} == {0, 1}
