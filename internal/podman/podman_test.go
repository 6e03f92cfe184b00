package podman

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestNoSocket(t *testing.T) {
	_, err := Unseen(t.Context(), filepath.Join(t.TempDir(), "podman.sock"), []string{"x"})
	if !errors.Is(err, ErrNoSocket) {
		t.Errorf("got %v, want %v", err, ErrNoSocket)
	}
}

// TestUnseen asks a real podman about an empty store of its own.
func TestUnseen(t *testing.T) {
	skip := func(why string) {
		if os.Getenv("CI") == "true" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	if os.Geteuid() != 0 {
		skip("needs root")
	}
	if _, err := exec.LookPath("podman"); err != nil {
		skip("needs podman")
	}
	dir := t.TempDir()
	socket := filepath.Join(dir, "podman.sock")
	ctx, cancel := context.WithCancel(t.Context())
	service := exec.CommandContext(ctx, "podman", "--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"),
		"--storage-driver", "vfs", "system", "service", "--time", "0", "unix://"+socket)
	if err := service.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); service.Wait() })
	for range 100 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	names := []string{"registry.example.com/a/b@sha256:6ac2b96bf4899c01a87366fd0feae9f57b1b61878e3b5823da0c3f34f707fbf5", "registry.example.com/c:1"}
	unseen, err := Unseen(ctx, socket, names)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(unseen, names) {
		t.Errorf("got %v, want %v", unseen, names)
	}
}
