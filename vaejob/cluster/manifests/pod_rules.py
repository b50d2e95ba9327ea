"""What Kubernetes refuses, or a kubelet does not start, in a pod of the right form."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from vaejob.cluster.manifests.problem import DNS_LABEL, Problem, items, label_problems, within

MANAGED_BY = "app.kubernetes.io/managed-by"
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
DEFAULT_GRACE_SECONDS = 30
_QUANTITY = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([KMGTPE]i|[numkMGTPE]?)")
_UNITS = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", start=1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}  # fmt: skip


def quantity(value: Any) -> Decimal | None:
    """A number of cores, bytes or devices such as 500m or 16Gi; None if it is none."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None or isinstance(value, bool):
        return None
    try:
        return Decimal(match[1]) * _UNITS[match[2]]
    except ArithmeticError:
        return None


def pod_problems(template: dict[str, Any], path: str, *, ray: bool = False) -> Iterator[Problem]:
    """The problems of a pod template at a path; in one of Ray's pods the first container runs Ray."""
    yield from label_problems(within(template, "metadata.labels"), f"{path}.metadata.labels")
    spec = f"{path}.spec"
    equal = ray and (within(template, "metadata.labels") or {}).get(MANAGED_BY) == "vaejob"
    volumes = [volume.get("name") for _, volume in items(template, "spec.volumes")]
    yield from _repeated(volumes, f"{spec}.volumes", "volume")
    containers = items(template, "spec.containers")
    names = [container.get("name") for _, container in [*containers, *items(template, "spec.initContainers")]]
    yield from _repeated(names, f"{spec}.containers", "container")
    for index, (place, container) in enumerate([*containers, *items(template, "spec.initContainers")]):
        inner = f"{path}.{place}"
        yield from _container_problems(container, inner, volumes=volumes)
        yield from _resource_problems(container, inner, equal=equal and index == 0)
        if ray and index == 0 and not container.get("image"):
            yield Problem(f"{inner}.image", "is missing; a Ray node needs one")
        yield from _grace_problems(template, container, inner)
        user = within(container, "securityContext.runAsUser")
        user = within(template, "spec.securityContext.runAsUser") if user is None else user
        non_root = [
            within(container, "securityContext.runAsNonRoot"),
            within(template, "spec.securityContext.runAsNonRoot"),
        ]
        if user == 0 and True in non_root:
            yield Problem(
                f"{inner}.securityContext", "has runAsUser 0 with runAsNonRoot: the kubelet will not start it"
            )


def _repeated(names: list[Any], path: str, what: str) -> Iterator[Problem]:
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield Problem(path, f"name the {what} {name!r} more than once")


def _container_problems(container: dict[str, Any], path: str, *, volumes: list[Any]) -> Iterator[Problem]:
    name = container.get("name")
    if isinstance(name, str) and (len(name) > 63 or not DNS_LABEL.fullmatch(name)):
        yield Problem(f"{path}.name", f"is {name!r}; it must be a-z, 0-9 and dashes, at most 63 characters")
    mounts = items(container, "volumeMounts")
    for place, mount in mounts:
        if mount.get("name") not in volumes:
            yield Problem(f"{path}.{place}.name", f"is {mount.get('name')!r}, which is no volume of this pod")
    yield from _repeated([mount.get("mountPath") for _, mount in mounts], f"{path}.volumeMounts", "path")
    for place, port in items(container, "ports"):
        label = port.get("name", "x")
        if not (isinstance(label, str) and len(label) <= 15 and DNS_LABEL.fullmatch(label)):
            yield Problem(
                f"{path}.{place}.name", f"is {label!r}; it must be a-z, 0-9 and dashes, at most 15 characters"
            )
        if isinstance(number := port.get("containerPort"), int) and not 0 < number < 65536:
            yield Problem(f"{path}.{place}.containerPort", f"is {number}; it must be 1 to 65535")
    for place, variable in items(container, "env"):
        if variable.get("value") and variable.get("valueFrom"):
            yield Problem(f"{path}.{place}", "has both value and valueFrom")


def _resource_problems(container: dict[str, Any], path: str, *, equal: bool) -> Iterator[Problem]:
    """equal: what Ray counts (the limit) and what the scheduler sets aside (the request) must be one, as in what we render."""
    requests, limits = (within(container, f"resources.{part}") or {} for part in ("requests", "limits"))
    for part, amounts in (("requests", requests), ("limits", limits)):
        for name, amount in amounts.items():
            if quantity(amount) is None or quantity(amount) < 0:  # type: ignore[operator]
                yield Problem(f"{path}.resources.{part}.{name}", f"is {amount!r}, no quantity such as 500m or 16Gi")
    for name in sorted({*requests, *limits}):
        # GPUs, EFA interfaces and the like; of hugepages and extended resources there is no more than was asked for.
        device = "/" in name or name.startswith("hugepages-")
        asked, limit = requests.get(name), limits.get(name)
        where = f"{path}.resources"
        if device and name not in limits:
            yield Problem(
                f"{where}.limits.{name}", f"is missing, and {asked!r} is requested; devices are given by their limit"
            )
        elif asked is None or limit is None or quantity(asked) is None or quantity(limit) is None:
            continue
        elif quantity(asked) > quantity(limit):  # type: ignore[operator]
            yield Problem(f"{where}.requests.{name}", f"is {asked!r}, more than the limit of {limit!r}")
        elif (device or equal) and quantity(asked) != quantity(limit):
            reason = (
                "for devices they must be equal" if device else "Ray counts the limit, the scheduler gives the request"
            )
            yield Problem(f"{where}.requests.{name}", f"is {asked!r} and the limit {limit!r}; {reason}")


def _grace_problems(template: dict[str, Any], container: dict[str, Any], path: str) -> Iterator[Problem]:
    """A node that drains for longer than its pod may take to end is killed before the workers have saved."""
    grace = within(template, "spec.terminationGracePeriodSeconds")
    grace = DEFAULT_GRACE_SECONDS if grace is None else grace
    for place, variable in items(container, "env"):
        drain = quantity(variable.get("value", "")) if variable.get("name") == DRAIN else None
        if drain is not None and isinstance(grace, int) and drain >= grace:
            yield Problem(
                f"{path}.{place}.value",
                f"is {variable['value']!r} with terminationGracePeriodSeconds {grace}; Ray must drain in less time than that",
            )
