"""How activations lie in memory, and which of them are kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def channels_last(h: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
    """The channels of a pixel side by side, as the fastest convolutions take them; what they give lies alike."""
    return h.contiguous(memory_format=torch.channels_last)


def when_needed(block: Callable[..., Any], *inputs: Any, recompute: bool) -> Any:
    """block(*inputs); with recompute only the inputs are kept, and backward computes all in between once more."""
    if not (recompute and torch.is_grad_enabled()):
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
