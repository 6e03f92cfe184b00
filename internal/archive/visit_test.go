package archive

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/fixture"
)

var orders = []struct {
	name  string
	edits []fixture.Edit
}{
	{"as written", nil},
	{"manifest first", []fixture.Edit{fixture.ManifestFirst}},
	{"manifest last", []fixture.Edit{fixture.ManifestLast}},
	{"shuffled 1", []fixture.Edit{fixture.Shuffled(1)}},
	{"shuffled 2", []fixture.Edit{fixture.Shuffled(2)}},
	{"shuffled 3", []fixture.Edit{fixture.Shuffled(3)}},
}

var compressions = []fixture.Compression{fixture.None, fixture.Gzip, fixture.Zstd, fixture.XZ}

// wantImage fails unless got is what an archive of want has to say, without a made manifest.
func wantImage(t *testing.T, got *Image, want *fixture.Image) {
	t.Helper()
	host := want.Host()
	if !bytes.Equal(got.Manifest, want.Manifest) || got.Digest != want.Digest ||
		!bytes.Equal(got.Instance, host.Manifest) || got.InstanceDigest() != host.Digest || got.IsList() != (host != want) {
		t.Errorf("manifest %s, instance %s, want %s, %s", got.Digest, got.InstanceDigest(), want.Digest, host.Digest)
	}
	wantLayers(t, got, host, func(l *fixture.Layer) Layer { return Layer{Digest: l.Digest, Size: l.Size, DiffID: l.DiffID} })
}

func wantLayers(t *testing.T, got *Image, host *fixture.Image, layer func(*fixture.Layer) Layer) {
	t.Helper()
	if !bytes.Equal(got.Config, host.Config) {
		t.Errorf("config %q, want %q", got.Config, host.Config)
	}
	var want []Layer
	for _, l := range host.Layers {
		want = append(want, layer(l))
	}
	if !slices.Equal(got.Layers, want) {
		t.Errorf("layers differ:\n got %v\nwant %v", got.Layers, want)
	}
	if len(got.Missing) != 0 {
		t.Errorf("%v are missing", got.Missing)
	}
	if n := int64(len(got.Manifest) + len(got.Config)); got.Bytes() < n {
		t.Errorf("takes %d bytes, has at least %d", got.Bytes(), n)
	}
}

// images have a layer twice, a layer of each compression, and one of them is a list.
func images(t *testing.T) map[string]*fixture.Image {
	t.Helper()
	a := text(t, "a")
	layers := []*fixture.Layer{
		a,
		newLayer(t, fixture.LayerSpec{Compression: fixture.Zstd, Entries: []fixture.Entry{{Name: "etc/b", Data: "b"}}}),
		a,
		newLayer(t, fixture.LayerSpec{Compression: fixture.None, Entries: []fixture.Entry{{Name: "etc/c", Data: "c"}}}),
	}
	other := newImage(t, fixture.ImageSpec{Arch: "mips64", Layers: []*fixture.Layer{a, text(t, "other")}})
	host := newImage(t, fixture.ImageSpec{OCI: true, Layers: layers})
	return map[string]*fixture.Image{
		"docker": imageOf(t, layers[0], layers[2], layers[3]), // it has no zstd
		"oci":    host,
		"list":   newList(t, fixture.ListSpec{OCI: true, Instances: []*fixture.Image{other, host}}),
		"empty":  imageOf(t),
	}
}

func TestVisit(t *testing.T) {
	signatures := [][]byte{[]byte("first"), []byte("second")}
	for name, img := range images(t) {
		for _, order := range orders {
			for _, c := range compressions {
				for _, format := range []fixture.Format{fixture.DirLayout, fixture.OCILayout} {
					for _, folder := range []bool{false, true} {
						if folder && (c != fixture.None || order.edits != nil) {
							continue // files have no order, and a folder is not compressed
						}
						if c > fixture.Gzip && c != fixture.None && order.name >= "shuffled 2" {
							continue // slow
						}
						t.Run(fmt.Sprintf("%s/%s/outer %d/format %d/folder %v", name, order.name, c, format, folder), func(t *testing.T) {
							a, of := stage(t, fixture.Stage{Format: format, Compression: c, Folder: folder, Edits: order.edits, Signatures: signatures}, repo, img)
							v := &taker{}
							got, err := a.Visit(t.Context(), of, v)
							must(t, err)
							wantImage(t, got, img)
							v.wantContent(t, got)
							if got != v.img || got.Of.Ref != of.Ref || got.Path != a.Path() {
								t.Errorf("image %p of %s at %s, want %p of %s at %s", got, got.Of.Ref, got.Path, v.img, of.Ref, a.Path())
							}
							// Reading metadata alone gives the same.
							meta, err := a.Image(t.Context(), of)
							must(t, err)
							wantImage(t, meta, img)
							if format == fixture.DirLayout {
								wantSignatures(t, got, signatures)
								wantSignatures(t, meta, signatures)
							}
						})
					}
				}
			}
		}
	}
}

func TestVisitDockerArchive(t *testing.T) {
	for name, img := range images(t) {
		var first []byte
		for _, order := range orders {
			for _, c := range compressions {
				for _, format := range []fixture.Format{fixture.DockerArchive, fixture.DockerLegacy} {
					for _, folder := range []bool{false, true} {
						if folder && (c != fixture.None || order.edits != nil || format == fixture.DockerLegacy) {
							continue
						}
						if c > fixture.Gzip && c != fixture.None && order.name >= "shuffled 2" {
							continue
						}
						t.Run(fmt.Sprintf("%s/%s/outer %d/format %d/folder %v", name, order.name, c, format, folder), func(t *testing.T) {
							a, of := stage(t, fixture.Stage{Format: format, Compression: c, Folder: folder, Edits: order.edits}, repo+":v1", img)
							v := &taker{}
							got, err := a.Visit(t.Context(), of, v)
							must(t, err)
							wantLayers(t, got, img.Host(), func(l *fixture.Layer) Layer {
								return Layer{Digest: l.DiffID, Size: l.UncompressedSize, DiffID: l.DiffID}
							})
							v.wantContent(t, got)
							if got.IsList() || got.Digest != digest.FromBytes(got.Manifest) || len(got.Signatures) != 0 {
								t.Errorf("got %+v", got)
							}
							if first == nil {
								first = got.Manifest
								wantMadeManifest(t, first, img.Host())
							}
							if !bytes.Equal(got.Manifest, first) {
								t.Errorf("manifest\n%s, in another order\n%s", got.Manifest, first)
							}
						})
					}
				}
			}
		}
	}
}

// wantMadeManifest compares with what skopeo makes of a docker-archive (containers/image, docker/internal/tarfile).
func wantMadeManifest(t *testing.T, got []byte, img *fixture.Image) {
	t.Helper()
	type descriptor struct {
		MediaType string        `json:"mediaType"`
		Size      int64         `json:"size"`
		Digest    digest.Digest `json:"digest"`
	}
	layers := []descriptor{}
	for _, l := range img.Layers {
		layers = append(layers, descriptor{"application/vnd.docker.image.rootfs.diff.tar.gzip", l.UncompressedSize, l.DiffID})
	}
	want, err := json.Marshal(struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}{2, "application/vnd.docker.distribution.manifest.v2+json", descriptor{"application/vnd.docker.container.image.v1+json", int64(len(img.Config)), img.ConfigDigest}, layers})
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("manifest\n%s, want\n%s", got, want)
	}
}

func wantSignatures(t *testing.T, got *Image, want [][]byte) {
	t.Helper()
	ok := len(got.Signatures) == len(want)
	for i, s := range got.Signatures {
		ok = ok && s.Instance == "" && s.Number == i+1 && bytes.Equal(s.Data, want[i])
	}
	if !ok {
		t.Errorf("signatures %+v, want %q", got.Signatures, want)
	}
}

// Signatures are those of the image's own folder, numbered from 1 without a gap; those of an instance say so.
func TestSignatures(t *testing.T) {
	img := imageOf(t, text(t, "a"))
	hex := img.Digest.Encoded()
	var edits []fixture.Edit
	for _, name := range []string{"signature-1", "signature-2", "signature-4", "signature-0", "signature-01", "signature-x", "signature-1000", "sub/signature-3", hex + ".signature-1", hex + ".signature-3"} {
		edits = append(edits, fixture.Append(fixture.File("image@sha256_"+hex+"/"+name, []byte(name))))
	}
	for _, order := range orders {
		a, of := stage(t, fixture.Stage{Edits: append(slices.Clone(edits), order.edits...)}, repo, img)
		got, err := a.Image(t.Context(), of)
		must(t, err)
		var names []string
		for _, s := range got.Signatures {
			name := fmt.Sprintf("signature-%d", s.Number)
			if s.Instance != "" {
				name = s.Instance.Encoded() + "." + name
			}
			if name != string(s.Data) {
				t.Errorf("%s: %q stands as %s", order.name, s.Data, name)
			}
			names = append(names, name)
		}
		if want := []string{"signature-1", "signature-2", hex + ".signature-1"}; !slices.Equal(names, want) {
			t.Errorf("%s: got %q, want %q", order.name, names, want)
		}
	}
}

// An archive is read no further than it takes, and a second time only where the order of its members demands it.
func TestVisitReadsLittle(t *testing.T) {
	large, large2, small := big(t, 1, maxHeld+mib), big(t, 2, maxHeld+mib), text(t, "small")
	img := imageOf(t, large, small, large2)
	all := []digest.Digest{large.Digest, small.Digest, large2.Digest}
	sorted := fixture.Sorted(func(x, y fixture.Member) int { return rankOf(all, x) - rankOf(all, y) })
	staged := map[string]string{} // folders, by order and compression
	for _, order := range orders[1:3] {
		for _, c := range []fixture.Compression{fixture.None, fixture.Gzip} {
			dir := t.TempDir()
			_, err := fixture.Stage{Compression: c, Edits: append([]fixture.Edit{sorted}, order.edits...)}.Write(dir, img.Ref(repo), img)
			must(t, err)
			staged[fmt.Sprint(order.name, c)] = dir
		}
	}
	type part struct{ low, high float64 } // of the archive's bytes
	for _, tt := range []struct {
		name        string
		order       string
		v           *taker
		plain, gzip part // a plain tar is sought in, a compressed one has to be read up to what is wanted
		visits      int
	}{
		{"nothing wanted", "manifest first", &taker{none: true}, part{0, 0.1}, part{0.9, 1.1}, 0}, // signatures may come last
		{"all wanted", "manifest first", &taker{}, part{0.9, 1.1}, part{0.9, 1.1}, 3},
		{"one wanted", "manifest first", &taker{none: true, known: []digest.Digest{large.Digest}}, part{0.4, 0.6}, part{0.9, 1.1}, 1},
		{"nothing wanted", "manifest last", &taker{none: true}, part{0, 0.1}, part{0.9, 1.1}, 0},
		{"all known", "manifest last", &taker{known: all}, part{0.9, 1.1}, part{0.9, 1.1}, 3},
		{"one known and wanted", "manifest last", &taker{none: true, known: []digest.Digest{large2.Digest}}, part{0.4, 0.6}, part{0.9, 1.1}, 1},
		{"nothing known", "manifest last", &taker{}, part{0.9, 1.1}, part{1.9, 2.1}, 3},
		{"one known", "manifest last", &taker{known: []digest.Digest{large2.Digest}}, part{0.9, 1.1}, part{1.4, 1.6}, 3},
	} {
		for c, want := range map[fixture.Compression]part{fixture.None: tt.plain, fixture.Gzip: tt.gzip} {
			t.Run(fmt.Sprintf("%s/%s/outer %d", tt.order, tt.name, c), func(t *testing.T) {
				v := &taker{none: tt.v.none, known: tt.v.known}
				a, of := find(t, staged[fmt.Sprint(tt.order, c)], img.Ref(repo))
				got, err := a.Visit(t.Context(), of, v)
				must(t, err)
				if read := float64(a.BytesRead()) / float64(a.Size); read < want.low || read > want.high {
					t.Errorf("read %.2f times the archive, want %.1f to %.1f", read, want.low, want.high)
				}
				if a.part.BytesRead() != a.BytesRead() {
					t.Errorf("the partition says that %d bytes were read, the archive %d", a.part.BytesRead(), a.BytesRead())
				}
				if v.visits != tt.visits || len(got.Missing) != 0 {
					t.Errorf("%d visits, %v missing, want %d", v.visits, got.Missing, tt.visits)
				}
				if !tt.v.none {
					v.wantContent(t, got)
				}
			})
		}
	}
}

// Where there can be no signatures, nothing is read after the last layer that is wanted.
func TestVisitStopsEarly(t *testing.T) {
	img := imageOf(t, text(t, "x"), big(t, 1, maxHeld+1))
	for _, c := range []fixture.Compression{fixture.None, fixture.Gzip} {
		a, of := stage(t, fixture.Stage{Format: fixture.OCILayout, Compression: c, Edits: []fixture.Edit{
			fixture.Sorted(func(x, y fixture.Member) int { return int(x.Size - y.Size) }), fixture.ManifestFirst,
		}}, repo, img)
		_, err := a.Image(t.Context(), of)
		must(t, err)
		if read := float64(a.BytesRead()) / float64(a.Size); read > 0.1 {
			t.Errorf("outer %d: read %.2f times the archive", c, read)
		}
	}
}

// rankOf sorts what is small ahead of the layers, and these in their order.
func rankOf(all []digest.Digest, m fixture.Member) int {
	return slices.IndexFunc(all, func(d digest.Digest) bool { return filepath.Base(m.Name) == d.Encoded() })
}

// What is known to be needed is handed over before the manifest is seen, wherever that is; and only once.
func TestVisitKnown(t *testing.T) {
	large := big(t, 3, maxHeld+1)
	img := imageOf(t, text(t, "base"), large, large)
	a, of := stage(t, fixture.Stage{Edits: []fixture.Edit{fixture.ManifestLast}}, repo, img)
	v := &taker{known: []digest.Digest{large.Digest}}
	got, err := a.Visit(t.Context(), of, v)
	must(t, err)
	v.wantContent(t, got)
	if len(v.order) == 0 || v.order[0] != large.Digest.String() {
		t.Errorf("order %q, want %s first", v.order, large.Digest)
	}
}

// Several large instances whose manifests come last: what belongs to the others is never visited.
func TestVisitForeignInstances(t *testing.T) {
	var instances []*fixture.Image
	for i, arch := range []string{"mips64", "", "loong64"} {
		instances = append(instances, newImage(t, fixture.ImageSpec{Arch: arch, Layers: []*fixture.Layer{big(t, uint64(10+i), maxHeld+1), text(t, arch)}}))
	}
	img := newList(t, fixture.ListSpec{Instances: instances})
	a, of := stage(t, fixture.Stage{Compression: fixture.None, Edits: []fixture.Edit{fixture.ManifestLast}}, repo, img)
	v := &taker{}
	got, err := a.Visit(t.Context(), of, v)
	must(t, err)
	wantImage(t, got, img)
	v.wantContent(t, got)
}

// A layer that is not in the archive is told, once it has been read to its end.
func TestVisitMissing(t *testing.T) {
	x, y := text(t, "x"), text(t, "y")
	img := imageOf(t, x, y)
	for _, order := range orders {
		edits := append([]fixture.Edit{fixture.Drop(x.Digest.Encoded())}, order.edits...)
		a, of := stage(t, fixture.Stage{Edits: edits}, repo, img)
		v := &taker{}
		got, err := a.Visit(t.Context(), of, v)
		must(t, err)
		if !slices.Equal(got.Missing, []digest.Digest{x.Digest}) || len(v.got) != 1 {
			t.Errorf("%s: missing %v, took %d", order.name, got.Missing, len(v.got))
		}
	}
}

// An error of the visitor ends the visit and comes back as it is: whether it has a reason is not for the archive to say.
func TestVisitorFails(t *testing.T) {
	img := imageOf(t, text(t, "a"), text(t, "b"))
	for _, err := range []error{fault(NoSpace, "full"), errors.New("store"), io.ErrUnexpectedEOF, tar.ErrHeader, &os.PathError{Op: "write", Err: syscall.EIO}} {
		for _, order := range orders {
			a, of := stage(t, fixture.Stage{Edits: order.edits}, repo, img)
			v := &taker{unpack: func(*Blob) ([]byte, error) { return nil, err }}
			_, got := a.Visit(t.Context(), of, v)
			if !errors.Is(got, err) || ReasonOf(got) != ReasonOf(err) || v.visits != 1 {
				t.Errorf("%s, visit fails with %v: got %v (%q) after %d visits", order.name, err, got, ReasonOf(got), v.visits)
			}
			v = &taker{unpack: func(b *Blob) ([]byte, error) {
				return nil, b.Unpack(t.Context(), func(io.Reader, Compression) error { return err })
			}}
			if _, got := a.Visit(t.Context(), of, v); !errors.Is(got, err) || ReasonOf(got) != ReasonOf(err) {
				t.Errorf("%s, unpacking fails with %v: got %v (%q)", order.name, err, got, ReasonOf(got))
			}
			r := &refusing{err: err}
			if _, got := a.Visit(t.Context(), of, r); !errors.Is(got, err) || ReasonOf(got) != ReasonOf(err) || r.visits != 0 {
				t.Errorf("%s, resolved fails with %v: got %v (%q) after %d visits", order.name, err, got, ReasonOf(got), r.visits)
			}
		}
	}
}

// refusing is a visitor that does not want the image.
type refusing struct {
	taker
	err error
}

func (r *refusing) Resolved(*Image) error { return r.err }

// A file that grows while it is read does not change what its tar says.
func TestFolderGrows(t *testing.T) {
	l := text(t, "a")
	img := imageOf(t, l)
	a, of := stage(t, fixture.Stage{Folder: true}, repo, img)
	blob := filepath.Join(a.Path(), l.Digest.Encoded())
	v := &taker{unpack: func(b *Blob) ([]byte, error) {
		f, err := os.OpenFile(blob, os.O_APPEND|os.O_WRONLY, 0)
		must(t, err)
		_, err = f.Write([]byte("more"))
		must(t, err)
		must(t, f.Close())
		return plain(t.Context(), b)
	}}
	got, err := a.Visit(t.Context(), of, v)
	must(t, err)
	v.wantContent(t, got)
	_, err = a.Visit(t.Context(), of, &taker{})
	wantReason(t, err, DigestMismatch)
}
