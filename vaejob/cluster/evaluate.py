"""The likelihood of a data set by plain Ray tasks: each scores its part, the driver adds up."""

from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

from vaejob.cluster.join import cluster_of, wait_for_room
from vaejob.config import ClusterConfig, Precision
from vaejob.data.batches import open_data
from vaejob.errors import ClusterError
from vaejob.metrics import LikelihoodTotals
from vaejob.storage import absolute, open_bucket
from vaejob.storage.runs import choose_record


def evaluate_on_cluster(
    address: str,
    data_address: str,
    *,
    checkpoint: str,
    samples: int,
    precision: Precision,
    compiled: bool,
    workers: int,
    cluster: ClusterConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LikelihoodTotals:
    """Totals over a data set, the same for any number of workers, which need not all find room at once.

    on_progress hears each second how many images of how many are scored. Raises what was wrong with the input, ClusterError when the cluster is too small or lost.
    """
    address, data_address = absolute(address), absolute(data_address)
    # Decided once: while the run goes on, "latest" may be another checkpoint for a later task.
    images_seen = choose_record(open_bucket(address), checkpoint).images_seen
    expected = open_data(data_address).manifest.images
    with cluster_of(cluster):
        wait_for_room(cluster.model_copy(update={"workers": 1}))
        score = _score.options(
            num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker, max_retries=cluster.max_failures
        )
        count: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Count).remote()
        settings = address, data_address, str(images_seen), samples, precision, compiled
        parts = [score.remote(*settings, rank, workers, cluster, count) for rank in range(workers)]
        totals = sum(_gathered(parts, lambda: on_progress(ray.get(count.total.remote()), expected)), LikelihoodTotals())
    if totals.images != expected:
        raise ClusterError(f"the workers scored {totals.images} images, the manifest of {data_address} has {expected}")
    on_progress(totals.images, expected)  # what the tasks told last may still be on its way to the count
    return totals


class _Count:
    """How many images the tasks have scored; one that is tried again begins its count anew."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def tell(self, rank: int, done: int) -> None:
        self._done[rank] = done

    def total(self) -> int:
        return sum(self._done.values())


@ray.remote
def _score(
    address: str,
    data_address: str,
    checkpoint: str,
    samples: int,
    precision: Precision,
    compiled: bool,
    rank: int,
    world_size: int,
    cluster: ClusterConfig,
    count: Any,
) -> LikelihoodTotals:
    import torch

    from vaejob.loaded import load

    torch.set_num_threads(cluster.cpus_per_worker)
    model = load(address, checkpoint=checkpoint, device="cuda" if cluster.gpus_per_worker else "cpu")
    return model.evaluate(
        open_data(data_address),
        samples=samples,
        precision=precision,
        compiled=compiled,
        rank=rank,
        world_size=world_size,
        on_progress=lambda done: count.tell.remote(rank, done),
    )


def _gathered(
    parts: list["ray.ObjectRef[LikelihoodTotals]"], each_second: Callable[[], None]
) -> list[LikelihoodTotals]:
    waiting = parts
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1.0)
            ray.get(done)  # what went wrong is raised at once
            each_second()
        return ray.get(parts)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the cluster was lost: {str(error).splitlines()[0]}; repeat the command") from error
