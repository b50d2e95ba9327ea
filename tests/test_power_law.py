"""What the IWAE table says of lengths that nobody ran comes from a power law, which finds one again."""

from dataclasses import replace

import pytest

from tests.benchmarks.iwae import STEP, Point, law_of

POINT = Point(recipe="1-1", images=0, nats=0.0, error=0.1, cpu_seconds=1.0)


@pytest.mark.parametrize("power", [0.2, 0.5, 1.0])
def test_law_through_three_lengths_is_found_and_gone_on_with(power: float) -> None:
    law = lambda images: 86.5 + 4000 * images**-power  # noqa: E731
    points = [replace(POINT, images=1000 * STEP**n, nats=law(1000 * STEP**n)) for n in range(3)]
    found = law_of(points)
    assert found
    for images in (16_000, 100_000, 196_800_000):
        assert found(images) == pytest.approx(law(images), abs=1e-8)


@pytest.mark.parametrize("nats", [(90.0, 89.0, 87.0), (90.0, 89.0, 88.0), (90.0, 88.0, 88.5)])
def test_gains_that_do_not_shrink_have_no_law(nats: tuple[float, ...]) -> None:
    points = [replace(POINT, images=1000 * STEP**n, nats=each) for n, each in enumerate(nats)]
    assert law_of(points) is None
