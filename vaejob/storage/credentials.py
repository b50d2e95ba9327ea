"""Finds credentials in settings and manifests, where everybody who may look at a cluster would read them."""

import re
from collections.abc import Iterator
from typing import Any

_NAME = re.compile(
    r"(^|_)(SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIALS?|APIKEY|(ACCESS|API|PRIVATE|ACCOUNT|STORAGE|SECRET)_KEY)(_|$)"
)
_OF_A_PLACE = re.compile(r"_(FILE|PATH|DIR|NAME|MODE|URI|URL|ARN|ENDPOINT)$")
_ASSIGNED = re.compile(
    r"""(?<![A-Za-z0-9_.])([A-Za-z][A-Za-z0-9_.-]{0,63})["']?[ \t]{0,9}[:=][ \t]{0,9}["']?(?=([^\s"'&,{}]{1,200}))"""
)
_NO_SECRET = re.compile(r"\s*(null|~|\{\}|\[\]|true|false|\d{0,5})\s*", re.IGNORECASE)
_SHAPES = (
    (re.compile(r"[a-z0-9]://[^/\s:@]{0,200}:[^/\s@]{1,200}@"), "a password in an address"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"), "an AWS access key"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"), "a private key"),
    (re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{30}|xox[abprs]-[A-Za-z0-9-]{10})"), "an access token"),
    (re.compile(r"[?&](X-Amz-Signature|X-Goog-Signature|sig)=", re.IGNORECASE), "a signed address"),
)


def credentials_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, what it is) of everything that looks like a credential; never the credential itself."""
    if isinstance(value, dict):
        named = value.get("name")
        if isinstance(named, str) and isinstance(value.get("value"), str) and _is_secret(named, value["value"]):
            yield f"{path}.value", f"a value of {named}"
        for key, part in value.items():
            inner = f"{path}.{key}" if path else str(key)
            if isinstance(part, str) and _is_secret(str(key), part):
                yield inner, f"a value of {key}"
            else:
                yield from credentials_in(part, inner)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from credentials_in(part, f"{path}[{index}]")
    elif isinstance(value, str):
        yield from ((path, what) for what in _in_text(value))


def _in_text(text: str) -> Iterator[str]:
    for shape, what in _SHAPES:
        if shape.search(text):
            yield what
            return
    for name, value in _ASSIGNED.findall(text):
        if _is_secret(name, value):
            yield f"a value of {name}"
            return


def _is_secret(name: str, value: str) -> bool:
    """Whether a setting of this name holds a credential itself, not the place of one nor a variable's name."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").replace(".", "_").upper()
    if name.startswith(("/", "~")):
        return False  # a path
    if not _NAME.search(words) or _OF_A_PLACE.search(words):
        return False
    return not _NO_SECRET.fullmatch(value) and not value.lstrip("\"'").startswith(("$", "<"))
