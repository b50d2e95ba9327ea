"""The places of a job's workers on a Ray cluster, with a process in each that probes run in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vaejob.cluster.doctor.results import Failed, Places
from vaejob.cluster.doctor.workers import Probe, tried
from vaejob.cluster.join import cluster_of, first_line, wait_for_room
from vaejob.cluster.watch import bundle
from vaejob.config import ClusterConfig
from vaejob.errors import ClusterError

PLACE_SECONDS = 20
"""For places that the cluster has room for; longer, and no one node has room for a worker."""
ANSWER_SECONDS = 900


class OnRay:
    """Actors in the bundles of a placement group, as Ray Train places its workers."""

    def __init__(self, config: ClusterConfig, group: PlacementGroup | None, places: Places) -> None:
        self.places = places
        self.names = [f"worker {rank}" for rank in range(places.placed)]
        self._actors: list[Any] = []
        for rank in range(places.placed):
            assert group is not None, places
            there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            self._actors.append(
                ray.remote(_Examined)
                .options(num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, scheduling_strategy=there)
                .remote()
            )

    def each(self, probe: Probe, settings: list[dict[str, Any]]) -> list[Any]:
        asked = [actor.tried.remote(probe, own) for actor, own in zip(self._actors, settings, strict=True)]
        return [_answer(one) for one in asked]

    def ask(self, rank: int, probe: Probe, **settings: Any) -> Any:
        return _answer(self._actors[rank].tried.remote(probe, settings))


class _Examined:
    """One worker's process while it is examined."""

    def tried(self, probe: Probe, settings: dict[str, Any]) -> Any:
        return tried(probe, settings)


@contextmanager
def workers_on(config: ClusterConfig) -> Iterator[OnRay]:
    """As many workers as find room, up to the most that are asked for; their places are given back at the end.

    Raises ClusterError if there is no cluster.
    """
    with cluster_of(config):
        error = ""
        try:
            wait_for_room(config)
        except ClusterError as failure:
            error = str(failure)
        group, placed = _placed(config)
        if not error and placed < config.least_workers:
            error = (
                f"cluster.workers is {config.workers}: the cluster has room for them in all, but no node has enough for "
                f"one of {config.cpus_per_worker} CPUs and {config.gpus_per_worker} GPUs"
            )
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
        head = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
        try:
            yield OnRay(config, group, Places(placed, config.least_workers, len(nodes), gpus, error, head))
        finally:
            if group is not None:
                remove_placement_group(group)


def _placed(config: ClusterConfig) -> tuple[PlacementGroup | None, int]:
    """Places for the most workers that have some, and how many these are."""
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    room = min(int(free.get(kind, 0) // share) for kind, share in bundle(config).items())
    for workers in sorted({min(config.most_workers, room), min(config.least_workers, room), 1}, reverse=True):
        if 0 < workers <= room:
            group = placement_group([bundle(config)] * workers, strategy="PACK")
            if group.wait(PLACE_SECONDS):
                return group, workers
            remove_placement_group(group)
    return None, 0


def _answer(asked: Any) -> Any:
    try:
        return ray.get(asked, timeout=ANSWER_SECONDS)
    except ray.exceptions.RayError as error:
        return Failed(f"the worker gave no answer: {_reason(error)}")


def _reason(error: ray.exceptions.RayError) -> str:
    """Ray's own words, of which the last line of a worker's traceback is the one that tells."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("ModuleNotFoundError", "ImportError"))]
    return named[0] if named else first_line(error)
