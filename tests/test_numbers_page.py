"""The page on the numbers: its examples print what it says, and what they print is so by closed forms of our own."""

import contextlib
import io
import itertools
import math
import re
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from vaejob.cli.settings import every_setting

PAGE = (Path(__file__).parents[1] / "vaejob/likelihood/numbers.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL)


def numbers(words: str) -> list[float]:
    """What the page prints in the one line that begins with these words, behind them."""
    (line,) = re.findall(rf"^{re.escape(words)}(.*)$", "".join(text for _, text in EXAMPLES), flags=re.MULTILINE)
    return [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?", line)]


def test_examples_print_what_the_page_says() -> None:
    assert len(EXAMPLES) == PAGE.count("```") // 4 >= 7
    names: dict[str, Any] = {}
    for code, text in EXAMPLES:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == text


def test_units() -> None:
    assert numbers("104.0529 nats of an image of MNIST:") == [round(104.0529 / 784 / math.log(2), 5)]
    assert numbers("one bit/dim of MNIST:")[0] == round(784 * math.log(2), 2)
    assert numbers("one bit/dim of MNIST:")[-1] == round(3072 * math.log(2), 2)
    assert numbers("every grey level as likely as any other:") == [8]


@pytest.mark.parametrize("scale", [0.1, 0.01, 0.002])
def test_density_and_mass_of_one_pixel(scale: float) -> None:
    density, bits, corrected, mass, mass_bits = numbers(f"scale {scale}:")
    normal = NormalDist(0, scale)
    expected, within = normal.pdf(0), normal.cdf(0.5 / 255) - normal.cdf(-0.5 / 255)
    assert density == pytest.approx(expected, abs=0.006)
    assert bits == pytest.approx(-math.log2(expected), abs=6e-4)
    assert corrected == pytest.approx(-math.log2(expected / 255), abs=6e-4)
    assert mass == pytest.approx(within, abs=6e-5)
    assert mass_bits == pytest.approx(-math.log2(within), abs=6e-4)
    assert corrected <= mass_bits + 6e-4, "the peak of a bin is higher than the rest of it"


def test_rate_by_integration() -> None:
    z = np.linspace(-9, 11, 200_001)
    q = np.exp(-np.square((z - 1) / 0.5) / 2) / (0.5 * math.sqrt(2 * math.pi))
    log_p = -np.square(z) / 2 - math.log(2 * math.pi) / 2
    rate = float((q * (np.log(np.maximum(q, 1e-300)) - log_p)).sum() * (z[1] - z[0]))
    assert numbers("rate of N(1, 0.5^2) and N(0, 1) against the prior:") == [pytest.approx(rate, abs=6e-5)]


def test_means_and_errors_of_four_images() -> None:
    a = np.array([90.0, 95.0, 115.0, 140.0])
    b = a - np.array([1.0, 1.5, 0.5, 1.0])
    error = a.std() / 2
    assert numbers("negative_bound") == [a.mean(), pytest.approx(error, abs=0.006)]
    assert numbers("distortion") == [a.mean() - 25, pytest.approx(error, abs=0.006)]
    in_bits = a.mean() / 784 / math.log(2), error / 784 / math.log(2)
    assert numbers(" " * 15) == [*(pytest.approx(each, abs=6e-6) for each in in_bits), 4]
    assert numbers("mean of the workers' means:") == [(a[:3].mean() + a[3]) / 2]
    assert numbers("a 110.00 ±") == [pytest.approx(each, abs=0.006) for each in (error, b.mean(), b.std() / 2)]
    unpaired, paired = math.hypot(error, b.std() / 2), (a - b).std() / 2
    assert numbers("a - b as if of different images:") == [1, pytest.approx(unpaired, abs=0.006)]
    assert numbers("a - b, image by image:") == [1, pytest.approx(paired, abs=0.006)]


def test_two_weights() -> None:
    logs, bound, ess, _, bias = numbers("weights 0.1, 0.3:")
    assert logs == round(math.log(0.03) / 2, 4)
    assert bound == round(math.log(0.2), 4)
    assert ess == round(0.4**2 / (0.1**2 + 0.3**2), 1)
    # Their relative variance as one mean of two: (0.1 / 0.2)^2 over 2, halved by the bend of the logarithm.
    assert bias == -((0.1 / 0.2) ** 2) / 2 / 2
    assert numbers("five of 0.2:")[:3] == [round(math.log(0.2), 4), 5, 5]


def expected_bound(samples: int) -> float:
    """E log of the mean of K log-normal weights of mean 1: the integral of (e^-t - phi(t / K)^K) / t, phi(t) = E e^-tw."""
    eps = np.linspace(-9, 9, 3001)
    mass = np.exp(-np.square(eps) / 2) * (eps[1] - eps[0]) / math.sqrt(2 * math.pi)
    w = np.exp(eps - 0.5)
    log_t = np.linspace(-40, 40, 1601)
    t = np.exp(log_t)
    lacking = np.array([float(-np.expm1(-one / samples * w) @ mass) for one in t])
    with np.errstate(divide="ignore"):
        power = np.expm1(samples * np.log1p(-np.minimum(lacking, 1.0)))
    return float((np.expm1(-t) - power).sum() * (log_t[1] - log_t[0]))


def test_bound_rises_with_k_as_in_closed_form() -> None:
    assert expected_bound(1) == pytest.approx(-0.5, abs=1e-6)
    rows = {samples: numbers(f"K {samples:>4}: bound") for samples in (1, 10, 100, 1000)}
    for samples, (bound, error, _, _) in rows.items():
        assert abs(bound - expected_bound(samples)) < 4 * error + 5e-5
    assert expected_bound(1000) == pytest.approx(-(math.e - 1) / 2000, rel=5e-3)
    for fewer, more in itertools.pairwise(rows.values()):
        assert more[0] > fewer[0]
        assert more[2] > fewer[2]
    # What the page says of the estimate: 0 at one sample, too small by almost half at an ESS of 5, then within a tenth.
    estimates = {samples: row[3] / -expected_bound(samples) for samples, row in rows.items()}
    assert estimates[1] == 0
    assert 5 < rows[10][2] < 6
    assert 0.5 < estimates[10] < 0.7
    assert 40 < rows[100][2] < 50
    assert 0.9 < estimates[100] < 1


def test_entropy_of_a_drawn_pixel_and_of_levels() -> None:
    nats, certain = numbers("grey 0.3, drawn:")
    assert nats == round(-(0.3 * math.log(0.3) + 0.7 * math.log(0.7)), 4)
    assert certain == 0
    assert [numbers(f"uniform over {levels} levels:") for levels in (32, 256)] == [[5], [8]]


def test_settings_the_page_names_exist() -> None:
    sections = {setting.section for setting in every_setting()}
    named = {name for name in re.findall(r"`(\w+\.\w+)`", PAGE) if name.split(".")[0] in sections}
    assert len(named) >= 5
    assert named <= {setting.name for setting in every_setting()}
