"""What is wrong with a manifest, and the rules of form that all kinds share."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
DNS_NAME = re.compile(rf"{DNS_LABEL.pattern}(\.{DNS_LABEL.pattern})*")
GENERATED = "x2x2x"
"""As long as what the API server appends to metadata.generateName."""
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


class Problem(NamedTuple):
    """One thing that the API server, a controller or a kubelet would refuse or drop."""

    path: str
    message: str


def within(value: Any, path: str) -> Any:
    """What is at spec.containers.0.name of nested mappings and lists; None where nothing is."""
    for part in path.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def items(value: Any, path: str) -> list[tuple[str, dict[str, Any]]]:
    """(path, item) of the list of mappings at a path; empty where there is none."""
    found = within(value, path)
    if not isinstance(found, list):
        return []
    return [(f"{path}[{index}]", item) for index, item in enumerate(found) if isinstance(item, dict)]


def ray_name_problems(document: dict[str, Any], *, longest: int) -> Iterator[Problem]:
    """KubeRay names pods and services after the object: RFC 1035, and room left for what it appends."""
    metadata = document.get("metadata") or {}
    name = str(metadata.get("name") or f"{metadata.get('generateName') or ''}{GENERATED}")
    if len(name) > longest:
        kind = document.get("kind")
        yield Problem("metadata.name", f"has {len(name)} characters; KubeRay takes at most {longest} for a {kind}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield Problem("metadata.name", f"is {name!r}; it must be a-z, 0-9 and dashes, a letter first and no dash last")


def label_problems(labels: Any, path: str) -> Iterator[Problem]:
    """Names and values that Kubernetes takes for labels."""
    for key, value in labels.items() if isinstance(labels, dict) else ():
        prefix, slash, name = str(key).rpartition("/")
        if (slash and not DNS_NAME.fullmatch(prefix)) or not _LABEL_NAME.fullmatch(name):
            yield Problem(path, f"{key!r} is no name of a label")
        if not isinstance(value, str):
            yield Problem(f"{path}.{key}", f"is {value!r}, no text; quote it")
        elif value and not _LABEL_NAME.fullmatch(value):
            yield Problem(
                f"{path}.{key}",
                f"is {value!r}; at most 63 letters, digits, '-', '_' and '.', a letter or digit at both ends",
            )


def metadata_problems(document: dict[str, Any]) -> Iterator[Problem]:
    """What every object of Kubernetes must have."""
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        yield Problem("metadata", "is missing; it must hold at least a name")
        return
    name = metadata.get("name")
    if not isinstance(name, str) or not name:
        if not metadata.get("generateName"):
            yield Problem("metadata.name", f"is {name!r}; it must be a text" if "name" in metadata else "is missing")
    elif len(name) > 253 or not DNS_NAME.fullmatch(name):
        yield Problem("metadata.name", f"is {name!r}; it must be a-z, 0-9, dashes and dots, at most 253 characters")
    namespace = metadata.get("namespace", "default")
    if not (isinstance(namespace, str) and len(namespace) <= 63 and DNS_LABEL.fullmatch(namespace)):
        yield Problem("metadata.namespace", f"is {namespace!r}; it must be a-z, 0-9 and dashes, at most 63 characters")
    yield from label_problems(metadata.get("labels"), "metadata.labels")
    annotations = metadata.get("annotations")
    for key, value in annotations.items() if isinstance(annotations, dict) else ():
        if not isinstance(value, str):
            yield Problem(f"metadata.annotations.{key}", f"is {value!r}, no text; quote it")
