package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

var suffixes = []string{".tgz", ".tar", ".tar.gz", ".tar.zst", ".tar.xz", ""}

// Every layout in every archive, the members in any order, and what the compression is told by the content, not the name.
func TestFormats(t *testing.T) {
	got, want := pair(t, storetest.Tmpfs, "overlay")
	l := makeLayers(t)
	var items []fixture.Item
	n := 0
	for format, name := range map[fixture.Format]string{fixture.DirLayout: "dir", fixture.OCILayout: "oci", fixture.DockerArchive: "docker", fixture.DockerLegacy: "legacy"} {
		for _, suffix := range suffixes {
			for _, compression := range []fixture.Compression{fixture.Gzip, fixture.None, fixture.Zstd, fixture.XZ} {
				n++
				if suffix == "" && compression != fixture.Gzip || format != fixture.DirLayout && n%3 != 0 {
					continue // a folder is not compressed; and not each of the other layouts in each archive
				}
				// A config of its own: what one image's manifest is must not depend on which archive of it comes first.
				spec := fixture.ImageSpec{Layers: []*fixture.Layer{l.base, l.app, l.empty, l.app}[:2+n%3], OCI: n%2 == 0}
				spec.Config.Cmd = []string{fmt.Sprint(n)}
				img := image(t, spec)
				if n%5 == 0 && format < fixture.DockerArchive {
					img = multi(t, fmt.Sprint(n), n%2 == 0, l.base)
				}
				ref := fmt.Sprintf("registry.example.com/%s/image:%d", name, n)
				if format < fixture.DockerArchive && n%2 == 0 {
					ref = img.Ref(fmt.Sprintf("registry.example.com/%s/image%d", name, n))
				}
				stage := fixture.Stage{Format: format, Compression: compression, Folder: suffix == "", Name: fixture.Name(ref) + suffix, Edits: []fixture.Edit{fixture.Shuffled(uint64(n))}}
				if n%3 == 0 {
					stage.Edits = []fixture.Edit{[]fixture.Edit{fixture.ManifestFirst, fixture.ManifestLast}[n%2]}
				}
				items = append(items, fixture.Item{Ref: ref, Image: img, Stage: &stage})
			}
		}
	}
	dir, staged := partition(t, items...)
	for n, item := range items {
		from := t.TempDir()
		stage, transport := fixture.Stage{Folder: true, Name: "image"}, "dir:"
		if item.Stage.Format >= fixture.DockerArchive {
			stage, transport = fixture.Stage{Format: fixture.DockerArchive, Compression: fixture.None, Name: "image"}, "docker-archive:"
		}
		path, err := stage.Write(from, staged[n].Ref, item.Image)
		check(t, err)
		want.Skopeo(t, "copy", "--quiet", transport+path, "containers-storage:"+staged[n].Ref)
	}
	mustLoad(t, got, dir)
	same(t, got, want)
}

// Archives that skopeo and podman have written.
func TestRealArchives(t *testing.T) {
	storetest.Need(t, "podman", "skopeo")
	l := makeLayers(t)
	in := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "source", "overlay")
	_, staged := partition(t,
		fixture.Item{Ref: "registry.example.com/real/docker:v1", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base, l.links, l.app, l.empty, l.app}})},
		fixture.Item{Ref: "registry.example.com/real/oci:v1", Image: image(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{l.other, l.names}})},
	)
	loop(t, in, staged)
	skopeo := func(transport, suffix string) func(ref, path string) {
		return func(ref, path string) {
			in.Skopeo(t, "copy", "--quiet", "containers-storage:"+ref, transport+":"+path+suffix)
		}
	}
	podman := func(format, suffix string) func(ref, path string) {
		return func(ref, path string) {
			in.Podman(t, "save", "--quiet", "--format", format, "-o", path+suffix, ref)
		}
	}
	for name, tt := range map[string]struct {
		write        func(ref, path string)
		from, suffix string // for skopeo to read it
	}{
		"skopeo dir":            {skopeo("dir", ""), "dir", ""},
		"skopeo oci":            {skopeo("oci", ""), "oci", ""},
		"skopeo oci-archive":    {skopeo("oci-archive", ".tar"), "oci-archive", ".tar"},
		"skopeo docker-archive": {skopeo("docker-archive", ".tar"), "docker-archive", ".tar"},
		"podman docker-archive": {podman("docker-archive", ".tar"), "docker-archive", ".tar"},
		"podman oci-archive":    {podman("oci-archive", ".tar"), "oci-archive", ".tar"},
		"podman docker-dir":     {podman("docker-dir", ""), "dir", ""},
		"podman oci-dir":        {podman("oci-dir", ""), "oci", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, want := pair(t, storetest.Tmpfs, "overlay")
			dir, lists := t.TempDir(), ""
			for _, st := range staged {
				path := filepath.Join(dir, fixture.Name(st.Ref))
				ref := strings.Replace(st.Ref, "/real/", "/"+strings.ReplaceAll(name, " ", "/")+"/", 1)
				tt.write(st.Ref, path)
				want.Skopeo(t, "copy", "--quiet", tt.from+":"+path+tt.suffix, "containers-storage:"+ref)
				lists += ref + "\n"
			}
			check(t, os.WriteFile(filepath.Join(dir, "ocp-images.txt"), []byte(lists), 0o644))
			mustLoad(t, got, dir)
			same(t, got, want)
		})
	}
}

// An archive of several images: the reference says which one.
func TestSeveralImagesInOneArchive(t *testing.T) {
	got, want := pair(t, storetest.Tmpfs, "overlay")
	l := makeLayers(t)
	in := storetest.New(t, filepath.Dir(got.Dir), "source", "overlay")
	_, staged := partition(t,
		fixture.Item{Ref: "registry.example.com/several/one:v1", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base, l.app}})},
		fixture.Item{Ref: "registry.example.com/several/two:v2", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base, l.links}})},
	)
	loop(t, in, staged)
	dir, lists := t.TempDir(), ""
	for _, st := range staged {
		path := filepath.Join(dir, fixture.Name(st.Ref)+".tar")
		in.Podman(t, "save", "--quiet", "-m", "-o", path, staged[0].Ref, staged[1].Ref)
		want.Skopeo(t, "copy", "--quiet", "docker-archive:"+path+":"+st.Ref, "containers-storage:"+st.Ref)
		lists += st.Ref + "\n"
	}
	check(t, os.WriteFile(filepath.Join(dir, "ocp-images.txt"), []byte(lists), 0o644))
	mustLoad(t, got, dir)
	same(t, got, want)
}

// Of several archives with an image's name the first one, in the order of the suffixes, counts; of two names the factory's.
func TestSuffixOrder(t *testing.T) {
	storetest.Need(t, "podman")
	s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
	l := makeLayers(t)
	var items []fixture.Item
	garbage := func(dir, name string) {
		if strings.Contains(strings.TrimPrefix(name, "image_"), ".") {
			check(t, os.WriteFile(filepath.Join(dir, name), []byte("garbage"), 0o644))
		} else {
			check(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
		}
	}
	for n, suffix := range suffixes {
		ref := fmt.Sprintf("registry.example.com/suffix/image:%d", n)
		items = append(items, fixture.Item{Ref: ref, Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base}}), Stage: &fixture.Stage{Name: fixture.Name(ref) + suffix, Folder: suffix == ""}})
	}
	pinned := image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base, l.app}})
	old := fmt.Sprintf("registry.example.com/suffix/old:v1@%s", pinned.Digest)
	both := fmt.Sprintf("registry.example.com/suffix/both:v1@%s", pinned.Digest)
	items = append(items,
		fixture.Item{Ref: old, Image: pinned, Stage: &fixture.Stage{Name: strings.ReplaceAll(filepath.Base(old), ":", "_") + ".tgz"}},
		fixture.Item{Ref: both, Image: pinned, Stage: &fixture.Stage{Compression: fixture.Zstd}},
	)
	dir, staged := partition(t, items...)
	for n := range suffixes {
		for _, later := range suffixes[n+1:] {
			garbage(dir, fmt.Sprintf("image_%d%s", n, later))
		}
	}
	garbage(dir, strings.ReplaceAll(filepath.Base(both), ":", "_")+".tgz")
	if o := mustLoad(t, s, dir); o.sum.Loaded != len(staged) {
		t.Errorf("%d images are loaded, want %d", o.sum.Loaded, len(staged))
	}
	storetest.Check(t, s)
}

// Of images for four architectures, the manifests last, no more than this machine's layers are written.
func TestManyArchitectures(t *testing.T) {
	storetest.Need(t, "podman")
	in := storetest.Mount(t, storetest.Tmpfs)
	var items []fixture.Item
	big := func(name string) *fixture.Layer { // too large to be kept until it is known what it is
		data := make([]byte, 5<<20)
		rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%-32s", name)))).Read(data)
		return layer(t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "big", Data: string(data)}}, Compression: fixture.None})
	}
	for n, format := range []fixture.Format{fixture.DirLayout, fixture.OCILayout} {
		var instances []*fixture.Image
		for _, arch := range arches() {
			instances = append(instances, image(t, fixture.ImageSpec{Arch: arch, OCI: true, Layers: []*fixture.Layer{big(arch), big(fmt.Sprint(arch, n))}}))
		}
		items = append(items, fixture.Item{Ref: "registry.example.com/arches/image", Image: list(t, fixture.ListSpec{Instances: instances, OCI: true}),
			Stage: &fixture.Stage{Format: format, Compression: fixture.None, Edits: []fixture.Edit{fixture.ManifestLast}}})
	}
	dir, staged := partition(t, items...)
	var need int64
	for _, size := range distinct(staged) {
		need += size
	}
	s := storetest.New(t, in, "agent", "overlay")
	before := used(in)
	quit, peak := make(chan struct{}), make(chan int64)
	go func() {
		var most int64
		for {
			select {
			case <-quit:
				peak <- most
				return
			case <-time.After(time.Millisecond):
				most = max(most, used(in)-before)
			}
		}
	}()
	o := mustLoad(t, s, dir)
	close(quit)
	most := <-peak
	if limit := need * 11 / 10; o.sum.BytesWritten > limit || most > limit+2<<20 { // podman's database is in it, too
		t.Errorf("%d bytes are written, and at most %d lay in the file system; %d are needed, so at most %d may be", o.sum.BytesWritten, most, need, limit)
	}
	if o.sum.LayersWritten != len(distinct(staged)) {
		t.Errorf("%d layers are written, want %d", o.sum.LayersWritten, len(distinct(staged)))
	}
	storetest.Check(t, s)
}

// used is how many bytes lie in a file system.
func used(dir string) int64 {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}
