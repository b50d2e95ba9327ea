"""Where the time of a run's steps went: profile/ATTEMPT-RANKofSIZE.json of each rank, and a trace beside it."""

import json
import re
from typing import Any

from vaejob.errors import RunError
from vaejob.storage.bucket import Bucket

_OURS = re.compile(r"profile/(?P<attempt>.+)-\d+of\d+\.json")


def profile_key(*, attempt: str, rank: int, world_size: int) -> str:
    """Without .json, or .trace.json.gz."""
    return f"profile/{attempt}-{rank}of{world_size}"


def read_profile(run: Bucket) -> list[dict[str, Any]]:
    """What training.profile found in the newest attempt that has it, rank by rank; else empty.

    Raises RunError for a file of it that is damaged. Files of others are passed over.
    """
    ours = [match for key in run.keys("profile/") if (match := _OURS.fullmatch(key))]
    newest = max((match["attempt"] for match in ours), default="")
    found = [_read(run, match[0]) for match in ours if match["attempt"] == newest]
    return sorted(found, key=lambda of_rank: int(of_rank["rank"]))


def _read(run: Bucket, key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(run.read(key))
        _ = found["rank"], found["steps"], found["stages"], found["trace"]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{run.url}/{key} is no profile of vaejob, or is damaged") from None
    return found
