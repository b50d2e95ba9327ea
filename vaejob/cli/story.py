"""The verb that tells what a decoder learns without an encoder, and with one: six small models and their one table."""

import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaejob.cli.terminal import CONDITIONAL, say, say_json, warn
from vaejob.cli.train import Quiet, StopFlag, digits, train_told
from vaejob.errors import STOPPED_STATUS, ConfigError

if TYPE_CHECKING:
    from vaejob.cli.story_numbers import Finding, Score, Told
    from vaejob.config import JobConfig
    from vaejob.data.batches import DataSet
    from vaejob.loaded import LoadedModel

STORY = {
    "story-marginal": "marginal",
    "story-random-pairing": "random pairing",
    "story-fixed-code": "fixed code",
    "story-latent-table": "latent table",
    "story-vae": "VAE",
    "story-tied": "tied VAE",
}
OWN_SETTINGS = ("run.name", "model.family", "model.tied_layers", "objective.pairing", "objective.bound")
COLUMNS = 80

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over all six.")]
Json = Annotated[bool, typer.Option("--json", help="The table as one JSON object, at full precision; nothing else.")]


def story(
    overrides: Overrides = None,
    bucket: Annotated[str, typer.Option(help="Where the runs are kept, and the digits.")] = "vaejob-story",
    data: Annotated[
        str | None, typer.Option(help="Packed images, DATA/train and DATA/test; default: scikit-learn's digits.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Codes per test image for the marginal likelihood.")] = 1000,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train six small models, without and with an encoder, and print one table of what they learnt.

    The digits take a minute or two. To learn tens of thousands of images by heart takes far longer than to model them.

    \b
    Example:
      vaejob story --data mnist training.images=600000 --samples 200
    """
    quiet = quiet or as_json
    jobs = _jobs(bucket, data, overrides or [], quiet=quiet)
    stop = StopFlag()
    for number, (recipe, job) in enumerate(jobs.items(), start=1):
        if not quiet:
            say(f"{number} of {len(jobs)}  {recipe}")
        address = train_told(job, stop, quiet=quiet)
        _check_finished(address, job, stopped=stop())
    rows, train, test = _score(jobs, samples=samples, quiet=quiet, stop=stop)
    _tell(rows, jobs["story-vae"], train, test, samples=samples, as_json=as_json)


def _jobs(bucket: str, data: str | None, overrides: list[str], *, quiet: bool) -> "dict[str, JobConfig]":
    """The six jobs by their recipes' names, on the digits, packed, if no other data is named. Raises ConfigError."""
    from vaejob import load_config
    from vaejob.data.pack import pack
    from vaejob.data.sources import ArraySource
    from vaejob.storage import absolute, join

    for override in overrides:
        if (key := override.partition("=")[0]) in OWN_SETTINGS:
            raise ConfigError(
                f"{override} is given for all six runs; {key} is what tells them apart, so it must be left out"
            )
    bucket = absolute(bucket)
    home = absolute(data) if data else join(bucket, "digits")
    settings = [f"run.bucket={bucket}", f"data.train={join(home, 'train')}", f"data.test={join(home, 'test')}"]
    jobs = {recipe: load_config(recipe, *settings, *overrides) for recipe in STORY}
    for job in jobs.values():
        if job.likelihood.pixels != "bernoulli":
            raise ConfigError(
                f"likelihood.pixels is {job.likelihood.pixels}; the story is told of bernoulli pixels, whose marginal has a "
                "closed form"
            )
        if job.data.test is None:
            raise ConfigError("data.test is null; the story needs held-out images")
    if data is None:
        images, keys = digits()
        pack(ArraySource("scikit-learn's digits, 8x8", images, keys), home, split="train=0.8,test=0.2")
        if not quiet:
            say(f"{len(images):,} images of handwritten digits are packed in {home}")
    return jobs


def _check_finished(address: str, job: "JobConfig", *, stopped: bool) -> None:
    """Exits with the status of a job that left a checkpoint, if it did not come to its end."""
    from vaejob.storage import open_bucket
    from vaejob.storage.runs import newest_record

    record, _ = newest_record(open_bucket(address))
    seen = record.images_seen if record else 0
    if stopped or seen < job.training.images:
        warn(f"stopped {address} at {seen:,} of {job.training.images:,} images; repeat the command to go on")
        raise typer.Exit(STOPPED_STATUS if stopped else 3)


def _score(
    jobs: "dict[str, JobConfig]", *, samples: int, quiet: bool, stop: StopFlag
) -> "tuple[dict[str, Told], DataSet, DataSet]":
    from vaejob.cli.story_numbers import Told, factorised_marginal
    from vaejob.cli.use import load_for
    from vaejob.run import run_address

    rows: dict[str, Told] = {}
    for recipe, job in jobs.items():
        if stop():
            warn("stopped before all was scored; repeat the command to go on")
            raise typer.Exit(STOPPED_STATUS)
        if not quiet:
            say(f"scoring {recipe}: training and test images, {samples:,} codes for each test image")
        model, train = load_for(run_address(job), job.data.train, checkpoint="latest", quiet=True)
        model, test = load_for(run_address(job), job.data.test, checkpoint="latest", quiet=True)
        if not rows:
            on_train, on_test = factorised_marginal(model, train, train, test)
            rows["closed-form"] = Told("closed form", "", None, train.manifest.dims, False, on_train, on_test, None)
        rows[recipe] = _told(STORY[recipe], model, train, test, samples=samples)
    return rows, train, test


def _told(title: str, model: "LoadedModel", train: "DataSet", test: "DataSet", *, samples: int) -> "Told":
    from vaejob.cli.story_numbers import Told, score

    own_codes = model.job.objective.own_codes
    return Told(
        title,
        model.address,
        model.record.images_seen,
        sum(parameter.numel() for parameter in model.scorer.parameters()),
        own_codes,
        score(model, train, own_codes=own_codes),
        score(model, test),
        score(model, test, samples=samples),
    )


def _tell(
    rows: "dict[str, Told]", job: "JobConfig", train: "DataSet", test: "DataSet", *, samples: int, as_json: bool
) -> None:
    from vaejob.cli.story_numbers import findings

    found = findings(rows)
    if as_json:
        data = {name: _data(one) for name, one in (("train", train), ("test", test))}
        models = {name: row.to_dict() for name, row in rows.items()}
        of = {"data": data, "likelihood": job.likelihood.model_dump(), "samples": samples, "seed": job.run.seed}
        say_json({**of, "models": models, "findings": [one.to_dict() for one in found]})
        return
    say()
    for line in _table(rows, samples=samples):
        say(line)
    for line in _legend(rows, job, train, test):
        say(line)
    say()
    _say_findings(found)


def _data(data: "DataSet") -> dict[str, Any]:
    manifest = data.manifest
    names = ("split", "images", "fingerprint")
    return {"data": data.bucket.url, **{name: getattr(manifest, name) for name in names}}


def _table(rows: "dict[str, Told]", *, samples: int) -> list[str]:
    """80 columns, whatever the numbers."""
    lines = [
        _line("", "", "train", "test", "test", "weights'"),
        _line("", "parameters", "-ELBO or *", "-ELBO", f"-IWAE-{samples}", "ESS"),
    ]
    for row in rows.values():
        weights = row.marginal.totals.weights() if row.marginal else {}
        ess = [weights[name] for name in ("effective_samples", "least_effective_samples")] if weights else []
        lines.append(
            _line(
                row.title,
                f"{row.parameters:,}",
                _nats(row.train, "*" if row.own_codes else " "),
                _nats(row.test),
                _nats(row.marginal, "!" if row.marginal.useless_weights else " ") if row.marginal else "",
                "/".join(f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in ess),
            )
        )
    return lines


def _line(*cells: str) -> str:
    widths = (-14, 10, 15, 14, 15, 12)
    return "".join(
        f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
    ).rstrip()


def _nats(score: "Score", mark: str = "") -> str:
    totals = score.totals
    return f"{totals.mean('negative_bound'):.2f} ± {totals.standard_error('negative_bound'):.2f}{mark}"


def _legend(rows: "dict[str, Told]", job: "JobConfig", train: "DataSet", test: "DataSet") -> list[str]:
    from vaejob.cli.story_numbers import FEW_EFFECTIVE_SAMPLES

    lines = [
        f"* {CONDITIONAL}",
        "nats per image ± standard error over images; ESS: codes the weights are worth,",
        "on average / at least",
    ]
    lines.append("closed form: a pixel is 1 by (n1 + 1/2) / (n + 1), n1 of the n training images")
    if any(row.marginal and row.marginal.useless_weights for row in rows.values()):
        lines.append(f"! an ESS below {FEW_EFFECTIVE_SAMPLES}: this bound may be far above -log p(x)")
    trained = sorted({row.checkpoint for row in rows.values() if row.checkpoint})
    images = " or ".join(f"{count:,}" for count in trained)
    lines.append(
        f"{job.likelihood.pixels} pixels, {job.likelihood.binarize} binarisation; after {images} images, one seed"
    )
    for name, data in (("train", train), ("test ", test)):
        manifest = data.manifest
        lines.append(f"{name} {manifest.images:,} images ({manifest.fingerprint[:12]}) of {data.bucket.url}")
    return lines


def _say_findings(found: "list[Finding]") -> None:
    for one in found:
        say(textwrap.fill(one.text, COLUMNS, initial_indent="- ", subsequent_indent="  "))
