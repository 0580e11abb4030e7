#!/usr/bin/env bash
# What idle groups cost: a cluster with many partitions that nobody asks anything.
#
#   deploy/try-idle.sh [--nodes 3] [--partitions 1000] [--seconds 60]
#
# Creates the partitions, waits until their groups sleep, and prints the CPU time of each node over so many seconds, in
# percent of one core, and its memory per replica beyond that of an empty cluster. Then it writes a few rows. The
# cluster is its own, in a temporary directory, and is gone afterwards.
# The binary is $MERIDIAN_BIN, else target/release/meridian.
set -euo pipefail

readonly PER_KEYSPACE=500
readonly BASE_PORT=7570
readonly HTTP_OFFSET=100 # as of the binary's own default
readonly SLEEP_SECONDS_MAX=120 # that falling asleep may take

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${MERIDIAN_BIN:-$ROOT/target/release/meridian}
NODES=3 PARTITIONS=1000 SECONDS_MEASURED=60

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
while [ $# -gt 0 ]; do
  [ $# -gt 1 ] || die "$1 needs a number"
  case $1 in
    --nodes) NODES=$2 ;;
    --partitions) PARTITIONS=$2 ;;
    --seconds) SECONDS_MEASURED=$2 ;;
    *) die "unknown option $1" ;;
  esac
  shift 2
done

DIR=$(mktemp -d)
finish() {
  "$ROOT/deploy/cluster.sh" wipe --dir "$DIR/cluster" >/dev/null 2>&1 || true
  rm -rf "$DIR"
}
trap finish EXIT

"$ROOT/deploy/cluster.sh" up --nodes "$NODES" --replicas 3 --dir "$DIR/cluster" --base-port "$BASE_PORT" >"$DIR/up" 2>&1 ||
  { cat "$DIR/up" >&2; die "the cluster did not start"; }
MERIDIAN_ENDPOINTS=127.0.0.1:$BASE_PORT
export MERIDIAN_ENDPOINTS
PIDS=()
for ((i = 1; i <= NODES; i++)); do PIDS+=("$(head -n 1 "$DIR/cluster/n$i/pid")"); done

kib() { awk '/^VmRSS/ { print $2 }' "/proc/$1/status"; }
# User and system time, which the kernel counts in hundredths of a second.
cpu_ms() { awk '{ sub(/.*\) /, ""); print ($12 + $13) * 10 }' "/proc/$1/stat"; }
metrics() { # of the node whose HTTP port this is
  exec 3<>"/dev/tcp/127.0.0.1/$1"
  printf 'GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
  cat <&3
  exec 3>&-
}
asleep() { # replicas, on all nodes together
  local i
  for ((i = 0; i < NODES; i++)); do metrics $((BASE_PORT + HTTP_OFFSET + i)); done |
    awk '/^meridian_raft_groups.*asleep/ { sum += $2 } END { print int(sum) }'
}

sleep 5
rss=(); for pid in "${PIDS[@]}"; do rss+=("$(kib "$pid")"); done
for ((first = 0; first < PARTITIONS; first += PER_KEYSPACE)); do
  count=$((PARTITIONS - first < PER_KEYSPACE ? PARTITIONS - first : PER_KEYSPACE))
  "$BIN" keyspace create "idle$first" --layout hashed --partitions "$count" >/dev/null
done
began=$SECONDS
until [ "$(asleep)" -ge $((3 * PARTITIONS)) ]; do
  [ $((SECONDS - began)) -lt "$SLEEP_SECONDS_MAX" ] || die "only $(asleep) of $((3 * PARTITIONS)) replicas sleep"
  sleep 0.5
done
say "$((3 * PARTITIONS)) replicas sleep, $((SECONDS - began)) s after the last was created"

cpu=(); for pid in "${PIDS[@]}"; do cpu+=("$(cpu_ms "$pid")"); done
sleep "$SECONDS_MEASURED"
for ((i = 0; i < NODES; i++)); do
  spent=$(($(cpu_ms "${PIDS[$i]}") - ${cpu[$i]}))
  grown=$(($(kib "${PIDS[$i]}") - ${rss[$i]}))
  awk -v n=$((i + 1)) -v ms="$spent" -v s="$SECONDS_MEASURED" -v kib="$grown" -v replicas=$((3 * PARTITIONS / NODES)) \
    'BEGIN { printf "node %d: %.2f %% of a core, %.0f KiB per replica\n", n, ms / s / 10, kib / replicas }'
done
for key in a b c d e; do
  "$BIN" --keyspace idle0 kv put "$key" 1 >/dev/null
done
say "asked, the first partitions answered; $(asleep) replicas sleep on"
