"""Form: fields that a kind does not have, lacks, or holds with the wrong type, by the schemas the API server has."""

import difflib
import functools
import json
from collections.abc import Iterator
from importlib import resources, util
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from vaejob.cluster.manifests.problem import Problem

MOST_CHARACTERS = 60
_OPEN = {"type": "object"}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_FLAG = {"type": "boolean"}
_NAMED = {"type": "object", "properties": {"name": {"type": "string"}}}


_HEAD = {
    "apiVersion": {"type": "string"},
    "kind": {"type": "string"},
    "metadata": {"type": "object", "properties": {"labels": _OPEN, "annotations": _OPEN}},
}


def _kind(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": _HEAD | fields, "additionalProperties": False}


# Kinds of Kubernetes itself that are rendered; the schemas of the others are files.
_CORE = {
    "v1/ConfigMap": _kind(data=_TEXTS, binaryData=_TEXTS, immutable=_FLAG),
    "v1/ServiceAccount": _kind(
        automountServiceAccountToken=_FLAG,
        imagePullSecrets={"type": "array", "items": _NAMED | {"additionalProperties": False}},
        secrets={"type": "array", "items": _OPEN},
    ),
    "policy/v1/PodDisruptionBudget": _kind(
        status=_OPEN,
        spec={
            "type": "object",
            "properties": {
                "minAvailable": {"type": ["integer", "string"]},
                "maxUnavailable": {"type": ["integer", "string"]},
                "selector": {
                    "type": "object",
                    "properties": {"matchLabels": _TEXTS, "matchExpressions": {"type": "array", "items": _OPEN}},
                    "additionalProperties": False,
                },
                "unhealthyPodEvictionPolicy": {"enum": ["IfHealthyBudget", "AlwaysAllow"]},
            },
            "additionalProperties": False,
        },
    ),
}


@functools.cache
def _schemas() -> dict[str, Any]:
    """Of kinds, as GROUP/VERSION/KIND, and of the parts that they share."""
    text = resources.files("vaejob.cluster.manifests").joinpath("schemas/crds.json").read_text()
    schemas: dict[str, Any] = _CORE | json.loads(text)
    for name in schemas:
        if "/" in name:
            schemas[name]["properties"] |= _HEAD
    return schemas


@functools.cache
def _of_cluster_launcher() -> Any:
    """The schema that `ray up` itself checks with; Ray is looked up, not loaded."""
    ray = util.find_spec("ray")
    assert ray is not None
    assert ray.submodule_search_locations is not None
    return json.loads(Path(ray.submodule_search_locations[0], "autoscaler", "ray-schema.json").read_text())


@functools.cache
def _validator(kind: str) -> Any:
    if kind == "ray up":
        return Draft202012Validator(_of_cluster_launcher())
    return Draft202012Validator({"$ref": f"#/$defs/{_escaped(kind)}", "$defs": _schemas()})


def known_kinds() -> list[str]:
    return sorted(name for name in _schemas() if "/" in name)


def form_problems(document: dict[str, Any], kind: str) -> Iterator[Problem]:
    """What the schema of a kind, GROUP/VERSION/KIND or 'ray up', finds wrong."""
    errors = _validator(kind).iter_errors(document)
    yield from dict.fromkeys(problem for error in errors for problem in _said(error))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _said(error: ValidationError) -> Iterator[Problem]:
    """A validator's error as a path and few words; its own quotes all that it looked at."""
    path = path_text(error.absolute_path)
    found, schema = error.instance, error.schema
    assert isinstance(schema, dict)
    match error.validator:
        case "additionalProperties":
            for key in sorted(map(str, found.keys() - schema.get("properties", {}).keys())):
                near = difflib.get_close_matches(key, schema.get("properties", {}), n=1, cutoff=0.6)
                field = f"{path}.{key}" if path else key
                yield Problem(field, f"is no field here{f'; did you mean {near[0]}?' if near else ''}")
        case "required":
            for key in error.validator_value:
                if key not in found:
                    yield Problem(f"{path}.{key}" if path else key, "is missing")
        case "type":
            wanted = error.validator_value
            names = wanted if isinstance(wanted, str) else " or ".join(wanted)
            yield Problem(path, f"is {_short(found)}; it must be of type {names}")
        case "anyOf" | "oneOf" if {part.get("type") for part in error.validator_value} == {"integer", "string"}:
            yield Problem(path, f"is {_short(found)}; it must be an integer or a text")
        case "enum":
            yield Problem(path, f"is {_short(found)}; it must be one of {', '.join(map(str, error.validator_value))}")
        case "pattern":
            yield Problem(path, f"is {_short(found)}; it must match {_short(error.validator_value)}")
        case _:
            yield Problem(path, f"is {_short(found)}; it breaks {error.validator} {_short(error.validator_value)}")


def path_text(parts: Any) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."
