"""The verbs that run a job: train, resume, and the quickstart."""

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from vaejob.cli.terminal import SHOW_CURSOR, Progress, bits_and_nats, say, say_json, warn, what_it_is_of
from vaejob.cli.trackers import tracked
from vaejob.errors import STOPPED_STATUS, VaejobError

if TYPE_CHECKING:
    import numpy as np

    from vaejob.config import JobConfig

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over it.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only warnings and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON object; progress goes nowhere.")]


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, its address in a bucket, or a recipe's name.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a job here: on the Ray cluster of RAY_ADDRESS, else on this machine. Repeating it continues the run.

    \b
    Example:
      vaejob train mnist-iwae-1 run.bucket=s3://models cluster.workers=2
    """
    from vaejob import load_config

    run_job(load_config(config, *(overrides or [])), quiet=quiet or as_json, as_json=as_json)


def resume(
    run: Annotated[str, typer.Argument(help="The run's address: BUCKET/NAME.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Continue a run from nothing but its address; its configuration is read from there.

    \b
    Example:
      vaejob resume s3://models/mnist-iwae-1 cluster.workers=4
    """
    from vaejob import load_config
    from vaejob.storage import absolute, join, open_bucket, split_address
    from vaejob.storage.runs import JOB_KEY, read_job

    bucket, name = split_address(absolute(run))
    read_job(open_bucket(absolute(run)))  # says so if no run is there
    address = join(bucket, name, JOB_KEY)
    here = [f"run.bucket={bucket}", f"run.name={name}"]  # a copied run goes on where it lies now
    run_job(load_config(address, *here, *(overrides or [])), quiet=quiet or as_json, as_json=as_json)


def quickstart(
    bucket: Annotated[str, typer.Option(help="Where the images and the run are kept.")] = "vaejob-quickstart",
    workers: Annotated[int, typer.Option(help="DDP workers; 0: no Ray.")] = 2,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Pack scikit-learn's real digits, train a small VAE with 2 workers, evaluate it, and draw samples.

    \b
    Example:
      vaejob quickstart --bucket ./vaejob-quickstart
    """
    from vaejob import load_config
    from vaejob.data.pack import pack
    from vaejob.data.sources import ArraySource
    from vaejob.storage import absolute, join

    bucket = absolute(bucket)
    home = join(bucket, "digits")
    images, keys = digits()
    manifests = pack(ArraySource("scikit-learn's digits, 8x8", images, keys), home, split="train=0.8,test=0.2")
    packed = ", ".join(f"{manifest.images:,} {split}" for split, manifest in manifests.items())
    quiet = quiet or as_json
    if not quiet:
        say(f"packed {packed} images of handwritten digits into {home}", indent=0)
    settings = [f"run.bucket={bucket}", f"data.train={home}/train", f"data.test={home}/test"]
    run_job(load_config("quickstart", *settings, f"cluster.workers={workers}"), quiet=quiet, as_json=as_json)


def digits() -> "tuple[np.ndarray, list[str]]":
    """1,797 handwritten digits of 8x8 pixels, their 17 grey levels stretched to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype("uint8")[:, None]
    return images, [f"digit-{index:04d}-{label}" for index, label in enumerate(bunch.target)]


def run_job(job: "JobConfig", *, quiet: bool, as_json: bool) -> None:
    """Trains with progress in the terminal; ctrl-C or SIGTERM saves a checkpoint first, a second ctrl-C ends at once."""
    stop = StopFlag()
    address = train_told(job, stop, quiet=quiet)
    finish(address, job, stopped=stop(), as_json=as_json)


def train_told(job: "JobConfig", stop: "StopFlag", *, quiet: bool) -> str:
    """Trains with progress in the terminal and to the trackers; the run's address."""
    import vaejob

    with (
        Progress(job, quiet=quiet, epoch_images=_epoch_images(job)) as progress,
        tracked(job, progress, warn=warn) as on_event,
    ):
        return vaejob.train(job, on_event=on_event, should_stop=stop)


def _epoch_images(job: "JobConfig") -> int | None:
    """Images of the training data; None where training itself will say what is wrong with them."""
    from vaejob.data.manifest import read_manifest
    from vaejob.storage import open_bucket

    try:
        return read_manifest(open_bucket(job.data.train)).images
    except VaejobError:
        return None


def finish(address: str, job: "JobConfig", *, stopped: bool, as_json: bool) -> None:
    """Says what came of the run, draws its pictures and writes its report if it is done, and exits with its status."""
    from vaejob.cli.overview import held_out_identity, likelihood_numbers, look_at
    from vaejob.cli.report import write_report
    from vaejob.cli.tensorboard import write_events
    from vaejob.pictures.run_pictures import write_run_pictures
    from vaejob.storage import open_bucket
    from vaejob.storage.runs import newest_record
    from vaejob.totals import LikelihoodTotals

    record, _ = newest_record(open_bucket(address))
    if record is None or record.images_seen < job.training.images:
        seen = record.images_seen if record else 0
        warn(f"stopped at {seen:,} of {job.training.images:,} images; go on with: vaejob resume {address}")
        raise typer.Exit(STOPPED_STATUS if stopped else 3)
    pictures, page = write_run_pictures(address), None
    try:
        page = write_report([address])
    except VaejobError as error:  # the run is done and whole; its report can be written at any time
        warn(f"no report was written: {error}; repeat with: vaejob report {address}")
    try:
        write_events(address)
    except VaejobError as error:
        warn(f"no event files were written: {error}; repeat with: vaejob tensorboard {address}")
    totals = LikelihoodTotals.from_dict(record.held_out) if record.held_out else None
    if as_json:
        identity = held_out_identity(look_at(address, whole_history=False), record)
        numbers = identity.to_dict() | likelihood_numbers(totals, job.likelihood) if totals and identity else {}
        result = {"run": address, "images_seen": record.images_seen, "pictures": pictures, "held_out": record.held_out}
        result["report"] = page
        say_json(result | numbers)
        return
    say()
    say(f"run       {address}")
    if totals:
        assert job.data.test is not None
        of = what_it_is_of(
            job,
            totals,
            samples=job.training.evaluate_samples,
            data=job.data.test,
            fingerprint=record.test_fingerprint or "",
        )
        say(f"held out  {bits_and_nats(totals, job.likelihood)}")
        say(f"          {of}", indent=10)
    say(f"pictures  {pictures['samples-beside-reconstructions']}")
    if page:
        say(f"report    {page}")


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or ctrl-C."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)

    def __call__(self) -> bool:
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            if sys.stderr.isatty():
                # A bar hides the cursor, and stands where the prompt will.
                os.write(sys.stderr.fileno(), f"{SHOW_CURSOR}\n".encode())
            os._exit(130)
        self._asked = True
        warn("saving a checkpoint, then stopping; ctrl-C again ends at once")
