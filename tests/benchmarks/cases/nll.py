"""Held-out likelihood by 5,000 importance samples, against pythae's get_nll; scoring.py says more of it."""

import argparse
import contextlib
import io
from collections.abc import Callable

from tests.benchmarks.cases.case import Found
from tests.benchmarks.loop import pack_digits
from tests.benchmarks.paired import Turn, in_this_process
from tests.benchmarks.scoring import CALLS, binary, peer_model, prove_equal, theirs, trained

IMAGES, SAMPLES = 10, 5000


def nll(options: argparse.Namespace, folder: str) -> Found:
    data = options.data or pack_digits(folder, images=20_000)
    model, scored = trained(data, data, folder, argparse.Namespace(images=IMAGES, trained_images=20_000))
    peer, levels = peer_model(model), binary(scored)

    def counted(work: Callable[[], object]) -> Turn:
        def passed() -> int:
            work()
            return IMAGES

        return in_this_process(passed)

    passes = {
        str(call): counted(lambda call=call: theirs(peer, levels, samples=SAMPLES, **call._asdict()))  # type: ignore[misc]
        for call in CALLS
    }
    for name, precision, compiled in (
        ("ours fp32", "fp32", False), ("ours fp32 compiled", "fp32", True), ("ours bf16 compiled", "bf16", True),
    ):  # fmt: skip
        passes[name] = counted(
            lambda how=(precision, compiled): model.evaluate(scored, samples=SAMPLES, precision=how[0], compiled=how[1])
        )
    found = Found(
        case="nll",
        title=f"Held-out likelihood by {SAMPLES:,} importance samples, the dense model",
        peer=str(CALLS[0]),
        goals={name: 8.0 for name in passes if name.startswith("ours")},
    )
    with contextlib.redirect_stdout(io.StringIO()) as told:
        prove_equal(model, peer, scored)
    found.proofs = [told.getvalue().strip()]
    return found.measure(passes, options)
