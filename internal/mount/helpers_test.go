package mount

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	xfsSize  = 64 << 20 // bytes
	ext4Size = 32 << 20
	apartEnv = "PRECACHE_MOUNT_TEST_APART" // says that a test runs in a mount namespace of its own
	helper   = "PRECACHE_MOUNT_TEST_HOLD"  // names the device that a test's helper process is to hold
)

var images = struct {
	sync.Mutex
	dir  string
	made map[string]error
}{made: map[string]error{}}

func TestMain(m *testing.M) {
	if dev := os.Getenv(helper); dev != "" {
		hold(dev)
	}
	code := m.Run()
	if images.dir != "" {
		os.RemoveAll(images.dir)
	}
	os.Exit(code)
}

// need skips the test where it cannot run. In CI it must run.
func need(t *testing.T, tools ...string) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "mounting needs root"
	} else if _, err := os.Stat("/dev/loop-control"); err != nil {
		why = "no loop devices: " + err.Error()
	}
	for _, tool := range append(tools, "losetup", "unshare") {
		if _, err := exec.LookPath(tool); err != nil && why == "" {
			why = err.Error()
		}
	}
	switch {
	case why == "":
	case os.Getenv("CI") == "true":
		t.Fatal(why)
	default:
		t.Skip(why)
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// populate is run in a mount namespace of its own with the device and a folder: what it mounts cannot be left behind.
const populate = `
set -e
mount "$1" "$2"
cd "$2"
echo hello > file
mkdir folder
seq 1 1000 > folder/numbers
ln -s /etc/passwd absolute
ln -s ../../../../etc/passwd upwards
ln -s file inside
mknod null c 1 3
mknod disk b 7 0
cp /bin/true program
chmod 4755 program
`

// What image can make of a file system, after populate.
const (
	clean = `cd /; umount "$2"`
	// A log that was not written back, with an orphan: a file that is removed while it is open.
	dirty = `
echo gone > gone
mkdir many
for i in $(seq 1 200); do echo $i > many/$i; done
sync
exec 7<gone
rm gone
xfs_io -c fsync .
sync
for i in $(seq 1 100); do echo $i > many/more$i; done
xfs_io -x -c 'shutdown -f' .
exec 7<&-
cd /
umount "$2"`
	// The log, when it is small, has been written round more than once.
	busy = `
for round in $(seq 12); do
	seq -f z%g 2000 | xargs touch
	xfs_io -c fsync .
	rm z*
	sync
done
`
)

// image returns a new file with a file system, made as end says by mkfs with the options.
func image(t *testing.T, fsType, end string, options ...string) string {
	t.Helper()
	need(t, "mkfs."+fsType, "xfs_io")
	key := fsType + " " + end + strings.Join(options, " ")
	master, err := master(key, func(file string) error { return makeImage(file, fsType, end, options) })
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "disk.img")
	run(t, "cp", "--sparse=always", master, file)
	return file
}

// master returns the file that all copies of an image are made from.
func master(key string, make func(file string) error) (string, error) {
	images.Lock()
	defer images.Unlock()
	if images.dir == "" {
		var err error
		if images.dir, err = os.MkdirTemp("", "mount-images-"); err != nil {
			return "", err
		}
	}
	sum := sha256.Sum256([]byte(key))
	file := filepath.Join(images.dir, fmt.Sprintf("%x.img", sum[:8]))
	err, made := images.made[key]
	if !made {
		err = make(file)
		images.made[key] = err
	}
	return file, err
}

func makeImage(file, fsType, end string, options []string) error {
	size := int64(xfsSize)
	quiet := []string{"-q"}
	if fsType == "ext4" {
		size = ext4Size
		quiet = []string{"-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"}
	} else if out, _ := exec.Command("mkfs.xfs", "--unsupported", "-V").CombinedOutput(); strings.Contains(string(out), "mkfs.xfs version") {
		// From xfsprogs 5.19 on nothing below 300 MiB is made without it.
		quiet = append(quiet, "--unsupported")
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(file, size); err != nil {
		return err
	}
	if out, err := exec.Command("mkfs."+fsType, append(append(quiet, options...), file)...).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.%s: %w: %s", fsType, err, out)
	}
	out, err := exec.Command("losetup", "--show", "-f", file).CombinedOutput()
	if err != nil {
		return fmt.Errorf("losetup: %w: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	defer exec.Command("losetup", "-d", dev).Run()
	at, err := os.MkdirTemp("", "mount-populate-")
	if err != nil {
		return err
	}
	defer os.Remove(at)
	out, err = exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", populate+end, "populate", dev, at).CombinedOutput()
	if err != nil {
		return fmt.Errorf("populate %s: %w: %s", fsType, err, out)
	}
	return nil
}

// attachFile returns a loop device with the file.
func attachFile(t *testing.T, file string) string {
	t.Helper()
	need(t)
	dev := run(t, "losetup", "--show", "-f", file)
	t.Cleanup(func() {
		run(t, "losetup", "-d", dev)
		// Detached when the last one closes it: it is still there if a mount or a file is.
		eventually(t, "loop device goes away", func() bool { return !strings.Contains(run(t, "losetup", "-a"), dev+":") })
	})
	return dev
}

// A machine is a by-partlabel folder and a sysfs for tests.
type machine struct{ dir, sys string }

func newMachine(t *testing.T) machine {
	m := machine{filepath.Join(t.TempDir(), "by-partlabel"), filepath.Join(t.TempDir(), "block")}
	for _, dir := range []string{m.dir, m.sys} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// kernel makes the kernel know dev as a partition with the label.
func (m machine) kernel(t *testing.T, dev, label string) {
	t.Helper()
	name := filepath.Base(dev)
	if err := os.Mkdir(filepath.Join(m.sys, name), 0o755); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("MAJOR=7\nMINOR=0\nDEVNAME=%s\nDEVTYPE=partition\nPARTN=5\nPARTNAME=%s\n", name, label)
	if err := os.WriteFile(filepath.Join(m.sys, name, "uevent"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// udev makes udev name it, as it does: a link under another name, renamed.
func (m machine) udev(t *testing.T, dev, name string) {
	t.Helper()
	link := filepath.Join(m.dir, ".#"+name)
	if err := os.Symlink(dev, link); err != nil {
		t.Error(err)
	}
	if err := os.Rename(link, filepath.Join(m.dir, name)); err != nil {
		t.Error(err)
	}
}

func (m machine) options(t *testing.T) (Options, *notes) {
	n := &notes{t: t}
	return Options{Dir: m.dir, Sys: m.sys, Note: n.add}, n
}

// with returns a machine whose partition "data" is dev.
func with(t *testing.T, dev string) (Options, *notes) {
	m := newMachine(t)
	m.kernel(t, dev, "data")
	m.udev(t, dev, "data")
	return m.options(t)
}

type notes struct {
	t    *testing.T
	text []string
}

func (n *notes) add(msg string, args ...any) {
	n.text = append(n.text, fmt.Sprint(append([]any{msg, " "}, args...)...))
	n.t.Log("note:", n.text[len(n.text)-1])
}

func (n *notes) has(t *testing.T, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(strings.Join(n.text, "\n"), w) {
			t.Errorf("no note says %q: %q", w, n.text)
		}
	}
	if len(want) == 0 && len(n.text) > 0 {
		t.Errorf("notes %q", n.text)
	}
}

// open opens and, with the test, closes.
func open(t *testing.T, o Options) *Mount {
	t.Helper()
	m, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Root.Close() })
	return m
}

func closeMount(t *testing.T, m *Mount) {
	t.Helper()
	start := time.Now()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if err := exclusive(m.Device); err != nil {
		t.Errorf("right after Close: %v", err)
	}
	t.Logf("closed in %v", time.Since(start))
}

// exclusive opens the device as an installer does.
func exclusive(dev string) error {
	fd, err := unix.Open(dev, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func digest(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// unchanged fails the test if its end finds other bytes in the file than now. What wrote to the device must be gone by then.
func unchanged(t *testing.T, file string) {
	t.Helper()
	before := digest(t, file)
	t.Cleanup(func() {
		if digest(t, file) != before {
			t.Error("the device was written to")
		}
	})
}

// unseen fails the test if this process or PID 1 sees the device, by its number, mounted.
func unseen(t *testing.T, rdev uint64) {
	t.Helper()
	for _, file := range []string{"/proc/self/mountinfo", "/proc/1/mountinfo", "/proc/thread-self/mountinfo"} {
		if mounts, err := mountsOf(file, rdev); err != nil || len(mounts) != 0 {
			t.Errorf("%s: %v, %v", file, mounts, err)
		}
	}
}

func rdevOf(t *testing.T, dev string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(dev, &st); err != nil {
		t.Fatal(err)
	}
	return st.Rdev
}

// leaks fails the test if it ends with more descriptors or goroutines than it has now.
func leaks(t *testing.T) {
	t.Helper()
	fds, routines := len(list("/proc/self/fd")), runtime.NumGoroutine()
	t.Cleanup(func() {
		eventually(t, "no descriptor and no goroutine is left", func() bool {
			return len(list("/proc/self/fd")) <= fds && runtime.NumGoroutine() <= routines
		})
	})
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for start := time.Now(); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Errorf("not within 10 s: %s", what)
			return
		}
	}
}

func is(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error is %v, want %v", err, want)
	}
}
