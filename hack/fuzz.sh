#!/bin/bash
# fuzz.sh TIME PACKAGES...: runs every fuzz target of the packages for TIME, one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."
time=$1
shift

targets=$(go test -list '^Fuzz' "$@" | awk '/^Fuzz/ { name[++n] = $1 } /^ok/ { for (i = 1; i <= n; i++) print $2, name[i]; n = 0 }')
if [[ -z $targets ]]; then
	echo "no fuzz target in $*" >&2
	exit 1
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT

fuzz() {
	go test -run '^$' -fuzz "^$2\$" -fuzztime "$time" -fuzzminimizetime 100x "$1" >"$log" 2>&1
}

failed=0
while read -r pkg name; do
	# Up to Go 1.26 a fuzz run may end with the bare words "context deadline exceeded" when its time is up (golang/go#75804).
	if fuzz "$pkg" "$name" || { grep -q '^ *context deadline exceeded$' "$log" && ! grep -q 'Failing input' "$log" && fuzz "$pkg" "$name"; }; then
		echo "fuzz $pkg $name: $(grep -o 'execs: [0-9]*' "$log" | tail -1)"
	else
		echo "fuzz $pkg $name: FAIL"
		cat "$log"
		failed=1
	fi
done <<<"$targets"
exit $failed
