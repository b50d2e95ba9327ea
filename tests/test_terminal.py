"""What a person reads while a job runs."""

import pytest

from tests.test_step import JOB
from vaejob.cli.terminal import Progress
from vaejob.metrics import LikelihoodTotals
from vaejob.training.worker import Event


def row(totals: LikelihoodTotals, *, split: str, started_at: int = 0) -> Event:
    common = {
        "split": split,
        "images_seen": 50,
        "attempt": "a",
        "attempt_started_at_images": started_at,
        "seconds": 2.0,
    }
    return Event("row", {**common, **totals.to_dict()})


def test_rows_say_where_the_job_is_and_how_likely_the_images_are(capsys: pytest.CaptureFixture[str]) -> None:
    totals = LikelihoodTotals(images=4, dims=64, negative_bound_nats=16.0, negative_bound_squares_rest=100.0)
    progress = Progress(JOB, quiet=False)
    progress(row(totals, split="train", started_at=30))
    progress(row(totals, split="test"))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "continuing from the checkpoint at 30 images"
    assert second.endswith("50 of 100 images  train 4.00 nats, 0.3607 bits/dim, 2 images/s, 25s left")
    # s.e. = sqrt((100 / 4 - 4^2) / 4) = 1.5 nats
    assert third.endswith("held out 0.36067 ± 0.13525 bits/dim, 4.0000 ± 1.5000 nats, 4 images")


def test_a_bound_that_is_not_finite_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(JOB, quiet=False)(row(LikelihoodTotals(images=4, dims=64, non_finite=3), split="test"))
    assert "held out not finite for 3 of 4 images" in capsys.readouterr().out


def test_quiet_leaves_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(JOB, quiet=True)
    progress(row(LikelihoodTotals(images=1, dims=16), split="test"))
    progress(Event("note", {"text": "worker 1 failed"}))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "vaejob: worker 1 failed\n")
