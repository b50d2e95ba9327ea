"""The verb that serves a model."""

from typing import Annotated, Any

import typer

from vaejob.cli.terminal import say, warn
from vaejob.cli.use import Quiet, load_told
from vaejob.cli.verb import require_run

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    run: Annotated[str, typer.Argument(help="The run's address, BUCKET/NAME, or the folder of an export.")],
    checkpoint: Annotated[str, typer.Option(help="latest, best, or a number of images.")] = "latest",
    host: Annotated[str, typer.Option(help="0.0.0.0: whoever reaches this machine may ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8642,
    quiet: Quiet = False,
) -> None:
    """A page and a JSON API on this machine: samples, and an image of yours reconstructed, scored and interpolated.

    \b
    Example:
      vaejob serve s3://models/mnist-iwae-1 --checkpoint best
    """
    require_run(run)
    import os
    import socket

    from aiohttp import web

    from vaejob.errors import OutsideError
    from vaejob.serving.answers import encodes, interpolates
    from vaejob.serving.app import make_app

    model = load_told(run, checkpoint=checkpoint, quiet=quiet)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OutsideError(
            f"--host {host} --port {port}: {os.strerror(error.errno or 0)}; another port may be free: --port 0"
        ) from None
    about = {
        "run": run,
        "checkpoint": model.record.images_seen,
        "shape": list(model.record.shape),
        "family": model.job.model.family,
        "pixels": model.job.likelihood.pixels,
        "reconstructs": encodes(model),
        "interpolates": interpolates(model),
        "lines": _lines(model),
    }
    where = f"[{host}]" if ":" in host else host
    say(f"serving {run} at http://{where}:{listening.getsockname()[1]}/ (ctrl-C ends)")
    if host not in LOOPBACK:
        warn(f"--host is {host}: whoever reaches this machine can ask, without a password")
    hosts = frozenset(LOOPBACK) if host in LOOPBACK else None
    web.run_app(make_app(model, about, hosts=hosts), sock=listening, print=None, access_log=None)


def _lines(model: Any) -> list[str]:
    """What the numbers on the page are of."""
    from vaejob.cli.overview import held_out_totals
    from vaejob.cli.terminal import bits_and_nats

    shape = "x".join(map(str, model.record.shape))
    lines = [
        f"checkpoint at {model.record.images_seen:,} images",
        f"{model.job.model.family}, {model.job.likelihood.pixels}, images of {shape}",
    ]
    totals = held_out_totals(model.record)
    return [*lines, f"held out {bits_and_nats(totals, model.job.likelihood)}"] if totals else lines
