"""VDVAE's published code, out of a clone that VDVAE_DIR names. Nothing of it is in this repository.

What it needs a cluster of GPUs for is spared it: MPI, DDP, torchvision; apex's fused AdamW is torch's fused AdamW.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def published() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Its modules train, vae and vae_helpers."""
    folder = os.environ.get("VDVAE_DIR")
    if not folder:
        raise SystemExit("the peer is missing: set VDVAE_DIR to a clone of github.com/openai/vdvae")
    apex = ModuleType("apex.optimizers")
    apex.FusedAdam = partial(torch.optim.AdamW, fused=True)  # type: ignore[attr-defined]
    shims = {**{name: MagicMock() for name in ("mpi4py", "imageio", "data", "apex")}, "apex.optimizers": apex}
    for name, shim in shims.items():
        sys.modules.setdefault(name, shim)
    sys.path.append(folder)
    import train
    import vae
    import vae_helpers

    train.get_cpu_stats_over_ranks = on_host
    return train, vae, vae_helpers


def on_host(stats: dict[str, Any]) -> dict[str, float]:
    """As theirs with one rank, without a detour over a GPU."""
    values = torch.stack([torch.as_tensor(value).detach().float() for value in stats.values()]).tolist()
    return dict(zip(stats, values, strict=True))


def hyperparameters(**own: Any) -> Any:
    """Those of its CIFAR-10 run, with others laid over them."""
    from hps import Hyperparams, cifar10  # its folder's, imported with its train

    chosen = Hyperparams()
    chosen.update(cifar10)
    chosen.update(
        image_size=32, image_channels=3, bottleneck_multiple=0.25, no_bias_above=64, num_mixtures=10, grad_clip=200.0,
        skip_threshold=400.0, adam_beta1=0.9, adam_beta2=0.9, custom_width_str="",
    )  # fmt: skip
    chosen.update(own)
    return chosen


def epochs(published_train: ModuleType, chosen: Any, vae: Any, ema: Any, pictures: Tensor) -> Callable[[], int]:
    """An epoch of its loop: its loader, its scaling of pixels, its step with EMA, clipping and schedule."""
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=chosen.wd, lr=chosen.lr, betas=(0.9, 0.9), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda _: 1.0)
    data = TensorDataset(pictures.permute(0, 2, 3, 1).contiguous())
    chosen.ema_rate = torch.as_tensor(chosen.ema_rate)

    def epoch() -> int:
        sampler = DistributedSampler(data, num_replicas=1, rank=0)
        for (x,) in DataLoader(data, batch_size=chosen.n_batch, drop_last=True, sampler=sampler):
            inputs = x.float()
            target = inputs.clone()
            inputs.add_(-120.63838).mul_(1 / 64.16736)
            target.add_(-127.5).mul_(1 / 127.5)
            published_train.training_step(chosen, inputs, target, vae, ema, optimizer, 0)
            scheduler.step()
        return len(data) // chosen.n_batch * chosen.n_batch

    return epoch
