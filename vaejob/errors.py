"""The errors a user can act on: each is one line that names the thing, what was found and what would be right."""

STOPPED_STATUS = 85
"""Exit status of a job that was asked to stop and left a checkpoint: run the same command again to go on."""


class VaejobError(Exception):
    """Something a person can mend; the command line prints it as one line."""

    exit_status = 1


class UserError(VaejobError):
    """The input is wrong: a setting, an address, an image."""

    exit_status = 2


class ConfigError(UserError):
    """A setting is unknown, has a wrong value, or contradicts another."""


class DataError(UserError):
    """A source image, a shard or a manifest is missing, damaged or does not fit."""


class DataDamaged(DataError):  # noqa: N818 - a state of the data
    """Bytes are not those that a checksum was taken of; another read may bring them whole."""


class RunError(UserError):
    """A run is missing, belongs to another configuration, or holds nothing to continue from."""


class OutsideError(VaejobError):
    """Something outside this program failed: a bucket, a cluster, a network."""

    exit_status = 3


class BucketError(OutsideError):
    """A bucket does not exist, refuses, or does not answer."""


class ObjectMissing(BucketError):  # noqa: N818 - a state of the bucket; callers catch it by this name
    """No object has this key."""


class CheckpointError(OutsideError):
    """A record or a file of a state is gone or damaged."""


class ClusterError(OutsideError):
    """The Ray cluster is too small, unreachable, or lost."""
