"""The likelihood of a data set by plain Ray tasks: each scores its part, the driver adds up."""

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
) -> LikelihoodTotals:
    """Totals over a data set, the same for any number of workers, which need not all find room at once.

    Raises what was wrong with the input, ClusterError when the cluster is too small or lost.
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
        parts = [
            score.remote(address, data_address, str(images_seen), samples, precision, compiled, rank, workers, cluster)
            for rank in range(workers)
        ]
        totals = sum(_gathered(parts), LikelihoodTotals())
    if totals.images != expected:
        raise ClusterError(f"the workers scored {totals.images} images, the manifest of {data_address} has {expected}")
    return totals


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
    )


def _gathered(parts: list["ray.ObjectRef[LikelihoodTotals]"]) -> list[LikelihoodTotals]:
    try:
        return ray.get(parts)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the cluster was lost: {str(error).splitlines()[0]}; repeat the command") from error
