package ignition

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const label = "staged"

// fakeAgent is a binary that runs.
const fakeAgent = "#!/bin/sh\n[ \"$*\" = version ] && echo precache-agent 1.2.3\n"

// harness prepares a mount namespace with devices, a /sys/class/block and a /run of its own from the folder $1, and runs the rest of its
// arguments there. Then it says what is still mounted.
const harness = `
T=$1; shift
mount -t tmpfs -o mode=755 dev "$T/dev"
cp -a /dev/null /dev/zero /dev/loop-control /dev/loop[0-9]* "$T/dev/"
mkdir -p "$T/dev/disk/by-partlabel"
if [ -e "$T/links" ]; then cp -a "$T/links/." "$T/dev/disk/by-partlabel/"; fi
mount --bind "$T/run" /run
mount --bind "$T/block" /sys/class/block
mount --move "$T/dev" /dev
"$@"
code=$?
if grep " /run/precache-agent/" /proc/self/mountinfo; then echo "is still mounted"; fi
exit $code
`

func needRoot(t *testing.T, commands ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("needs loop devices")
	}
	for _, c := range append(commands, "unshare", "mount", "losetup") {
		if _, err := exec.LookPath(c); err != nil {
			t.Skipf("needs %s", c)
		}
	}
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// mounted runs a script on the mounted image, $1, where nobody else sees it: a namespace that is copied meanwhile would keep it mounted.
func mounted(t *testing.T, image, script string, args ...string) {
	t.Helper()
	command(t, "unshare", append([]string{"--mount", "--propagation", "private", "sh", "-ec",
		`mount -o loop "$0" "$1"; ` + script + `; umount "$1"`, image, t.TempDir()}, args...)...)
}

// A node is a folder that the script takes for a machine.
type node struct {
	t   *testing.T
	dir string
}

func newNode(t *testing.T) *node {
	n := &node{t, t.TempDir()}
	for _, dir := range []string{"dev", "run", "block"} {
		if err := os.Mkdir(filepath.Join(n.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// partition makes a file system with files, on a loop device. spoil, if not nil, gets its image.
func (n *node) partition(fsType string, files map[string]string, spoil func(image string)) (device, image string) {
	t := n.t
	t.Helper()
	f, err := os.CreateTemp(n.dir, "image")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	image = f.Name()
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	if fsType != "xfs" || exec.Command("mkfs.xfs", "-q", "--unsupported", image).Run() != nil { // since 5.19 else from 300 MiB on
		command(t, "mkfs."+fsType, "-q", image)
	}
	source := t.TempDir()
	for name, contents := range files {
		write(t, filepath.Join(source, name), contents, 0o644)
	}
	mounted(t, image, `cp -r "$2/." "$1"`, source)
	if spoil != nil {
		spoil(image)
	}
	device = command(t, "losetup", "--find", "--show", image)
	t.Cleanup(func() { exec.Command("losetup", "-d", device).Run() })
	return device, image
}

// list lists a device in sysfs as a partition with a label.
func (n *node) list(device, label string) {
	name := filepath.Base(device)
	write(n.t, filepath.Join(n.dir, "block", name, "uevent"), fmt.Sprintf("MAJOR=7\nMINOR=1\nDEVNAME=%s\nDEVTYPE=partition\nPARTN=1\nPARTNAME=%s\n", name, label), 0o644)
}

// link links a device as udev does.
func (n *node) link(device, label string) {
	dir := filepath.Join(n.dir, "links")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Symlink(device, filepath.Join(dir, label)); err != nil {
		n.t.Fatal(err)
	}
}

// bootstrap runs the script with a shell.
func (n *node) bootstrap(shell []string, sum string, wait int) (output string, err error) {
	script := filepath.Join(n.dir, "script")
	write(n.t, script, bootstrapScript, 0o755)
	args := append([]string{"--mount", "--propagation", "private", "sh", "-c", harness, "sh", n.dir}, shell...)
	out, err := exec.Command("unshare", append(args, script, label, sum, fmt.Sprint(wait))...).CombinedOutput()
	return string(out), err
}

func (n *node) binary() string { return filepath.Join(n.dir, "run/precache-agent/bin/precache-agent") }

func sum(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

func hashFile(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// shells are what /bin/sh may be.
func shells(t *testing.T) [][]string {
	all := [][]string{{"sh"}}
	if _, err := exec.LookPath("bash"); err == nil {
		all = append(all, []string{"bash", "--posix"}) // as on Red Hat's
	}
	return all
}

func TestBootstrap(t *testing.T) {
	needRoot(t, "mkfs.xfs", "mkfs.ext4", "xfs_io", "debugfs")
	agent := map[string]string{"precache-agent": fakeAgent}
	dirty := func(image string) { // a log that is to be replayed
		mounted(t, image, `head -c 65536 /dev/zero >"$1/later"; xfs_io -x -c "shutdown -f" "$1"`)
	}
	orphan := func(image string) { // what ext4 would clean up even when mounted read-only: inode 12 is the first file's
		command(t, "debugfs", "-w", "-R", "set_super_value last_orphan 12", image)
	}
	scratch := func(image string) {
		f, err := os.OpenFile(image, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(make([]byte, 1<<20), 0); err != nil {
			t.Fatal(err)
		}
	}
	const bad = "Nothing will be loaded, the boot goes on.\n"
	for _, tt := range []struct {
		name   string
		fsType string
		files  map[string]string
		spoil  func(string)
		want   string // of its output
		ok     bool
	}{
		{"xfs", "xfs", agent, nil, "precache-agent 1.2.3 from /dev/loop", true},
		{"dirty xfs", "xfs", agent, dirty, "precache-agent 1.2.3 from /dev/loop", true},
		{"ext4", "ext4", agent, nil, "precache-agent 1.2.3 from /dev/loop", true},
		{"ext4 with an orphan", "ext4", agent, orphan, "precache-agent 1.2.3 from /dev/loop", true},
		{"wrong hash", "xfs", map[string]string{"precache-agent": fakeAgent + "#"}, nil, "has the sha256 " + sum(fakeAgent+"#") + ", not " + sum(fakeAgent) + ". " + bad, false},
		{"empty file", "xfs", map[string]string{"precache-agent": ""}, nil, "has the sha256 e3b0c442", false},
		{"no file", "xfs", nil, nil, "has no file precache-agent; waited for 1 s. " + bad, false},
		{"a folder", "xfs", map[string]string{"precache-agent/x": ""}, nil, "has no file precache-agent; waited for 1 s. " + bad, false},
		{"no file system", "xfs", agent, scratch, "cannot mount /dev/loop", false},
	} {
		for _, shell := range shells(t) {
			t.Run(tt.name+" "+shell[0], func(t *testing.T) {
				n := newNode(t)
				device, image := n.partition(tt.fsType, tt.files, tt.spoil)
				n.list(device, label)
				n.link(device, label)
				before := hashFile(t, image)
				// What a former boot, say, has left is not what was asked for.
				write(t, n.binary(), "#!/bin/sh\necho old\n", 0o755)
				out, err := n.bootstrap(shell, sum(fakeAgent), 1)
				if !strings.Contains(out, tt.want) || strings.Count(out, "\n") != 1 {
					t.Errorf("said %q, want %q", out, tt.want)
				}
				if (err == nil) != tt.ok {
					t.Errorf("ended with %v", err)
				}
				got, err := os.ReadFile(n.binary())
				if tt.ok {
					if string(got) != fakeAgent {
						t.Errorf("binary is %q: %v", got, err)
					}
					if info, err := os.Stat(n.binary()); err != nil || info.Mode() != 0o755 {
						t.Errorf("%v: %v", info.Mode(), err)
					}
				} else if !os.IsNotExist(err) {
					t.Errorf("binary is %q: %v", got, err)
				}
				if left, _ := filepath.Glob(filepath.Join(n.dir, "run/precache-agent/bin/.*")); len(left) > 0 {
					t.Errorf("left %q", left)
				}
				if after := hashFile(t, image); after != before {
					t.Error("the partition has changed")
				}
				f, err := os.OpenFile(device, os.O_RDONLY|os.O_EXCL, 0)
				if err != nil {
					t.Errorf("the partition is in use: %v", err)
				}
				f.Close()
			})
		}
	}
}

func TestBootstrapWaits(t *testing.T) {
	needRoot(t, "mkfs.ext4")
	agent := map[string]string{"precache-agent": fakeAgent}

	t.Run("no partition", func(t *testing.T) {
		n := newNode(t)
		device, _ := n.partition("ext4", agent, nil)
		n.list(device, label+"2")
		n.link(device, label+"3")
		began := time.Now()
		out, err := n.bootstrap([]string{"sh"}, sum(fakeAgent), 2)
		if err == nil || !strings.Contains(out, "no partition labelled staged; waited for 2 s. ") {
			t.Errorf("%q, %v", out, err)
		}
		// It counts whole seconds of the time since the boot.
		if took := time.Since(began); took < time.Second || took > 10*time.Second {
			t.Errorf("took %v", took)
		}
	})
	t.Run("late partition", func(t *testing.T) {
		n := newNode(t)
		device, _ := n.partition("ext4", agent, nil)
		time.AfterFunc(time.Second, func() { n.list(device, label) })
		began := time.Now()
		out, err := n.bootstrap([]string{"sh"}, sum(fakeAgent), 60)
		if err != nil || !strings.Contains(out, "1.2.3 from "+device) {
			t.Errorf("%q, %v", out, err)
		}
		if took := time.Since(began); took < time.Second || took > 30*time.Second {
			t.Errorf("took %v", took)
		}
	})
	t.Run("only linked", func(t *testing.T) {
		n := newNode(t)
		device, _ := n.partition("ext4", agent, nil)
		n.link(device, label)
		if out, err := n.bootstrap([]string{"sh"}, sum(fakeAgent), 1); err != nil || !strings.Contains(out, "1.2.3 from "+device) {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("two partitions", func(t *testing.T) {
		n := newNode(t)
		empty, _ := n.partition("ext4", nil, nil)
		device, _ := n.partition("ext4", agent, nil)
		n.list(empty, label)
		n.list(device, label)
		n.link(empty, label)
		if out, err := n.bootstrap([]string{"sh"}, sum(fakeAgent), 1); err != nil || !strings.Contains(out, "1.2.3 from "+device) {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("there already", func(t *testing.T) {
		n := newNode(t)
		write(t, n.binary(), fakeAgent, 0o755)
		if out, err := n.bootstrap([]string{"sh"}, sum(fakeAgent), 1); err != nil || out != "" {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("does not run", func(t *testing.T) {
		n := newNode(t)
		const other = "\x7fELF of another architecture"
		device, _ := n.partition("ext4", map[string]string{"precache-agent": other}, nil)
		n.list(device, label)
		out, err := n.bootstrap([]string{"sh"}, sum(other), 1)
		if err == nil || !strings.Contains(out, "does not run: ") {
			t.Errorf("%q, %v", out, err)
		}
		if _, err := os.Stat(n.binary()); !os.IsNotExist(err) {
			t.Error(err)
		}
	})
}

func TestScriptsAreClean(t *testing.T) {
	if _, err := exec.LookPath("shellcheck"); err != nil {
		t.Skip("needs shellcheck")
	}
	var out bytes.Buffer
	cmd := exec.Command("shellcheck", "--shell=sh", "bootstrap.sh", "agent-fix-bz1964591.sh")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Errorf("%v\n%s", err, &out)
	}
}
