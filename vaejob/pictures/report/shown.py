"""What a trained model shows of itself, on the page."""

from collections.abc import Sequence

import numpy as np

from vaejob.pictures.report.chart import Chart, Series, figure
from vaejob.pictures.report.findings import Findings, Neighbours, Scores, anomaly_auc
from vaejob.pictures.report.markup import Html, joined, picture, table, tag
from vaejob.pictures.report.reported import ReportedRun

BINS = 40


def shown_findings(found: Findings, run: ReportedRun, *, key: str, heading: str) -> Html:
    """Pictures, neighbours, layers of codes and likelihoods at one checkpoint."""
    left = [tag(heading, "Samples"), tag("p", "Mean pictures decoded from codes of the prior, seed 0.", class_="note")]
    left.append(_tiles("tiles", found.samples, f"{len(found.samples)} samples"))
    right = [tag(heading, "Reconstructions"), *_pairs(found)]
    below = [tag(heading, "Interpolations"), *_paths(found)]
    parts = [
        tag("p", f"At the checkpoint of {found.checkpoint:,} images.", class_="soft"),
        tag("div", tag("div", *left), tag("div", *right), class_="columns"),
        tag("div", tag("div", *below), tag("div", tag(heading, "Nearest training images"), *_nearest(found.neighbours)), class_="columns"),
        tag(heading, "Layers of codes"),
        _layers(found, key=key),
        tag(heading, "Likelihood of single images"),
        _likelihoods(found, run, key=key),
    ]  # fmt: skip
    return joined(parts)


def _tiles(class_: str, images: Sequence[bytes], alt: str) -> Html:
    return tag("div", *(picture(image) for image in images), class_=class_, role="img", aria_label=alt)


def _pairs(found: Findings) -> list[Html]:
    if isinstance(found.pairs, str):
        return [tag("p", f"None: {found.pairs}.")]
    note = f"{found.pairs_from} images as the model sees them, each beside what a code drawn for it decodes to.".capitalize()
    pairs = [tag("div", picture(image), picture(rebuilt), class_="pair") for image, rebuilt in found.pairs]
    alt = f"{len(pairs)} {found.pairs_from} images beside their reconstructions"
    return [tag("p", note, class_="note"), tag("div", *pairs, class_="pairs", role="img", aria_label=alt)]


def _paths(found: Findings) -> list[Html]:
    if isinstance(found.paths, str):
        return [tag("p", f"None: {found.paths}.")]
    note = f"Straight lines between the codes of two {found.pairs_from} images, which stand framed at the ends."
    rows = [_tiles("path", row, f"{len(row) - 2} pictures between two images") for row in found.paths]
    return [tag("p", note, class_="note"), *rows]


def _nearest(found: Neighbours | str) -> list[Html]:
    if isinstance(found, str):
        return [tag("p", f"None: {found}.")]
    of = "all" if found.searched == found.of else f"{found.searched:,} of the"
    note = (
        f"Those of {len(found.distances[0].nearest)} samples that come nearest to one of {of} {found.of:,} training images, each beside it, "
        "with the root mean square of their difference in grey levels of 255."
    )
    pairs = [
        tag("div", picture(image), picture(near), tag("span", f"{distance:.1f}"), class_="pair")
        for image, near, distance in found.pairs
    ]
    rows = [
        [one.kind, f"{len(one.nearest):,}", *(f"{value:.1f}" for value in np.quantile(one.nearest, (0, 0.5, 1)))]
        for one in found.distances
    ]
    headers = ("from", ">images", ">nearest", ">median", ">farthest")
    said = [
        tag("p", note, class_="note"),
        tag("div", *pairs, class_="pairs", role="img", aria_label=f"{len(pairs)} samples beside the training images nearest to them"),
        table("Distance to the nearest training image", headers, rows),
    ]  # fmt: skip
    if len(found.distances) > 1:
        said.append(tag("p", _yardstick(found), class_="note"))
    return said


def _yardstick(found: Neighbours) -> str:
    """What held-out images, which cannot have been learnt by heart, say of the samples."""
    samples, yardstick = found.distances[0], found.distances[-1]
    closer = int((samples.nearest < yardstick.nearest.min()).sum())
    return (
        f"{closer} of {len(samples.nearest)} samples are nearer to a training image than any of the {yardstick.kind}. "
        "A model that learns images by heart makes samples far nearer than that yardstick; mean pictures are smooth, "
        "and so nearer than sharp images, which is why reconstructions are the fairer one."
    )


def _layers(found: Findings, *, key: str) -> Html:
    """KL and active units of each layer, at each checkpoint that is kept."""
    if isinstance(found.layers, str):
        return tag("p", f"None: {found.layers}.")
    if not found.layers:
        return tag("p", "No checkpoint could be measured.")
    seen = [float(images) for images, _ in found.layers]
    newest = found.layers[-1][1]
    names = [f"layer {number}" if len(newest.units) > 1 else "codes" for number in range(1, len(newest.units) + 1)]
    kl = [
        Series(name=name, x=seen, y=[totals.rates[i] for _, totals in found.layers], color=i)
        for i, name in enumerate(names)
    ]
    active = [
        Series(name=f"{name} (of {newest.units[i]:,})", x=seen, y=[float(totals.active_units[i]) for _, totals in found.layers], color=i)
        for i, name in enumerate(names)
    ]  # fmt: skip
    of = f"{found.layer_images:,} {found.pairs_from} images, at each checkpoint that is kept; the top layer first."
    charts = [
        Chart(title="KL of each layer", unit="nats per image", series=kl, form="points", note=f"Over {of}", from_zero=True),
        Chart(title="Active units", unit="Var(E[u | x]) > 0.01", series=active, form="points", note=f"Over {of}", from_zero=True, digits=1),
    ]  # fmt: skip
    warnings = [tag("p", f"{line}.".capitalize(), class_="warn") for line in newest.collapsed()]
    figures = [figure(chart, key=f"{key}-layers-{number}") for number, chart in enumerate(charts)]
    return joined([*warnings, tag("div", *figures, class_="charts")])


def _likelihoods(found: Findings, run: ReportedRun, *, key: str) -> Html:
    missing = [tag("p", f"Not scored, {line}.") for line in found.no_scores]
    finite = [score for score in found.scores if np.isfinite(score.bits).any()]
    if not finite:
        return joined(missing or [tag("p", "No image has a finite bound.")])
    unit = "\u2212ELBO in bits/dim, one code for each image"
    if run.density_bits is not None:
        unit += f" (density + {run.density_bits:.4f})"
    rows = [_row(score, found.scores) for score in found.scores]
    headers = ("images", ">scored", ">mean", ">\u00b1 s.e.", ">median", ">AUC against held out", "data")
    chart = histogram(finite, unit=unit)
    words = []
    if len(found.scores) > 1:
        words.append(
            "AUC: how often an image of that set has more bits/dim than a held-out one, 50% where they cannot be told apart. "
            "A high likelihood does not mean that an image is like the training images: smooth or dark images of another kind often have "
            "a higher one. Do not take it for a detector of anomalies before it was tried on yours."
        )
    table_ = table("Likelihood of single images", headers, rows)
    words_ = [tag("p", line, class_="note") for line in words]
    return joined(
        [*missing, tag("div", figure(chart, key=f"{key}-single"), tag("div", *words_), class_="columns"), table_]
    )


def _row(score: Scores, scores: Sequence[Scores]) -> list[str]:
    bits = score.bits[np.isfinite(score.bits)]
    held_out = next((one for one in scores if one.kind == "held out"), None)
    auc = f"{anomaly_auc(held_out.bits, score.bits):.1%}" if held_out and score is not held_out else ""
    if len(bits) < len(score.bits):
        return [
            score.kind,
            f"{len(score.bits):,} of {score.of:,}",
            f"not finite for {len(score.bits) - len(bits):,}",
            "",
            "",
            auc,
            score.data,
        ]
    error = float(bits.std()) / len(bits) ** 0.5
    return [
        score.kind,
        f"{len(bits):,} of {score.of:,}",
        f"{bits.mean():.5f}",
        f"{error:.5f}",
        f"{np.median(bits):.5f}",
        auc,
        score.data,
    ]


def histogram(scores: Sequence[Scores], *, unit: str) -> Chart:
    """Shares of each set in equal bins; what lies beyond them is in the outermost ones."""
    values = [score.bits[np.isfinite(score.bits)] for score in scores]
    usual = [one for score, one in zip(scores, values, strict=True) if score.kind != "other"] or values
    low, high = (pick(float(np.quantile(one, share)) for one in usual) for pick, share in ((min, 0.005), (max, 0.995)))
    span = (high - low) or 1.0
    # Images of another kind may lie far off: they widen the axis, but not so that nothing else can be seen.
    low = max(min(low, *(float(np.quantile(one, 0.005)) for one in values)), low - 2 * span)
    high = min(max(high, *(float(np.quantile(one, 0.995)) for one in values)), high + 2 * span)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    middles = [float(f"{middle:.6g}") for middle in (edges[:-1] + edges[1:]) / 2]
    series = [
        Series(
            name=score.kind,
            x=middles,
            y=list(100 * np.histogram(one.clip(low, high), edges)[0] / len(one)),
            color=number,
        )
        for number, (score, one) in enumerate(zip(scores, values, strict=True))
    ]
    note = "The outermost bins hold what lies beyond them."
    return Chart(title="Histogram", unit="% of the images of each set", series=series, x_title=unit, form="steps", from_zero=True, note=note)  # fmt: skip
