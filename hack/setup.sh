#!/bin/bash
# setup.sh build|demo|test: installs what is missing, as root. Anybody else is told what to run. Silent if nothing is.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/go/bin:/usr/sbin:/sbin

mode=${1-}
case $mode in build | demo | test) ;; *) echo "usage: $0 build|demo|test" >&2 && exit 2 ;; esac

if command -v apt-get >/dev/null; then
	manager=apt
elif command -v dnf >/dev/null; then
	manager=dnf
else
	manager=
fi

missing=() # commands, for those who install by another way
packages=()

# need COMMAND-OR-FILE DEBIAN-PACKAGE FEDORA-PACKAGE
need() {
	if [[ -e $1 ]] || command -v "$1" >/dev/null; then return; fi
	missing+=("$1")
	if [[ $manager == apt ]]; then packages+=("$2"); else packages+=("$3"); fi
}

need go golang-go golang
need git git git
need make make make
if [[ $mode == test ]]; then # the race detector needs a C compiler; the rest reads and breaks what the agent wrote
	need gcc gcc gcc
	need /usr/include/stdlib.h libc6-dev glibc-devel
	need podman podman podman
	need skopeo skopeo skopeo
	need mkfs.xfs xfsprogs xfsprogs
	need mkfs.ext4 e2fsprogs e2fsprogs
	need mount mount util-linux
	need losetup mount util-linux
	need unshare util-linux util-linux
	need gpg gnupg gnupg2
	need xz xz-utils xz
	need zstd zstd zstd
	need getfattr attr attr
	need systemd-analyze systemd systemd
	need shellcheck shellcheck ShellCheck
	need fuse-overlayfs fuse-overlayfs fuse-overlayfs
	need newuidmap uidmap shadow-utils
	# The machine that the boot test boots is made of Debian packages, so that test does not run elsewhere.
	need qemu-system-x86_64 qemu-system-x86 qemu-system-x86-core
	need mmdebstrap mmdebstrap mmdebstrap
	need sgdisk gdisk gdisk
	need nbdkit nbdkit nbdkit
	need /usr/lib/dracut/modules.d/30ignition/ignition ignition ignition
fi

if ((${#missing[@]})); then
	case $manager in
	apt) update=(apt-get -qq update) install=(env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${packages[@]}") ;;
	dnf) update=(true) install=(dnf -q install -y "${packages[@]}") ;;
	*)
		echo "missing: ${missing[*]}. Neither apt-get nor dnf is here; install them as your system does." >&2
		exit 1
		;;
	esac
	if ((EUID != 0)); then
		echo "missing: ${missing[*]}. As root, run:" >&2
		if [[ $manager == apt ]]; then
			echo "  apt-get update && apt-get install -y --no-install-recommends ${packages[*]}" >&2
		else
			echo "  dnf install -y ${packages[*]}" >&2
		fi
		exit 1
	fi
	echo "installing: ${packages[*]}"
	log=$(mktemp)
	trap 'rm -f "$log"' EXIT
	if ! { "${update[@]}" && "${install[@]}"; } >"$log" 2>&1 </dev/null; then
		cat "$log" >&2
		exit 1
	fi
fi

# A distribution's Go may be older than the code. From 1.21 on, Go fetches the toolchain that go.mod asks for, if it is let.
want=$(sed -n 's/^go //p' go.mod)
have=$(go env GOVERSION 2>/dev/null || true)
if [[ $(printf '%s\n' "$want" "${have#go}" | sort -V | head -n1) != "$want" ]]; then
	cat >&2 <<-END
		Go $want or later is needed; here is ${have:-$(GOTOOLCHAIN=local go version 2>/dev/null || echo none)}. Either let it fetch that itself (Go 1.21 and later):
		  go env -w GOTOOLCHAIN=auto
		or install it beside the distribution's:
		  curl -fL https://go.dev/dl/go$want.linux-$(case $(uname -m) in x86_64) echo amd64 ;; aarch64) echo arm64 ;; *) uname -m ;; esac).tar.gz | tar -C /usr/local -xz
		  export PATH=/usr/local/go/bin:\$PATH
	END
	exit 1
fi
