package storetest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// A Store is a store of a test, not necessarily filled yet.
type Store struct {
	Root    string // podman's --root
	RunRoot string // podman's --runroot
	Driver  string // podman's --storage-driver: overlay or vfs
	Dir     string // that all of it is in, and the test's other files may be
	Conf    string // a storage.conf that says the same
}

// New makes a store of its own in a folder of [Mount]. Its name says in messages which one is meant.
func New(t testing.TB, in, name, driver string) *Store {
	t.Helper()
	dir := filepath.Join(in, name)
	s := &Store{
		Root: filepath.Join(dir, "root"), RunRoot: filepath.Join(dir, "run"), Driver: driver,
		Dir: dir, Conf: filepath.Join(dir, "storage.conf"),
	}
	if len(s.RunRoot) > 50 {
		t.Fatalf("podman refuses the run root %s: it has more than 50 characters", s.RunRoot)
	}
	for _, d := range []string{s.Root, s.RunRoot, filepath.Join(dir, "lib")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	conf := fmt.Sprintf("[storage]\ndriver = %q\ngraphroot = %q\nrunroot = %q\n", driver, s.Root, s.RunRoot)
	if err := os.WriteFile(s.Conf, []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	return s
}

// Flags are podman's global flags, and the agent's, that name the store.
func (s *Store) Flags() []string {
	return []string{"--root", s.Root, "--runroot", s.RunRoot, "--storage-driver", s.Driver}
}

func (s *Store) podman(args ...string) *exec.Cmd {
	return exec.Command("podman", append(s.Flags(), args...)...)
}

// Podman runs podman on the store and returns its standard output.
func (s *Store) Podman(t testing.TB, args ...string) string {
	t.Helper()
	Need(t, "podman")
	return run(t, s.podman(args...))
}

// skopeo runs in a mount namespace of its own, in which /var/lib/containers is the store's: there skopeo
// keeps, across stores, what it knows of blobs.
func (s *Store) skopeo(args ...string) *exec.Cmd {
	const script = `mkdir -p /var/lib/containers && mount --bind "$0" /var/lib/containers && exec skopeo "$@"`
	cmd := exec.Command("unshare", append([]string{"--mount", "sh", "-c", script, filepath.Join(s.Dir, "lib")}, args...)...)
	cmd.Env = append(os.Environ(), "CONTAINERS_STORAGE_CONF="+s.Conf)
	return cmd
}

// Skopeo runs skopeo, for which containers-storage is the store, and returns its standard output.
func (s *Store) Skopeo(t testing.TB, args ...string) string {
	t.Helper()
	Need(t, "skopeo", "unshare")
	return run(t, s.skopeo(args...))
}

// TrySkopeo is Skopeo where its failure is no surprise.
func (s *Store) TrySkopeo(t testing.TB, args ...string) (string, error) {
	t.Helper()
	Need(t, "skopeo", "unshare")
	return output(s.skopeo(args...))
}

// Beside runs `podman images` on the store, over and over, until the test ends or stop is called. Older
// versions of the library clean up in the store at the end of every command, whatever others do there.
func Beside(t testing.TB, s *Store) (stop func()) {
	t.Helper()
	Need(t, "podman")
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			select {
			case <-quit:
				return
			case <-time.After(5 * time.Millisecond):
			}
			if _, err := output(s.podman("images", "--no-trunc")); err != nil {
				t.Errorf("podman beside the load, run %d: %v", n+1, err)
				return
			}
		}
	}()
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			close(quit)
			<-done
		}
	}
	t.Cleanup(stop)
	return stop
}
