"""What the doctor makes of what its probes found: every line fails, warns and passes when it should."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaejob.cluster.doctor import findings, pace, room
from vaejob.cluster.doctor.findings import Finding, Level
from vaejob.cluster.doctor.results import (
    BucketUse,
    Clock,
    Conditional,
    Curve,
    DataSample,
    Disk,
    Failed,
    Gpu,
    Host,
    Places,
    Request,
    Speed,
    StepMemory,
    Summing,
    TimedStep,
)
from vaejob.cluster.doctor.words import duration, size_of, who

VERSIONS = {"python": "3.11.7", "vaejob": "0.1.0", "code": "abcd1234", "torch": "2.13.0+cpu", "ray": "2.60.0"}
GB = 10**9
DISK = Disk("/tmp", free=60 * GB, size=200 * GB)
HOST = Host("node", VERSIONS, None, memory=8 * GB, shared_memory=2 * GB, temporary=DISK, cache=None, address="10.0.0.1",
            interface="eth0")  # fmt: skip
URL = "s3://models/run"
REQUESTS = tuple(Request(verb, 0.01) for verb in ("put", "get", "list", "conditional put", "delete"))
USE = BucketUse(URL, REQUESTS, "kept", sees_driver=True)
SAMPLE = DataSample(
    "s3://images/train", 1000, (3, 32, 32), "f" * 64, row_groups=10, checked=(0, 9), read=1000, seconds=0.1
)
MEMORY = StepMemory(weights=100, gradients=100, moments=200, averaged=100, fixed=50, per_image=10)


def levels(found: list[Finding]) -> list[tuple[str, Level]]:
    return [(finding.subject, finding.level) for finding in found]


def test_exit_status_tells_the_input_from_the_outside() -> None:
    ok, outside = Finding("warn", "a", "b", "c"), Finding("fail", "a", "b", "c")
    wrong = replace(outside, wrong_input=True)
    assert [findings.exit_status(some) for some in ([], [ok], [ok, outside], [outside, wrong])] == [0, 0, 3, 2]


@pytest.mark.parametrize(
    ("first", "second", "level"),
    [
        ({}, {}, "ok"),
        ({"ray": "2.59.0"}, {}, "fail"),
        ({"ray": "2.60.1"}, {"ray": "2.60.1"}, "fail"),
        ({"code": "00000000"}, {"code": "00000000"}, "fail"),
        ({"python": "3.11.9"}, {"python": "3.11.9"}, "warn"),
        ({"python": "3.12.1"}, {"python": "3.12.1"}, "fail"),
        ({"torch": "2.13.0+cu128"}, {"torch": "2.13.0+cu128"}, "warn"),
        ({"torch": "2.13.0+cu128"}, {}, "fail"),
        ({"torch": "2.12.0+cpu"}, {"torch": "2.12.0+cpu"}, "fail"),
    ],
)
def test_versions_must_be_equal_but_for_what_does_no_harm(
    first: dict[str, str], second: dict[str, str], level: Level
) -> None:
    workers = {"worker 0": VERSIONS | first, "worker 1": VERSIONS | second}
    (found,) = findings.of_versions(VERSIONS, workers)
    assert found.level == level
    assert all(version in found.found for version in first.values())


def test_too_little_room_is_a_failure_that_says_how_many_fit() -> None:
    places = Places(placed=2, asked=5, nodes=1, gpus_in_cluster=4, error="cluster.workers is 5: ...")
    assert levels(findings.of_places(places, gpus_per_worker=0)) == [("workers", "fail"), ("GPUs", "warn")]
    assert "cluster.workers=2" in findings.of_places(places, gpus_per_worker=0)[0].advice
    assert levels(findings.of_places(places._replace(error=""), gpus_per_worker=1)) == [("workers", "ok")]


def test_bucket_failures_are_told_once_for_all_whom_they_meet() -> None:
    def denied(key: str) -> BucketUse:
        return BucketUse(URL, (Request("put", 0.1, f"{URL}/doctor/{key}: access denied (AccessDenied)"),), "untried")

    uses = {"worker 0": denied("a1"), "worker 1": USE, "worker 2": denied("b2"), "the driver": USE}
    failed, *rest = findings.of_bucket(uses)
    assert failed.found == f"from worker 0, worker 2: put: {URL}: access denied (AccessDenied)"
    assert "right to put" in failed.advice
    assert levels(rest) == [("bucket", "ok"), ("starts", "ok")]
    assert findings.exit_status([failed]) == 3


@pytest.mark.parametrize(("conditional", "level"), [("kept", "ok"), ("ignored", "warn"), ("not offered", "warn")])
def test_a_store_without_conditions_is_told_with_what_it_cannot_keep(conditional: Conditional, level: Level) -> None:
    *_, starts = findings.of_bucket({"worker 0": USE, "the driver": USE._replace(conditional=conditional)})
    assert (starts.subject, starts.level) == ("starts", level)
    assert ("replace each other's rows" in starts.found) == (level == "warn")


def test_folders_that_machines_do_not_share_are_found() -> None:
    *_, blind = findings.of_bucket({"worker 0": USE._replace(sees_driver=False), "the driver": USE})
    assert (blind.level, blind.found[:30]) == ("fail", "worker 0 cannot see what the d")


def test_data_is_one_set_on_all_machines_and_damage_is_wrong_input() -> None:
    other = SAMPLE._replace(checked=(0, 5), fingerprint="0" * 64)
    (ok,) = findings.of_data("data.train", {"worker 0": SAMPLE, "worker 1": SAMPLE._replace(checked=(0, 5))})
    assert "3 of 10 row groups" in ok.found
    (differ,) = findings.of_data("data.train", {"worker 0": SAMPLE, "worker 1": other})
    damage = Failed("s3://images/train/00000.parquet row group 1: checksum is 1, the manifest says 2", wrong_input=True)
    damaged, _ = findings.of_data("data.train", {"worker 0": damage, "worker 1": SAMPLE})
    assert [found.level for found in (ok, differ, damaged)] == ["ok", "fail", "fail"]
    assert findings.exit_status([damaged]) == findings.exit_status([differ]) == 2
    assert "row group 1" in damaged.found
    unreachable, _ = findings.of_data("data.train", {"worker 0": Failed("no answer"), "worker 1": SAMPLE})
    assert findings.exit_status([unreachable]) == 3


@given(st.integers(1, 300), st.integers(1, 40))
def test_batches_are_well_if_every_worker_has_the_same_number_of_images(global_batch: int, workers: int) -> None:
    first, *_ = findings.of_batches(global_batch=global_batch, lanes=64, workers=workers, images=10_000)
    of_ranks = {global_batch * (rank + 1) // workers - global_batch * rank // workers for rank in range(workers)}
    assert (first.level == "ok") == (len(of_ranks) == 1)


def test_more_workers_than_lanes_and_batches_larger_than_the_data_are_warned_of() -> None:
    found = findings.of_batches(global_batch=64, lanes=2, workers=4, images=1000)
    assert levels(found) == [("batch", "ok"), ("lanes", "warn")]
    assert levels(findings.of_batches(global_batch=64, lanes=2, workers=1, images=20)) == [("batch", "warn")]


@pytest.mark.parametrize(("free", "level"), [(10_000, "ok"), (1000, "warn"), (900, "fail")])
def test_memory_is_held_against_what_is_free(free: int, level: Level) -> None:
    assert MEMORY.of_batch(40) == 100 + 100 + 200 + 100 + 50 + 400
    found = room.of_memory(MEMORY, images=40, resident=0, free=free, where="here")
    assert found.level == level
    assert "950 B" in found.found
    assert room.of_host_memory(reader=450, state=500, free=free).level == level


def test_a_gpu_that_was_asked_for_must_be_seen() -> None:
    gpu = Gpu("H200", free=100 * GB, size=140 * GB)
    assert room.of_gpus({"worker 0": None}, asked=0) == []
    assert levels(room.of_gpus({"worker 0": gpu, "worker 1": gpu}, asked=1)) == [("GPUs", "ok")]
    assert levels(room.of_gpus({"worker 0": gpu, "worker 1": gpu._replace(name="L4")}, asked=1)) == [("GPUs", "warn")]
    assert levels(room.of_gpus({"worker 0": gpu, "worker 1": None}, asked=1)) == [("GPUs", "fail")]


def test_disks_are_held_against_what_is_needed() -> None:
    def found(host: Host, *, on_gpus: bool = False, workers: int = 2) -> list[tuple[str, Level]]:
        hosts = {f"worker {rank}": host for rank in range(workers)}
        return levels(room.of_disks(hosts, data=10 * GB, cache_bytes=20 * GB, on_gpus=on_gpus))

    assert found(HOST) == [("/dev/shm", "ok"), ("disk", "ok")]
    little = HOST._replace(shared_memory=64 << 20)
    assert [found(little, on_gpus=True)[0], found(little)[0], found(little, on_gpus=True, workers=1)[0]] == [
        ("/dev/shm", "warn"), ("/dev/shm", "ok"), ("/dev/shm", "ok"),
    ]  # fmt: skip
    assert found(HOST._replace(temporary=DISK._replace(free=9 * GB)))[1] == ("disk", "warn")
    assert found(HOST._replace(temporary=DISK._replace(error="Read-only file system")))[1] == ("disk", "fail")
    for cache, level in (
        (DISK, "ok"),
        (DISK._replace(free=4 * GB), "warn"),
        (DISK._replace(free=4 * GB, held=6 * GB), "ok"),
        (DISK._replace(error="Permission denied"), "fail"),
    ):
        assert found(HOST._replace(cache=cache))[2] == ("cache", level)


@pytest.mark.parametrize(
    ("ahead", "blur", "level"), [(0.5, 0.1, "ok"), (-2.0, 0.1, "warn"), (2.0, 1.5, "ok"), (-900.0, 0.1, "fail")]
)
def test_clocks_are_off_only_by_more_than_the_question_blurs(ahead: float, blur: float, level: Level) -> None:
    (found,) = findings.of_clocks({"worker 0": Clock(0.0, 0.1), "worker 1": Clock(ahead, blur)})
    assert found.level == level
    assert f"worker 1 is {abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'} the driver" in found.found


def test_gradients_that_take_long_to_add_up_are_warned_of() -> None:
    summing = Summing(size=100_000_000, seconds=0.2, world_size=4, backend="gloo")
    assert summing.bus_bytes_per_second == pytest.approx(750_000_000)  # each of 4 passes 2 x 3/4 of the bytes
    assert pace.seconds_to_sum(summing, 200_000_000) == pytest.approx(0.4)
    both: list[Summing | Failed] = [summing, summing]
    assert pace.of_summing(both[:1], gradients=10, step_seconds=None) == []
    assert levels(pace.of_summing(both, gradients=10, step_seconds=None)) == [("network", "ok")]
    assert levels(pace.of_summing(both, gradients=10, step_seconds=1.0)) == [("network", "ok")]
    assert levels(pace.of_summing(both, gradients=10, step_seconds=0.5)) == [("network", "warn")]
    assert levels(pace.of_summing([*both, Failed("timed out")], gradients=10, step_seconds=None)) == [
        ("network", "fail")
    ]


def test_the_largest_batch_is_claimed_no_further_than_it_was_tried() -> None:
    steps = tuple(TimedStep(images, seconds=0.1, peak=None) for images in (1, 2, 4))
    fits, rates = pace.of_curve(Curve(steps, "memory", refused=5), configured=4)
    assert (fits.level, fits.found) == ("ok", "4 images of a worker fit, 5 do not")
    assert rates.found.endswith("1: 10, 2: 20, 4: 40")
    assert "no larger" in pace.of_curve(Curve(steps, "time"), configured=64)[0].found
    assert pace.of_curve(Curve(steps, "time"), configured=64)[0].level == "ok"
    fits, _ = pace.of_curve(Curve(steps, "memory", refused=5), configured=8)
    assert fits.level == "fail"
    assert "training.micro_batch=4" in fits.advice
    assert levels(pace.of_curve(Curve((), "memory"), configured=1)) == [("largest batch", "fail")]


def test_time_and_cost_follow_from_the_slowest_worker() -> None:
    steps = [TimedStep(50, seconds=0.3, peak=None), TimedStep(50, seconds=0.2, peak=None)]
    found, speed = pace.of_steps(steps, global_batch=100, sync_seconds=0.06)
    assert speed is not None
    assert speed.seconds_per_step == pytest.approx(0.36)
    assert found.found.startswith("278 images/s")  # 100 / 0.36
    assert "; not compiled; " in found.found
    compiled, _ = pace.of_steps([TimedStep(50, 0.1, None, compile_seconds=25.0)], global_batch=50, sync_seconds=0)
    assert "; compiled, of which the first step took 25 s; " in compiled.found
    # 10 steps an epoch, 100 epochs: 3.6 s and 360 s, which is a tenth of an hour
    said = pace.of_time(speed, images=100_000, data_images=1000, global_batch=100, price_per_hour=200).found
    assert said.startswith("3.6 s an epoch, 6 min for 100,000 images in all, measured now; ")
    assert "at 200 an hour 0.2 an epoch, 20.00 in all" in said
    failed, unknown = pace.of_steps([*steps, Failed("OutOfMemoryError: ...")], global_batch=100, sync_seconds=0)
    assert (failed.level, unknown) == ("fail", None)


def test_nothing_is_guessed_where_nothing_is_known() -> None:
    def time(price: float | None) -> Finding:
        return pace.of_time(None, images=1, data_images=1, global_batch=1, price_per_hour=price)

    assert (time(None).level, time(1.0).level, time(1.0).advice) == ("ok", "warn", "add --measure")


def test_rows_tell_the_speed_of_as_many_workers_and_of_no_others() -> None:
    def row(world_size: int, seconds: float, split: str = "train") -> dict[str, object]:
        return {"split": split, "world_size": world_size, "seconds": seconds, "steps": 10}

    rows = [row(2, 5.0), row(4, 99.0), row(2, 7.0), row(2, 99.0, "test")]
    assert pace.speed_of_rows(rows, world_size=2) == Speed(0.6, "by the newest 2 rows of this run")
    assert pace.speed_of_rows(rows, world_size=3) is None


def test_numbers_are_words_that_people_read() -> None:
    assert [size_of(count) for count in (0, 999, 1000, 1_234_567, 999_600)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 MB",
        "1 MB",
    ]
    assert [duration(seconds) for seconds in (0.0123, 5.678, 600, 7200, 259_200)] == [
        "12.3 ms", "5.68 s", "10 min", "2.0 h", "3.0 days",
    ]  # fmt: skip
    names = [f"worker {rank}" for rank in range(5)]
    assert (who(names, of=5), who(names[:4], of=5), who(names[:1], of=1)) == (
        "all 5", "worker 0, worker 1, worker 2 and 1 more", "worker 0",
    )  # fmt: skip
