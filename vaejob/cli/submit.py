"""The verbs of jobs on a Ray cluster: submit, logs, stop."""

import sys
from functools import partial
from typing import Annotated

import typer

from vaejob.cli.terminal import say, say_json, warn
from vaejob.cli.train import Overrides
from vaejob.errors import STOPPED_STATUS, ClusterError, RunError

Address = Annotated[
    str | None,
    typer.Option(help="Jobs API of the cluster's head; default RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265."),
]


def submit(
    config: Annotated[str, typer.Argument(help="A YAML file, its address in a bucket, or a recipe's name.")],
    overrides: Overrides = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stream the log; exit with the job's status.")] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="The job and its run as one JSON object; a log that is followed goes to stderr."),
    ] = False,
) -> None:
    """Run the same job on a Ray cluster, as a Ray job. Repeating it continues the run.

    \b
    Example:
      vaejob submit job.yaml --address http://head:8265 --follow cluster.workers=8
    """
    from vaejob import load_config

    job = load_config(config, *(overrides or []))  # what is wrong with it is said before Ray is loaded
    from vaejob.cluster import jobs
    from vaejob.run import run_address

    client = jobs.connect(address)
    job_id = jobs.submit_job(job, client)
    run = run_address(job)
    if as_json:
        say_json({"job": job_id, "run": run})
    else:
        say(f"submitted {job_id}")
        say(f"run       {run}")
        say(f"log       vaejob logs {run}{f' --address {address}' if address else ''}")
    if follow:
        raise typer.Exit(jobs.follow_job(job_id, client, write=partial(_write, to_stderr=as_json)))


def logs(
    run: Annotated[str, typer.Argument(help="The run's address: BUCKET/NAME.")],
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends; exit with its status.")] = False,
) -> None:
    """The log of a run's newest job: from the cluster, or, where that is gone, what the run keeps of it.

    \b
    Example:
      vaejob logs s3://models/mnist-iwae-1 --follow
    """
    from vaejob.cluster import jobs
    from vaejob.storage import absolute, open_bucket
    from vaejob.storage.logs import read_log

    try:
        client = jobs.connect(address)
        job_id = jobs.find_job(absolute(run), client)
    except (ClusterError, RunError) as why:
        if (text := read_log(open_bucket(run))) is None:
            raise
        warn(f"{why}; this is the log that the run keeps")
        _write(text)
        return
    if follow:
        raise typer.Exit(jobs.follow_job(job_id, client, write=_write))
    _write(jobs.log_of(job_id, client))


def stop(run: Annotated[str, typer.Argument(help="The run's address: BUCKET/NAME.")], address: Address = None) -> None:
    """Ask a run's job to save a checkpoint and end; the run can be resumed.

    \b
    Example:
      vaejob stop s3://models/mnist-iwae-1
    """
    from vaejob.cluster import jobs
    from vaejob.storage import absolute, open_bucket
    from vaejob.storage.runs import newest_record

    client = jobs.connect(address)
    status = jobs.stop_job(jobs.find_job(absolute(run), client), client)
    record, _ = newest_record(open_bucket(run))
    kept = f"its newest checkpoint is at {record.images_seen:,} images" if record else "it had no checkpoint yet"
    say(f"{'stopped' if status == STOPPED_STATUS else f'had ended with status {status}'}: {kept}")
    say(f"go on with: vaejob resume {run}")


def _write(text: str, *, to_stderr: bool = False) -> None:
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write(text)
    stream.flush()
