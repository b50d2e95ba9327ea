"""The verb that takes a trained model out of its run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaejob.cli.terminal import bits_and_nats, say, say_json, what_it_is_of
from vaejob.cli.use import Checkpoint, Json, Quiet, Run, load_told
from vaejob.cli.verb import require_run

if TYPE_CHECKING:
    from vaejob.loaded import LoadedModel


def export(
    run: Run,
    out: Annotated[str, typer.Option(help="The folder to write: new or empty.")],
    checkpoint: Checkpoint = "latest",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The model as a folder: weights, configuration and a card; vaejob.load(FOLDER) needs neither the bucket nor Ray.

    \b
    Example:
      vaejob export s3://models/mnist-iwae-1 --out mnist-iwae-1 --checkpoint best
    """
    require_run(run)
    from vaejob.export import export as write

    model = load_told(run, checkpoint=checkpoint, quiet=quiet or as_json, device="cpu")
    folder = Path(out).expanduser().absolute()
    about = write(model, folder, numbers=_numbers(model))
    if as_json:
        say_json({"folder": str(folder)} | about)
    else:
        say(f"{folder}: {about['weights']:,} weights of the checkpoint of {about['checkpoint']:,} images")


def _numbers(model: "LoadedModel") -> str:
    """The held-out likelihood with all that it is of."""
    from vaejob.totals import LikelihoodTotals

    record, job = model.record, model.job
    if record.held_out is None:
        return "None: no held-out images were evaluated at this checkpoint."
    totals, samples = LikelihoodTotals.from_dict(record.held_out), job.training.evaluate_samples
    data, fingerprint = job.data.test or "unknown", record.test_fingerprint or "unknown"
    of = what_it_is_of(job, totals, samples=samples, data=data, fingerprint=fingerprint)
    return f"{bits_and_nats(totals, job.likelihood)}: {of}; held-out split, fingerprint {fingerprint}."
