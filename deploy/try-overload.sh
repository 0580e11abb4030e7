#!/usr/bin/env bash
# What is left of the throughput when far more is asked for than a cluster can do, and whether that ends by itself.
#
#   deploy/try-overload.sh [--nodes 3] [--seconds 10] [--times 10] [--value-bytes 256] [--senders 2] [--partitions 12]
#
# Measures puts in a closed loop of 256 clients, then sends so many times as many, on time whatever becomes of the earlier
# ones (--senders processes share the rate, at a low priority, as if they ran elsewhere). Prints what was answered, what was refused and by which budget, percentiles,
# how many puts the nodes did, and how often a leader changed; then one put right after it, and the closed loop again. Needs jq. The cluster lies in a
# temporary directory and is gone afterwards. Senders and nodes share the machine: what is not sent in time counts as
# latency. The binary is $MERIDIAN_BIN, else target/release/meridian.
set -euo pipefail

readonly BASE_PORT=7770
readonly HTTP_OFFSET=100 # as of the binary's own default

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${MERIDIAN_BIN:-$ROOT/target/release/meridian}
NODES=3 SECONDS_EACH=10 TIMES=10 VALUE_BYTES=256 SENDERS=2 PARTITIONS=12

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
while [ $# -gt 0 ]; do
  [ $# -gt 1 ] || die "$1 needs a number"
  case $1 in
    --nodes) NODES=$2 ;;
    --seconds) SECONDS_EACH=$2 ;;
    --times) TIMES=$2 ;;
    --value-bytes) VALUE_BYTES=$2 ;;
    --senders) SENDERS=$2 ;;
    --partitions) PARTITIONS=$2 ;;
    *) die "unknown option $1" ;;
  esac
  shift 2
done
command -v jq >/dev/null || die "jq is needed to read what the commands print"

DIR=$(mktemp -d)
finish() {
  "$ROOT/deploy/cluster.sh" wipe --dir "$DIR/cluster" >/dev/null 2>&1 || true
  rm -rf "$DIR"
}
trap finish EXIT

"$ROOT/deploy/cluster.sh" up --nodes "$NODES" --replicas 3 --dir "$DIR/cluster" --base-port "$BASE_PORT" >"$DIR/up" 2>&1 ||
  { cat "$DIR/up" >&2; die "the cluster did not start"; }
export MERIDIAN_ENDPOINTS=127.0.0.1:$BASE_PORT MERIDIAN_KEYSPACE=overload
"$BIN" keyspace create overload --layout hashed --partitions "$PARTITIONS" >/dev/null

metrics() { # of all nodes
  local i
  for ((i = 0; i < NODES; i++)); do
    exec 3<>"/dev/tcp/127.0.0.1/$((BASE_PORT + HTTP_OFFSET + i))"
    printf 'GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
    cat <&3
    exec 3>&-
  done
}
leader_changes() { metrics | awk '/^meridian_raft_leader_changes_total/ { sum += $2 } END { print int(sum) }'; }
done_by_nodes() { metrics | awk '/^meridian_rpc_duration_seconds_count.*"Put".*"OK"/ { sum += $2 } END { print int(sum) }'; }
refused() { # by budget
  metrics | awk -F '[" ]' '/^meridian_admission_rejected_total/ { sum[$2] += $NF }
    END { for (budget in sum) printf " %s %d", budget, sum[budget]; print "" }'
}
bench() { "$BIN" bench put --keys 100000 --value-bytes "$VALUE_BYTES" --seconds "$SECONDS_EACH" -o json "$@" 2>/dev/null; }
tell() { # of one or more measurements that ran together
  jq -rs --arg what "$1" '
    (map(.latency_us.put // empty) | if length == 0 then {p50: 0, "p99": 0, max: 0} else
      {p50: (map(.p50) | max), p99: (map(.p99) | max), max: (map(.max) | max)} end) as $us |
    (map(.errors_by_reason | to_entries[]) | group_by(.key) | map("\(.[0].key) \(map(.value) | add)") | join(", ")) as $errors |
    (map((.operations + .errors - (.errors_by_reason.NOT_SENT // 0)) / .seconds | round) | add) as $sent |
    "\($what): \($sent) sent and \(map(.ops_per_second) | add) answered per second, p50 \($us.p50 / 1000) ms, p99 \($us.p99 / 1000) ms, " +
      "longest \($us.max / 1000) ms; errors: \(if $errors == "" then "none" else $errors end)"'
}

bench --clients 256 >"$DIR/before"
tell "closed loop, 256 clients" <"$DIR/before"
capacity=$(jq .ops_per_second "$DIR/before")
changes=$(leader_changes) puts=$(done_by_nodes)

rate=$((capacity * TIMES))
say "$rate puts per second for $SECONDS_EACH s"
senders=()
for ((i = 1; i <= SENDERS; i++)); do
  nice -n 15 "$BIN" bench put --keys 100000 --value-bytes "$VALUE_BYTES" --seconds "$SECONDS_EACH" -o json --rate $((rate / SENDERS)) 2>/dev/null >"$DIR/open$i" &
  senders+=($!)
done
for sender in "${senders[@]}"; do wait "$sender" || say "a sender got no answer at all"; done
began=$(date +%s%N)
"$BIN" kv put after overload >/dev/null
printf 'the first put after it: %d ms, with the start of the command\n' $((($(date +%s%N) - began) / 1000000))
cat "$DIR"/open* | tell "open loop, $rate puts per second"
printf 'puts done by nodes: %d per second\n' $((($(done_by_nodes) - puts) / SECONDS_EACH))
printf 'refused by nodes, by budget:%s\n' "$(refused)"
printf 'leader changes meanwhile: %d\n' $(($(leader_changes) - changes))
bench --clients 256 | tell "closed loop again, 256 clients"
