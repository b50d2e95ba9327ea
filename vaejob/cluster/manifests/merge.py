"""Lays a patch over a document: a JSON merge patch (RFC 7386), but items of lists that have names are told apart by them."""

from typing import Any

NAMES = ("mountPath", "groupName", "name")


def merged(document: Any, patch: Any) -> Any:
    """The document with the patch laid over it; neither is changed."""
    if isinstance(document, list) and patch and isinstance(patch, list) and (name := _common_name(document + patch)):
        return _merged_items(document, patch, name)
    if not isinstance(patch, dict):
        return patch
    result = dict(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def _common_name(items: list[Any]) -> str | None:
    """The key that every item of two lists goes by, as a volume's mount goes by its path and a container by its name."""
    return next((name for name in NAMES if all(isinstance(item, dict) and name in item for item in items)), None)


def _merged_items(items: list[Any], patches: list[Any], name: str) -> list[Any]:
    changes = {patch[name]: patch for patch in patches}
    known = [item[name] for item in items]
    changed = [merged(item, changes[item[name]]) if item[name] in changes else item for item in items]
    return changed + [merged(None, patch) for key, patch in changes.items() if key not in known]
