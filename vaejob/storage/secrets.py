"""Keeps credentials out of addresses, errors and logs: they belong in the environment, or to a machine's role."""

import os
import re

from vaejob.errors import UserError

_HIDDEN = "***"
_MADE_BY_MACHINES = 16
"""Letters of a credential that nobody chose: shorter ones may be parts of plain words."""

_NAME = re.compile(r"(^|_)(SECRET|PASSWORD|TOKEN|CREDENTIALS?|KEY|SAS|SIGNATURE)(_|$)")
_OF_A_PLACE = re.compile(r"_(FILE|PATH|DIR|NAME|MODE|URI|URL|ARN)$")

_LOGIN = re.compile(r"""(?<=://)(?:[^\s/:@\[\]"'<>]*:(?!\d{1,5}(?:[/?#\s]|$))[^\s"'<>]*|[^\s/:@"'<>]+)(?=@)""")
_SIGNED = re.compile(
    r"""([?&](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|GoogleAccessId|Signature|sig|"""
    r"""(?:access_|security_)?token)=)[^&\s"'<>)]+""",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"""((?:authorization|x-amz-security-token|x-amz-copy-source-server-side-encryption-customer-key)["']?\s*[:=]\s*["']?)"""
    r"""[^"'\n]+""",
    re.IGNORECASE,
)
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")


def redacted(text: str) -> str:
    """The text with every credential in it replaced by '***': those of the environment by value, others by shape."""
    for name, value in os.environ.items():
        if len(value) >= _MADE_BY_MACHINES and _NAME.search(name.upper()) and not _OF_A_PLACE.search(name.upper()):
            text = text.replace(value, _HIDDEN)
    return _KEY_ID.sub(_HIDDEN, _HEADER.sub(rf"\1{_HIDDEN}", _SIGNED.sub(rf"\1{_HIDDEN}", _LOGIN.sub(_HIDDEN, text))))


def redact(error: BaseException) -> None:
    """Takes the credentials out of an exception's words and out of those it came from: tracebacks end up in logs."""
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        here.args = tuple(redacted(part) if isinstance(part, str) else part for part in here.args)
        here = here.__cause__ or here.__context__


def refuse_credentials(address: str) -> None:
    """Raises UserError, which does not repeat them, if the address of a place carries a login or a signature."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme in ("file", "memory"):
        return
    login, at, place = rest.rpartition("@")
    if ":" in rest.partition("/")[0] or (at and "/" not in login):
        what, shown = "a login", f"{_HIDDEN}@{place.partition('?')[0]}" if at else _HIDDEN
    elif _SIGNED.search(rest):
        what, shown = "a signature", f"{rest.partition('?')[0]}?{_HIDDEN}"
    else:
        return
    raise UserError(
        f"{scheme}://{shown} carries {what}, which all would see who read the run or its log; take it out, and put "
        "credentials into the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )
