#!/usr/bin/env bash
# A dead node under load, measured: five nodes, R=3, one killed with kill -9 while clients write.
#
#   deploy/try-healing.sh [--mib 1024] [--down-after 5] [--clients 64]
#
# Loads so many MiB of rows into 24 partitions, kills one node, and says how long after `down_after` every partition had
# all its replicas again, what clients saw meanwhile, and whether every row is there. Needs about six times as much memory
# and disk, and jq. The cluster is its own, in a temporary directory, and is gone afterwards.
# The binary is $MERIDIAN_BIN, else target/release/meridian.
set -euo pipefail

readonly VALUE_BYTES=10000
readonly VICTIM=3
readonly SECONDS_MAX=300 # that healing may take

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${MERIDIAN_BIN:-$ROOT/target/release/meridian}
MIB=1024 DOWN_AFTER_S=5 CLIENTS=64

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
while [ $# -gt 0 ]; do
  [ $# -gt 1 ] || die "$1 needs a number"
  case $1 in
    --mib) MIB=$2 ;;
    --down-after) DOWN_AFTER_S=$2 ;;
    --clients) CLIENTS=$2 ;;
    *) die "unknown option $1" ;;
  esac
  shift 2
done
command -v jq >/dev/null || die "jq is needed to read what the commands print"

DIR=$(mktemp -d)
LOAD=''
finish() {
  [ -z "$LOAD" ] || kill "$LOAD" 2>/dev/null || true
  "$ROOT/deploy/cluster.sh" wipe --dir "$DIR/cluster" >/dev/null 2>&1 || true
  rm -rf "$DIR"
}
trap finish EXIT

MERIDIAN_DOWN_AFTER_MS=${DOWN_AFTER_S}s "$ROOT/deploy/cluster.sh" up --nodes 5 --replicas 3 --dir "$DIR/cluster" \
  >"$DIR/up" 2>&1 || { cat "$DIR/up" >&2; die "the cluster did not start"; }
MERIDIAN_ENDPOINTS=$(sed -n 's/.*--endpoints \([0-9.:,]*\) kv put.*/\1/p' "$DIR/up" | head -n 1)
export MERIDIAN_ENDPOINTS MERIDIAN_KEYSPACE=healing
[ -n "$MERIDIAN_ENDPOINTS" ] || { cat "$DIR/up" >&2; die "cluster.sh did not say where the cluster is"; }
KEYS=$((MIB * 1024 * 1024 / VALUE_BYTES))
"$BIN" keyspace create healing --layout hashed --partitions 24 >&2
say "loading $KEYS rows of $VALUE_BYTES bytes"
"$BIN" bench get --keys "$KEYS" --value-bytes "$VALUE_BYTES" --clients "$CLIENTS" --warmup 0 --seconds 1 >/dev/null
before=$("$BIN" kv count -o plain)

"$BIN" keyspace create load --layout hashed --partitions 8 >&2
"$BIN" bench put --keyspace load --clients "$CLIENTS" --seconds 60 -o json >"$DIR/load" &
LOAD=$!
until [ "$("$BIN" cluster status -o json | jq .healthy)" = true ]; do sleep 0.2; done
ADDRESS=$(cut -d, -f "$VICTIM" <<<"$MERIDIAN_ENDPOINTS")
sleep 4
"$ROOT/deploy/cluster.sh" kill "$VICTIM" --dir "$DIR/cluster" >&2
killed=$(date +%s%3N)
victim_id=$("$BIN" cluster status -o json | jq ".nodes[] | select(.address == \"$ADDRESS\") | .id")
named() { "$BIN" partition list --keyspace "$1" -o json | jq -s "[.[].replicas[] | select(.node == $victim_id)] | length"; }
until [ "$(($(named healing) + $(named load)))" = 0 ]; do
  [ $(($(date +%s%3N) - killed)) -lt $((SECONDS_MAX * 1000)) ] || die "not healed after $SECONDS_MAX s"
  sleep 0.1
done
full=$(($(date +%s%3N) - killed))
wait "$LOAD" || true
LOAD=''
after=$("$BIN" kv count -o plain)
"$BIN" cluster status >&2 || true
say "rows: $before before, $after after"
jq -r '"load: \(.ops_per_second) puts/s, \(.errors) errors, p99 \(.latency_us.put.p99 // "?") us, max \(.latency_us.put.max) us"' "$DIR/load"
printf 'all replicas were built anew %d ms after the kill; down_after was %d ms\n' "$full" "$((DOWN_AFTER_S * 1000))"
[ "$before" = "$after" ] || die "rows are missing"
