"""How fast a job will be, how long it takes and what it costs, judged. Pure functions; nothing here is guessed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vaejob.cluster.doctor.findings import Finding, of_failure
from vaejob.cluster.doctor.results import Curve, Failed, Speed, Summing, TimedStep
from vaejob.cluster.doctor.words import counted, duration, size_of

SYNC_SHARE = 0.25
"""Of a step: gradients that take longer to add up cost as much as a quarter of the workers."""
ROWS = 20
"""Newest rows of an earlier run that tell its speed."""


def of_summing(sums: Sequence[Summing | Failed], *, gradients: int, step_seconds: float | None) -> list[Finding]:
    """Of the all-reduce that every worker took part in; empty where there is one worker."""
    if failed := [one for one in sums if isinstance(one, Failed)]:
        advice = (
            "open all TCP ports between the nodes; where a node has several networks, set GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME to the one that the others reach"
        )
        return [of_failure("network", failed[0], whose="the workers do not reach one another", advice=advice)]
    whole = [one for one in sums if isinstance(one, Summing)]
    if len(whole) < 2:
        return []
    slowest = max(whole, key=lambda one: one.seconds)
    seconds = seconds_to_sum(slowest, gradients)
    found = (
        f"{slowest.backend} adds up {size_of(slowest.size)} over {slowest.world_size} workers in "
        f"{duration(slowest.seconds)}, {size_of(slowest.bus_bytes_per_second)}/s by each line; this model's gradients "
        f"take {duration(seconds)} a step"
    )
    if step_seconds is None or seconds <= SYNC_SHARE * step_seconds:
        return [Finding("ok", "network", found)]
    found += f", the rest of it {duration(step_seconds)}"
    return [Finding("warn", "network", found, "larger batches, fewer workers, or a faster network between them")]


def seconds_to_sum(summing: Summing, gradients: int) -> float:
    """Of the gradients: as long as what was measured, and longer in proportion if they are more."""
    return summing.seconds * max(1.0, gradients / summing.size)


def of_curve(curve: Curve | Failed, *, configured: int) -> list[Finding]:
    """The largest number of images that fits one worker, and its images/s by batch. configured: that it takes at once."""
    if isinstance(curve, Failed):
        return [of_failure("measured", curve, whose="worker 0", advice="a step of this job fails there the same way")]
    if not curve.steps:
        advice = "take a smaller model, or workers with more memory"
        return [Finding("fail", "largest batch", "not even one image fits", advice)]
    largest = curve.steps[-1]
    found = f"{largest.images:,} images of a worker fit"
    match curve.ended:
        case "memory":
            found += f", {curve.refused:,} do not"
        case "estimate":
            found += f"; {curve.refused:,} would not by the estimate, which is not tried on a machine's own memory"
        case "time":
            found += f"; their step takes {duration(largest.seconds)}, and no larger one was tried"
        case "size":
            found += ", and no larger number was tried"
    if largest.peak is not None:
        found += f"; {size_of(largest.peak)} in use at most"
    fits = Finding("ok", "largest batch", found)
    if 0 < curve.refused <= configured:
        advice = f"set training.micro_batch={largest.images}, which changes no result, or a smaller data.global_batch"
        fits = Finding("fail", "largest batch", f"{found}; the job asks for {configured:,}", advice)
    rates = ", ".join(f"{step.images}: {_rate(step.images / step.seconds)}" for step in curve.steps)
    return [fits, Finding("ok", "throughput", f"images/s of one worker alone, not compiled, by its batch: {rates}")]


def of_steps(
    steps: Sequence[TimedStep | Failed], *, global_batch: int, sync_seconds: float
) -> tuple[Finding, Speed | None]:
    """The job's step at the configured batch, from steps that all workers took at the same time."""
    if failed := [step for step in steps if isinstance(step, Failed)]:
        advice = "a step of this job fails there the same way; if memory ran out, set a smaller data.global_batch"
        return of_failure("step", failed[0], whose="a worker", advice=advice), None
    slowest = max((step for step in steps if isinstance(step, TimedStep)), key=lambda step: step.seconds)
    seconds = slowest.seconds + sync_seconds
    found = (
        f"{_rate(global_batch / seconds)} images/s at data.global_batch={global_batch}: {duration(slowest.seconds)} for "
        f"{counted(slowest.images, 'image')} of the slowest of {counted(len(steps), 'worker')}"
    )
    if sync_seconds:
        found += f", {duration(sync_seconds)} for the gradients, as if nothing of it overlapped"
    if slowest.peak is not None:
        found += f"; {size_of(slowest.peak)} in use at most"
    slow = slowest.compile_seconds
    found += "; not compiled" if slow is None else f"; compiled, of which the first step took {duration(slow)}"
    return Finding("ok", "step", f"{found}; without waiting for data"), Speed(seconds, "measured now")


def speed_of_rows(rows: Sequence[Mapping[str, Any]], *, world_size: int) -> Speed | None:
    """From the newest training rows of a run that as many workers wrote; None if there are none."""
    own = [row for row in rows if row["split"] == "train" and row["world_size"] == world_size and row["steps"]][-ROWS:]
    if not own:
        return None
    seconds = sum(row["seconds"] for row in own) / sum(row["steps"] for row in own)
    return Speed(seconds, f"by the newest {counted(len(own), 'row')} of this run")


def of_time(
    speed: Speed | None, *, images: int, data_images: int, global_batch: int, price_per_hour: float | None
) -> Finding:
    """Of an epoch and of the whole job. images: that the job is to see; data_images: of an epoch."""
    if speed is None:
        unknown = "not known: this run has no rows by as many workers, and nothing was measured"
        if price_per_hour is None:
            return Finding("ok", "time", unknown)
        return Finding("warn", "time", f"{unknown}; so neither is the cost", "add --measure")
    epoch = math.ceil(data_images / global_batch) * speed.seconds_per_step
    whole = images / data_images * epoch
    found = f"{duration(epoch)} an epoch, {duration(whole)} for {images:,} images in all, {speed.source}"
    if price_per_hour is not None:
        found += f"; at {price_per_hour:g} an hour {_money(epoch, price_per_hour)} an epoch, {_money(whole, price_per_hour)} in all"
    return Finding("ok", "time", f"{found}; not counted: the start, held-out passes, checkpoints")


def _money(seconds: float, price_per_hour: float) -> str:
    cost = seconds / 3600 * price_per_hour
    return f"{cost:,.2f}" if cost >= 1 else f"{cost:.2g}"


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 10 else f"{images_per_second:.2g}"
