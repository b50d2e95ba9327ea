"""How a job's progress and its numbers look in a terminal."""

import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaejob.config import JobConfig, LikelihoodConfig
    from vaejob.metrics import LikelihoodTotals
    from vaejob.training.worker import Event


def say(text: str = "") -> None:
    print(text, flush=True)


def warn(text: str) -> None:
    print(f"vaejob: {text}", file=sys.stderr, flush=True)


def say_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def density_bits(likelihood: "LikelihoodConfig | None") -> float | None:
    """What a density's bits/dim lack to those of levels, were it times bin width a mass; None for probabilities."""
    if likelihood is None or likelihood.pixels not in ("gaussian", "continuous-bernoulli"):
        return None
    return math.log2(2**likelihood.bits - 1)


def bits_and_nats(totals: "LikelihoodTotals", likelihood: "LikelihoodConfig") -> str:
    """Negative bound per dimension and per image, each with its standard error; or why there is none."""
    if totals.non_finite:
        return f"not finite for {totals.non_finite:,} of {totals.images:,} images"
    added = density_bits(likelihood)
    return (
        f"{totals.bits_per_dim + (added or 0.0):.5f} ± {totals.bits_per_dim_standard_error:.5f} bits/dim"
        f"{'' if added is None else f' (density + {added:.4f})'}, "
        f"{totals.mean('negative_bound'):.4f} ± {totals.standard_error('negative_bound'):.4f} nats"
        f"{'' if added is None else ' (density)'}"
    )


def what_it_is_of(job: "JobConfig", totals: "LikelihoodTotals", *, samples: int, data: str, fingerprint: str) -> str:
    """The words that make a likelihood comparable, or not."""
    bound = "-ELBO" if samples == 1 else f"-IWAE bound of {samples} samples"
    pixels = f"{job.likelihood.pixels} pixels, {job.likelihood.bits} bits"
    if job.likelihood.pixels == "bernoulli":
        pixels = f"bernoulli pixels, {job.likelihood.binarize} binarisation"
    return f"{bound} of {totals.images:,} images, {pixels}, data {data} ({fingerprint[:12]})"


class Progress:
    """Tells the events of a job, one line each."""

    def __init__(self, job: "JobConfig", *, quiet: bool) -> None:
        self._job, self._quiet = job, quiet
        self._began = time.monotonic()
        self._attempt = ""

    def __call__(self, event: "Event") -> None:
        match event.kind:
            case "note":
                warn(event.body["text"])
            case "status" if not self._quiet:
                say(event.body["text"])
            case "row" if not self._quiet:
                self._tell_attempt(event.body)
                say(self._row(event.body))
            case "record" if not self._quiet:
                say(f"{self._at(event.body['images_seen'])}  checkpoint committed")

    def _tell_attempt(self, row: dict[str, Any]) -> None:
        started_at = row["attempt_started_at_images"]
        if row["attempt"] != self._attempt and started_at:
            say(f"continuing from the checkpoint at {started_at:,} images")
        self._attempt = row["attempt"]

    def _row(self, row: dict[str, Any]) -> str:
        from vaejob.metrics import LikelihoodTotals

        totals = LikelihoodTotals.from_dict(row)
        at = self._at(row["images_seen"])
        if row["split"] == "test":
            return f"{at}  held out {bits_and_nats(totals, self._job.likelihood)}, {totals.images:,} images"
        rate = totals.images / row["seconds"]
        added = density_bits(self._job.likelihood)
        nats, in_bits = (
            ("nats", "bits/dim") if added is None else ("nats (density)", f"bits/dim (density + {added:.4f})")
        )
        left = (self._job.training.images - row["images_seen"]) / rate
        return (
            f"{at}  train {totals.mean('negative_bound'):.2f} {nats}, {totals.bits_per_dim + (added or 0.0):.4f} {in_bits}, "
            f"{rate:,.0f} images/s, {_duration(left)} left"
        )

    def _at(self, images_seen: int) -> str:
        total = f"{self._job.training.images:,}"
        return f"{_duration(time.monotonic() - self._began):>7}  {images_seen:>{len(total)},} of {total} images"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
