"""What is known of a run from its bucket alone, and its numbers as JSON."""

import json
from collections import Counter
from collections.abc import Hashable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args, get_origin

from vaejob.cli.terminal import bound_name
from vaejob.config import JobConfig, LikelihoodConfig, Section
from vaejob.data.batches import open_data
from vaejob.errors import CheckpointError, RunError, VaejobError
from vaejob.likelihood.units import bits_per_dim, density_bits
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.profiles import read_profile
from vaejob.storage.runs import (
    Record,
    Row,
    held_out_nats,
    newest_record,
    read_job,
    read_record,
    read_row_files,
    read_rows,
    recorded_images,
    row_keys,
)
from vaejob.totals import LikelihoodTotals


class Overview(NamedTuple):
    """One run, as far as it got."""

    address: str
    job: JobConfig
    newest: Record | None
    """The newest checkpoint that is there in full."""
    records: list[Record]
    """Every readable checkpoint, oldest first."""
    rows: list[Row]
    """Its whole history, or only its last report."""
    attempts: list[str]
    """Every start of the job, oldest first."""
    problems: list[str]
    """A line for each checkpoint that is damaged, and for a profile."""
    profile: list[dict[str, Any]]
    """Where the time of each rank's steps went; empty without training.profile."""

    @property
    def images_seen(self) -> int:
        """By its newest checkpoint, or by a report beyond it."""
        reported: int = self.rows[-1]["images_seen"] if self.rows else 0
        return max(reported, self.newest.images_seen if self.newest else 0)

    @property
    def finished(self) -> bool:
        return self.newest is not None and self.newest.images_seen >= self.job.training.images

    @property
    def best(self) -> Record | None:
        """The checkpoint with the best held-out bound."""
        return min((record for record in self.records if record.held_out), key=held_out_nats, default=None)

    @property
    def last_report_at(self) -> datetime | None:
        return datetime.fromisoformat(self.rows[-1]["written_at"]) if self.rows else None

    def newest_row(self, split: str) -> Row | None:
        return next((row for row in reversed(self.rows) if row["split"] == split), None)


def look_at(address: str, *, whole_history: bool) -> Overview:
    """Raises RunError where no run is."""
    run = open_bucket(address)
    job = read_job(run)
    newest, problems = newest_record(run)
    records = []
    for images_seen in recorded_images(run):
        try:
            records.append(read_record(run, images_seen))
        except CheckpointError as error:
            problems = problems if str(error) in problems else [*problems, str(error)]
        except RunError:
            continue  # it was tidied away since it was listed
    rows = read_rows(run) if whole_history else _last_report(run)
    attempts = [key.removeprefix("attempts/").removesuffix(".yaml") for key in run.keys("attempts/")]
    profile: list[dict[str, Any]] = []
    if whole_history:
        try:
            profile = read_profile(run)
        except RunError as error:
            problems.append(str(error))
    return Overview(run.url, job, newest, records, rows, attempts, problems, profile)


def training_images(overview: Overview) -> int | None:
    """Images of an epoch; None where the data is out of reach, or no longer what the run was trained on."""
    try:
        manifest = open_data(overview.job.data.train).manifest
    except VaejobError:
        return None
    changed = overview.newest is not None and overview.newest.train_fingerprint != manifest.fingerprint
    return None if changed else manifest.images


class Identity(NamedTuple):
    """What a likelihood is of, besides the checkpoint."""

    bound: Literal["elbo", "iwae", "conditional"]
    """conditional: log p(x | z) given codes that belong to the images, which is no bound on log p(x)."""
    samples: int
    """K of the bound; 1 for the others."""
    images: int
    data: str
    split: str
    fingerprint: str | None
    likelihood: LikelihoodConfig

    @property
    def is_density(self) -> bool:
        return density_bits(self.likelihood) is not None

    @property
    def levels(self) -> str:
        """What is modelled of the images: a threshold at half leaves their highest bit, which a draw does not."""
        if self.likelihood.binarize in ("static", "dynamic"):
            return f"{self.likelihood.binarize} binarisation"
        bits = 1 if self.likelihood.pixels == "bernoulli" else self.likelihood.bits
        return f"{bits} bit{'s' if bits > 1 else ''}"

    def comparable_key(self) -> Hashable:
        """Equal where likelihoods may stand in one column; the observation model may differ, but not a mass from a density."""
        return tuple(self._deciding().values())

    def why_not_comparable(self, other: "Identity") -> list[str]:
        """What differs of what must be equal; empty where the two compare."""
        own, others = self._deciding(), other._deciding()
        return [f"{name}: {own[name]} and {others[name]}" for name in own if own[name] != others[name]]

    def _deciding(self) -> dict[str, Hashable]:
        return {
            "bound": self.bound,
            "samples": self.samples,
            "images": self.images,
            "data": self.fingerprint,
            "levels": self.levels,
            "density": self.is_density,
        }

    def to_dict(self) -> dict[str, Any]:
        names = ("bound", "samples", "data", "split", "fingerprint")
        return {
            **{name: getattr(self, name) for name in names},
            **self.likelihood.model_dump(),
            "density": self.is_density,
        }

    def __str__(self) -> str:
        name = bound_name(self.samples, own_codes=self.bound == "conditional")
        density = ", densities" if self.is_density else ""
        return f"{name} of {self.images:,} images, {self.levels}{density}, data {(self.fingerprint or 'unknown')[:12]}"


def comparable_groups(identities: Mapping[str, Identity]) -> dict[str, str]:
    """A letter for each name: likelihoods of one letter compare. a is the largest group, or the first of the largest."""
    keys = {name: identity.comparable_key() for name, identity in identities.items()}
    letters = {key: _letters(rank) for rank, (key, _) in enumerate(Counter(keys.values()).most_common())}
    return {name: letters[key] for name, key in keys.items()}


def _letters(rank: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return ("" if rank < 26 else _letters(rank // 26 - 1)) + chr(ord("a") + rank % 26)


def held_out_identity(run: Overview, record: Record) -> Identity | None:
    if record.held_out is None:
        return None
    samples, data = run.job.training.evaluate_samples, run.job.data.test or "unknown"
    images = int(record.held_out["images"])
    return Identity(_bound(samples), samples, images, data, "test", record.test_fingerprint, run.job.likelihood)


def newest_identity(run: Overview, split: str) -> Identity | None:
    """Of the newest report on the images trained on or held out."""
    row = run.newest_row(split)
    if row is None:
        return None
    goal, trained = run.job.objective, split == "train"
    samples = (goal.samples if goal.bound == "iwae" else 1) if trained else run.job.training.evaluate_samples
    bound = "conditional" if trained and goal.own_codes else _bound(samples)
    _, data, fingerprint = next((found for found in data_sets(run) if found[0] == split), (split, "unknown", None))
    return Identity(bound, samples, row["images"], data, split, fingerprint, run.job.likelihood)


def _bound(samples: int) -> Literal["elbo", "iwae"]:
    return "elbo" if samples == 1 else "iwae"


def settings_in_use(section: Section) -> dict[str, Any]:
    """Without those that belong to another choice, such as another family: a description that opens with names of choices,
    as in "mlp, tied: units of ...", is of a setting that these alone have."""
    fields, values = type(section).model_fields, section.model_dump()
    kinds = {name: field.annotation for name, field in fields.items()}
    choices = {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) is Literal}

    def in_use(name: str) -> bool:
        opening = (fields[name].description or "").partition(": ")[0].split(", ")
        deciding = [other for other, known in choices.items() if other != name and set(opening) <= set(known)]
        return not deciding or values[deciding[0]] in opening

    return {name: value for name, value in values.items() if in_use(name)}


def likelihood_numbers(totals: LikelihoodTotals, likelihood: LikelihoodConfig) -> dict[str, Any]:
    """Means per image with their standard errors, in nats and in bits/dim, at full precision; a density's corrected."""
    numbers: dict[str, Any] = {"images": totals.images, "dims": totals.dims, "non_finite": totals.non_finite}
    if totals.non_finite:
        return numbers
    dims, added = totals.dims / totals.images, density_bits(likelihood)
    if added is not None:
        numbers |= {"density": True, "density_bits_correction": added}
    for name, in_bits in (
        ("negative_bound", "bits_per_dim"),
        ("distortion", "distortion_bits_per_dim"),
        ("rate", "rate_bits_per_dim"),
    ):
        mean, error = totals.mean(name), totals.standard_error(name)  # type: ignore[arg-type]
        numbers |= {f"{name}_nats": mean, f"{name}_nats_standard_error": error}
        numbers |= {
            in_bits: bits_per_dim(mean, dims) + (0.0 if name == "rate" else added or 0.0),
            f"{in_bits}_standard_error": bits_per_dim(error, dims),
        }
    return numbers


def summary(run: Overview, epoch_images: int | None) -> dict[str, Any]:
    """What `vaejob runs --json` says of a run."""
    last = run.last_report_at
    return {
        "run": run.address,
        "name": run.job.run.name,
        "finished": run.finished,
        "images_seen": run.images_seen,
        "images": run.job.training.images,
        "epochs": run.images_seen / epoch_images if epoch_images else None,
        "checkpoints": [record.images_seen for record in run.records],
        "best": _checkpoint(run, run.best) if run.best else None,
        "last_report_at": last.isoformat() if last else None,
        "last_report_age_seconds": age_seconds(last) if last else None,
        "attempts": len(run.attempts),
    }


def everything(run: Overview, epoch_images: int | None) -> dict[str, Any]:
    """What `vaejob show --json` says."""
    return {
        **summary(run, epoch_images),
        "settings": run.job.model_dump(),
        "checkpoints": [_checkpoint(run, record) for record in run.records],
        "train": _speed_and_numbers(run, "train"),
        "held_out": _speed_and_numbers(run, "test"),
        "fingerprints": {name: fingerprint for name, _, fingerprint in data_sets(run)},
        "profile": run.profile,
        "attempts": run.attempts,
        "problems": run.problems,
    }


def _checkpoint(run: Overview, record: Record) -> dict[str, Any]:
    totals, identity = held_out_totals(record), held_out_identity(run, record)
    return {
        "images_seen": record.images_seen,
        "written_at": record.written_at,
        "world_size": record.world_size,
        "files": len(record.files),
        "bytes": sum(file.size for file in record.files),
        "samples": run.job.training.evaluate_samples if totals else None,
        "held_out": identity.to_dict() | likelihood_numbers(totals, run.job.likelihood)
        if totals and identity
        else None,
    }


def _speed_and_numbers(run: Overview, split: str) -> dict[str, Any] | None:
    row, identity = run.newest_row(split), newest_identity(run, split)
    if row is None or identity is None:
        return None
    numbers = {"images_seen": row["images_seen"], "written_at": row["written_at"], "world_size": row["world_size"]}
    numbers |= identity.to_dict() | likelihood_numbers(LikelihoodTotals.from_dict(row), run.job.likelihood)
    if row["seconds"]:
        numbers["images_per_second"] = row["images"] / row["seconds"]
        numbers["data_wait_share"] = row["data_wait_seconds"] / row["seconds"]
        numbers |= {"missing_images": row["missing_images"], "retries": json.loads(row["retry_causes"] or "{}")}
        numbers |= {name: row.get(name) for name in ("steps", "skipped_steps", "non_finite_steps", "halvings")}
        taken = (row.get("steps") or 0) - (row.get("skipped_steps") or 0)
        numbers["gradient_norm"] = row["gradient_norms"] / taken if taken else None
    return numbers


def data_sets(run: Overview) -> list[tuple[str, str, str | None]]:
    """Split, address and fingerprint of the run's data sets; the fingerprints are known once a checkpoint is."""
    train, test = run.job.data.train, run.job.data.test
    data = [("train", train, run.newest.train_fingerprint if run.newest else None)]
    return [*data, ("test", test, run.newest.test_fingerprint if run.newest else None)] if test else data


def held_out_totals(record: Record) -> LikelihoodTotals | None:
    return LikelihoodTotals.from_dict(record.held_out) if record.held_out else None


def age_seconds(then: datetime) -> float:
    return max((datetime.now(UTC) - then).total_seconds(), 0.0)


def _last_report(run: Bucket) -> list[Row]:
    """The newest file of reports, by what it says of its start and its place; names go by clocks, but for those of one attempt."""
    newest = {key.rpartition("-")[0]: key for key in row_keys(run)}
    best: tuple[tuple[int, int], list[Row]] = ((-1, -1), [])
    for place, rows in read_row_files(run, list(newest.values())):
        if place >= best[0]:  # those of one place keep the order of their names, as in read_rows
            best = (place, rows)
    return best[1]
