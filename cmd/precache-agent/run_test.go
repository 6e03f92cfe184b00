package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/manifest"
)

func write(t *testing.T, root, path, text string) {
	t.Helper()
	path = filepath.Join(root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestStageOf(t *testing.T) {
	for _, tt := range []struct{ file, text, want string }{
		{"proc/cmdline", "BOOT_IMAGE=x coreos.liveiso=rhcos-413 ignition.platform.id=metal", discovery},
		{"proc/cmdline", "coreos.live.rootfs_url=https://example.com/rootfs.img", discovery},
		{"proc/cmdline", "root=UUID=x rw", install},
		{"run/ostree-live", "", discovery},
		{"etc/hostname", "no cmdline", install},
	} {
		root := t.TempDir()
		write(t, root, tt.file, tt.text)
		if got := stageOf(root); got != tt.want {
			t.Errorf("%s %q: got %s, want %s", tt.file, tt.text, got, tt.want)
		}
	}
}

// The agent retires when the operating system image that the cluster wants is not in the set, and only then.
func TestRetiresWithTheRelease(t *testing.T) {
	in, out := digest.FromString("in"), digest.FromString("out")
	set := &manifest.Set{Images: []manifest.Image{{Digest: in}}}
	for _, tt := range []struct {
		what, config string
		retires      bool
	}{
		{"it says nothing", "", false},
		{"it cannot be read", "{", false},
		{"of the set", `{"spec":{"osImageURL":"quay.io/a/b@` + string(in) + `"}}`, false},
		{"of another release", `{"spec":{"osImageURL":"quay.io/a/b@` + string(out) + `"}}`, true},
		{"by a tag", `{"spec":{"osImageURL":"quay.io/a/b:4.13"}}`, false},
	} {
		root := t.TempDir()
		if tt.config != "" {
			write(t, root, "etc/machine-config-daemon/currentconfig", tt.config)
		}
		release := clusterRelease(root)
		if got := release != "" && !inSet(set, release); got != tt.retires {
			t.Errorf("%s: got %v, want %v", tt.what, got, tt.retires)
		}
	}
}
