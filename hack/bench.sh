#!/bin/bash
# bench.sh [FLAG]...: builds the agent and measures it against its peers; -help lists the flags. BENCH_QUICK=1: a small corpus, one round.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/go/bin:/usr/sbin:/sbin

missing=()
((EUID == 0)) || missing+=(root)
for tool in podman skopeo unshare xargs gunzip tar; do
	command -v "$tool" >/dev/null || missing+=("$tool")
done
if ((${#missing[@]})); then
	echo "make bench writes stores of root's and measures against podman and skopeo. Missing: ${missing[*]}" >&2
	exit 2
fi

make --no-print-directory build >&2
CGO_ENABLED=0 go build -o bin/bench ./internal/bench
# In a mount namespace of its own: whatever the bench and podman mount there is gone when they are, even if they are killed.
exec unshare --mount --propagation private bin/bench "$@"
