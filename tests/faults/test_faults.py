"""One of each quick kind of fault, at other moments each time; all of them, and many: python -m tests.faults."""

import os
from collections.abc import Iterator

import pytest

from tests.faults.inject import injected, place
from tests.faults.kinds import KINDS, Place
from tests.s3.server import which_server

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def here() -> Iterator[Place]:
    if which_server() != "ceph":
        pytest.skip("the faults are injected before Ceph radosgw")
    with place() as here:
        yield here


@pytest.mark.parametrize(
    ("name", "workers"), [("in one process", 0), ("a worker of 2", 2)], ids=lambda value: str(value).replace(" ", "-")
)
def test_nothing_is_lost_and_batches_and_weights_are_those_of_a_calm_job(name: str, workers: int, here: Place) -> None:
    kinds = [kind for kind in KINDS if kind.workers == workers and (not workers or kind.name == name)]
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    outcomes = list(injected(kinds, here, name=name, seed=seed))
    assert len(outcomes) == len(kinds) > 0
    assert all(outcome.lost == 0 for outcome in outcomes), outcomes
