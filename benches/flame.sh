#!/usr/bin/env bash
# Flame graphs of the nodes while clients put, get or scan: where the time of an operation goes.
#
#   benches/flame.sh [put|get|get-eventual|scan ...]      (default: all four)
#
# Starts three nodes of its own on loopback, with their data below target/, and removes them afterwards. Writes
# benches/plots/flame-<operation>.svg. The binary is $MERIDIAN_BIN, else target/release/meridian.
# Needs perf (Debian: linux-perf; the kernel must allow it) and inferno (cargo install inferno).
set -euo pipefail

readonly BASE_PORT=7370
readonly WARM_UP_SECONDS=3 SECONDS_MEASURED=5
readonly MEASURE_HZ=299
readonly KEYS=100000 VALUE_BYTES=256
readonly LEAST_SHARE=0.4 # of the width, in percent: narrower frames are left out

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${MERIDIAN_BIN:-$ROOT/target/release/meridian}
ENDPOINTS=127.0.0.1:$BASE_PORT,127.0.0.1:$((BASE_PORT + 1)),127.0.0.1:$((BASE_PORT + 2))

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

workload() { # arguments of the load generator for an operation
  case $1 in
    put) echo put --clients 256 ;;
    get) echo get --clients 256 ;;
    get-eventual) echo get --clients 256 --consistency eventual ;;
    scan) echo scan --clients 16 --rows 1000 ;;
    *) die "there is no operation \"$1\"; there are: put, get, get-eventual, scan" ;;
  esac
}

[ $# -gt 0 ] || set -- put get get-eventual scan
for operation in "$@"; do workload "$operation" >/dev/null; done
[ -x "$BIN" ] || die "$BIN is not there: cargo build --release, or set MERIDIAN_BIN"
command -v perf >/dev/null || die "perf is not installed (Debian: apt install linux-perf)"
for tool in inferno-collapse-perf inferno-flamegraph; do
  command -v "$tool" >/dev/null || die "$tool is not installed: cargo install inferno"
done

mkdir -p "$ROOT/target" "$ROOT/benches/plots"
DIR=$(mktemp -d "$ROOT/target/flame-XXXXXX")
LOAD=
finish() {
  [ -z "$LOAD" ] || kill "$LOAD" 2>/dev/null || true
  "$ROOT/deploy/cluster.sh" wipe --dir "$DIR/cluster" >/dev/null 2>&1 || true
  rm -rf "$DIR"
}
trap finish EXIT

export MERIDIAN_BIN=$BIN
for operation in "$@"; do
  "$ROOT/deploy/cluster.sh" up --nodes 3 --replicas 3 --dir "$DIR/cluster" --base-port "$BASE_PORT" >"$DIR/up" 2>&1 ||
    { cat "$DIR/up" >&2; die "the cluster did not start"; }
  pids=$(for node in "$DIR"/cluster/n*/pid; do head -n 1 "$node"; done | paste -sd,)
  read -ra arguments <<<"$(workload "$operation")"
  "$BIN" --endpoints "$ENDPOINTS" bench "${arguments[@]}" --keys "$KEYS" --value-bytes "$VALUE_BYTES" \
    --warmup "$WARM_UP_SECONDS" --seconds $((SECONDS_MEASURED * 3)) >"$DIR/load" 2>&1 &
  LOAD=$!
  # The keys are written first: the load is on when it says so.
  until grep -q ' clients for ' "$DIR/load"; do
    kill -0 "$LOAD" 2>/dev/null || { cat "$DIR/load" >&2; die "the load did not start"; }
    sleep 0.2
  done
  sleep "$WARM_UP_SECONDS"
  perf record -q -F "$MEASURE_HZ" --call-graph dwarf,16384 -e cpu-clock -p "$pids" -o "$DIR/perf.data" \
    -- sleep "$SECONDS_MEASURED" 2>"$DIR/perf.log" || { cat "$DIR/perf.log" >&2; die "perf could not record"; }
  wait "$LOAD"
  LOAD=
  picture=$ROOT/benches/plots/flame-$operation.svg
  perf script -i "$DIR/perf.data" --no-inline 2>/dev/null | inferno-collapse-perf 2>/dev/null |
    inferno-flamegraph --minwidth "$LEAST_SHARE" --hash \
      --title "CPU time of three nodes: ${arguments[*]} ($("$BIN" --version))" >"$picture"
  printf '%s: %s KiB\n' "${picture#"$ROOT"/}" $(($(stat -c %s "$picture") / 1024))
  "$ROOT/deploy/cluster.sh" wipe --dir "$DIR/cluster" >/dev/null 2>&1
done
