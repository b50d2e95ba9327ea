"""What probes brought back, judged: one line for each subject, and what to do about it. Pure functions of their arguments."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vaejob.cluster.doctor.results import (
    BucketUse,
    Clock,
    DataSample,
    Failed,
    Host,
    Places,
)
from vaejob.cluster.doctor.words import by_size, counted, milliseconds, size_of, who

Level = Literal["ok", "warn", "fail"]

CLOCK_SECONDS, STORE_CLOCK_SECONDS = 1.0, 300.0
"""Rows are dated by the clock of their writer; object stores refuse requests whose date is 5 to 15 minutes off."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    level: Level
    subject: str
    found: str
    advice: str = ""
    wrong_input: bool = False
    """A failure that lies in the configuration or in the data; the others lie outside."""


def exit_status(findings: Sequence[Finding]) -> int:
    """0 if nothing failed; 2 if the input must be changed first; 3 if something outside failed."""
    failed = [finding for finding in findings if finding.level == "fail"]
    return 0 if not failed else 2 if any(finding.wrong_input for finding in failed) else 3


def of_failure(subject: str, failed: Failed, *, whose: str, advice: str) -> Finding:
    return Finding("fail", subject, f"{whose}: {failed.error}", advice, failed.wrong_input)


def of_places(places: Places, *, gpus_per_worker: int) -> list[Finding]:
    """Whether all workers found room, and whether GPUs are left idle."""
    found = f"room for {counted(places.placed, 'worker')} on {counted(places.nodes, 'node')}"
    findings = [Finding("ok", "workers", f"{found}, {places.asked} asked for")]
    if places.error:
        none = "add nodes or free some, or set a smaller cluster.cpus_per_worker"
        less = f"set cluster.workers={places.placed}, or add nodes" if places.placed else none
        findings = [Finding("fail", "workers", places.error, less)]
    if places.gpus_in_cluster and not gpus_per_worker:
        idle = f"the cluster has {counted(places.gpus_in_cluster, 'GPU')}, and cluster.gpus_per_worker is 0"
        findings.append(Finding("warn", "GPUs", idle, "set cluster.gpus_per_worker=1 to train on them"))
    return findings


def of_versions(driver: Mapping[str, str], workers: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Of python, vaejob, torch and ray on each worker against the driver's.

    Only the last part of a version may differ without harm: python's, and torch's build (+cpu, +cu128) if the workers
    agree about it.
    """
    findings = list[Finding]()
    for package in ("python", "vaejob", "code", "torch", "ray"):
        others = {name: own.get(package, "none") for name, own in workers.items()}
        differing = {name: version for name, version in others.items() if version != driver[package]}
        if not differing:
            continue
        harmless = _release(package, driver[package]) in {_release(package, version) for version in others.values()}
        harmless &= len(set(others.values())) == 1 and package in ("python", "torch")
        first = next(iter(differing.values()))
        found = (
            f"{_called(package)} is {driver[package]} on the driver, {first} on {who(list(differing), of=len(workers))}"
        )
        advice = "one environment for all: the same image, or the same wheels, on every node"
        findings.append(Finding("warn" if harmless else "fail", "versions", found, advice))
    if not findings:
        one = ", ".join(f"{package} {driver[package]}" for package in ("python", "torch", "ray"))
        where = f", the same on the driver and {counted(len(workers), 'worker')}" if workers else ""
        findings.append(Finding("ok", "versions", f"vaejob {driver['vaejob']} ({driver['code']}), {one}{where}"))
    return findings


def _release(package: str, version: str) -> str:
    return version.partition("+")[0] if package == "torch" else ".".join(version.split(".")[:2])


def _called(package: str) -> str:
    return "vaejob's code (a hash)" if package == "code" else package


def of_interfaces(hosts: Mapping[str, Host]) -> Finding:
    """By which way each worker reaches the head."""
    ways = Counter(host.interface or "an unnamed interface" for host in hosts.values())
    found = ", ".join(f"{name} on {counted(number, 'worker')}" for name, number in ways.most_common(3))
    settings = sorted({host.settings for host in hosts.values()})
    if len(settings) > 1:
        differ = f"the workers have different settings of the network ({'; '.join(one or 'none' for one in settings)})"
        return Finding("warn", "interface", differ, "set the same on every node, or none")
    addresses = ", ".join(sorted({host.address for host in hosts.values()})[:3])
    said = f"; {settings[0]}" if settings[0] else ""
    return Finding("ok", "interface", f"towards the head {found} ({addresses}){said}")


def of_bucket(uses: Mapping[str, BucketUse | Failed]) -> list[Finding]:
    """Of what each process could do in the bucket; the driver is one of them."""
    findings, errors = list[Finding](), dict[str, list[str]]()
    for name, use in uses.items():
        for error in _errors(use):
            errors.setdefault(error, []).append(name)
    for error, names in errors.items():
        whom = who(names, of=len(uses))
        wrong = any(use.wrong_input for use in uses.values() if isinstance(use, Failed) and use.error == error)
        findings.append(Finding("fail", "bucket", f"from {whom}: {error}", _bucket_advice(error), wrong))
    whole = {name: use for name, use in uses.items() if isinstance(use, BucketUse) and not _errors(use)}
    if whole:
        url = next(iter(whole.values())).url
        times = "; ".join(f"from {name}: {_times(use)}" for name, use in _slowest(whole).items())
        findings.append(Finding("ok", "bucket", f"{url} can be written, read, listed and deleted in; ms {times}"))
        findings.append(_of_conditions(whole))
    if blind := [name for name, use in whole.items() if use.sees_driver is False]:
        found = f"{who(blind, of=len(uses))} cannot see what the driver put there: each machine has a folder of its own"
        findings.append(
            Finding("fail", "bucket", found, "set run.bucket to s3://, gs://, az://, or a folder that all nodes share")
        )
    return findings


def _errors(use: BucketUse | Failed) -> list[str]:
    """Without the scratch key, which differs from process to process."""
    if isinstance(use, Failed):
        return [use.error]
    return [f"{request.verb}: {_without_key(request.error, use.url)}" for request in use.requests if request.error]


def _without_key(error: str, url: str) -> str:
    name, space, rest = error.partition(" ")
    return f"{url}:{space}{rest}" if name.startswith(f"{url}/doctor/") else error


def _slowest(uses: Mapping[str, BucketUse]) -> dict[str, BucketUse]:
    """The driver, and of the workers the one whose requests took longest."""
    workers = [name for name in uses if name != "the driver"]
    shown = sorted(workers, key=lambda name: -sum(request.seconds for request in uses[name].requests))[:1]
    shown += ["the driver"] if "the driver" in uses else []
    return {
        name if len(workers) == 1 or name == "the driver" else f"{name} (the slowest)": uses[name] for name in shown
    }


def _times(use: BucketUse) -> str:
    return ", ".join(f"{request.verb} {milliseconds(request.seconds)}" for request in use.requests)


def _of_conditions(uses: Mapping[str, BucketUse]) -> Finding:
    kinds = {use.conditional for use in uses.values()}
    if kinds == {"kept"}:
        return Finding("ok", "starts", "a second conditional put is refused: of two starts of the run only one goes on")
    how = (
        "refuses conditional puts"
        if "not offered" in kinds
        else "takes a second conditional put as if it were the first"
    )
    return Finding(
        "warn",
        "starts",
        f"the store {how}: two starts of this run within one second may replace each other's rows and records",
        "start a run from one place at a time, or keep it in a store with conditional writes (If-None-Match)",
    )


def _bucket_advice(error: str) -> str:
    for mark, advice in (
        ("RequestTimeTooSkewed", "set that machine's clock (NTP)"),
        ("does not exist", "create the bucket, or correct run.bucket"),
        ("denied", "give that machine's role or key the right to put, get, list and delete below run.bucket"),
        ("another region", "set AWS_REGION on that machine"),
        ("credentials", "give the process a role, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("gave up", "see whether that machine reaches the store: endpoint, proxy, firewall, VPC endpoint"),
        ("is a file", "set run.bucket to a folder"),
        ("annot", "set run.bucket to a folder that process may write to"),
    ):
        if mark in error:
            return advice
    return "a job would fail the same way; the same request with the store's own client may tell more"


def of_data(setting: str, samples: Mapping[str, DataSample | Failed]) -> list[Finding]:
    """Of one data set, as each process found it."""
    findings, errors = list[Finding](), dict[Failed, list[str]]()
    for name, sample in samples.items():
        if isinstance(sample, Failed):
            errors.setdefault(sample, []).append(name)
    for failed, names in errors.items():
        advice = f"vaejob verify tells all that is wrong; pack the data again, or correct {setting}"
        if not failed.wrong_input:
            advice = "see that this machine may read there"
        findings.append(of_failure(setting, failed, whose=f"from {who(names, of=len(samples))}", advice=advice))
    whole = {name: sample for name, sample in samples.items() if isinstance(sample, DataSample)}
    if len(prints := {sample.fingerprint for sample in whole.values()}) > 1:
        found = f"{len(prints)} different data sets are at {next(iter(whole.values())).address} on different machines"
        findings.append(Finding("fail", setting, found, f"set {setting} to an address that all nodes share", True))
    elif whole:
        findings.append(_of_samples(setting, list(whole.values())))
    return findings


def _of_samples(setting: str, samples: Sequence[DataSample]) -> Finding:
    one, checked = samples[0], {group for sample in samples for group in sample.checked}
    read, slowest = sum(sample.read for sample in samples), max(sample.seconds for sample in samples)
    return Finding(
        "ok",
        setting,
        f"{one.images:,} images of {by_size(one.shape)} ({one.fingerprint[:12]}); {len(checked):,} of "
        f"{one.row_groups:,} row groups read and whole, {size_of(read)} in {slowest:.2f} s by {counted(len(samples), 'reader')}",
    )


def of_batches(*, global_batch: int, lanes: int, workers: int, images: int) -> list[Finding]:
    """How a batch falls to the workers."""
    if workers > global_batch:
        found = (
            f"a batch of data.global_batch={global_batch} leaves {workers - global_batch} of {workers} workers nothing"
        )
        return [Finding("warn", "batch", found, f"set data.global_batch to {workers} or more, or fewer workers")]
    if global_batch > images:
        found = f"data.global_batch is {global_batch}, the data set has {images:,} images: each epoch is one step"
        return [Finding("warn", "batch", found, "set a smaller data.global_batch")]
    largest = math.ceil(global_batch / workers)
    findings = [Finding("ok", "batch", f"{global_batch} images: {largest} for each of {counted(workers, 'worker')}")]
    if global_batch % workers:
        waits = 1 - global_batch / (largest * workers)
        near = max(1, round(global_batch / workers)) * workers
        found = (
            f"{global_batch} images over {workers} workers: some have {largest}, the others wait for them ({waits:.0%})"
        )
        findings = [Finding("warn", "batch", found, f"set data.global_batch to a multiple, such as {near}")]
    if lanes < workers:
        found = f"data.lanes is {lanes} with {workers} workers, which then read the same row groups side by side"
        findings.append(Finding("warn", "lanes", found, f"set data.lanes to {workers} or more (it decides the order)"))
    return findings


def of_clocks(clocks: Mapping[str, Clock]) -> list[Finding]:
    """How far the workers' clocks are from the driver's. Empty where nobody was asked."""
    if not clocks:
        return []
    name, worst = max(clocks.items(), key=lambda item: abs(item[1].ahead))
    found = f"{name} is {abs(worst.ahead):.3f} s {'ahead of' if worst.ahead > 0 else 'behind'} the driver, ± {worst.uncertainty:.3f} s"
    if (off := abs(worst.ahead) - worst.uncertainty) <= CLOCK_SECONDS:
        return [Finding("ok", "clocks", f"at most: {found}")]
    level: Level = "fail" if off > STORE_CLOCK_SECONDS else "warn"
    return [
        Finding(level, "clocks", f"{found}; an object store may refuse its requests", "run NTP (chrony) on every node")
    ]
