"""A job as SkyPilot 0.14 runs it: one managed task, whose nodes make a Ray cluster of their own."""

from typing import Any

from vaejob.cluster.manifests.documents import to_yaml
from vaejob.cluster.manifests.patches import patched
from vaejob.cluster.manifests.plan import Plan, check_reachable, image_of
from vaejob.errors import STOPPED_STATUS, ConfigError

HEAD_PORT = 6379
AGENT_PORT = 52366
"""SkyPilot's own Ray on the same nodes has 6380, 8266 and the dashboard agent's usual port."""


def render_skypilot(plan: Plan) -> dict[str, str]:
    """The task; raises ConfigError for a missing image or GPU, or data that only one node would have."""
    task = patched({"skypilot": _task(plan)}, plan.deploy.patches).get("skypilot")
    if task is None:
        raise ConfigError("deploy.patches leaves the skypilot task out, which is all there is")
    check_reachable(plan, list(task.get("file_mounts") or {}))
    return {"task.yaml": to_yaml(task, COMMENTS)}


def _task(plan: Plan) -> dict[str, Any]:
    deploy = plan.deploy
    if plan.gpus_per_node and not deploy.accelerator:
        raise ConfigError(
            "deploy.accelerator is missing with cluster.gpus_per_worker=1; it must be a GPU's name, such as H100"
        )
    resources = {
        "image_id": f"docker:{image_of(plan)}",
        "cpus": f"{plan.cpus_per_node}+",
        "memory": f"{deploy.memory_gib_per_worker * deploy.workers_per_node}+",
        **({"accelerators": f"{deploy.accelerator}:{plan.gpus_per_node}"} if plan.gpus_per_node else {}),
        "use_spot": deploy.spot,
        **({"network_tier": "best"} if plan.nodes > 1 and plan.gpus_per_node else {}),
        "job_recovery": {
            "max_restarts_on_errors": deploy.retries,
            "recover_on_exit_codes": [STOPPED_STATUS],
        },
    }
    return {
        "name": plan.name,
        "num_nodes": plan.nodes,
        "resources": resources,
        "envs": {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", **deploy.env},
        "secrets": {"RAY_AUTH_TOKEN": None},
        "run": _run(plan),
    }


def _run(plan: Plan) -> str:
    setup = "".join(f"{line}\n" for line in plan.deploy.setup)
    gpus = f" --num-gpus={plan.gpus_per_node}" if plan.gpus_per_node else ""
    start = f"ray start --dashboard-agent-listen-port={AGENT_PORT} --disable-usage-stats{gpus}"
    return f"""\
set -euo pipefail
{setup}head_ip=$(head -n1 <<<"$SKYPILOT_NODE_IPS")
if [ "$SKYPILOT_NODE_RANK" != 0 ]; then
  until ray health-check --address "$head_ip:{HEAD_PORT}" >/dev/null 2>&1; do sleep 2; done
  {start} --address="$head_ip:{HEAD_PORT}"
  exit 0
fi
cat >/tmp/job.yaml <<'END_OF_JOB'
{plan.job.to_yaml()}END_OF_JOB
{start} --head --node-ip-address="$head_ip" --port={HEAD_PORT} --dashboard-port=8265
RAY_ADDRESS="$head_ip:{HEAD_PORT}" vaejob train /tmp/job.yaml
"""


COMMENTS = {
    "": "RAY_AUTH_TOKEN=$(openssl rand -hex 32) sky jobs launch --secret RAY_AUTH_TOKEN task.yaml",
    "resources.image_id": "The same bytes on every node, and after every recovery.",
    "resources.use_spot": "A task whose machines are taken back starts again on others; the run goes on from its newest checkpoint.",
    "resources.job_recovery": f"{STOPPED_STATUS}: stopped, with a checkpoint; it is always started again. Other failures count.",
    "secrets": "Given on the command line, kept out of this file: who has it may run code on the nodes.",
    "run": "Not `ray stop`, nor SkyPilot's ports: its own Ray runs on the same nodes.",
}
