package mount

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var types = []string{"xfs", "ext4"}

func TestMount(t *testing.T) {
	for _, fsType := range types {
		t.Run(fsType, func(t *testing.T) {
			file := image(t, fsType, clean)
			unchanged(t, file)
			dev := attachFile(t, file)
			leaks(t)
			readOnlyBefore := blockReadOnly(t, dev)
			o, notes := with(t, dev)

			start := time.Now()
			m := open(t, o)
			t.Logf("opened in %v", time.Since(start))
			if m.Device != dev || m.FSType != fsType || m.Dirty || m.Shared != "" {
				t.Errorf("got %+v", m)
			}
			notes.has(t)
			unseen(t, rdevOf(t, dev))
			unseen(t, m.dev)
			is(t, exclusive(dev), unix.EBUSY)
			checkContents(t, m.Root)
			checkReadOnly(t, m.Root)
			closeMount(t, m)
			if err := m.Close(); err != nil {
				t.Errorf("closed again: %v", err)
			}
			if now := blockReadOnly(t, dev); now != readOnlyBefore {
				t.Errorf("device is read-only: %v, was %v", now, readOnlyBefore)
			}
		})
	}
}

func blockReadOnly(t *testing.T, dev string) int {
	t.Helper()
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ro, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET)
	if err != nil {
		t.Fatal(err)
	}
	return ro
}

func checkContents(t *testing.T, root *os.Root) {
	t.Helper()
	for _, name := range []string{"file", "inside", "folder/../file"} {
		if data, err := root.ReadFile(name); string(data) != "hello\n" || err != nil {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	if data, err := root.ReadFile("folder/numbers"); len(data) != 3893 || err != nil {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	for _, name := range []string{"absolute", "upwards", "../file", "/etc/passwd", "folder/../../file"} {
		if f, err := root.Open(name); err == nil {
			t.Errorf("%s leads outside", name)
			f.Close()
		}
	}
	for _, name := range []string{"null", "disk"} {
		if f, err := root.Open(name); err == nil {
			t.Errorf("device node %s can be opened", name)
			f.Close()
		} else {
			is(t, err, unix.EACCES)
		}
	}
}

func checkReadOnly(t *testing.T, root *os.Root) {
	t.Helper()
	for what, err := range map[string]error{
		"create": func() error { _, err := root.Create("new"); return err }(),
		"write":  func() error { _, err := root.OpenFile("file", os.O_RDWR, 0); return err }(),
		"mkdir":  root.Mkdir("new", 0o755),
		"remove": root.Remove("file"),
		"rename": root.Rename("file", "other"),
		"chmod":  root.Chmod("file", 0o600),
		"link":   root.Symlink("a", "b"),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", what, err)
		}
	}
	f, err := root.Open("program")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if want := int64(unix.ST_RDONLY | unix.ST_NODEV | unix.ST_NOSUID | unix.ST_NOEXEC); st.Flags&want != want {
		t.Errorf("mount flags %#x lack some of %#x", st.Flags, want)
	}
	if err := exec.Command(fmt.Sprintf("/proc/self/fd/%d", f.Fd())).Run(); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("run a program: %v", err)
	}
}

func TestDirty(t *testing.T) {
	for _, fsType := range types {
		t.Run(fsType, func(t *testing.T) {
			file := image(t, fsType, dirty)
			if fsType == "ext4" && u32(t, file, ext4Super+0xe8) == 0 {
				t.Error("no orphan was made")
			}
			unchanged(t, file)
			dev := attachFile(t, file)
			o, notes := with(t, dev)
			m := open(t, o)
			if !m.Dirty {
				t.Error("is not dirty")
			}
			notes.has(t, "not unmounted cleanly")
			fs.WalkDir(m.Root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					m.Root.ReadFile(name)
				}
				return nil // what is half written may be damaged
			})
			closeMount(t, m)
		})
	}
}

func u32(t *testing.T, file string, offset int64) (n uint32) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 4)
	if _, err := f.ReadAt(b, offset); err != nil {
		t.Fatal(err)
	}
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// TestDamageIsNotRecorded reads a damaged folder: ext4 notes that in the superblock, of a device that it can write to.
func TestDamageIsNotRecorded(t *testing.T) {
	for _, fsType := range types {
		t.Run(fsType, func(t *testing.T) {
			options := []string{"-U", "11111111-2222-3333-4444-555555555555"}
			if fsType == "xfs" {
				options = []string{"-n", "size=8192", "-m", "uuid=11111111-2222-3333-4444-555555555555"}
			}
			// A folder of more than one block, so that its contents do not stand in the inode.
			file := image(t, fsType, `mkdir large; for i in $(seq 1 500); do : > large/a-rather-long-name-$i; done;`+clean, options...)
			damageNames(t, file)
			if fsType == "ext4" {
				run(t, "tune2fs", "-e", "panic", file)
			}
			unchanged(t, file)
			dev := attachFile(t, file)
			o, _ := with(t, dev)
			m := open(t, o)
			if fsType == "ext4" {
				loop, err := os.Readlink("/sys/dev/block/" + number(m.dev))
				if err != nil {
					t.Fatal(err)
				}
				options, err := os.ReadFile(filepath.Join("/proc/fs/ext4", filepath.Base(loop), "options"))
				if err != nil || !strings.Contains(string(options), "errors=continue") {
					t.Fatalf("what to do with errors is left to the file system: %s, %v", options, err)
				}
			}
			if entries, err := fs.ReadDir(m.Root.FS(), "large"); err == nil {
				t.Errorf("read %d entries of a damaged folder", len(entries))
			}
			if data, err := m.Root.ReadFile("file"); string(data) != "hello\n" || err != nil {
				t.Errorf("%q, %v", data, err)
			}
			closeMount(t, m)
		})
	}
}

// damageNames changes every block of the folder large.
func damageNames(t *testing.T, file string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const block = 1024
	damaged := 0
	for at := 0; at < len(data); at += block {
		if strings.Contains(string(data[at:at+block]), "a-rather-long-name-") {
			if _, err := f.WriteAt([]byte(strings.Repeat("\xff", block)), int64(at)); err != nil {
				t.Fatal(err)
			}
			damaged++
		}
	}
	if damaged == 0 {
		t.Fatal("no block of the folder found")
	}
}

func TestNotMountable(t *testing.T) {
	need(t)
	blank := func(size int64) func(*testing.T) string {
		return func(t *testing.T) string {
			file := filepath.Join(t.TempDir(), "disk.img")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(file, size); err != nil {
				t.Fatal(err)
			}
			return file
		}
	}
	damage := func(fsType string, offset int64) func(*testing.T) string {
		return func(t *testing.T) string {
			file := image(t, fsType, clean)
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte("damaged!damaged!"), offset); err != nil {
				t.Fatal(err)
			}
			return file
		}
	}
	for name, tt := range map[string]struct {
		file   func(*testing.T) string
		fsType string
		err    error
	}{
		"unformatted":     {blank(4 << 20), "", ErrNoFileSystem},
		"tiny":            {blank(1 << 10), "", ErrNoFileSystem},
		"xfs superblock":  {damage("xfs", 16), "xfs", nil},
		"xfs magic":       {damage("xfs", 0), "", ErrNoFileSystem},
		"ext4 superblock": {damage("ext4", ext4Super+0x18), "ext4", nil},
		"ext4 magic":      {damage("ext4", ext4Super+0x38), "", ErrNoFileSystem},
	} {
		t.Run(name, func(t *testing.T) {
			file := tt.file(t)
			unchanged(t, file)
			dev := attachFile(t, file)
			leaks(t)
			o, _ := with(t, dev)
			o.Wait = time.Minute // which it must not take
			start := time.Now()
			_, err := Open(t.Context(), o)
			t.Log(err)
			var e *Error
			if !errors.As(err, &e) || e.Device != dev || e.FSType != tt.fsType || errors.Is(err, ErrNoDevice) {
				t.Errorf("error is %#v", err)
			}
			if errors.Is(err, ErrNoFileSystem) != (tt.err == ErrNoFileSystem) {
				t.Errorf("error is %v", err)
			}
			if d := time.Since(start); d > 20*time.Second {
				t.Errorf("took %v", d)
			}
			if err := exclusive(dev); err != nil {
				t.Errorf("device is still held: %v", err)
			}
		})
	}
}

func TestNotADevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dev := range []string{file, "/dev/null", t.TempDir()} {
		_, err := Open(t.Context(), Options{Device: dev, Wait: time.Minute})
		is(t, err, errNotBlock)
		machine := newMachine(t)
		machine.udev(t, dev, "data")
		o, _ := machine.options(t)
		_, err = Open(t.Context(), o)
		is(t, err, errNotBlock)
	}
}

func TestSeveral(t *testing.T) {
	clone := image(t, "xfs", clean)
	devs := []string{attachFile(t, clone), attachFile(t, image(t, "xfs", clean)), attachFile(t, image(t, "ext4", clean))}
	if a, b := digest(t, clone), digest(t, image(t, "xfs", clean)); a != b {
		t.Fatal("the two XFS are not the same")
	}
	slices.Sort(devs)
	blank := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(blank, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	bad := attachFile(t, blank)
	leaks(t)

	setup := func(t *testing.T, link string, sys ...string) (Options, *notes) {
		m := newMachine(t)
		if link != "" {
			m.udev(t, link, "data")
		}
		for _, dev := range sys {
			m.kernel(t, dev, "data")
		}
		return m.options(t)
	}
	// like accepts the nth that it is asked about, and checks that each is mounted.
	like := func(t *testing.T, n int) func(*os.Root) bool {
		asked := 0
		return func(root *os.Root) bool {
			if _, err := root.Stat("file"); err != nil {
				t.Error(err)
			}
			asked++
			return asked == n
		}
	}
	check := func(t *testing.T, o Options, want string) {
		t.Helper()
		m := open(t, o)
		if m.Device != want {
			t.Errorf("got %s, want %s of %s", m.Device, want, devs)
		}
		for _, dev := range append(devs, bad) {
			if err := exclusive(dev); (err == nil) != (dev != want) {
				t.Errorf("%s while %s is mounted: %v", dev, want, err)
			}
		}
		closeMount(t, m)
	}

	t.Run("named one first", func(t *testing.T) {
		o, notes := setup(t, devs[1], devs...)
		check(t, o, devs[1])
		notes.has(t, "several partitions have the label", "left["+devs[0]+" "+devs[2]+"]")
	})
	for n := range 3 {
		t.Run(fmt.Sprint("accepted ", n), func(t *testing.T) {
			o, notes := setup(t, devs[0], devs...)
			o.Accept = like(t, n+1)
			check(t, o, devs[n])
			notes.has(t, "one is used", "device"+devs[n])
		})
	}
	t.Run("none accepted", func(t *testing.T) {
		o, _ := setup(t, devs[2], devs...)
		o.Accept = like(t, 99)
		check(t, o, devs[2])
	})
	t.Run("damaged one first", func(t *testing.T) {
		o, notes := setup(t, bad, devs[0], bad, devs[1])
		o.Accept = like(t, 2)
		check(t, o, devs[1])
		notes.has(t, "cannot be mounted", bad)
	})
	t.Run("only one can be mounted and it is not accepted", func(t *testing.T) {
		o, notes := setup(t, bad, devs[0], bad)
		o.Accept = like(t, 99)
		check(t, o, devs[0])
		notes.has(t, "cannot be mounted", bad)
	})
	t.Run("a single one is not asked about", func(t *testing.T) {
		o, notes := setup(t, devs[0], devs[0])
		o.Accept = func(*os.Root) bool { t.Error("asked"); return false }
		check(t, o, devs[0])
		notes.has(t)
	})
	t.Run("part of another device", func(t *testing.T) {
		o, notes := setup(t, devs[0], devs...)
		for _, dev := range devs[1:] {
			if err := os.MkdirAll(filepath.Join(o.Sys, filepath.Base(dev), "holders", "dm-0"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		check(t, o, devs[0])
		notes.has(t)
	})
	t.Run("no udev", func(t *testing.T) {
		o, _ := setup(t, "", devs[1])
		check(t, o, devs[1])
	})
	t.Run("all damaged", func(t *testing.T) {
		o, _ := setup(t, bad, bad)
		o.Device = bad
		_, err := Open(t.Context(), o)
		is(t, err, ErrNoFileSystem)
	})
}

// TestShared opens a device that is mounted for writing. It does so in a mount namespace of its own: whoever makes a
// copy of this one meanwhile would keep the mount.
func TestShared(t *testing.T) {
	need(t)
	if os.Getenv(apartEnv) == "" {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("unshare", "--mount", "--propagation", "private", exe, "-test.run=^TestShared$", "-test.v")
		cmd.Env = append(os.Environ(), apartEnv+"=1")
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Error(err)
		}
		return
	}
	for _, fsType := range types {
		t.Run(fsType, func(t *testing.T) {
			dev := attachFile(t, image(t, fsType, clean))
			at := filepath.Join(t.TempDir(), "a folder")
			if err := os.Mkdir(at, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount(dev, at, fsType, 0, ""); err != nil {
				t.Fatal(err)
			}
			defer unix.Unmount(at, unix.MNT_DETACH)
			leaks(t)
			o, notes := with(t, dev)
			m := open(t, o)
			if m.Shared != at {
				t.Errorf("got %+v", m)
			}
			notes.has(t, "mounted elsewhere too")
			if m.Dirty {
				t.Error("dirty while it is used")
			}
			checkContents(t, m.Root)
			checkReadOnly(t, m.Root)
			if mounts, err := mountsOf("/proc/self/mountinfo", m.dev); len(mounts) != 1 || err != nil {
				t.Errorf("%v, %v", mounts, err)
			}
			if err := os.WriteFile(filepath.Join(at, "written"), nil, 0o600); err != nil {
				t.Errorf("the other mount: %v", err)
			}
			err := m.Close()
			is(t, err, unix.EBUSY)
			if err == nil || !strings.Contains(err.Error(), "mounted at "+at) {
				t.Errorf("error is %v", err)
			}
			if err := unix.Unmount(at, 0); err != nil {
				t.Errorf("unmount: %v", err)
			}
			if err := exclusive(dev); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestBusy(t *testing.T) {
	for _, fsType := range types {
		t.Run(fsType, func(t *testing.T) {
			dev := attachFile(t, image(t, fsType, clean))
			leaks(t)
			claim, err := os.OpenFile(dev, os.O_RDONLY|unix.O_EXCL, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer claim.Close()
			o, _ := with(t, dev)
			_, err = Open(t.Context(), o)
			is(t, err, unix.EBUSY)
			if err == nil || !strings.Contains(err.Error(), "this process has "+dev+" open") {
				t.Errorf("error is %v", err)
			}

			// It is waited for one that is just ending.
			time.AfterFunc(busyIn/5, func() { claim.Close() })
			closeMount(t, open(t, o))
		})
	}
}

// TestParallel has many mount at once, which compete for loop devices too.
func TestParallel(t *testing.T) {
	var devs []string
	for range 4 {
		devs = append(devs, attachFile(t, image(t, "ext4", clean)), attachFile(t, image(t, "xfs", clean)))
	}
	leaks(t)
	var wg sync.WaitGroup
	for _, dev := range devs {
		wg.Go(func() {
			for range 10 {
				m, err := Open(t.Context(), Options{Device: dev})
				if err != nil {
					t.Error(err)
					return
				}
				if data, err := m.Root.ReadFile("file"); string(data) != "hello\n" || err != nil {
					t.Errorf("%q, %v", data, err)
				}
				if err := m.Close(); err != nil {
					t.Error(err)
				}
				if err := exclusive(dev); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestCloseWithOpenFile(t *testing.T) {
	for _, fsType := range types {
		t.Run(fsType, func(t *testing.T) {
			dev := attachFile(t, image(t, fsType, clean))
			leaks(t)
			o, _ := with(t, dev)
			m := open(t, o)
			f, err := m.Root.Open("folder/numbers")
			if err != nil {
				t.Fatal(err)
			}
			err = m.Close()
			t.Log(err)
			is(t, err, unix.EBUSY)
			if err == nil || !strings.Contains(err.Error(), "numbers") {
				t.Errorf("error is %v", err)
			}
			f.Close()
			eventually(t, "device is free", func() bool { return exclusive(dev) == nil })

			m = open(t, o)
			f, err = m.Root.Open("folder/numbers")
			if err != nil {
				t.Fatal(err)
			}
			time.AfterFunc(releaseIn/10, func() { f.Close() })
			closeMount(t, m)
		})
	}
}

// hold is the helper process: it mounts and waits to be killed.
func hold(dev string) {
	m, err := Open(context.Background(), Options{Device: dev})
	fmt.Println(dev, err)
	time.Sleep(time.Hour)
	m.Close()
}

func startHelper(t *testing.T, dev string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helper+"="+dev)
	return cmd
}

func kill(t *testing.T, cmd *exec.Cmd, dev string) {
	t.Helper()
	cmd.Process.Kill()
	cmd.Wait()
	start := time.Now()
	for exclusive(dev) != nil {
		if time.Since(start) > time.Second {
			t.Fatalf("device is held a second after its user was killed: %s", users(dev, rdevOf(t, dev), rdevOf(t, dev)))
		}
		time.Sleep(time.Millisecond)
	}
	t.Logf("free after %v", time.Since(start))
	unseen(t, rdevOf(t, dev))
	if out := run(t, "losetup", "-a"); strings.Contains(out, "("+dev+")") {
		t.Errorf("loop device is left: %s", out)
	}
}

func TestKilled(t *testing.T) {
	for _, fsType := range types {
		t.Run(fsType, func(t *testing.T) {
			file := image(t, fsType, dirty)
			unchanged(t, file)
			dev := attachFile(t, file)
			cmd := startHelper(t, dev)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			line := make([]byte, 200)
			n, _ := out.Read(line)
			if got := string(line[:n]); got != dev+" <nil>\n" {
				t.Errorf("helper says %q", got)
			}
			is(t, exclusive(dev), unix.EBUSY)
			unseen(t, rdevOf(t, dev))
			kill(t, cmd, dev)

			// And at any instant of Open.
			for range 20 {
				cmd := startHelper(t, dev)
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(rand.N(60 * time.Millisecond))
				kill(t, cmd, dev)
			}
		})
	}
}

func TestXFSLog(t *testing.T) {
	for _, tt := range []struct {
		name, end string
		options   []string
		dirty     bool
		rounds    uint32 // how often the log was begun, at least
	}{
		{"written round", busy + clean, []string{"-l", "size=8m"}, false, 2},
		{"written round, dirty", busy + dirty, []string{"-l", "size=8m"}, true, 2},
		{"striped", clean, []string{"-d", "su=64k,sw=2", "-l", "su=64k"}, false, 1},
		{"striped, dirty", dirty, []string{"-d", "su=64k,sw=2", "-l", "su=64k"}, true, 1},
		{"striped, written round", busy + clean, []string{"-l", "su=64k,size=12m"}, false, 2},
		{"sectors of 4096 bytes", clean, []string{"-s", "size=4096"}, false, 1},
		{"blocks of 1024 bytes", clean, []string{"-b", "size=1024"}, false, 1},
		{"blocks of 1024 bytes, dirty", dirty, []string{"-b", "size=1024"}, true, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := image(t, "xfs", tt.end, tt.options...)
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			offset, n := xfsLog(data)
			round := binary.BigEndian.Uint32(data[offset:])
			if round == xlogMagic {
				round = binary.BigEndian.Uint32(data[offset+4:])
			}
			if n == 0 || round < tt.rounds {
				t.Errorf("log of %d blocks is in round %d", n, round)
			}
			if dirty := xfsDirty(bytes.NewReader(data), data[:2*ext4Super]); dirty != tt.dirty {
				t.Errorf("dirty: %v", dirty)
			}
		})
	}
}

// FuzzXFSDirty: whatever a superblock and a log say, looking at them ends, and reads nothing before the device's start.
func FuzzXFSDirty(f *testing.F) {
	f.Add(make([]byte, 2*ext4Super), []byte{})
	super := make([]byte, 2*ext4Super)
	copy(super, xfsMagic)
	super[6], super[55], super[86], super[98], super[124] = 0x10, 1, 0x10, 0x10, 16
	f.Add(super, []byte("\xfe\xed\xba\xbe\x00\x00\x00\x01"))
	f.Fuzz(func(t *testing.T, super, log []byte) {
		if len(super) == 2*ext4Super {
			xfsDirty(&repeated{t, log}, super)
		}
	})
}

// repeated is an endless device.
type repeated struct {
	t    *testing.T
	data []byte
}

func (r *repeated) ReadAt(p []byte, offset int64) (int, error) {
	if offset < 0 {
		r.t.Errorf("read at %d", offset)
	}
	for i := range p {
		p[i] = 0
		if len(r.data) > 0 {
			p[i] = r.data[(int(offset)&0xffff+i)%len(r.data)]
		}
	}
	return len(p), nil
}
