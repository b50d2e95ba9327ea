"""What tests share: one real S3 server for the whole session, and a fresh bucket in it for each test that asks."""

import secrets
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tests.s3.server import HOW_TO_INSTALL, S3Server, client, running, which_server

WHOLE_JOBS = ("tests/job/", "tests/faults/")

# No test asserts how long something takes.
settings.register_profile("vaejob", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vaejob")


def pytest_report_header() -> str:
    match which_server():
        case "ceph":
            return "S3 server: Ceph radosgw"
        case "moto":
            return f"S3 server: moto, a mock, since radosgw is not installed ({HOW_TO_INSTALL})"
        case _:
            return f"S3 server: none; tests that need one will fail ({HOW_TO_INSTALL})"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return OneClusterAtATime(config, log)


class OneClusterAtATime(LoadScopeScheduling):  # type: ignore[misc]
    """In several processes (pytest -n), whole jobs stay in one of them: two cores have room for one Ray cluster at a time."""

    def _split_scope(self, nodeid: str) -> str:
        return "whole jobs" if nodeid.startswith(WHOLE_JOBS) else nodeid


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """The compiler cannot trace the checks of shapes that tests put around every function; jobs run without them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real server on this machine's loopback; it does not touch the environment."""
    kind = which_server()
    if kind is None:
        pytest.fail(f"no S3 server to test against: {HOW_TO_INSTALL}, or pip install 'moto[s3]' flask flask-cors")
    with running(kind, tmp_path_factory.mktemp("s3") / "server") as server:
        yield server


@pytest.fixture(scope="session")
def s3_env(s3_server: S3Server) -> Iterator[S3Server]:
    """The server, with the standard AWS_* variables set to it, for this process and those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_SKIP_SIGNATURE"):
            patch.delenv(name, raising=False)
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        yield s3_server


@pytest.fixture
def s3_bucket(s3_env: S3Server) -> str:
    """The address of a new, empty bucket."""
    name = f"vaejob-{secrets.token_hex(6)}"
    client(s3_env).create_bucket(Bucket=name)
    return f"s3://{name}"
