"""The figures as Markdown: a table for each case, and the goals beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.peers.figures import (
    CEILINGS,
    COLD,
    PASSES,
    RESUME,
    WARM,
    Delivery,
    Record,
    Setting,
    Spread,
    chosen,
    in_round_ratios,
    spread,
)
from tests.benchmarks.peers.loader import FLOOR, OURS

BEGIN, END = "<!-- stream benchmark -->", "<!-- end -->"


@dataclass
class Findings:
    """What one run found."""

    machine: list[str] = field(default_factory=list)
    """Lines on date, machine and versions."""
    servers: set[str] = field(default_factory=set)
    records: list[Record] = field(default_factory=list)
    deliveries: dict[tuple[str, str, int | str], Delivery] = field(default_factory=dict)
    """By case, loader, and the number of workers or "resume"."""
    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """By case, loader and setting: the last line of the error."""


class Goal(NamedTuple):
    """A ratio that ours is to reach."""

    name: str
    ratio: Spread | None
    bound: float
    at_least: bool

    @property
    def is_met(self) -> bool:
        """By the worse end of the rounds, not by the median."""
        assert self.ratio is not None
        return self.ratio.least >= self.bound if self.at_least else self.ratio.most <= self.bound


def report(findings: Findings) -> str:
    cases = list(dict.fromkeys(record.case for record in findings.records))
    parts = [*findings.machine, ""]
    for case in cases:
        parts += [f"**{case}**", "", *case_table(findings, case), "", *goal_lines(findings, case), ""]
    return "\n".join(parts)


def case_table(findings: Findings, case: str) -> list[str]:
    """Rows by their speed from cold; samples/s with half their range, then CPU microseconds a sample."""
    loaders = dict.fromkeys(record.loader for record in findings.records if record.case == case)
    loaders |= dict.fromkeys(loader for failed, loader, _ in findings.failures if failed == case)
    passes = passes_of(findings, case)
    head = ["loader", *(f"{setting}: samples/s, CPU us" for setting in passes)]
    head += ["first batch s", "resume s", "peak MB", "delivered (and with 2 workers)", "mixing"]
    rows = sorted(
        (row(findings, case, name, passes) for name in loaders), key=lambda each: (each[0] in CEILINGS, -each[1])
    )
    return [line(head), line(["---"] * len(head)), *(line(cells) for _, _, cells in rows)]


def passes_of(findings: Findings, case: str) -> list[Setting]:
    """Those that were run."""
    run = {str(record.setting) for record in findings.records if record.case == case}
    return [setting for setting in PASSES if str(setting) in run]


def row(findings: Findings, case: str, loader: str, passes: Sequence[Setting]) -> tuple[str, float, list[str]]:
    def of(setting: Setting) -> list[Record]:
        return chosen(findings.records, case=case, setting=setting, loaders=[loader])

    def one(setting: Setting, figure: Callable[[Record], float], form: str) -> str:
        found = spread(figure(record) for record in of(setting))
        return format(found.median, form) if found and found.median else ""

    cells = [loader]
    for setting in passes:
        failure = findings.failures.get((case, loader, str(setting)))
        cells.append(f"failed: {failure}" if failure else rate_cell(of(setting)))
    cells += [one(COLD, lambda r: r.first_batch, ".2f"), one(RESUME, lambda r: r.first_batch, ".2f")]
    cells += [one(COLD, lambda r: r.peak_mb, ".0f")]
    cells += delivery_cells(findings.deliveries, case, loader)
    rate = spread(record.rate for record in of(COLD))
    return loader, rate.median if rate else 0.0, cells


def rate_cell(records: Sequence[Record]) -> str:
    rate, cpu = spread(r.rate for r in records), spread(r.cpu_us for r in records)
    if rate is None or cpu is None:
        return ""
    return f"{rate.median:,.0f} ±{(rate.most - rate.least) / 2 / rate.median:.0%}, {cpu.median:.0f}"


def delivery_cells(deliveries: Mapping[tuple[str, str, int | str], Delivery], case: str, loader: str) -> list[str]:
    alone = deliveries.get((case, loader, 0))
    if alone is None:
        return ["", ""]
    said = [str(alone)]
    if (shared := deliveries.get((case, loader, 2))) and str(shared) != str(alone):
        said.append(f"2 workers: {shared}")
    if (resumed := deliveries.get((case, loader, "resume"))) and str(resumed) != str(alone):
        said.append(f"resumed: {resumed}")
    return ["; ".join(said), f"{alone.mixing:.2f}"]


def goal_lines(findings: Findings, case: str) -> list[str]:
    lines = []
    for goal in goals(findings.records, case):
        if goal.ratio is not None:
            median, least, most = goal.ratio
            sign = ">=" if goal.at_least else "<="
            verdict = "met" if goal.is_met else "missed"
            lines.append(f"- {goal.name}: {median:.2f} [{least:.2f}, {most:.2f}], goal {sign} {goal.bound}: {verdict}")
    return lines


def goals(records: Sequence[Record], case: str) -> list[Goal]:
    def ratio(setting: Setting, others: Sequence[str], figure: Callable[[Record], float], best: Callable[..., float]):
        ours = chosen(records, case=case, setting=setting, loaders=[OURS])
        return in_round_ratios(
            ours, chosen(records, case=case, setting=setting, loaders=others), figure=figure, best=best
        )

    peers = sorted({record.loader for record in records} - {OURS, FLOOR, *CEILINGS})
    found = []
    for setting in PASSES:
        by_clock = ratio(setting, peers, lambda r: r.rate, max)
        by_cpu = ratio(setting, peers, lambda r: 1 / r.cpu_us, max)
        found.append(Goal(f"{setting}: ours / best peer by the clock", by_clock, 1.5, at_least=True))
        found.append(Goal(f"{setting}: ours / best peer per CPU second", by_cpu, 1.5, at_least=True))
    for setting in (COLD, WARM):
        lower = ratio(setting, CEILINGS, lambda r: r.rate, min)
        found.append(Goal(f"{setting}: ours / lower ceiling", lower, 0.8, at_least=True))
        first = ratio(setting, peers, lambda r: r.first_batch, min)
        found.append(Goal(f"{setting}: first batch, ours / best peer's", first, 0.5, at_least=False))
    return [*found, Goal("first batch, resumed / from the start", resume_ratio(records, case), 1.0, at_least=False)]


def resume_ratio(records: Sequence[Record], case: str) -> Spread | None:
    resumed, started = (chosen(records, case=case, setting=s, loaders=[OURS]) for s in (RESUME, COLD))
    return in_round_ratios(resumed, started, figure=lambda r: r.first_batch, best=min)


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_between_markers(path: Path, text: str, *, begin: str = BEGIN) -> None:
    """Replaces what stands between the markers."""
    before, after = around_markers(path, begin=begin)
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{END}{after}")


def around_markers(path: Path, *, begin: str = BEGIN) -> tuple[str, str]:
    """The text before and after the markers. Raises ValueError where they are missing."""
    before, found, rest = path.read_text().partition(begin)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise ValueError(f"{path.name} has no place for the table; put {begin} and {END} where it belongs")
    return before, after
