"""Opens the client of an object store from an address and the standard variables of the environment."""

import ipaddress
import os
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from vaejob.errors import UserError
from vaejob.storage.secrets import redact

if TYPE_CHECKING:  # obstore has these for type checkers only, and the last needs boto3
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import ClientConfig, RetryConfig

ObjectStore = S3Store | GCSStore | AzureStore

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class Place(NamedTuple):
    scheme: str
    bucket: str
    folder: str  # '' or ending with '/'

    @property
    def address(self) -> str:
        return f"{self.scheme}://{self.bucket}"


def parse_place(address: str) -> Place:
    """The bucket and the folder in it that an address names; UserError if it names no bucket."""
    scheme, _, rest = address.partition("://")
    bucket, _, folder = rest.partition("/")
    parts = [part for part in folder.split("/") if part]
    if not bucket or any(part in (".", "..") for part in parts):
        raise UserError(f"{address} names no place; it must read {scheme}://bucket or {scheme}://bucket/folder")
    return Place(scheme, bucket, "".join(f"{part}/" for part in parts))


def open_store(place: Place, *, request_s: float, retry_s: float) -> ObjectStore:
    """A client whose requests end within `request_s`, and which repeats them itself for `retry_s`; 0 for never."""
    options: ClientConfig = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=request_s)}
    retries: RetryConfig = {
        "max_retries": 1000 if retry_s else 0,
        "retry_timeout": timedelta(seconds=retry_s),
        "backoff": {"max_backoff": timedelta(seconds=2)},
    }
    try:
        match place.scheme:
            case "s3":
                return _open_s3(place, options, retries)
            case "gs":
                return GCSStore(place.bucket, client_options=options, retry_config=retries)
            case _:
                return AzureStore(place.bucket, client_options=options, retry_config=retries)
    except (BaseError, ValueError) as error:
        redact(error)
        said = " ".join(str(error).partition("\n\nDebug source")[0].split())
        raise UserError(f"{place.address} cannot be opened: {said}") from error


def _open_s3(place: Place, options: "ClientConfig", retries: "RetryConfig") -> S3Store:
    endpoint = _endpoint()
    credentials = _boto3_credentials(place)
    if endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        options["allow_http"] = urlsplit(endpoint).scheme == "http"
        return S3Store(
            place.bucket,
            endpoint=endpoint,
            region=region,
            credential_provider=credentials,
            client_options=options,
            retry_config=retries,
        )
    return S3Store(place.bucket, credential_provider=credentials, client_options=options, retry_config=retries)


def _endpoint() -> str | None:
    """Where requests go, if the environment says so; UserError for plain HTTP, which shows data and keys to a network."""
    name = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if name is None:
        return None
    endpoint = os.environ[name]
    if "@" in endpoint or "?" in endpoint:
        raise UserError(f"{name} carries a login or a signature; it must be https://host, without them")
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{name} is {endpoint}; it must read https://host or https://host:port")
    may_be_plain = _is_loopback(parts.hostname) or os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true"
    if parts.scheme == "http" and not may_be_plain:
        raise UserError(
            f"{name} is {endpoint}; it must be https, or AWS_ALLOW_HTTP=true must be set: anyone on the way could read "
            "and change what plain HTTP carries"
        )
    return endpoint


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _boto3_credentials(place: Place) -> "Boto3CredentialProvider | None":
    """Profiles, SSO and roles, where the key is not in the environment and boto3 is there to ask."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE") or not find_spec("boto3"):
        return None
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider()
    except ValueError as error:
        raise UserError(
            f"{place.address} needs credentials and there are none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE"
        ) from error
