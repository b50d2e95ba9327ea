"""A job as KubeRay runs it: a RayJob and what it stands on, made for KubeRay 1.7 and pods of Pod Security `restricted`."""

import hashlib
from importlib.metadata import version

from vaejob.cluster.manifests.documents import to_yaml
from vaejob.cluster.manifests.kube import Object, labels, metadata
from vaejob.cluster.manifests.patches import patched
from vaejob.cluster.manifests.plan import Plan, check_kubernetes_name, check_reachable
from vaejob.cluster.manifests.pod_rules import DRAIN
from vaejob.cluster.manifests.pods import CONFIG_FILE, CONFIG_FOLDER, METRICS_PORTS, head, submitter, worker
from vaejob.cluster.manifests.problem import items
from vaejob.errors import ConfigError

PENDING_SECONDS = 3600
KEPT_SECONDS = 600
_FILES = {
    "ServiceAccount": "service-account.yaml",
    "ConfigMap": "config.yaml",
    "PodDisruptionBudget": "disruption-budget.yaml",
    "PodMonitor": "pod-monitor.yaml",
    "RayJob": "rayjob.yaml",
}
"""In the order in which they are applied."""


def render_kuberay(plan: Plan) -> dict[str, str]:
    """The objects of a job, each in its file; raises ConfigError for what the cluster would refuse."""
    check_kubernetes_name(plan)
    if any(character in plan.run for character in '$`"\\'):
        raise ConfigError(
            f'run.bucket is {plan.job.run.bucket!r}; KubeRay hands it to a shell: it must have no $, `, " or \\'
        )
    if plan.deploy.keep_failed_seconds and plan.deploy.queue and plan.deploy.scheduler == "kueue":
        raise ConfigError(
            f"deploy.keep_failed_seconds is {plan.deploy.keep_failed_seconds} with deploy.queue={plan.deploy.queue}; Kueue needs "
            "the cluster gone when the job ends: it must be 0, or no queue"
        )
    config_map = _config_map(plan)
    rendered = [
        _service_account(plan),
        config_map,
        _disruption_budget(plan),
        _pod_monitor(plan),
        _ray_job(plan, config_map["metadata"]["name"]),
    ]
    objects = patched({item["kind"]: item for item in rendered}, plan.deploy.patches)
    check_reachable(plan, _mounted(objects))
    return {_FILES[kind]: to_yaml(item, COMMENTS[kind]) for kind, item in objects.items()}


def _service_account(plan: Plan) -> Object:
    more = (
        {"annotations": dict(plan.deploy.service_account_annotations)}
        if plan.deploy.service_account_annotations
        else {}
    )
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(plan, plan.deploy.service_account, **more),
        "automountServiceAccountToken": False,
    }


def _config_map(plan: Plan) -> Object:
    text = plan.job.to_yaml()
    content = hashlib.sha256(text.encode()).hexdigest()[:8]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(plan, f"{plan.name}-{content}"),
        "immutable": True,
        "data": {CONFIG_FILE: text},
    }


def _disruption_budget(plan: Plan) -> Object:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(plan, plan.name),
        "spec": {"minAvailable": plan.nodes + 1, "selector": _ray_pods(plan)},
    }


def _pod_monitor(plan: Plan) -> Object:
    relabelings = [{"sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"], "targetLabel": "ray_io_cluster"}]
    about = metadata(plan, plan.name)
    about["labels"]["release"] = "prometheus"
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": about,
        "spec": {
            "selector": _ray_pods(plan),
            "podMetricsEndpoints": [{"port": port, "relabelings": relabelings} for port in METRICS_PORTS],
        },
    }


def _ray_pods(plan: Plan) -> Object:
    ray = {"key": "app.kubernetes.io/component", "operator": "In", "values": ["head", "worker"]}
    return {"matchLabels": labels(plan), "matchExpressions": [ray]}


def _ray_job(plan: Plan, config_map: str) -> Object:
    deploy = plan.deploy
    about = metadata(plan, plan.name)
    about["labels"] |= _queue_labels(plan)
    workers = {
        "groupName": "workers",
        "replicas": plan.nodes,
        "minReplicas": plan.nodes,
        "maxReplicas": plan.nodes,
        "numOfHosts": 1,
        "rayStartParams": {},
        "template": worker(plan, config_map),
    }
    spec = {
        "submissionMode": "K8sJobMode",
        "entrypoint": f"vaejob train {CONFIG_FOLDER}/{CONFIG_FILE}",
        "metadata": {"vaejob_run": plan.run, "vaejob_settings": plan.job.fingerprint},
        "backoffLimit": deploy.retries,
        "preRunningDeadlineSeconds": PENDING_SECONDS,
        **({"activeDeadlineSeconds": deploy.deadline_seconds} if deploy.deadline_seconds else {}),
        **_ending(plan),
        "submitterConfig": {"backoffLimit": 3},
        "submitterPodTemplate": submitter(plan),
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "enableInTreeAutoscaling": False,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                "template": head(plan, config_map),
            },
            "workerGroupSpecs": [workers],
        },
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": about, "spec": spec}


def _queue_labels(plan: Plan) -> dict[str, str]:
    deploy = plan.deploy
    names = {
        "kueue": ("kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"),
        "volcano": ("volcano.sh/queue-name", "ray.io/priority-class-name"),
    }[deploy.scheduler]
    if deploy.priority and not deploy.queue:
        raise ConfigError(
            f"deploy.priority is {deploy.priority} without deploy.queue, in which alone it has a meaning; set both"
        )
    return {label: value for label, value in zip(names, (deploy.queue, deploy.priority), strict=True) if value}


def _ending(plan: Plan) -> Object:
    """What goes when the job has ended. KubeRay takes rules or shutdownAfterJobFinishes, not both."""
    kept = plan.deploy.keep_failed_seconds
    if not kept:
        return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": KEPT_SECONDS}
    rules = [
        ("DeleteCluster", {"jobStatus": "SUCCEEDED", "ttlSeconds": 0}),
        ("DeleteWorkers", {"jobStatus": "FAILED", "ttlSeconds": 0}),
        ("DeleteCluster", {"jobStatus": "FAILED", "ttlSeconds": kept}),
        ("DeleteCluster", {"jobDeploymentStatus": "Failed", "ttlSeconds": kept}),
    ]
    return {"deletionStrategy": {"deletionRules": [{"policy": policy, "condition": when} for policy, when in rules]}}


def _mounted(objects: dict[str, Object]) -> list[str]:
    """Folders that a patch has mounted into the workers from a volume that outlives a pod."""
    place = "spec.rayClusterSpec.workerGroupSpecs.0.template.spec"
    job = objects.get("RayJob", {})
    lasting = {
        volume.get("name")
        for _, volume in items(job, f"{place}.volumes")
        if not volume.keys() & {"emptyDir", "configMap", "secret"}
    }
    mounts = items(job, f"{place}.containers.0.volumeMounts")
    return [str(mount.get("mountPath")) for _, mount in mounts if mount.get("name") in lasting]


_CLUSTER = "spec.rayClusterSpec"
_HEAD = f"{_CLUSTER}.headGroupSpec"
_WORKERS = f"{_CLUSTER}.workerGroupSpecs[workers]"
_HEAD_NODE = f"{_HEAD}.template.spec.containers[ray-head]"
_WORKER_NODE = f"{_WORKERS}.template.spec.containers[ray-worker]"
COMMENTS: dict[str, dict[str, str]] = {
    "ServiceAccount": {
        "": "Who the pods are: give it access to the buckets, by deploy.service_account_annotations or the provider's own way.",
        "automountServiceAccountToken": "Nothing in the pods talks to Kubernetes.",
    },
    "ConfigMap": {
        "": "The job itself, as `vaejob train` ran it elsewhere. Named after its contents: another configuration is another object.",
    },
    "PodDisruptionBudget": {
        "": "Draining a node waits for the job. One pod less and all workers start again from the newest checkpoint.",
        "spec.minAvailable": "Head and workers, as a number: percentages need a scale subresource, which a RayCluster has not.",
    },
    "PodMonitor": {
        "": "Ray's metrics and the job's own, for the Prometheus operator. Without it, leave this file out.",
        "metadata.labels.release": "What kube-prometheus-stack looks for, if its release is called prometheus.",
    },
    "RayJob": {
        "": "Applied once, runs once: to repeat it, delete it and apply it again; the run goes on from its newest checkpoint.",
        "metadata.labels.kueue.x-k8s.io/queue-name": "On the RayJob: its pods are admitted all or none.",
        "spec.entrypoint": "Statuses: 0 done; 85 stopped with a checkpoint, 3 the bucket or cluster failed, 2 a wrong setting. KubeRay "
        "starts all but 0 again, which continues the run. It goes through a shell unquoted: no $, ; or quotes.",
        "spec.metadata": "By vaejob_run, `vaejob logs` and `vaejob stop` find the job.",
        "spec.backoffLimit": "Each retry is a new cluster. The nodes of the one before may still be ending: checkpoints bear it.",
        "spec.preRunningDeadlineSeconds": "Pods that find no node, or no image, fail the attempt instead of waiting for ever.",
        "spec.activeDeadlineSeconds": "Of one attempt, scheduling included; there is no retry after it.",
        "spec.shutdownAfterJobFinishes": "Kueue needs it too. The submitter's pod stays, and with it the driver's log.",
        "spec.deletionStrategy": "A failed job's head stays for a look, without the GPUs.",
        "spec.submitterConfig": "Times that handing in the command is tried; it never runs twice.",
        "spec.submitterPodTemplate": "KubeRay's own has no security context, which restricted namespaces refuse.",
        f"{_CLUSTER}.rayVersion": "Of the image; from 2.53 on the probes need no wget in it.",
        f"{_CLUSTER}.authOptions": "KubeRay makes a token for this cluster alone and gives it to all its pods.",
        f"{_HEAD}.rayStartParams.num-cpus": "No worker on the head: it holds the driver, and would take the run down with it.",
        f"{_HEAD}.template.spec.affinity": "On demand: losing the head costs the attempt, losing a worker a minute.",
        f"{_HEAD_NODE}.env[HOME]": "The only place but the volumes that can be written.",
        f"{_HEAD_NODE}.env[RAY_JOB_STOP_WAIT_TIME_S]": "What `vaejob stop` gives the job to save; Ray's own 3 s are too few.",
        f"{_HEAD_NODE}.resources": "Requests equal limits: the scheduler sets aside what Ray counts on, and memory is not taken away.",
        f"{_WORKERS}.replicas": "All or nothing: the workers of a job are one gang, not a pool to scale.",
        f"{_WORKERS}.template.spec.terminationGracePeriodSeconds": "On SIGTERM Ray tells that the node goes and lets its workers run on "
        "for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, time to finish a checkpoint; the rest is for Ray to end in. No preStop hook: "
        "`ray stop` would cut it short.",
        f"{_WORKER_NODE}.env[{DRAIN}]": "Less than terminationGracePeriodSeconds.",
        f"{_WORKER_NODE}.env[NCCL_SOCKET_IFNAME]": "A pod's own interface; here, not in the image, since other machines name it otherwise.",
        f"{_WORKERS}.template.spec.volumes[shared-memory]": "Part of the memory limit. NCCL and Ray's object store; 64 MiB otherwise.",
        f"{_WORKERS}.template.spec.volumes[shard-cache]": "data.cache_dir, with room for what data.cache_bytes allows.",
    },
}
