"""The verb that writes a run's TensorBoard event files, derived as a whole from its history: tensorboard."""

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from vaejob.cli.terminal import bound_name, say, warn
from vaejob.cli.verb import require_run

if TYPE_CHECKING:
    from vaejob.cli.overview import Overview
    from vaejob.loaded import LoadedModel
    from vaejob.pictures.events import Shown
    from vaejob.storage import Bucket
    from vaejob.storage.runs import Record, Row

FOLDER = "tensorboard"
MOST_CHECKPOINTS = 4
SCORED_IMAGES = 256
NAMES = {"train": "train", "test": "held-out"}


def tensorboard(
    run: Annotated[str, typer.Argument(help="The run's address: BUCKET/NAME.")],
    out: Annotated[
        str | None,
        typer.Option(help="The folder or bucket to write to; default: tensorboard/ in the run's own folder."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and the folder's address.")] = False,
) -> None:
    """Write TensorBoard event files of a run: curves over images seen, pictures and histograms of its checkpoints.

    They are written anew as a whole, also while the run goes on; train does it at its end.

    \b
    Example:
      vaejob tensorboard s3://models/mnist-iwae-1 --out events
      tensorboard --logdir events
    """
    require_run(run)
    say(write_events(run, out=out, quiet=quiet))


def write_events(run: str, *, out: str | None = None, quiet: bool = True) -> str:
    """One file for each split, so that its curves share the charts of the other; the address of their folder."""
    from vaejob.cli.overview import look_at
    from vaejob.pictures.events import event_file
    from vaejob.storage import absolute, join, open_bucket

    overview = look_at(absolute(run), whole_history=True)
    home = open_bucket(absolute(out) if out else join(overview.address, FOLDER))
    shown = {split: [point for row in overview.rows if row["split"] == split for point in _of_row(overview, row)] for split in NAMES}  # fmt: skip
    for record in kept_records(overview)[-MOST_CHECKPOINTS:]:
        for split, points in _of_checkpoint(overview, record, quiet=quiet).items():
            shown[split] += points
    for split, points in shown.items():
        _replace(home, NAMES[split], event_file(points) if points else None)
    return home.url


def kept_records(run: "Overview") -> "list[Record]":
    """Without checkpoints of a way that was not gone on: a later attempt began before them."""
    started_at: dict[str, int] = {}
    for row in run.rows:
        started_at.setdefault(row["attempt"], row["attempt_started_at_images"])
    order = list(started_at)

    def gone_on(record: "Record") -> bool:
        if record.attempt not in order:
            return False
        later = order[order.index(record.attempt) + 1 :]
        return all(started_at[attempt] >= record.images_seen for attempt in later)

    return [record for record in run.records if gone_on(record)]


def _replace(home: "Bucket", split: str, data: bytes | None) -> None:
    """A new name each time, the old file removed last: TensorBoard follows files that grow, not those that change."""
    old = [key for key in home.keys(f"{split}/") if key.startswith(f"{split}/events.out.tfevents.")]
    if data is not None:
        key = f"{split}/events.out.tfevents.{time.time_ns() // 10**6}.vaejob"
        home.write(key, data)
        old = [other for other in old if other != key]
    for key in old:
        home.delete(key)


def _of_row(run: "Overview", row: "Row") -> "list[Shown]":
    from vaejob.cli.overview import likelihood_numbers
    from vaejob.pictures.events import Shown
    from vaejob.totals import LikelihoodTotals

    totals, goal, trained = LikelihoodTotals.from_dict(row), run.job.objective, row["split"] == "train"
    if not totals.images:
        return []
    samples = (goal.samples if goal.bound == "iwae" else 1) if trained else run.job.training.evaluate_samples
    name = bound_name(samples, own_codes=trained and goal.own_codes)
    numbers, missing = likelihood_numbers(totals, run.job.likelihood), float("nan")
    added = numbers.get("density_bits_correction")
    bits = "bits per dim" if added is None else f"bits per dim of a density, plus {added:g}"
    points = {
        # Bounds of different names do not share a chart.
        f"bound/{name} {bits}": numbers.get("bits_per_dim", missing),
        f"bound/{name} nats per image": numbers.get("negative_bound_nats", missing),
        f"bound/{name} {bits}, standard error": numbers.get("bits_per_dim_standard_error", missing),
        "terms/distortion, nats per image": numbers.get("distortion_nats", missing),
        "terms/rate, nats per image": numbers.get("rate_nats", missing),
        "health/images not finite": totals.non_finite,
        **(_of_training(row) if trained else {}),
    }
    words = f"{name} of {totals.images:,} images at the last step"
    return [
        Shown(tag, float(value), row["images_seen"], _seconds(row["written_at"]), words if tag.startswith("bound/") else "")
        for tag, value in points.items()
        if value is not None
    ]  # fmt: skip


def _of_training(row: "Row") -> dict[str, float | None]:
    taken = (row.get("steps") or 0) - (row.get("skipped_steps") or 0)
    points = {
        "training/learning rate": row["learning_rate"],
        "training/gradient norm": row["gradient_norms"] / taken if taken else None,
        "health/skipped steps": row.get("skipped_steps"),
        "health/halvings of the learning rate": row.get("halvings"),
        "health/requests repeated": row["retries"],
        "health/damaged images left out": row["missing_images"],
        "speed/workers": row["world_size"],
    }
    if row["seconds"]:
        points["speed/images per second"] = row["images"] / row["seconds"]
        points["speed/share of time waiting for images"] = row["data_wait_seconds"] / row["seconds"]
    return points


def _of_checkpoint(run: "Overview", record: "Record", *, quiet: bool) -> "dict[str, list[Shown]]":
    """Its weights and samples; and of some held-out (else training) images reconstructions, likelihoods and layers.

    What is damaged or out of reach is left out with a warning.
    """
    import numpy as np

    from vaejob.cli.use import load_told
    from vaejob.errors import VaejobError
    from vaejob.pictures.events import Shown
    from vaejob.pictures.grid import grid
    from vaejob.pictures.run_pictures import COLUMNS, SAMPLES

    at, when = record.images_seen, _seconds(record.written_at)
    found: dict[str, list[Shown]] = {"train": []}
    try:
        model = load_told(run.address, checkpoint=str(at), quiet=quiet)
        for name, weight in model.scorer.vae.named_parameters():
            values = weight.detach().double().cpu().numpy().ravel()
            found["train"].append(Shown(f"weights/{name}", np.asarray(values), at, when))
        samples = grid(model.sample(SAMPLES, mean=True), columns=COLUMNS)
        found["train"].append(Shown("pictures/samples", samples, at, when, "mean pictures decoded from random codes"))
        split = "test" if run.job.data.test else "train"
        found[split] = found.get(split, []) + _of_images(run, model, at, when)
    except VaejobError as error:
        warn(f"the event files lack part of the checkpoint at {at:,} images: {error}")
    return found


def _of_images(run: "Overview", model: "LoadedModel", at: int, when: float) -> "list[Shown]":
    import numpy as np

    from vaejob.data.batches import open_data
    from vaejob.likelihood.units import bits_per_dim
    from vaejob.pictures.events import Shown
    from vaejob.pictures.grid import above
    from vaejob.pictures.report.findings import spread_ids
    from vaejob.pictures.run_pictures import COLUMNS, RECONSTRUCTIONS, reconstruct_some
    from vaejob.training.evaluate import layer_diagnostics

    data = open_data(run.job.data.test or run.job.data.train)
    originals, pictures = reconstruct_some(model, data, RECONSTRUCTIONS)
    both = above(originals, pictures, columns=COLUMNS)
    shown = [Shown("pictures/reconstructions", both, at, when, "each image above what its code decodes to")]
    if run.job.model.family == "decoder-only":
        return shown
    ids = spread_ids(data.manifest.images, SCORED_IMAGES)
    images = data.images(ids)
    nats = -model.log_likelihood_bound(images, ids).double().cpu().numpy()
    pixels = model.scorer.pixels
    bits = np.asarray(bits_per_dim(1.0, data.manifest.dims) * nats + pixels.density_bits_correction)
    density = f" of a density, plus {pixels.density_bits_correction:g}" if pixels.is_density else ""
    shown.append(Shown(f"images/-ELBO bits per dim{density}", bits, at, when, f"of {len(ids):,} images, one by one"))
    layers = layer_diagnostics(model.scorer, [(ids, images)], config=run.job.likelihood, device=model.device)
    for number, (rate, active) in enumerate(zip(layers.rates, layers.active_units, strict=True), 1):
        words = f"stochastic layer {number} of {len(layers.rates)}, the top one first; of {len(ids):,} images"
        shown.append(Shown(f"layers/rate of layer {number}, nats per image", rate, at, when, words))
        shown.append(Shown(f"layers/active units of layer {number}", float(active), at, when, words))
    return shown


def _seconds(written_at: str) -> float:
    return datetime.fromisoformat(written_at).timestamp()
