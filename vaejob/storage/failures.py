"""What an object store's exception says: one line, a cause to count by, and whether trying again can help."""

import re

from obstore.exceptions import (
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)

from vaejob.errors import BucketError, ObjectMissing
from vaejob.storage.bucket import NotOffered
from vaejob.storage.retry import ours

_BUCKET_GONE = {"NoSuchBucket", "ContainerNotFound", "ResourceNotFound"}
_OTHER_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
_REFUSED = (PermissionDeniedError, UnauthenticatedError)
_UNUSABLE = (ValueError, InvalidPathError, NotSupportedError, UnknownConfigurationKeyError)


class ShortReply(Exception):  # noqa: N818 - never leaves this package
    """Worth asking again for the same bytes."""


class Replaced(Exception):  # noqa: N818 - never leaves this package
    """Another object has this key now: all of it must be read again."""


def verdict(error: Exception, *, bucket: str, name: str) -> Exception | None:
    """The error to raise at once; None if the same request may succeed later."""
    code, status = code_of(error), status_of(error)
    if ours(error) or isinstance(error, (TypeError, AssertionError)):
        return error
    if isinstance(error, NotImplementedError) or status == 501:
        return NotOffered(f"{bucket} cannot do this: {one_line(error)}")
    if code in _BUCKET_GONE or "specified bucket does not exist" in str(error):
        return BucketError(f"{bucket} does not exist")
    if isinstance(error, FileNotFoundError) and code != "NoSuchUpload":  # then a write in parts must begin anew
        return ObjectMissing(f"{name}: there is no such object")
    if code == "AccessDenied":  # to this object; other codes refuse the caller whatever the object
        return BucketError(f"{name}: access denied ({code})")
    if isinstance(error, _REFUSED) or status in (401, 403):
        return BucketError(f"{bucket} refuses: access denied{f' ({code})' if code else ''}")
    if code in _OTHER_REGION or "incorrectly configured region" in str(error):
        return BucketError(f"{bucket} is in another region; set AWS_REGION to that of the bucket")
    if code == "InvalidBucketName":
        return BucketError(f"{bucket} is no name that a bucket can have")
    if isinstance(error, _UNUSABLE):
        return BucketError(f"{name}: {one_line(error)}")
    return None


def status_of(error: Exception) -> int | None:
    """The HTTP status of the reply; None if there was no reply."""
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else None


def code_of(error: Exception) -> str:
    """The store's own word for what went wrong, such as NoSuchBucket; empty if it said none."""
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found[1] if found else ""


def one_line(error: Exception) -> str:
    status, code = status_of(error), code_of(error)
    if status or code:
        return f"the store answered {f'HTTP {status} ' if status else ''}{code}".rstrip()
    said, _, debug = str(error).partition("\n\nDebug source")
    known = _transport_failure(debug)
    return known or " ".join(re.sub(r"^.* - |^Generic \w+ error: ", "", said).split())[:200] or type(error).__name__


def cause_of(error: Exception) -> str:
    """A few words that are the same for every failure of the kind, such as '503 SlowDown' or 'connection refused'."""
    status, code = status_of(error), code_of(error)
    if status or code:
        return f"{status or ''} {code}".strip()
    match error:
        case ShortReply():
            return "short reply"
        case Replaced():
            return "object replaced"
        case _:
            return _transport_failure(str(error).partition("\n\nDebug source")[2]).lower() or type(error).__name__


def _transport_failure(debug: str) -> str:
    """What broke below HTTP, in a few words; empty if that is not known."""
    if "TimedOut" in debug:
        return "the reply took too long" if "kind: Body" in debug else "no answer in time"
    if "IncompleteMessage" in debug or "IncompleteBody" in debug:
        return "the connection was closed before the end of the reply"
    if "dns error" in debug:
        return "the host of the endpoint is not known"
    system = re.search(r'message: "([^"]+)"', debug)
    return system[1] if system else ""
