package archive

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/precache/precache-agent/internal/fixture"
)

// enough is the memory, in bytes, that one archive may take, whatever its headers claim: metadata
// that is kept (4*heldInAll), a few small windows, and what the collector has not seen yet.
const enough = 128 << 20

// wantBad fails unless reading and verifying an archive both fail with the reason, in bounded memory.
func wantBad(t *testing.T, path, ref string, want Reason) {
	t.Helper()
	dir := filepath.Dir(path)
	a, of := find(t, dir, ref)
	inTime := func() context.Context { // reasonable, on a busy machine with the race detector
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		t.Cleanup(cancel)
		return ctx
	}
	var err error
	if n := peak(func() { _, err = a.Visit(inTime(), of, &taker{}) }); n > enough {
		t.Errorf("reading took %d MiB", n>>20)
	}
	wantReason(t, err, want)
	var errs []error
	if n := peak(func() { errs = a.Verify(inTime(), of) }); n > enough {
		t.Errorf("verifying took %d MiB", n>>20)
	}
	if len(errs) == 0 || !slices.ContainsFunc(errs, func(err error) bool { return ReasonOf(err) == want }) {
		t.Errorf("verify: %v, want %q", errs, want)
	}
	for _, err := range errs {
		if ReasonOf(err) == "" || strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("verify: %q has reason %q", err, ReasonOf(err))
		}
	}
}

func replace(old, new string) func([]byte) []byte {
	return func(b []byte) []byte {
		if !bytes.Contains(b, []byte(old)) {
			panic("no " + old + " in " + string(b))
		}
		return bytes.ReplaceAll(b, []byte(old), []byte(new))
	}
}

// editManifest changes a manifest as a v1.Manifest.
func editManifest(t *testing.T, f func(*v1.Manifest)) func([]byte) []byte {
	return func(b []byte) []byte {
		var m v1.Manifest
		must(t, json.Unmarshal(b, &m))
		f(&m)
		b, err := json.Marshal(m)
		must(t, err)
		return b
	}
}

func setBytes(s string) func([]byte) []byte { return func([]byte) []byte { return []byte(s) } }

// What a manifest and a config may say.
func TestHostileMetadata(t *testing.T) {
	x, y := text(t, "x"), text(t, "y")
	sha512 := digest.SHA512.FromString("x").String()
	layerType := func(mediaType string) fixture.ImageSpec {
		l := *x
		l.MediaType = mediaType
		return fixture.ImageSpec{Layers: []*fixture.Layer{&l, y}}
	}
	manifest := func(f func([]byte) []byte) fixture.ImageSpec {
		return fixture.ImageSpec{Layers: []*fixture.Layer{x, y}, EditManifest: f}
	}
	config := func(f func([]byte) []byte) fixture.ImageSpec {
		return fixture.ImageSpec{Layers: []*fixture.Layer{x, y}, EditConfig: f}
	}
	edit := func(f func(*v1.Manifest)) fixture.ImageSpec { return manifest(editManifest(t, f)) }
	many := func(n int) (ids []digest.Digest) {
		for i := range n {
			ids = append(ids, digest.FromString(fmt.Sprint(i)))
		}
		return ids
	}
	for _, tt := range []struct {
		name string
		spec fixture.ImageSpec
		want Reason
	}{
		{"schema 1", manifest(setBytes(`{"schemaVersion":1,"name":"a","fsLayers":[{"blobSum":"` + x.Digest.String() + `"}],"history":[{}]}`)), Unsupported},
		{"schema 1, signed", manifest(setBytes(`{"schemaVersion":1,"mediaType":"application/vnd.docker.distribution.manifest.v1+prettyjws","fsLayers":[],"signatures":[]}`)), Unsupported},
		{"schema 1 by its fields", manifest(setBytes(`{"fsLayers":[]}`)), Unsupported},
		{"schema 1 by its type", manifest(setBytes(`{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v1+json"}`)), Unsupported},
		{"schema 3", manifest(replace(`"schemaVersion":2`, `"schemaVersion":3`)), CorruptArchive},
		{"no schema", manifest(replace(`"schemaVersion":2,`, ``)), CorruptArchive},
		{"unknown manifest", manifest(replace("manifest.v2+json", "manifest.v7+json")), Unsupported},
		{"empty", manifest(setBytes("")), CorruptArchive},
		{"no JSON", manifest(setBytes("manifest")), CorruptArchive},
		{"half of it", manifest(func(b []byte) []byte { return b[:len(b)/2] }), CorruptArchive},
		{"two of it", manifest(func(b []byte) []byte { return append(b, b...) }), CorruptArchive},
		{"null", manifest(setBytes("null")), CorruptArchive},
		{"a number", manifest(setBytes("2")), CorruptArchive},
		{"deep", manifest(setBytes(strings.Repeat(`{"config":`, 20000))), CorruptArchive},
		{"an empty object", manifest(setBytes("{}")), CorruptArchive},
		{"an image and a list", manifest(replace(`"layers":`, `"manifests":[],"layers":`)), CorruptArchive},
		{"a list with layers", manifest(replace("manifest.v2+json", "manifest.list.v2+json")), CorruptArchive},
		{"no config", manifest(replace(`"config":`, `"konfig":`)), CorruptArchive},
		{"empty config descriptor", manifest(replace(`"config":`, `"config":{},"konfig":`)), CorruptArchive},
		{"wrong types", manifest(replace(`"layers":[`, `"layers":[7,`)), CorruptArchive},
		{"huge number", manifest(replace(fmt.Sprintf(`"size":%d`, y.Size), `"size":1e300`)), CorruptArchive},
		{"too large", manifest(func(b []byte) []byte { return append(b, bytes.Repeat([]byte(" "), maxMetadata)...) }), Unsupported},
		{"10,000 layers", edit(func(m *v1.Manifest) {
			m.Layers = slices.Repeat(m.Layers, 5000)
		}), Unsupported},
		{"one layer too many", edit(func(m *v1.Manifest) { m.Layers = slices.Repeat(m.Layers[:1], maxLayers+1) }), Unsupported},
		{"config of 1 GB", edit(func(m *v1.Manifest) { m.Config.Size = 1 << 30 }), Unsupported},
		{"config of no kind", edit(func(m *v1.Manifest) { m.Config.MediaType = "" }), Unsupported},
		{"an artifact", edit(func(m *v1.Manifest) { m.Config.MediaType = v1.MediaTypeEmptyJSON }), Unsupported},
		{"a helm chart", edit(func(m *v1.Manifest) { m.Config.MediaType = "application/vnd.cncf.helm.config.v1+json" }), Unsupported},
		{"config larger", edit(func(m *v1.Manifest) { m.Config.Size++ }), DigestMismatch},
		{"config of negative size", edit(func(m *v1.Manifest) { m.Config.Size = -1 }), CorruptArchive},
		{"config without digest", edit(func(m *v1.Manifest) { m.Config.Digest = "" }), CorruptArchive},
		{"config with a sha512 digest", edit(func(m *v1.Manifest) { m.Config.Digest = digest.Digest(sha512) }), Unsupported},
		{"config that leaves", edit(func(m *v1.Manifest) { m.Config.Digest = "sha256:../../../etc/passwd" }), CorruptArchive},
		{"config that is not there", edit(func(m *v1.Manifest) { m.Config.Digest = digest.FromString("x") }), CorruptArchive},
		{"layer without digest", edit(func(m *v1.Manifest) { m.Layers[1].Digest = "" }), CorruptArchive},
		{"layer with half a digest", edit(func(m *v1.Manifest) { m.Layers[1].Digest = m.Layers[1].Digest[:40] }), CorruptArchive},
		{"layer with an upper-case digest", edit(func(m *v1.Manifest) {
			m.Layers[1].Digest = digest.Digest("sha256:" + strings.ToUpper(m.Layers[1].Digest.Encoded()))
		}), CorruptArchive},
		{"layer with a sha512 digest", edit(func(m *v1.Manifest) { m.Layers[1].Digest = digest.Digest(sha512) }), Unsupported},
		{"layer of negative size", edit(func(m *v1.Manifest) { m.Layers[1].Size = -1 }), CorruptArchive},
		{"layer smaller than it says", edit(func(m *v1.Manifest) { m.Layers[1].Size++ }), DigestMismatch},
		{"layer larger than it says", edit(func(m *v1.Manifest) { m.Layers[1].Size-- }), DigestMismatch},
		{"layer of no size", edit(func(m *v1.Manifest) { m.Layers[1].Size = 0 }), DigestMismatch},
		{"layer of 8 EiB", edit(func(m *v1.Manifest) { m.Layers[1].Size = 1<<63 - 1 }), DigestMismatch},
		{"foreign layer", layerType("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), Unsupported},
		{"foreign layer, OCI", layerType("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"), Unsupported},
		{"encrypted layer", layerType(v1.MediaTypeImageLayerGzip + "+encrypted"), Unsupported},
		{"zstd layer in a docker manifest", layerType("application/vnd.docker.image.rootfs.diff.tar.zstd"), Unsupported}, // as for containers/image
		{"layer of unknown kind", layerType("application/x-tar"), Unsupported},
		{"layer of no kind", edit(func(m *v1.Manifest) { m.Layers[0].MediaType = "" }), Unsupported},
		{"config with a layer more", fixture.ImageSpec{Layers: []*fixture.Layer{x, y}, DiffIDs: []digest.Digest{x.DiffID, y.DiffID, x.DiffID}}, CorruptArchive},
		{"config with a layer less", fixture.ImageSpec{Layers: []*fixture.Layer{x, y}, DiffIDs: []digest.Digest{x.DiffID}}, CorruptArchive},
		{"config with 10,000 layers", fixture.ImageSpec{Layers: []*fixture.Layer{x, y}, DiffIDs: many(10000)}, Unsupported},
		{"config with two diffIDs for a layer", fixture.ImageSpec{Layers: []*fixture.Layer{x, x}, DiffIDs: many(2)}, CorruptArchive},
		{"config with half a diffID", fixture.ImageSpec{Layers: []*fixture.Layer{x}, DiffIDs: []digest.Digest{x.DiffID[:40]}}, CorruptArchive},
		{"config with a sha512 diffID", fixture.ImageSpec{Layers: []*fixture.Layer{x}, DiffIDs: []digest.Digest{digest.Digest(sha512)}}, Unsupported},
		{"config is empty", config(setBytes("")), CorruptArchive},
		{"config is no JSON", config(setBytes("config")), CorruptArchive},
		{"config is null", config(setBytes("null")), CorruptArchive},
		{"config without rootfs", config(replace(`"rootfs":`, `"footfs":`)), CorruptArchive},
		{"config of another kind", config(replace(`"diff_ids":[`, `"diff_ids":[7,`)), CorruptArchive},
	} {
		for i, format := range []fixture.Format{fixture.DirLayout, fixture.OCILayout} {
			t.Run(fmt.Sprintf("%s/format %d", tt.name, format), func(t *testing.T) {
				img := newImage(t, tt.spec)
				ref := img.Ref(repo)
				path, err := fixture.Stage{Format: format, Compression: fixture.None, Edits: orders[1+i].edits}.Write(t.TempDir(), ref, img)
				must(t, err)
				wantBad(t, path, ref, tt.want)
			})
		}
	}
}

// As many layers as can be stacked are read.
func TestManyLayers(t *testing.T) {
	var layers []*fixture.Layer
	for i := range maxLayers {
		layers = append(layers, text(t, fmt.Sprint(i)))
	}
	a, of := stage(t, fixture.Stage{Edits: []fixture.Edit{fixture.Shuffled(1)}}, repo, imageOf(t, layers...))
	v := &taker{}
	img, err := a.Visit(t.Context(), of, v)
	must(t, err)
	v.wantContent(t, img)
}

// What a member may be, among those of a good image.
func TestHostileMembers(t *testing.T) {
	x := text(t, "x")
	blob, err := x.Open()
	must(t, err)
	b, err := io.ReadAll(blob)
	must(t, err)
	img := imageOf(t, x)
	good := []header{
		{name: x.Digest.Encoded(), data: b},
		{name: img.ConfigDigest.Encoded(), data: img.Config},
	}
	manifest := header{name: "manifest.json", data: img.Manifest}
	claim := fmt.Sprintf("%011o", 1<<30)
	hex := strings.Repeat("a", 64)
	repeat := func(n int, f func(i int) []header) (hs []header) {
		for i := range n {
			hs = append(hs, f(i)...)
		}
		return hs
	}
	zeros, small := make([]byte, heldInAll/2), pack(t, fixture.Gzip, 0, []byte("x"))
	for _, tt := range []struct {
		name string
		bad  []header
		cut  bool // the archive ends there
		want Reason
	}{
		{name: "manifest of 1 GB", bad: []header{{name: "manifest.json", size: claim}}, cut: true, want: Unsupported},
		{name: "index of 1 GB", bad: []header{{name: "index.json", size: claim}}, cut: true, want: Unsupported},
		{name: "instance of 1 GB", bad: []header{{name: hex + ".manifest.json", size: claim}}, cut: true, want: Unsupported},
		{name: "signature of 1 GB", bad: []header{{name: "signature-1", size: claim}}, cut: true, want: Unsupported},
		{name: "blob of 1 GB", bad: []header{{name: hex, size: claim}}, cut: true, want: CorruptArchive},
		{name: "something of 1 GB", bad: []header{{name: "something", size: claim}}, cut: true, want: CorruptArchive},
		{name: "blob of 3 MiB that is not there", bad: []header{{name: hex, size: fmt.Sprintf("%011o", 3<<20)}}, cut: true, want: CorruptArchive},
		{name: "many signatures", bad: repeat(maxSignatures+1, func(i int) []header {
			return []header{{name: fmt.Sprintf("signature-%d", i+1)}}
		}), want: Unsupported},
		{name: "many large signatures", bad: repeat(3, func(i int) []header {
			return []header{{name: fmt.Sprintf("signature-%d", i+1), data: zeros}}
		}), want: Unsupported},
		{name: "many large instances", bad: repeat(3, func(i int) []header {
			return []header{{name: fmt.Sprintf("%064x.manifest.json", i), data: zeros}}
		}), want: Unsupported},
		{name: "signatures in many folders", bad: repeat(3, func(i int) []header {
			return []header{{name: fmt.Sprintf("%d/signature-1", i), data: zeros}}
		}), want: Unsupported},
		{name: "too many members", bad: repeat(maxMembers, func(i int) []header {
			return []header{{name: fmt.Sprint(i)}}
		}), want: Unsupported},
		{name: "many compressed members", bad: repeat(2000, func(i int) []header {
			return []header{{name: fmt.Sprint(i), data: small}}
		}), cut: true, want: CorruptArchive},
		{name: "too many links", bad: repeat(maxMembers, func(i int) []header {
			return []header{{name: fmt.Sprint(i), kind: '2', link: "x"}}
		}), want: Unsupported},
		{name: "name of 100 KB", bad: []header{{name: "long", kind: 'L', data: append(bytes.Repeat([]byte("a"), 100<<10), 0)}, {name: "a"}}, want: CorruptArchive},
		{name: "name of 100 KB, pax", bad: []header{pax("path=" + strings.Repeat("a", 100<<10)), {name: "a"}}, want: CorruptArchive},
		{name: "names of 1 MiB of folders", bad: repeat(3, func(i int) []header {
			return []header{{name: "long", kind: 'L', data: append(bytes.Repeat([]byte("a"), 1000<<10), 0)}, {name: "a", kind: '5'}}
		}), want: CorruptArchive},
		{name: "many links of 1 MiB", bad: repeat(3, func(i int) []header {
			return []header{{name: "long", kind: 'K', data: append(bytes.Repeat([]byte("a"), 1000<<10), 0)}, {name: fmt.Sprint(i), kind: '2'}}
		}), want: CorruptArchive},
		{name: "header of 100 MB", bad: []header{{name: "pax", kind: 'x', size: fmt.Sprintf("%011o", 100<<20)}}, cut: true, want: CorruptArchive},
		{name: "many global headers", bad: repeat(10, func(i int) []header {
			return []header{{name: "g", kind: 'g', data: pax("comment=" + strings.Repeat("a", 500<<10)).data}}
		}), cut: true, want: CorruptArchive},
		{name: "negative size", bad: []header{{name: "a", size: base256(-1)}}, want: CorruptArchive},
		{name: "very negative size", bad: []header{{name: "a", size: base256(-1 << 62)}}, want: CorruptArchive},
		{name: "negative size, pax", bad: []header{pax("size=-1"), {name: "a"}}, want: CorruptArchive},
		{name: "largest size", bad: []header{{name: "a", size: base256(1<<63 - 1)}}, want: CorruptArchive},
		{name: "size without an end", bad: []header{{name: "a", size: "777777777777"}}, want: CorruptArchive},
		{name: "size that is no number", bad: []header{{name: "a", size: "9z9z"}}, want: CorruptArchive},
		{name: "size of 8 GB", bad: []header{{name: "a", size: "77777777777\x00"}}, want: CorruptArchive},
		{name: "sparse, GNU", bad: []header{{name: "a", kind: 'S'}}, want: Unsupported},
		{name: "sparse, pax 0.1", bad: []header{pax("GNU.sparse.numblocks=1", "GNU.sparse.map=0,1", "GNU.sparse.size=1073741824"), {name: "a", data: []byte("x")}}, want: Unsupported},
		{name: "sparse, pax 1.0", bad: []header{pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=a", "GNU.sparse.realsize=1073741824"), {name: "a", data: append([]byte("1\n1073741823\n1\n"), make([]byte, 498)...)}}, want: Unsupported},
		{name: "sparse manifest", bad: []header{pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=manifest.json", "GNU.sparse.realsize=4000000"), {name: "a", data: append([]byte("1\n3999999\n1\n"), make([]byte, 501)...)}}, want: Unsupported},
		{name: "hard link", bad: []header{{name: "a", kind: '1', link: x.Digest.Encoded()}}, want: Unsupported},
		{name: "hard link for a blob", bad: []header{{name: hex, kind: '1', link: "/etc/shadow"}}, want: Unsupported},
		{name: "character device", bad: []header{{name: "a", kind: '3'}}, want: Unsupported},
		{name: "block device", bad: []header{{name: "a", kind: '4'}}, want: Unsupported},
		{name: "fifo", bad: []header{{name: "a", kind: '6'}}, want: Unsupported},
		{name: "contiguous file", bad: []header{{name: "a", kind: '7'}}, want: Unsupported},
		{name: "unknown type", bad: []header{{name: "a", kind: 'Z'}}, want: Unsupported},
		{name: "duplicate", bad: []header{{name: "a"}, {name: "a"}}, want: CorruptArchive},
		{name: "duplicate blob", bad: []header{good[0]}, want: CorruptArchive},
		{name: "duplicate under another spelling", bad: []header{{name: "./" + x.Digest.Encoded(), data: b}}, want: CorruptArchive},
		{name: "link in place of a file", bad: []header{{name: img.ConfigDigest.Encoded(), kind: '2', link: "a"}}, want: CorruptArchive},
		{name: "above", bad: []header{{name: "../a"}}, want: CorruptArchive},
		{name: "above, in the middle", bad: []header{{name: "a/../../b"}}, want: CorruptArchive},
		{name: "above, at the end", bad: []header{{name: "a/.."}}, want: CorruptArchive},
		{name: "above, a folder", bad: []header{{name: "../a/", kind: '5'}}, want: CorruptArchive},
		{name: "above, pax", bad: []header{pax("path=../a"), {name: "a"}}, want: CorruptArchive},
		{name: "absolute", bad: []header{{name: "/etc/passwd"}}, want: CorruptArchive},
		{name: "zero in a name", bad: []header{pax("path=a\x00b"), {name: "a"}}, want: CorruptArchive},
		{name: "broken pax", bad: []header{{name: "pax", kind: 'x', data: []byte("7 a=b")}, {name: "a"}}, want: CorruptArchive},
		{name: "broken checksum", bad: []header{{name: "a", size: "\x00\x00\x00\x00", link: strings.Repeat("\xff", 40), kind: 0xff}}, want: Unsupported},
	} {
		for _, c := range []fixture.Compression{fixture.None, fixture.Gzip} {
			if c == fixture.Gzip && len(tt.bad) > 20 {
				continue // it takes long
			}
			t.Run(fmt.Sprintf("%s/outer %d", tt.name, c), func(t *testing.T) {
				members := append(slices.Clone(good), tt.bad...)
				if !tt.cut {
					members = append(members, manifest)
				}
				path := filepath.Join(t.TempDir(), "image_raw.tar")
				must(t, os.WriteFile(path, pack(t, c, 0, rawTar(!tt.cut, members...)), 0o644))
				wantBad(t, path, repo+":raw", tt.want)
			})
		}
	}
}

// What an archive may be that is none.
func TestHostileArchives(t *testing.T) {
	large := noise(1, 1<<20)
	for _, tt := range []struct {
		name string
		data []byte
	}{
		{"nothing", nil},
		{"a byte", []byte{0}},
		{"zeros", make([]byte, 512)},
		{"the end of a tar", make([]byte, 1024)},
		{"many zeros", make([]byte, 3<<20)},
		{"text", []byte(strings.Repeat("text\n", 1000))},
		{"noise", large},
		{"an empty gzip", pack(t, fixture.Gzip, 0, nil)},
		{"an empty zstd", pack(t, fixture.Zstd, 0, nil)},
		{"an empty xz", pack(t, fixture.XZ, 0, nil)},
		{"noise in gzip", pack(t, fixture.Gzip, 0, large)},
		{"noise in zstd", pack(t, fixture.Zstd, 0, large)},
		{"gzip in gzip", pack(t, fixture.Gzip, 0, pack(t, fixture.Gzip, 0, tarOf("manifest.json", "{}")))},
		{"the head of a gzip", []byte{0x1f, 0x8b, 8}},
		{"the head of a zstd", []byte{0x28, 0xb5, 0x2f, 0xfd}},
		{"the head of a xz", []byte{0xfd, '7', 'z', 'X', 'Z', 0}},
		{"noise behind the head of a gzip", append([]byte{0x1f, 0x8b, 8}, large...)},
		{"noise behind the head of a zstd", append([]byte{0x28, 0xb5, 0x2f, 0xfd}, large...)},
		{"noise behind the head of a xz", append([]byte{0xfd, '7', 'z', 'X', 'Z', 0}, large...)},
		{"only folders", rawTar(true, header{name: "a/", kind: '5'}, header{name: "a/b/", kind: '5'})},
		{"only a global header", rawTar(true, header{name: "g", kind: 'g', data: pax("comment=x").data})},
		{"no manifest", tarOf("a", "b", "version", "Directory Transport Version: 1.1\n")},
		{"an empty manifest", tarOf("manifest.json", "")},
		{"an empty index", tarOf("index.json", "")},
		{"a broken index", tarOf("index.json", "{")},
		{"a manifest that is a link", rawTar(true, header{name: "manifest.json", kind: '2', link: "/etc/passwd"})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image_raw.tar")
			must(t, os.WriteFile(path, tt.data, 0o644))
			wantBad(t, path, repo+":raw", CorruptArchive)
		})
	}
}

// A config that is larger than its descriptor says, and larger than is read.
func TestLargeConfig(t *testing.T) {
	img := imageOf(t, text(t, "x"))
	path := filepath.Join(t.TempDir(), "image_raw.tar")
	const size = 256 << 20
	before := rawTar(false, header{name: "manifest.json", data: img.Manifest}, header{name: img.ConfigDigest.Encoded(), size: fmt.Sprintf("%011o", size)})
	must(t, os.WriteFile(path, before, 0o644))
	must(t, os.Truncate(path, int64(len(before))+size)) // a hole
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	_, err = f.Write(make([]byte, 1024))
	must(t, err)
	must(t, f.Close())
	wantBad(t, path, repo+":raw", Unsupported)
}

// Of what may be a config, only a little is kept until it is known what it is.
func TestManyLayersThatMayBeConfigs(t *testing.T) {
	img := imageOf(t, text(t, "x"))
	var members []fixture.Edit
	for i := range 16 {
		members = append(members, fixture.Append(fixture.File(fmt.Sprintf("%s/%064x", fixture.Name(img.Ref(repo)), i), make([]byte, maxHeld))))
	}
	a, of := stage(t, fixture.Stage{Compression: fixture.None, Edits: append(members, fixture.ManifestLast)}, repo, img)
	for name, f := range map[string]func(){
		"visit":  func() { _, err := take(t, a, of); must(t, err) },
		"verify": func() { must(t, errors.Join(a.Verify(t.Context(), of)...)) },
	} {
		if n := peak(f); n > 32<<20 {
			t.Errorf("%s takes %d MiB", name, n>>20)
		}
	}
}

// However many members an archive has, and however large its manifest is, it is read in a reasonable time.
func TestManyMembersLargeManifest(t *testing.T) {
	img := newImage(t, fixture.ImageSpec{Layers: []*fixture.Layer{text(t, "x")}, EditManifest: func(b []byte) []byte {
		annotations := bytes.Repeat([]byte(`"annotations":{"a":"b"},`), (maxMetadata-len(b))/24)
		return append(append([]byte("{"), annotations...), b[1:]...)
	}})
	members := []header{{name: "manifest.json", data: img.Manifest}}
	for i := range maxMembers - 10 {
		members = append(members, header{name: fmt.Sprint(i)})
	}
	path := filepath.Join(t.TempDir(), "image_raw.tar")
	must(t, os.WriteFile(path, rawTar(true, members...), 0o644))
	wantBad(t, path, repo+":raw", CorruptArchive) // not context.DeadlineExceeded
}

// What follows the end of the tar is tolerated up to a limit, so that nobody hides a gigabyte there.
func TestTail(t *testing.T) {
	img := imageOf(t, text(t, "x"))
	for _, c := range []fixture.Compression{fixture.None, fixture.Gzip} {
		for n, want := range map[int]Reason{0: "", 1: "", maxTail / 2: "", maxTail * 2: CorruptArchive} {
			a, of := stage(t, fixture.Stage{Compression: fixture.None, Edits: []fixture.Edit{fixture.ManifestLast}}, repo, img)
			path := filepath.Join(a.part.Path, a.Name)
			b, err := os.ReadFile(path)
			must(t, err)
			must(t, os.WriteFile(path, pack(t, c, 0, append(b, noise(1, n)...)), 0o644))
			if errs := a.Verify(t.Context(), of); want == "" && len(errs) != 0 || want != "" && (len(errs) != 1 || ReasonOf(errs[0]) != want) {
				t.Errorf("%d bytes, outer %d: verify: %v, want %q", n, c, errs, want)
			}
			if got, err := take(t, a, of); err != nil { // it may have had enough before
				wantReason(t, err, want)
			} else {
				wantImage(t, got, img)
			}
		}
	}
}
