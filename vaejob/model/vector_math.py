"""Elementary functions of the CPU, made ready before any two threads ask for them at once."""

import torch

VECTOR_MATH = ("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc")  # fmt: skip
"""What torch hands to Intel's vector library (ATen/cpu/vml.h)."""


def settle_vector_math() -> None:
    """Calls each function of the vector library once, on one number, in single and double precision.

    The library looks for a function's kernel when it is first called. Two threads that share that call may race,
    and one then runs a kernel of half the digits over its whole part, silently, that once: a probability wrong by 2e-5
    in the first batch of about one process in a hundred on a busy machine (pytorch issue 188792, oneMKL 2024.2).
    One number is one thread's work.
    """
    for precision in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=precision, device="cpu")
        for function in VECTOR_MATH:
            getattr(torch, function)(number)
