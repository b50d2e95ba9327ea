"""Uploads in parts that were broken off: S3 bills them, and no listing of objects shows them.

The client that everything else goes through cannot list them, boto3 can: where it is installed they are ended at each start
of a job, below the run's own address. Elsewhere, and for other stores, a rule of the bucket does it.
"""

import os
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec

from vaejob.storage.client import ENDPOINTS, Place


def end_broken_uploads(place: Place, *, older_than_s: float) -> int:
    """How many were ended; 0 also where the store refuses or does not answer: this is housekeeping, and may be done later."""
    if place.scheme != "s3" or not find_spec("boto3"):
        return 0
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    began_before, ended = datetime.now(UTC) - timedelta(seconds=older_than_s), 0
    with suppress(BotoCoreError, ClientError):
        client = boto3.client(
            "s3",
            endpoint_url=next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None),
            config=Config(connect_timeout=5, read_timeout=15, retries={"total_max_attempts": 2}),
        )
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=place.bucket, Prefix=place.folder)
        for upload in (upload for page in pages for upload in page.get("Uploads", [])):
            if upload["Initiated"] < began_before:
                client.abort_multipart_upload(Bucket=place.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                ended += 1
    return ended
