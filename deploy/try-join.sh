#!/usr/bin/env bash
# A node joins under load, measured: five nodes, R=3, and a sixth that comes while clients write.
#
#   deploy/try-join.sh [--mib 512] [--partitions 60] [--clients 16]
#
# Loads so many MiB of rows, starts a sixth node, waits until the balancer has come to rest, and says how many bytes were
# moved beside the node's share, how evenly bytes lie afterwards, and what clients saw before and meanwhile. Needs about
# six times as much memory and disk, and jq. The cluster is its own, in a temporary directory, and is gone afterwards.
# The binary is $MERIDIAN_BIN, else target/release/meridian.
set -euo pipefail

readonly VALUE_BYTES=4000
readonly BASE_PORT=7770
readonly HTTP_OFFSET=100
readonly NODES=5
readonly WINDOW_SECONDS=10     # p99 is taken of each
readonly REST_SECONDS=15      # without a change of the placement: the balancer has come to rest
readonly SETTLE_SECONDS_MAX=300

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${MERIDIAN_BIN:-$ROOT/target/release/meridian}
MIB=512 PARTITIONS=60 CLIENTS=16

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
while [ $# -gt 0 ]; do
  [ $# -gt 1 ] || die "$1 needs a number"
  case $1 in
    --mib) MIB=$2 ;;
    --partitions) PARTITIONS=$2 ;;
    --clients) CLIENTS=$2 ;;
    *) die "unknown option $1" ;;
  esac
  shift 2
done
command -v jq >/dev/null || die "jq is needed to read what the commands print"

DIR=$(mktemp -d)
SIXTH='' LOAD=''
finish() {
  [ -z "$LOAD" ] || kill "$LOAD" 2>/dev/null || true
  [ -z "$SIXTH" ] || { kill -9 "$SIXTH" && wait "$SIXTH"; } 2>/dev/null || true
  "$ROOT/deploy/cluster.sh" wipe --dir "$DIR/cluster" >/dev/null 2>&1 || true
  rm -rf "$DIR"
}
trap finish EXIT
"$ROOT/deploy/cluster.sh" up --nodes "$NODES" --replicas 3 --dir "$DIR/cluster" --base-port "$BASE_PORT" >"$DIR/up" 2>&1 ||
  { cat "$DIR/up" >&2; die "the cluster did not start"; }
export MERIDIAN_ENDPOINTS=127.0.0.1:$BASE_PORT MERIDIAN_KEYSPACE=join

placed() { "$BIN" partition list -o json | jq -sc '[.[] | {id: .partition, bytes: .load.bytes, nodes: [.replicas[].node] | sort}] | sort_by(.id)'; }
put() { # for so many seconds; what clients saw goes to a file
  "$BIN" bench put --keys "$KEYS" --value-bytes "$VALUE_BYTES" --clients "$CLIENTS" --warmup 1 --seconds "$1" -o json >"$2" 2>/dev/null
}
KEYS=$((MIB * 1024 * 1024 / VALUE_BYTES))
"$BIN" keyspace create join --layout hashed --partitions "$PARTITIONS" >&2
say "loading $KEYS rows of $VALUE_BYTES bytes"
"$BIN" bench get --keys "$KEYS" --value-bytes "$VALUE_BYTES" --warmup 0 --seconds 1 >/dev/null 2>&1
put "$WINDOW_SECONDS" "$DIR/before"
sleep "$REST_SECONDS"
placed >"$DIR/placed.before"

( n=10; while put "$WINDOW_SECONDS" "$DIR/during.$((n++))"; do :; done ) &
LOAD=$!
"$BIN" start --data "$DIR/n6" --listen 127.0.0.1:$((BASE_PORT + NODES)) --http 127.0.0.1:$((BASE_PORT + NODES + HTTP_OFFSET)) \
  --join "127.0.0.1:$BASE_PORT" >"$DIR/n6.log" 2>&1 &
SIXTH=$!
began=$SECONDS changed=$SECONDS last=''
while [ $((SECONDS - changed)) -lt "$REST_SECONDS" ]; do
  [ $((SECONDS - began)) -lt "$SETTLE_SECONDS_MAX" ] || die "the balancer did not come to rest in $SETTLE_SECONDS_MAX s"
  now=$(placed | jq -c '[.[].nodes]')
  # Rest begins with the first move: a node is trusted only after a while.
  if [ "$now" != "$last" ] || ! grep -q 6 <<<"$now"; then changed=$SECONDS; last=$now; fi
  sleep 1
done
say "at rest $((changed - began)) s after the sixth node was started"
placed >"$DIR/placed.after"
kill "$LOAD" 2>/dev/null || true
LOAD=''

jq -rs '
  (.[0] | map({key: (.id | tostring), value: .nodes}) | from_entries) as $before |
  .[1] as $after |
  ([$after[] | .bytes as $bytes | (.nodes - ($before[.id | tostring] // []))[] | $bytes] | add // 0) as $moved |
  ([$after[] | .bytes * (.nodes | length)] | add) as $all |
  ([$after[] | .bytes as $bytes | .nodes[] | {node: ., bytes: $bytes}] | group_by(.node) | map(map(.bytes) | add)) as $held |
  "bytes moved: \($moved / 1048576 | round) MiB, \($moved / ($all / 6) * 100 | round / 100) times the share of one of six",
  "bytes per node: max/mean \(($held | max) / ($all / 6) * 100 | round / 100)"' "$DIR/placed.before" "$DIR/placed.after"
p99() { jq .latency_us.put.p99 "$@"; }
worst=$(p99 "$DIR"/during.* | sort -n | tail -n 1)
errors=$(jq .errors "$DIR"/during.* | awk '{ sum += $1 } END { print sum }')
awk -v before="$(p99 "$DIR/before")" -v worst="$worst" -v errors="$errors" 'BEGIN {
  printf "put p99: %.1f ms before, %.1f ms in the worst 10 s meanwhile (%.1f times); errors: %d\n",
    before / 1000, worst / 1000, worst / before, errors }'
