"""What KubeRay 1.7 and Kueue refuse in objects of the right form: an object's status says so, or its job never starts.

From KubeRay's ValidateRayClusterSpec, ValidateRayJobSpec and ValidateRayServiceSpec, the rules that the CRDs state in CEL,
and Kueue's limits for RayJobs. Left out are rules about features that are off unless an operator turns them on (networkPolicy,
tlsOptions, historyServerOptions, RocksDB).
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from vaejob.cluster.manifests.pod_rules import pod_problems
from vaejob.cluster.manifests.problem import Problem, items, label_problems, ray_name_problems, within

LONGEST_CLUSTER_NAME = 53
LONGEST_NAME = 47
MOST_WORKER_GROUPS = 17
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
FAULT_TOLERANT = "ray.io/ft-enabled"
ELASTIC = "kueue.x-k8s.io/elastic-job"
_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_IN_START_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_DELETED_IN_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def job_problems(job: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with a RayJob."""
    spec = within(job, "spec") or {}
    yield from ray_name_problems(job, longest=LONGEST_NAME)
    yield from _submission_problems(spec)
    yield from _ending_problems(spec)
    yield from _queue_problems(job, spec)
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if (seconds := spec.get(field)) is not None and seconds <= 0:
            yield Problem(f"spec.{field}", f"is {seconds}; it must be more than 0")
    if (spec.get("backoffLimit") or 0) < 0:
        yield Problem("spec.backoffLimit", f"is {spec['backoffLimit']}; it must be 0 or more")
    cluster = spec.get("rayClusterSpec")
    if cluster is not None:
        if within(cluster, "authOptions.enableK8sTokenAuth"):
            yield Problem("spec.rayClusterSpec.authOptions.enableK8sTokenAuth", "is not possible with a RayJob")
        yield from cluster_problems(cluster, "spec.rayClusterSpec", within(job, "metadata.annotations"))
    submitter = spec.get("submitterPodTemplate")
    if submitter is not None:
        yield from pod_problems(submitter, "spec.submitterPodTemplate")
        if (policy := within(submitter, "spec.restartPolicy")) not in ("Never", "OnFailure"):
            yield Problem(
                "spec.submitterPodTemplate.spec.restartPolicy", f"is {policy!r}; it must be Never or OnFailure"
            )


def cluster_object_problems(cluster: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with a RayCluster."""
    yield from ray_name_problems(cluster, longest=LONGEST_CLUSTER_NAME)
    strategy = within(cluster, "spec.upgradeStrategy.type")
    if strategy not in (None, "Recreate", "None"):
        yield Problem("spec.upgradeStrategy.type", f"is {strategy!r}; it must be Recreate or None")
    yield from cluster_problems(within(cluster, "spec") or {}, "spec", within(cluster, "metadata.annotations"))


def service_problems(service: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with a RayService."""
    yield from ray_name_problems(service, longest=LONGEST_NAME)
    spec = within(service, "spec") or {}
    strategy = within(spec, "upgradeStrategy.type")
    if strategy not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield Problem(
            "spec.upgradeStrategy.type",
            f"is {strategy!r}; it must be None, NewCluster or NewClusterWithIncrementalUpgrade",
        )
    if (spec.get("rayClusterDeletionDelaySeconds") or 0) < 0:
        yield Problem(
            "spec.rayClusterDeletionDelaySeconds", f"is {spec['rayClusterDeletionDelaySeconds']}; it must be 0 or more"
        )
    cluster = spec.get("rayClusterConfig")
    if cluster is None:
        yield Problem("spec.rayClusterConfig", "is missing")
        return
    if within(cluster, "authOptions.enableK8sTokenAuth"):
        yield Problem("spec.rayClusterConfig.authOptions.enableK8sTokenAuth", "is not possible with a RayService")
    if within(cluster, "headGroupSpec.headService.metadata.name"):
        yield Problem(
            "spec.rayClusterConfig.headGroupSpec.headService.metadata.name", "must not be set; KubeRay names it"
        )
    yield from cluster_problems(cluster, "spec.rayClusterConfig", within(service, "metadata.annotations"))


def cluster_problems(spec: dict[str, Any], path: str, annotations: dict[str, Any] | None) -> Iterator[Problem]:
    """What is wrong with the specification of a Ray cluster at a path, of whichever kind it is part."""
    autoscaling = bool(spec.get("enableInTreeAutoscaling"))
    head = spec.get("headGroupSpec") or {}
    yield from _group_problems(head, f"{path}.headGroupSpec")
    variables = {item.get("name"): item.get("value") for _, item in items(head, "template.spec.containers.0.env")}
    tolerant = spec.get("gcsFaultToleranceOptions") is not None or (annotations or {}).get(FAULT_TOLERANT) == "true"
    if "RAY_REDIS_ADDRESS" in variables and not tolerant:
        yield Problem(f"{path}.headGroupSpec", "sets RAY_REDIS_ADDRESS without gcsFaultToleranceOptions")
    if variables.get("RAY_enable_autoscaler_v2") in ("1", "true") and not autoscaling:
        yield Problem(f"{path}.headGroupSpec", "sets RAY_enable_autoscaler_v2 without enableInTreeAutoscaling")
    for place, group in items(spec, "workerGroupSpecs"):
        inner = f"{path}.{place}"
        yield from _group_problems(group, inner)
        yield from _replica_problems(group, inner, autoscaling=autoscaling)
        policy = within(group, "template.spec.restartPolicy")
        if autoscaling and policy not in (None, "Never") and within(spec, "autoscalerOptions.version") == "v2":
            yield Problem(f"{inner}.template.spec.restartPolicy", f"is {policy}; the autoscaler v2 needs Never")
    if within(spec, "authOptions.mode") == "token":
        version = re.match(r"v?(\d+)\.(\d+)", str(spec.get("rayVersion") or ""))
        if version is None or (int(version[1]), int(version[2])) < (2, 52):
            yield Problem(
                f"{path}.rayVersion", f"is {spec.get('rayVersion')!r}; authOptions.mode=token needs 2.52.0 or later"
            )


def _group_problems(group: dict[str, Any], path: str) -> Iterator[Problem]:
    template = group.get("template") or {}
    if not within(template, "spec.containers"):
        yield Problem(f"{path}.template.spec.containers", "is empty; its first container is the Ray node")
    parameters = group.get("rayStartParams") or {}
    if group.get("resources") and any(parameters.get(name) for name in _IN_START_PARAMS):
        yield Problem(f"{path}.resources", "and rayStartParams both set resources; one of them may")
    if "labels" in parameters:
        yield Problem(f"{path}.rayStartParams.labels", "is not taken; use the group's labels")
    yield from label_problems(group.get("labels"), f"{path}.labels")
    yield from pod_problems(template, f"{path}.template", ray=True)


def _replica_problems(group: dict[str, Any], path: str, *, autoscaling: bool) -> Iterator[Problem]:
    least, replicas, most = (group.get(name) for name in ("minReplicas", "replicas", "maxReplicas"))
    for name, count in (("minReplicas", least), ("maxReplicas", most)):
        if count is not None and count < 0:
            yield Problem(f"{path}.{name}", f"is {count}; it must be 0 or more")
    if least is not None and most is not None and least > most:
        yield Problem(f"{path}.minReplicas", f"is {least}, more than maxReplicas {most}")
    elif replicas is not None and not (least or 0) <= replicas <= (replicas if most is None else most):
        yield Problem(f"{path}.replicas", f"is {replicas}, outside minReplicas {least} to maxReplicas {most}")
    if autoscaling and group.get("suspend"):
        yield Problem(f"{path}.suspend", "is not possible with autoscaling")


def _submission_problems(spec: dict[str, Any]) -> Iterator[Problem]:
    mode, selector = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector")
    if mode not in _SUBMISSION_MODES:
        yield Problem("spec.submissionMode", f"is {mode!r}; it must be one of {', '.join(_SUBMISSION_MODES)}")
    own_command = within(spec, "submitterPodTemplate.spec.containers.0.command")
    if not str(spec.get("entrypoint") or "").strip() and mode != "InteractiveMode" and not own_command:
        yield Problem("spec.entrypoint", "is empty; it must be the command of the driver")
    if not selector and spec.get("rayClusterSpec") is None:
        yield Problem("spec.rayClusterSpec", "is missing; without it clusterSelector must name a cluster")
    if selector and not selector.get("ray.io/cluster"):
        yield Problem("spec.clusterSelector", "names no cluster; it must have ray.io/cluster")
    if spec.get("backoffLimit") and (selector or mode == "InteractiveMode"):
        yield Problem("spec.backoffLimit", "is not possible with clusterSelector or InteractiveMode")
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if spec.get(field):
                yield Problem(f"spec.{field}", "is not possible with SidecarMode")
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML") or "")
    except yaml.YAMLError:
        yield Problem("spec.runtimeEnvYAML", "is not YAML")


def _ending_problems(spec: dict[str, Any]) -> Iterator[Problem]:
    shutdown, wait = spec.get("shutdownAfterJobFinishes"), spec.get("ttlSecondsAfterFinished") or 0
    if wait < 0:
        yield Problem("spec.ttlSecondsAfterFinished", f"is {wait}; it must be 0 or more")
    if wait > 0 and not shutdown:
        yield Problem("spec.ttlSecondsAfterFinished", f"is {wait} without shutdownAfterJobFinishes: true")
    if spec.get("suspend") and not shutdown:
        yield Problem("spec.suspend", "is not possible without shutdownAfterJobFinishes: true")
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules, legacy = strategy.get("deletionRules"), [strategy.get("onSuccess"), strategy.get("onFailure")]
    if rules and shutdown:
        yield Problem("spec.deletionStrategy.deletionRules", "are not possible with shutdownAfterJobFinishes")
    if rules and any(legacy):
        yield Problem("spec.deletionStrategy", "has both deletionRules and onSuccess or onFailure")
    if not rules and not all(legacy):
        yield Problem("spec.deletionStrategy", "is empty; it must have deletionRules, or both onSuccess and onFailure")
    yield from _rule_problems(spec)


def _rule_problems(spec: dict[str, Any]) -> Iterator[Problem]:
    waits: dict[tuple[Any, Any], dict[str, int]] = {}
    for place, rule in items(spec, "deletionStrategy.deletionRules"):
        condition, policy = rule.get("condition") or {}, str(rule.get("policy"))
        when = (condition.get("jobStatus"), condition.get("jobDeploymentStatus"))
        if (when[0] is None) == (when[1] is None):
            yield Problem(f"spec.{place}.condition", "must have one of jobStatus and jobDeploymentStatus")
        if policy == "DeleteWorkers" and within(spec, "rayClusterSpec.enableInTreeAutoscaling"):
            yield Problem(f"spec.{place}.policy", "DeleteWorkers is not possible with autoscaling")
        if spec.get("clusterSelector") and policy in ("DeleteWorkers", "DeleteCluster"):
            yield Problem(f"spec.{place}.policy", f"{policy} is not possible with clusterSelector")
        if policy in waits.setdefault(when, {}):
            yield Problem(f"spec.{place}", f"repeats {policy} for the same condition")
        waits[when][policy] = condition.get("ttlSeconds") or 0
    for found in waits.values():
        in_order = [found[policy] for policy in _DELETED_IN_ORDER if policy in found]
        if in_order != sorted(in_order):
            yield Problem(
                "spec.deletionStrategy.deletionRules", "must delete workers first, then the cluster, then the RayJob"
            )


def _queue_problems(job: dict[str, Any], spec: dict[str, Any]) -> Iterator[Problem]:
    """What Kueue's webhook refuses; it sees a RayJob that has its label."""
    if not (within(job, "metadata.labels") or {}).get(QUEUE_LABEL):
        return
    if not spec.get("shutdownAfterJobFinishes"):
        yield Problem(
            "spec.shutdownAfterJobFinishes", "must be true for Kueue, which waits for the quota to be given back"
        )
    if spec.get("clusterSelector"):
        yield Problem("spec.clusterSelector", "is not possible with Kueue")
    if within(spec, "deletionStrategy.deletionRules"):
        yield Problem("spec.deletionStrategy.deletionRules", "are not possible with Kueue")
    cluster = spec.get("rayClusterSpec") or {}
    groups = len(items(cluster, "workerGroupSpecs"))
    if groups > MOST_WORKER_GROUPS:
        yield Problem("spec.rayClusterSpec.workerGroupSpecs", f"are {groups}; Kueue takes at most {MOST_WORKER_GROUPS}")
    elastic = (within(job, "metadata.annotations") or {}).get(ELASTIC)
    if cluster.get("enableInTreeAutoscaling") and elastic != "true":
        yield Problem(
            "spec.rayClusterSpec.enableInTreeAutoscaling", f"needs the annotation {ELASTIC}: 'true' with Kueue"
        )
