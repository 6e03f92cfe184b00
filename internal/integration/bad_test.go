package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

// mostMemory is what the agent and its helpers may take, in bytes.
const mostMemory = 200 << 20

// A bad is an image that cannot be loaded.
type bad struct {
	name    string
	reasons string // any of these
	item    func(b *badBuilder) fixture.Item
	after   func(t *testing.T, path string) // damages the archive at last
}

// A badBuilder makes images that share nothing with others.
type badBuilder struct {
	t    testing.TB
	name string
	n    int
}

// layer makes a layer of some 40 KB that does not compress.
func (b *badBuilder) layer() *fixture.Layer {
	b.n++
	data := make([]byte, 40_000)
	rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%-32.32s", fmt.Sprint(b.n, b.name))))).Read(data)
	return layer(b.t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "bad/"}, {Name: "bad/file", Data: string(data)}}})
}

func (b *badBuilder) image() *fixture.Image {
	return image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{b.layer(), b.layer()}})
}

// staged is an item of a common image, whose archive is edited.
func (b *badBuilder) staged(edits func(*fixture.Image) []fixture.Edit) fixture.Item {
	img := b.image()
	return fixture.Item{Image: img, Stage: &fixture.Stage{Edits: edits(img)}}
}

func replaceJSON(b []byte, change func(map[string]any)) []byte {
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		panic(err) // the fixture's own
	}
	change(m)
	out, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return out
}

// zeros is a member of so many zero bytes.
func zeros(size int64) func(fixture.Member) []fixture.Member {
	return func(m fixture.Member) []fixture.Member {
		m.Size = size
		m.Open = func() (io.ReadCloser, error) { return io.NopCloser(zeroReader{}), nil }
		return []fixture.Member{m}
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// manifest makes an image whose manifest says something else.
func (b *badBuilder) manifest(edit func(map[string]any)) fixture.Item {
	spec := fixture.ImageSpec{Layers: []*fixture.Layer{b.layer()}, EditManifest: func(m []byte) []byte { return replaceJSON(m, edit) }}
	return fixture.Item{Image: image(b.t, spec)}
}

// firstLayer changes what the manifest says of its first layer.
func firstLayer(key string, value any) func(map[string]any) {
	return func(m map[string]any) { m["layers"].([]any)[0].(map[string]any)[key] = value }
}

var bads = []bad{
	{name: "no archive", reasons: "missing-archive", item: func(b *badBuilder) fixture.Item { return fixture.Item{Image: b.image(), Missing: true} }},
	{name: "a folder with an archive's name", reasons: "missing-archive", item: func(b *badBuilder) fixture.Item { return fixture.Item{Image: b.image()} },
		after: func(t *testing.T, path string) { remake(t, path, func() error { return os.Mkdir(path, 0o755) }) }},
	{name: "a pipe with an archive's name", reasons: "unsupported", item: func(b *badBuilder) fixture.Item { return fixture.Item{Image: b.image()} },
		after: func(t *testing.T, path string) { remake(t, path, func() error { return syscall.Mkfifo(path, 0o644) }) }},
	{name: "a link out of the partition", reasons: "read-failed unsupported corrupt-archive", item: func(b *badBuilder) fixture.Item { return fixture.Item{Image: b.image()} },
		after: func(t *testing.T, path string) {
			away := filepath.Join(t.TempDir(), "away")
			if err := os.Rename(path, away); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(away, path); err != nil {
				t.Fatal(err)
			}
		}},
	{name: "nothing in the archive", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item { return fixture.Item{Image: b.image()} },
		after: func(t *testing.T, path string) { check(t, os.Truncate(path, 0)) }},
	{name: "no archive at all but text", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item { return fixture.Item{Image: b.image()} },
		after: func(t *testing.T, path string) {
			check(t, os.WriteFile(path, []byte(strings.Repeat("not an archive\n", 1000)), 0o644))
		}},
	{name: "the archive ends early", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item { return fixture.Item{Image: b.image()} },
		after: func(t *testing.T, path string) { check(t, fixture.Truncate(path, 60_000)) }},
	{name: "a plain archive ends early", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return fixture.Item{Image: b.image(), Stage: &fixture.Stage{Compression: fixture.None}}
	}, after: func(t *testing.T, path string) { check(t, fixture.Truncate(path, 60_000)) }},
	{name: "a zstd archive ends early", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return fixture.Item{Image: b.image(), Stage: &fixture.Stage{Compression: fixture.Zstd}}
	}, after: func(t *testing.T, path string) { check(t, fixture.Truncate(path, 60_000)) }},
	{name: "an xz archive ends early", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return fixture.Item{Image: b.image(), Stage: &fixture.Stage{Compression: fixture.XZ}}
	}, after: func(t *testing.T, path string) { check(t, fixture.Truncate(path, 60_000)) }},
	{name: "a bit of the archive is flipped", reasons: "corrupt-archive digest-mismatch", item: func(b *badBuilder) fixture.Item { return fixture.Item{Image: b.image()} },
		after: func(t *testing.T, path string) { check(t, fixture.FlipBit(path, 30_000)) }},
	{name: "a bit of the archive's header is flipped", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item { return fixture.Item{Image: b.image()} },
		after: func(t *testing.T, path string) { check(t, fixture.FlipBit(path, 2)) }},
	{name: "a bit of a plain archive's tar header is flipped", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return fixture.Item{Image: b.image(), Stage: &fixture.Stage{Compression: fixture.None}}
	}, after: func(t *testing.T, path string) { check(t, fixture.FlipBit(path, 512+3)) }},

	{name: "a bit of a layer is flipped", reasons: "digest-mismatch", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.Flip(i.Layers[1].Digest.Encoded(), 20_000)}
		})
	}},
	{name: "a bit of a layer's trailer is flipped", reasons: "digest-mismatch", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.Flip(i.Layers[0].Digest.Encoded(), -1)}
		})
	}},
	{name: "a bit of the config is flipped", reasons: "digest-mismatch", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.Flip(i.ConfigDigest.Encoded(), 20)}
		})
	}},
	{name: "a bit of the manifest is flipped", reasons: "digest-mismatch", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit { return []fixture.Edit{fixture.Flip("manifest.json", 40)} })
	}},
	{name: "a layer is cut", reasons: "digest-mismatch corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.Cut(i.Layers[1].Digest.Encoded(), 20_000)}
		})
	}},
	{name: "a layer is longer", reasons: "digest-mismatch", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.Each(i.Layers[1].Digest.Encoded(), zeros(50_000))}
		})
	}},
	{name: "a blob is not what its name says", reasons: "digest-mismatch", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.Rename(i.Layers[0].Digest.Encoded(), "x"), fixture.Rename(i.Layers[1].Digest.Encoded(), "p/"+i.Layers[0].Digest.Encoded()), fixture.Rename("x", "p/"+i.Layers[1].Digest.Encoded()),
				func(m []fixture.Member) ([]fixture.Member, error) {
					for n := range m { // both back into the image's folder
						m[n].Name = strings.Replace(m[n].Name, "p/", m[0].Name, 1)
					}
					return m, nil
				}}
		})
	}},
	{name: "a layer is missing", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.Drop(i.Layers[1].Digest.Encoded())}
		})
	}},
	{name: "the config is missing", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit { return []fixture.Edit{fixture.Drop(i.ConfigDigest.Encoded())} })
	}},
	{name: "the manifest is missing", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit { return []fixture.Edit{fixture.Drop("manifest.json")} })
	}},
	{name: "not the pinned manifest", reasons: "digest-mismatch", item: func(b *badBuilder) fixture.Item {
		return fixture.Item{Ref: "registry.example.com/bad/pinned@" + string(digest.FromString("another")), Image: b.image()}
	}},
	{name: "the manifest is no JSON", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{EditManifest: func([]byte) []byte { return []byte("{") }})}
	}},
	{name: "the config is no JSON", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{b.layer()}, EditConfig: func([]byte) []byte { return []byte("nonsense") }})}
	}},
	{name: "a layer is not its diffID", reasons: "digest-mismatch", item: func(b *badBuilder) fixture.Item {
		l, other := b.layer(), b.layer()
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{l}, DiffIDs: []digest.Digest{other.DiffID}})}
	}},
	{name: "fewer diffIDs than layers", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		l := b.layer()
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{l, b.layer()}, DiffIDs: []digest.Digest{l.DiffID}})}
	}},
	{name: "a layer stands twice", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.Duplicate(i.Layers[0].Digest.Encoded())}
		})
	}},
	{name: "the manifest stands twice", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.ManifestFirst, fixture.Duplicate("manifest.json")}
		})
	}},
	{name: "a name leaves the folder", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit { return []fixture.Edit{fixture.Rename("version", "../../evil")} })
	}},
	{name: "a name is absolute", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit { return []fixture.Edit{fixture.Rename("version", "/etc/evil")} })
	}},
	{name: "a member is a device", reasons: "unsupported corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.Each("version", func(m fixture.Member) []fixture.Member {
				m.Type, m.Size = tar.TypeChar, 0
				m.Open = nil
				return []fixture.Member{m}
			})}
		})
	}},
	{name: "a config of 1 GB", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		img := image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{b.layer()}, EditManifest: func(m []byte) []byte {
			return replaceJSON(m, func(m map[string]any) { m["config"].(map[string]any)["size"] = 1 << 30 })
		}})
		return fixture.Item{Image: img, Stage: &fixture.Stage{Compression: fixture.Zstd, Edits: []fixture.Edit{fixture.Each(img.ConfigDigest.Encoded(), zeros(1<<30))}}}
	}},
	{name: "a config of 1 GB that the manifest calls small", reasons: "unsupported digest-mismatch", item: func(b *badBuilder) fixture.Item {
		item := b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.ManifestFirst, fixture.Each(i.ConfigDigest.Encoded(), zeros(1<<30))}
		})
		item.Stage.Compression = fixture.Zstd
		return item
	}},
	{name: "a manifest of 100 MB", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		return b.staged(func(i *fixture.Image) []fixture.Edit {
			return []fixture.Edit{fixture.Each("manifest.json", zeros(100<<20))}
		})
	}},
	{name: "10,000 layers", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		return b.manifest(func(m map[string]any) { m["layers"] = slices.Repeat(m["layers"].([]any), 10_000) })
	}},
	{name: "10,000 diffIDs", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		l := b.layer()
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{l}, DiffIDs: slices.Repeat([]digest.Digest{l.DiffID}, 10_000)})}
	}},
	{name: "a foreign layer", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		return b.manifest(firstLayer("mediaType", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"))
	}},
	{name: "an encrypted layer", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		return b.manifest(firstLayer("mediaType", "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"))
	}},
	{name: "schema 1", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{EditManifest: func([]byte) []byte {
			return []byte(`{"schemaVersion":1,"name":"x","tag":"y","architecture":"amd64","fsLayers":[{"blobSum":"sha256:` + strings.Repeat("0", 64) + `"}],"history":[{"v1Compatibility":"{}"}]}`)
		}})}
	}},
	{name: "a layer's digest is sha512", reasons: "unsupported corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.manifest(firstLayer("digest", "sha512:"+strings.Repeat("0", 128)))
	}},
	{name: "a layer's digest is a path", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		return b.manifest(firstLayer("digest", "sha256:../../../../etc/passwd"))
	}},
	{name: "nothing for this machine", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		other := image(b.t, fixture.ImageSpec{Arch: "mips", Layers: []*fixture.Layer{b.layer()}})
		return fixture.Item{Image: list(b.t, fixture.ListSpec{Instances: []*fixture.Image{other}})}
	}},
	{name: "a docker-archive for a digest", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		return fixture.Item{Image: b.image(), Stage: &fixture.Stage{Format: fixture.DockerArchive}}
	}},
	{name: "a zstd window of 256 MiB", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		l := layer(b.t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "window"}}, Compression: fixture.Zstd, Window: 256 << 20})
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{l}})}
	}},
	{name: "an xz dictionary of 256 MiB", reasons: "unsupported", item: func(b *badBuilder) fixture.Item {
		return fixture.Item{Image: b.image(), Stage: &fixture.Stage{Compression: fixture.XZ, Window: 256 << 20}}
	}},
	{name: "a layer whose gzip is broken, as its digest says", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		check(b.t, w.Close())
		l := layer(b.t, fixture.LayerSpec{Tar: io.MultiReader(bytes.NewReader(z.Bytes()[:10]), strings.NewReader("\xff\xff\xff\xff")), Compression: fixture.None, MediaType: "application/vnd.docker.image.rootfs.diff.tar.gzip"})
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{l}})}
	}},
	{name: "a layer that is no tar, as its digest says", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		l := layer(b.t, fixture.LayerSpec{Tar: strings.NewReader(strings.Repeat("no tar ", 10_000))})
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{l}})}
	}},
	{name: "a layer whose tar ends early, as its digest says", reasons: "corrupt-archive", item: func(b *badBuilder) fixture.Item {
		data, err := fixture.Tar(fixture.Entry{Name: "cut", Data: strings.Repeat("x", 5000)})
		check(b.t, err)
		l := layer(b.t, fixture.LayerSpec{Tar: bytes.NewReader(data[:3000])})
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{l}})}
	}},
	{name: "a layer names a file twice", reasons: "corrupt-archive unsupported", item: func(b *badBuilder) fixture.Item {
		l := layer(b.t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "twice", Data: "1"}, {Name: "twice", Data: "2"}}})
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{l}})}
	}},
	{name: "a layer's hard link points to nothing", reasons: "corrupt-archive unsupported", item: func(b *badBuilder) fixture.Item {
		l := layer(b.t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "link", Type: tar.TypeLink, Link: "nowhere"}}})
		return fixture.Item{Image: image(b.t, fixture.ImageSpec{Layers: []*fixture.Layer{l}})}
	}},
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func remake(t testing.TB, path string, f func() error) {
	t.Helper()
	check(t, os.Remove(path))
	check(t, f())
}

// Each bad image fails for its reason, all others get into the store, and nothing of the bad ones does.
func TestBadInput(t *testing.T) {
	storetest.Need(t, "podman")
	var items []fixture.Item
	for _, bad := range bads {
		item := bad.item(&badBuilder{t: t, name: bad.name})
		if item.Ref == "" {
			item.Ref = "registry.example.com/bad/image"
		}
		items = append(items, item)
	}
	good := shapes(t)[:6]
	items = append(items[:len(bads)/2:len(bads)/2], append(slices.Clone(good), items[len(bads)/2:]...)...)
	dir, staged := partition(t, items...)
	goodStaged := staged[len(bads)/2 : len(bads)/2+len(good)]
	badStaged := slices.Delete(slices.Clone(staged), len(bads)/2, len(bads)/2+len(good))
	for n, bad := range bads {
		if bad.after != nil {
			bad.after(t, badStaged[n].Path)
		}
	}
	for _, jobs := range []string{"2", "1"} {
		t.Run(jobs+" jobs", func(t *testing.T) {
			s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
			o := load(t, s, dir, "--jobs", jobs)
			if o.code != exitIncomplete || o.sum.Failed != len(bads) || o.sum.Loaded != len(good) {
				t.Errorf("load ends with %d, %d images failed and %d are loaded, want 3, %d and %d\n%s", o.code, o.sum.Failed, o.sum.Loaded, len(bads), len(good), tail(o.err))
			}
			if o.peak > mostMemory {
				t.Errorf("%d MiB of memory are used, at most 200 may be", o.peak>>20)
			}
			ends := o.ends()
			names := s.Names(t)
			for n, bad := range bads {
				e := ends[badStaged[n].Ref]
				switch {
				case e.Event != "failed" || !slices.Contains(strings.Fields(bad.reasons), e.Reason):
					t.Errorf("%s: %s for reason %q (%s), want failed for %s", bad.name, e.Event, e.Reason, e.Error, bad.reasons)
				case e.Error == "" || strings.ContainsAny(e.Error, "\x00\n") || len(e.Error) > 1000:
					t.Errorf("%s: the error is not one short line: %q", bad.name, e.Error)
				case names[e.Ref] != "":
					t.Errorf("%s: it failed, but its name is in the store", bad.name)
				}
			}
			for _, st := range goodStaged {
				if e := ends[st.Ref]; e.Event != "loaded" || names[st.Ref] == "" {
					t.Errorf("%s is %s (%s), want it loaded", st.Ref, e.Event, e.Error)
				}
			}
			storetest.Check(t, s)
			for id := range s.Layers(t) {
				if !usedBy(t, s, id) {
					t.Errorf("layer %s is in the store, but no image has it", id)
				}
			}
		})
	}
}

// If the copy of a shared layer that is read first is bad, that archive's image fails and the others are read again.
func TestBadFirstCopy(t *testing.T) {
	storetest.Need(t, "podman")
	for _, jobs := range []string{"1", "2", "8"} {
		t.Run(jobs+" jobs", func(t *testing.T) {
			b := &badBuilder{t: t, name: "shared"}
			base := []*fixture.Layer{b.layer(), b.layer()}
			var items []fixture.Item
			for range 6 {
				items = append(items, fixture.Item{Ref: "registry.example.com/first/copy", Image: image(t, fixture.ImageSpec{Layers: append(slices.Clone(base), b.layer())})})
			}
			items[0].Stage = &fixture.Stage{Edits: []fixture.Edit{fixture.Flip(base[0].Digest.Encoded(), 20_000)}}
			items[1].Stage = &fixture.Stage{Edits: []fixture.Edit{fixture.Flip(base[1].Digest.Encoded(), 20_000)}}
			dir, staged := partition(t, items...)
			s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
			o := load(t, s, dir, "--jobs", jobs)
			ends := o.ends()
			for n, st := range staged {
				switch e := ends[st.Ref]; {
				case n >= 2 && e.Event != "loaded":
					t.Errorf("image %d, whose copies are good, is %s: %s", n, e.Event, e.Error)
				case n < 2 && e.Event == "failed" && e.Reason != "digest-mismatch":
					t.Errorf("image %d fails for %q, want digest-mismatch", n, e.Reason)
				}
			}
			if jobs == "1" && ends[staged[0].Ref].Event != "failed" {
				t.Errorf("image 0, whose bad copy is read first, is %s, want failed", ends[staged[0].Ref].Event)
			}
			if want := min(o.sum.Failed, 1) * exitIncomplete; o.code != want {
				t.Errorf("load ends with %d after %d images failed, want %d", o.code, o.sum.Failed, want)
			}
			storetest.Check(t, s)
		})
	}
}

// Whatever a layer's names and links say, nothing outside of the layer is touched. What skopeo stores, the agent stores too.
func TestHostileLayers(t *testing.T) {
	got, want := pair(t, storetest.Tmpfs, "overlay")
	host := t.TempDir()
	check(t, os.WriteFile(filepath.Join(host, "victim"), []byte("safe"), 0o600))
	up := strings.Repeat("../", 30) + host[1:]
	before, err := storetest.ReadTree(host)
	check(t, err)

	tests := map[string][]fixture.Entry{
		"dots":                                 {{Name: up + "/evil", Data: "x"}},
		"dots in the middle":                   {{Name: "a/"}, {Name: "a/../../" + up + "/evil", Data: "x"}},
		"dots within":                          {{Name: "a/b/"}, {Name: "a/b/../c", Data: "x"}},
		"an absolute name":                     {{Name: host + "/evil", Data: "x"}},
		"a link to a folder, then in it":       {{Name: "link", Link: host}, {Name: "link/evil", Data: "x"}},
		"a link up, then in it":                {{Name: "link", Link: up}, {Name: "link/evil", Data: "x"}},
		"links in a chain":                     {{Name: "one", Link: "two"}, {Name: "two", Link: up}, {Name: "one/evil", Data: "x"}},
		"a link to a file, then over it":       {{Name: "link", Link: host + "/victim"}, {Name: "link", Mode: 0o4777, Data: "x"}},
		"a hard link out":                      {{Name: "hard", Type: tar.TypeLink, Link: up + "/victim"}},
		"an absolute hard link out":            {{Name: "hard", Type: tar.TypeLink, Link: host + "/victim"}},
		"a hard link through a link":           {{Name: "link", Link: host}, {Name: "hard", Type: tar.TypeLink, Link: "link/victim"}},
		"a whiteout of what is outside":        {{Name: up + "/.wh.victim"}},
		"a whiteout through a link":            {{Name: "link", Link: host}, {Name: "link/.wh.victim"}},
		"an opaque folder outside":             {{Name: "link", Link: host}, {Name: "link/.wh..wh..opq"}},
		"a whiteout of the layer":              {{Name: ".wh..", Data: ""}},
		"a whiteout of what is above":          {{Name: ".wh...", Data: ""}},
		"a link over the root":                 {{Name: "./", Type: tar.TypeSymlink, Link: host}, {Name: "evil", Data: "x"}},
		"a folder through a link, with a mode": {{Name: "link", Link: host}, {Name: "link/", Mode: 0o777, UID: 1, GID: 1}},
		"attributes through a link":            {{Name: "link", Link: host + "/victim", Xattrs: map[string]string{"user.evil": "x"}}},
		"a folder over a link":                 {{Name: "link", Link: host}, {Name: "link/", Mode: 0o700}, {Name: "link/evil", Data: "x"}},
	}
	var items []fixture.Item
	var names []string
	for name, entries := range tests {
		names = append(names, name)
		l := layer(t, fixture.LayerSpec{Entries: append([]fixture.Entry{{Name: "good", Data: name}}, entries...)})
		items = append(items, fixture.Item{Ref: "registry.example.com/hostile/image", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l}})})
	}
	dir, staged := partition(t, items...)
	ends := load(t, got, dir).ends()
	for n, st := range staged {
		_, err := want.TrySkopeo(t, "copy", "--quiet", "dir:"+untar(t, st.Path), "containers-storage:"+st.Ref)
		e := ends[st.Ref]
		switch {
		case err == nil && e.Event != "loaded":
			t.Errorf("%s: %s for %s (%s), skopeo loads it", names[n], e.Event, e.Reason, e.Error)
		case err != nil && (e.Event != "failed" || e.Reason != "corrupt-archive" && e.Reason != "unsupported"):
			t.Errorf("%s: %s for reason %q (%s), want failed for what it is: skopeo says %v", names[n], e.Event, e.Reason, e.Error, err)
		}
	}
	after, err := storetest.ReadTree(host)
	check(t, err)
	if diff := before.Diff(after, func(string) bool { return true }); diff != nil {
		t.Errorf("what is outside of the layers has changed:\n  %s", strings.Join(diff, "\n  "))
	}
	storetest.Check(t, got)
	storetest.Compare(t, got, want)
}

// usedBy reports whether an image of the store has a layer.
func usedBy(t testing.TB, s *storetest.Store, id string) bool {
	layers := s.Layers(t)
	for _, img := range s.Images(t) {
		for at := img.TopLayer; at != ""; at = layers[at].Parent {
			if at == id {
				return true
			}
		}
	}
	return false
}
