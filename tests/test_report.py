"""The page says what the run's own rows and records say, holds no markup of a bucket, and opens in a real browser."""

import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from typer.testing import CliRunner, Result

import vaejob
from tests.browser import opened
from vaejob.cli import report as verb
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import VaejobError
from vaejob.metrics import LikelihoodTotals
from vaejob.pictures.report.chart import ticks
from vaejob.pictures.report.curves import MOST_POINTS, charts_of_one, thinned
from vaejob.pictures.report.findings import anomaly_auc, nearest, spread_ids
from vaejob.pictures.report.markup import tag
from vaejob.pictures.report.page import page
from vaejob.pictures.report.reported import Bound, ReportedRun
from vaejob.pictures.report.timeline import attempts, cost
from vaejob.storage import open_bucket
from vaejob.storage.runs import choose_record, read_rows, write_rows

app = typer.Typer()
app.command()(verb.report)

RUNS = {
    "plain": [],
    "wider": ["model.hidden=[24]"],
    "k3": ["training.evaluate_samples=3"],
    "no-test": ["data.test=null"],
    "table": ["model.family=decoder-only", "objective.pairing=latent-table"],
    "ladder": ["model.family=hierarchical", "model.layers=4x1,8x1", "model.width=4", "model.latent_channels=1"],
}


def result_of(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def written(*arguments: str | Path, out: Path) -> str:
    result = result_of(*map(str, arguments), "--out", str(out), "--quiet")
    assert result.exception is None, result.exception
    assert result.stdout == f"{out}\n"
    return out.read_text()


def error_of(*arguments: str | Path) -> str:
    result = result_of(*map(str, arguments))
    assert isinstance(result.exception, VaejobError), result.exception or result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run of each of RUNS."""
    folder = tmp_path_factory.mktemp("home")
    images = (load_digits().images * (255 / 16)).round().astype("uint8")[:, None]
    pack(ArraySource("digits", images[:500]), str(folder / "digits"), split="train=0.7,test=0.3")
    pack(ArraySource("black", np.zeros((40, 1, 8, 8), dtype=np.uint8)), str(folder / "black"), split="test")
    pack(ArraySource("large", np.zeros((9, 3, 9, 9), dtype=np.uint8)), str(folder / "large"), split="test")
    for name, own in RUNS.items():
        settings = [
            f"run.bucket={folder}/runs", f"run.name={name}", f"data.train={folder}/digits/train", f"data.test={folder}/digits/test",
            "model.hidden=[16]", "model.latent=4", "training.images=2000", "training.report_every_images=250",
            "training.evaluate_every_images=500", "checkpoint.every_images=500", "cluster.workers=0",
        ]  # fmt: skip
        vaejob.train(vaejob.load_config("quickstart", *settings, *own))
    return folder


@pytest.fixture(scope="module")
def plain(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run, with images of another kind."""
    out = tmp_path_factory.mktemp("pages") / "plain.html"
    written(home / "runs" / "plain", "--other", f"{home}/black/test", out=out)
    return out


@pytest.fixture(scope="module")
def several(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pages") / "several.html"
    written(*(home / "runs" / name for name in RUNS), out=out)
    return out


class Tables(HTMLParser):
    """Rows of text of each table, by its caption, read by another parser than any browser's."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.text: list[str] = []
        self._rows: list[list[str]] = []
        self._caption, self._inside = "", ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.tables.setdefault(self._caption, self._rows)
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._inside == "caption":
            self._caption += data
        if self._inside in ("td", "th"):
            self._rows[-1][-1] += data


def tables_of(html: str) -> dict[str, list[list[str]]]:
    parser = Tables()
    parser.feed(html)
    return parser.tables


def test_every_point_of_the_curves_is_what_the_rows_say(plain: Path, home: Path) -> None:
    rows = read_rows(open_bucket(f"{home}/runs/plain"))
    header, *points = tables_of(plain.read_text())["Negative bound, nats per image"]
    assert header == ["images seen", "train", "held out", "\u00b1 s.e."]
    found = {int(point[0].replace(",", "")): point[1:] for point in points}
    assert set(found) == {row["images_seen"] for row in rows}
    for row in rows:
        mean = row["negative_bound_nats"] / row["images"]
        squares = row["negative_bound_squares"] + row["negative_bound_squares_rest"]
        error = math.sqrt((squares / row["images"] - mean**2) / row["images"])
        train, held_out, said_error = found[row["images_seen"]]
        if row["split"] == "train":
            assert float(train) == pytest.approx(mean, rel=1e-3)
        else:
            assert float(held_out) == pytest.approx(mean, rel=1e-3)
            assert float(said_error) == pytest.approx(error, rel=1e-3)


def test_the_number_at_the_top_is_the_best_record_s_with_all_that_it_is_of(plain: Path, home: Path) -> None:
    record = choose_record(open_bucket(f"{home}/runs/plain"), "best")
    assert record.held_out is not None
    nats = record.held_out["negative_bound_nats"] / record.held_out["images"]
    html = plain.read_text()
    assert f"<b>{nats:.4f}<small>" in html
    assert f"<b>{nats / 64 / math.log(2):.5f}<small>" in html
    assert record.test_fingerprint is not None
    manifest = vaejob.open_data(f"{home}/digits/test").manifest
    for name, value in {
        "bound": "ELBO, K = 1", "images": f"{manifest.images}, each once", "split": "test", "binarisation": "none", "bits": "4",
        "pixels": "discretized-logistic", "fingerprint": record.test_fingerprint[:16],
    }.items():  # fmt: skip
        assert f"<dt>{name}</dt><dd>{value}</dd>" in html


def test_all_held_out_images_scored_one_by_one_have_the_mean_of_the_record(plain: Path, home: Path) -> None:
    record = choose_record(open_bucket(f"{home}/runs/plain"), "best")
    assert record.held_out is not None
    bits = record.held_out["negative_bound_nats"] / record.held_out["images"] / 64 / math.log(2)
    rows = {row[0]: row for row in tables_of(plain.read_text())["Likelihood of single images"]}
    assert float(rows["held out"][2]) == pytest.approx(bits, abs=2e-5)
    assert rows["other"][1] == "40 of 40"


def test_the_same_run_gives_the_same_page_and_nothing_of_now(plain: Path, home: Path, tmp_path: Path) -> None:
    again = written(home / "runs" / "plain", "--other", f"{home}/black/test", out=tmp_path / "again.html")
    assert again == plain.read_text()


def test_without_out_it_lies_in_the_run_s_own_folder(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "runs" / "plain", tmp_path / "plain")
    result = result_of(str(run), "--images", "20")
    assert result.stdout == f"{run}/report.html\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert "searching training images" in result.stderr


def test_what_is_missing_is_said_and_the_rest_is_there(home: Path, tmp_path: Path) -> None:
    no_test = written(home / "runs" / "no-test", out=tmp_path / "a.html")
    assert "no held-out images (data.test)" in no_test
    assert "16 training images beside" in no_test
    table = written(home / "runs" / "table", out=tmp_path / "b.html")
    assert "None: decoder-only has no encoder" in table
    assert "Training, \u2212log p(x | z)" in table
    assert "32 samples" in table
    ladder = written(home / "runs" / "ladder", out=tmp_path / "c.html")
    assert "codes of several sizes" in ladder
    assert "layer 2" in ladder


def test_a_run_without_a_checkpoint_has_its_curves(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "runs" / "plain", tmp_path / "plain")
    shutil.rmtree(run / "records")
    html = written(run, out=tmp_path / "a.html")
    assert "No checkpoint exists" in html
    assert "Negative bound, nats per image" in tables_of(html)
    shutil.rmtree(run / "metrics")
    assert "Nothing was reported yet" in written(run, out=tmp_path / "b.html")


def test_data_out_of_reach_or_changed_costs_only_what_needs_it(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "runs" / "plain", tmp_path / "plain")
    text = (run / "job.yaml").read_text().replace(f"{home}/digits/train", f"{home}/gone")
    (run / "job.yaml").write_text(text.replace(f"{home}/digits/test", f"{home}/black/test"))
    html = written(run, out=tmp_path / "a.html")
    assert f"{home}/gone holds no shards" in html
    assert "no longer holds the images that the run was trained with" in html
    assert "32 samples" in html


def test_damage_is_one_line(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "runs" / "plain", tmp_path / "plain")
    assert "is no run" in error_of(tmp_path)
    assert "--out is missing for 2 runs" in error_of(run, home / "runs" / "k3")
    assert "images of 3x9x9; this model's have 1x8x8" in error_of(run, "--other", f"{home}/large/test")
    next((run / "metrics").iterdir()).write_bytes(b"no Parquet at all")
    assert re.search(f"{re.escape(str(run))}/metrics/.*parquet is damaged: ", error_of(run))
    (run / "job.yaml").write_text("run: [")
    assert "is not YAML" in error_of(run)


def test_a_damaged_state_leaves_the_curves(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "runs" / "plain", tmp_path / "plain")
    for state in (run / "states").rglob("*.safetensors"):
        state.write_bytes(state.read_bytes()[:-1] + b"x")
    html = written(run, out=tmp_path / "a.html")
    assert "The checkpoint cannot be used, so there are no pictures" in html
    assert "Negative bound, nats per image" in tables_of(html)


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\" onload='alert(1)'"


def test_no_text_of_a_bucket_becomes_markup(home: Path, tmp_path: Path) -> None:
    """In every place that a bucket or an address fills: settings, data addresses, versions, attempts, problems."""
    run = shutil.copytree(home / "runs" / "plain", tmp_path / "<b>bold")
    job = vaejob.load_config(str(run / "job.yaml"), f"data.train={tmp_path}/{EVIL}")
    (run / "job.yaml").write_text(job.to_yaml())
    for record in (run / "records").iterdir():
        text = record.read_text().replace('"vaejob": "', '"vaejob": "' + EVIL.replace('"', '\\"'))
        record.write_text(text)
    (run / "records" / "000000009999.json").write_text("{}")
    html = written(run, out=tmp_path / "evil.html")
    assert html.count("alert(1)") > 3
    for start in ("<script", "<img src=x", "<b>bold", "onload='", 'onload="'):
        assert start not in html
    with opened(tmp_path / "evil.html", width=800, scheme="light") as watched:
        assert watched.page.locator("script").count() == 0
        assert watched.page.locator("[onload], [onerror]").count() == 0


@given(st.text())
def test_any_text_is_read_back_as_that_text(text: str) -> None:
    parser = Tables()
    parser.feed(tag("p", text, title=text))
    allowed = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", text)
    assert "".join(parser.text) == allowed


def test_runs_stand_together_only_where_they_compare(several: Path) -> None:
    html = several.read_text()
    rows = {row[0]: row[1] for row in tables_of(html)["Held-out bounds of all runs"]}
    assert rows["plain"] == rows["wider"] == rows["table"] == rows["ladder"] == "a"
    assert rows["k3"] == "b"
    assert rows["no-test"] == ""
    assert "not all comparable: only those of one letter are" in html
    assert "Of group b there is k3 alone" in html
    header = tables_of(html)["Held-out negative bound, nats per image"][0]
    assert [name for name in header if name in RUNS] == ["plain", "wider", "table", "ladder"]
    # The table's objective is no bound, so what is minimised is drawn for each run alone.
    objective = tables_of(html)["Objective minimised, nats per image"][0]
    assert not any(name in RUNS for name in objective)
    settings = {row[0]: row[1:] for row in tables_of(html)["Settings that differ"]}
    assert settings["model.hidden"] == ["[16]", "[24]", "[16]", "[16]", "[16]", "[16]"]
    assert "run.seed" not in settings


def many_rows(run: Path, count: int) -> None:
    """A history of so many reports on training, in one file of one later attempt."""
    rows = read_rows(open_bucket(str(run)))
    train = next(row for row in rows if row["split"] == "train")
    more = [
        {**train, "images_seen": 250 * (i + 1), "attempt": "99990101T000000000000-0", "negative_bound_nats": 1000.0 + i}
        for i in range(count)
    ]
    write_rows(open_bucket(str(run)), more, sequence=0, begun=99)


def test_a_hundred_thousand_reports_stay_small_and_thinned_points_are_exact(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "runs" / "plain", tmp_path / "plain")
    shutil.rmtree(run / "records")
    many_rows(run, 100_000)
    html = written(run, out=tmp_path / "a.html")
    assert len(html) < 1_500_000
    size = math.ceil(100_000 / MOST_POINTS)
    assert f"each training point is the mean over the images of {size} reports" in html
    rows = [row for row in read_rows(open_bucket(str(run))) if row["split"] == "train"]
    points = tables_of(html)["Negative bound, nats per image"][1:]
    assert len(points) <= MOST_POINTS + 1
    first = sum(row["negative_bound_nats"] for row in rows[:size]) / sum(row["images"] for row in rows[:size])
    assert float(points[0][1]) == pytest.approx(first, abs=1e-3)


@given(st.integers(0, 500), st.integers(1, 50))
def test_thinning_loses_no_report(count: int, most: int) -> None:
    rows: list[dict[str, Any]] = [{"images_seen": i} for i in range(count)]
    windows = thinned(rows, most)
    assert [row for window in windows for row in window.rows] == rows
    assert len(windows) <= most


def row(attempt: str, images_seen: int, *, started_at: int = 0, halvings: int = 0, second: int = 0) -> dict[str, Any]:
    return {
        "split": "train", "attempt": attempt, "attempt_started_at_images": started_at, "images_seen": images_seen, "images": 10,
        "world_size": 2, "seconds": 1.5, "data_wait_seconds": 0.5, "halvings": halvings, "written_at": f"2026-01-01T00:00:{second:02}+00:00",
    }  # fmt: skip


def test_work_done_again_is_counted_and_a_way_back_is_named(home: Path) -> None:
    job = vaejob.load_config(str(home / "runs" / "plain" / "job.yaml"))
    run = ReportedRun(
        address="here", job=job, finished=False, images_seen=30,
        rows=[row("a", 10), row("b", 20, started_at=10, halvings=1, second=5), row("b", 30, started_at=10, halvings=1, second=6)],
        lost=[row("a", 20, second=1), row("a", 30, second=2)], starts=["one"],
    )  # fmt: skip
    first, second = attempts(run)
    assert (first.came_to, first.lost_images, second.began_at, second.came_to) == (30, 20, 10, 30)
    assert (first.how_it_began, second.how_it_began) == ("the first", "went back, half the learning rate")
    spent = cost(run)
    assert (spent.worker_seconds, spent.images, spent.lost_images, spent.waited_seconds) == (15.0, 50, 20, 2.5)


def test_replaced_reports_are_found_in_the_bucket(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "runs" / "plain", tmp_path / "plain")
    old = [row for row in read_rows(open_bucket(str(run))) if row["split"] == "train"]
    began = {**old[0], "attempt": "99990101T000000000000-0", "attempt_started_at_images": old[3]["images_seen"]}
    write_rows(open_bucket(str(run)), [{**began, "images_seen": 9000}], sequence=0, begun=99)
    html = written(run, "--images", "20", out=tmp_path / "a.html")
    lost = sum(row["images"] for row in old[4:])
    assert f"of which {lost:,} had to be done again" in html


def test_nearest_images_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    images, queries = rng.integers(0, 256, (1500, 12), dtype=np.uint8), rng.integers(0, 256, (7, 12), dtype=np.uint8)
    index, distance = nearest(queries, images)
    for i, query in enumerate(queries):
        apart = [math.sqrt(np.mean((query.astype(float) - image) ** 2)) for image in images]
        assert index[i] == int(np.argmin(apart))
        assert distance[i] == pytest.approx(min(apart), abs=1e-12)


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_the_area_under_the_curve_is_the_share_of_pairs(usual: list[int], unusual: list[int]) -> None:
    pairs = [(u > v) + (u == v) / 2 for u in unusual for v in usual]
    assert anomaly_auc(np.array(usual), np.array(unusual)) == pytest.approx(sum(pairs) / len(pairs))


@given(st.integers(1, 3000), st.integers(1, 600), st.integers(1, 300))
def test_spread_ids_are_of_the_data_set_and_no_more_than_asked_for(images: int, count: int, block: int) -> None:
    ids = spread_ids(images, count, block=block)
    assert len(ids) == len(set(ids.tolist())) <= max(count, 1)
    assert 0 <= ids.min() <= ids.max() < images
    if images <= count:
        assert len(ids) == images


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_lie_within_and_evenly(low: float, width: float, about: int) -> None:
    found = ticks(low, low + width, about=about)
    assert 1 <= len(found) <= 2.5 * about + 2
    slack = 1e-6 * max(abs(low), width)
    assert low - slack <= found[0] <= found[-1] <= low + width + slack


def test_a_bound_that_is_not_finite_leaves_a_gap(home: Path) -> None:
    job = vaejob.load_config(str(home / "runs" / "plain" / "job.yaml"))
    rows = [row for row in read_rows(open_bucket(f"{home}/runs/plain")) if row["split"] == "train"]
    rows[2] = {**rows[2], "non_finite": 3}
    run = ReportedRun(address="here", job=job, finished=True, images_seen=1, rows=rows, lost=[], starts=[],
                      train_name="-ELBO", held_out_name="-ELBO")  # fmt: skip
    (line,) = charts_of_one(run)[0].series
    assert [math.isfinite(y) for y in line.y] == [i != 2 for i in range(len(rows))]
    assert "not finite" in page([run])


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_whole_alone_and_accessible(
    plain: Path, several: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    for path in (plain, several):
        with opened(path, width=width, scheme=scheme) as watched:
            assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
            dark = watched.page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
            assert dark == (scheme == "dark")
            watched.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
            assert watched.violations() == []
            assert watched.page.evaluate("[...document.images].every(one => one.naturalWidth > 0)")
            assert watched.page.locator("figure svg[role=img]:not([aria-label])").count() == 0
            assert watched.said == watched.requests == []


def test_on_paper_it_is_light_and_nothing_is_cut_off(plain: Path, several: Path) -> None:
    for path in (plain, several):
        with opened(path, width=680, scheme="dark") as watched:  # a sheet of A4 within its margins
            watched.page.emulate_media(media="print")
            watched.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert watched.page.evaluate("document.documentElement.scrollWidth") <= 680
            assert watched.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_density_with_all_its_words_fits_a_phone(tmp_path: Path) -> None:
    job = vaejob.load_config("quickstart", "run.bucket=runs", "data.train=digits", "likelihood.pixels=gaussian")
    totals = LikelihoodTotals(images=4, dims=256, negative_bound_nats=-242.06, negative_bound_squares_rest=12.0)
    bound = Bound(name="-ELBO", totals=totals, images_seen=1, of=[])
    run = ReportedRun(address="here", job=job, finished=True, images_seen=1, rows=[], lost=[], starts=[], held_out=bound)  # fmt: skip
    (tmp_path / "density.html").write_text(page([run]))
    with opened(tmp_path / "density.html", width=390, scheme="light") as watched:
        assert "nats (density)" in watched.page.locator(".headline").inner_text()
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_numbers_unfold_by_mouse_and_by_keyboard(plain: Path) -> None:
    with opened(plain, width=390, scheme="light") as watched:
        first, second = (watched.page.locator("details").nth(i) for i in range(2))
        table = first.locator("table")
        assert not table.is_visible()
        first.locator("summary").click()
        assert table.is_visible()
        second.locator("summary").focus()
        watched.page.keyboard.press("Enter")
        assert second.locator("table").is_visible()
        watched.page.keyboard.press("Enter")
        assert not second.locator("table").is_visible()
