"""What SkyPilot 0.14 refuses in a task, of the fields that a training job has use for."""

import difflib
from collections.abc import Iterator
from typing import Any

from vaejob.cluster.manifests.problem import Problem, within

_FIELDS = ("name", "workdir", "num_nodes", "resources", "envs", "secrets", "managed_secrets", "file_mounts", "volumes", "setup",
           "run", "service", "pool", "config", "event_callback", "inputs", "outputs", "volume_mounts", "api_server_access")  # fmt: skip
_RESOURCES = ("accelerators", "accelerator_args", "any_of", "autostop", "cloud", "cpus", "disk_size", "disk_tier",
              "ephemeral_storage", "image_id", "infra", "instance_type", "job_recovery", "labels", "local_disk", "max_hourly_cost",
              "memory", "network_tier", "ordered", "ports", "priority", "priority_class", "region", "use_spot", "volumes",
              "zone")  # fmt: skip
_RECOVERY = ("strategy", "max_restarts_on_errors", "recover_on_exit_codes")


def task_problems(task: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with a task's form."""
    yield from _unknown(task, _FIELDS, "")
    nodes = task.get("num_nodes", 1)
    if not isinstance(nodes, int) or nodes < 1:
        yield Problem("num_nodes", f"is {nodes!r}; it must be 1 or more")
    for field in ("run", "setup", "name"):
        if not isinstance(task.get(field, ""), str | None):
            yield Problem(field, f"is {task[field]!r}; it must be a text")
    resources = task.get("resources") or {}
    if not isinstance(resources, dict):
        yield Problem("resources", f"is {resources!r}; it must be a mapping")
        return
    yield from _unknown(resources, _RESOURCES, "resources.")
    recovery = resources.get("job_recovery")
    if isinstance(recovery, dict):
        yield from _unknown(recovery, _RECOVERY, "resources.job_recovery.")
        codes = recovery.get("recover_on_exit_codes", [])
        for code in codes if isinstance(codes, list) else [codes]:
            if not isinstance(code, int) or not 0 <= code <= 255:
                yield Problem("resources.job_recovery.recover_on_exit_codes", f"has {code!r}; it must be 0 to 255")
    spot = within(resources, "use_spot")
    if spot is not None and not isinstance(spot, bool):
        yield Problem("resources.use_spot", f"is {spot!r}; it must be true or false")


def _unknown(mapping: dict[str, Any], fields: tuple[str, ...], prefix: str) -> Iterator[Problem]:
    for key in sorted(map(str, mapping.keys() - set(fields))):
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
        yield Problem(f"{prefix}{key}", f"is no field here{f'; did you mean {near[0]}?' if near else ''}")
