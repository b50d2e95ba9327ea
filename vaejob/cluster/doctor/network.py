"""How fast the workers add up their gradients: an all-reduce by the same library as in training, and nothing else."""

import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed

from vaejob.cluster.doctor.results import Summing

TIMEOUT_SECONDS = 60
MOST_BYTES = 256 << 20
TIMES = 3


def free_port() -> int:
    """Of this machine, for the others to meet at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def sum_together(*, rank: int, world_size: int, meet_at: tuple[str, int], size: int, on_gpu: bool) -> Summing:
    """The best of some all-reduces of `size` bytes of float32, which all ranks take part in.

    meet_at: host and port of rank 0. Raises RuntimeError where they do not reach one another.
    """
    backend = "nccl" if on_gpu else "gloo"
    values = torch.ones(max(1, min(size, MOST_BYTES) // 4), device="cuda" if on_gpu else "cpu")
    torch.distributed.init_process_group(
        backend,
        init_method=f"tcp://{meet_at[0]}:{meet_at[1]}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    try:
        times = [_timed_sum(values) for _ in range(1 + TIMES)]
    finally:
        torch.distributed.destroy_process_group()
    return Summing(values.nbytes, min(times[1:]), world_size, backend)


def socket_settings() -> str:
    """What the environment tells gloo and NCCL about the network."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_NET")
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def _timed_sum(values: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.distributed.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
