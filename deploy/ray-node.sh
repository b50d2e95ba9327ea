#!/bin/bash
# One node of a Ray cluster that runs vaejob jobs, in the foreground: under systemd, in a container, or in a shell.
#
#   deploy/ray-node.sh head                 the first node; jobs go to http://HOST:8265
#   deploy/ray-node.sh worker HEAD:6379     each further node
#
# Options of `ray start` may follow. ray, python and vaejob's dependencies must be on PATH; credentials for the bucket
# must be in this environment (or come from the machine's role), since workers inherit it from here, not from the driver.
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

# Ray turns tokens on for a head where it finds one, and for nobody else: say it everywhere, on every node alike.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled}
export RAY_USAGE_STATS_ENABLED=0
# What a SIGTERM gives the workers to save a checkpoint. Whatever supervises this node must wait longer than that.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-90}

case ${1:-} in
head)
  shift
  exec ray start --head --block --disable-usage-stats --port="${PORT:-6379}" \
    --dashboard-host="${DASHBOARD_HOST:-127.0.0.1}" --dashboard-port="${DASHBOARD_PORT:-8265}" "$@"
  ;;
worker)
  address=${2:-}; [ -n "$address" ] || usage
  shift 2
  exec ray start --address="$address" --block --disable-usage-stats "$@"
  ;;
*) usage ;;
esac
