"""Checks manifests without a cluster: form by schema, the rules of the controllers that read them, and no credentials."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vaejob.cluster.manifests.documents import read_documents
from vaejob.cluster.manifests.problem import Problem, label_problems, metadata_problems, within
from vaejob.cluster.manifests.ray_rules import cluster_object_problems, job_problems, service_problems
from vaejob.cluster.manifests.schema import form_problems, known_kinds
from vaejob.cluster.manifests.sky import task_problems
from vaejob.storage.credentials import credentials_in

MOST_CONFIG_MAP_BYTES = 2**20


class Checked(NamedTuple):
    """One document, by the name that a person knows it by, and what is wrong with it."""

    name: str
    problems: list[Problem]
    known: bool
    """Whether its kind has a schema here; of others only name, labels and credentials are looked at."""


def check_text(text: str, *, source: str) -> list[Checked]:
    """Checks every document of a file. Raises UserError if it is not YAML."""
    return [check_document(document) for document in read_documents(text, source=source)]


def check_document(document: Any) -> Checked:
    """Checks an object of Kubernetes, a cluster of `ray up`, or a task of SkyPilot."""
    if not isinstance(document, dict):
        return Checked("document", [Problem("", f"is {type(document).__name__}; it must be a mapping")], known=False)
    if "apiVersion" in document or "kind" in document:
        name, problems, known = _check_object(document)
    elif "cluster_name" in document:
        name, problems, known = f"ray up {document['cluster_name']}", list(form_problems(document, "ray up")), True
        problems += [] if problems else list(_launcher_problems(document))
    elif "run" in document or "resources" in document:
        name, problems, known = f"SkyPilot {document.get('name', 'task')}", list(task_problems(document)), True
    else:
        return Checked(
            "document", [Problem("kind", "is missing; it must be an object, a cluster or a task")], known=False
        )
    if document.get("kind") != "Secret":
        problems += [
            Problem(path, f"holds {what}; everybody who can see the object reads it")
            for path, what in credentials_in(document)
        ]
    return Checked(name, problems, known)


def _check_object(document: dict[str, Any]) -> tuple[str, list[Problem], bool]:
    document = _without_nulls(document)
    version, kind = document.get("apiVersion"), document.get("kind")
    name = f"{kind} {within(document, 'metadata.name') or ''}".rstrip()
    if not (isinstance(version, str) and isinstance(kind, str)):
        missing = [key for key in ("apiVersion", "kind") if not isinstance(document.get(key), str)]
        return name, [Problem(key, "is missing; it must be a text") for key in missing], False
    problems = list(metadata_problems(document))
    full = f"{version}/{kind}"
    if full not in known_kinds():
        same_kind = [known for known in known_kinds() if known.endswith(f"/{kind}")]
        if same_kind and version.startswith("ray.io/"):
            problems.append(Problem("apiVersion", f"is {version}; it must be {same_kind[0].rpartition('/')[0]}"))
        return name, problems, False
    wrong_form = list(form_problems(document, full))
    # The rules read fields of the right type only.
    return name, problems + (wrong_form or list(_RULES[full](document))), True


def _without_nulls(value: Any) -> Any:
    """As the API server sees it, which drops fields that are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _launcher_problems(cluster: dict[str, Any]) -> Iterator[Problem]:
    """What `ray up` would say only after it has begun to make machines."""
    types = cluster.get("available_node_types") or {}
    if types and cluster.get("head_node_type") not in types:
        yield Problem("head_node_type", f"is {cluster.get('head_node_type')!r}; it must be one of {', '.join(types)}")
    for name, kind in types.items():
        if kind.get("min_workers", 0) > kind.get("max_workers", cluster.get("max_workers", 2)):
            yield Problem(
                f"available_node_types.{name}.min_workers", f"is {kind['min_workers']}, more than max_workers"
            )
    asked = sum(kind.get("min_workers", 0) for kind in types.values())
    if asked > cluster.get("max_workers", 2):
        yield Problem("max_workers", f"is {cluster.get('max_workers', 2)}; the node types ask for {asked} at least")


def _config_map_problems(document: dict[str, Any]) -> Iterator[Problem]:
    held = {**(document.get("data") or {}), **(document.get("binaryData") or {})}
    for key in held:
        if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", key):
            yield Problem(f"data.{key}", "is no name of a file: letters, digits, '-', '_' and '.'")
    size = sum(len(key) + len(value.encode()) for key, value in held.items())
    if size > MOST_CONFIG_MAP_BYTES:
        yield Problem("data", f"has {size} bytes; a ConfigMap takes at most {MOST_CONFIG_MAP_BYTES}")


def _budget_problems(document: dict[str, Any]) -> Iterator[Problem]:
    spec = document.get("spec") or {}
    if (spec.get("minAvailable") is None) == (spec.get("maxUnavailable") is None):
        yield Problem("spec", "must have one of minAvailable and maxUnavailable")
    for name in ("minAvailable", "maxUnavailable"):
        amount = spec.get(name)
        if (isinstance(amount, int) and amount < 0) or (isinstance(amount, str) and not re.fullmatch(r"\d+%", amount)):
            yield Problem(f"spec.{name}", f"is {amount!r}; it must be 0 or more, or a percentage such as 50%")
    yield from label_problems(within(spec, "selector.matchLabels"), "spec.selector.matchLabels")


def _no_more_problems(document: dict[str, Any]) -> Iterator[Problem]:
    return iter(())


_RULES: dict[str, Callable[[dict[str, Any]], Iterator[Problem]]] = {
    "ray.io/v1/RayJob": job_problems,
    "ray.io/v1/RayCluster": cluster_object_problems,
    "ray.io/v1/RayService": service_problems,
    "v1/ConfigMap": _config_map_problems,
    "v1/ServiceAccount": _no_more_problems,
    "policy/v1/PodDisruptionBudget": _budget_problems,
    "monitoring.coreos.com/v1/PodMonitor": _no_more_problems,
}
