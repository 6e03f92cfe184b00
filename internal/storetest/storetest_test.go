package storetest

import (
	"archive/tar"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/precache/precache-agent/internal/fixture"
)

// filled makes a store, by skopeo, with an image of two layers, and returns the layers' IDs.
func filled(t *testing.T) (s *Store, image, base, top string) {
	t.Helper()
	Need(t, "skopeo", "podman", "cp")
	lower, err := fixture.NewLayer(fixture.LayerSpec{Entries: []fixture.Entry{
		{Name: "dir/"}, {Name: "dir/file", Data: "content", Xattrs: map[string]string{"user.x": "1"}}, {Name: "link", Link: "dir"},
		{Name: "hard", Type: tar.TypeLink, Link: "dir/file"}, {Name: "null", Type: tar.TypeChar, Major: 1, Minor: 3}, {Name: "implied/file", Data: "x"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	upper, err := fixture.NewLayer(fixture.LayerSpec{Entries: []fixture.Entry{{Name: "dir/.wh.file"}, {Name: "new", Data: "new"}}})
	if err != nil {
		t.Fatal(err)
	}
	img, err := fixture.NewImage(fixture.ImageSpec{Layers: []*fixture.Layer{lower, upper}})
	if err != nil {
		t.Fatal(err)
	}
	ref := img.Ref("registry.example.com/store/test")
	dir, err := fixture.Stage{Folder: true}.Write(t.TempDir(), ref, img)
	if err != nil {
		t.Fatal(err)
	}
	s = New(t, Mount(t, Tmpfs), "first", "overlay")
	s.Skopeo(t, "copy", "--quiet", "dir:"+dir, "containers-storage:"+ref)
	image = img.ConfigDigest.Encoded()
	return s, image, lower.DiffID.Encoded(), s.Images(t)[image].TopLayer
}

// A comparison or a check that finds nothing is worth as much as what it would have found.
func TestFinds(t *testing.T) {
	s, image, base, top := filled(t)
	if faults := Faults(t, s); faults != nil {
		t.Fatalf("faults in a whole store: %q", faults)
	}
	if lines := compare(t, s, s).lines; lines != nil {
		t.Fatalf("differences between a store and itself: %q", lines)
	}
	old := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	edit := func(path, from, to string) error {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(path, []byte(strings.Replace(string(b), from, to, 1)), 0o600)
	}
	for _, tt := range []struct {
		name    string
		damage  func(root, diff string) error
		differs string // part of what Compare says; "": nothing
		fault   string // and of what Check says
	}{
		{"another mode", func(_, diff string) error { return unix.Chmod(diff+"/dir/file", 0o4644) }, "mode", ""},
		{"another owner", func(_, diff string) error { return os.Lchown(diff+"/link", 1, 2) }, "uid is 1, want 0; gid is 2", ""},
		{"another content", func(_, diff string) error { return os.WriteFile(diff+"/dir/file", []byte("CONTENT"), 0o644) }, "content", "rebuild its tar"},
		{"another size", func(_, diff string) error { return os.Truncate(diff+"/dir/file", 0) }, "size is 0", "rebuild its tar"},
		{"another target", func(_, diff string) error { os.Remove(diff + "/link"); return os.Symlink("x", diff+"/link") }, "target is x", ""},
		{"a hard link that is none", func(_, diff string) error {
			os.Remove(diff + "/hard")
			return os.WriteFile(diff+"/hard", []byte("content"), 0o644)
		}, "same file as", ""},
		{"another device", func(_, diff string) error {
			os.Remove(diff + "/null")
			return unix.Mknod(diff+"/null", unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5)))
		}, "device is 0x105", ""},
		{"an attribute less", func(_, diff string) error { return unix.Removexattr(diff+"/dir/file", "user.x") }, "xattrs", ""},
		{"overlay's own attribute", func(_, diff string) error {
			return unix.Setxattr(diff+"/dir", "trusted.overlay.opaque", []byte("y"), 0)
		}, "trusted.overlay.opaque", ""},
		{"another time", func(_, diff string) error { return os.Chtimes(diff+"/dir/file", old, old) }, "mtime", ""},
		{"another time of a folder", func(_, diff string) error { return os.Chtimes(diff+"/dir", old, old) }, "dir: mtime", ""},
		{"another time of a folder that no layer names", func(_, diff string) error { return os.Chtimes(diff+"/implied", old, old) }, "", ""},
		{"the root's mode", func(_, diff string) error { return os.Chmod(diff, 0o700) }, ".: mode", ""},
		{"a file more", func(_, diff string) error { return os.WriteFile(diff+"/more", nil, 0o644) }, "more: should not be there", ""},
		{"a file less", func(_, diff string) error { return os.Remove(diff + "/dir/file") }, "dir/file: is missing", "rebuild its tar"},
		{"no layer folder", func(root, _ string) error { return os.RemoveAll(root + "/overlay/" + top + "/link") }, "link is missing", "no such file"},
		{"an empty link file", func(root, _ string) error { return os.Truncate(root+"/overlay/"+base+"/link", 0) }, "", "its link"},
		{"another lower", func(root, _ string) error { return os.WriteFile(root+"/overlay/"+top+"/lower", []byte("l/X"), 0o644) }, "", "lower is"},
		{"no link in l", func(root, _ string) error {
			os.RemoveAll(root + "/overlay/l")
			return os.Mkdir(root+"/overlay/l", 0o700)
		}, "", "its link"},
		{"a stray link in l", func(root, _ string) error { return os.Symlink("x", root+"/overlay/l/STRAY") }, "", "overlay/l/STRAY"},
		{"a stray layer", func(root, _ string) error { return os.Mkdir(root+"/overlay/stray", 0o700) }, "", "overlay/stray"},
		{"a stray staging folder", func(root, _ string) error { return os.MkdirAll(root+"/overlay/staging/x", 0o700) }, "", "overlay/staging/x"},
		{"a stray record", func(root, _ string) error { return os.WriteFile(root+"/overlay-layers/x.tar-split.gz", nil, 0o600) }, "", "x.tar-split.gz"},
		{"a stray image", func(root, _ string) error { return os.Mkdir(root+"/overlay-images/x", 0o700) }, "", "overlay-images/x"},
		{"what the agent staged", func(root, _ string) error { return os.MkdirAll(root+"/.precache-agent/staging/x", 0o700) }, "", "staging/x"},
		{"no record", func(root, _ string) error { return os.Remove(root + "/overlay-layers/" + base + ".tar-split.gz") }, "", "rebuild its tar"},
		{"an incomplete layer", func(root, _ string) error {
			return edit(root+"/overlay-layers/layers.json", `"id":`, `"flags":{"incomplete":true},"id":`)
		}, "flags", "flags"},
		{"another size of a layer", func(root, _ string) error {
			return edit(root+"/overlay-layers/layers.json", `"diff-size":`, `"diff-size":1`)
		}, "diff-size", "files make a tar"},
		{"another parent", func(root, _ string) error {
			return edit(root+"/overlay-layers/layers.json", `"parent":"`, `"parent":"0`)
		}, "parent", "its parent"},
		{"another owner set", func(root, _ string) error {
			return edit(root+"/overlay-layers/layers.json", `"uidset":[0]`, `"uidset":[1]`)
		}, "uidset", ""},
		{"another name", func(root, _ string) error {
			return edit(root+"/overlay-images/images.json", "store/test@", "store/tset@")
		}, "names", ""},
		{"another digest", func(root, _ string) error {
			return edit(root+"/overlay-images/images.json", `"digest":"sha256:`, `"digest":"sha256:0`)
		}, "digest", "no manifest of it"},
		{"another manifest", func(root, _ string) error { return edit(root+"/overlay-images/"+image+"/manifest", "2", "3") }, "data manifest is", ""},
		{"no manifest", func(root, _ string) error { return os.Remove(root + "/overlay-images/" + image + "/manifest") }, "manifest is missing", "manifest is not there"},
		{"no image", func(root, _ string) error {
			return os.WriteFile(root+"/overlay-images/images.json", []byte("[]"), 0o600)
		}, "is missing", "should not be there"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			other := New(t, filepath.Dir(s.Dir), "other", "overlay")
			defer os.RemoveAll(other.Dir)
			if err := os.RemoveAll(other.Root); err != nil {
				t.Fatal(err)
			}
			Run(t, "cp", "-a", s.Root, other.Root)
			if err := tt.damage(other.Root, other.tree(base)); err != nil {
				t.Fatal(err)
			}
			for _, f := range []struct {
				by, want string
				got      []string
			}{{"Compare", tt.differs, compare(t, other, s).lines}, {"Check", tt.fault, Faults(t, other)}} {
				if got := strings.Join(f.got, "\n"); !strings.Contains(got, f.want) || f.want == "" && got != "" {
					t.Errorf("%s says %q, want %q", f.by, got, f.want)
				}
			}
		})
	}
}
