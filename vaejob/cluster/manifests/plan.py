"""What every target needs to know of a job: names, addresses, nodes and the driver's command, refused where they cannot be."""

import re
from typing import NamedTuple

from vaejob.cluster.manifests.ray_rules import LONGEST_NAME
from vaejob.config import DeployConfig, JobConfig
from vaejob.errors import ConfigError
from vaejob.storage import join
from vaejob.storage.credentials import credentials_in

LEAST_WAIT_SECONDS = 600.0
"""Nodes of a new cluster come up minutes apart; the driver waits at least this long for room."""
_DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")


class Plan(NamedTuple):
    """A job as a new cluster runs it."""

    name: str
    """What its objects are called."""
    run: str
    """The run's address, by which `vaejob logs` and `stop` find the job."""
    job: JobConfig
    """The configuration as the driver gets it there."""
    deploy: DeployConfig
    nodes: int
    """Machines that have workers."""
    gpus_per_node: int
    cpus_per_node: int


def plan_of(job: JobConfig) -> Plan:
    """Raises ConfigError for what no cluster can run: no workers, nodes that do not come out even, credentials."""
    _refuse_credentials(job)
    cluster, deploy = job.cluster, job.deploy
    if cluster.most_workers == 0:
        raise ConfigError("cluster.workers is 0, which trains in one process without Ray; a cluster needs at least 1")
    if cluster.most_workers % deploy.workers_per_node:
        raise ConfigError(
            f"deploy.workers_per_node is {deploy.workers_per_node}; it must divide cluster.workers, which is {cluster.workers}"
        )
    there = cluster.model_copy(update={"address": None, "wait_seconds": max(cluster.wait_seconds, LEAST_WAIT_SECONDS)})
    return Plan(
        name=deploy.name or job.run.name,
        run=join(job.run.bucket, job.run.name),
        job=job.model_copy(update={"cluster": there}),
        deploy=deploy,
        nodes=cluster.most_workers // deploy.workers_per_node,
        gpus_per_node=cluster.gpus_per_worker * deploy.workers_per_node,
        cpus_per_node=cluster.cpus_per_worker * deploy.workers_per_node,
    )


def image_of(plan: Plan) -> str:
    """The image; ConfigError if there is none, or only a tag of one."""
    image = plan.deploy.image
    if not image:
        raise ConfigError("deploy.image is missing; it must name the image that the nodes run, as NAME@sha256:DIGEST")
    if not plan.deploy.allow_tag and not _DIGEST.fullmatch(image):
        raise ConfigError(
            f"deploy.image is {image!r}, a tag, which may name another image tomorrow; it must be NAME@sha256:DIGEST "
            "(docker buildx imagetools inspect NAME:TAG tells it), or deploy.allow_tag=true"
        )
    return image


def check_kubernetes_name(plan: Plan) -> None:
    """KubeRay makes names of services out of the RayJob's: no dots, no capitals, and room for what it appends."""
    if re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", plan.name) and len(plan.name) <= LONGEST_NAME:
        return
    near = re.sub(r"[^a-z0-9]+", "-", plan.name.lower()).strip("-")
    near = (near if near[:1].isalpha() else f"run-{near}")[:LONGEST_NAME].strip("-")
    raise ConfigError(
        f"{'deploy' if plan.deploy.name else 'run'}.name is {plan.name!r} ({len(plan.name)} characters), which KubeRay refuses: "
        f"a-z, 0-9 and dashes, a letter first, at most {LONGEST_NAME}; set deploy.name={near}"
    )


def check_reachable(plan: Plan, folders: list[str]) -> None:
    """Refuses data and runs in folders that the nodes, which share only the given ones, would each have of their own."""
    job = plan.job
    for setting, address in (
        ("run.bucket", job.run.bucket),
        ("data.train", job.data.train),
        ("data.test", job.data.test),
    ):
        below = [folder for folder in folders if f"{address}/".startswith(f"{folder.rstrip('/')}/")]
        if address is not None and ("://" not in address or address.startswith(("file:", "memory:"))) and not below:
            raise ConfigError(
                f"{setting} is {address}, a folder that each node would have of its own; it must be an address such as s3://..."
            )


def _refuse_credentials(job: JobConfig) -> None:
    for path, what in credentials_in(job.model_dump()):
        raise ConfigError(
            f"{path} holds {what}; manifests are read by many: give the nodes a role (deploy.service_account_annotations, "
            "deploy.instance_profile), or name a Kubernetes Secret in deploy.secret_name"
        )
