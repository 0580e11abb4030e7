#!/usr/bin/env bash
# A local cluster of real processes, on loopback only.
#
#   deploy/cluster.sh up [--nodes 5] [--replicas 3] [--dir D] [--base-port P]
#   deploy/cluster.sh status | down | wipe | roll     [--dir D]
#   deploy/cluster.sh kill N | stop N | start N       [--dir D]
#
# Everything it knows lies under --dir (default: ./meridian-cluster): the settings, and for each node its data, log and
# pid. Every command may be repeated. A process is signalled only if it is the very one that this script started.
# `roll` restarts one node after the other, drained first: clients notice nothing.
# The binary is $MERIDIAN_BIN, else target/release/meridian, which is built if it is missing.
set -euo pipefail

readonly HEALTHY_S_MAX=60 # until a cluster that has just started must be healthy
readonly STOP_S_MAX=20    # until a node that was told to stop must be gone
readonly HTTP_OFFSET=100  # as of the binary's own default
readonly NODES_MAX=99     # so that the HTTP ports of the first lie above the ports of the last

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${MERIDIAN_BIN:-$ROOT/target/release/meridian}
DIR=$PWD/meridian-cluster
NODES='' REPLICAS='' BASE_PORT=''

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
usage() { sed -n '4,6s/^#  *//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

is_number() { case $1 in '' | *[!0-9]*) return 1 ;; esac; }

node_dir() { printf '%s/n%s' "$DIR" "$1"; }
port_of() { printf '%s' $((BASE_PORT + $1 - 1)); }
address_of() { printf '127.0.0.1:%s' "$(port_of "$1")"; }

# The addresses of all nodes, or of all but one, separated by commas.
addresses() {
  local but=${1:-0} i list=''
  for ((i = 1; i <= NODES; i++)); do
    [ "$i" = "$but" ] || list+=${list:+,}$(address_of "$i")
  done
  printf '%s' "$list"
}

meridian() { "$BIN" --endpoints "$(addresses)" "$@"; }

# When a process began, which tells it from a later one under the same pid; nothing if it has ended.
began() {
  if [ -d /proc/self ]; then
    sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" { print $20 }'
  else
    ps -o lstart= -p "$1" 2>/dev/null || true
  fi
}

# The pid of a running node, else nothing.
pid_of() {
  local file pid start
  file=$(node_dir "$1")/pid
  [ -r "$file" ] || return 0
  { read -r pid && read -r start; } <"$file" || return 0
  if [ -n "$start" ] && [ "$(began "$pid")" = "$start" ]; then printf '%s' "$pid"; fi
}

load_settings() {
  [ -r "$DIR/settings" ] || return 1
  local name value
  while IFS='=' read -r name value; do
    case $name in
      nodes) SAVED_NODES=$value ;;
      replicas) SAVED_REPLICAS=$value ;;
      base_port) SAVED_BASE_PORT=$value ;;
    esac
  done <"$DIR/settings"
}

need_cluster() {
  load_settings || die "there is no cluster in $DIR; begin with: $0 up"
  NODES=$SAVED_NODES REPLICAS=$SAVED_REPLICAS BASE_PORT=$SAVED_BASE_PORT
}

need_binary() {
  [ -x "$BIN" ] && return
  [ -z "${MERIDIAN_BIN:-}" ] || die "MERIDIAN_BIN=$BIN cannot be executed"
  say "building $BIN"
  (cd "$ROOT" && cargo build --release --bin meridian)
}

# A port that somebody else holds would not only stop a node of ours: the others would join his cluster.
need_ports() {
  local i port
  for i in "$@"; do
    if [ -n "$(pid_of "$i")" ]; then continue; fi
    for port in "$(port_of "$i")" "$(($(port_of "$i") + HTTP_OFFSET))"; do
      if (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        die "port $port, for n$i, is in use by another process; nothing was started. Choose another --base-port"
      fi
    done
  done
}

# Threads of a node: the nodes share the cores of this machine, and a thread for which there is none only makes others wait.
threads() {
  local cores
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
  printf '%s' $((cores > NODES ? cores / NODES : 1))
}

start_node() {
  local node=$1 dir pid
  dir=$(node_dir "$node")
  if [ -n "$(pid_of "$node")" ]; then return; fi
  mkdir -p "$dir/data"
  local join=()
  if [ "$NODES" -gt 1 ]; then join=(--join "$(addresses "$node")"); fi
  TOKIO_WORKER_THREADS=${TOKIO_WORKER_THREADS:-$(threads)} nohup "$BIN" start --data "$dir/data" --listen "$(address_of "$node")" \
    --http "127.0.0.1:$(($(port_of "$node") + HTTP_OFFSET))" ${join[@]+"${join[@]}"} >>"$dir/log" 2>&1 </dev/null &
  pid=$!
  printf '%s\n%s\n' "$pid" "$(began "$pid")" >"$dir/pid"
  say "n$node: started, pid $pid, $(address_of "$node"), log $dir/log"
}

# Waits until a node is gone.
await_end() {
  local node=$1 waited=0
  while [ -n "$(pid_of "$node")" ]; do
    [ "$waited" -lt $((STOP_S_MAX * 10)) ] || die "n$node still runs after $STOP_S_MAX s; see $(node_dir "$node")/log"
    sleep 0.1
    waited=$((waited + 1))
  done
  rm -f "$(node_dir "$node")/pid"
}

signal_node() {
  local signal=$1 node=$2 pid
  pid=$(pid_of "$node")
  if [ -z "$pid" ]; then
    say "n$node: does not run"
    return
  fi
  kill "-$signal" "$pid" 2>/dev/null || true
  say "n$node: SIG$signal to pid $pid"
}

# Waits until the cluster says that it is healthy, with every node alive.
await_health() {
  local deadline=$((SECONDS + HEALTHY_S_MAX)) status='' i
  while [ "$SECONDS" -lt "$deadline" ]; do
    for ((i = 1; i <= NODES; i++)); do
      [ -n "$(pid_of "$i")" ] || { tail -n 5 "$(node_dir "$i")/log" >&2; die "n$i ended; see $(node_dir "$i")/log"; }
    done
    status=$(meridian cluster status -o json --deadline 2s 2>/dev/null || true)
    case $status in
      *'"healthy":true'*) case $status in *"\"nodes_alive\":$NODES,"*) return ;; esac ;;
    esac
    sleep 0.2
  done
  die "not healthy after $HEALTHY_S_MAX s: ${status:-no answer}"
}

form_cluster() {
  [ -e "$DIR/formed" ] && return
  local deadline=$((SECONDS + HEALTHY_S_MAX)) fault=''
  until fault=$("$BIN" init --replicas "$REPLICAS" --endpoints "$(address_of 1)" 2>&1 >/dev/null); do
    [ "$SECONDS" -lt "$deadline" ] || die "cannot form the cluster: $fault"
    [ -n "$(pid_of 1)" ] || die "n1 ended; see $(node_dir 1)/log"
    sleep 0.2
  done
  : >"$DIR/formed"
}

up() {
  local i
  if load_settings; then
    NODES=${NODES:-$SAVED_NODES} REPLICAS=${REPLICAS:-$SAVED_REPLICAS} BASE_PORT=${BASE_PORT:-$SAVED_BASE_PORT}
    [ "$BASE_PORT" = "$SAVED_BASE_PORT" ] || die "the cluster in $DIR has --base-port $SAVED_BASE_PORT"
    [ "$REPLICAS" = "$SAVED_REPLICAS" ] || die "the cluster in $DIR has --replicas $SAVED_REPLICAS"
    [ "$NODES" -ge "$SAVED_NODES" ] || die "the cluster in $DIR has $SAVED_NODES nodes; it can only grow"
  fi
  NODES=${NODES:-5} REPLICAS=${REPLICAS:-3} BASE_PORT=${BASE_PORT:-7170}
  for i in "$NODES" "$REPLICAS" "$BASE_PORT"; do is_number "$i" || usage; done
  [ "$NODES" -ge 1 ] && [ "$NODES" -le "$NODES_MAX" ] || die "--nodes must be 1 to $NODES_MAX"
  need_binary
  # shellcheck disable=SC2046 # numbers, one word each
  need_ports $(seq 1 "$NODES")
  mkdir -p "$DIR"
  printf 'nodes=%s\nreplicas=%s\nbase_port=%s\n' "$NODES" "$REPLICAS" "$BASE_PORT" >"$DIR/settings"
  for ((i = 1; i <= NODES; i++)); do start_node "$i"; done
  form_cluster
  await_health
  say "healthy: $NODES nodes, $REPLICAS replicas. Try:"
  printf '%s\n' "$BIN --endpoints $(addresses) kv put hello world && $BIN --endpoints $(addresses) kv get hello"
}

status() {
  local i pid
  for ((i = 1; i <= NODES; i++)); do
    pid=$(pid_of "$i")
    printf 'n%s  %s  %s\n' "$i" "$(address_of "$i")" "${pid:+runs, pid }${pid:-does not run}"
  done
  meridian cluster status
}

down() {
  local i
  for ((i = 1; i <= NODES; i++)); do signal_node TERM "$i"; done
  for ((i = 1; i <= NODES; i++)); do await_end "$i"; done
}

# The cluster's id of a process: nodes are numbered in the order in which they joined.
id_of() {
  meridian node list -o json | grep "\"address\":\"$(address_of "$1")\"" | grep -v '"standing":"\(removed\|gone\)"' |
    sed 's/.*"id":\([0-9]*\).*/n\1/'
}

roll() {
  local i id
  for ((i = 1; i <= NODES; i++)); do
    await_health
    id=$(id_of "$i")
    [ -n "$id" ] || die "the cluster knows no node at $(address_of "$i")"
    meridian node drain "$id" --wait-max "${STOP_S_MAX}s" >/dev/null
    signal_node TERM "$i"
    await_end "$i"
    start_node "$i"
    await_health
    meridian node resume "$id" >/dev/null
  done
  say "every node was restarted"
}

COMMAND=${1:-}
[ $# -eq 0 ] || shift
NODE=''
case $COMMAND in
  up | status | down | wipe | roll) ;;
  kill | stop | start)
    NODE=${1:-}
    NODE=${NODE#n}
    is_number "$NODE" || usage
    shift
    ;;
  *) usage ;;
esac
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage
  case $1 in
    --dir) case $2 in /*) DIR=$2 ;; *) DIR=$PWD/$2 ;; esac ;;
    --nodes) [ "$COMMAND" = up ] || usage; NODES=$2 ;;
    --replicas) [ "$COMMAND" = up ] || usage; REPLICAS=$2 ;;
    --base-port) [ "$COMMAND" = up ] || usage; BASE_PORT=$2 ;;
    *) usage ;;
  esac
  shift 2
done

if [ "$COMMAND" = wipe ] && [ ! -e "$DIR/settings" ]; then
  say "nothing to wipe in $DIR"
  exit 0
fi
if [ "$COMMAND" != up ]; then need_cluster; fi
if [ -n "$NODE" ] && { [ "$NODE" -lt 1 ] || [ "$NODE" -gt "$NODES" ]; }; then die "nodes are 1 to $NODES"; fi

case $COMMAND in
  up) up ;;
  status) need_binary; status ;;
  down) down ;;
  roll) need_binary; roll ;;
  wipe) down; rm -rf "$DIR"; say "removed $DIR" ;;
  kill) signal_node KILL "$NODE"; await_end "$NODE" ;;
  stop) signal_node TERM "$NODE"; await_end "$NODE" ;;
  start) need_binary; need_ports "$NODE"; start_node "$NODE" ;;
esac
