"""What float32 means while a model computes, the same on every machine."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_arithmetic() -> Iterator[None]:
    """While it is open float32 has all of its 24 bits, and numbers below the smallest normal one are zero; also a decorator.

    Of GPUs: torch lets cuDNN round what float32 convolutions multiply to the 11 bits of TF32, for all threads of a process.
    Of CPUs, in the calling thread and in those that it starts meanwhile: the weights of IWAE's samples, e^-90 and less, make
    subnormals in every gradient, whose larger terms round all of 1e-38 away; their products take 13 times as long one by one,
    200 times in matrices. Afterwards the caller's arithmetic is what it was.
    """
    subnormals_were_zero, rounding = sys.float_info.min / 2 == 0, torch.backends.cudnn.allow_tf32
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_flush_denormal(subnormals_were_zero)
        torch.backends.cudnn.allow_tf32 = rounding
