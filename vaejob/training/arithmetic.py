"""What float32 means while a model computes, the same on every machine."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUDNN: Any = torch.backends.cudnn


@contextmanager
def own_arithmetic() -> Iterator[None]:
    """While it is open float32 has all of its 24 bits, and numbers below the smallest normal one are zero; also a decorator.

    Of GPUs: torch lets cuDNN round what float32 convolutions multiply to the 11 bits of TF32, for all threads of a process.
    Of CPUs, in the calling thread and in those that it starts meanwhile: the weights of IWAE's samples, e^-90 and less, make
    subnormals in every gradient, whose larger terms round all of 1e-38 away; their products take 13 times as long one by one,
    200 times in matrices. Afterwards the caller's arithmetic is what it was.
    """
    subnormals_were_zero = sys.float_info.min / 2 == 0
    of_cudnn = CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision
    torch.set_flush_denormal(True)
    _set_cudnn("ieee", "ieee")
    try:
        yield
    finally:
        torch.set_flush_denormal(subnormals_were_zero)
        _set_cudnn(*of_cudnn)


def _set_cudnn(conv: str, rnn: str) -> None:
    """torch refuses to tell its older switch, which sets both, where it disagrees with them; the compiler asks for it."""
    CUDNN.allow_tf32 = "tf32" in (conv, rnn)
    CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = conv, rnn
