#!/bin/bash
# One real S3 server: Ceph's mon, osd (in memory) and radosgw on 127.0.0.1, all files below one folder, no systemd.
#   ceph_rgw.sh start DIR S3_PORT MON_PORT    needs an empty DIR; AK and SK in the environment are the keys
#   ceph_rgw.sh stop DIR                      ends the daemons and removes DIR
#   ceph_rgw.sh watch DIR PID                 waits for a process to end, then stops
set -euo pipefail
command=$1 dir=$2
export CEPH_CONF=$dir/ceph.conf

wait_until() { # wait_until TENTHS_OF_A_SECOND COMMAND...
  local tenths=$1; shift
  for _ in $(seq "$tenths"); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done
  echo "waited $((tenths / 10)) s in vain for: $*" >&2
  return 1
}

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1"); }
osd_is_up() { ceph osd stat | grep -q "1 up"; }

spawn() { # spawn NAME COMMAND...
  local name=$1; shift
  setsid "$@" >"$dir/log/$name.out" 2>&1 </dev/null &
  echo $! >"$dir/$name.pid"
}

configure() { # configure MON_PORT
  local fsid; fsid=$(cat /proc/sys/kernel/random/uuid)
  cat >"$CEPH_CONF" <<CONF
[global]
fsid = $fsid
mon_host = v2:127.0.0.1:$1
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = $dir/keyring
run_dir = $dir/run
admin_socket = $dir/run/\$name.asok
log_file = $dir/log/\$name.log
crash_dir = $dir/log
mon_cluster_log_file = $dir/log/cluster.log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_warn_on_pool_no_redundancy = false
[mon]
mon_data = $dir/mon
mon_data_avail_crit = 1
mon_data_avail_warn = 2
# without these two, making users and pools takes 8 s instead of 1 s
paxos_propose_interval = 0.1
paxos_min_wait = 0.02
[osd]
osd_data = $dir/osd
osd_objectstore = memstore
osd_class_load_list = *
osd_class_default_list = *
memstore_device_bytes = $((4 << 30))
[client]
rgw_data = $dir/rgw
rgw_rados_pool_pg_num_min = 8
rgw_enable_usage_log = false
rgw_enable_ops_log = false
rgw_thread_pool_size = 64
rgw_dns_name = 127.0.0.1
CONF
  monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$1]" "$dir/monmap"
  # radosgw does not start without cephx
  ceph-authtool -C "$dir/keyring" --gen-key -n mon. --cap mon 'allow *'
  ceph-authtool "$dir/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  ceph-authtool "$dir/keyring" --gen-key -n client.rgw.a --cap mon 'allow rw' --cap osd 'allow rwx'
  ceph-authtool "$dir/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
  ceph-mon --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
}

start() { # start S3_PORT MON_PORT
  mkdir -p "$dir"/{mon,osd,run,rgw,log}
  configure "$2" >"$dir/log/configure.out" 2>&1
  spawn mon ceph-mon -f -i a
  wait_until 200 timeout 20 ceph --connect-timeout 2 mon stat
  local uuid; uuid=$(cat /proc/sys/kernel/random/uuid)
  ceph osd new "$uuid" >/dev/null
  ceph-osd -i 0 --mkfs --osd-uuid "$uuid" >"$dir/log/mkfs.out" 2>&1
  spawn osd ceph-osd -f -i 0
  wait_until 300 osd_is_up
  radosgw-admin user create --uid=vaejob --display-name=vaejob --access-key="$AK" --secret="$SK" \
    >/dev/null 2>"$dir/log/admin.err"
  # without tcp_nodelay a small GET takes 49 ms instead of 3 ms
  spawn rgw radosgw -f -n client.rgw.a --keyring "$dir/keyring" \
    --rgw_frontends="beast endpoint=127.0.0.1:$1 tcp_nodelay=1"
  wait_until 600 answers "$1"
}

stop() {
  for name in rgw osd mon; do
    if [ -f "$dir/$name.pid" ]; then kill -KILL "$(cat "$dir/$name.pid")" 2>/dev/null || true; fi # nothing is kept
  done
  wait_until 50 rm -rf "$dir"
}

case $command in
  start) start "$3" "$4" ;;
  stop) stop ;;
  watch)
    while kill -0 "$3" 2>/dev/null && [ -d "$dir" ]; do sleep 1; done
    stop
    ;;
  *) echo "usage: start DIR S3_PORT MON_PORT | stop DIR | watch DIR PID" >&2; exit 2 ;;
esac
