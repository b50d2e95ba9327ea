"""Where probes run: in the places of a job's workers, or in this process for a job without a cluster."""

from collections.abc import Callable
from typing import Any, Protocol

from vaejob.cluster.doctor.results import Failed, Places
from vaejob.errors import UserError, VaejobError

Probe = Callable[..., Any]


class Workers(Protocol):
    """The processes that probes run in. What a probe raises comes back as Failed."""

    names: list[str]
    """What people call each, in the order of ranks."""
    places: Places

    def each(self, probe: Probe, settings: list[dict[str, Any]]) -> list[Any]:
        """What the probe returns on every rank, all at the same time; each is called with its own settings."""
        ...

    def ask(self, rank: int, probe: Probe, **settings: Any) -> Any:
        """What the probe returns on one rank."""
        ...


def tried(probe: Probe, settings: dict[str, Any]) -> Any:
    """What the probe returns, or Failed with the line to say."""
    try:
        return probe(**settings)
    except VaejobError as error:
        return Failed(str(error), wrong_input=isinstance(error, UserError))
    except Exception as error:
        line = (str(error).strip() or "no more is known").splitlines()[0]
        return Failed(f"{type(error).__name__}: {line}")


class Here:
    """This process, the only worker of a job with cluster.workers=0."""

    def __init__(self) -> None:
        self.names = ["this process"]
        self.places = Places(placed=1, asked=1, nodes=1, gpus_in_cluster=0)

    def each(self, probe: Probe, settings: list[dict[str, Any]]) -> list[Any]:
        return [tried(probe, settings[0])]

    def ask(self, rank: int, probe: Probe, **settings: Any) -> Any:
        return tried(probe, settings)
