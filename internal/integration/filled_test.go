package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

// What others have put into the store is used, under whatever parent it is, and left as it is.
func TestFilledStore(t *testing.T) {
	l := makeLayers(t)
	of := func(ref string, layers ...*fixture.Layer) fixture.Item {
		return fixture.Item{Ref: ref, Image: image(t, fixture.ImageSpec{Layers: layers})}
	}
	theirs := []fixture.Item{
		of("registry.example.com/theirs/one", l.base, l.app),
		of("registry.example.com/theirs/two:v1", l.other, l.links, l.whiteouts),
	}
	ours := []fixture.Item{
		of("registry.example.com/ours/extends", l.base, l.app, l.names), // one new layer
		of("registry.example.com/ours/elsewhere", l.other, l.app),       // the same content on another parent
		of("registry.example.com/ours/below", l.links, l.base),          // and on none
		of("registry.example.com/ours/same", l.base, l.app),             // the same image by another name
		of("registry.example.com/ours/zstd", l.modes, l.appZstd),        // the same content from another blob
		of("registry.example.com/theirs/one", l.base, l.app),            // there already
	}
	ours[4].Image = image(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{l.modes, l.appZstd}})
	fill := map[string]func(s *storetest.Store, staged []fixture.Staged){
		"skopeo": func(s *storetest.Store, staged []fixture.Staged) { loop(t, s, staged) },
		"podman": func(s *storetest.Store, staged []fixture.Staged) {
			for n, st := range staged {
				archive := untarDocker(t, st)
				s.Podman(t, "load", "--quiet", "--input", archive)
				if n == 0 { // podman load gives no digest
					s.Podman(t, "tag", st.Image.ConfigDigest.Encoded(), "registry.example.com/theirs/one:tag")
				}
			}
		},
	}
	for name, fill := range fill {
		t.Run(name, func(t *testing.T) {
			got, want := pair(t, storetest.Tmpfs, "overlay")
			_, theirStaged := partition(t, theirs...)
			fill(got, theirStaged)
			fill(want, theirStaged)
			before := inodes(t, got)
			dir, staged := partition(t, ours...)
			loop(t, want, staged)
			o := mustLoad(t, got, dir)
			wantPresent := 0
			if name == "skopeo" {
				wantPresent = 1
			}
			if o.sum.LayersWritten != 2 || o.sum.Present != wantPresent {
				t.Errorf("%d layers are written and %d images present, want 2 (the only new ones) and %d", o.sum.LayersWritten, o.sum.Present, wantPresent)
			}
			same(t, got, want)
			after := inodes(t, got)
			for path, inode := range before {
				if after[path] != inode {
					t.Errorf("%s was there and is now another file", path)
				}
			}
		})
	}
}

// untarDocker writes an image as a docker-archive.
func untarDocker(t testing.TB, st fixture.Staged) string {
	t.Helper()
	path, err := fixture.Stage{Format: fixture.DockerArchive, Compression: fixture.None}.Write(t.TempDir(), "registry.example.com/docker/archive:v1", st.Image)
	check(t, err)
	return path
}

// inodes are those of everything in the layers' folders, by path.
func inodes(t testing.TB, s *storetest.Store) map[string]uint64 {
	t.Helper()
	found := map[string]uint64{}
	for id := range s.Layers(t) {
		check(t, filepath.WalkDir(filepath.Join(s.Root, "overlay", id, "diff"), func(path string, d os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err == nil {
				found[path] = info.Sys().(*syscall.Stat_t).Ino
			}
			return err
		}))
	}
	return found
}

// A layer of the store that is damaged is not copied to another place: the archive's is taken.
func TestDamagedCopySource(t *testing.T) {
	l := makeLayers(t)
	for name, damage := range map[string]func(tree, split string) error{
		"a file is gone":           func(tree, _ string) error { return os.Remove(tree + "/app/run") },
		"a file is changed":        func(tree, _ string) error { return fixture.FlipBit(tree+"/app/data", 100) },
		"a file is empty":          func(tree, _ string) error { return os.Truncate(tree+"/app/data", 0) },
		"the record is gone":       func(_, split string) error { return os.Remove(split) },
		"the record is empty":      func(_, split string) error { return os.Truncate(split, 0) },
		"the record is cut":        func(_, split string) error { return os.Truncate(split, 40) },
		"the whole folder is gone": func(tree, _ string) error { return os.RemoveAll(tree) },
	} {
		t.Run(name, func(t *testing.T) {
			storetest.Need(t, "podman", "skopeo")
			s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
			_, theirs := partition(t, fixture.Item{Ref: "registry.example.com/damaged/theirs", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.app}})})
			loop(t, s, theirs)
			damaged := l.app.DiffID.Encoded()
			check(t, damage(filepath.Join(s.Root, "overlay", damaged, "diff"), filepath.Join(s.Root, "overlay-layers", damaged+".tar-split.gz")))
			dir, staged := partition(t,
				fixture.Item{Ref: "registry.example.com/damaged/a", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.other, l.app}})},
				fixture.Item{Ref: "registry.example.com/damaged/b", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.modes, l.app}})},
			)
			o := mustLoad(t, s, dir)
			if names := s.Names(t); names[staged[0].Ref] == "" || names[staged[1].Ref] == "" {
				t.Errorf("names in the store: %v", names)
			}
			for _, fault := range storetest.Faults(t, s) {
				if !strings.Contains(fault, damaged) {
					t.Errorf("the damage has spread: %s", fault)
				}
			}
			if o.sum.LayersWritten != 3 {
				t.Errorf("%d layers are written, want 3: the damaged one again", o.sum.LayersWritten)
			}
		})
	}
}

// A name that mapping.txt gives to an image is taken from the image that had it, as skopeo does.
func TestNameMoves(t *testing.T) {
	got, want := pair(t, storetest.Tmpfs, "overlay")
	l := makeLayers(t)
	const tag = "quay.io/release/dev:4.13.0-x"
	_, old := partition(t, fixture.Item{Ref: tag, Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.other}})})
	loop(t, got, old)
	loop(t, want, old)
	dir, staged := partition(t, fixture.Item{Ref: "quay.io/release/dev", Groups: []string{"ai"}, Mapping: "a/b:4.13.0-x", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base}})})
	loop(t, want, staged)
	want.Skopeo(t, "copy", "--quiet", "dir:"+untar(t, staged[0].Path), "containers-storage:"+tag)
	mustLoad(t, got, dir)
	same(t, got, want)
}

// The vfs driver gets its layers in order, through the library.
func TestVFS(t *testing.T) {
	got, want := pair(t, storetest.Tmpfs, "vfs")
	items := shapes(t)
	for n := range items { // the members' order decides how often an archive is read
		items[n].Stage = &fixture.Stage{Edits: []fixture.Edit{fixture.Shuffled(uint64(n))}}
	}
	items = slices.Concat(items[:9], items[11:])
	dir, staged := partition(t, items...)
	loop(t, want, staged)
	mustLoad(t, got, dir)
	same(t, got, want)
	if o := mustLoad(t, got, dir); o.sum.Present != len(staged) {
		t.Errorf("the second load finds %d images, want %d", o.sum.Present, len(staged))
	}
	got.Podman(t, "rmi", "--all", "--force")
	storetest.CheckEmpty(t, got)
}
