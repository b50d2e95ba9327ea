"""Lays deploy.patches over rendered documents."""

from typing import Any

from vaejob.cluster.manifests.merge import merged
from vaejob.config import Patch
from vaejob.errors import ConfigError


def patched(documents: dict[str, dict[str, Any]], patches: list[Patch]) -> dict[str, dict[str, Any]]:
    """The documents, by kind, with each patch laid over the one it names; a patch of null leaves that one out."""
    result = dict(documents)
    for index, patch in enumerate(patches):
        if patch.kind not in documents:
            continue  # of another target, for which the same configuration may be rendered
        if patch.kind not in result:
            raise ConfigError(f"deploy.patches[{index}] changes the {patch.kind}, which an earlier patch left out")
        if patch.merge is None:
            del result[patch.kind]
        else:
            result[patch.kind] = merged(result[patch.kind], patch.merge)
    return result
