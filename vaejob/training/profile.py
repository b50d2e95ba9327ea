"""Where the time of a rank's steps goes: the loop's stages by the clock, and a trace of a few steps; both into the run.

    with stage("forward"):
        terms = model(...)

A stage costs nothing to speak of while no profile runs. A few steps pass first; the next few are traced as they are; the
rest are clocked, and then a GPU is waited for at the end of each stage, so that what it does is counted where it was asked
for. A stage inside another is counted for itself alone.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

from vaejob.config import JobConfig
from vaejob.errors import BucketError
from vaejob.storage import Bucket
from vaejob.storage.profiles import profile_key
from vaejob.training.worker import Worker

Stage = Literal[
    "data wait", "copy", "noise", "forward", "backward", "communication", "guard", "optimizer", "average", "totals",
    "report", "held-out", "checkpoint",
]  # fmt: skip
"""noise: draws for the images, binarisation among them. communication: what of it the backward pass does not hide, and the
ranks' questions to one another. guard: the gradient's norm, and what follows from it. average: of weights (optimizer.ema)."""

STEPS_BEFORE, STEPS_TRACED = 8, 4

_NOTHING = nullcontext()
_running: "Profile | None" = None


def stage(name: Stage) -> AbstractContextManager[Any]:
    """Marks a part of the loop; of the training thread alone."""
    return _NOTHING if _running is None else _running.stage(name)


@contextmanager
def profiled(
    job: JobConfig, worker: Worker, run: Bucket, optimizer: torch.optim.Optimizer, *, attempt: str
) -> Iterator["Profile | None"]:
    """While it is open, stages are told to a profile if the job asks for one."""
    global _running
    if not job.training.profile:
        yield None
        return
    profile = _running = Profile(run, worker, optimizer, attempt=attempt)
    try:
        yield profile
    finally:
        _running = None
        profile.end()


class Profile:
    """Of one rank in one attempt, step by step as each asks for its data."""

    def __init__(self, run: Bucket, worker: Worker, optimizer: torch.optim.Optimizer, *, attempt: str) -> None:
        self._run, self._worker = run, worker
        self._key = profile_key(attempt=attempt, rank=worker.rank, world_size=worker.world_size)
        self._on_gpu = worker.device.type == "cuda"
        self._last_gradient = LastGradient(optimizer, on_gpu=self._on_gpu) if worker.world_size > 1 else None
        self._in_optimizer = ExitStack()
        self._hooks = (
            optimizer.register_step_pre_hook(self._enters_optimizer),
            optimizer.register_step_post_hook(self._leaves_optimizer),
        )
        self._tracer: torch.profiler.profile | None = None
        self._trace = b""
        self._steps = -1
        self._began: float | None = None
        self._clocks: dict[Stage, Clock] = {}
        self._inside: list[float] = []
        """Of each stage that is open, the seconds of stages inside it."""

    def stage(self, name: Stage) -> AbstractContextManager[Any]:
        if name == "data wait" and not self._inside:
            self._next_step()
        if self._tracer is not None:
            return record_function(name)
        return _NOTHING if self._began is None else _Clocked(self, name)

    def finish(self) -> list[str]:
        """Writes what was found; what is to be said of it. The clock stops here."""
        ended = time.perf_counter()
        steps = self._clock("totals").times
        if self._began is None or not steps:
            return [f"no profile: it takes more than {STEPS_BEFORE + STEPS_TRACED} steps"]
        found = self._breakdown(ended - self._began, steps)
        try:
            self._run.write(f"{self._key}.trace.json.gz", self._trace)
            self._run.write(f"{self._key}.json", json.dumps(found, indent=1).encode())
        except BucketError as error:
            return [f"the profile could not be written: {error}"]
        if self._worker.rank > 0:
            return []
        most = sorted(found["stages"], key=lambda row: -row["share"])[:4]
        shares = ", ".join(f"{row['stage']} {row['share']:.0%}" for row in most)
        return [f"profile of {steps} steps of {1e3 * found['seconds_per_step']:.3g} ms in {self._key}.json: {shares}"]

    def end(self) -> None:
        """However the loop was left."""
        if self._tracer is not None:
            self._tracer.stop()
        for hook in (*self._hooks, *(self._last_gradient.hooks if self._last_gradient else ())):
            hook.remove()

    def _enters_optimizer(self, *_: Any) -> None:
        self._in_optimizer.enter_context(self.stage("optimizer"))

    def _leaves_optimizer(self, *_: Any) -> None:
        self._in_optimizer.close()

    def _next_step(self) -> None:
        self._steps += 1
        if self._steps == STEPS_BEFORE:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
            self._tracer = torch.profiler.profile(activities=activities)
            self._tracer.start()
        elif self._steps == STEPS_BEFORE + STEPS_TRACED:
            assert self._tracer is not None
            self._tracer.stop()
            self._trace, self._tracer = _chrome_trace(self._tracer), None
            self._began = time.perf_counter()

    def entered(self) -> float:
        self._inside.append(0.0)
        return time.perf_counter()

    def left(self, name: Stage, entered: float) -> None:
        hidden = self._last_gradient.seconds_since() if name == "backward" and self._last_gradient else 0.0
        if self._on_gpu:
            torch.cuda.synchronize()
        spent = time.perf_counter() - entered
        inside = self._inside.pop()
        if self._inside:
            self._inside[-1] += spent
        self._clock(name).add(spent - inside - hidden)
        if hidden:
            self._clock("communication").add(hidden)

    def _clock(self, name: Stage) -> "Clock":
        return self._clocks.setdefault(name, Clock())

    def _breakdown(self, seconds: float, steps: int) -> dict[str, Any]:
        counted = {name: (clock.seconds, clock.times) for name, clock in self._clocks.items()}
        between = seconds - sum(spent for spent, _ in counted.values())
        rows = [(name, *counted[name]) for name in get_args(Stage) if name in counted] + [
            ("between them", between, steps)
        ]
        return {
            "rank": self._worker.rank,
            "world_size": self._worker.world_size,
            "device": str(self._worker.device),
            "steps": steps,
            "seconds": seconds,
            "seconds_per_step": seconds / steps,
            "stages": [
                {"stage": name, "seconds_per_step": spent / steps, "share": spent / seconds, "times": times}
                for name, spent, times in rows
            ],
            "trace": f"{self._key}.trace.json.gz",
        }


class Clock:
    """Of one stage."""

    def __init__(self) -> None:
        self.seconds, self.times = 0.0, 0

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.times += 1


class _Clocked:
    """One passage of a stage."""

    __slots__ = ("_entered", "_name", "_profile")

    def __init__(self, profile: Profile, name: Stage) -> None:
        self._profile, self._name = profile, name

    def __enter__(self) -> None:
        self._entered = self._profile.entered()

    def __exit__(self, *_: object) -> None:
        self._profile.left(self._name, self._entered)


class LastGradient:
    """When a backward pass has made the last weight's gradient: what it does from then on is wait for the other ranks."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, on_gpu: bool) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.hooks = [weight.register_post_accumulate_grad_hook(self._made) for weight in weights]
        self._event = _event() if on_gpu else None
        self._at = 0.0

    def _made(self, _: Tensor) -> None:
        if self._event is not None:
            self._event.record()
        else:
            self._at = time.perf_counter()

    def seconds_since(self) -> float:
        """By the device's own clock."""
        if self._event is None:
            return time.perf_counter() - self._at
        now = _event()
        now.record()
        now.synchronize()
        milliseconds: float = self._event.elapsed_time(now)
        return milliseconds / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _chrome_trace(tracer: torch.profiler.profile) -> bytes:
    """As Perfetto and TensorBoard read it, gzipped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        tracer.export_chrome_trace(str(path))
        return path.read_bytes()
