package integration

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

// Others may load the same images at the same time. All come through, and the store is whole.
func TestSkopeoBeside(t *testing.T) {
	storetest.Need(t, "podman", "skopeo")
	dir, staged := partition(t, slow()...)
	dirs := unpack(t, staged)
	in := storetest.Mount(t, storetest.Tmpfs)
	for round := range 3 {
		s := storetest.New(t, in, fmt.Sprint("round", round), "overlay")
		done := make(chan struct{})
		go func() {
			defer close(done)
			for n := range staged {
				at := (n + 3*round) % len(staged) // not always in the agent's order
				if _, err := s.TrySkopeo(t, "copy", "--quiet", "dir:"+dirs[at], "containers-storage:"+staged[at].Ref); err != nil {
					t.Errorf("skopeo beside the load: %v", err)
				}
			}
		}()
		o := load(t, s, dir)
		<-done
		if o.code != exitOK {
			t.Errorf("load ends with %d:\n%s%s", o.code, tail(o.out), tail(o.err))
		}
		storetest.Check(t, s)
		if names := s.Names(t); len(names) != len(staged) {
			t.Errorf("%d names in the store, want %d", len(names), len(staged))
		}
	}
}

// unpack unpacks the archives, and returns where the images are.
func unpack(t testing.TB, staged []fixture.Staged) (dirs []string) {
	t.Helper()
	for _, st := range staged {
		dirs = append(dirs, untar(t, st.Path))
	}
	return dirs
}

// Others may remove images whose layers the load counts on. It looks again, and reads again what is gone.
func TestRemovalBeside(t *testing.T) {
	storetest.Need(t, "podman", "skopeo")
	items := slow()
	dir, staged := partition(t, items[:4]...)
	_, theirs := partition(t, items[4], items[5]) // of the same base layers
	dirs := unpack(t, theirs)
	in := storetest.Mount(t, storetest.Tmpfs)
	for round := range 3 {
		s := storetest.New(t, in, fmt.Sprint("round", round), "overlay")
		quit, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for n := 0; ; n++ {
				select {
				case <-quit:
					return
				default:
				}
				// Whether these come through does not matter: they may meet half of each other's work.
				s.TrySkopeo(t, "copy", "--quiet", "dir:"+dirs[n%2], "containers-storage:"+theirs[n%2].Ref)
				exec.Command("podman", append(s.Flags(), "rmi", "--force", theirs[n%2].Ref)...).Run()
			}
		}()
		o := load(t, s, dir)
		close(quit)
		<-done
		if o.code != exitOK {
			t.Errorf("load ends with %d:\n%s%s", o.code, tail(o.out), tail(o.err))
		}
		storetest.Check(t, s)
		names := s.Names(t)
		for _, st := range staged {
			if names[st.Ref] == "" {
				t.Errorf("%s is not in the store", st.Ref)
			}
		}
	}
}

// Without flags, storage.conf says which store it is.
func TestStorageConf(t *testing.T) {
	storetest.Need(t, "podman")
	s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
	dir, _ := partition(t, shapes(t)[0])
	p := command("load", "--from", dir)
	p.cmd.Env = append(os.Environ(), "CONTAINERS_STORAGE_CONF="+s.Conf)
	if o := p.start(t).wait(t, time30); o.code != exitOK {
		t.Errorf("load ends with %d:\n%s", o.code, tail(o.err))
	}
	if n := len(s.Images(t)); n != 1 {
		t.Errorf("%d images are in the store of storage.conf, want 1", n)
	}
	storetest.Check(t, s)
}
