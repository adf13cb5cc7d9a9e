#!/usr/bin/env bash
# netlab.sh - several "hosts" on one Linux machine: one network namespace each,
# joined by a bridge that lives in its own namespace, with shaped links.
# Nothing is added to the machine's own network namespace and there is no route
# out, so traffic stays between the hosts.  Needs: iproute2 (ip, tc), util-linux
# (nsenter, unshare), root or user namespaces.  bed.py drives it for tests and
# benchmarks; by hand it serves as well.
#
#   netlab.sh check                 can a bed be made here? 0 yes, 77 no (reason on stderr)
#   netlab.sh up N [RATE]           make hosts 0..N-1 (10.77.0.1 ..), optionally shaped
#   netlab.sh exec I CMD...         run CMD on host I, with its own hostname and
#                                   /etc/hosts (exec all the way: the pid stays the same)
#   netlab.sh addr I                print host I's address
#   netlab.sh shape I|all RATE [BURST]   limit egress and ingress, e.g. 200mbit
#   netlab.sh local I|all RATE      limit loopback too (one queue for both directions)
#   netlab.sh unshape I|all
#   netlab.sh link I up|down        carrier down at the switch side (a pulled cable)
#   netlab.sh pause I|cont I        SIGSTOP / SIGCONT every process on host I
#   netlab.sh kill I                SIGKILL every process on host I: the host is dead
#   netlab.sh pids I                processes on host I
#   netlab.sh status                addresses, shaping and drops
#   netlab.sh down [--kill]         remove the bed (refuses while processes run,
#                                   --kill ends exactly those processes first)
#   netlab.sh rootless CMD...       run CMD as root of a fresh user+net+mount+pid
#                                   namespace, where all of the above work
#   netlab.sh rooted CMD...         the same without a user namespace, for root
#
# A bed made inside `rootless` or `rooted` cannot outlive CMD; one made by `up`
# alone stays until `down`.
#
# Environment: NETLAB_PREFIX (nl; another one for a second bed), NETLAB_NET
# (10.77.0), NETLAB_INGRESS (1: shape also sets ingress; 0: leaves it as it is).
set -euo pipefail
P=${NETLAB_PREFIX:-nl}
NET=${NETLAB_NET:-10.77.0}
INGRESS=${NETLAB_INGRESS:-1}
SW=${P}sw
STATE=/run/netlab-$P

die() { echo "netlab: $*" >&2; exit 1; }
skip() { echo "netlab: not available: $*" >&2; exit 77; }
in_ns() { local ns=$1; shift; nsenter --net="/run/netns/$ns" "$@"; }
host_ids() {
  ip netns list | awk -v p="$P" '{ n = $1 } index(n, p) == 1 {
    s = substr(n, length(p) + 1); if (s ~ /^[0-9]+$/) print s }' | sort -n
}
each() { if [ "$1" = all ]; then host_ids; else echo "$1"; fi; }

bits() {  # 200mbit -> 200000000
  local v=${1,,}
  case $v in
    *gbit) awk -v x="${v%gbit}" 'BEGIN { printf "%d", x * 1e9 }' ;;
    *mbit) awk -v x="${v%mbit}" 'BEGIN { printf "%d", x * 1e6 }' ;;
    *kbit) awk -v x="${v%kbit}" 'BEGIN { printf "%d", x * 1e3 }' ;;
    *) die "rate '$1': write it as 200mbit, 1gbit or 64kbit" ;;
  esac
}

# The bucket is what an idle link lets through at once, unshaped, so it must be
# small or small messages cost nothing.  8 KB is exact up to 250 Mbit/s; above
# that a bucket smaller than one (16 KB, see up) packet train costs the CPU.
auto_burst() {
  local r; r=$(bits "$1")
  if ((r <= 250000000)); then echo 8192
  else echo $((r / 40000 > 24576 ? r / 40000 : 24576)); fi
}
auto_limit() { local b=$(( $(bits "$1") / 8 / 10 )); echo $(( b < 1048576 ? 1048576 : b )); }

tbf() {  # namespace device rate burst
  in_ns "$1" tc qdisc replace dev "$2" root tbf rate "$3" burst "$4" limit "$(auto_limit "$3")"
}

cmd_check() {
  command -v ip >/dev/null && command -v tc >/dev/null && command -v nsenter >/dev/null ||
    skip "iproute2 (ip, tc) or util-linux (nsenter) is not on PATH (often in /usr/sbin)"
  local ns=${P}chk$$ err
  err=$(ip netns add "$ns" 2>&1) || skip "ip netns add: $err"
  err=$( { ip -n "$ns" link add v0 type veth peer name v1 &&
           ip -n "$ns" link add b0 type bridge &&
           in_ns "$ns" tc qdisc add dev v0 root tbf rate 100mbit burst 16k limit 1m; } 2>&1) ||
    { ip netns del "$ns"; skip "veth, bridge or tbf: $err"; }
  ip netns del "$ns"
}

cmd_up() {
  local n=${1:?number of hosts} rate=${2:-} i
  if [ -n "$rate" ]; then bits "$rate" > /dev/null; fi
  [ -e "/run/netns/$SW" ] && die "a bed with prefix '$P' is already up"
  trap 'cmd_down --kill || true' ERR
  mkdir -p "$STATE"
  { echo "127.0.0.1 localhost"
    for ((i = 0; i < n; i++)); do echo "$NET.$((i + 1)) $P$i"; done; } > "$STATE/hosts"
  ip netns add "$SW"
  ip -n "$SW" link set lo up
  ip -n "$SW" link add br0 type bridge
  ip -n "$SW" link set br0 up
  for ((i = 0; i < n; i++)); do
    ip netns add "$P$i"
    ip -n "$P$i" link set lo up
    ip link add eth0 netns "$P$i" type veth peer name "p$i" netns "$SW"
    ip -n "$SW" link set "p$i" master br0 up
    ip -n "$P$i" addr add "$NET.$((i + 1))/24" dev eth0
    ip -n "$P$i" link set eth0 up
    ip -n "$P$i" link set eth0 gso_max_size 16384   # short packet trains: small buckets work
    # bbr paces itself and blurs the shaping; reno is allowed in every namespace
    in_ns "$P$i" sh -c 'echo reno > /proc/sys/net/ipv4/tcp_congestion_control' 2>/dev/null || true
  done
  trap - ERR
  if [ -n "$rate" ]; then cmd_shape all "$rate"; fi
}

cmd_shape() {
  local who=${1:?host} rate=${2:?rate} burst=${3:-} i
  bits "$rate" > /dev/null
  [ -n "$burst" ] || burst=$(auto_burst "$rate")
  for i in $(each "$who"); do
    tbf "$P$i" eth0 "$rate" "$burst"
    if [ "$INGRESS" = 1 ]; then tbf "$SW" "p$i" "$rate" "$burst"; fi
  done
}

cmd_local() {
  local i
  bits "${2:?rate}" > /dev/null
  for i in $(each "${1:?host}"); do tbf "$P$i" lo "$2" 131072; done
}

cmd_unshape() {
  local i
  for i in $(each "${1:?host}"); do
    in_ns "$P$i" tc qdisc del dev eth0 root 2>/dev/null || true
    in_ns "$P$i" tc qdisc del dev lo root 2>/dev/null || true
    in_ns "$SW" tc qdisc del dev "p$i" root 2>/dev/null || true
  done
}

pids_of() { ip netns pids "$1" 2>/dev/null || true; }

signal_all() {  # signal host; twice, for what was started while the first list was read
  local p pass
  for pass in 1 2; do
    for p in $(pids_of "$P$2"); do kill "-$1" "$p" 2>/dev/null || true; done
  done
}

cmd_down() {
  local i ns p left
  for i in $(host_ids); do
    ns=$P$i
    left=$(pids_of "$ns")
    if [ -n "$left" ]; then
      [ "${1:-}" = --kill ] || die "processes still run on host $i: $(echo $left); end them or use --kill"
      for p in $left; do kill -KILL "$p" 2>/dev/null || true; done
    fi
    ip netns del "$ns"
  done
  if [ -e "/run/netns/$SW" ]; then ip netns del "$SW"; fi
  rm -rf "$STATE"
}

# torchrun's c10d rendezvous decides who serves the store by looking up the
# hostname, so every host needs a name that resolves to its own address.
cmd_exec() {
  local i=${1:?host}; shift
  exec nsenter --net="/run/netns/$P$i" unshare --mount --uts sh -c '
    mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"' \
    netlab "$STATE/hosts" "$P$i" "$@"
}

cmd_status() {
  local i
  for i in $(host_ids); do
    echo "host $i $NET.$((i + 1)) pids: $(pids_of "$P$i" | tr '\n' ' ')"
    in_ns "$P$i" tc -s qdisc show dev eth0 | sed 's/^/  out: /' | head -2
    in_ns "$SW" tc -s qdisc show dev "p$i" | sed 's/^/  in:  /' | head -2
    ip -n "$SW" -br link show dev "p$i" | awk '{ print "  switch port: " $1, $2 }'
  done
}

# a fresh /run holds this bed's namespace names; --fork --pid --kill-child ends
# everything, and so removes every namespace, when CMD ends
fresh() {
  local flags=$1 err; shift
  [ $# -gt 0 ] || die "what command is to run in fresh namespaces?"
  err=$(unshare "${flags}nmp" --fork true 2>&1) || skip "fresh namespaces (unshare ${flags}nmp): $err"
  exec unshare "${flags}nmp" --fork --kill-child --mount-proc sh -c '
    mount -t tmpfs none /run && mkdir -p /run/netns || exit 77
    mount -t sysfs none /sys 2>/dev/null
    if command -v ip >/dev/null; then ip link set lo up; fi; exec "$@"' netlab "$@"
}

c=${1:-}; [ -n "$c" ] || { awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "$0"; exit 2; }
shift
case $c in
  check) cmd_check ;;
  up) cmd_up "$@" ;;
  exec) cmd_exec "$@" ;;
  addr) echo "$NET.$((${1:?host} + 1))" ;;
  shape) cmd_shape "$@" ;;
  local) cmd_local "$@" ;;
  unshape) cmd_unshape "$@" ;;
  link) ip -n "$SW" link set "p${1:?host}" "${2:?up or down}" ;;
  pause) signal_all STOP "${1:?host}" ;;
  cont) signal_all CONT "${1:?host}" ;;
  kill) signal_all KILL "${1:?host}" ;;
  pids) pids_of "$P${1:?host}" ;;
  status) cmd_status ;;
  down) cmd_down "$@" ;;
  rootless) fresh -Ur "$@" ;;
  rooted) fresh - "$@" ;;
  *) die "unknown command '$c'" ;;
esac
