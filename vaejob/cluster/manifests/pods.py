"""The pods of a job on Kubernetes: head, workers and submitter; not as root, nothing written but where a volume is."""

import math
from collections.abc import Sequence
from typing import Any

from vaejob.cluster.manifests.kube import Object, labels
from vaejob.cluster.manifests.plan import Plan, image_of
from vaejob.cluster.manifests.pod_rules import DRAIN

UID = 1000
CONFIG_FOLDER = "/etc/vaejob"
CONFIG_FILE = "job.yaml"
SCRATCH_GIB = 20
"""Disk of each node for Ray's logs and spilled objects, in /tmp."""
CORES_OF_RAY = 1
"""Cores of each worker node beside those of its workers, for Ray's own processes."""
GIB = 2**30
METRICS_PORTS = {"metrics": 8080, "as-metrics": 44217, "dash-metrics": 44227}
"""Of the node, the autoscaler and the dashboard; the last two only on the head."""
_HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001} | METRICS_PORTS


def drain_seconds(plan: Plan) -> int:
    """How long Ray lets workers save after SIGTERM; what is left of the grace is for Ray to end in."""
    grace = plan.deploy.grace_seconds
    return grace - min(30, max(10, grace // 4))


def head(plan: Plan, config_map: str) -> Object:
    """The driver's node: no worker on it, on a machine that is not taken back."""
    deploy = plan.deploy
    env = {"RAY_JOB_STOP_WAIT_TIME_S": str(deploy.grace_seconds)}
    if plan.gpus_per_node:
        env["NVIDIA_VISIBLE_DEVICES"] = "void"
    amounts = _amounts(cpus=deploy.head_cpus, memory_gib=deploy.head_memory_gib, disk_gib=SCRATCH_GIB)
    container = _ray_container(plan, "ray-head", amounts, env=env)
    container["ports"] = [{"name": name, "containerPort": port} for name, port in _HEAD_PORTS.items()]
    return _template(plan, "head", container, config_map, placement=_not_on_spot(plan))


def worker(plan: Plan, config_map: str) -> Object:
    """A node of workers_per_node workers."""
    deploy, data = plan.deploy, plan.job.data
    memory_gib = deploy.memory_gib_per_worker * deploy.workers_per_node
    # The cache keeps to its limit but for what is being written.
    cache_gib = math.ceil(data.cache_bytes * 17 / 16 / GIB) + 1 if data.cache_dir else 0
    amounts = _amounts(cpus=plan.cpus_per_node + CORES_OF_RAY, memory_gib=memory_gib, disk_gib=SCRATCH_GIB + cache_gib)
    env: dict[str, str] = {}
    if plan.gpus_per_node:
        amounts["nvidia.com/gpu"] = str(plan.gpus_per_node)
        env |= {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN"}
    if deploy.efa:
        amounts["vpc.amazonaws.com/efa"] = str(deploy.efa)
        env["FI_PROVIDER"] = "efa"
    container = _ray_container(plan, "ray-worker", amounts, env=env)
    container["ports"] = [{"name": "metrics", "containerPort": METRICS_PORTS["metrics"]}]
    volumes = [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, memory_gib // 3)}Gi"}}]
    container["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
    if data.cache_dir:
        volumes.append({"name": "shard-cache", "emptyDir": {"sizeLimit": f"{cache_gib}Gi"}})
        container["volumeMounts"].append({"name": "shard-cache", "mountPath": data.cache_dir})
    placement = _near_one_another(plan) | _on_its_nodes(plan)
    return _template(plan, "worker", container, config_map, placement=placement, volumes=volumes)


def submitter(plan: Plan) -> Object:
    """Hands the driver's command to the head and passes on its log; KubeRay fills in the command."""
    container = {
        "name": "ray-job-submitter",
        "image": image_of(plan),
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {part: {"cpu": "1", "memory": "1Gi"} for part in ("requests", "limits")},
        "securityContext": _confined(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        "restartPolicy": "Never",
        "serviceAccountName": plan.deploy.service_account,
        "securityContext": _not_root(),
        **_not_on_spot(plan),
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
    }
    return {"metadata": {"labels": labels(plan, "submitter")}, "spec": spec}


def _template(
    plan: Plan, component: str, container: Object, config_map: str, *, placement: Object, volumes: Sequence[Object] = ()
) -> Object:
    common = [
        {"name": "config", "configMap": {"name": config_map}},
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{SCRATCH_GIB}Gi"}},
    ]
    spec = {
        "serviceAccountName": plan.deploy.service_account,
        "securityContext": _not_root(),
        "terminationGracePeriodSeconds": plan.deploy.grace_seconds,
        **placement,
        "containers": [container],
        "volumes": [*common, *volumes],
    }
    # Autoscalers of the cluster must not move pods of a running job to save a node.
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    return {"metadata": {"labels": labels(plan, component), "annotations": annotations}, "spec": spec}


def _ray_container(plan: Plan, name: str, amounts: dict[str, str], *, env: dict[str, str]) -> Object:
    deploy = plan.deploy
    ours = {
        "HOME": "/tmp",
        "RAY_USAGE_STATS_ENABLED": "0",
        DRAIN: str(drain_seconds(plan)),
        **env,
    }
    return {
        "name": name,
        "image": image_of(plan),
        "env": [{"name": key, "value": value} for key, value in (ours | deploy.env).items()],
        **({"envFrom": [{"secretRef": {"name": deploy.secret_name}}]} if deploy.secret_name else {}),
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": _confined(),
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _amounts(*, cpus: int, memory_gib: int, disk_gib: int) -> dict[str, str]:
    return {"cpu": str(cpus), "memory": f"{memory_gib}Gi", "ephemeral-storage": f"{disk_gib}Gi"}


def _not_root() -> Object:
    return {
        "runAsNonRoot": True,
        "runAsUser": UID,
        "runAsGroup": UID,
        "fsGroup": UID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _confined() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _not_on_spot(plan: Plan) -> Object:
    """Nodes without the label of spot nodes, or with another value of it: no provider labels all the others."""
    if not plan.deploy.spot:
        return {}
    key, _, value = plan.deploy.spot_label.partition("=")
    term = {"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    return {"affinity": {"nodeAffinity": required}}


def _near_one_another(plan: Plan) -> Object:
    """Gradients between zones are slow and paid for; still only a wish, so that a full zone stops nothing."""
    if plan.nodes == 1:
        return {}
    term = {
        "labelSelector": {"matchLabels": labels(plan, "worker")},
        "topologyKey": "topology.kubernetes.io/zone",
    }
    wished = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}
    return {"affinity": {"podAffinity": wished}}


def _on_its_nodes(plan: Plan) -> Object:
    selector, tolerations = dict(plan.deploy.node_selector), []
    if plan.gpus_per_node:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if plan.deploy.spot:
        key, _, value = plan.deploy.spot_label.partition("=")
        selector[key] = value
        tolerations.append({"key": key, "operator": "Exists", "effect": "NoSchedule"})
    wanted: dict[str, Any] = {"nodeSelector": selector, "tolerations": tolerations}
    return {key: value for key, value in wanted.items() if value}
