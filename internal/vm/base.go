package vm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// recipe is what the base system is made of. Its hash names the cached file.
type recipe struct {
	Version  int // of the code that makes it
	Suite    string
	Packages []string
	Modules  []string // in the initial RAM disk
	Init     string
}

func newRecipe(suite string) recipe {
	return recipe{
		Version: 1,
		Suite:   suite,
		Packages: []string{"systemd", "systemd-sysv", "udev", "dbus", "kmod", "iproute2", "procps", "util-linux", "xfsprogs", "attr",
			"ca-certificates", "podman", "crun", "conmon", "busybox-static", "linux-image-cloud-amd64"},
		Modules: []string{"virtio_pci", "virtio_blk", "xfs"},
		Init:    initScript,
	}
}

// masked are units that cost time, or do something behind the test's back.
var masked = []string{"systemd-networkd.service", "systemd-networkd.socket", "systemd-networkd-wait-online.service", "systemd-firstboot.service",
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
	"xfs_scrub_all.timer", "getty@tty1.service", "serial-getty@ttyS0.service", "systemd-binfmt.service", "systemd-pstore.service",
	"podman.service", "podman.socket", "podman-restart.service", "podman-auto-update.service", "podman-auto-update.timer",
	"podman-clean-transient.service", "kmod-static-nodes.service", "modprobe@efi_pstore.service",
	"modprobe@configfs.service", "modprobe@dm_mod.service", "modprobe@drm.service", "sys-kernel-config.mount", "sys-kernel-debug.mount",
	"sys-kernel-tracing.mount", "dev-hugepages.mount", "dev-mqueue.mount", "systemd-network-generator.service", "systemd-update-utmp.service",
	"systemd-update-utmp-runlevel.service", "systemd-user-sessions.service", "systemd-random-seed.service",
	"proc-sys-fs-binfmt_misc.automount", "systemd-ask-password-console.path", "systemd-ask-password-wall.path"}

// settings are files of every machine.
var settings = map[string]string{
	"etc/hostname": "node\n",
	"etc/fstab":    "",
	// As on RHCOS: what no preset of Ignition's enables is disabled.
	"etc/systemd/system-preset/99-default-disable.preset": "disable *\n",
	"etc/systemd/system/default.target":                   "-> /usr/lib/systemd/system/multi-user.target",
	// Nothing below comes over the network, and nobody may wait for it.
	"etc/systemd/journald.conf.d/test.conf": "[Journal]\nStorage=persistent\nForwardToSyslog=no\n",
}

// initScript loads what the root needs, mounts it and hands over. It takes 2 s less than Debian's own.
const initScript = `#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
for m in /m/*; do $B insmod $m; done
i=0
while [ ! -b /dev/vda ] && [ $i -lt 400 ]; do $B usleep 50000; i=$((i+1)); done
$B mount -o rw -t xfs /dev/vda /root || { echo "initrd: cannot mount the root"; $B sleep 1; $B poweroff -f; }
$B umount /proc
$B umount /sys
$B mount --move /dev /root/dev
exec $B switch_root /root /sbin/init
`

// A Base is the system that every machine starts from.
type Base struct {
	image, kernel, initrd string
}

// tools are the programs that Debian's packages bring which hack/setup.sh installs for tests.
var tools = []string{"qemu-system-x86_64", "mmdebstrap", "mkfs.xfs", "xfs_io", "sgdisk", "nbdkit", "tar", "zstd", "mount", "umount", "chroot", "cp"}

// ignition is where Debian's and Fedora's packages put it.
const ignition = "/usr/lib/dracut/modules.d/30ignition/ignition"

// Missing says why no machine can be booted here, or nothing.
func Missing() string {
	if runtime.GOARCH != "amd64" {
		return "needs amd64: the machine that it boots is one"
	}
	if os.Geteuid() != 0 {
		return "needs root: it makes file systems and mounts them"
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			return "needs " + tool + ": see hack/setup.sh test"
		}
	}
	if _, err := os.Stat(ignition); err != nil {
		return "needs Ignition at " + ignition + ": see hack/setup.sh test"
	}
	if _, err := suite(); err != nil {
		return err.Error()
	}
	return ""
}

// suite is the Debian release of this machine.
func suite() (string, error) {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", fmt.Errorf("needs Debian: %w", err)
	}
	release := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			release[k] = strings.Trim(v, `"`)
		}
	}
	if release["ID"] != "debian" || release["VERSION_CODENAME"] == "" {
		return "", fmt.Errorf("needs Debian, whose packages the machine is made of; this is %s", release["PRETTY_NAME"])
	}
	return release["VERSION_CODENAME"], nil
}

// cacheDir is where base systems are kept: $PRECACHE_CACHE, or the user's cache.
func cacheDir() (string, error) {
	if dir := os.Getenv("PRECACHE_CACHE"); dir != "" {
		return filepath.Join(dir, "vm"), nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find a cache folder (PRECACHE_CACHE names one): %w", err)
	}
	return filepath.Join(dir, "precache-agent", "vm"), nil
}

// Alone waits until no other process has machines running, and keeps it so until this one ends: two at a time
// take more than twice as long, and miss their deadlines.
func Alone() error {
	dir, err := cacheDir()
	if err != nil {
		return err
	}
	_, err = lock(dir, "machine.lock")
	return err
}

func lock(dir, name string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	for err = unix.EINTR; err == unix.EINTR; {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	held = append(held, f)
	return f, nil
}

// held are the locks: a file that is collected as garbage is closed.
var held []*os.File

// NewBase unpacks the base system in a folder. The first time on a machine it is built, from the network, which takes a minute or two.
func NewBase(dir string) (*Base, error) {
	packed, err := cached()
	if err != nil {
		return nil, fmt.Errorf("make base system: %w", err)
	}
	b := &Base{image: filepath.Join(dir, "base.img"), kernel: filepath.Join(dir, "vmlinuz"), initrd: filepath.Join(dir, "initrd")}
	if err := b.unpack(packed); err != nil {
		return nil, fmt.Errorf("unpack base system: %w", err)
	}
	return b, nil
}

// NewRoot copies the base system's file system into a file of its own.
func (b *Base) NewRoot(path string) error {
	return Copy(b.image, path)
}

// Copy copies a disk image; holes stay holes.
func Copy(from, to string) error {
	return run("cp", "--sparse=always", "--reflink=auto", from, to)
}

func (b *Base) unpack(packed string) error {
	const size = 4 << 30 // sparse
	if err := os.WriteFile(b.image, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(b.image, size); err != nil {
		return err
	}
	if err := run("mkfs.xfs", "-q", "-L", "root", b.image); err != nil {
		return err
	}
	return Edit(b.image, func(dir string) error {
		if err := run("tar", "-C", dir, "--zstd", "--xattrs", "--xattrs-include=*", "-xpf", packed); err != nil {
			return err
		}
		return errors.Join(
			run("mv", filepath.Join(dir, "boot/vmlinuz"), b.kernel),
			run("mv", filepath.Join(dir, "boot/initrd"), b.initrd),
			customise(dir), installGuest(dir))
	})
}

// cached returns the packed base system, which it builds if it is not there.
func cached() (string, error) {
	codename, err := suite()
	if err != nil {
		return "", err
	}
	r := newRecipe(codename)
	key, err := json.Marshal(r)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(key)
	dir, err := cacheDir()
	if err != nil {
		return "", err
	}
	l, err := lock(dir, "base.lock")
	if err != nil {
		return "", err
	}
	defer l.Close()
	packed := filepath.Join(dir, "base-"+hex.EncodeToString(sum[:8])+".tar.zst")
	now := time.Now()
	if err := os.Chtimes(packed, now, now); err == nil {
		return packed, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	// What another recipe made and nobody used for a month, and what was left half done.
	old, _ := filepath.Glob(filepath.Join(dir, "base-*"))
	for _, name := range old {
		if info, err := os.Stat(name); err == nil && (now.Sub(info.ModTime()) > 30*24*time.Hour || !strings.HasSuffix(name, ".tar.zst")) {
			if err := os.RemoveAll(name); err != nil {
				return "", err
			}
		}
	}
	if err := r.build(dir, packed); err != nil {
		return "", err
	}
	return packed, nil
}

// build makes the base system and packs it, with a kernel and an initial RAM disk in /boot.
func (r recipe) build(dir, packed string) (err error) {
	root, err := os.MkdirTemp(dir, "base-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, run("rm", "-rf", "--one-file-system", root)) }()
	if err := os.Chmod(root, 0o755); err != nil {
		return err
	}
	sources, err := aptSources(r.Suite)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	args := []string{"--quiet", "--mode=root", "--variant=minbase", "--format=directory", "--include=" + strings.Join(r.Packages, ","),
		`--aptopt=APT::Install-Recommends "false"`, "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*", r.Suite, root}
	if err := runContext(ctx, "mmdebstrap", append(args, sources...)...); err != nil {
		return err
	}
	if err := r.bootable(root); err != nil {
		return err
	}
	part := packed + ".part"
	defer os.Remove(part)
	if err := run("tar", "-C", root, "--zstd", "--xattrs", "--xattrs-include=*", "-cf", part, "."); err != nil {
		return err
	}
	return os.Rename(part, packed)
}

func customise(root string) error {
	for name, text := range settings {
		if err := writeFile(filepath.Join(root, name), text, 0o644); err != nil {
			return err
		}
	}
	for _, unit := range masked {
		if err := writeFile(filepath.Join(root, "etc/systemd/system", unit), "-> /dev/null", 0); err != nil {
			return err
		}
	}
	return nil
}

// bootable puts a kernel and an initial RAM disk into /boot, and removes what nobody needs.
func (r recipe) bootable(root string) error {
	kernels, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if len(kernels) != 1 {
		return fmt.Errorf("find kernel: %d of them", len(kernels))
	}
	version := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	kernel, err := os.ReadFile(kernels[0])
	if err != nil {
		return err
	}
	initrd, err := r.initrd(root, version)
	if err != nil {
		return fmt.Errorf("make initial RAM disk: %w", err)
	}
	// A first boot is one without /etc/machine-id; systemd then applies the presets.
	for _, name := range []string{"boot", "etc/machine-id", "var/cache/apt", "var/lib/apt/lists"} {
		if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
			return err
		}
	}
	for _, name := range []string{"boot", "var/log/journal", "var/cache/apt/archives/partial", "var/lib/apt/lists/partial"} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(filepath.Join(root, "boot/vmlinuz"), kernel, 0o644),
		os.WriteFile(filepath.Join(root, "boot/initrd"), initrd, 0o644))
}

// writeFile writes a file, or a symbolic link if its text is "-> TARGET".
func writeFile(path, text string, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if target, ok := strings.CutPrefix(text, "-> "); ok {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return os.Symlink(target, path)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// initrd packs busybox and the modules that the root file system needs, as the kernel wants it
// (Documentation/driver-api/early-userspace/buffer-format.rst).
func (r recipe) initrd(root, version string) ([]byte, error) {
	var cpio bytes.Buffer
	inode := 0
	add := func(name string, mode uint32, data []byte) {
		inode++
		fmt.Fprintf(&cpio, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		pad := func() { cpio.Write(make([]byte, -cpio.Len()&3)) }
		pad()
		cpio.Write(data)
		pad()
	}
	for _, dir := range []string{"bin", "m", "proc", "sys", "dev", "root"} {
		add(dir, unix.S_IFDIR|0o755, nil)
	}
	add("init", unix.S_IFREG|0o755, []byte(r.Init))
	busybox, err := os.ReadFile(filepath.Join(root, "bin/busybox"))
	if err != nil {
		return nil, err
	}
	add("bin/busybox", unix.S_IFREG|0o755, busybox)
	var modules []string
	for _, name := range r.Modules {
		out, err := output("chroot", root, "modprobe", "--set-version", version, "--show-depends", name)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			if path, ok := strings.CutPrefix(strings.TrimSpace(line), "insmod "); ok {
				if path, _, _ = strings.Cut(path, " "); !slices.Contains(modules, path) {
					modules = append(modules, path)
				}
			}
		}
	}
	for i, path := range modules {
		data, err := os.ReadFile(filepath.Join(root, path))
		if strings.HasSuffix(path, ".xz") {
			var out string
			out, err = output("xz", "-dc", filepath.Join(root, path))
			data = []byte(out)
		}
		if err != nil {
			return nil, err
		}
		add(fmt.Sprintf("m/%02d-%s", i, filepath.Base(path)), unix.S_IFREG|0o644, data)
	}
	add("TRAILER!!!", 0, nil)
	return cpio.Bytes(), nil
}

// aptSources are the machine's own lists of packages that have anything of the release.
func aptSources(suite string) ([]string, error) {
	files := []string{"/etc/apt/sources.list"}
	for _, pattern := range []string{"*.list", "*.sources"} {
		more, _ := filepath.Glob("/etc/apt/sources.list.d/" + pattern)
		files = append(files, more...)
	}
	var use []string
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			if !strings.HasPrefix(line, "#") && slices.Contains(strings.Fields(line), suite) {
				use = append(use, file)
				break
			}
		}
	}
	if use == nil {
		return nil, fmt.Errorf("find packages of %s: none of %q has them", suite, files)
	}
	return use, nil
}
