"""The verbs that use a trained model: evaluate, sample, reconstruct, interpolate."""

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaejob.cli.terminal import bound_name, bytes_read, images_done, say, say_json, warn, what_it_is_of
from vaejob.cli.verb import require_run
from vaejob.likelihood.units import density_bits

if TYPE_CHECKING:
    from vaejob.data.batches import DataSet
    from vaejob.loaded import LoadedModel
    from vaejob.metrics import LayerTotals, LikelihoodTotals

FEW_EFFECTIVE_SAMPLES = 10

Run = Annotated[str, typer.Argument(help="The run's address: BUCKET/NAME.")]
Checkpoint = Annotated[str, typer.Option(help="latest, best (held-out bound), or a number of images.")]
Data = Annotated[str | None, typer.Option(help="Address of packed images; default: the run's held-out images.")]
Out = Annotated[str, typer.Option(help="The PNG file to write.")]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON object, at full precision.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only warnings and the result.")]


class PrecisionName(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


def evaluate(
    run: Run,
    data: Data = None,
    samples: Annotated[int, typer.Option(min=1, help="Codes per image: 1 gives the ELBO, K the IWAE-K bound.")] = 1,
    checkpoint: Checkpoint = "latest",
    workers: Annotated[int, typer.Option(min=0, help="Ray tasks to share the work; 0: this process alone.")] = 0,
    precision: Annotated[
        PrecisionName, typer.Option(help="Of the networks' products; bf16 is faster where the hardware has it.")
    ] = PrecisionName.fp32,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Of many samples: seconds to begin, faster from then on.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also the rate and active units of each layer of codes.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The bound on the likelihood of a data set's images, each seen once.

    \b
    Example:
      vaejob evaluate s3://models/mnist-iwae-1 --samples 5000 --workers 8
    """
    quiet = quiet or as_json
    model, images = load_for(run, data, checkpoint=checkpoint, quiet=quiet)
    totals = _scored(
        model, images, samples=samples, precision=precision, compiled=compiled, workers=workers, quiet=quiet
    )
    of_layers = model.layer_diagnostics(images) if layers else None
    if as_json:
        result = _result(model, images, totals, samples=samples) | {"precision": precision.value}
        say_json(result | _layer_numbers(of_layers))
    else:
        _say_result(model, images, totals, samples=samples)
        if precision is PrecisionName.bf16:
            say("precision   bf16 products; compare with numbers in fp32 to two decimals of a nat at most")
        for number, layer in enumerate(_layer_numbers(of_layers).get("layers", []), start=1):
            say(
                f"layer {number:<5} {layer['rate_nats']:.4f} nats of rate, {layer['active_units']} of {layer['units']} units active"
            )
    _warn_of(totals, of_layers, samples=samples)


def sample(
    run: Run,
    out: Out,
    count: Annotated[int, typer.Option(min=1, max=4096, help="How many.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other samples.")] = 0,
    mean: Annotated[bool, typer.Option("--mean", help="The mean of each pixel instead of a draw.")] = False,
    checkpoint: Checkpoint = "latest",
    quiet: Quiet = False,
) -> None:
    """Pictures drawn from the model: codes from the prior, decoded.

    \b
    Example:
      vaejob sample s3://models/mnist-iwae-1 --out samples.png --mean
    """
    require_run(run)
    from vaejob.pictures.grid import grid, png_bytes

    images = load_told(run, checkpoint=checkpoint, quiet=quiet).sample(count, seed=seed, mean=mean)
    _write(out, png_bytes(grid(images, columns=_columns(count))))


def reconstruct(
    run: Run,
    out: Out,
    data: Data = None,
    count: Annotated[int, typer.Option(min=1, max=4096, help="How many images.")] = 16,
    checkpoint: Checkpoint = "latest",
    quiet: Quiet = False,
) -> None:
    """Images from all over a data set, each beside what its code decodes to.

    \b
    Example:
      vaejob reconstruct s3://models/mnist-iwae-1 --out reconstructions.png
    """
    model, images = load_for(run, data, checkpoint=checkpoint, quiet=quiet)
    from vaejob.pictures.grid import beside, png_bytes
    from vaejob.pictures.run_pictures import reconstruct_some

    _write(out, png_bytes(beside(*reconstruct_some(model, images, count), pairs_per_row=_columns(count))))


def interpolate(
    run: Run,
    out: Out,
    data: Data = None,
    count: Annotated[int, typer.Option(min=1, max=256, help="How many pairs of images, a row each.")] = 8,
    steps: Annotated[int, typer.Option(min=2, max=64, help="Pictures on the way.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other pairs.")] = 0,
    checkpoint: Checkpoint = "latest",
    quiet: Quiet = False,
) -> None:
    """From one held-out image to another: codes on a straight line, decoded, with the originals at both ends.

    \b
    Example:
      vaejob interpolate s3://models/mnist-iwae-1 --out between.png --steps 10
    """
    model, images = load_for(run, data, checkpoint=checkpoint, quiet=quiet)
    from vaejob.pictures.grid import grid, png_bytes
    from vaejob.pictures.interpolate import interpolate

    pictures = interpolate(model, images, rows=count, steps=steps, seed=seed)
    _write(out, png_bytes(grid(pictures, columns=steps + 2)))


def _warn_of(totals: "LikelihoodTotals", layers: "LayerTotals | None", *, samples: int) -> None:
    weights = totals.weights()
    if weights and weights["effective_samples"] < FEW_EFFECTIVE_SAMPLES <= samples:
        warn(
            f"the importance weights are worth {weights['effective_samples']:.1f} of {samples} samples on average, fewer "
            f"than {FEW_EFFECTIVE_SAMPLES}: the bound may be far below log p(x), and its bias larger than estimated; more "
            "--samples tighten it"
        )
    for line in layers.collapsed() if layers else []:
        warn(line)


def _layer_numbers(layers: "LayerTotals | None") -> dict[str, Any]:
    """Of each layer, the top one first."""
    if layers is None:
        return {}
    columns = zip(layers.rates, layers.active_units, layers.units, strict=True)
    return {"layers": [{"rate_nats": rate, "active_units": active, "units": units} for rate, active, units in columns]}


def load_told(run: str, *, checkpoint: str, quiet: bool, device: str | None = None) -> "LoadedModel":
    """The model of a run, on the GPU if there is one; it is told how much of it has come."""
    from vaejob.loaded import load

    with bytes_read(quiet=quiet) as on_progress:
        return load(run, checkpoint=checkpoint, device=device or _device(), on_progress=on_progress)


def load_for(run: str, data: str | None, *, checkpoint: str, quiet: bool = False) -> "tuple[LoadedModel, DataSet]":
    """The model of a run and the images to use it on. Raises DataError for images of another shape."""
    require_run(run)
    from vaejob.data.batches import open_data
    from vaejob.errors import DataError, RunError

    model = load_told(run, checkpoint=checkpoint, quiet=quiet)
    address = data or model.job.data.test
    if address is None:
        raise RunError(f"{run} has no held-out images (data.test); name some with --data")
    images = open_data(address)
    if images.manifest.shape != model.record.shape:
        found, right = ("x".join(map(str, shape)) for shape in (images.manifest.shape, model.record.shape))
        raise DataError(f"{images.bucket.url} has images of {found}; this model's have {right}")
    return model, images


def _scored(
    model: "LoadedModel",
    images: "DataSet",
    *,
    samples: int,
    precision: PrecisionName,
    compiled: bool,
    workers: int,
    quiet: bool,
) -> "LikelihoodTotals":
    """Raises RunError where an image's bound is not finite."""
    from vaejob.errors import RunError

    with images_done("evaluating", quiet=quiet) as on_progress:
        on_progress(0, images.manifest.images)  # many codes for each take a while until the first are done
        if workers:
            from vaejob.cluster.evaluate import evaluate_on_cluster

            totals = evaluate_on_cluster(
                model.address,
                images.bucket.url,
                checkpoint=str(model.record.images_seen),
                samples=samples,
                precision=precision.value,
                compiled=compiled,
                workers=workers,
                cluster=model.job.cluster,
                on_progress=on_progress,
            )
        else:
            totals = model.evaluate(
                images,
                samples=samples,
                precision=precision.value,
                compiled=compiled,
                on_progress=lambda done: on_progress(done, images.manifest.images),
            )
    assert totals.images == images.manifest.images, totals
    if totals.non_finite:
        raise RunError(
            f"the bound of {totals.non_finite} of {totals.images} images is not finite at the checkpoint of "
            f"{model.record.images_seen} images, so there is no mean; choose another --checkpoint"
        )
    return totals


def _result(model: "LoadedModel", data: "DataSet", totals: "LikelihoodTotals", *, samples: int) -> dict[str, Any]:
    from vaejob.cli.overview import Identity, likelihood_numbers

    manifest = data.manifest
    identity = Identity(
        bound="elbo" if samples == 1 else "iwae",
        samples=samples,
        images=totals.images,
        data=data.bucket.url,
        split=manifest.split,
        fingerprint=manifest.fingerprint,
        likelihood=model.job.likelihood,
    )
    return {
        "run": model.address,
        "checkpoint": model.record.images_seen,
        **identity.to_dict(),
        **likelihood_numbers(totals, model.job.likelihood),
        **totals.weights(),
    }


def _say_result(model: "LoadedModel", data: "DataSet", totals: "LikelihoodTotals", *, samples: int) -> None:
    from vaejob.cli.overview import likelihood_numbers

    numbers = likelihood_numbers(totals, model.job.likelihood)
    added = density_bits(model.job.likelihood)
    for title, nats, in_bits in (
        (bound_name(samples), "negative_bound_nats", "bits_per_dim"),
        ("distortion", "distortion_nats", "distortion_bits_per_dim"),
        ("rate", "rate_nats", "rate_bits_per_dim"),
    ):
        density = added is not None and title != "rate"
        say(
            f"{title:<11} {numbers[nats]:.4f} ± {numbers[f'{nats}_standard_error']:.4f} nats{' (density)' if density else ''}, "
            f"{numbers[in_bits]:.5f} ± {numbers[f'{in_bits}_standard_error']:.5f} bits/dim"
            f"{f' (density + {added:.4f})' if density else ''}",
            indent=12,
        )
    if samples > 1:
        say("            (distortion and rate are the halves of the -ELBO, of one code per image)", indent=12)
    if weights := totals.weights():
        say(
            f"weights     worth {weights['effective_samples']:,.1f} of {samples:,} samples on average, "
            f"{weights['least_effective_samples']:,.1f} at least; "
            f"estimated bias of the bound {weights['bound_bias_nats_estimate']:.4f} nats",
            indent=12,
        )
    fingerprint = data.manifest.fingerprint
    of = what_it_is_of(model.job, totals, samples=samples, data=data.bucket.url, fingerprint=fingerprint)
    say(f"of          {of}", indent=12)
    say(f"split       {data.manifest.split}")
    say(f"checkpoint  {model.record.images_seen:,} images of {model.address}")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _columns(count: int) -> int:
    """As many as rows, or one more."""
    return math.ceil(math.sqrt(count))


def _write(out: str, data: bytes) -> None:
    from vaejob.errors import UserError

    path = Path(out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"--out is {out}, which cannot be written: {error.strerror}") from None
    say(str(path))
