package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

// The exit code says what became of the run, and standard error why.
func TestExitCodes(t *testing.T) {
	storetest.Need(t, "podman")
	s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
	whole, _ := partition(t, shapes(t)[:2]...)
	with := func(files map[string]string) string {
		dir := t.TempDir()
		for name, text := range files {
			check(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
		}
		return dir
	}
	badLine := with(map[string]string{"ocp-images.txt": "registry.example.com/a:1\n# comment\nNot A Reference\n", "ai-images.txt": "quay.io/b@sha256:1\n"})
	file := filepath.Join(with(map[string]string{"file": ""}), "file")
	load := func(from string, more ...string) []string {
		return append(append([]string{"load", "--from", from}, s.Flags()...), more...)
	}
	for _, tt := range []struct {
		name string
		args []string
		want int
		says string // on standard error
	}{
		{"no command", nil, exitOK, ""},
		{"help", []string{"help"}, exitOK, ""},
		{"version", []string{"version"}, exitOK, ""},
		{"completion", []string{"completion", "bash"}, exitOK, ""},
		{"verify", []string{"verify", "--from", whole}, exitOK, ""},
		{"load", load(whole), exitOK, ""},
		{"load what is there", load(whole), exitOK, ""},

		{"an unknown command", []string{"fly"}, exitUsage, "fly"},
		{"an unknown flag", load(whole, "--fly"), exitUsage, "--fly"},
		{"an argument", load(whole, "more"), exitUsage, "more"},
		{"load without --from", append([]string{"load"}, s.Flags()...), exitUsage, "from"},
		{"verify without --from", []string{"verify"}, exitUsage, "from"},
		{"negative --jobs", load(whole, "--jobs", "-1"), exitUsage, "--jobs"},
		{"--attempts 0", load(whole, "--attempts", "0"), exitUsage, "--attempts"},
		{"unknown --progress", load(whole, "--progress", "loud"), exitUsage, "--progress"},

		{"archives are missing", load(with(map[string]string{"ocp-images.txt": "registry.example.com/a:1\n"})), exitIncomplete, ""},
		{"archives are missing, verify", []string{"verify", "--from", with(map[string]string{"ocp-images.txt": "registry.example.com/a:1\n"})}, exitIncomplete, "again"},

		{"no such folder", load("/no/such/folder"), exitNoPartition, "/no/such/folder"},
		{"no such folder, verify", []string{"verify", "--from", "/no/such/folder"}, exitNoPartition, "/no/such/folder"},
		{"a file for a folder", load(file), exitNoPartition, "file"},

		{"no list", load(with(nil)), exitBadList, "-images.txt"},
		{"no list, verify", []string{"verify", "--from", with(nil)}, exitBadList, "-images.txt"},
		{"only ignored-images.txt", load(with(map[string]string{"ignored-images.txt": "registry.example.com/a:1\n"})), exitBadList, "-images.txt"},
		{"no such group", load(whole, "--group", "dev"), exitBadList, "dev-images.txt"},
		{"a group that leaves the folder", load(whole, "--group", "../ocp"), exitUsage, "../ocp"},
		{"an empty list", load(with(map[string]string{"ocp-images.txt": "\r\n# nothing\r\n"})), exitBadList, "ocp-images.txt"},
		{"a list that is no text", load(with(map[string]string{"ocp-images.txt": "a\x00b\n"})), exitBadList, "ocp-images.txt"},
		{"lines that are no reference", load(badLine), exitBadList, "ocp-images.txt:3"},
		{"lines of all lists that are no reference", load(badLine), exitBadList, "ai-images.txt:1"},

		{"a store that cannot be opened", append([]string{"load", "--from", whole}, "--root", file+"/root", "--runroot", s.RunRoot), exitUnexpected, file},
		{"an unknown driver", load(whole, "--storage-driver", "floppy"), exitUnexpected, "floppy"},
		{"no such policy", load(whole, "--policy", "/no/such/policy.json"), exitUnexpected, "/no/such/policy.json"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := agent(t, tt.args...)
			if o.code != tt.want || !strings.Contains(o.err, tt.says) || (tt.says == "") != (o.err == "") {
				t.Errorf("%q ends with %d and says %q, want %d and %q", tt.args, o.code, tail(o.err), tt.want, tt.says)
			}
		})
	}
	storetest.Check(t, s)
}

// A full file system fails what does not fit, with a reason that says so, and leaves the rest.
func TestNoSpace(t *testing.T) {
	storetest.Need(t, "podman")
	in := storetest.Mount(t, storetest.Tmpfs)
	big := layer(t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "big", Data: strings.Repeat("0123456789abcdef", 1<<20)}}})
	small := makeLayers(t)
	dir, staged := partition(t,
		fixture.Item{Ref: "registry.example.com/space/small", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{small.base}})},
		fixture.Item{Ref: "registry.example.com/space/big", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{small.base, big}})},
		fixture.Item{Ref: "registry.example.com/space/other", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{small.other, small.app}})},
	)
	check(t, unix.Mount("", in, "", unix.MS_REMOUNT, "size=8m"))
	s := storetest.New(t, in, "agent", "overlay")
	o := load(t, s, dir)
	if o.code != exitIncomplete || o.sum.Loaded != 2 || o.sum.Failed != 1 {
		t.Errorf("load ends with %d, %d images are loaded and %d failed, want 3, 2 and 1", o.code, o.sum.Loaded, o.sum.Failed)
	}
	if e := o.ends()[staged[1].Ref]; e.Event != "failed" || e.Reason != "no-space" {
		t.Errorf("the image that does not fit is %s for %q (%s), want failed for no-space", e.Event, e.Reason, e.Error)
	}
	storetest.Check(t, s)
	check(t, unix.Mount("", in, "", unix.MS_REMOUNT, "size=64m"))
	if o := mustLoad(t, s, dir); o.sum.Loaded != 1 || o.sum.Present != 2 {
		t.Errorf("with room, %d images are loaded and %d present, want 1 and 2", o.sum.Loaded, o.sum.Present)
	}
	storetest.Check(t, s)
}

// An ordinary user is told what to do, and nothing is made.
func TestOrdinaryUser(t *testing.T) {
	storetest.Need(t, "podman")
	dir, _ := partition(t, shapes(t)[0])
	readable(t, dir)
	s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
	p := command(loadArgs(s, dir)...)
	p.cmd.SysProcAttr = nobody()
	o := p.start(t).wait(t, time30)
	if o.code != exitUnexpected || !strings.Contains(o.err, "podman unshare") || o.out != "" {
		t.Errorf("load as an ordinary user ends with %d and says %q, want 1 and podman unshare", o.code, o.err)
	}
	if entries, err := os.ReadDir(s.Root); err != nil || len(entries) > 0 {
		t.Errorf("the store has %v (%v), want nothing", entries, err)
	}
}

func nobody() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
}

// readable lets everybody read what is in a folder of t.TempDir.
func readable(t testing.TB, dir string) {
	t.Helper()
	check(t, os.Chmod(filepath.Dir(dir), 0o755))
	check(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Type()&os.ModeSymlink != 0 {
			return err
		}
		mode := os.FileMode(0o644)
		if d.IsDir() {
			mode = 0o755
		}
		return os.Chmod(path, mode)
	}))
}
