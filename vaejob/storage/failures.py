"""What an object store's exception says: one line, and whether trying again can help."""

import re

from obstore.exceptions import (
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)

from vaejob.errors import BucketError, ObjectMissing
from vaejob.storage.retry import ours

_BUCKET_GONE = {"NoSuchBucket", "ContainerNotFound", "ResourceNotFound"}
_OTHER_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
_REFUSED = (PermissionDeniedError, UnauthenticatedError)
_UNUSABLE = (ValueError, InvalidPathError, NotSupportedError, UnknownConfigurationKeyError)


def verdict(error: Exception, *, bucket: str, name: str) -> Exception | None:
    """The error to raise at once; None if the same request may succeed later."""
    code, status = code_of(error), status_of(error)
    if ours(error) or isinstance(error, (TypeError, AssertionError)):
        return error
    if code in _BUCKET_GONE or "specified bucket does not exist" in str(error):
        return BucketError(f"{bucket} does not exist")
    if isinstance(error, FileNotFoundError) and code != "NoSuchUpload":  # then a write in parts must begin anew
        return ObjectMissing(f"{name}: there is no such object")
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
    said, _, debug = str(error).partition("\n\nDebug source")
    if (status := status_of(error)) or code_of(error):
        return f"the store answered {f'HTTP {status} ' if status else ''}{code_of(error)}".rstrip()
    system = re.search(r'message: "([^"]+)"', debug)
    cause = (
        "no answer in time"
        if "TimedOut" in debug
        else system[1]
        if system
        else re.sub(r"^.* - |^Generic \w+ error: ", "", said)
    )
    return " ".join(cause.split())[:200] or type(error).__name__
