package integration

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

// mixed is a partition of which one image is loaded, one is there, and two fail, one of them after retries.
func mixed(t *testing.T) (s *storetest.Store, dir, loaded string) {
	t.Helper()
	storetest.Need(t, "podman")
	s = storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
	b := &badBuilder{t: t, name: "mixed"}
	present := fixture.Item{Ref: "registry.example.com/mixed/present", Image: b.image()}
	first, _ := partition(t, present)
	mustLoad(t, s, first)
	missing, passing := b.image(), b.image()
	dir, staged := partition(t, present,
		fixture.Item{Ref: "registry.example.com/mixed/loaded", Image: b.image()},
		fixture.Item{Ref: "registry.example.com/mixed/missing", Image: missing, Missing: true},
		fixture.Item{Ref: "registry.example.com/mixed/passing", Image: passing, Stage: &fixture.Stage{Folder: true}},
	)
	// A file that cannot be read, as on a failing disk: a directory that is a symbolic link to itself.
	check(t, os.RemoveAll(staged[3].Path))
	check(t, os.Symlink(filepath.Base(staged[3].Path), staged[3].Path))
	return s, dir, staged[1].Ref
}

// The keys of --progress json, as the documentation has them, are there in every object, and no others.
func TestProgressJSON(t *testing.T) {
	s, dir, _ := mixed(t)
	o := load(t, s, dir, "--attempts", "2")
	if o.code != exitIncomplete {
		t.Errorf("load ends with %d, want 3", o.code)
	}
	image := []string{"bytes", "event", "ref", "seconds"}
	failure := []string{"bytes", "error", "event", "reason", "ref", "seconds"}
	summary := []string{"bytes_read", "bytes_written", "event", "failed", "images", "layers_shared", "layers_written", "loaded", "present", "seconds"}
	keys := map[string][]string{"started": image, "loaded": image, "present": image, "retrying": failure, "failed": failure, "summary": summary}
	count := map[string]int{}
	lines := slices.Collect(strings.Lines(o.out))
	for n, line := range lines {
		var object map[string]any
		if err := json.Unmarshal([]byte(line), &object); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		kind, _ := object["event"].(string)
		if got, want := slices.Sorted(maps.Keys(object)), keys[kind]; !slices.Equal(got, want) {
			t.Errorf("event %q has keys %q, want %q", kind, got, want)
		}
		if count[kind]++; (kind == "summary") != (n == len(lines)-1) {
			t.Errorf("the event on line %d of %d is %q; the summary stands last, and only there", n+1, len(lines), kind)
		}
	}
	if want := map[string]int{"started": 3, "loaded": 1, "present": 1, "retrying": 1, "failed": 2, "summary": 1}; !maps.Equal(count, want) {
		t.Errorf("events are %v, want %v\n%s", count, want, o.out)
	}
	sum := o.sum
	if sum.Images != 4 || sum.Loaded != 1 || sum.Present != 1 || sum.Failed != 2 || sum.LayersWritten != 2 || sum.LayersShared != 0 {
		t.Errorf("summary is %+v", sum)
	}
	if sum.BytesRead <= 0 || sum.BytesWritten <= 80_000 || sum.Seconds <= 0 || sum.Seconds > o.took.Seconds() {
		t.Errorf("summary is %+v, the load took %v", sum, o.took)
	}
	began := map[string]bool{}
	for _, e := range o.events {
		switch e.Event {
		case "started":
			began[e.Ref] = true
		case "loaded", "retrying", "failed":
			if !began[e.Ref] {
				t.Errorf("%s is %s before it is started", e.Ref, e.Event)
			}
		}
	}
}

// The other ways to look at a load.
func TestProgress(t *testing.T) {
	s, dir, loaded := mixed(t)
	args := append([]string{"load", "--from", dir, "--attempts", "1"}, s.Flags()...)
	words := []string{"loaded ", "present ", "failed ", "missing-archive", "4 images: 1 loaded, 1 present, 2 failed; layers: 2 written, 0 shared;", "stage the image again"}
	has := func(t *testing.T, out string, words ...string) {
		t.Helper()
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("it does not say %q:\n%s", w, tail(out))
			}
		}
	}
	remove := func() { s.Podman(t, "rmi", loaded) }
	for _, kind := range []string{"plain", "auto"} {
		t.Run(kind, func(t *testing.T) {
			o := agent(t, append(args, "--progress", kind)...)
			has(t, o.out, words...)
			if strings.ContainsAny(o.out, "\r\x1b") {
				t.Errorf("it moves the cursor, but is on no terminal: %q", o.out)
			}
			remove()
		})
	}
	t.Run("none", func(t *testing.T) {
		if o := agent(t, append(args, "--progress", "none")...); o.out != "" || o.code != exitIncomplete {
			t.Errorf("it ends with %d and says %q, want 3 and nothing", o.code, o.out)
		}
		remove()
	})
	for _, kind := range []string{"bar", "auto"} {
		t.Run(kind+" on a terminal", func(t *testing.T) {
			storetest.Need(t, "script", "stty")
			quoted := "stty cols 200 rows 50; exec " + binary
			for _, a := range append(args, "--progress", kind) {
				quoted += " '" + a + "'"
			}
			cmd := exec.Command("script", "--quiet", "--return", "--command", quoted, "/dev/null")
			cmd.Env = append(os.Environ(), "TERM=xterm", "COLUMNS=200")
			out, err := cmd.CombinedOutput()
			if cmd.ProcessState.ExitCode() != exitIncomplete {
				t.Errorf("it ends with %v, want 3", err)
			}
			has(t, string(out), "4/4 images", "failed ", "missing-archive", "1 loaded, 1 present, 2 failed", "/s", "\x1b")
			remove()
		})
	}
	t.Run("a reader that goes away", func(t *testing.T) {
		r, w, err := os.Pipe()
		check(t, err)
		check(t, r.Close())
		cmd := exec.Command(binary, append(args, "--progress", "json")...)
		cmd.Stdout = w
		err = cmd.Run()
		w.Close()
		if cmd.ProcessState.ExitCode() != exitIncomplete {
			t.Errorf("it ends with %v, want exit status 3: the images are loaded all the same", err)
		}
		if n := len(s.Images(t)); n != 2 {
			t.Errorf("%d images are in the store, want 2", n)
		}
	})
	storetest.Check(t, s)
}
