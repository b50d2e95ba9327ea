"""One case from its making to its last round."""

import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.peers.figures import CEILINGS, COLD, PASSES, RESUME, WARM, Delivery, Record, Setting
from tests.benchmarks.peers.loader import LOADERS, OURS
from tests.benchmarks.peers.pictures import Case
from tests.benchmarks.peers.processes import PassError
from tests.benchmarks.peers.stage import Stage
from tests.benchmarks.peers.tables import Findings
from tests.s3.server import HOW_TO_INSTALL, running, which_server


def run_case(
    case: Case,
    name: str,
    findings: Findings,
    *,
    loaders: Sequence[str],
    rounds: int,
    worker_rounds: int,
    slow_workers: bool,
    grown_from: str | None,
) -> None:
    """Adds what it finds to the findings; the passes with workers are run in the first rounds alone. A server for each case, since it holds its objects in memory."""
    kind = which_server()
    if kind is None:
        raise RuntimeError(f"there is no S3 server on this machine: {HOW_TO_INSTALL}")
    with tempfile.TemporaryDirectory(prefix="stream-") as folder, running(kind, Path(folder, "server")) as server:
        findings.servers.add(kind)
        stage = Stage(case=case, folder=Path(folder), server=server)
        stage.make(grown_from=grown_from)
        alone = () if slow_workers else tuple(loader for loader in loaders if LOADERS[loader].workers_are_slow)
        for loader in loaders:
            write_and_check(stage, name, loader, findings, with_workers=worker_rounds > 0 and loader not in alone)
        for turn in range(rounds):
            settings = [setting for setting in (*PASSES, RESUME) if turn < worker_rounds or not setting.workers]
            run_round(stage, name, findings, loaders=loaders, alone=alone, turn=turn, settings=settings)


def write_and_check(stage: Stage, case: str, loader: str, findings: Findings, *, with_workers: bool) -> None:
    def note(found: Delivery, *, how: int | str) -> None:
        findings.deliveries[case, loader, how] = found
        print(f"{case}: {loader} ({how}): {found}, mixing {found.mixing:.2f}", flush=True)

    try:
        stage.write(loader)
    except PassError as error:
        fail(findings, case, loader, PASSES, error)
        return
    for workers in (0, 2) if with_workers else (0,):
        try:
            note(stage.delivered(loader, workers=workers), how=workers)
        except PassError as error:
            fail(findings, case, loader, [each for each in PASSES if each.workers == workers], error)
    if LOADERS[loader].resumes:
        try:
            note(stage.delivered_in_two(loader), how="resume")
        except PassError as error:
            fail(findings, case, loader, [RESUME], error)


def run_round(
    stage: Stage,
    case: str,
    findings: Findings,
    *,
    loaders: Sequence[str],
    alone: Sequence[str],
    turn: int,
    settings: Sequence[Setting],
) -> None:
    """Every loader once in each setting, in an order of this round; those in `alone` without workers only."""
    for setting in settings:
        chosen = [each for each in loaders if setting != RESUME or LOADERS[each].resumes]
        chosen = [each for each in chosen if not (setting.workers and each in alone)]
        chosen += CEILINGS if setting in (COLD, WARM) and OURS in loaders else []
        random.Random(f"{turn} {setting}").shuffle(chosen)
        for loader in chosen:
            if (case, loader, str(setting)) in findings.failures:
                continue
            try:
                measure = stage.ceiling if loader in CEILINGS else stage.measured
                record = Record(
                    case=case, setting=setting, loader=loader, round=turn, measured=measure(loader, setting)
                )
            except PassError as error:
                fail(findings, case, loader, [setting], error)
                continue
            findings.records.append(record)
            print(
                f"{case}: round {turn + 1}, {setting}, {loader}: {record.rate:,.0f}/s, {record.cpu_us:,.0f} us CPU, "
                f"first batch {record.first_batch:.2f} s, {record.peak_mb:,.0f} MB, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )


def fail(findings: Findings, case: str, loader: str, settings: Sequence[Setting], error: PassError) -> None:
    """It is left out of these settings from now on, and the table says why."""
    for setting in settings:
        findings.failures[case, loader, str(setting)] = str(error)
        print(f"{case}: {loader} failed, {setting}: {error}", flush=True)
