"""What `vaejob render` makes of a job: current, the same every time, taken by those it is for, and free of secrets."""

import itertools
import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import vaejob
from vaejob.cli import app
from vaejob.cluster.manifests.check import check_document, check_text
from vaejob.cluster.manifests.documents import read_documents, to_yaml
from vaejob.cluster.manifests.kuberay import COMMENTS
from vaejob.cluster.manifests.merge import merged
from vaejob.cluster.manifests.pod_rules import DRAIN, quantity
from vaejob.cluster.manifests.targets import TARGETS, render
from vaejob.config import JobConfig, parse_config
from vaejob.errors import ConfigError

DEPLOY = Path(__file__).parents[1] / "deploy"
EXAMPLE = DEPLOY / "example-job.yaml"
COMMANDS = re.findall(r"^#   (vaejob render (\S+) .*)$", EXAMPLE.read_text(), flags=re.MULTILINE)
DIGEST = "registry.example/vaejob@sha256:" + "0123456789abcdef" * 4


def example(*overrides: str) -> JobConfig:
    return vaejob.load_config(str(EXAMPLE), *overrides)


def kuberay(*overrides: str) -> dict[str, Any]:
    """The rendered objects by kind."""
    return {item["kind"]: item for item in map(yaml.safe_load, render("kuberay", example(*overrides)).values())}


def refusal(target: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        render(target, example(*overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_there_is_an_example_of_every_target() -> None:
    assert [target for _, target in COMMANDS] == list(TARGETS)


@pytest.mark.parametrize(("command", "target"), COMMANDS)
def test_rendered_examples_are_current(command: str, target: str) -> None:
    overrides = [word for word in command.split() if re.fullmatch(r"\w+\.\w+=\S+", word)]
    files = render(target, example(*overrides))
    there = {path.name: path.read_text() for path in (DEPLOY / target).iterdir() if path.suffix in (".yaml", ".sbatch")}
    assert there == files, f"repeat: {command}"
    assert render(target, example(*overrides)) == files


@pytest.mark.parametrize("target", ["kuberay", "ray-up", "skypilot"])
def test_rendered_examples_are_valid_and_of_known_kinds(target: str) -> None:
    for name, text in render(target, example()).items():
        for checked in check_text(text, source=name):
            assert (checked.problems, checked.known) == ([], True), checked


@settings(max_examples=30)
@given(
    nodes=st.integers(1, 64),
    per_node=st.integers(1, 8),
    gpus=st.integers(0, 1),
    cores=st.integers(1, 32),
    memory_gib=st.integers(1, 512),
    grace_seconds=st.integers(15, 3600),
    cache_bytes=st.integers(1, 10**13),
    efa=st.integers(0, 32),
    spot=st.booleans(),
    kept=st.sampled_from([0, 3600]),
    queue=st.sampled_from([None, "kueue", "volcano"]),
)
def test_every_job_is_one_gang_with_what_its_workers_ask_for(
    nodes: int, per_node: int, gpus: int, cores: int, memory_gib: int, grace_seconds: int, cache_bytes: int, efa: int,
    spot: bool, kept: int, queue: str | None,
) -> None:  # fmt: skip
    assume(not (kept and queue == "kueue"))
    settings = {
        "cluster": {"workers": nodes * per_node, "gpus_per_worker": gpus, "cpus_per_worker": cores},
        "deploy": {
            "image": DIGEST, "workers_per_node": per_node, "memory_gib_per_worker": memory_gib, "efa": efa, "spot": spot,
            "grace_seconds": grace_seconds, "keep_failed_seconds": kept, "scheduler": queue or "kueue",
            "queue": queue and "here",
        },
    }  # fmt: skip
    job = parse_config(
        yaml.safe_dump(merged(JOB, settings | {"data": {"cache_dir": "/cache", "cache_bytes": cache_bytes}}))
    )
    objects = {item["kind"]: item for item in map(yaml.safe_load, render("kuberay", job).values())}
    cluster = objects["RayJob"]["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == nodes
    assert objects["PodDisruptionBudget"]["spec"]["minAvailable"] == nodes + 1
    head, worker = (part["template"]["spec"]["containers"][0] for part in (cluster["headGroupSpec"], group))
    for container in (head, worker):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        drain = int(next(item["value"] for item in container["env"] if item["name"] == DRAIN))
        assert 0 < drain <= grace_seconds - 10
    amounts = worker["resources"]["limits"]
    assert int(amounts["cpu"]) > per_node * cores
    assert int(amounts.get("nvidia.com/gpu", 0)) == per_node * gpus
    assert quantity(amounts["memory"]) == per_node * memory_gib * 2**30
    volumes = {
        volume["name"]: volume.get("emptyDir", {}).get("sizeLimit") for volume in group["template"]["spec"]["volumes"]
    }
    limits = [quantity(volumes[name]) or 0 for name in ("tmp", "shard-cache")]
    assert limits[1] > cache_bytes
    assert quantity(amounts["ephemeral-storage"]) == sum(limits)


JOB: dict[str, Any] = {
    "run": {"name": "mnist", "bucket": "s3://models"},
    "data": {"train": "s3://images/train"},
    "training": {"images": 1000},
}


def test_driver_of_every_target_is_a_command_of_this_program_with_the_configuration_as_it_was() -> None:
    job = example("deploy.queue=gpu", "cluster.address=laptop:6379")
    there = job.cluster.model_copy(update={"address": None, "wait_seconds": 600.0})
    expected = job.model_copy(update={"cluster": there})
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]

    files = render("kuberay", job)
    spec = yaml.safe_load(files["rayjob.yaml"])["spec"]
    program, verb, *words = spec["entrypoint"].split()
    assert program == "vaejob"
    arguments = verbs[verb].make_context(verb, words).params
    assert arguments["config"] == "/etc/vaejob/job.yaml"
    config_map = yaml.safe_load(files["config.yaml"])
    assert parse_config(config_map["data"]["job.yaml"]) == expected
    for group in (spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"][0]):
        pod = group["template"]["spec"]
        volume = next(item for item in pod["volumes"] if "configMap" in item)
        assert volume["configMap"]["name"] == config_map["metadata"]["name"]
        mount = next(item for item in pod["containers"][0]["volumeMounts"] if item["name"] == volume["name"])
        assert mount["mountPath"] == "/etc/vaejob"

    task = yaml.safe_load(render("skypilot", job)["task.yaml"])
    for script in (render("slurm", job)["job.sbatch"], task["run"]):
        (words_of_driver,) = re.findall(r"vaejob (train .*?)(?: &)?$", script, flags=re.MULTILINE)
        verb, config = words_of_driver.split()
        assert verbs[verb].make_context(verb, [config]).params["config"] == config
        heredoc = re.search(r"<<'END_OF_JOB'\n(.*?)^END_OF_JOB$", script, flags=re.MULTILINE | re.DOTALL)
        assert heredoc is not None
        assert parse_config(heredoc[1]) == expected


def test_ray_itself_accepts_the_cluster_of_machines() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(render("ray-up", example())["cluster.yaml"])))


def test_a_spot_job_has_its_head_and_submitter_elsewhere() -> None:
    spec = kuberay("deploy.spot_label=cloud.google.com/gke-spot=true")["RayJob"]["spec"]
    worker = spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert worker["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"} in worker["tolerations"]
    for pod in (spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"], spec["submitterPodTemplate"]["spec"]):
        required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (expression,) = required["nodeSelectorTerms"][0]["matchExpressions"]
        assert expression == {"key": "cloud.google.com/gke-spot", "operator": "NotIn", "values": ["true"]}
        assert "tolerations" not in pod


def test_no_pod_is_root_or_writes_outside_its_volumes() -> None:
    spec = kuberay()["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    for template in (
        cluster["headGroupSpec"]["template"],
        cluster["workerGroupSpecs"][0]["template"],
        spec["submitterPodTemplate"],
    ):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
            assert {"name": "HOME", "value": "/tmp"} in container["env"]


def test_queues_are_told_on_the_rayjob() -> None:
    kueue = kuberay("deploy.queue=gpu", "deploy.priority=high")["RayJob"]
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert kueue["spec"]["shutdownAfterJobFinishes"] is True
    volcano = kuberay("deploy.queue=gpu", "deploy.priority=high", "deploy.scheduler=volcano")["RayJob"]["metadata"][
        "labels"
    ]
    assert volcano["volcano.sh/queue-name"] == "gpu"
    assert volcano["ray.io/priority-class-name"] == "high"
    assert "kueue.x-k8s.io/queue-name" not in volcano


def test_every_comment_stands_somewhere() -> None:
    renderings = [
        render("kuberay", example()),
        render("kuberay", example("deploy.queue=null", "deploy.keep_failed_seconds=60")),
    ]
    lines = {line.strip() for files in renderings for text in files.values() for line in text.splitlines()}
    text = " ".join(" ".join(line.removeprefix("# ") for line in files[name].splitlines() if line.strip().startswith("#"))
                    for files in renderings for name in files)  # fmt: skip
    text = re.sub(r"\s+#?\s*", " ", text)
    assert lines
    for comment in itertools.chain.from_iterable(part.values() for part in COMMENTS.values()):
        assert comment in text, comment


SECRETS = {
    "run.bucket=s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@models": "wJalrXUtnFEMI",
    "data.train=s3://images/train?X-Amz-Signature=5d672d79c15b13162d9279b": "5d672d79c15b13162d9279b",
    "data.test=https://me:hunter2@images.example/test": "hunter2",
    "deploy.env={AWS_SECRET_ACCESS_KEY: wJalrXUtnFEMI}": "wJalrXUtnFEMI",
    "deploy.env={AWS_ACCESS_KEY_ID: AKIAIOSFODNN7EXAMPLE}": "AKIAIOSFODNN7EXAMPLE",
    "deploy.env={HF_TOKEN: hunter2}": "hunter2",
    "deploy.env={PROXY: 'http://me:hunter2@proxy.example:3128'}": "hunter2",
    "deploy.setup=[export AWS_SECRET_ACCESS_KEY=hunter2]": "hunter2",
    "deploy.slurm_options=['--export=ALL,DB_PASSWORD=hunter2']": "hunter2",
    "deploy.service_account_annotations={note: 'ghp_0123456789abcdefghijABCDEFGHIJ012345'}": "ghp_",
    "deploy.patches=[{kind: ServiceAccount, merge: {metadata: {annotations: {apiKey: hunter2}}}}]": "hunter2",
    "deploy.patches=[{kind: RayJob, merge: {spec: {runtimeEnvYAML: 'env_vars: {API_KEY: hunter2}'}}}]": "hunter2",
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("planted", SECRETS)
def test_secrets_are_refused_and_not_repeated(planted: str, target: str) -> None:
    message = refusal(target, planted)
    assert SECRETS[planted] not in message
    assert planted.partition("=")[0] in message


@pytest.mark.parametrize(
    "harmless",
    [
        "deploy.secret_name=minio-keys",
        "deploy.env={AWS_WEB_IDENTITY_TOKEN_FILE: /var/run/token, TOKENIZERS_PARALLELISM: 'false'}",
        "deploy.env={AWS_ENDPOINT_URL: 'https://minio.example:9000/x@y'}",
        "deploy.setup=['export RAY_AUTH_TOKEN=$(cat /run/token)']",
        "run.bucket=s3://models/a:b",
    ],
)
def test_places_of_secrets_are_no_secrets(harmless: str) -> None:
    assert render("kuberay", example(harmless))


@pytest.mark.parametrize(
    ("target", "setting", "says"),
    [
        ("kuberay", "run.name=CelebA_64.v2", "set deploy.name=celeba-64-v2"),
        ("kuberay", f"deploy.name={'x' * 48}", "deploy.name is"),
        ("kuberay", "deploy.image=null", "deploy.image is missing"),
        ("kuberay", "deploy.image=vaejob:1.0", "deploy.allow_tag=true"),
        ("skypilot", "deploy.image=vaejob@sha256:0123", "deploy.allow_tag=true"),
        ("kuberay", "cluster.workers=0", "cluster.workers is 0"),
        ("slurm", "deploy.workers_per_node=3", "it must divide cluster.workers, which is 16"),
        ("kuberay", "run.bucket=runs", "run.bucket is /"),
        ("kuberay", "data.train=/data/train", "data.train is /data/train, a folder"),
        ("skypilot", "data.test=/data/test", "data.test is /data/test, a folder"),
        ("slurm", "run.bucket=memory://here", "run.bucket is memory://here, a folder"),
        ("kuberay", "run.bucket=s3://models/$HOME", "it must have no $"),
        ("kuberay", "deploy.keep_failed_seconds=60", "deploy.keep_failed_seconds is 60 with deploy.queue=gpu"),
        ("skypilot", "deploy.accelerator=null", "deploy.accelerator is missing"),
        ("ray-up", "deploy.instance_type=null", "deploy.instance_type is missing"),
        ("slurm", "deploy.slurm_options=[account=vision]", "'account=vision' is no option of sbatch"),
        ("kuberay", "deploy.namespace=My_Space", "metadata.namespace is 'My_Space'"),
        ("kuberay", "deploy.queue=no queue", "metadata.labels.kueue.x-k8s.io/queue-name is 'no queue'"),
        ("kuberay", "deploy.service_account=Me", "metadata.name is 'Me'"),
        ("ray-up", "deploy.patches=[{kind: ray-up, merge: {max_wrkers: 9}}]", "max_wrkers is no field here; did you mean max_workers?"),
        ("skypilot", "deploy.patches=[{kind: skypilot, merge: {num_node: 9}}]", "num_node is no field here; did you mean num_nodes?"),
        ("skypilot", "deploy.patches=[{kind: skypilot, merge: null}]", "which is all there is"),
    ],
)  # fmt: skip
def test_what_a_target_would_refuse_is_refused_here(target: str, setting: str, says: str) -> None:
    overrides = ["deploy.queue=gpu"] if "queue" not in setting else []
    assert says in refusal(target, *overrides, setting)


@settings(max_examples=30)
@given(name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True))
def test_a_refused_name_comes_with_one_that_is_taken(name: str) -> None:
    settings = merged(JOB, {"run": {"name": name}, "deploy": {"image": DIGEST}})
    job = JobConfig.model_validate(settings)
    try:
        assert render("kuberay", job)
    except ConfigError as error:
        (suggested,) = re.findall(r"set deploy\.name=(\S+)$", str(error))
        settings["deploy"]["name"] = suggested
        (rendered,) = (yaml.safe_load(text) for file, text in render("kuberay", JobConfig.model_validate(settings)).items() if file == "rayjob.yaml")  # fmt: skip
        assert rendered["metadata"]["name"] == suggested


def test_a_volume_that_a_patch_mounts_makes_folders_reachable() -> None:
    pod = {
        "volumes": [{"name": "images", "persistentVolumeClaim": {"claimName": "images"}}],
        "containers": [{"name": "ray-worker", "volumeMounts": [{"name": "images", "mountPath": "/images"}]}],
    }
    group = {"groupName": "workers", "template": {"spec": pod}}
    patch = json.dumps([{"kind": "RayJob", "merge": {"spec": {"rayClusterSpec": {"workerGroupSpecs": [group]}}}}])
    folders = ["data.train=/images/train", "data.test=/images/test"]
    assert "data.train is /images/train" in refusal("kuberay", *folders)
    workers = kuberay(*folders, f"deploy.patches={patch}")["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert workers["replicas"] == 2  # the group was merged, not replaced
    assert workers["template"]["spec"]["containers"][0]["volumeMounts"][-1] == {
        "name": "images",
        "mountPath": "/images",
    }
    assert [volume["name"] for volume in workers["template"]["spec"]["volumes"]][-2:] == ["shard-cache", "images"]


def test_a_patch_of_null_leaves_the_object_out() -> None:
    assert "PodMonitor" not in kuberay("deploy.patches=[{kind: PodMonitor, merge: null}]")
    assert "PodMonitor" in refusal(
        "kuberay", "deploy.patches=[{kind: PodMonitor, merge: null}, {kind: PodMonitor, merge: {}}]"
    )


def test_a_patch_is_checked_like_the_rest() -> None:
    limits = {"nvidia.com/gpu": "4"}
    container = {"name": "ray-worker", "resources": {"limits": limits}}
    group = {"groupName": "workers", "template": {"spec": {"containers": [container]}}}
    patch = json.dumps([{"kind": "RayJob", "merge": {"spec": {"rayClusterSpec": {"workerGroupSpecs": [group]}}}}])
    message = refusal("kuberay", f"deploy.patches={patch}")
    assert "workerGroupSpecs[0].template.spec.containers[0].resources.requests.nvidia.com/gpu is '8'" in message


@pytest.mark.parametrize(
    ("document", "patch", "result"),
    [  # the cases of RFC 7386, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        # and items that have names
        ([{"name": "x", "v": 1}, {"name": "y"}], [{"name": "x", "v": 2}], [{"name": "x", "v": 2}, {"name": "y"}]),
        ([{"name": "x"}], [{"name": "z", "v": None}], [{"name": "x"}, {"name": "z"}]),
        ([{"name": "x"}], [], []),
    ],
)
def test_patches_are_json_merge_patches(document: Any, patch: Any, result: Any) -> None:
    assert merged(document, patch) == result


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n"), max_size=20)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
documents = st.recursive(
    leaves,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(texts.filter(bool), part, max_size=3),
    max_leaves=15,
)


@given(document=st.dictionaries(texts.filter(bool), documents, min_size=1, max_size=4))
def test_what_is_written_is_read_back(document: dict[str, Any]) -> None:
    comments = {"": "the whole", next(iter(document)): "its first key: 'x', {y}\nin two lines"}
    (again,) = read_documents(to_yaml(document, comments), source="here")
    assert again == document


def test_comments_stand_above_what_they_explain() -> None:
    document = {"spec": {"containers": [{"name": "a", "env": [{"name": "X", "value": "1"}]}, {"name": "b"}]}}
    text = to_yaml(document, {"spec.containers[a].env[X]": "why X", "spec.containers[b]": "why b", "spec.gone": "no"})
    assert text.splitlines() == [
        "spec:", "  containers:", "  - name: a", "    env:", "    # why X", "    - name: X", "      value: '1'",
        "  # why b", "  - name: b",
    ]  # fmt: skip


def test_the_batch_script_is_shell_that_shellcheck_finds_nothing_in(tmp_path: Path) -> None:
    beside_python = Path(sys.executable).with_name("shellcheck")
    script = tmp_path / "job.sbatch"
    for overrides in (
        [],
        ["cluster.workers=1", "deploy.workers_per_node=1", "cluster.gpus_per_worker=0", "deploy.env={A: it's}"],
    ):
        script.write_text(render("slurm", example(*overrides))["job.sbatch"])
        found = subprocess.run([beside_python, script], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout) == (0, "")


SRUN = """#!/bin/bash
# Runs a step's command here; passes USR1 on, as srun does.
while [ "${1#-}" != "$1" ]; do shift; done
child=
trap 'kill -USR1 $child' USR1
trap 'kill $child; exit 143' TERM
"$@" & child=$!
while :; do status=0; wait $child || status=$?; kill -0 $child 2>/dev/null || break; done
exit $status
"""
COMMANDS_OF_SLURM = {
    "srun": SRUN,
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && printf "n1\\nn2\\n" || { echo "scontrol $*" >>"$LOG"; kill -9 $PPID; }\n',
    "hostname": "#!/bin/bash\necho 127.0.1.1 10.1.2.3\n",
    "ray": '#!/bin/bash\necho "ray $*" >>"$LOG"; [ "$1" = health-check ] || exec sleep 60\n',
    "vaejob": '#!/bin/bash\ntrap "exit 85" USR1\necho "vaejob $* $RAY_ADDRESS" >>"$LOG"; cp "$2" "$LOG.job"\n'
    'until grep -q "ray start.*--address" "$LOG"; do sleep 0.05; done\n'
    'case $ENDS in notice) kill -USR1 $(cat "$LOG.pid"); while :; do sleep 0.05; done;; *) exit "$ENDS";; esac\n',
}


@pytest.mark.parametrize(
    ("ends", "restarts", "status", "requeued"),
    [("0", 0, 0, False), ("2", 0, 2, False), ("3", 0, -9, True), ("3", 3, 3, False), ("85", 0, 85, False), ("notice", 9, -9, True)],
)  # fmt: skip
def test_the_batch_script_starts_ray_drives_the_job_and_requeues_what_may_go_on(
    ends: str, restarts: int, status: int, requeued: bool, tmp_path: Path
) -> None:
    """With Slurm's commands replaced by ones that run steps here. scontrol requeue ends the script, as Slurm does."""
    log, job_id = tmp_path / "log", str(900_000_000 + abs(hash(tmp_path)) % 1000)
    found, output = run_batch_script(tmp_path, COMMANDS_OF_SLURM, job_id=job_id, ends=ends, restarts=restarts)
    assert found == status, output
    lines = log.read_text().splitlines()
    port = 20000 + int(job_id) % 10000
    assert sum("--head" in line and f"--port={port}" in line for line in lines) == 1
    assert sum(f"--address=10.1.2.3:{port}" in line for line in lines) == 1
    assert f"vaejob train /tmp/vaejob-{job_id}/job.yaml 10.1.2.3:{port}" in lines
    assert (f"scontrol requeue {job_id}" in lines) == requeued
    assert parse_config(Path(f"{log}.job").read_text()).run == example().run


def run_batch_script(
    folder: Path, commands: Mapping[str, str], *, job_id: str, ends: str = "0", restarts: int = 0
) -> tuple[int, str]:
    """Its exit status and what it says."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in commands.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    script = folder / "job.sbatch"
    text = render("slurm", example())["job.sbatch"]
    script.write_text(text.replace("set -euo pipefail\n", 'set -euo pipefail\necho $$ >"$LOG.pid"\n', 1))
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin", "LOG": str(folder / "log"), "ENDS": ends, "SLURM_JOB_ID": job_id,
        "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "4",
        "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    with (folder / "output").open("w") as output:
        done = subprocess.run(["bash", script], env=environment, cwd=folder, stdout=output, stderr=output, check=False)
    shutil.rmtree(f"/tmp/vaejob-{job_id}", ignore_errors=True)
    return done.returncode, (folder / "output").read_text()


def test_the_batch_script_needs_an_address_that_other_nodes_can_reach(tmp_path: Path) -> None:
    """And says nothing of a name that has none."""
    nameless = '#!/bin/bash\n[ "$1" = --all-ip-addresses ] && echo 127.0.0.1 fe80::1 || { echo no address for name >&2; exit 1; }\n'
    commands = COMMANDS_OF_SLURM | {"hostname": nameless}
    job_id = str(900_001_000 + abs(hash(tmp_path)) % 1000)
    assert run_batch_script(tmp_path, commands, job_id=job_id) == (
        2,
        "n1 has no IPv4 address that other nodes can reach\n",
    )


def test_printed_and_written_are_the_same(tmp_path: Path) -> None:
    runner = CliRunner()
    printed = runner.invoke(app, ["render", "kuberay", str(EXAMPLE)])
    written = runner.invoke(app, ["render", "kuberay", str(EXAMPLE), "--out", str(tmp_path / "new")])
    assert (printed.exit_code, written.exit_code) == (0, 0)
    *paths, after = written.output.splitlines()
    assert after == f"next: kubectl apply -f {tmp_path / 'new'}"
    texts = [Path(path).read_text() for path in paths]
    assert printed.output == "---\n".join(texts)
    assert all(check_document(document).problems == [] for document in read_documents(printed.output, source="-"))


def test_the_command_line_loads_neither_torch_nor_ray() -> None:
    code = "import sys, vaejob.cli, vaejob.cli.render; assert not {'torch', 'ray', 'jsonschema'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_manifests_are_made_without_ray() -> None:
    code = "import sys, vaejob.cluster.manifests.targets; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
