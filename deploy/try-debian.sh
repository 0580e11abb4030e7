#!/usr/bin/env bash
# Real data to play with: the names and descriptions of all packages that apt knows, about 60,000 rows.
#
#   deploy/try-debian.sh [KEYSPACE]      (default: debian; needs apt-cache and a running cluster)
#
# Loads them, then compares `kv scan --prefix python3-` at every consistency level, and a whole dump, with the file.
# The cluster is the one at $MERIDIAN_ENDPOINTS; the binary is $MERIDIAN_BIN, else target/release/meridian.
set -euo pipefail
export LC_ALL=C

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${MERIDIAN_BIN:-$ROOT/target/release/meridian}
KEYSPACE=${1:-debian}
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

command -v apt-cache >/dev/null || die "there is no apt-cache here"
apt-cache dumpavail |
  awk '/^Package: / { name = $2 } /^Description(-en)?: / { sub(/^[^:]*: /, ""); print name "\t" $0 }' |
  sort -t $'\t' -k1,1 -u >"$DIR/rows.tsv"
[ -s "$DIR/rows.tsv" ] || die "apt knows no packages; run apt-get update"

"$BIN" keyspace create "$KEYSPACE" --split-at g,libm,n,python3-m,r >&2
"$BIN" kv load "$DIR/rows.tsv" --raw --keyspace "$KEYSPACE"

# What the command line prints: a backslash is escaped.
sed 's/\\/\\\\/g' "$DIR/rows.tsv" >"$DIR/all"
grep '^python3-' "$DIR/all" >"$DIR/found"
for level in linearizable lease bounded=200ms eventual; do
  "$BIN" kv scan --prefix python3- -o plain --consistency "$level" --keyspace "$KEYSPACE" >"$DIR/scanned"
  cmp "$DIR/scanned" "$DIR/found" || die "a $level scan is not what grep finds"
  say "$level: the $(wc -l <"$DIR/found") rows that grep finds, in order"
done
"$BIN" kv dump "$DIR/dump.tsv" --keyspace "$KEYSPACE"
cmp "$DIR/dump.tsv" "$DIR/all" || die "the dump is not what was loaded"
say "the dump is what was loaded"
