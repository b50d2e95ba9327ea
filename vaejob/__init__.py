"""Trains likelihood-based variational autoencoders on images in object storage, on as many GPUs as a Ray cluster has.

Data flows one way; the type on each arrow is all that passes:

    bucket --bytes--> reader --encoded--> decode --uint8 CHW--> batches --uint8 BCHW--> model
      --posterior, pixel parameters--> likelihood --nats per image--> running totals (on the device)
      --totals per worker--> driver --one sum, one record--> bucket --> report, evaluate, sample, export
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from vaejob.config import JobConfig
from vaejob.errors import VaejobError
from vaejob.version import VERSION

if TYPE_CHECKING:
    import torch

    from vaejob.data.batches import DataSet
    from vaejob.loaded import LoadedModel
    from vaejob.training.worker import Event

__version__ = VERSION

__all__ = ["JobConfig", "VaejobError", "__version__", "load", "load_config", "open_data", "train"]

# torch, pyarrow and ray are loaded by the call that needs them, so that help and errors come at once.


def load_config(address: str, *overrides: str) -> JobConfig:
    """The job at a file, an address in a bucket, or a recipe's name, with 'section.key=value' laid over it."""
    from vaejob.jobfile import load_config

    return load_config(address, overrides)


def open_data(address: str) -> "DataSet":
    """Packed images at an address."""
    from vaejob.data.batches import open_data

    return open_data(address)


def load(address: str, *, checkpoint: str = "latest", device: "str | torch.device" = "cpu") -> "LoadedModel":
    """A trained model, from nothing but its run's address."""
    from vaejob.loaded import load

    return load(address, checkpoint=checkpoint, device=device)


def train(
    job: JobConfig,
    *,
    on_event: "Callable[[Event], None]" = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Trains, or continues, the job until it is done or should stop; the address of its run, which holds the rest."""
    from vaejob.run import begin, run_address, train_here

    token = begin(job)
    if token is not None:
        if job.cluster.workers == 0:
            train_here(job, on_event=on_event, should_stop=should_stop, token=token)
        else:
            from vaejob.cluster.driver import train_on_cluster

            train_on_cluster(job, on_event=on_event, should_stop=should_stop, token=token)
    return run_address(job)
