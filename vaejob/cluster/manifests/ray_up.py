"""A cluster of virtual machines on AWS as `ray up` makes it, to which the job is then submitted."""

import shlex
from typing import Any

from vaejob.cluster.manifests.documents import to_yaml
from vaejob.cluster.manifests.patches import patched
from vaejob.cluster.manifests.plan import Plan, check_reachable, image_of
from vaejob.errors import ConfigError

DISK_GB = 200
TOKEN = "~/.ray/auth_token"


def render_ray_up(plan: Plan) -> dict[str, str]:
    """The cluster; raises ConfigError for a missing image or machine, or data that only one node would have."""
    cluster = patched({"ray-up": _cluster(plan)}, plan.deploy.patches).get("ray-up")
    if cluster is None:
        raise ConfigError("deploy.patches leaves the ray-up cluster out, which is all there is")
    check_reachable(plan, [])
    return {"cluster.yaml": to_yaml(cluster, COMMENTS)}


def _cluster(plan: Plan) -> dict[str, Any]:
    deploy = plan.deploy
    if not deploy.instance_type:
        raise ConfigError("deploy.instance_type is missing; it must be the workers' machine, such as g6e.12xlarge")
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/tmp/ray_auth_token", **deploy.env}
    options = [f"--env {name}={shlex.quote(value)}" for name, value in env.items()]
    start = "ulimit -n 65536; RAY_USAGE_STATS_ENABLED=0 ray start"
    return {
        "cluster_name": plan.name,
        "max_workers": plan.nodes,
        "provider": {"type": "aws", "region": deploy.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": image_of(plan),
            "container_name": "vaejob",
            "run_options": ["--ulimit nofile=65536:65536", "--ulimit memlock=-1", "--ipc=host", *options],
        },
        "file_mounts": {"/tmp/ray_auth_token": TOKEN},
        "available_node_types": {
            "head": {
                "resources": {"CPU": 0},
                "max_workers": 0,
                "node_config": _machine(plan, deploy.head_instance_type, spot=False),
            },
            "workers": {
                "resources": {},
                "min_workers": plan.nodes,
                "max_workers": plan.nodes,
                "node_config": _machine(plan, deploy.instance_type, spot=deploy.spot),
            },
        },
        "head_node_type": "head",
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }


def _machine(plan: Plan, instance_type: str, *, spot: bool) -> dict[str, Any]:
    profile, disk = plan.deploy.instance_profile, {"VolumeSize": DISK_GB, "VolumeType": "gp3", "Encrypted": True}
    return {
        "InstanceType": instance_type,
        **({"IamInstanceProfile": {"Arn": profile}} if profile else {}),
        **({"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {}),
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }


COMMENTS = {
    "": "ray get-auth-token --generate    once, on this machine\n"
    "ray up cluster.yaml\n"
    "ray dashboard cluster.yaml       in another terminal: http://127.0.0.1:8265 is the cluster's\n"
    "RAY_AUTH_MODE=token vaejob submit CONFIG --address http://127.0.0.1:8265 --follow\n"
    "ray down cluster.yaml            nothing else ends the machines",
    "docker.run_options": "NCCL and the loader share memory with nobody else's limits; registered memory needs memlock.",
    "file_mounts": "Only who has the token may run code on the cluster.",
    "available_node_types.head.resources": "No worker on the head: it holds the driver.",
    "available_node_types.workers.min_workers": "All of them from the beginning; a job of [least, most] workers starts when the least are there.",
    "available_node_types.head.node_config.IamInstanceProfile": "Access to the buckets by role; no keys on the machines.",
    "available_node_types.head.node_config.MetadataOptions": "Two hops, so that the container too gets the role's credentials.",
}
