package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/fixture/registry"
	"github.com/precache/precache-agent/internal/storetest"
)

// pair makes two stores in one file system: the agent's, and the one that says what is right.
func pair(t *testing.T, kind storetest.FS, driver string) (got, want *storetest.Store) {
	t.Helper()
	storetest.Need(t, "podman", "skopeo", "tar")
	in := storetest.Mount(t, kind)
	return storetest.New(t, in, "agent", driver), storetest.New(t, in, "skopeo", driver)
}

// same fails the test unless a store is whole and like the other one.
func same(t *testing.T, got, want *storetest.Store) {
	t.Helper()
	storetest.Check(t, want)
	storetest.Check(t, got)
	storetest.Compare(t, got, want)
}

// What the agent makes of images of every shape is what skopeo makes of them, and podman and skopeo can use it.
func TestLikeSkopeo(t *testing.T) {
	got, want := pair(t, storetest.Tmpfs, "overlay")
	dir, staged := partition(t, shapes(t)...)
	loop(t, want, staged)
	o := mustLoad(t, got, dir)
	if o.sum.Images != len(staged) || o.sum.Loaded != len(staged) {
		t.Errorf("%d images of %d are loaded, want %d", o.sum.Loaded, o.sum.Images, len(staged))
	}
	if want := distinct(staged); o.sum.LayersWritten != len(want) {
		t.Errorf("%d layers are written, want each of the %d distinct ones once", o.sum.LayersWritten, len(want))
	}
	same(t, got, want)
	storetest.CompareMounted(t, got, want)
	checkLibrary(t, got)

	for n, st := range staged {
		if n%3 == 0 {
			sameExport(t, got, want, st)
		} else {
			export(t, got, st)
		}
	}
	if again := mustLoad(t, got, dir); again.sum.Present != len(staged) || again.sum.LayersWritten != 0 {
		t.Errorf("the second load finds %d of %d images present and writes %d layers", again.sum.Present, len(staged), again.sum.LayersWritten)
	}
	same(t, got, want)

	got.Podman(t, "rmi", "--all", "--force")
	storetest.CheckEmpty(t, got)
	if o := mustLoad(t, got, dir); o.sum.Loaded != len(staged) {
		t.Errorf("after everything was removed, %d of %d images are loaded", o.sum.Loaded, len(staged))
	}
	same(t, got, want)
}

// distinct are the diffIDs of the images' layers that this machine needs.
func distinct(staged []fixture.Staged) map[string]int64 {
	size := map[string]int64{}
	for _, st := range staged {
		for _, l := range st.Image.Host().Layers {
			size[l.DiffID.String()] = l.UncompressedSize
		}
	}
	return size
}

// export reads an image out of a store, in the ways in which others do, and returns what came of it.
func export(t *testing.T, s *storetest.Store, st fixture.Staged) (trees []storetest.Tree) {
	t.Helper()
	dir := t.TempDir()
	s.Podman(t, "save", "--quiet", "--format", "oci-dir", "-o", dir+"/podman", st.Ref)
	s.Skopeo(t, "copy", "--quiet", "containers-storage:"+st.Ref, "oci:"+dir+"/skopeo:x")
	for _, by := range []string{"podman", "skopeo"} {
		tree, err := storetest.ReadTree(filepath.Join(dir, by))
		check(t, err)
		for path, n := range tree {
			tree[path] = storetest.Node{Mode: n.Mode, Size: n.Size, Hash: n.Hash}
		}
		trees = append(trees, tree)
	}
	return trees
}

func sameExport(t *testing.T, got, want *storetest.Store, st fixture.Staged) {
	t.Helper()
	a, b := export(t, want, st), export(t, got, st)
	for n, by := range []string{"podman save", "skopeo copy"} {
		if diff := a[n].Diff(b[n], func(string) bool { return false }); diff != nil {
			t.Errorf("%s of %s gives something else than from skopeo's store:\n  %s", by, st.Ref, strings.Join(diff, "\n  "))
		}
	}
}

// What stands below an absolute symbolic link stays in the layer. Versions of the library that look for it outside
// can store such a layer, but not read it.
func TestBelowAbsoluteLink(t *testing.T) {
	got, want := pair(t, storetest.Tmpfs, "overlay")
	l := layer(t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "usr/"}, {Name: "absolute", Link: "/usr"}, {Name: "absolute/file", Data: "below a link"}}})
	dir, staged := partition(t, fixture.Item{Ref: "registry.example.com/absolute/link", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l}})})
	loop(t, want, staged)
	mustLoad(t, got, dir)
	same(t, got, want)
}

// It does not matter which file system the store lies on.
func TestFileSystems(t *testing.T) {
	for _, kind := range []storetest.FS{storetest.Ext4, storetest.XFS} {
		t.Run(string(kind), func(t *testing.T) {
			got, want := pair(t, kind, "overlay")
			items := shapes(t)
			dir, staged := partition(t, items[0], items[1], items[3], items[6], items[12])
			loop(t, want, staged)
			mustLoad(t, got, dir)
			same(t, got, want)
			got.Podman(t, "rmi", "--all", "--force")
			storetest.CheckEmpty(t, got)
		})
	}
}

// An image of the ai group gets the tag that mapping.txt gives it as well, whichever lists it stands in.
func TestMappedNames(t *testing.T) {
	got, want := pair(t, storetest.Tmpfs, "overlay")
	l := makeLayers(t)
	one, two, three := image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base}}), image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base, l.app}}), multi(t, "mapped", false, l.other)
	dir, staged := partition(t,
		fixture.Item{Ref: "quay.io/release/dev", Image: one, Groups: []string{"ai", "ocp"}, Mapping: "openshift/release:4.13.0-x86_64-must-gather"},
		fixture.Item{Ref: "quay.io/release/dev", Image: two, Groups: []string{"ocp"}, Mapping: "openshift/release:4.13.0-not-ai"},
		fixture.Item{Ref: "quay.io/release/dev", Image: three, Groups: []string{"ai"}, Mapping: "host:5000/a/b:4.13.0-list"},
		fixture.Item{Ref: "quay.io/release/dev:tag@" + string(two.Digest), Image: two, Groups: []string{"ocp"}},
	)
	loop(t, want, staged)
	for ref, st := range map[string]fixture.Staged{"quay.io/release/dev:4.13.0-x86_64-must-gather": staged[0], "quay.io/release/dev:4.13.0-list": staged[2]} {
		want.Skopeo(t, "copy", "--quiet", "dir:"+untar(t, st.Path), "containers-storage:"+ref)
	}
	// One group after the other, as discovery and install do.
	if o := mustLoad(t, got, dir, "--group", "ocp"); o.sum.Loaded != 3 || o.sum.Present != 0 {
		t.Errorf("group ocp: %d images are loaded and %d present, want 3 and 0", o.sum.Loaded, o.sum.Present)
	}
	if o := mustLoad(t, got, dir, "--group", "ai"); o.sum.Loaded != 2 || o.sum.LayersWritten != 2 {
		t.Errorf("group ai: %d images are loaded and %d layers written, want 2 and 2", o.sum.Loaded, o.sum.LayersWritten)
	}
	same(t, got, want)
	if o := mustLoad(t, got, dir); o.sum.Present != 4 {
		t.Errorf("both groups: %d images are present, want 4", o.sum.Present)
	}
}

// Archives made as the factory tool makes them: a real copy from a registry, a real tar.
func TestFactoryArchives(t *testing.T) {
	got, want := pair(t, storetest.Tmpfs, "overlay")
	l := makeLayers(t)
	reg := registry.Start(t.TempDir())
	defer reg.Close()
	images := map[string]*fixture.Image{
		"single": image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base, l.modes, l.links}}),
		"oci":    image(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{l.base, l.app, l.app}}),
		"list":   multi(t, "list", false, l.base),
		"index":  multi(t, "index", true, l.base, l.names),
	}
	dir, lists := t.TempDir(), ""
	for name, img := range images {
		ref, err := reg.Push("factory/"+name, "v1", img)
		if err != nil {
			t.Fatal(err)
		}
		folder := fixture.Name(ref)
		want.Skopeo(t, "copy", "--quiet", "--all", "--src-tls-verify=false", "docker://"+ref, "dir:"+filepath.Join(dir, folder))
		want.Skopeo(t, "copy", "--quiet", "dir:"+filepath.Join(dir, folder), "containers-storage:"+ref)
		storetest.Run(t, "tar", "-C", dir, "-czf", filepath.Join(dir, folder+".tgz"), folder)
		if err := os.RemoveAll(filepath.Join(dir, folder)); err != nil {
			t.Fatal(err)
		}
		lists += ref + "\n"
	}
	if err := os.WriteFile(filepath.Join(dir, "ocp-images.txt"), []byte(lists), 0o644); err != nil {
		t.Fatal(err)
	}
	mustLoad(t, got, dir)
	same(t, got, want)
}

// The same content may come compressed in one way here and in another there. It is one layer.
func TestOneLayerTwoCompressions(t *testing.T) {
	got, want := pair(t, storetest.Tmpfs, "overlay")
	l := makeLayers(t)
	dir, staged := partition(t,
		fixture.Item{Ref: "registry.example.com/z/gzip", Image: image(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{l.base, l.app}})},
		fixture.Item{Ref: "registry.example.com/z/zstd", Image: image(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{l.base, l.appZstd}})},
		fixture.Item{Ref: "registry.example.com/z/other", Image: image(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{l.other, l.appZstd}})},
		fixture.Item{Ref: "registry.example.com/z/plain", Image: image(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{l.base, l.appPlain}})},
		fixture.Item{Ref: "registry.example.com/z/both", Image: image(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{l.appPlain, l.appZstd, l.app}})},
	)
	loop(t, want, staged)
	if o := mustLoad(t, got, dir, "--jobs", "1"); o.sum.LayersWritten != 3 {
		t.Errorf("%d layers are written, want 3", o.sum.LayersWritten)
	}
	same(t, got, want)
	for _, jobs := range []string{"2", "8"} {
		s := storetest.New(t, filepath.Dir(got.Dir), "jobs"+jobs, "overlay")
		mustLoad(t, s, dir, "--jobs", jobs)
		storetest.Check(t, s)
		if names := s.Names(t); len(names) != len(staged) {
			t.Errorf("%s jobs: %d names in the store, want %d: %v", jobs, len(names), len(staged), names)
		}
	}
}
