"""The order of samples, against a slow and plain reading of its description."""

import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vaejob.data.order import EpochOrder, Layout, RankPlan, global_batches, ids_digest, mix

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MANY = settings(max_examples=500, deadline=None)
FEWER = settings(max_examples=200, deadline=None)


class Case(NamedTuple):
    """A data set and the settings of its order."""

    groups: tuple[int, ...]
    lanes: int
    window_rows: int
    global_batch: int
    seed: int

    @property
    def images(self) -> int:
        return sum(self.groups)

    def plan(self, *, rank: int = 0, world_size: int = 1) -> RankPlan:
        return RankPlan(
            row_group_rows=np.array(self.groups),
            global_batch=self.global_batch,
            lanes=self.lanes,
            window_rows=self.window_rows,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def ids(self, *, images_seen: int = 0, until: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """The batches as lists."""
        plan = self.plan(rank=rank, world_size=world_size)
        return [ids.tolist() for _, ids in plan.batches(images_seen=images_seen, until=until)]


cases = st.builds(
    Case,
    groups=st.lists(st.integers(1, 12), min_size=1, max_size=8).map(tuple),
    lanes=st.integers(1, 12) | st.just(100),
    window_rows=st.integers(1, 20) | st.just(1000),
    global_batch=st.integers(1, 60),
    seed=st.integers(0, 2**31 - 1),
)
ONE_IMAGE = Case(groups=(1,), lanes=3, window_rows=5, global_batch=4, seed=0)
MORE_LANES_THAN_IMAGES = Case(groups=(2, 3), lanes=64, window_rows=2, global_batch=3, seed=1)
ONE_IMAGE_PER_BATCH = Case(groups=(4, 1, 3), lanes=2, window_rows=3, global_batch=1, seed=2)


def splitmix(value: int) -> int:
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def hash_of(*parts: int) -> int:
    state = 0
    for part in parts:
        state = splitmix(state + part * GOLDEN + 1)
    return state


@lru_cache(maxsize=4)
def slow_epoch(case: Case, epoch: int) -> list[list[int]]:
    """The lanes of an epoch, each a list of sample ids in the order of its offsets."""
    key = hash_of(case.seed, epoch)
    first_ids = [0, *accumulate(case.groups)]
    groups = sorted(range(len(case.groups)), key=lambda group: splitmix(group * GOLDEN + hash_of(key, 0)))
    laid = [first_ids[group] + row for group in groups for row in range(case.groups[group])]
    lanes = min(case.lanes, case.images)
    lengths = [case.images // lanes + (lane < case.images % lanes) for lane in range(lanes)]
    result = []
    for lane, (start, stop) in enumerate(pairwise([0, *accumulate(lengths)])):
        hashes = [splitmix(row * GOLDEN + hash_of(key, 1, lane)) >> 32 for row in range(stop - start)]
        order = sorted(range(stop - start), key=lambda row, h=hashes: (row << 32) + h[row] * case.window_rows)  # type: ignore[misc]
        result.append([laid[start + row] for row in order])
    return result


def slow_batch(case: Case, epoch: int, start: int, stop: int) -> list[int]:
    """Positions [start, stop) of an epoch, sorted lane by lane."""
    lanes = slow_epoch(case, epoch)
    places = sorted((position % len(lanes), position // len(lanes)) for position in range(start, stop))
    return [lanes[lane][offset] for lane, offset in places]


@FEWER
@given(cases, st.integers(0, 2), st.data())
@example(ONE_IMAGE, 0, None)
@example(MORE_LANES_THAN_IMAGES, 1, None)
@example(ONE_IMAGE_PER_BATCH, 2, None)
def test_batches_are_those_of_the_description(case: Case, epochs_before: int, data: st.DataObject | None) -> None:
    """From any number of images seen, which need not be where a batch ends."""
    into_epoch = data.draw(st.integers(0, case.images - 1)) if data else 0
    images_seen = epochs_before * case.images + into_epoch
    until = images_seen + case.images + 1
    for batch, ids in case.plan().batches(images_seen=images_seen, until=until):
        assert (batch.epoch, batch.start) == divmod(images_seen, case.images)
        assert ids.tolist() == slow_batch(case, batch.epoch, batch.start, batch.stop)
        images_seen += batch.images
    assert images_seen == until


@FEWER
@given(cases, st.integers(1, 9))
@example(ONE_IMAGE, 9)
@example(MORE_LANES_THAN_IMAGES, 7)
@example(ONE_IMAGE_PER_BATCH, 3)
def test_world_size_does_not_change_the_batches(case: Case, world_size: int) -> None:
    """The ranks' parts, one after another, are the batch, and nearly equal; with more ranks than images some are empty."""
    until = case.images + 1
    parts_of_batches = zip(
        *(case.ids(until=until, rank=rank, world_size=world_size) for rank in range(world_size)), strict=True
    )
    for whole, parts in zip(case.ids(until=until), parts_of_batches, strict=True):
        assert [sample for part in parts for sample in part] == whole
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@MANY
@given(cases, st.integers(0, 3))
@example(ONE_IMAGE, 0)
@example(MORE_LANES_THAN_IMAGES, 0)
def test_every_image_is_seen_exactly_once_an_epoch(case: Case, epoch: int) -> None:
    batches = case.ids(images_seen=epoch * case.images, until=(epoch + 1) * case.images)
    assert sorted(sample for batch in batches for sample in batch) == list(range(case.images))


@MANY
@given(cases)
def test_the_last_smaller_batch_of_an_epoch_is_used(case: Case) -> None:
    sizes = [len(batch) for batch in case.ids(until=2 * case.images)]
    full, rest = divmod(case.images, case.global_batch)
    assert sizes == 2 * ([case.global_batch] * full + [rest] * (rest > 0))


@MANY
@given(cases, st.data())
def test_starting_again_continues_the_same_batches(case: Case, data: st.DataObject) -> None:
    """At any batch, and with any world size that the images before it were seen with."""
    until = 2 * case.images + 1
    whole = case.ids(until=until)
    done = data.draw(st.integers(0, len(whole)))
    images_seen = sum(len(batch) for batch in whole[:done])
    assert case.ids(images_seen=images_seen, until=until) == whole[done:]


@MANY
@given(cases, st.data())
def test_stopping_within_a_batch_loses_and_repeats_nothing(case: Case, data: st.DataObject) -> None:
    until = case.images + data.draw(st.integers(1, case.images))
    cut = data.draw(st.integers(0, until))
    seen = [sample for batch in case.ids(until=cut) + case.ids(images_seen=cut, until=until) for sample in batch]
    whole = [sample for batch in case.ids(until=until) for sample in batch]
    assert sorted(seen) == sorted(whole)


class Sighting(NamedTuple):
    """A case, and what of it is seen by how many ranks."""

    case: Case
    world_size: int
    images_seen: int
    until: int


def slow_batches(sighting: Sighting) -> Iterator[list[int]]:
    """The batches from images_seen on, counted out image by image."""
    case, _, images_seen, until = sighting
    first = images_seen
    for seen in range(images_seen + 1, until + 1):
        if seen - first == case.global_batch or seen % case.images == 0 or seen == until:
            epoch, start = divmod(first, case.images)
            yield slow_batch(case, epoch, start, start + seen - first)
            first = seen


def random_sighting(random: np.random.Generator) -> Sighting:
    """From anywhere in an epoch to the end of the next, with sizes that seldom divide each other."""
    count = int(random.integers(1, 9))
    groups = [
        random.integers(1, 13, size=count),
        np.full(count, random.integers(1, 13)),
        np.ones(random.integers(1, 41), dtype=np.int64),
        random.permutation([*random.integers(1, 4, size=count), random.integers(30, 90)]),
    ][random.integers(4)]
    case = Case(
        groups=tuple(groups.tolist()),
        lanes=int(random.choice([*range(1, 14), 100])),
        window_rows=int(random.choice([1, 2, 3, 5, 8, 20, 1000])),
        global_batch=int(random.choice([1, 2, 3, 7, 16, 25, 60, 200], p=[0.02, 0.04, 0.08, 0.16, 0.2, 0.2, 0.2, 0.1])),
        seed=int(random.integers(2**31)),
    )
    images_seen = int(random.integers(3 * case.images))
    until = (images_seen // case.images + 2) * case.images
    return Sighting(case, int(random.integers(1, 17)), images_seen, until)


def kinds(sighting: Sighting) -> dict[str, bool]:
    """What is awkward about it."""
    case, world_size, images_seen, _ = sighting
    return {
        "ranks do not divide the lanes": case.lanes % world_size != 0,
        "more ranks than lanes": world_size > case.lanes,
        "more ranks than images in a batch": world_size > case.global_batch,
        "more lanes than images": case.lanes > case.images,
        "batch larger than the data": case.global_batch > case.images,
        "window longer than a lane": case.window_rows > case.images,
        "one-row groups": max(case.groups) == 1,
        "uneven row groups": max(case.groups) > 20 * min(case.groups),
        "starts within a batch": images_seen % case.images % case.global_batch != 0,
        "last batch of the epoch smaller": case.images % case.global_batch != 0,
    }


def assert_parts_are_the_batches(sighting: Sighting) -> None:
    case, world_size, images_seen, until = sighting
    parts = [case.ids(images_seen=images_seen, until=until, rank=r, world_size=world_size) for r in range(world_size)]
    seen = []
    for number, batch in enumerate(slow_batches(sighting)):
        of_ranks = [of_rank[number] for of_rank in parts]
        assert [sample for part in of_ranks for sample in part] == batch, (sighting, number)
        assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1, (sighting, number)
        seen += batch
    assert {len(of_rank) for of_rank in parts} == {number + 1}, sighting
    assert sorted(seen[-case.images :]) == list(range(case.images)), sighting  # the second epoch, whole


def test_thousands_of_random_jobs_see_the_batches_of_the_description() -> None:
    """Any data, lanes, batch, world size and place to start from; each kind of awkwardness many times over."""
    random, met = np.random.default_rng(0), Counter[str]()
    for _ in range(2000):
        sighting = random_sighting(random)
        assert_parts_are_the_batches(sighting)
        met.update(kind for kind, holds in kinds(sighting).items() if holds)
    assert min(met[kind] for kind in kinds(sighting)) >= 100, met


def test_batches_and_world_sizes_may_change_at_any_image() -> None:
    """A run restarted again and again, also within batches, with other settings each time, goes through one sequence."""
    random = np.random.default_rng(1)
    for _ in range(500):
        case, _, seen, until = random_sighting(random)
        while seen < until:
            epoch, start = divmod(seen, case.images)
            step, world_size = case._replace(global_batch=int(random.integers(1, 40))), int(random.integers(1, 6))
            stop = min(start + step.global_batch, case.images)
            sequence = [slow_batch(case, epoch, position, position + 1)[0] for position in range(start, stop)]
            reach = {"images_seen": seen, "until": seen + len(sequence), "world_size": world_size}
            batch = [sample for rank in range(world_size) for part in step.ids(**reach, rank=rank) for sample in part]
            assert sorted(batch) == sorted(sequence), (step, reach)
            seen += len(sequence)


def test_long_lanes_are_read_in_stretches_without_a_seam() -> None:
    """Windows so small that a lane is computed in hundreds of pieces."""
    random = np.random.default_rng(2)
    for _ in range(20):
        groups = tuple(random.integers(1, 60, size=100).tolist())
        lanes, window_rows, global_batch, seed = (int(random.integers(1, most)) for most in (9, 12, 300, 2**31))
        case = Case(groups, lanes, window_rows, global_batch, seed)
        images_seen = int(random.integers(2 * case.images))
        until = (images_seen // case.images + 2) * case.images
        assert_parts_are_the_batches(Sighting(case, int(random.integers(1, 5)), images_seen, until))


@MANY
@given(cases, st.integers(0, 5))
def test_rows_of_a_lane_are_displaced_by_less_than_the_window(case: Case, epoch: int) -> None:
    layout = Layout.of(num_images=case.images, lanes=case.lanes)
    order = EpochOrder(
        row_group_rows=np.array(case.groups),
        layout=layout,
        window_rows=case.window_rows,
        seed=case.seed,
        epoch=epoch,
    )
    lengths = [layout.lane_rows(lane) for lane in range(layout.lanes)]
    assert sum(lengths) == case.images
    assert max(lengths) - min(lengths) <= 1
    for lane, length in enumerate(lengths):
        displaced = order.lane_offsets(lane, 0, length)
        assert sorted(displaced.tolist()) == list(range(length))
        assert np.abs(displaced - np.arange(length)).max() < case.window_rows


@MANY
@given(cases, st.integers(1, 9), st.integers(0, 3))
def test_digests_add_up_over_any_split(case: Case, world_size: int, epoch: int) -> None:
    span = {"images_seen": epoch * case.images, "until": (epoch + 1) * case.images}
    parts = [
        ids_digest(np.array(batch, dtype=np.int64), epoch=epoch)
        for rank in range(world_size)
        for batch in case.ids(**span, rank=rank, world_size=world_size)
    ]
    assert sum(parts) % 2**64 == ids_digest(np.arange(case.images), epoch=epoch)


def test_digests_tell_a_missing_a_repeated_and_another_epochs_image() -> None:
    ids = np.arange(100)
    seen = ids_digest(ids, epoch=0)
    assert (
        len({seen, ids_digest(ids[1:], epoch=0), ids_digest(np.append(ids[1:], 5), epoch=0), ids_digest(ids, epoch=1)})
        == 4
    )


def test_the_hash_is_splitmix64() -> None:
    """Its published first outputs for seed 1234567 (Vigna, 2015)."""
    state = (1234567 + np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN)).astype(np.uint64)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_order_is_what_it_was_when_it_was_released() -> None:
    """A change here makes every run that is under way see other images after its next restart."""
    case = Case(groups=(5, 3, 7, 5), lanes=3, window_rows=4, global_batch=8, seed=7)
    assert case.ids(until=40) == GOLDEN_BATCHES
    assert case.ids(until=16, rank=1, world_size=3) == [batch[2:5] for batch in GOLDEN_BATCHES[:2]]
    assert ids_digest(np.arange(20), epoch=1) == GOLDEN_DIGEST


GOLDEN_BATCHES = [
    [1, 0, 3, 11, 10, 13, 18, 19],
    [2, 4, 8, 12, 14, 17, 5, 7],
    [9, 16, 15, 6],
    [8, 10, 11, 0, 2, 1, 16, 7],
    [9, 13, 12, 4, 5, 15, 17, 19],
    [14, 3, 6, 18],
]
GOLDEN_DIGEST = 0x1DE2F0B2F3D0CBE7


def test_neighbours_in_a_batch_come_from_all_over_the_data() -> None:
    case = Case(groups=(100,) * 100, lanes=32, window_rows=256, global_batch=256, seed=0)
    for batch in case.ids(until=2560):
        assert len({sample // 100 for sample in batch}) >= 30  # of a hundred row groups


def test_two_seeds_and_two_epochs_have_different_orders() -> None:
    case = Case(groups=(10,) * 10, lanes=4, window_rows=16, global_batch=100, seed=0)
    first, second = case.ids(until=200)
    (other,) = case._replace(seed=1).ids(until=100)
    assert first != second != other != first


@pytest.mark.parametrize("images_seen", [0, 10**9 // 2, 3 * 10**9 - 100])
def test_a_billion_images_take_little_memory(images_seen: int) -> None:
    """In the middle of an epoch, without what came before it."""
    tracemalloc.start()
    try:
        plan = RankPlan(
            row_group_rows=np.full(10**5, 10**4),
            global_batch=4096,
            lanes=64,
            window_rows=4096,
            seed=0,
            rank=3,
            world_size=8,
        )
        batches = plan.batches(images_seen=images_seen, until=images_seen + 4096)
        ids = np.concatenate([ids for _, ids in batches])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(ids) in range(511, 514)
    assert len(np.unique(ids)) == len(ids)
    assert 0 <= ids.min() <= ids.max() < 10**9
    assert peak < 64e6


def test_until_ends_the_last_batch_of_all() -> None:
    sizes = [batch.images for batch in global_batches(num_images=10, global_batch=4, images_seen=0, until=17)]
    assert sizes == [4, 4, 2, 4, 3]
    assert math.fsum(sizes) == 17
