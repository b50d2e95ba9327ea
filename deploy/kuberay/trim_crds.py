"""Makes the schemas that `vaejob render --check` reads out of the CRDs that a cluster would check with.

    python deploy/kuberay/trim_crds.py CRD.yaml... > vaejob/cluster/manifests/schemas/crds.json

with ray.io_{rayjobs,rayclusters,rayservices}.yaml of KubeRay's ray-operator/config/crd/bases and
monitoring.coreos.com_podmonitors.yaml of prometheus-operator, both Apache-2.0; NOTICE beside the result tells which.

What is left of a CRD: the JSON schema of what a person writes, with no descriptions and no status; unknown fields are
refused where the API server prunes them, and what has a default is not required, as there. Parts that occur more than
once, such as a pod's, are kept once.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

KEPT = ("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "required",
        "properties", "items", "additionalProperties", "anyOf", "allOf", "oneOf", "not", "format")  # fmt: skip
WORTH_SHARING_BYTES = 300
INT32 = {"minimum": -(2**31), "maximum": 2**31 - 1}


def trimmed(schema: Any) -> Any:
    """The parts of an OpenAPI v3 structural schema that decide, as a JSON schema."""
    if not isinstance(schema, dict):
        return schema
    result = {key: schema[key] for key in KEPT if key in schema}
    if result.pop("format", None) == "int32":
        result = INT32 | result
    for key in ("items", "additionalProperties", "not"):
        if key in result:
            result[key] = trimmed(result[key])
    for key in ("anyOf", "allOf", "oneOf"):
        if key in result:
            result[key] = [trimmed(part) for part in result[key]]
    if "properties" in result:
        result["properties"] = {name: trimmed(part) for name, part in sorted(schema["properties"].items())}
        if "type" in result and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    if "required" in result:
        result["required"] = [
            name for name in result["required"] if "default" not in schema["properties"].get(name, {})
        ]
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    return result


def written_by_a_person(crd: dict[str, Any]) -> tuple[str, Any]:
    """The name and the schema of a CRD's stored version, without status."""
    version = next(version for version in crd["spec"]["versions"] if version["storage"])
    schema = version["schema"]["openAPIV3Schema"]
    result = trimmed(schema)
    result["properties"]["status"] = {}
    kind = crd["spec"]["names"]["kind"]
    return f"{crd['spec']['group']}/{version['name']}/{kind}", result


def text_of(schema: Any) -> str:
    return json.dumps(schema, sort_keys=True, separators=(",", ":"))


def count(schema: Any, seen: Counter[str]) -> None:
    """How often each part worth sharing occurs."""
    if isinstance(schema, dict):
        if "type" in schema:
            text = text_of(schema)
            if len(text) >= WORTH_SHARING_BYTES:
                seen[text] += 1
                if seen[text] > 1:
                    return  # what is in it is shared with it
        for part in schema.values():
            count(part, seen)
    elif isinstance(schema, list):
        for part in schema:
            count(part, seen)


def shared(schema: Any, seen: Counter[str], parts: dict[str, Any], *, root: bool = False) -> Any:
    """The schema with every part that occurs more than once replaced by a reference into parts."""
    if isinstance(schema, list):
        return [shared(part, seen, parts) for part in schema]
    if not isinstance(schema, dict):
        return schema
    text = text_of(schema)
    if root or seen[text] < 2:
        return {key: shared(part, seen, parts) for key, part in schema.items()}
    name = hashlib.sha256(text.encode()).hexdigest()[:10]
    if name not in parts:
        parts[name] = None
        parts[name] = shared(schema, seen, parts, root=True)
    return {"$ref": f"#/$defs/{name}"}


def main(paths: list[str]) -> None:
    kinds = dict(written_by_a_person(yaml.load(Path(path).read_bytes(), yaml.CSafeLoader)) for path in paths)
    seen: Counter[str] = Counter()
    for schema in kinds.values():
        count(schema, seen)
    parts: dict[str, Any] = {}
    small = {kind: shared(kinds[kind], seen, parts, root=True) for kind in sorted(kinds)}
    lines = [f"{json.dumps(name)}:{text_of(part)}" for name, part in sorted((parts | small).items())]
    sys.stdout.write("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
