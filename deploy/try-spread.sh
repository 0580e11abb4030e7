#!/usr/bin/env bash
# How evenly one partition that grows and is asked much is spread over the nodes, by cuts and moves alone.
#
#   deploy/try-spread.sh [--nodes 5] [--seconds 60] [--split-bytes 4MiB] [--clients 64]
#
# For each kind of keys, in a cluster of its own: creates an ordered keyspace with one partition, loads it for so long
# (the Debian package index is loaded once, if apt knows it), and prints how many partitions it has become, and of the
# bytes, of the requests led and of the work (a write is one part for its leader and three for every member) the node with
# most of it beside the mean. Needs jq. Clusters lie in a temporary directory and are gone afterwards.
# The binary is $MERIDIAN_BIN, else target/release/meridian.
set -euo pipefail

readonly BASE_PORT=7670
readonly KEYS=1000000
readonly VALUE_BYTES=256

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${MERIDIAN_BIN:-$ROOT/target/release/meridian}
NODES=5 LOAD_SECONDS=60 SPLIT_BYTES=4MiB CLIENTS=64

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
while [ $# -gt 0 ]; do
  [ $# -gt 1 ] || die "$1 needs a value"
  case $1 in
    --nodes) NODES=$2 ;;
    --seconds) LOAD_SECONDS=$2 ;;
    --split-bytes) SPLIT_BYTES=$2 ;;
    --clients) CLIENTS=$2 ;;
    *) die "unknown option $1" ;;
  esac
  shift 2
done
command -v jq >/dev/null || die "jq is needed to read what the commands print"

DIR=$(mktemp -d)
wipe() { "$ROOT/deploy/cluster.sh" wipe --dir "$DIR/cluster" >/dev/null 2>&1 || true; }
finish() {
  wipe
  rm -rf "$DIR"
}
trap finish EXIT
export MERIDIAN_ENDPOINTS=127.0.0.1:$BASE_PORT MERIDIAN_KEYSPACE=spread

up() {
  wipe
  MERIDIAN_SPLIT_BYTES=$SPLIT_BYTES "$ROOT/deploy/cluster.sh" up --nodes "$NODES" --replicas 3 --dir "$DIR/cluster" \
    --base-port "$BASE_PORT" >"$DIR/up" 2>&1 || { cat "$DIR/up" >&2; die "the cluster did not start"; }
  "$BIN" keyspace create spread >/dev/null
}

# Partitions; of bytes held and of requests answered by each node, the most beside the mean.
spread() {
  "$BIN" partition list -o json | jq -rs --arg what "$1" --argjson nodes "$NODES" '
    def skew: if length == 0 then 0 else max / (add / $nodes) * 100 | round / 100 end;
    def by_node: group_by(.node) | map(map(.load) | add);
    ([.[] | .load.bytes as $bytes | .replicas[] | {node, load: $bytes}] | by_node | skew) as $bytes |
    ([.[] | {node: .leader, load: (.load.reads_per_s + .load.writes_per_s)}] | by_node | skew) as $requests |
    ([.[] | .load as $load | {node: .leader, load: ($load.reads_per_s + $load.writes_per_s)},
      (.replicas[] | {node, load: (3 * $load.writes_per_s)})] | by_node | skew) as $work |
    ([.[].load | .reads_per_s + .writes_per_s] | add) as $asked |
    "\($what): \(length) partitions; max/mean per node: bytes \($bytes)" +
      if $asked >= 100 then ", requests led \($requests), work \($work)" else "" end'
}

for choose in sequential zipf uniform; do
  up
  "$BIN" bench put --choose "$choose" --keys "$KEYS" --value-bytes "$VALUE_BYTES" --clients "$CLIENTS" --warmup 0 \
    --seconds "$LOAD_SECONDS" -o json >"$DIR/load" 2>/dev/null &
  load=$!
  sleep $((LOAD_SECONDS - 3))
  spread "puts of $choose keys, at the end of the load"
  wait "$load" || die "the load failed"
  jq -r '"  \(.ops_per_second) per second, \(.errors) errors"' "$DIR/load"
done

if command -v apt-cache >/dev/null && apt-cache dumpavail |
  awk '/^Package: / { name = $2 } /^Description(-en)?: / { sub(/^[^:]*: /, ""); print name "\t" $0 }' |
  sort -t $'\t' -k1,1 -u >"$DIR/rows.tsv" && [ -s "$DIR/rows.tsv" ]; then
  SPLIT_BYTES=128KiB
  up
  "$BIN" kv load "$DIR/rows.tsv" --raw >&2
  sleep "$LOAD_SECONDS"
  spread "the Debian package index, cut at $SPLIT_BYTES, $LOAD_SECONDS s after it was loaded"
else
  say "apt knows no packages here: the Debian package index is left out"
fi
