"""A run is watched from its bucket: each change once, an outage in words, and an end with the run."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

import vaejob
from vaejob.cli import watch
from vaejob.cli.watch import Look, looks, many_lines, one_line, seconds_left, trend
from vaejob.config import JobConfig
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import BucketError, RunError
from vaejob.metrics import LikelihoodTotals
from vaejob.storage import open_bucket
from vaejob.storage.runs import begin_attempt


@pytest.fixture
def job(tmp_path: Path) -> JobConfig:
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 4, 4), dtype=np.uint8)
    pack(ArraySource("noise", images), str(tmp_path / "noise"), split="train=0.8,test=0.2")
    return vaejob.load_config(
        "quickstart", f"run.bucket={tmp_path}", "run.name=run", f"data.train={tmp_path}/noise/train",
        f"data.test={tmp_path}/noise/test", "model.hidden=[4]", "model.latent=2", "training.images=640",
        "training.report_every_images=64", "checkpoint.every_images=128", "cluster.workers=0",
    )  # fmt: skip


def test_a_run_is_watched_from_before_its_first_report_to_its_end(job: JobConfig, tmp_path: Path) -> None:
    begin_attempt(open_bucket(f"{tmp_path}/run"), job, who="test")
    pauses = itertools.count()

    def pause() -> None:
        if next(pauses) == 2:
            vaejob.train(job)

    found = list(looks(f"{tmp_path}/run", pause))
    assert [look.run.images_seen for look in found] == [0, 640]
    assert next(pauses) == 3  # nothing was shown where nothing had changed
    assert "no report yet" in one_line(found[0])
    assert "finished, 640 of 640 images" in one_line(found[1])


def test_an_outage_is_told_once_and_so_is_its_end(job: JobConfig, tmp_path: Path) -> None:
    begin_attempt(open_bucket(f"{tmp_path}/run"), job, who="test")
    loop, moved, pauses = tmp_path / "run" / "metrics", tmp_path / "moved", itertools.count()

    def pause() -> None:
        match next(pauses):
            case 0:
                loop.symlink_to(loop)  # every read of it fails, as on a file server that is gone
            case 3:
                loop.rename(moved)
            case 4:
                vaejob.train(job)

    loop.symlink_to(loop)
    with pytest.raises(BucketError):
        next(looks(f"{tmp_path}/run", pause))
    loop.unlink()
    found = list(looks(f"{tmp_path}/run", pause))
    assert [bool(look.problem) for look in found] == [False, True, False, False]
    assert "out of reach" in one_line(found[1])
    assert "out of reach" in many_lines(found[1])
    assert found[-1].run.finished


def test_the_numbers_are_those_of_the_reports(job: JobConfig, tmp_path: Path) -> None:
    vaejob.train(job)
    (look,) = looks(f"{tmp_path}/run", lambda: None)
    rows = [row for row in look.run.rows if row["split"] == "train"]
    old, new = (sum(map(LikelihoodTotals.from_dict, part), LikelihoodTotals()) for part in (rows[:5], rows[5:]))
    moved = trend(look.run)
    assert moved is not None
    assert str(moved._replace(reports=1)).endswith("over 1 report)")
    assert (moved.reports, moved.change) == (5, new.bits_per_dim - old.bits_per_dim)
    half = look.run._replace(rows=rows[:5], newest=None, records=[])
    seconds = sum(row["seconds"] for row in rows[:5])
    done = rows[4]["images_seen"]
    assert seconds_left(half) == pytest.approx((640 - done) * seconds / done)
    assert seconds_left(look.run) is None
    words = many_lines(Look(look.run))
    for part in ("state       finished", "100.0%, 640 of 640", "images/s", "old", "retries", "-ELBO of"):
        assert part in words


def test_an_address_without_a_run_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run"):
        next(looks(str(tmp_path), lambda: None))


def test_ctrl_c_ends_it_quietly(
    job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin_attempt(open_bucket(f"{tmp_path}/run"), job, who="test")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(SystemExit) as ended:
        watch.watch(f"{tmp_path}/run", as_json=False)
    assert ended.value.code == 130
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert said.err == ""
