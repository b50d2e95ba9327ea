"""The verbs that look at runs: runs, show."""

import shutil
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaejob.cli.terminal import bits_and_nats, bound_name, say, say_json, warn, what_it_is_of
from vaejob.cli.verb import require_run

if TYPE_CHECKING:
    from vaejob.cli.overview import Identity, Overview
    from vaejob.storage.runs import Record

RUNS_AT_ONCE = 8
RANKS_SHOWN = 4
LINE_WIDTH = 120
"""Where there is no terminal."""

Json = Annotated[bool, typer.Option("--json", help="The result as one JSON value.")]


def runs(
    bucket: Annotated[str, typer.Argument(help="The folder or bucket that holds runs.")], as_json: Json = False
) -> None:
    """Every run in a bucket: state, progress, and the best held-out bound among its checkpoints.

    \b
    Example:
      vaejob runs s3://models
    """
    from vaejob.errors import RunError
    from vaejob.storage import join, open_bucket
    from vaejob.storage.runs import JOB_KEY

    home = open_bucket(bucket)
    names = [name for name in home.folders() if home.size(f"{name}/{JOB_KEY}") is not None]
    if not names:
        is_run = home.size(JOB_KEY) is not None
        raise RunError(f"{home.url} is one run; use: vaejob show {bucket}" if is_run else f"{home.url} holds no runs")
    from vaejob.cli.overview import comparable_groups, held_out_identity, summary

    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        found = list(pool.map(_overview_or_problem, [join(home.url, name) for name in names]))
    for run, _ in found:
        for line in [run] if isinstance(run, str) else run.problems:
            warn(line)
    readable = [(run, epoch_images) for run, epoch_images in found if not isinstance(run, str)]
    bests = {run.address: held_out_identity(run, run.best) for run, _ in readable if run.best}
    identities = {address: identity for address, identity in bests.items() if identity}
    groups = comparable_groups(identities)
    if as_json:
        group = {run.address: {"comparable_group": groups.get(run.address)} for run, _ in readable}
        say_json([summary(run, epoch_images) | group[run.address] for run, epoch_images in readable])
    else:
        _say_table(readable, groups)
        _say_groups(identities, groups)


def show(
    run: Annotated[str, typer.Argument(help="The run's address: BUCKET/NAME.")],
    as_json: Json = False,
    live: Annotated[
        bool, typer.Option("--watch", help="Go on until the run is done; with --json one object a line at each change.")
    ] = False,
) -> None:
    """One run: its main settings, checkpoints, newest numbers, and how fast it went.

    \b
    Example:
      vaejob show s3://models/mnist-iwae-1 --watch
    """
    require_run(run)
    from vaejob.cli.overview import everything, look_at, training_images

    if live:
        from vaejob.cli.watch import watch

        watch(run, as_json=as_json)
        return
    overview = look_at(run, whole_history=True)
    epoch_images = training_images(overview)
    for line in overview.problems:
        warn(line)
    if as_json:
        say_json(everything(overview, epoch_images))
    else:
        _say_everything(overview, epoch_images)


def _overview_or_problem(address: str) -> "tuple[Overview | str, int | None]":
    """One run that cannot be read must not hide the others."""
    from vaejob.cli.overview import look_at, training_images
    from vaejob.errors import VaejobError

    try:
        overview = look_at(address, whole_history=False)
        return overview, training_images(overview)
    except VaejobError as error:
        return str(error), None


def _say_table(found: "list[tuple[Overview, int | None]]", groups: dict[str, str]) -> None:
    table = _table("run", ">images", "of", "best held-out bound", "last report")
    for run, epoch_images in found:
        best = run.best
        epochs = f"\n{run.images_seen / epoch_images:.1f} epochs" if epoch_images else ""
        starts = len(run.attempts)
        table.add_row(
            f"{run.job.run.name}\n{'finished' if run.finished else 'unfinished'}",
            f"{run.images_seen:,}\nof {run.job.training.images:,}{epochs}",
            groups.get(run.address, ""),
            _bound(run, best) + f"\nat {best.images_seen:,} images" if best else "none yet",
            f"{_ago(run.last_report_at) if run.last_report_at else 'none yet'}\n{starts} start{'' if starts == 1 else 's'}",
        )
    _print(table)


def _say_groups(identities: "dict[str, Identity]", groups: dict[str, str]) -> None:
    """What the bounds are of; those that do not compare are told apart in words."""
    if len(set(groups.values())) > 1:
        say("These bounds are not all comparable: only those of one letter are.")
    for letter in sorted(set(groups.values()), key=lambda letter: (len(letter), letter)):
        say(f"{letter}  {next(identities[address] for address, own in groups.items() if own == letter)}")


def _say_everything(run: "Overview", epoch_images: int | None) -> None:
    from vaejob.cli.overview import data_sets, settings_in_use

    state = "finished" if run.finished else "unfinished"
    epochs = f" ({run.images_seen / epoch_images:.1f} epochs)" if epoch_images else ""
    say(f"run         {run.address}")
    say(f"state       {state}, {run.images_seen:,} of {run.job.training.images:,} images{epochs}")
    say(
        f"starts      {len(run.attempts)}, last report {_ago(run.last_report_at) if run.last_report_at else 'none yet'}"
    )
    for section in ("model", "likelihood", "objective", "optimizer", "data"):
        settings = settings_in_use(getattr(run.job, section)).items()
        said = " ".join(f"{key}={value}" for key, value in settings if key not in ("train", "test"))
        say(_hanging(section, said.replace(", ", ",")))
    for split, address, fingerprint in data_sets(run):
        say(f"{split:<11} {address}{f' ({fingerprint[:12]})' if fingerprint else ''}")
    for split in ("train", "test"):
        _say_newest(run, split)
    if run.profile:
        _say_profile(run.profile)
    if run.records:
        table = _table(">checkpoint", "written", ">workers", ">size", "held-out bound")
        for record in run.records:
            size = sum(file.size for file in record.files)
            written = f"{datetime.fromisoformat(record.written_at):%Y-%m-%d %H:%M} UTC"
            bound = _bound(run, record) if record.held_out else "not evaluated"
            table.add_row(f"{record.images_seen:,}", written, str(record.world_size), f"{size / 1e6:,.1f} MB", bound)
        say()
        _print(table)


def _hanging(name: str, said: str) -> str:
    """Broken between settings where the terminal ends, below where the first began."""
    width = shutil.get_terminal_size(fallback=(LINE_WIDTH, 24)).columns
    lines = textwrap.wrap(said, max(width - 12, 20), break_long_words=False, break_on_hyphens=False)
    return f"{name:<11} " + f"\n{'':12}".join(lines)


def _say_newest(run: "Overview", split: str) -> None:
    from vaejob.cli.overview import newest_identity
    from vaejob.totals import LikelihoodTotals

    row, identity = run.newest_row(split), newest_identity(run, split)
    if row is None or identity is None:
        return
    totals = LikelihoodTotals.from_dict(row)
    say(f"\n{'trained on' if split == 'train' else 'held out'}, at {row['images_seen']:,} images")
    of = what_it_is_of(
        run.job,
        totals,
        samples=identity.samples,
        data=identity.data,
        fingerprint=identity.fingerprint or "unknown",
        own_codes=identity.bound == "conditional",
    )
    say(f"  {of}", indent=2)
    say(f"  {bits_and_nats(totals, run.job.likelihood)}")
    if row["seconds"]:
        workers = f"{row['world_size']} worker{'s' if row['world_size'] > 1 else ''}"
        waited = row["data_wait_seconds"] / row["seconds"]
        say(
            f"  {row['images'] / row['seconds']:,.0f} images/s with {workers}, {waited:.1%} of the time spent waiting for images",
            indent=2,
        )
    for number, what in (
        (row["missing_images"], "damaged images left out"),
        (row["retries"], "requests repeated"),
        (row.get("skipped_steps"), "steps skipped for their gradient"),
    ):
        if number:
            say(f"  {number:,} {what} since the report before")


def _say_profile(ranks: list[dict[str, Any]]) -> None:
    """A column for each of the first ranks; all of them are in the JSON."""
    shown = ranks[:RANKS_SHOWN]
    say(f"\nprofile of {shown[0]['steps']:,} steps, in ms a step; traces: {shown[0]['trace']}, ...")
    table = _table("stage", *(f">rank {rank['rank']}" for rank in shown))
    found = [{row["stage"]: row for row in rank["stages"]} for rank in shown]
    for name in dict.fromkeys(name for rows in found for name in rows):
        cells = [
            f"{1e3 * rows[name]['seconds_per_step']:,.2f} {rows[name]['share']:6.1%}" if name in rows else ""
            for rows in found
        ]
        table.add_row(name, *cells)
    table.add_row("in all", *(f"{1e3 * rank['seconds_per_step']:,.2f} {1:6.1%}" for rank in shown))
    _print(table)


def _bound(run: "Overview", record: "Record") -> str:
    from vaejob.cli.overview import held_out_totals

    totals, samples = held_out_totals(record), run.job.training.evaluate_samples
    assert totals is not None
    return (
        bits_and_nats(totals, run.job.likelihood).replace(", ", "\n")
        + f"\n{bound_name(samples)} of {totals.images:,} images"
    )


def _ago(then: datetime) -> str:
    from vaejob.cli.overview import age_seconds

    seconds = age_seconds(then)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _table(*headers: str) -> Any:
    """A plain table; columns whose header starts with > hold numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 1, 0))
    for header in headers:
        table.add_column(header.lstrip(">"), justify="right" if header.startswith(">") else "left", no_wrap=True)
    return table


def _print(table: Any) -> None:
    from rich.console import Console

    # Wider than any table: a narrow terminal may wrap a line, but no digit is cut off.
    Console(highlight=False, width=400).print(table)
