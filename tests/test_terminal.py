"""What a person reads while a job runs."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from tests.test_step import JOB
from vaejob.cli.terminal import Progress, bytes_read
from vaejob.config import LikelihoodConfig
from vaejob.metrics import LikelihoodTotals
from vaejob.training.worker import Event, reading


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
    assert third.endswith("held out 0.36067 ± 0.13525 bits/dim, 4.0000 ± 1.5000 nats, -ELBO of 4 images")


def test_an_attempt_that_had_no_checkpoint_is_told_apart_from_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(JOB, quiet=False)
    totals = LikelihoodTotals(images=4, dims=64, negative_bound_nats=16.0)
    for attempt in ("a", "a", "b"):
        told = row(totals, split="train").body | {"attempt": attempt}
        progress(Event("row", told))
    lines = capsys.readouterr().out.splitlines()
    assert [index for index, line in enumerate(lines) if "images  train" not in line] == [2]
    assert lines[2] == "beginning again, since there was no checkpoint yet"


def test_a_bound_that_is_not_finite_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(JOB, quiet=False)(row(LikelihoodTotals(images=4, dims=64, non_finite=3), split="test"))
    assert "held out not finite for 3 of 4 images" in capsys.readouterr().out
    Progress(JOB, quiet=False)(row(LikelihoodTotals(images=4, dims=64, non_finite=3), split="train"))
    assert "train not finite for 3 of 4 images, 2 images/s, 25s left" in capsys.readouterr().out


def test_quiet_leaves_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(JOB, quiet=True)
    progress(row(LikelihoodTotals(images=1, dims=16), split="test"))
    progress(Event("note", {"text": "worker 1 failed"}))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "vaejob: worker 1 failed\n")


def test_what_the_held_out_figures_are_of_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    totals = LikelihoodTotals(images=4, dims=64, negative_bound_nats=16.0)
    job = JOB.model_copy(update={"data": JOB.data.model_copy(update={"test": "digits/test"})})
    record = {"images_seen": 50, "held_out": totals.to_dict(), "test_fingerprint": "0123456789abcdef"}
    progress = Progress(job, quiet=False)
    progress(Event("record", record | {"held_out": None}))
    progress(Event("record", record))
    progress(Event("record", record))
    told = [line for line in capsys.readouterr().out.splitlines() if "held out" in line]
    assert len(told) == 1
    assert "held out: -ELBO of 4 images, " in told[0]
    assert told[0].endswith("data digits/test (0123456789ab)")


def test_a_density_is_called_one_in_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    job = JOB.model_copy(update={"likelihood": LikelihoodConfig(pixels="gaussian", bits=8)})
    totals = LikelihoodTotals(images=4, dims=64, negative_bound_nats=-160.0)
    for split in ("train", "test"):
        Progress(job, quiet=False)(row(totals, split=split))
    train, test = capsys.readouterr().out.splitlines()
    # -40 nats in 16 dimensions are -3.6067 bits/dim, and log2 255 = 7.9944 more.
    assert "train -40.00 nats (density), 4.3876 bits/dim (density + 7.9944)" in train
    assert "4.38762 ± 0.00000 bits/dim (density + 7.9944), -40.0000 ± 0.0000 nats (density)" in test


def test_a_second_row_tells_the_trend_epochs_workers_retries_and_the_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress(JOB, quiet=False, epoch_images=40)
    for nats, images_seen, retries in ((16.0, 50, 1), (12.0, 60, 2)):
        totals = LikelihoodTotals(images=4, dims=64, negative_bound_nats=nats)
        told = row(totals, split="train").body | {"images_seen": images_seen, "world_size": 3, "retries": retries}
        progress(Event("row", told))
        progress(Event("record", {"images_seen": images_seen, "held_out": None}))
    first, _, second, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("2 images/s, 25s left, epoch 1.2 of 2.5, 3 workers, 1 retry")
    # 1 nat of 16 dimensions is 0.0902 bits/dim less.
    assert " 0.2705 bits/dim, -0.0902 since the last, 2 images/s, 20s left, epoch 1.5 of 2.5, 3 workers" in second
    assert re.search(r", 3 retries, checkpoint \d+s old$", second)


def test_bytes_of_a_state_are_told_now_and_then_and_not_at_all_if_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaejob.cli.terminal._SECONDS_BETWEEN_LINES", 0.0)
    for quiet in (False, True):
        progress = Progress(JOB, quiet=quiet)
        progress(reading(0, 40_000_000))
        progress(reading(30_000_000, 40_000_000))
        with bytes_read(quiet=quiet) as tell:
            tell(10_000_000, 40_000_000)
        said = capsys.readouterr()
        assert said.out == ""
        line = r"vaejob: reading the checkpoint: {} of 40.0 MB, [\d,.]+ MB/s, \d+s left\n"
        assert re.fullmatch("" if quiet else line.format("30.0 MB") + line.format("10.0 MB"), said.err)


SHOW_ROWS = """
import time
from tests.test_step import JOB
from tests.test_terminal import row
from vaejob.cli.terminal import Progress, bytes_read, images_done, say
from vaejob.metrics import LikelihoodTotals
from vaejob.training.worker import Event, reading
with Progress(JOB, quiet=False, epoch_images=40) as progress:
    progress(reading(30_000_000, 120_000_000))
    time.sleep(0.7)
    progress(reading(120_000_000, 120_000_000))
    for nats, images_seen in ((16.0, 50), (12.0, 60)):
        told = row(LikelihoodTotals(images=4, dims=64, negative_bound_nats=nats), split="train").body
        progress(Event("row", told | {"images_seen": images_seen, "world_size": 3, "retries": 1}))
        progress(Event("record", {"images_seen": images_seen, "held_out": None}))
    time.sleep(1.2)  # two pictures a second
with images_done("packing") as tell:
    tell(250, 1000)
    time.sleep(0.3)
with bytes_read() as tell:
    tell(2_000_000, 16_000_000)
    time.sleep(0.3)
say("word " * 40 + "s3://bucket/" + 70 * "x", indent=9)
say("done")
"""


def in_terminal(
    columns: int, *, stdout: int | None = None, program: str = SHOW_ROWS, status: int = 0
) -> tuple[str, str]:
    """What a terminal of so many columns is sent, and what stdout is where that is no terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment | {"TERM": "xterm"}, stdin=theirs,
        stdout=theirs if stdout is None else stdout, stderr=theirs,
    ) as shown:  # fmt: skip
        os.close(theirs)
        sent = b""
        with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
            while part := os.read(ours, 1 << 16):
                sent += part
        os.close(ours)
        rest = shown.stdout.read() if shown.stdout else b""
    assert shown.returncode == status, sent
    return sent.decode(), rest.decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_terminal_shows_where_the_job_is_within_its_width_and_cleans_up(columns: int) -> None:
    sent, _ = in_terminal(columns)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent).replace("\r", "\n").splitlines()
    rows = [line for line in lines if " train " in line]
    assert all(re.search(r"(bits/dim|since the last|images/s|left)$", row) for row in rows), rows  # none goes on below
    assert "\n         word" in "\n".join(lines)
    assert lines.count("         s3://bucket/" + 70 * "x") == 1  # whole, for who copies it
    assert max(len(line) for line in lines if "s3:" not in line) <= columns
    shown = " ".join(" ".join(lines).split())
    assert "60 % of 100 images" in shown
    assert re.search(
        r"\ds left, 2 images/s, 0.2705 bits/dim, -0.0902 since the last, epoch 1.5 of 2.5, "
        r"3 workers, 2 retries, checkpoint \d+s old, report \d+s old", shown,
    )  # fmt: skip
    assert re.search(r"packing .* 250 of 1,000 images, [\d,]+/s, \d+s left", shown)
    assert re.search(r"30.0 MB of 120.0 MB, [\d,.]+ MB/s, \ds left reading the checkpoint", shown)
    assert re.search(r"reading the checkpoint \S+ 2.0 MB of 16.0 MB, [\d,.]+ MB/s, \d+s left", shown)
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")  # the cursor is back
    assert [line for line in lines if line][-1] == "done"


STOP_TWICE = """
import os, signal
from tests.test_step import JOB
from vaejob.cli.terminal import Progress
from vaejob.cli.train import StopFlag
stop = StopFlag()
with Progress(JOB, quiet=False):
    os.kill(os.getpid(), signal.SIGINT)
    assert stop()
    os.kill(os.getpid(), signal.SIGINT)
    print("goes on")
"""


def test_a_second_interrupt_ends_at_once_and_leaves_the_prompt_a_line_and_a_cursor() -> None:
    sent, _ = in_terminal(80, program=STOP_TWICE, status=130)
    told = "vaejob: saving a checkpoint, then stopping; ctrl-C again ends at once"
    assert told in sent
    assert "goes on" not in sent
    assert sent.endswith("\x1b[?25h\r\n")
    stop = (
        "from vaejob.cli.train import StopFlag; import os, signal; StopFlag(); [os.kill(os.getpid(), 2) for _ in '12']"
    )
    done = subprocess.run([sys.executable, "-c", stop], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{told}\n")


def test_what_is_piped_has_no_bars_in_it() -> None:
    sent, piped = in_terminal(80, stdout=subprocess.PIPE)
    assert "60 % of 100 images" in sent
    assert [line.split("  ")[-1] for line in piped.splitlines()][1:4:2] == ["checkpoint committed"] * 2
    assert "\x1b" not in piped
    assert "word " * 40 + "s3://bucket/" + 70 * "x" in piped.splitlines()
    assert piped.endswith("\ndone\n")
