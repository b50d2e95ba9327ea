"""Renders a job for a target, and refuses what the target would refuse."""

from collections.abc import Callable

from vaejob.cluster.manifests.check import check_text
from vaejob.cluster.manifests.kuberay import render_kuberay
from vaejob.cluster.manifests.plan import Plan, plan_of
from vaejob.cluster.manifests.ray_up import render_ray_up
from vaejob.cluster.manifests.skypilot import render_skypilot
from vaejob.cluster.manifests.slurm import render_slurm
from vaejob.config import JobConfig
from vaejob.errors import ConfigError

TARGETS: dict[str, Callable[[Plan], dict[str, str]]] = {
    "kuberay": render_kuberay,
    "slurm": render_slurm,
    "ray-up": render_ray_up,
    "skypilot": render_skypilot,
}


def render(target: str, job: JobConfig) -> dict[str, str]:
    """Texts of the files that run the job on a target, by name, in the order to apply them; the same for the same job.

    Raises ConfigError, in one line, for what the target's controllers would refuse, and for credentials.
    """
    files = TARGETS[target](plan_of(job))
    for name, text in files.items():
        if name.endswith(".yaml"):
            found = [
                (checked.name, problem) for checked in check_text(text, source=name) for problem in checked.problems
            ]
            if found:
                (document, problem), more = found[0], len(found) - 1
                raise ConfigError(
                    f"{target} would refuse {document}: {problem.path} {problem.message}{f', and {more} more' if more else ''}"
                )
    return files
