"""A job's state as named tensors: split over ranks to be written, put together by any number of ranks to be read.

States hold tensors and nothing else (safetensors): loading one executes nothing.
"""

import queue
import threading
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vaejob.errors import CheckpointError
from vaejob.storage import Bucket
from vaejob.storage.runs import Record, StateFile, read_state_file, state_key, write_state_file


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and the optimiser's moments, by name: model.NAME and optimizer.NAME/SLOT."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}/{slot}"] = torch.as_tensor(value)
    return tensors


def load_state(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Puts a state back. Raises CheckpointError if its tensors are not those of this model."""
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if differing := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = differing[0]
        raise CheckpointError(f"tensor {name} has shape {found.get(name)}, this model needs {expected.get(name)}")
    model.load_state_dict(weights)
    if optimizer is None:
        return
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            name, _, slot = key.removeprefix("optimizer.").rpartition("/")
            slots.setdefault(name, {})[slot] = tensor
    order = [name for name, _ in model.named_parameters()]
    state = {order.index(name): values for name, values in slots.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def share_of(tensors: Mapping[str, Tensor], *, rank: int, world_size: int) -> dict[str, Tensor]:
    """The rank's share, near-equal in bytes: largest tensors first, each to the rank that has least."""
    loads = [0] * world_size
    share = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        lightest = loads.index(min(loads))
        loads[lightest] += tensor.nbytes
        if lightest == rank:
            share[name] = tensor
    return share


def read_state(run: Bucket, record: Record) -> dict[str, Tensor]:
    """Every tensor of a recorded state, on the CPU. Raises CheckpointError for anything but what was recorded."""
    tensors: dict[str, Tensor] = {}
    for file in record.files:
        try:
            tensors.update(safetensors.torch.load(read_state_file(run, file)))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{run.url}/{file.key} is no safetensors file: {error}") from None
    return tensors


class StateWriter:
    """Writes one rank's share of states beside training, one at a time, in their order."""

    def __init__(self, run: Bucket, *, attempt: str, rank: int, world_size: int) -> None:
        self._run = run
        self._attempt, self._rank, self._world_size = attempt, rank, world_size
        self._waiting = queue.Queue[tuple[int, dict[str, Tensor]] | None](maxsize=1)
        self._saved = queue.SimpleQueue[tuple[int, StateFile]]()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._write_all, name="state-writer", daemon=True)
        self._thread.start()

    def save(self, images_seen: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies the share off the device and queues it; waits only if two states are already under way.

        Raises what went wrong with an earlier one.
        """
        self._raise_failure()
        share = share_of(tensors, rank=self._rank, world_size=self._world_size)
        self._waiting.put((images_seen, {name: tensor.detach().to("cpu", copy=True) for name, tensor in share.items()}))

    def saved(self) -> dict[int, StateFile]:
        """Files that were finished since this was last asked, by their images_seen."""
        files = {}
        while not self._saved.empty():
            images_seen, file = self._saved.get()
            files[images_seen] = file
        return files

    def finish(self) -> None:
        """Waits until everything queued is in the bucket. Raises what went wrong."""
        self._waiting.put(None)
        self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            images_seen, share = item
            if self._failure is not None:
                continue
            key = state_key(images_seen, attempt=self._attempt, rank=self._rank, world_size=self._world_size)
            try:
                file = write_state_file(self._run, key, safetensors.torch.save(share))
            except Exception as error:  # raised again on the training thread
                self._failure = error
            else:
                self._saved.put((images_seen, file))
