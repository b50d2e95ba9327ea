"""The first call of an elementary function is never shared by two threads (pytorch issue 188792)."""

import subprocess
import sys

import torch

from vaejob.model.vector_math import VECTOR_MATH

WATCHED = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

first = {}

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if arguments and isinstance(arguments[0], torch.Tensor):
            name = function.overloadpacket.__name__.rstrip("_")
            first.setdefault((name, arguments[0].dtype), arguments[0].numel())
        return function(*arguments, **(keywords or {}))

with Watch():
    import vaejob.likelihood.pixels
for (name, precision), numbers in first.items():
    print(name, precision, numbers)
"""


def test_whoever_imports_a_likelihood_has_called_each_function_on_one_number_first() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=120, check=True)
    seen = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert {(name, str(precision), "1") for name in VECTOR_MATH for precision in (torch.float32, torch.float64)} <= seen
