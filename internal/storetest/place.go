package storetest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Skip skips a test for a reason that its reader can do something about. Where CI is true it fails it.
func Skip(t testing.TB, format string, args ...any) {
	t.Helper()
	reason := fmt.Sprintf(format, args...)
	if os.Getenv("CI") == "true" {
		t.Fatalf("would be skipped, which CI does not allow: %s", reason)
	}
	t.Skip(reason)
}

// Need skips a test that cannot run here: as root, with these commands.
func Need(t testing.TB, commands ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "needs root: it mounts file systems, and writes files of other owners")
	}
	for _, c := range commands {
		if _, err := exec.LookPath(c); err != nil {
			Skip(t, "needs %s: see hack/setup.sh test", c)
		}
	}
}

// A FS is a kind of file system that a store can lie on.
type FS string

// The file systems. The last two are on a loop device.
const (
	Tmpfs FS = "tmpfs"
	Ext4  FS = "ext4"
	XFS   FS = "xfs"
)

// imageSize is how large the file systems on loop devices are, in bytes; the files are sparse. XFS wants 300 MB at least.
const imageSize = 640 << 20

// Mount makes a file system and returns where it is mounted, until the test ends.
// Then nothing but what podman and skopeo are known to leave may be mounted below it.
func Mount(t testing.TB, kind FS) string {
	t.Helper()
	Need(t, "mount", "umount")
	dir := tempDir(t)
	at := filepath.Join(dir, "mnt")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if kind == Tmpfs {
		if err := unix.Mount("tmpfs", at, "tmpfs", 0, "mode=0755,size=2g"); err != nil {
			t.Fatalf("mount tmpfs: %v", err)
		}
	} else {
		dev := loop(t, kind, filepath.Join(dir, "image"))
		if err := unix.Mount(dev, at, string(kind), 0, ""); err != nil {
			t.Fatalf("mount %s: %v", kind, err)
		}
	}
	t.Cleanup(func() {
		unmountBelow(t, at)
		unmount(t, at)
	})
	return at
}

func loop(t testing.TB, kind FS, file string) string {
	t.Helper()
	Need(t, "losetup", "mkfs."+string(kind))
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, imageSize); err != nil {
		t.Fatal(err)
	}
	Run(t, "mkfs."+string(kind), "-q", file)
	dev := strings.TrimSpace(Run(t, "losetup", "--find", "--show", file))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

// tempDir is like t.TempDir, but short, and never follows a mount when it is removed.
func tempDir(t testing.TB) string {
	t.Helper()
	in := os.TempDir()
	if len(in) > len("/var/tmp") {
		in = "/tmp" // podman wants a run root of 50 characters at most
	}
	dir, err := os.MkdirTemp(in, "storetest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left := mounts(dir); len(left) > 0 {
			t.Errorf("still mounted, so not removed: %q", left)
		} else if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// unmountBelow unmounts what is mounted below a folder. The driver's home mounted on itself is what podman and
// skopeo leave; anything else is a fault.
func unmountBelow(t testing.TB, dir string) {
	t.Helper()
	for _, at := range slices.Backward(mounts(dir)) {
		if at == dir {
			continue
		}
		if filepath.Base(at) != "overlay" {
			t.Errorf("left mounted: %s", at)
		}
		unmount(t, at)
	}
}

// unmount unmounts, though the kernel may take a moment to let go of what a process had that has just ended.
func unmount(t testing.TB, at string) {
	t.Helper()
	err := unix.Unmount(at, 0)
	for n := 0; err == unix.EBUSY && n < 100; n++ {
		time.Sleep(20 * time.Millisecond)
		err = unix.Unmount(at, 0)
	}
	if err != nil {
		t.Errorf("unmount %s: %v%s", at, err, users(at))
	}
}

// mounts lists what is mounted at a folder and below it, in the order in which it was.
func mounts(dir string) (at []string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(string(b)) {
		point := unescape.Replace(strings.Fields(line)[4]) // proc_pid_mountinfo(5)
		if point == dir || strings.HasPrefix(point, dir+"/") {
			at = append(at, point)
		}
	}
	return at
}

// users says which processes work in a folder, for the message that it cannot be unmounted.
func users(dir string) string {
	var found []string
	links, _ := filepath.Glob("/proc/[0-9]*/cwd")
	open, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, l := range append(links, open...) {
		if to, err := os.Readlink(l); err == nil && (to == dir || strings.HasPrefix(to, dir+"/")) {
			comm, _ := os.ReadFile(filepath.Join("/proc", strings.Split(l, "/")[2], "comm"))
			found = append(found, fmt.Sprintf("%s (%s) has %s", l, strings.TrimSpace(string(comm)), to))
		}
	}
	if found == nil {
		return ""
	}
	return "\n" + strings.Join(found, "\n")
}

// Run runs a command and returns its standard output.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	return run(t, exec.Command(name, args...))
}

func run(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := output(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// output runs a command and returns its standard output, or an error that says what it said.
func output(cmd *exec.Cmd) (string, error) {
	var out, errw strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errw
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w\n%s%s", strings.Join(cmd.Args, " "), err, tail(out.String()), tail(errw.String()))
	}
	return out.String(), nil
}

// tail is the end of a long text.
func tail(s string) string {
	const most = 4000
	if len(s) > most {
		return "..." + s[len(s)-most:]
	}
	return s
}
