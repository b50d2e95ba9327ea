"""The verb that tells two runs apart: diff."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaejob.cli.terminal import say, say_json, warn
from vaejob.cli.verb import require_run

if TYPE_CHECKING:
    from vaejob.cli.overview import Overview

UNPAIRED = "unpaired: the two errors are taken as independent, though images that both scored may have made them alike"


def diff(
    first: Annotated[str, typer.Argument(metavar="RUN", help="The first run's address: BUCKET/NAME.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The second run's address.")],
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON value.")] = False,
) -> None:
    """What differs between two runs: settings, data, versions, and the held-out bound where the two compare.

    \b
    Example:
      vaejob diff s3://models/mnist-iwae-1 s3://models/mnist-iwae-2
    """
    require_run(first, second)
    from vaejob.cli.overview import look_at
    from vaejob.storage import absolute

    runs = [look_at(absolute(address), whole_history=False) for address in (first, second)]
    for run in runs:
        for line in run.problems:
            warn(line)
    found = differences(*runs)
    if as_json:
        say_json(found)
    else:
        _say(found)


def differences(first: "Overview", second: "Overview") -> dict[str, Any]:
    """Each list holds only what differs; result.difference is second minus first, so negative where the second is better."""
    from vaejob.cli.overview import data_sets

    fingerprints = [{name: fingerprint for name, _, fingerprint in data_sets(run)} for run in (first, second)]
    versions = [run.newest.versions if run.newest else {} for run in (first, second)]
    return {
        "runs": [first.address, second.address],
        "images_seen": [first.images_seen, second.images_seen],
        "finished": [first.finished, second.finished],
        "settings": _settings(first, second),
        "data_fingerprints": _unequal("split", *fingerprints),
        "versions": _unequal("of", *versions),
        "result": _result(first, second),
    }


def _unequal(what: str, first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys([*first, *second]))
    return [
        {what: name, "first": first.get(name), "second": second.get(name)}
        for name in names
        if first.get(name) != second.get(name)
    ]


def _settings(first: "Overview", second: "Overview") -> list[dict[str, Any]]:
    """But for name and bucket. A setting that belongs to another choice, such as another family, is not in use."""
    from vaejob.cli.overview import settings_in_use
    from vaejob.config import JobConfig, changed_results

    decisive = {line.partition(": ")[0] for line in changed_results(first.job, second.job)}
    found = []
    for section in JobConfig.model_fields:
        used = [settings_in_use(getattr(run.job, section)) for run in (first, second)]
        fields = type(getattr(first.job, section)).model_fields
        for name in fields:
            in_use = [name in settings for settings in used]
            values = [settings.get(name) for settings in used]
            setting = f"{section}.{name}"
            if (in_use[0] == in_use[1] and values[0] == values[1]) or setting in ("run.name", "run.bucket"):
                continue
            default = None if fields[name].is_required() else fields[name].get_default(call_default_factory=True)
            found.append(
                {
                    "setting": setting,
                    "first": values[0],
                    "second": values[1],
                    "in_use": in_use,
                    "default": default,
                    "decides_the_result": setting in decisive,
                }
            )
    return found


def _result(first: "Overview", second: "Overview") -> dict[str, Any]:
    """The best held-out bound of each; their difference, or why there is none."""
    from vaejob.cli.overview import held_out_identity, held_out_totals, likelihood_numbers

    numbers: list[dict[str, Any]] = []
    identities = []
    for run in (first, second):
        best = run.best
        totals, identity = (held_out_totals(best), held_out_identity(run, best)) if best else (None, None)
        if best is None or totals is None or identity is None:
            return {"difference": None, "why_not": [f"{run.address} has no checkpoint with a held-out bound"]}
        identities.append(identity)
        numbers.append(
            {"checkpoint": best.images_seen, "of": str(identity)} | likelihood_numbers(totals, run.job.likelihood)
        )
    held_out = {"first": numbers[0], "second": numbers[1]}
    reasons = identities[0].why_not_comparable(identities[1])
    reasons += [f"{run.address}: the bound of {n['non_finite']:,} images is not finite" for run, n in zip((first, second), numbers, strict=True) if n["non_finite"]]  # fmt: skip
    if reasons:
        return held_out | {"difference": None, "why_not": reasons}
    difference: dict[str, Any] = {"unpaired": True}
    for name in ("bits_per_dim", "negative_bound_nats"):
        a, b = numbers
        difference[name] = b[name] - a[name]
        difference[f"{name}_standard_error"] = math.hypot(a[f"{name}_standard_error"], b[f"{name}_standard_error"])
    return held_out | {"difference": difference, "why_not": []}


def _say(found: dict[str, Any]) -> None:
    for name, address, seen, finished in zip(("first", "second"), found["runs"], found["images_seen"], found["finished"], strict=True):  # fmt: skip
        say(f"{name:<8}{address}\n        {'finished' if finished else 'unfinished'}, {seen:,} images")
    settings = found["settings"]
    for title, decides in (("settings that decide the result", True), ("other settings", False)):
        rows = [
            (one["setting"], *(_value(one, name, i) for i, name in enumerate(("first", "second"))))
            for one in settings
            if one["decides_the_result"] == decides
        ]
        _say_rows(title, rows)
    _say_rows("data", [(one["split"], *(_short(one[name]) for name in ("first", "second"))) for one in found["data_fingerprints"]])  # fmt: skip
    _say_rows("versions", [(one["of"], one["first"] or "unknown", one["second"] or "unknown") for one in found["versions"]])  # fmt: skip
    _say_result(found["result"])


def _value(setting: dict[str, Any], name: str, index: int) -> str:
    if not setting["in_use"][index]:
        return "not in use"
    value = setting[name]
    return f"{value}{' (default)' if value == setting['default'] and value is not None else ''}"


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "unknown"


def _say_rows(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Side by side where 80 columns have room, else one below the other."""
    say(f"\n{title}: {'no difference' if not rows else ''}".rstrip())
    width = max((len(name) for name, _, _ in rows), default=0)
    column = max((len(first) for _, first, _ in rows), default=0)
    fits = all(4 + width + 2 + column + 2 + len(second) <= 80 for _, _, second in rows)
    for name, first, second in rows:
        if fits:
            say(f"  {name:<{width}}  {first:<{column}}  {second}")
        else:
            say(f"  {name}\n    first   {first}\n    second  {second}")


def _say_result(result: dict[str, Any]) -> None:
    say("\nbest held-out bound (lower is better):")
    for name in ("first", "second"):
        if name in result:
            numbers = result[name]
            say(f"  {name:<8}{numbers['of']}")
            if not numbers["non_finite"]:
                say(f"  {'':<8}{_bound(numbers)}, at {numbers['checkpoint']:,} images seen")
    if result["difference"] is None:
        say("  not comparable: " + "; ".join(result["why_not"]))
    else:
        say(f"  second minus first: {_bound(result['difference'], sign='+')}\n  ({UNPAIRED})")


def _bound(numbers: dict[str, Any], *, sign: str = "") -> str:
    return ", ".join(
        f"{numbers[name]:{sign}.{digits}f} ± {numbers[f'{name}_standard_error']:.{digits}f} {unit}"
        for name, digits, unit in (("bits_per_dim", 5, "bits/dim"), ("negative_bound_nats", 4, "nats"))
    )
