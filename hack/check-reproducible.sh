#!/bin/bash
# check-reproducible.sh: the same tree gives the same binary, wherever it lies and whatever was built before.
set -euo pipefail
cd "$(dirname "$0")/.."

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir -p "$dir/a" "$dir/another/place/b"
tar -cf - --exclude=./.git --exclude=./bin --exclude=./.cache . | tar -xf - -C "$dir/a"
cp -R "$dir/a/." "$dir/another/place/b/"

make -s -C "$dir/a" build
GOCACHE=$dir/cache make -s -C "$dir/another/place/b" build # its own cache: nothing is taken from the first

sums=$(cd "$dir" && sha256sum a/bin/precache-agent another/place/b/bin/precache-agent)
if [[ $(cut -d' ' -f1 <<<"$sums" | uniq | wc -l) != 1 ]]; then
	printf 'the build is not reproducible:\n%s\n' "$sums" >&2
	exit 1
fi
echo "reproducible: sha256 ${sums%% *}"
