#!/bin/bash
# demo.sh: stages three sample images, verifies them, and loads them twice into a store that is gone afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n# %s\n' "$*"; }
show() {
	printf '$ %s\n' "$*"
	"$@"
}

if [[ -z ${DEMO_READY-} ]]; then
	hack/setup.sh demo
	say "build the agent"
	make --no-print-directory build
	export DEMO_READY=1
fi

# Only root may write files of other owners. An ordinary user is root in a user namespace, which podman makes.
if ((EUID != 0)); then
	if ! command -v podman >/dev/null || ! command -v newuidmap >/dev/null; then
		echo "As an ordinary user the demo needs podman and newuidmap (packages podman and uidmap, or shadow-utils). Install them, or run make demo as root." >&2
		exit 1
	fi
	if ! grep -q "^\($(id -un)\|$EUID\):" /etc/subuid 2>/dev/null; then
		echo "$(id -un) has no range in /etc/subuid. As root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $(id -un); or run make demo as root." >&2
		exit 1
	fi
	exec podman unshare "$0"
fi

dir=$(mktemp -d "${TMPDIR:-/var/tmp}/precache-demo.XXXXXX")
mkdir "$dir/tmp"
export TMPDIR=$dir/tmp # what the tools below leave behind goes with the rest

# What podman mounts below the store stays mounted when it ends.
cleanup() {
	local point
	while read -r point; do
		umount "$point" || true
	done < <(awk '{ print $5 }' /proc/self/mountinfo | grep -F "$dir/" | tac)
	if grep -qF " $dir/" /proc/self/mountinfo; then
		echo "something is still mounted below $dir: it is left there" >&2
	else
		rm -rf --one-file-system "$dir"
	fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# Overlay wants to mount as the machine's root, and not on top of another overlay.
driver=overlay
if [[ $(stat -f -c %T "$dir") == overlayfs || $(awk '{ print $1, $2; exit }' /proc/self/uid_map) != "0 0" ]] || ! unshare --mount true 2>/dev/null; then
	driver=vfs
fi
store=(--root "$dir/root" --runroot "$dir/run" --storage-driver "$driver")
policy=()
if [[ ! -e /etc/containers/policy.json && ! -e ~/.config/containers/policy.json ]]; then # without podman or skopeo there is none
	echo '{"default":[{"type":"insecureAcceptAnything"}]}' >"$dir/policy.json"
	policy=(--policy "$dir/policy.json")
fi

say "stage three images, made from files of this machine, as the factory tool does"
show go run ./internal/fixture/stage -out "$dir/staged" -preset demo -n 3

say "verify what is staged"
show bin/precache-agent verify --from "$dir/staged"

say "load it into a throw-away store"
show bin/precache-agent load --from "$dir/staged" "${store[@]}" "${policy[@]}"

say "load it again: everything is there"
show bin/precache-agent load --from "$dir/staged" "${store[@]}" "${policy[@]}"

if command -v podman >/dev/null; then
	say "what podman sees"
	show podman "${store[@]}" images
else
	say "podman is not installed: no second opinion"
fi
