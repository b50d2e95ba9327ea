"""`vaejob serve` as a process: what it answers is what the model says, and what it should not be asked it refuses in a line."""

import base64
import io
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

import vaejob
from tests.browser import opened
from tests.job.conftest import pack_digits
from vaejob.loaded import LoadedModel
from vaejob.pictures.interpolate import interpolate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("served")
    pack_digits(f"{folder}/digits")
    job = vaejob.load_config(
        "quickstart", f"run.bucket={folder}", "run.name=run", f"data.train={folder}/digits/train",
        f"data.test={folder}/digits/test", "cluster.workers=0", "training.images=6400", "training.evaluate_every_images=6400",
    )  # fmt: skip
    return vaejob.train(job)


@pytest.fixture(scope="module")
def address(run: str) -> Iterator[str]:
    command = [sys.executable, "-m", "vaejob", "serve", run, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield re.search(r"http://[\d.]+:\d+", line)[0]  # type: ignore[index]
        process.terminate()


@pytest.fixture(scope="module")
def model(run: str) -> LoadedModel:
    return vaejob.load(run)


@pytest.fixture(scope="module")
def images(model: LoadedModel) -> np.ndarray:
    return vaejob.open_data(model.job.data.test).images(np.arange(2))


def ask(address: str, verb: str, question: object, **headers: str) -> tuple[int, Any]:
    data = question if isinstance(question, bytes) else json.dumps(question).encode()
    request = urllib.request.Request(
        f"{address}/api/{verb}", data=data, headers={"Content-Type": "application/json"} | headers
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]


def patient(address: str, verb: str, question: object) -> Any:
    """The answer, from a server that the test before may have kept busy: asks again in a second, as it is told to."""
    deadline = time.monotonic() + 60
    while (reply := ask(address, verb, question))[0] == 429 and time.monotonic() < deadline:
        time.sleep(1)
    status, found = reply
    assert status == 200, found
    return found


def png(image: np.ndarray, mode: str = "L", size: tuple[int, int] | None = None) -> str:
    file = io.BytesIO()
    picture = Image.fromarray(image[0]).convert(mode)
    (picture.resize(size) if size else picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pixels(addresses: list[str]) -> np.ndarray:
    files = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in addresses]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)))[None] for file in files])


@pytest.mark.parametrize("mean", [False, True])
def test_samples_are_those_of_the_model(address: str, model: LoadedModel, mean: bool) -> None:
    found = patient(address, "sample", {"count": 5, "seed": 7, "mean": mean})
    np.testing.assert_array_equal(pixels(found["images"]), model.sample(5, seed=7, mean=mean).numpy())


def test_reconstruction_and_bounds_are_those_of_the_model(address: str, model: LoadedModel, images: np.ndarray) -> None:
    found = patient(address, "reconstruct", {"image": png(images[0])})
    seen, made = model.reconstruct(images[:1])
    np.testing.assert_array_equal(pixels(found["images"]), np.concatenate([seen, made]))
    for samples, bound in ((1, "elbo"), (50, "iwae")):
        found = patient(address, "score", {"image": f"data:image/png;base64,{png(images[0])}", "samples": samples})
        nats = -float(model.log_likelihood_bound(images[:1], samples=samples))
        assert found["negative_bound_nats"] == pytest.approx(nats, rel=1e-5)
        assert found["bits_per_dim"] == pytest.approx(nats / (64 * np.log(2)), rel=1e-5)
        assert (found["bound"], found["samples"], found["changed"], found["density"]) == (bound, samples, [], False)


def test_way_to_another_image_is_that_of_vaejob_interpolate(address: str, model: LoadedModel) -> None:
    data = vaejob.open_data(model.job.data.test)
    row = interpolate(model, data, rows=1, steps=4, seed=3).numpy()
    first, last = np.random.default_rng(3).choice(data.manifest.images, size=2, replace=False)
    pair = [png(image) for image in (data.images(np.array([first]))[0], data.images(np.array([last]))[0])]
    found = patient(address, "interpolate", {"first": pair[0], "last": pair[1], "steps": 4})
    np.testing.assert_allclose(pixels(found["images"]).astype(int), row[1:-1].astype(int), atol=1)


def test_image_of_another_form_is_made_to_fit_and_that_is_said(address: str, images: np.ndarray) -> None:
    found = patient(address, "reconstruct", {"image": png(images[0], "RGB", (30, 20))})
    assert found["changed"] == ["made grey", "resized from 20x30 to 8x8"]
    assert pixels(found["images"]).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("verb", "question", "headers", "status", "says"),
    [
        ("sample", {"count": 65}, {}, 400, "count: Input should be less than or equal to 64"),
        ("sample", {"counts": 1}, {}, 400, "counts: Extra inputs are not permitted"),
        ("sample", b"{", {}, 400, "sample: Invalid JSON"),
        ("score", {"image": "", "samples": 10**9}, {}, 400, "samples: Input should be less than or equal to 5000"),
        ("score", {"image": "no base64!"}, {}, 400, "image: it is not base64"),
        ("score", {"image": "AAAA"}, {}, 400, "image"),
        ("sample", {}, {"Content-Type": "text/plain"}, 415, "Content-Type: application/json"),
        ("sample", {}, {"Host": "elsewhere.example"}, 403, "answers to 127.0.0.1, ::1, localhost only"),
        ("score", b" " * (17 << 20), {}, 413, "at most 16 MiB"),
        ("train", {}, {}, 404, "Not Found"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_a_line(
    address: str, verb: str, question: object, headers: dict[str, str], status: int, says: str
) -> None:
    for _ in range(20):
        found, line = ask(address, verb, question, **headers)
        if found != 429:
            break
    assert found == status
    assert says in line
    assert "\n" not in line


def test_bomb_is_refused_before_it_is_unpacked(address: str) -> None:
    file = io.BytesIO()
    Image.new("L", (30_000, 30_000)).save(file, "PNG")
    for _ in range(20):
        status, line = ask(address, "score", {"image": base64.b64encode(file.getvalue()).decode()})
        if status != 429:
            break
    assert status == 400
    assert "30000" in line


def test_crowd_is_told_to_come_back_and_one_that_comes_back_is_answered(address: str) -> None:
    with ThreadPoolExecutor(60) as crowd:
        found = list(crowd.map(lambda seed: ask(address, "sample", {"count": 64, "seed": seed})[0], range(60)))
    assert set(found) == {200, 429}
    assert len(patient(address, "sample", {"count": 1})["images"]) == 1


def test_port_that_is_taken_and_run_that_is_not_there_end_in_a_line(address: str, run: str, tmp_path: Path) -> None:
    port = address.rpartition(":")[2]
    for arguments, status, says in (
        ([run, "--port", port], 3, f"vaejob: --host 127.0.0.1 --port {port}: Address already in use; "),
        ([f"{tmp_path}/none"], 2, "is no run"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "vaejob", "serve", *arguments],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == status
        assert says in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light")])
def test_page_in_a_browser(
    address: str, images: np.ndarray, tmp_path: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(base64.b64decode(png(image)))
    with opened(address, width=width, scheme=scheme) as seen:
        page = seen.page
        page.locator("#samples img").nth(15).wait_for()
        before = page.locator("#samples img").first.get_attribute("src")
        page.get_by_label("Seed").fill("5")
        page.get_by_role("button", name="Sample").click()
        page.locator("#samples img[alt='sample 1 of seed 5']").wait_for()
        assert page.locator("#samples img").first.get_attribute("src") != before
        page.get_by_label("Drop an image here").set_input_files(files[0])
        page.get_by_text(re.compile(r"-IWAE-100: -?[\d.]+ nats, -?[\d.]+ bits/dim$")).wait_for()
        assert page.locator("#reconstruction img").count() == 2
        captions = page.locator("#reconstruction figcaption").all_inner_texts()
        assert captions == ["as the model sees it", "its reconstruction"]
        page.locator("#last:enabled").wait_for()
        page.get_by_label("Another image").set_input_files(files[1])
        page.locator("#interpolation img").nth(7).wait_for()
        files[1].write_text("no image")
        page.get_by_label("Drop an image here").set_input_files(files[1])
        page.get_by_role("alert").filter(has_text="image is no image that can be read").wait_for()
        assert page.locator("#reconstruction img").count() == 0
        assert page.locator("#score").inner_text() == ""
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert seen.violations() == []
        assert [said for said in seen.said if "400" not in said] == []
