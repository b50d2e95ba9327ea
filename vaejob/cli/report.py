"""The verb that writes a page about runs: report."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich import filesize

from vaejob.cli.terminal import bound_name, say, warn
from vaejob.cli.verb import require_run

if TYPE_CHECKING:
    from vaejob.cli.overview import Identity, Overview
    from vaejob.data.batches import DataSet
    from vaejob.loaded import LoadedModel
    from vaejob.pictures.report.findings import Findings
    from vaejob.pictures.report.reported import Bound, DataCard, ReportedRun
    from vaejob.storage.runs import Record, Row
    from vaejob.totals import LikelihoodTotals

REPORT_KEY = "report.html"
IMAGES = 1000
MOST_CHECKPOINTS = 8


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Addresses of runs: BUCKET/NAME.")],
    out: Annotated[
        str | None, typer.Option(help="The HTML file to write; default: report.html in the run's own folder.")
    ] = None,
    other: Annotated[
        str | None, typer.Option(help="Packed images of another kind, scored besides: likelihood as an anomaly score.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=2, max=100_000, help="Images of each data set to score one by one.")
    ] = IMAGES,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and the page's address.")] = False,
) -> None:
    """Write one page about a run, or about several side by side: curves, pictures, likelihoods, what it cost.

    The page needs no network and nothing beside it. Likelihoods of several runs are compared only where they compare.

    \b
    Examples:
      vaejob report s3://models/mnist-iwae-1
      vaejob report s3://models/photos-1 s3://models/photos-2 --out both.html
    """
    from vaejob.errors import UserError

    if out is None and len(runs) > 1:
        raise UserError(f"--out is missing for {len(runs)} runs; name the HTML file to write")
    require_run(*runs)
    say(write_report(runs, out=out, other=other, images=images, quiet=quiet))


def write_report(
    runs: list[str], *, out: str | None = None, other: str | None = None, images: int = IMAGES, quiet: bool = True
) -> str:
    """Puts the page there, or into the first run's folder, and returns its address."""
    from vaejob.cli.overview import comparable_groups, held_out_identity
    from vaejob.pictures.report.page import page
    from vaejob.storage import absolute, join, open_bucket, split_address

    overviews = [_look(run) for run in dict.fromkeys(absolute(run) for run in runs)]
    identities = {run.address: held_out_identity(run, run.best) for run in overviews if run.best}
    known = {address: identity for address, identity in identities.items() if identity}
    groups = comparable_groups(known)
    pages = []
    for run in overviews:
        if not quiet:
            warn(f"reading {run.address}")
        group = groups.get(run.address, "")
        pages.append(
            _reported(
                run,
                group=group,
                words=str(known[run.address]) if group else "",
                other=other,
                images=images,
                quiet=quiet,
            )
        )
    html = page(pages).encode()
    folder, name = (overviews[0].address, REPORT_KEY) if out is None else split_address(absolute(out))
    open_bucket(folder).write(name, html)
    return join(folder, name)


def _look(address: str) -> "Overview":
    """Raises RunError also where reports are not what vaejob writes."""
    import pyarrow as pa

    from vaejob.cli.overview import look_at
    from vaejob.errors import RunError

    try:
        return look_at(address, whole_history=True)
    except (pa.ArrowException, KeyError, TypeError, IndexError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise RunError(f"{address}/metrics holds a file that is no report of vaejob, or is damaged: {said}") from None


def _reported(run: "Overview", *, group: str, words: str, other: str | None, images: int, quiet: bool) -> "ReportedRun":
    from vaejob.pictures.report.reported import ReportedRun

    record = run.best or run.newest
    findings, missing = _findings(run, record, other=other, images=images, quiet=quiet)
    trained = run.job.objective
    samples = trained.samples if trained.bound == "iwae" else 1
    return ReportedRun(
        address=run.address,
        job=run.job,
        finished=run.finished,
        images_seen=run.images_seen,
        rows=run.rows,
        lost=lost_rows(run),
        starts=run.attempts,
        record=record,
        held_out=_held_out(run, run.best) if run.best else None,
        newest=_held_out(run, run.newest) if run.newest and run.newest != run.best else None,
        trained=_trained(run),
        train_name=bound_name(samples, own_codes=trained.own_codes),
        held_out_name=bound_name(run.job.training.evaluate_samples),
        group=group,
        group_words=words,
        problems=run.problems,
        data=[_data_card(*data) for data in _data_sets(run)],
        findings=findings,
        no_findings=missing,
    )


def lost_rows(run: "Overview") -> "list[Row]":
    """Reports that are left out of its history, since a later attempt began before them; each is read from its end."""
    from vaejob.storage import open_bucket
    from vaejob.storage.runs import read_row_files, row_keys

    kept = {(row["attempt"], row["split"], row["images_seen"]) for row in run.rows}
    bucket = open_bucket(run.address)
    lost: list[Row] = []
    of_attempts: dict[str, list[str]] = {}
    for key in row_keys(bucket):
        of_attempts.setdefault(key.rpartition("-")[0], []).append(key)
    for keys in of_attempts.values():
        for key in reversed(keys):
            ((_, rows),) = read_row_files(bucket, [key])
            gone = [row for row in rows if (row["attempt"], row["split"], row["images_seen"]) not in kept]
            lost = gone + lost
            if len(gone) < len(rows):
                break
    return lost


def _held_out(run: "Overview", record: "Record") -> "Bound | None":
    from vaejob.cli.overview import held_out_identity, held_out_totals
    from vaejob.pictures.report.reported import Bound

    totals, identity = held_out_totals(record), held_out_identity(run, record)
    if totals is None or identity is None:
        return None
    scored = [one for one in run.records if one.held_out]
    which = "the best" if record == run.best else "one"
    at = (
        f"{record.images_seen:,} images, {which} of {len(scored)} that are kept and scored"
        if len(scored) > 1
        else f"{record.images_seen:,} images"
    )
    return Bound(
        name=bound_name(identity.samples),
        totals=totals,
        images_seen=record.images_seen,
        of=_what_it_is_of(identity, totals, checkpoint=at),
    )


def _trained(run: "Overview") -> "Bound | None":
    from vaejob.cli.overview import newest_identity
    from vaejob.pictures.report.reported import Bound
    from vaejob.totals import LikelihoodTotals

    row, identity = run.newest_row("train"), newest_identity(run, "train")
    if row is None or identity is None:
        return None
    totals = LikelihoodTotals.from_dict(row)
    return Bound(
        name=bound_name(identity.samples, own_codes=identity.bound == "conditional"),
        totals=totals,
        images_seen=row["images_seen"],
        of=_what_it_is_of(identity, totals, checkpoint=f"while training, up to {row['images_seen']:,} images"),
    )


def _what_it_is_of(identity: "Identity", totals: "LikelihoodTotals", *, checkpoint: str) -> list[tuple[str, str]]:
    """All of the Identity, and the checkpoint."""
    bounds = {
        "elbo": "ELBO",
        "iwae": f"IWAE, K = {identity.samples:,}",
        "conditional": "none: log p(x | z) of own codes",
    }
    pairs = [
        ("bound", f"{bounds[identity.bound]}, K = 1" if identity.bound == "elbo" else bounds[identity.bound]),
        ("images", f"{identity.images:,}, each once" if identity.split == "test" else f"{identity.images:,}"),
        ("split", identity.split),
        ("pixels", f"{identity.likelihood.pixels}{', a density that may exceed 1' if identity.is_density else ''}"),
        ("binarisation", identity.likelihood.binarize),
        ("bits", str(1 if identity.likelihood.pixels == "bernoulli" else identity.likelihood.bits)),
        ("checkpoint", checkpoint),
        ("data", identity.data),
        ("fingerprint", (identity.fingerprint or "unknown")[:16]),
    ]
    if weights := totals.weights():
        said = f"{weights['effective_samples']:,.1f} of {identity.samples:,} on average, {weights['least_effective_samples']:,.1f} at least"
        pairs += [
            ("effective samples", said),
            ("bias of the bound", f"about {weights['bound_bias_nats_estimate']:.4f} nats"),
        ]
    return pairs


def _data_sets(run: "Overview") -> "list[tuple[str, str, str | None]]":
    from vaejob.cli.overview import data_sets

    return data_sets(run)


def _data_card(split: str, address: str, fingerprint: str | None) -> "DataCard":
    """What the manifest says; or why there is none, and what the run knows."""
    from vaejob.data.batches import DataSet
    from vaejob.pictures.report.reported import DataCard

    data = _in_reach(address, fingerprint)
    facts = [("address", address), ("fingerprint", fingerprint or "not known before the first checkpoint")]
    if not isinstance(data, DataSet):
        return DataCard(split=split, facts=[*facts, ("out of reach", data)])
    manifest = data.manifest
    channels, height, width = manifest.shape
    size = sum(shard.size for shard in manifest.shards)
    return DataCard(
        split=split,
        facts=[
            *facts,
            ("images", f"{manifest.images:,}"),
            ("shape", f"{channels} x {height} x {width} (channels, height, width): {manifest.dims:,} dimensions"),
            ("packed from", manifest.source),
            ("split", manifest.split),
            ("shards", f"{len(manifest.shards):,}, {filesize.decimal(size)} in all"),
            ("row groups", f"{manifest.row_groups:,}"),
        ],
    )


def _in_reach(address: str, fingerprint: str | None) -> "DataSet | str":
    from vaejob.data.batches import open_data
    from vaejob.errors import VaejobError

    try:
        data = open_data(address)
    except VaejobError as error:
        return str(error)
    if fingerprint is not None and data.manifest.fingerprint != fingerprint:
        return f"{address} no longer holds the images that the run was trained with"
    return data


def _findings(
    run: "Overview", record: "Record | None", *, other: str | None, images: int, quiet: bool
) -> "tuple[Findings | None, str]":
    """What the model at the checkpoint shows, or why it shows nothing."""
    from vaejob.cli.use import load_told
    from vaejob.errors import CheckpointError, ConfigError, RunError
    from vaejob.pictures.report.findings import Source, find

    if record is None:
        return None, "No checkpoint exists, so there are no pictures and no likelihoods of single images."
    sources = [
        Source("train" if split == "train" else "held out", _in_reach(address, fingerprint))
        for split, address, fingerprint in _data_sets(run)
    ]
    if other is not None:
        sources.append(Source("other", _fitting(other, record)))

    def loader(images_seen: int) -> "LoadedModel":
        return load_told(run.address, checkpoint=str(images_seen), quiet=quiet)

    older = [one.images_seen for one in run.records if one.images_seen != record.images_seen][-MOST_CHECKPOINTS + 1 :]
    try:
        model = loader(record.images_seen)
    except (CheckpointError, RunError, ConfigError) as error:
        return None, f"The checkpoint cannot be used, so there are no pictures: {error}"
    loaders = [lambda images_seen=images_seen: loader(images_seen) for images_seen in older]
    return find(model, loaders, sources, images=images, tell=(lambda line: None) if quiet else warn), ""


def _fitting(address: str, record: "Record") -> "DataSet":
    """Raises DataError for images of another shape."""
    from vaejob.data.batches import open_data
    from vaejob.errors import DataError
    from vaejob.storage import absolute

    data = open_data(absolute(address))
    if data.manifest.shape != record.shape:
        found, right = ("x".join(map(str, shape)) for shape in (data.manifest.shape, record.shape))
        raise DataError(f"--other is {address}, which has images of {found}; this model's have {right}")
    return data
