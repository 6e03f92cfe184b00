package archive

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/precache/precache-agent/internal/manifest"
)

func TestFind(t *testing.T) {
	pin := "@sha256:" + strings.Repeat("a", 64)
	hex := strings.Repeat("a", 64)
	for _, tt := range []struct {
		name   string
		ref    string
		files  []string // a trailing slash makes a folder
		want   string   // "" is missing
		reason Reason
	}{
		{name: "nothing", ref: repo + ":v1"},
		{name: "tgz first", ref: repo + ":v1", files: []string{"image_v1.tgz", "image_v1.tar", "image_v1.tar.gz", "image_v1.tar.zst", "image_v1.tar.xz", "image_v1/"}, want: "image_v1.tgz"},
		{name: "then tar", ref: repo + ":v1", files: []string{"image_v1.tar", "image_v1.tar.gz", "image_v1.tar.zst", "image_v1.tar.xz", "image_v1/"}, want: "image_v1.tar"},
		{name: "then tar.gz", ref: repo + ":v1", files: []string{"image_v1.tar.gz", "image_v1.tar.zst", "image_v1.tar.xz", "image_v1/"}, want: "image_v1.tar.gz"},
		{name: "then tar.zst", ref: repo + ":v1", files: []string{"image_v1.tar.zst", "image_v1.tar.xz", "image_v1/"}, want: "image_v1.tar.zst"},
		{name: "then tar.xz", ref: repo + ":v1", files: []string{"image_v1.tar.xz", "image_v1/"}, want: "image_v1.tar.xz"},
		{name: "then the folder", ref: repo + ":v1", files: []string{"image_v1/"}, want: "image_v1"},
		{name: "a folder with a suffix is none", ref: repo + ":v1", files: []string{"image_v1.tgz/", "image_v1.tar"}, want: "image_v1.tar"},
		{name: "a file without suffix is none", ref: repo + ":v1", files: []string{"image_v1"}},
		{name: "other suffixes are none", ref: repo + ":v1", files: []string{"image_v1.tar.bz2", "image_v1.TGZ", "image_v1.tgz.part", "image:v1.tgz"}},
		{name: "another tag", ref: repo + ":v1", files: []string{"image_v10.tgz"}},
		{name: "no tag written", ref: repo, files: []string{"image.tgz"}, want: "image.tgz"},
		{name: "pinned", ref: repo + pin, files: []string{"image@sha256_" + hex + ".tgz"}, want: "image@sha256_" + hex + ".tgz"},
		{name: "first colon replaced", ref: repo + ":v1" + pin, files: []string{"image_v1@sha256:" + hex + ".tgz"}, want: "image_v1@sha256:" + hex + ".tgz"},
		{name: "every colon replaced", ref: repo + ":v1" + pin, files: []string{"image_v1@sha256_" + hex + ".tgz"}, want: "image_v1@sha256_" + hex + ".tgz"},
		{name: "likeliest spelling first", ref: repo + ":v1" + pin, files: []string{"image_v1@sha256:" + hex + ".tar", "image_v1@sha256_" + hex + ".tgz"}, want: "image_v1@sha256:" + hex + ".tar"},
		{name: "a name that no file can have", ref: "registry.example.com/" + strings.Repeat("p", 200) + ":" + strings.Repeat("t", 120)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, f := range tt.files {
				if name, ok := strings.CutSuffix(f, "/"); ok {
					must(t, os.Mkdir(filepath.Join(dir, name), 0o755))
					must(t, os.WriteFile(filepath.Join(dir, name, "x"), make([]byte, 77), 0o644))
				} else {
					must(t, os.WriteFile(filepath.Join(dir, f), make([]byte, 77), 0o644))
				}
			}
			a, err := partition(t, dir).Find(set(t, tt.ref))
			if tt.want == "" {
				wantReason(t, err, MissingArchive)
				return
			}
			must(t, err)
			base := tt.want
			for _, s := range manifest.Suffixes {
				if s != "" && strings.HasSuffix(base, s) && !strings.HasSuffix(strings.TrimSuffix(base, s), ".tar") {
					base = strings.TrimSuffix(base, s)
					break
				}
			}
			if a.Name != tt.want || a.Base != base || a.Path() != filepath.Join(dir, base) || a.Size != 77 || a.BytesRead() != 0 {
				t.Errorf("got %q, base %q, path %q, %d bytes, want %q, base %q", a.Name, a.Base, a.Path(), a.Size, tt.want, base)
			}
		})
	}
}

// What stands under an archive's name and is none.
func TestFindHostile(t *testing.T) {
	for _, tt := range []struct {
		name string
		make func(dir string) error
		want Reason
	}{
		{"link out of the partition", func(dir string) error { return os.Symlink("/etc/hostname", filepath.Join(dir, "image_v1.tgz")) }, ""},
		{"link to nothing", func(dir string) error { return os.Symlink("nothing", filepath.Join(dir, "image_v1.tgz")) }, MissingArchive},
		{"link to itself", func(dir string) error { return os.Symlink("image_v1.tgz", filepath.Join(dir, "image_v1.tgz")) }, ""},
		{"fifo", func(dir string) error { return mkfifo(filepath.Join(dir, "image_v1.tgz")) }, Unsupported},
		{"too many files", func(dir string) error {
			err := os.Mkdir(filepath.Join(dir, "image_v1"), 0o755)
			for i := 0; i <= maxMembers && err == nil; i++ {
				err = os.WriteFile(filepath.Join(dir, "image_v1", fmt.Sprint(i)), nil, 0o644)
			}
			return err
		}, Unsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			must(t, tt.make(dir))
			of := set(t, repo+":v1")
			a, err := partition(t, dir).Find(of)
			if err == nil {
				t.Fatalf("found %s", a.Name)
			}
			if got := ReasonOf(err); got == "" || tt.want != "" && got != tt.want {
				t.Errorf("got %v (%q), want %q", err, got, tt.want)
			}
		})
	}
}
