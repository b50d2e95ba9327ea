"""A job as Slurm runs it: a batch script that makes a Ray cluster out of its nodes and drives the job on the first."""

import math
import shlex

from vaejob.cluster.manifests.plan import Plan, check_reachable
from vaejob.errors import STOPPED_STATUS, ConfigError, OutsideError

END_OF_JOB = "END_OF_JOB"


def render_slurm(plan: Plan) -> dict[str, str]:
    """The script; raises ConfigError for settings that cannot stand in one."""
    check_reachable(plan, ["/"])  # nodes of a Slurm cluster share file systems
    config = plan.job.to_yaml()
    assert END_OF_JOB not in config.splitlines(), "a line of YAML has a colon or a dash"
    return {"job.sbatch": f"{_options(plan)}\n{_body(plan, config)}"}


def _options(plan: Plan) -> str:
    deploy = plan.deploy
    options = [
        f"--job-name={plan.name}",
        f"--nodes={plan.nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        "--mem=0",
        f"--mincpus={plan.cpus_per_node}",
        *([f"--gpus-per-node={plan.gpus_per_node}"] if plan.gpus_per_node else []),
        *([f"--partition={deploy.queue}"] if deploy.queue else []),
        *([f"--time={math.ceil(deploy.deadline_seconds / 60)}"] if deploy.deadline_seconds else []),
        f"--signal=B:USR1@{deploy.grace_seconds}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.out",
        *deploy.slurm_options,
    ]
    for option in options:
        if not option.startswith("-") or not option.isprintable():
            raise ConfigError(
                f"{option!r} is no option of sbatch; deploy.slurm_options must be such as --account=vision"
            )
    why = {
        "--exclusive": "whole nodes: Ray's ports and /tmp are shared with nobody",
        "--requeue": "a node that fails puts the job back in the queue; it goes on from its newest checkpoint",
        "--open-mode=append": "the log of every start in one file",
        f"--signal=B:USR1@{deploy.grace_seconds}": "to this script alone, before the time limit: save, then requeue",
    }
    lines = [f"{f'# {why[option]}{chr(10)}' if option in why else ''}#SBATCH {option}" for option in options]
    return "\n".join(["#!/bin/bash", f"# {plan.run!r} on Slurm: sbatch job.sbatch", *lines])


def _body(plan: Plan, config: str) -> str:
    deploy = plan.deploy
    setup = (
        "\n".join(deploy.setup)
        or "# deploy.setup stands here: what puts vaejob on PATH, on a file system that all nodes share"
    )
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in deploy.env.items())
    gpus = f" --num-gpus={plan.gpus_per_node}" if plan.gpus_per_node else ""
    return f"""\
set -euo pipefail

{setup}
{exports}
# A token for this job alone: nobody else on the network may run code in its cluster.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
ulimit -Sn 65535 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"

scratch=/tmp/vaejob-$SLURM_JOB_ID # short: sockets lie below it, whose paths have at most 107 bytes
mkdir -p "$scratch"
cat >"$scratch/job.yaml" <<'{END_OF_JOB}'
{config}{END_OF_JOB}

noticed='' driver='' again='' steps=()
# shellcheck disable=SC2329 # run by trap
notice() {{
  echo "notice: the time is nearly up; saving a checkpoint"
  noticed=yes
  [ -z "$driver" ] || kill -USR1 "$driver" # srun passes it on to vaejob, which saves and ends with {STOPPED_STATUS}
}}
trap notice USR1
trap '[ -z "$driver" ] || kill -TERM "$driver"' TERM
end() {{
  trap - EXIT
  [ ${{#steps[@]}} = 0 ] || kill "${{steps[@]}}" 2>/dev/null || true
  wait
  timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" rm -rf "$scratch" || true
}}
trap end EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${{nodes[0]}}
# Not 127.0.1.1, which some systems give their own name, nor IPv6.
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" bash -c 'hostname --ip-address 2>/dev/null; hostname --all-ip-addresses' |
  tr ' ' '\\n' | awk '/^[0-9.]+$/ && !/^127[.]/ {{ print; exit }}')
if [ -z "$head_ip" ]; then
  echo "$head has no IPv4 address that other nodes can reach"
  exit 2
fi
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS=$head_ip:$port
echo "start ${{SLURM_RESTART_COUNT:-0}} on $SLURM_JOB_NODELIST, Ray at $RAY_ADDRESS"

node=(ray start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_ON_NODE"{gpus})
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" --label "${{node[@]}}" --head --node-ip-address="$head_ip" \\
  --port="$port" --include-dashboard=false --temp-dir="$scratch/ray" &
steps=($!)
for _ in {{1..150}}; do
  ! ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1 || break
  kill -0 "${{steps[0]}}" # ends the job if the head has ended
  sleep 1
done
if ((SLURM_JOB_NUM_NODES > 1)); then
  others=$((SLURM_JOB_NUM_NODES - 1))
  srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" --label "${{node[@]}}" --address="$RAY_ADDRESS" &
  steps+=($!)
fi

status={STOPPED_STATUS}
if [ -z "$noticed" ]; then
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" --unbuffered vaejob train "$scratch/job.yaml" &
  driver=$!
  while :; do # a trapped signal ends wait before the driver ends
    status=0
    wait "$driver" || status=$?
    kill -0 "$driver" 2>/dev/null || break
  done
  wait "$driver" || status=$? # the driver's own, had it ended just as a signal ended wait
  driver=''
fi
echo "vaejob ended with $status"
case $status in
0 | 2 | {STOPPED_STATUS}) ;; # the log above says it all
*) tar -czf "$SLURM_JOB_NAME-$SLURM_JOB_ID-ray-logs.tar.gz" -C "$scratch/ray" . || true ;;
esac

end
# {STOPPED_STATUS}: stopped, with a checkpoint. {OutsideError.exit_status}: the bucket or the cluster failed. The rest a repetition would not mend.
if [ -n "$noticed" ] && [ "$status" = {STOPPED_STATUS} ]; then
  again=yes
elif [ "$status" = {OutsideError.exit_status} ] && ((${{SLURM_RESTART_COUNT:-0}} < {deploy.retries})); then
  again=yes
fi
if [ -n "$again" ]; then
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # Slurm ends this script
fi
exit "$status"
"""
