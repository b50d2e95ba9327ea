"""The verb that looks before money is spent: doctor."""

import shutil
import sys
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from vaejob.cli.terminal import say, say_json, warn
from vaejob.cli.train import Overrides

if TYPE_CHECKING:
    from vaejob.cluster.doctor.findings import Finding

SUBJECT_WIDTH = 13


def doctor(
    config: Annotated[str, typer.Argument(help="A YAML file, its address in a bucket, or a recipe's name.")],
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Cluster to look at: HOST:PORT of Ray, or http://HOST:8265 to look from there, as a Ray job."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take training steps: the largest batch, images/s, time of an epoch.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of the whole cluster for an hour; says what the job costs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was found, as one JSON value.")] = False,
) -> None:
    """Check what a job needs where it will run: bucket, data, memory, GPUs, network, versions.

    Exits with 0 if nothing failed, 2 if the configuration or the data must be changed, 3 if something outside failed.

    \b
    Examples:
      vaejob doctor job.yaml
      vaejob doctor job.yaml --address http://head:8265 --measure
    """
    from vaejob import load_config

    job = load_config(config, *(overrides or []))  # what is wrong with it is said before torch is loaded
    from vaejob.cluster.doctor.examine import Measures, examine
    from vaejob.cluster.doctor.findings import exit_status

    if address is not None and address.startswith(("http://", "https://")):
        raise typer.Exit(_as_job(config, overrides or [], address, measure, price_per_hour, as_json))
    if address is not None:
        job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"address": address})})
    found = []
    for finding in examine(job, Measures(steps=measure, price_per_hour=price_per_hour)):
        found.append(finding)
        if not as_json:
            say(line(finding))
    if as_json:
        say_json({"findings": [asdict(finding) for finding in found], "exit_status": exit_status(found)})
    else:
        say(summary(found))
    raise typer.Exit(exit_status(found))


def _as_job(
    config: str, overrides: list[str], address: str, measure: bool, price_per_hour: float | None, as_json: bool
) -> int:
    from vaejob import load_config
    from vaejob.cluster.doctor.remote import examine_there

    options = ["--measure"] * measure + ["--json"] * as_json
    options += [] if price_per_hour is None else [f"--price-per-hour={price_per_hour!r}"]
    job, log = load_config(config, *overrides), list[str]()
    status = examine_there(job, address, options=options, write=log.append if as_json else _write)
    if as_json:
        before, found, answer = "".join(["\n", *log]).partition("\n{\n")
        say(f"{{\n{answer.rstrip()}") if found else warn(before.strip())
    return status


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def line(finding: "Finding") -> str:
    """Level, subject and what was found, then what to do: as wide as the terminal."""
    width = max(60, shutil.get_terminal_size().columns)
    start = f"{finding.level:<4}  {finding.subject:<{SUBJECT_WIDTH}}  "
    below = " " * len(start)
    text = textwrap.fill(finding.found, width, initial_indent=start, subsequent_indent=below)
    if not finding.advice:
        return text
    advice = textwrap.fill(f"-> {finding.advice}", width, initial_indent=below, subsequent_indent=f"{below}   ")
    return f"{text}\n{advice}"


def summary(found: "list[Finding]") -> str:
    failed, warned = (sum(finding.level == level for finding in found) for level in ("fail", "warn"))
    if not failed and not warned:
        return f"all {len(found)} checks are well"
    return f"{failed} of {len(found)} checks failed, {warned} warned"
