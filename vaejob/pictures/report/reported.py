"""What a page is made of: plain facts of each run, gathered by the verb."""

from collections.abc import Sequence
from dataclasses import dataclass

from vaejob.config import JobConfig
from vaejob.likelihood.units import density_bits
from vaejob.metrics import LikelihoodTotals
from vaejob.pictures.report.findings import Findings
from vaejob.storage.runs import Record, Row


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One likelihood with what it is of."""

    name: str
    """-ELBO, -IWAE-K, or -log p(x | z)."""
    totals: LikelihoodTotals
    images_seen: int
    of: Sequence[tuple[str, str]]
    """All that makes it comparable, name by name."""


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """What is in a data set of the run."""

    split: str
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """One run, as far as it got."""

    address: str
    job: JobConfig
    finished: bool
    images_seen: int
    rows: Sequence[Row]
    """Its history as if it had never been interrupted."""
    lost: Sequence[Row]
    """Reports that a later attempt replaced, since it began at a checkpoint before them."""
    starts: Sequence[str]
    """Every start of the command, oldest first."""
    record: Record | None = None
    """The checkpoint whose bound and pictures are shown."""
    held_out: Bound | None = None
    newest: Bound | None = None
    """Of the newest checkpoint, if that is another."""
    trained: Bound | None = None
    train_name: str = ""
    held_out_name: str = ""
    group: str = ""
    """Held-out bounds of one letter compare; empty without one."""
    group_words: str = ""
    problems: Sequence[str] = ()
    data: Sequence[DataCard] = ()
    findings: Findings | None = None
    no_findings: str = ""
    """Why there are no pictures."""

    @property
    def name(self) -> str:
        return self.job.run.name

    @property
    def density_bits(self) -> float | None:
        """What is added to a density's bits/dim; None for a probability."""
        return density_bits(self.job.likelihood)
