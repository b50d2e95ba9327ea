"""A job's state as named tensors: split over ranks to be written, put together by any number of ranks to be read.

States hold tensors and nothing else (safetensors): loading one executes nothing.
"""

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import safetensors
import safetensors.torch
import torch
import torch.distributed
from torch import Tensor, nn

from vaejob.config import OptimizerConfig
from vaejob.data.ahead import map_ahead
from vaejob.data.progress import counter
from vaejob.errors import CheckpointError
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.storage import Bucket
from vaejob.storage.patience import Patience
from vaejob.storage.retry import StoreDown
from vaejob.storage.runs import Record, StateFile, read_state_file, state_key, write_state_file
from vaejob.training.stability import GradientGuard
from vaejob.training.step import make_optimizer
from vaejob.training.worker import Worker


@dataclass
class TrainState:
    """What a checkpoint holds and a resumed job puts back."""

    scorer: NegativeELBO
    optimizer: torch.optim.Optimizer
    guard: GradientGuard
    averaged: NegativeELBO | None
    """The same model with the averaged weights, where optimizer.ema asks for them."""
    images_seen: int = 0

    @classmethod
    def begin(
        cls, config: OptimizerConfig, scorer: NegativeELBO, *, device: torch.device | str = "cpu"
    ) -> "TrainState":
        """Of a model on the device whose weights are the initial ones."""
        averaged = copy.deepcopy(scorer).requires_grad_(False) if config.ema else None
        return cls(scorer, make_optimizer(config, scorer), GradientGuard(config, device=device), averaged)

    @property
    def best(self) -> NegativeELBO:
        """The model to be judged and used."""
        return self.averaged or self.scorer

    def tensors(self) -> dict[str, Tensor]:
        """model.NAME, ema.NAME, optimizer.NAME/SLOT and guard.NAME."""
        tensors = {f"model.{name}": tensor for name, tensor in self.scorer.state_dict().items()}
        if self.averaged is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        for name, parameter in self.scorer.named_parameters():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}/{slot}"] = torch.as_tensor(value)
        return tensors | {f"guard.{name}": tensor for name, tensor in self.guard.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor], *, images_seen: int) -> None:
        """Puts a state back. Raises CheckpointError if its tensors are not those of this model."""
        _load_weights(self.scorer, _named(tensors, "model."))
        if self.averaged is not None:
            _load_weights(self.averaged, _named(tensors, "ema."))
        slots: dict[str, dict[str, Tensor]] = {}
        for key, tensor in _named(tensors, "optimizer.").items():
            name, _, slot = key.rpartition("/")
            slots.setdefault(name, {})[slot] = tensor
        _refuse_other_slots(self.scorer, slots)
        order = [name for name, _ in self.scorer.named_parameters()]
        moments = {order.index(name): values for name, values in slots.items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.guard.load(_named(tensors, "guard."))
        self.images_seen = images_seen


def load_best(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """The weights of a state to judge and use the model by: averaged ones where it has them. Raises CheckpointError."""
    _load_weights(model, _named(tensors, "ema.") or _named(tensors, "model."))


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if differing := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = differing[0]
        raise CheckpointError(f"tensor {name} has shape {found.get(name)}, this model needs {expected.get(name)}")
    model.load_state_dict(weights)


def _refuse_other_slots(model: nn.Module, slots: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The optimiser would take moments of any shape, and fail in its next step."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, values in slots.items():
        if name not in shapes:
            raise CheckpointError(f"tensor optimizer.{name} is of no weight of this model")
        for slot, value in values.items():
            if value.dim() and tuple(value.shape) != shapes[name]:
                raise CheckpointError(
                    f"tensor optimizer.{name}/{slot} has shape {tuple(value.shape)}, this model needs {shapes[name]}"
                )


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


def read_state(
    run: Bucket, record: Record, *, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """Every tensor of a recorded state, on the CPU. Raises CheckpointError for anything but what was recorded.

    on_progress: hears from any thread how many bytes of how many have come.
    """
    tensors: dict[str, Tensor] = {}
    read = partial(read_state_file, run, on_bytes=counter(on_progress, total=sum(file.size for file in record.files)))
    for file, data in zip(record.files, map_ahead(read, record.files), strict=True):
        try:
            tensors.update(safetensors.torch.load(data))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{run.url}/{file.key} is no safetensors file: {error}") from None
    return tensors


def state_of_first(tensors: Mapping[str, Tensor] | None, worker: Worker) -> dict[str, Tensor] | None:
    """Rank 0's tensors, or None, on the CPU of every rank, so that a bucket is read once by however many; all ranks call it."""
    own = None if tensors is None else {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if (form := worker.told_by_first(own)) is None:
        return None
    state = {}
    for name, (shape, dtype) in form.items():
        tensor = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name]
        if worker.world_size > 1 and tensor.numel():
            on_device = tensor.to(worker.device)
            torch.distributed.broadcast(on_device.view(-1).view(torch.uint8), src=0)
            tensor = on_device.cpu()
        state[name] = tensor
    return state


class StateWriter:
    """Writes one rank's share of states beside training, one at a time, in their order.

    At most two are held: one that is being written, and the next. While the bucket is out of reach the next one gives way
    to a newer, so that training goes on; all ranks keep the newest.
    """

    def __init__(self, run: Bucket, *, attempt: str, rank: int, world_size: int, outage_seconds: float = 0) -> None:
        self._run = run
        self._attempt, self._rank, self._world_size = attempt, rank, world_size
        self._patience = Patience(outage_seconds, on_outage=self._went_down, on_return=self._came_back)
        self._changed = threading.Condition()
        self._waiting: tuple[int, dict[str, Tensor]] | None = None
        self._spare: dict[str, Tensor] = {}
        """Copies that are written, or were given up."""
        self._finishing = self._down = False
        self._saved: dict[int, StateFile] = {}
        self._notes: list[str] = []
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._write_all, name="state-writer", daemon=True)
        self._thread.start()

    def save(self, images_seen: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies the share off the device; waits only if two states are under way and the bucket can be reached.

        Raises what went wrong with an earlier one.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None or self._down or self._failure)
            self._raise_failure()
            if self._waiting is not None:
                (skipped, self._spare), self._waiting = self._waiting, None
                self._notes.append(
                    f"no checkpoint at {skipped:,} images: the bucket was out of reach until the next one"
                )
            spare, self._spare = self._spare, {}
        share = share_of(tensors, rank=self._rank, world_size=self._world_size)
        copied = {name: _copied(tensor.detach(), spare.get(name)) for name, tensor in share.items()}
        with self._changed:
            self._waiting = (images_seen, copied)
            self._changed.notify_all()

    def saved(self) -> dict[int, StateFile]:
        """Files that were finished since this was last asked, by their images_seen."""
        with self._changed:
            files, self._saved = self._saved, {}
        return files

    def notes(self) -> tuple[str, ...]:
        """What a person should be told, since this was last asked."""
        with self._changed:
            notes, self._notes = self._notes, []
        return tuple(notes)

    def finish(self) -> None:
        """Waits until everything that was kept is in the bucket. Raises what went wrong."""
        with self._changed:
            self._finishing = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _went_down(self, error: StoreDown) -> None:
        with self._changed:
            self._down = True
            self._changed.notify_all()

    def _came_back(self, seconds: float) -> None:
        with self._changed:
            self._down = False

    def _write_all(self) -> None:
        try:
            while (taken := self._take()) is not None:
                images_seen, share = taken
                data = safetensors.torch.save(share)
                key = state_key(images_seen, attempt=self._attempt, rank=self._rank, world_size=self._world_size)
                file = self._patience.outlast(partial(write_state_file, self._run, key, data))
                with self._changed:
                    self._saved[images_seen], self._spare = file, share
        except Exception as error:  # raised again on the training thread
            with self._changed:
                self._failure, self._waiting = error, None
                self._changed.notify_all()

    def _take(self) -> tuple[int, dict[str, Tensor]] | None:
        """The next share, once there is one; None if none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._finishing)
            if self._waiting is None:
                return None
            taken, self._waiting = self._waiting, None
            self._changed.notify_all()
        return taken


def _copied(tensor: Tensor, spare: Tensor | None) -> Tensor:
    """On the CPU; into the memory of an earlier copy if there is one, whose pages need not be fetched again."""
    if spare is None or spare.shape != tensor.shape or spare.dtype != tensor.dtype:
        return tensor.to("cpu", copy=True)
    return spare.copy_(tensor)
