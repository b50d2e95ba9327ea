"""The numbers that a job gives to Prometheus, against the rows and records of a real run, and against closed forms."""

import json
import math
import shutil
import subprocess
import time
from datetime import datetime
from typing import Any

import pytest

import vaejob
from tests.job.conftest import DIGITS_JOB, pack_digits
from vaejob.cluster.gauges import METRICS, MOST_CAUSES, OTHER_CAUSES, Gauges, Reading, Readings, exported_name
from vaejob.config import JobConfig, parse_config
from vaejob.storage import open_bucket
from vaejob.storage.runs import Row, read_rows
from vaejob.training.worker import Event


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[JobConfig, list[Event], list[Row]]:
    """A short job in this process: its configuration, the events it told, and the rows in its bucket."""
    folder = tmp_path_factory.mktemp("gauges")
    digits = pack_digits(str(folder / "digits"))
    job = parse_config(DIGITS_JOB.format(bucket=folder / "runs", digits=digits), ("training.images=2000",))
    events: list[Event] = []
    address = vaejob.train(job, on_event=events.append)
    return job, events, read_rows(open_bucket(address))


def settled(readings: list[Reading]) -> dict[str, float]:
    """Gauges as they were set last, and sums of counters."""
    values: dict[str, float] = {}
    for name, value, label in readings:
        key = exported_name(name) + (f" {label}" if label else "")
        values[key] = value + (values.get(key, 0) if METRICS[name].kind == "counter" else 0)
    return values


def row(**columns: Any) -> Row:
    """A report of 4 images of 64 dimensions by 2 workers, in which nothing went wrong."""
    sums = dict.fromkeys(("distortion_nats", "rate_nats", "distortion_squares", "rate_squares"), 0.0)
    sums |= {f"{name}_squares_rest": 0.0 for name in ("distortion", "rate", "negative_bound")}
    common = {"split": "train", "images_seen": 64, "attempt": "a", "attempt_started_at_images": 0, "world_size": 2}
    bound = {"images": 4, "dims": 256, "non_finite": 0, "negative_bound_nats": 400.0, "negative_bound_squares": 0.0}
    steps = {"steps": 1, "skipped_steps": 0, "non_finite_steps": 0, "retry_causes": "{}"}
    when = {"seconds": 2.0, "data_wait_seconds": 0.5, "written_at": "2026-11-01T12:00:00.250+00:00"}
    return {**sums, **common, **bound, **steps, **when, **columns}


def of(readings: Readings, *bodies: Row) -> dict[str, float]:
    return settled([reading for body in bodies for reading in readings.of(Event("row", body))])


def test_readings_of_a_real_run_are_its_rows(told: tuple[JobConfig, list[Event], list[Row]]) -> None:
    job, events, rows = told
    readings = Readings(job, start=3)
    values = settled([*readings.of_job(), *(reading for event in events for reading in readings.of(event))])
    trained, held_out = [[row for row in rows if row["split"] == split] for split in ("train", "test")]
    last, checked = trained[-1], held_out[-1]
    committed_at, reported_at = [
        datetime.fromisoformat(at).timestamp()
        for at in ([event.body for event in events if event.kind == "record"][-1]["written_at"], last["written_at"])
    ]
    assert time.time() - 60 < values.pop("ray_vaejob_start_timestamp_seconds") < time.time()
    bits = [row["negative_bound_nats"] / (64 * row["images"]) * math.log2(math.e) for row in (last, checked)]
    assert values == {
        "ray_vaejob_bits_per_dim train": pytest.approx(bits[0], rel=1e-12),
        "ray_vaejob_bits_per_dim held_out": pytest.approx(bits[1], rel=1e-12),
        "ray_vaejob_bound_nats train": last["negative_bound_nats"] / last["images"],
        "ray_vaejob_bound_nats held_out": checked["negative_bound_nats"] / checked["images"],
        "ray_vaejob_non_finite_images train": 0,
        "ray_vaejob_non_finite_images held_out": 0,
        "ray_vaejob_images_seen": 2000,
        "ray_vaejob_images_wanted": 2000,
        "ray_vaejob_images_per_second": last["images"] / last["seconds"],
        "ray_vaejob_data_wait_ratio": last["data_wait_seconds"] / last["seconds"],
        "ray_vaejob_checkpoint_images": 2000,
        "ray_vaejob_checkpoint_every_images": 500,
        "ray_vaejob_checkpoint_timestamp_seconds": committed_at,
        "ray_vaejob_checkpoint_commit_seconds": committed_at - reported_at,
        "ray_vaejob_steps_total": sum(row["steps"] for row in trained),
        "ray_vaejob_skipped_steps_total": sum(row["skipped_steps"] for row in trained),
        "ray_vaejob_non_finite_steps_total": 0,
        "ray_vaejob_workers": 1,
        "ray_vaejob_workers_wanted": 0,
        "ray_vaejob_start_number": 3,
        "ray_vaejob_attempts_total": 1,
    }


def test_report_in_closed_form(told: tuple[JobConfig, list[Event], list[Row]]) -> None:
    body = row(skipped_steps=3, non_finite_steps=2, steps=9, retry_causes=json.dumps({"503 SlowDown": 5, "x": 1}))
    values = of(Readings(told[0], start=1), body, body)
    assert values["ray_vaejob_bound_nats train"] == 100.0  # 400 nats, 4 images
    assert values["ray_vaejob_bits_per_dim train"] == pytest.approx(100 / (64 * math.log(2)), rel=1e-12)
    assert values["ray_vaejob_images_per_second"] == 2.0  # 4 images in 2 s
    assert values["ray_vaejob_data_wait_ratio"] == 0.25
    assert values["ray_vaejob_workers"] == 2
    counts = {name: values[name] for name in values if name.endswith("steps_total") or "retries" in name}
    assert counts == {
        "ray_vaejob_steps_total": 18,
        "ray_vaejob_skipped_steps_total": 6,
        "ray_vaejob_non_finite_steps_total": 4,
        "ray_vaejob_retries_total 503 SlowDown": 10,
        "ray_vaejob_retries_total x": 2,
    }


def test_bound_that_is_not_finite_is_no_number(told: tuple[JobConfig, list[Event], list[Row]]) -> None:
    values = of(Readings(told[0], start=1), row(), row(non_finite=1, split="test"))
    assert math.isnan(values["ray_vaejob_bits_per_dim held_out"])
    assert math.isnan(values["ray_vaejob_bound_nats held_out"])
    assert values["ray_vaejob_non_finite_images held_out"] == 1
    assert values["ray_vaejob_non_finite_images train"] == 0


def test_bits_of_a_density_are_those_of_its_levels(told: tuple[JobConfig, list[Event], list[Row]]) -> None:
    job = told[0]
    gaussian = job.likelihood.model_copy(update={"pixels": "gaussian", "bits": 8})
    readings = Readings(job.model_copy(update={"likelihood": gaussian}), start=1)
    nats_per_dim = 100 / 64
    expected = nats_per_dim / math.log(2) + math.log2(255)  # 256 levels from 0 to 1: bins of 1 / 255
    assert of(readings, row())["ray_vaejob_bits_per_dim train"] == pytest.approx(expected, rel=1e-12)


def test_new_attempt_is_counted_and_stands_at_its_checkpoint(
    told: tuple[JobConfig, list[Event], list[Row]],
) -> None:
    readings = Readings(told[0], start=1)
    values = of(readings, row(images_seen=640), row(images_seen=704))
    assert (values["ray_vaejob_attempts_total"], values["ray_vaejob_checkpoint_images"]) == (1, 0)
    values = of(readings, row(images_seen=564, attempt="b", attempt_started_at_images=500))
    assert values["ray_vaejob_attempts_total"] == 1  # one more
    assert (values["ray_vaejob_images_seen"], values["ray_vaejob_checkpoint_images"]) == (564, 500)


def test_checkpoint_is_timed_from_its_own_report(told: tuple[JobConfig, list[Event], list[Row]]) -> None:
    readings = Readings(told[0], start=1)
    of(readings, row(), row(images_seen=128, written_at="2026-11-01T12:00:01.000+00:00"))
    record = {"images_seen": 64, "written_at": "2026-11-01T12:00:03.750+00:00"}
    values = settled(readings.of(Event("record", record)))
    assert values["ray_vaejob_checkpoint_commit_seconds"] == 3.5
    assert values["ray_vaejob_checkpoint_images"] == 64
    assert values["ray_vaejob_checkpoint_timestamp_seconds"] == 1793534403.75  # date --utc --date=... +%s


def test_causes_of_retries_stay_few(told: tuple[JobConfig, list[Event], list[Row]]) -> None:
    readings = Readings(told[0], start=1)
    reports = [row(retry_causes=json.dumps({f"cause {number}": 1})) for number in range(100)]
    counts = {name: count for name, count in of(readings, *reports, reports[0]).items() if "retries" in name}
    assert len(counts) == MOST_CAUSES + 1
    assert counts[f"ray_vaejob_retries_total {OTHER_CAUSES}"] == 100 - MOST_CAUSES
    assert counts["ray_vaejob_retries_total cause 0"] == 2


def test_what_fails_in_the_metrics_is_told_once_and_events_go_on(
    told: tuple[JobConfig, list[Event], list[Row]],
) -> None:
    heard: list[Event] = []
    gauges = Gauges(told[0], start=1, on_event=heard.append)
    unreadable = Event("row", {"split": "train"})
    for _ in range(2):
        gauges.tell(unreadable)
        gauges.keep()
    first, note, second = heard
    assert first == second == unreadable
    assert note.kind == "note"
    assert note.body["text"].startswith("no more metrics for Prometheus, the job goes on without: KeyError")


def test_names_follow_prometheus_conventions() -> None:
    promtool = shutil.which("promtool")
    assert promtool, "no promtool: apt install prometheus"
    exposed = ""
    for name, metric in METRICS.items():
        labels = ",".join(f'{label}="x"' for label in ("run", *metric.labels))
        full = exported_name(name)
        exposed += f"# HELP {full} {metric.about}\n# TYPE {full} {metric.kind}\n{full}{{{labels}}} 1\n"
    done = subprocess.run([promtool, "check", "metrics"], input=exposed, capture_output=True, text=True, check=False)
    # It knows of bits only as the eighth part of a byte; those of a likelihood are no amount of storage.
    assert done.stderr.splitlines() == ['ray_vaejob_bits_per_dim use base unit "bytes" instead of "bits"']
