"""`vaejob render --check` refuses what the API server, KubeRay, Kueue or a kubelet would, at the right place, and no more."""

import copy
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

import vaejob
from vaejob.cli import app
from vaejob.cluster.manifests.check import check_document, check_text
from vaejob.cluster.manifests.pod_rules import quantity
from vaejob.cluster.manifests.schema import _schemas, known_kinds
from vaejob.cluster.manifests.targets import render
from vaejob.errors import UserError

EXAMPLE = Path(__file__).parents[1] / "deploy" / "example-job.yaml"
CLUSTER = "spec.rayClusterSpec"
WORKERS = f"{CLUSTER}.workerGroupSpecs[0]"
WORKER = f"{WORKERS}.template.spec.containers[0]"
HEAD = f"{CLUSTER}.headGroupSpec"
REMOVED = object()


def objects(*overrides: str) -> dict[str, Any]:
    files = render("kuberay", vaejob.load_config(str(EXAMPLE), *overrides))
    return {item["kind"]: item for item in map(yaml.safe_load, files.values())}


def steps(path: str) -> list[str | int]:
    """spec.items[0].'a.b/c' as its keys and indices."""
    quoted = path.split("'")
    parts: list[str | int] = []
    for index, piece in enumerate(quoted):
        words = [piece] if index % 2 else piece.replace("[", ".[").strip(".").split(".")
        parts += [int(word[1:-1]) if word.startswith("[") else word for word in words if word]
    return parts


def changed(document: Any, path: str, value: Any) -> Any:
    """A copy with the value at a path replaced, removed, or appended to a list at -1."""
    result = copy.deepcopy(document)
    *inner, last = steps(path)
    place = result
    for step in inner:
        place = place.setdefault(step, {}) if isinstance(place, dict) else place[step]
    if value is REMOVED:
        del place[last]
    elif last == -1:
        place.append(value)
    else:
        place[last] = value
    return result


def rules(*of_failed: int) -> dict[str, Any]:
    """Rules that delete a failed job's workers and its cluster after so many seconds."""
    policies = zip(("DeleteWorkers", "DeleteCluster"), of_failed, strict=True)
    return {
        "deletionRules": [
            {"policy": policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": wait}} for policy, wait in policies
        ]
    }


MUTATIONS: list[tuple[str, str, Any, str, str]] = [
    # form
    ("RayJob", "spec.backofLimit", 3, "spec.backofLimit", "is no field here; did you mean backoffLimit?"),
    ("RayJob", "spec.backoffLimit", "3", "spec.backoffLimit", 'is "3"; it must be of type integer'),
    ("RayJob", "spec.backoffLimit", 2**31, "spec.backoffLimit", "breaks maximum"),
    ("RayJob", "spec.shutdownAfterJobFinishes", "yes", "spec.shutdownAfterJobFinishes", "it must be of type boolean"),
    ("RayJob", "spec.rayClusterSpec.headGroupSpec.template", REMOVED, f"{HEAD}.template", "is missing"),
    ("RayJob", f"{HEAD}.rayStartParams.num-cpus", 0, f"{HEAD}.rayStartParams.num-cpus", "is 0; it must be of type string"),
    ("RayJob", f"{WORKERS}.groupName", REMOVED, f"{WORKERS}.groupName", "is missing"),
    ("RayJob", f"{WORKER}.resources.limits.memory", "64 GB", f"{WORKER}.resources.limits.memory", 'is "64 GB"; it must match'),
    ("RayJob", f"{WORKER}.env[0].value", 1, f"{WORKER}.env[0].value", "it must be of type string"),
    ("RayJob", f"{WORKER}.imagePullPolcy", "Always", f"{WORKER}.imagePullPolcy", "did you mean imagePullPolicy?"),
    ("RayJob", f"{CLUSTER}.authOptions.mode", "tokens", f"{CLUSTER}.authOptions.mode", "it must be one of disabled, token"),
    ("RayJob", "apiVersion", "ray.io/v1alpha1", "apiVersion", "it must be ray.io/v1"),
    ("PodMonitor", "spec.podMetricsEndpoints[0].prot", "metrics", "spec.podMetricsEndpoints[0].prot", "did you mean port?"),
    ("ConfigMap", "data.'job.yaml'", {"run": {}}, "data.job.yaml", "it must be of type string"),
    ("ServiceAccount", "automountServiceAccountToken", "no", "automountServiceAccountToken", "it must be of type boolean"),
    # KubeRay's admission
    ("RayJob", "metadata.name", "x" * 48, "metadata.name", "has 48 characters; KubeRay takes at most 47"),
    ("RayJob", "metadata.name", "celeba.64", "metadata.name", "a-z, 0-9 and dashes, a letter first"),
    ("RayJob", "spec.submissionMode", "K8SJobMode", "spec.submissionMode", "is 'K8SJobMode'; it must be one of"),
    ("RayJob", "spec.entrypoint", " ", "spec.entrypoint", "is empty"),
    ("RayJob", "spec.shutdownAfterJobFinishes", False, "spec.ttlSecondsAfterFinished", "without shutdownAfterJobFinishes"),
    ("RayJob", "spec.activeDeadlineSeconds", 0, "spec.activeDeadlineSeconds", "it must be more than 0"),
    ("RayJob", "spec.backoffLimit", -1, "spec.backoffLimit", "it must be 0 or more"),
    ("RayJob", "spec.deletionStrategy", rules(0, 60), "spec.deletionStrategy.deletionRules", "not possible with shutdownAfterJobFinishes"),
    ("RayJob", "spec.deletionStrategy", rules(0, 60), "spec.deletionStrategy.deletionRules", "not possible with Kueue"),
    ("RayJob", "spec.deletionStrategy", rules(0, -1), "spec.deletionStrategy.deletionRules[1].condition.ttlSeconds", "is -1"),
    ("RayJob", "spec.deletionStrategy", rules(60, 0), "spec.deletionStrategy.deletionRules", "must delete workers first"),
    ("RayJob", "spec.clusterSelector", {"ray.io/cluster": "there"}, "spec.backoffLimit", "not possible with clusterSelector"),
    ("RayJob", "spec.submissionMode", "SidecarMode", "spec.submitterPodTemplate", "not possible with SidecarMode"),
    ("RayJob", "spec.runtimeEnvYAML", "{a: [", "spec.runtimeEnvYAML", "is not YAML"),
    ("RayJob", f"{CLUSTER}.rayVersion", "2.51.1", f"{CLUSTER}.rayVersion", "authOptions.mode=token needs 2.52.0"),
    ("RayJob", f"{CLUSTER}.authOptions.enableK8sTokenAuth", True, f"{CLUSTER}.authOptions.enableK8sTokenAuth", "is not possible"),
    ("RayJob", f"{WORKERS}.minReplicas", 3, f"{WORKERS}.minReplicas", "is 3, more than maxReplicas 2"),
    ("RayJob", f"{WORKERS}.replicas", 1, f"{WORKERS}.replicas", "is 1, outside minReplicas 2 to maxReplicas 2"),
    ("RayJob", f"{HEAD}.rayStartParams.labels", "a=b", f"{HEAD}.rayStartParams.labels", "use the group's labels"),
    ("RayJob", f"{HEAD}.resources", {"CPU": "4"}, f"{HEAD}.resources", "one of them may"),
    ("RayJob", f"{HEAD}.template.spec.containers", [], f"{HEAD}.template.spec.containers", "is empty"),
    ("RayJob", f"{HEAD}.template.spec.containers[0].env[-1]", {"name": "RAY_REDIS_ADDRESS", "value": "r:6379"}, HEAD, "sets RAY_REDIS_ADDRESS"),
    ("RayJob", f"{HEAD}.template.spec.containers[0].env[-1]", {"name": "RAY_enable_autoscaler_v2", "value": "1"}, HEAD, "without enableInTree"),
    ("RayJob", f"{WORKERS}.minReplicas", -1, f"{WORKERS}.minReplicas", "is -1; it must be 0 or more"),
    ("RayJob", CLUSTER, REMOVED, CLUSTER, "is missing; without it clusterSelector"),
    ("RayJob", "spec.clusterSelector", {"cluster": "there"}, "spec.clusterSelector", "names no cluster"),
    ("RayJob", "spec.ttlSecondsAfterFinished", -1, "spec.ttlSecondsAfterFinished", "is -1"),
    ("RayJob", "spec", {"suspend": True}, "spec.suspend", "not possible without shutdownAfterJobFinishes"),
    ("RayJob", "spec.deletionStrategy", rules(0, 60) | {"onFailure": {"policy": "DeleteSelf"}}, "spec.deletionStrategy", "has both"),
    ("RayJob", "spec.deletionStrategy", {"onFailure": {"policy": "DeleteSelf"}}, "spec.deletionStrategy", "is empty"),
    ("RayJob", "spec.deletionStrategy", {"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 1}}]}, "spec.deletionStrategy.deletionRules[0].condition", "must have one of"),
    ("RayJob", "spec", {"clusterSelector": {"ray.io/cluster": "x"}, "deletionStrategy": rules(0, 60)}, "spec.deletionStrategy.deletionRules[1].policy", "DeleteCluster is not possible with clusterSelector"),
    ("RayJob", "spec", {"rayClusterSpec": {"enableInTreeAutoscaling": True, "headGroupSpec": {"template": {}}}, "deletionStrategy": rules(0, 60)}, "spec.deletionStrategy.deletionRules[0].policy", "not possible with autoscaling"),
    ("RayJob", "spec.deletionStrategy", {"deletionRules": rules(0, 60)["deletionRules"] * 2}, "spec.deletionStrategy.deletionRules[2]", "repeats DeleteWorkers"),
    # Kueue's
    ("RayJob", "spec.clusterSelector", {"ray.io/cluster": "there"}, "spec.clusterSelector", "is not possible with Kueue"),
    ("RayJob", f"{CLUSTER}.workerGroupSpecs", [{"groupName": "x", "template": {}}] * 18, f"{CLUSTER}.workerGroupSpecs", "are 18; Kueue takes at most 17"),
    ("RayJob", f"{CLUSTER}.enableInTreeAutoscaling", True, f"{CLUSTER}.enableInTreeAutoscaling", "kueue.x-k8s.io/elastic-job"),
    ("RayJob", "spec.shutdownAfterJobFinishes", False, "spec.shutdownAfterJobFinishes", "must be true for Kueue"),
    # Kubernetes' and the kubelet's
    ("RayJob", f"{WORKER}.resources.requests.'nvidia.com/gpu'", "4", f"{WORKER}.resources.requests.nvidia.com/gpu", "is '4' and the limit '8'"),
    ("RayJob", f"{WORKER}.resources.limits.'nvidia.com/gpu'", REMOVED, f"{WORKER}.resources.limits.nvidia.com/gpu", "is missing"),
    ("RayJob", f"{WORKER}.resources.requests.memory", "1000Gi", f"{WORKER}.resources.requests.memory", "more than the limit"),
    ("RayJob", f"{WORKER}.resources.requests.cpu", "1", f"{WORKER}.resources.requests.cpu", "Ray counts the limit"),
    ("RayJob", f"{WORKER}.volumeMounts[1].name", "temp", f"{WORKER}.volumeMounts[1].name", "is 'temp', which is no volume"),
    ("RayJob", f"{WORKER}.volumeMounts[1].mountPath", "/dev/shm", f"{WORKER}.volumeMounts", "'/dev/shm' more than once"),
    ("RayJob", f"{WORKER}.ports[0].name", "prometheus-metrics", f"{WORKER}.ports[0].name", "at most 15 characters"),
    ("RayJob", f"{WORKER}.ports[0].containerPort", 80800, f"{WORKER}.ports[0].containerPort", "must be 1 to 65535"),
    ("RayJob", f"{WORKER}.image", REMOVED, f"{WORKER}.image", "is missing"),
    ("RayJob", f"{WORKER}.name", "ray_worker", f"{WORKER}.name", "is 'ray_worker'"),
    ("RayJob", f"{WORKER}.securityContext.runAsUser", 0, f"{WORKER}.securityContext", "the kubelet will not start it"),
    ("RayJob", f"{WORKERS}.template.spec.terminationGracePeriodSeconds", 60, f"{WORKER}.env[2].value", "is '90' with terminationGracePeriodSeconds 60"),
    ("RayJob", "spec.submitterPodTemplate.spec.restartPolicy", "Always", "spec.submitterPodTemplate.spec.restartPolicy", "Never or OnFailure"),
    ("RayJob", "metadata.labels.'kueue.x-k8s.io/queue-name'", "my queue", "metadata.labels.kueue.x-k8s.io/queue-name", "is 'my queue'"),
    ("RayJob", f"{WORKER}.env[0].valueFrom", {"fieldRef": {"fieldPath": "x"}}, f"{WORKER}.env[0]", "has both value and valueFrom"),
    ("RayJob", f"{WORKER}.resources.limits.memory", "-1Gi", f"{WORKER}.resources.limits.memory", "no quantity"),
    ("RayJob", "metadata.labels.'a b'", "c", "metadata.labels", "'a b' is no name of a label"),
    ("RayJob", "metadata.labels.app", 5, "metadata.labels.app", "is 5, no text; quote it"),
    ("RayJob", "metadata.name", REMOVED, "metadata.name", "is missing"),
    ("RayJob", "metadata.annotations.note", 5, "metadata.annotations.note", "no text; quote it"),
    ("RayJob", "metadata.namespace", "A", "metadata.namespace", "is 'A'"),
    ("RayJob", f"{WORKER}.env[-1]", {"name": "HF_TOKEN", "value": "hunter2"}, f"{WORKER}.env[7].value", "holds a value of HF_TOKEN"),
    ("ConfigMap", "data.'a/b'", "x", "data.a/b", "is no name of a file"),
    ("ConfigMap", "data.big", "x" * 2**20, "data", "a ConfigMap takes at most 1048576"),
    ("ConfigMap", "data.env", "aws_secret_access_key = hunter2", "data.env", "holds a value of aws_secret_access_key"),
    ("ConfigMap", "metadata", REMOVED, "metadata", "is missing"),
    ("PodDisruptionBudget", "spec.maxUnavailable", 1, "spec", "must have one of minAvailable and maxUnavailable"),
    ("PodDisruptionBudget", "spec.minAvailable", "half", "spec.minAvailable", "a percentage such as 50%"),
    ("ServiceAccount", "metadata.name", "Me", "metadata.name", "is 'Me'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "where", "value", "path", "message"), MUTATIONS)
def test_a_mutated_manifest_is_refused_at_its_place(kind: str, where: str, value: Any, path: str, message: str) -> None:
    document = objects()[kind]
    assert check_document(document).problems == []
    mutated = changed(document, where, value)
    found = check_document(mutated).problems
    assert any(problem.path == path and message in problem.message for problem in found), found
    assert not any("hunter2" in problem.message for problem in found)


def as_cluster(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "c"},
        "spec": job["spec"]["rayClusterSpec"],
    }


def as_service(job: dict[str, Any]) -> dict[str, Any]:
    spec = {"serveConfigV2": "applications: []", "rayClusterConfig": job["spec"]["rayClusterSpec"]}
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "s"}, "spec": spec}


def test_the_same_cluster_is_checked_in_a_cluster_and_a_service() -> None:
    job = objects()["RayJob"]
    cluster, service = as_cluster(job), as_service(job)
    assert check_document(cluster).problems == check_document(service).problems == []
    for document, inner in ((cluster, "spec"), (service, "spec.rayClusterConfig")):
        where = f"{inner}.workerGroupSpecs[0].template.spec.containers[0].resources.requests.'nvidia.com/gpu'"
        (problem,) = check_document(changed(document, where, "1")).problems
        assert problem.path == where.replace("'", "")
    assert "at most 53" in check_document(changed(cluster, "metadata.name", "x" * 54)).problems[0].message
    assert check_document(changed(cluster, "metadata.name", "x" * 53)).problems == []
    assert "at most 47" in check_document(changed(service, "metadata.name", "x" * 54)).problems[0].message
    for document, path, value in (
        (service, "spec.upgradeStrategy.type", "Recreate"),
        (cluster, "spec.upgradeStrategy.type", "NewCluster"),
        (service, "spec.rayClusterDeletionDelaySeconds", -1),
        (service, "spec.rayClusterConfig.authOptions.enableK8sTokenAuth", True),
        (service, "spec.rayClusterConfig.headGroupSpec.headService", {"metadata": {"name": "x"}}),
    ):
        assert check_document(changed(document, path, value)).problems[0].path.startswith(path)


def test_fields_that_are_null_are_dropped_as_the_api_server_drops_them() -> None:
    job = changed(objects()["RayJob"], f"{WORKERS}.template.metadata.annotations", None)
    assert check_document(changed(job, "spec.activeDeadlineSeconds", None)).problems == []


def test_rules_of_kueue_are_for_jobs_in_its_queues() -> None:
    staged = objects("deploy.queue=null", "deploy.keep_failed_seconds=60")["RayJob"]
    assert "shutdownAfterJobFinishes" not in staged["spec"]
    assert check_document(staged).problems == []
    queued = changed(staged, "metadata.labels.'kueue.x-k8s.io/queue-name'", "gpu")
    paths = {problem.path for problem in check_document(queued).problems}
    assert paths == {"spec.shutdownAfterJobFinishes", "spec.deletionStrategy.deletionRules"}


def test_a_secret_may_hold_secrets_and_other_kinds_are_checked_by_name() -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"password": "hunter2"}}
    assert check_document(secret)[1:] == ([], False)
    queue = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": "Q"}}
    checked = check_document(queue)
    assert [problem.path for problem in checked.problems] == ["metadata.name"]
    assert not checked.known


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"cluster_name": "x", "provider": {"type": "aws"}, "max_wrkers": 2}, "max_wrkers"),
        ({"cluster_name": "x"}, "provider"),
        ({"cluster_name": "x", "provider": {"type": "aws"}, "max_workers": "2"}, "max_workers"),
        (
            {
                "cluster_name": "x", "provider": {"type": "aws"}, "head_node_type": "haed", "max_workers": 4,
                "available_node_types": {"head": {"resources": {}, "node_config": {}}},
            },
            "head_node_type",
        ),
        (
            {
                "cluster_name": "x", "provider": {"type": "aws"}, "head_node_type": "a", "max_workers": 1,
                "available_node_types": {"a": {"resources": {}, "node_config": {}, "min_workers": 2, "max_workers": 2}},
            },
            "max_workers",
        ),
        ({"run": "true", "num_nodes": 0}, "num_nodes"),
        ({"run": ["true"]}, "run"),
        ({"resources": "A100"}, "resources"),
        ({"run": "true", "resources": {"use_spot": "yes"}}, "resources.use_spot"),
        ({"run": "true", "resources": {"use_spots": True}}, "resources.use_spots"),
        ({"run": "true", "resources": {"job_recovery": {"recover_on_exit_codes": [850]}}}, "resources.job_recovery.recover_on_exit_codes"),
        ({"run": "echo", "envs": {"WANDB_API_KEY": "hunter2"}}, "envs.WANDB_API_KEY"),
        ({"something": "else"}, "kind"),
        (["a list"], ""),
        ({"kind": "RayJob"}, "apiVersion"),
    ],
)  # fmt: skip
def test_clusters_of_machines_and_tasks_are_checked_too(document: Any, path: str) -> None:
    assert [problem.path for problem in check_document(document).problems] == [path]


objects_once = objects()
places = st.sampled_from(sorted(objects_once)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(st.integers(0, 40), min_size=1, max_size=12))
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.text(max_size=5),
    lambda part: st.lists(part, max_size=2) | st.dictionaries(st.text(max_size=5), part, max_size=2),
    max_leaves=4,
)


@given(place=places, value=values)
def test_no_manifest_breaks_the_check(place: tuple[str, list[int]], value: Any) -> None:
    kind, turns = place
    document = copy.deepcopy(objects_once[kind])
    parent: Any = document
    for turn in turns:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = keys[turn % len(keys)]
        if not isinstance(parent[key], dict | list) or not parent[key] or turn is turns[-1]:
            parent[key] = value
            break
        parent = parent[key]
    for problem in check_document(document).problems:
        assert "\n" not in problem.message


@given(number=st.integers(0, 10**6), unit=st.sampled_from(["", "m", "k", "M", "G", "Ki", "Mi", "Gi", "Ti"]))
def test_quantities_are_exact(number: int, unit: str) -> None:
    sizes = {"": 1, "k": 1000, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    expected = Decimal(number) / 1000 if unit == "m" else Decimal(number * sizes[unit])
    assert quantity(f"{number}{unit}") == expected


@pytest.mark.parametrize("text", ["", "Gi", "1.2.3", "1 Gi", "1gb", "--1", True, None])
def test_what_is_no_quantity_is_none(text: Any) -> None:
    assert quantity(text) is None


def test_quantities_may_be_fractions_and_powers() -> None:
    found = [quantity(text) for text in ("0.5", "1e3", ".5Gi", 2)]
    assert found == [Decimal("0.5"), Decimal(1000), Decimal(2**29), Decimal(2)]


def test_schemas_are_schemas_and_know_the_kinds() -> None:
    assert {kind.rpartition("/")[2] for kind in known_kinds()} == {
        "RayJob", "RayCluster", "RayService", "PodMonitor", "ConfigMap", "ServiceAccount", "PodDisruptionBudget",
    }  # fmt: skip
    for schema in _schemas().values():
        Draft202012Validator.check_schema(schema)


def test_a_key_that_stands_twice_and_what_is_no_yaml_are_refused() -> None:
    with pytest.raises(UserError, match=r"here is not YAML: backoffLimit stands twice in .* line 3"):
        check_text("spec:\n  backoffLimit: 1\n  backoffLimit: 2\n", source="here")
    with pytest.raises(UserError, match="here is not YAML"):
        check_text("a: [", source="here")


def test_the_verb_prints_every_problem_with_its_place_and_ends_with_2(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    job = objects()["RayJob"]
    wrong = changed(changed(job, "metadata.name", "x" * 48), "spec.backoffLimit", -1)
    good.write_text(yaml.safe_dump_all(objects().values()))
    bad.write_text(yaml.safe_dump_all([job, wrong]))
    fine = CliRunner().invoke(app, ["render", "--check", str(good)])
    assert fine.exit_code == 0
    assert [line.rsplit(": ", 1)[1] for line in fine.output.splitlines()] == ["ok"] * 5
    refused = CliRunner().invoke(app, ["render", "--check", str(good), str(bad)])
    assert isinstance(refused.exception, UserError)
    assert (refused.exception.exit_status, str(refused.exception)) == (2, "2 problems in 1 of 7 documents")
    assert f"{bad}: RayJob {'x' * 48}: spec.backoffLimit is -1; it must be 0 or more" in refused.output.splitlines()
    as_json = CliRunner().invoke(app, ["render", "--check", "--json", str(bad)])
    _, second = json.loads(as_json.output)
    assert [problem["path"] for problem in second["problems"]] == ["metadata.name", "spec.backoffLimit"]
