"""The page: one run in full, or several side by side, each likelihood with what it is of."""

from collections.abc import Iterable, Sequence
from importlib import resources

from vaejob.pictures.report.chart import Chart, figure
from vaejob.pictures.report.curves import charts_of_one, charts_of_several
from vaejob.pictures.report.markup import Html, facts, folded, joined, table, tag
from vaejob.pictures.report.reported import Bound, ReportedRun
from vaejob.pictures.report.shown import shown_findings
from vaejob.pictures.report.timeline import ATTEMPT_HEADERS, attempt_rows, attempts, cost, duration, progress_chart

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The page loads nothing and runs nothing."""


def page(runs: Sequence[ReportedRun]) -> str:
    """HTML of one run, or of several with a comparison before them."""
    if len(runs) == 1:
        (run,) = runs
        title = f"{run.name}: report"
        head = tag("header", tag("h1", run.name), tag("p", run.address, class_="address"))
        body = joined([*_said(run), *_rest(run, key="run", level=2)])
    else:
        title = f"{len(runs)} runs: report"
        head = tag(
            "header", tag("h1", f"{len(runs)} runs"), tag("p", ", ".join(run.name for run in runs), class_="address")
        )
        body = joined([_comparison(runs), *(_in_full(run, number) for number, run in enumerate(runs, start=1))])
    meta = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Html(resources.files("vaejob.pictures.report").joinpath("page.css").read_text())),
    ]
    foot = tag(
        "footer",
        "Written by ",
        tag("code", "vaejob report"),
        ". Nats and bits/dim are of the negative bound: lower is better.",
    )
    document = tag("html", tag("head", *meta), tag("body", head, tag("main", body), foot), lang="en")
    return f"<!doctype html>\n{document}\n"


def _in_full(run: ReportedRun, number: int) -> Html:
    head = [tag("h2", run.name), tag("p", run.address, class_="address")]
    said, rest = _said(run), _rest(run, key=f"run{number}", level=3)
    return joined([*head, *said, folded(f"Curves, pictures, cost, data and configuration of {run.name}", *rest)])


def _said(run: ReportedRun) -> list[Html]:
    return [_state(run), *(tag("p", problem, class_="warn") for problem in run.problems), _headline(run)]


def _rest(run: ReportedRun, *, key: str, level: int) -> list[Html]:
    heading = f"h{level}"
    charts = charts_of_one(run)
    nothing = tag("p", "Nothing was reported yet, so there are no curves.")
    shown = tag("p", run.no_findings)
    if run.findings:
        shown = shown_findings(run.findings, run, key=key, heading=f"h{level + 1}")
    return [
        tag(heading, "Curves"),
        _charts(charts, key=key) if charts else nothing,
        tag(heading, "Model"),
        shown,
        tag(heading, "Attempts and cost"),
        _attempts(run, key=key),
        tag(heading, "Data"),
        *_data(run),
        tag(heading, "Configuration and environment"),
        _environment(run),
    ]


def _state(run: ReportedRun) -> Html:
    state = "finished" if run.finished else "unfinished"
    return tag("p", f"{state}, {run.images_seen:,} of {run.job.training.images:,} images seen")


def _headline(run: ReportedRun) -> Html:
    """The number that matters, and all that it is of."""
    if run.held_out is None:
        why = (
            "This run has no held-out images (data.test)."
            if run.job.data.test is None
            else "No held-out images were scored yet."
        )
        parts = [tag("p", tag("strong", f"{why} There is no number to compare it by."))]
        if run.trained:
            parts += [
                tag("p", f"On the images it was trained on, in its newest report ({run.trained.name}):"),
                _big(run, run.trained),
                facts(run.trained.of),
            ]
        return joined(parts)
    comparable = (
        "It compares with bounds of the same kind and K, over the same images at the same levels, whatever the model. It does not "
        "compare with another K, other images or fewer of them, another binarisation or number of bits, nor a mass with a density."
    )
    parts = [_big(run, run.held_out), tag("p", comparable, class_="soft"), facts(run.held_out.of)]
    if run.newest:
        parts.append(
            tag(
                "p",
                f"The newest checkpoint, at {run.newest.images_seen:,} images: {_minus(', '.join(numbers(run, run.newest)))}.",
            )
        )
    return joined(parts)


def _big(run: ReportedRun, bound: Bound) -> Html:
    if bound.totals.non_finite:
        return tag(
            "p",
            f"{bound.name} is not finite for {bound.totals.non_finite:,} of {bound.totals.images:,} images.",
            class_="warn",
        )
    kind = (
        "given each image's own code: no bound on log p(x)"
        if bound.name.startswith("-log p")
        else "negative bound on log p(x)"
    )
    boxes = []
    for number in numbers(run, bound):
        value, _, rest = number.partition(" \u00b1 ")
        boxes.append(tag("div", tag("b", _minus(value), tag("small", f" \u00b1 {rest}"))))
    return joined(
        [
            tag("div", *boxes, class_="headline"),
            tag("p", tag("strong", _minus(bound.name)), f", {kind}; \u00b1 standard error over images"),
        ]
    )


def numbers(run: ReportedRun, bound: Bound) -> list[str]:
    """Nats per image and bits per dimension, each with its standard error; or why there are none."""
    totals, added = bound.totals, run.density_bits
    if totals.non_finite:
        return [f"not finite for {totals.non_finite:,} of {totals.images:,} images"]
    density, corrected = ("", "") if added is None else (" (density)", f" (density + {added:.4f})")
    return [
        f"{totals.mean('negative_bound'):.4f} \u00b1 {totals.standard_error('negative_bound'):.4f} nats{density}",
        f"{totals.bits_per_dim + (added or 0.0):.5f} \u00b1 {totals.bits_per_dim_standard_error:.5f} bits/dim{corrected}",
    ]


def _comparison(runs: Sequence[ReportedRun]) -> Html:
    """One table, then the curves of those that compare, over one another."""
    rows = []
    for run in runs:
        said = numbers(run, run.held_out) if run.held_out else ["no held-out bound"]
        at = f"{run.held_out.images_seen:,}" if run.held_out else ""
        state = "finished" if run.finished else "unfinished"
        rows.append([run.name, run.group, *[*map(_minus, said), ""][:2], at, f"{run.images_seen:,}", state])
    groups = sorted({run.group for run in runs if run.group}, key=lambda group: (len(group), group))
    parts = [tag("h2", "Comparison")]
    if len(groups) > 1:
        parts.append(tag("p", "These bounds are not all comparable: only those of one letter are.", class_="warn"))
    headers = ("run", "of", ">held-out negative bound", ">per dimension", ">checkpoint", ">images seen", "state")
    parts.append(table("Held-out bounds of all runs", headers, rows))
    for group in groups:
        parts.append(
            tag(
                "p", tag("strong", group), "\u2002", _minus(next(run.group_words for run in runs if run.group == group))
            )
        )
    if any(not run.group for run in runs):
        parts.append(tag("p", "Runs without a letter have no held-out bound; nothing of them compares."))
    for group in groups:
        members = [run for run in runs if run.group == group]
        if len(members) > 1:
            parts += [tag("h3", f"Curves of group {group}"), _charts(charts_of_several(members), key=f"group-{group}")]
        else:
            parts.append(tag("p", f"Of group {group} there is {members[0].name} alone; its curves stand below."))
    parts += [tag("h3", "Settings that differ"), _differences(runs)]
    return joined(parts)


def _differences(runs: Sequence[ReportedRun]) -> Html:
    settings = [
        {f"{section}.{key}": str(value) for section, values in run.job.model_dump().items() for key, value in values.items()}
        for run in runs
    ]  # fmt: skip
    differing = [key for key in settings[0] if len({one[key] for one in settings}) > 1 and key != "run.name"]
    if not differing:
        return tag("p", "None: the runs have one configuration.")
    return table(
        "Settings that differ",
        ["setting", *(run.name for run in runs)],
        [[key, *(one[key] for one in settings)] for key in differing],
    )


def _attempts(run: ReportedRun, *, key: str) -> Html:
    found = attempts(run)
    started = f"Started {len(run.starts)} time{'s' if len(run.starts) != 1 else ''}"
    chart = progress_chart(found)
    if chart is None:
        return tag("p", f"{started}; nothing was reported yet.")
    spent = cost(run)
    share = f" ({spent.waited_seconds / spent.seconds:.1%} waiting for images)" if spent.seconds else ""
    pairs = [
        ("time of training", f"{duration(spent.seconds)}{share}"),
        ("of all workers", f"{duration(spent.worker_seconds)}, added up"),
        ("images trained on", f"{spent.images:,}, of which {spent.lost_images:,} had to be done again"),
        ("throughput", f"{spent.images / spent.seconds:,.0f} images/s, {spent.images / spent.worker_seconds:,.0f} for each worker" if spent.seconds else "unknown"),
        ("starts", f"{started}, {len(found)} attempt{'s' if len(found) != 1 else ''} with a report"),
    ]  # fmt: skip
    words = "Time in which workers trained; held-out passes, start and waiting for machines are not in it."
    left = tag("div", facts(pairs), tag("p", words, class_="note"))
    return joined(
        [
            tag("div", left, figure(chart, key=f"{key}-clock"), class_="columns"),
            table("Attempts", ATTEMPT_HEADERS, attempt_rows(found)),
        ]
    )


def _data(run: ReportedRun) -> Iterable[Html]:
    return [
        tag("div", *(tag("div", tag("strong", card.split), facts(card.facts)) for card in run.data), class_="columns")
    ]


def _environment(run: ReportedRun) -> Html:
    parts = [folded("Configuration (YAML)", tag("pre", run.job.to_yaml(), tabindex="0"))]
    if run.record is None:
        return joined([*parts, tag("p", "No checkpoint exists, and versions are written with one.", class_="note")])
    written = f"{run.record.images_seen:,} images, written {run.record.written_at} by {run.record.world_size} worker{'s' if run.record.world_size > 1 else ''}"
    pairs = [("checkpoint", written), ("configuration", run.record.job_fingerprint[:12]), *run.record.versions.items()]
    return joined([*parts, facts(pairs)])


def _charts(charts: Sequence[Chart], *, key: str) -> Html:
    return tag("div", *(figure(chart, key=f"{key}-{number}") for number, chart in enumerate(charts)), class_="charts")


def _minus(text: str) -> str:
    """With a true minus sign in front, as it is set in a book."""
    return text.replace("-", "\u2212", 1) if text.startswith("-") else text
