package archive

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/ulikunitz/xz"

	"github.com/precache/precache-agent/internal/fixture"
)

// editIndex changes a list before its digest is taken.
func editIndex(t *testing.T, f func(*v1.Index)) func([]byte) []byte {
	t.Helper()
	return func(b []byte) []byte {
		var index v1.Index
		must(t, json.Unmarshal(b, &index))
		f(&index)
		b, err := json.Marshal(index)
		must(t, err)
		return b
	}
}

func TestChoose(t *testing.T) {
	here := runtime.GOARCH
	zstdOn := map[string]string{zstdAnnotation: "true"}
	type instance struct {
		os, arch, variant string
		annotations       map[string]string
	}
	best := variants(here)[0]
	for _, tt := range []struct {
		name string
		list []instance
		want int // -1: none
	}{
		{"none", nil, -1},
		{"only one", []instance{{"linux", here, best, nil}}, 0},
		{"not the first", []instance{{"linux", "mips64", "", nil}, {"linux", here, best, nil}}, 1},
		{"first of two", []instance{{"linux", here, best, nil}, {"linux", here, best, nil}}, 0},
		{"zstd of two", []instance{{"linux", here, best, nil}, {"linux", here, best, zstdOn}}, 1},
		{"first zstd of two", []instance{{"linux", here, best, zstdOn}, {"linux", here, best, zstdOn}}, 0},
		{"gzip after zstd", []instance{{"linux", here, best, zstdOn}, {"linux", here, best, nil}}, 0},
		{"annotation without meaning", []instance{{"linux", here, best, nil}, {"linux", here, best, map[string]string{zstdAnnotation: "false"}}}, 0},
		{"another system", []instance{{"windows", here, best, nil}}, -1},
		{"another machine", []instance{{"linux", "mips64", "", nil}}, -1},
		{"another variant", []instance{{"linux", here, "v99", nil}}, -1},
		{"no platform", []instance{{}}, -1},
	} {
		var descs []v1.Descriptor
		for i, in := range tt.list {
			d := v1.Descriptor{Digest: digest.FromString(fmt.Sprint(i)), Annotations: in.annotations}
			if in.os != "" {
				d.Platform = &v1.Platform{OS: in.os, Architecture: in.arch, Variant: in.variant}
			}
			descs = append(descs, d)
		}
		got, ok := choose(descs)
		if ok != (tt.want >= 0) || ok && got.Digest != descs[tt.want].Digest {
			t.Errorf("%s: got %v, %v, want %d", tt.name, got.Digest, ok, tt.want)
		}
	}
}

// The variants are tried in skopeo's order (containers/image, internal/pkg/platform), the best one first.
func TestVariants(t *testing.T) {
	for arch, want := range map[string][]string{
		"amd64": {""}, "ppc64le": {""}, "s390x": {""}, "arm64": {"v8", ""}, "arm": {"", "v8", "v7", "v6", "v5"},
	} {
		if got := variants(arch); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", arch, got, want)
		}
	}
}

func TestLists(t *testing.T) {
	host := imageOf(t, text(t, "host"))
	oci := newImage(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{text(t, "oci")}})
	other := newImage(t, fixture.ImageSpec{Arch: "mips64", Layers: []*fixture.Layer{text(t, "other")}})
	inner := newList(t, fixture.ListSpec{Instances: []*fixture.Image{host}})
	nested := *host // as an instance, it is a list
	nested.Manifest, nested.Digest = inner.Manifest, inner.Digest
	for _, tt := range []struct {
		name  string
		list  *fixture.Image
		want  *fixture.Image // the instance
		stage fixture.Stage
		error Reason
	}{
		{name: "docker list", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{other, host}}), want: host},
		{name: "index of docker manifests", list: newList(t, fixture.ListSpec{OCI: true, Instances: []*fixture.Image{other, host}}), want: host},
		{name: "index", list: newList(t, fixture.ListSpec{OCI: true, Instances: []*fixture.Image{other, oci}}), want: oci},
		{name: "no media type", list: newList(t, fixture.ListSpec{OCI: true, Instances: []*fixture.Image{oci}, EditManifest: editIndex(t, func(i *v1.Index) { i.MediaType = "" })}), want: oci},
		{name: "zstd instance", list: newList(t, fixture.ListSpec{OCI: true, Instances: []*fixture.Image{host, oci}, EditManifest: editIndex(t, func(i *v1.Index) {
			i.Manifests[1].Annotations = map[string]string{zstdAnnotation: "true"}
		})}), want: oci},
		{name: "others are not staged", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{other, host}}), want: host,
			stage: fixture.Stage{Edits: []fixture.Edit{fixture.Drop(other.Digest.Encoded() + ".manifest.json"), fixture.Drop(other.Layers[0].Digest.Encoded()), fixture.Drop(other.ConfigDigest.Encoded())}}},
		{name: "none for this machine", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{other}}), error: Unsupported},
		{name: "empty", list: newList(t, fixture.ListSpec{}), error: Unsupported},
		{name: "its instance is not staged", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{other, host}}), error: CorruptArchive,
			stage: fixture.Stage{Edits: []fixture.Edit{fixture.Drop(host.Digest.Encoded() + ".manifest.json")}}},
		{name: "its instance is another", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{host}}), error: DigestMismatch,
			stage: fixture.Stage{Edits: []fixture.Edit{fixture.Replace(host.Digest.Encoded()+".manifest.json", other.Manifest)}}},
		{name: "instance of another size", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{host}, EditManifest: editIndex(t, func(i *v1.Index) { i.Manifests[0].Size++ })}), error: DigestMismatch},
		{name: "nested", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{&nested}}), error: Unsupported},
		{name: "instance without digest", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{host}, EditManifest: editIndex(t, func(i *v1.Index) { i.Manifests[0].Digest = "" })}), error: CorruptArchive},
		{name: "another without digest", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{host, other}, EditManifest: editIndex(t, func(i *v1.Index) { i.Manifests[1].Digest = "" })}), error: CorruptArchive},
		{name: "instance with a sha512 digest", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{host}, EditManifest: editIndex(t, func(i *v1.Index) { i.Manifests[0].Digest = digest.SHA512.FromString("x") })}), error: Unsupported},
		{name: "instance of negative size", list: newList(t, fixture.ListSpec{Instances: []*fixture.Image{host}, EditManifest: editIndex(t, func(i *v1.Index) { i.Manifests[0].Size = -1 })}), error: CorruptArchive},
	} {
		for _, order := range orders {
			t.Run(tt.name+"/"+order.name, func(t *testing.T) {
				s := tt.stage
				s.Edits = append(slices.Clone(s.Edits), order.edits...)
				if tt.list.Instances == nil {
					tt.list.Instances = []*fixture.Image{} // a list all the same
				}
				a, of := stage(t, s, repo, tt.list)
				got, err := take(t, a, of)
				if tt.error != "" {
					wantReason(t, err, tt.error)
					return
				}
				must(t, err)
				if !bytes.Equal(got.Manifest, tt.list.Manifest) || !bytes.Equal(got.Instance, tt.want.Manifest) || !bytes.Equal(got.Config, tt.want.Config) ||
					got.Digest != tt.list.Digest || got.InstanceDigest() != tt.want.Digest || !got.IsList() {
					t.Errorf("got %s, instance %s, want %s, %s", got.Digest, got.InstanceDigest(), tt.list.Digest, tt.want.Digest)
				}
			})
		}
	}
}

// ociIndex stages two images in one OCI layout; edit changes its index.json.
func ociIndex(t *testing.T, ref string, edit func(*v1.Index), images ...*fixture.Image) *Archive {
	t.Helper()
	index := v1.Index{}
	index.SchemaVersion = 2
	files := []string{"oci-layout", `{"imageLayoutVersion":"1.0.0"}`}
	add := func(d digest.Digest, b []byte) {
		if !slices.Contains(files, "blobs/sha256/"+d.Encoded()) {
			files = append(files, "blobs/sha256/"+d.Encoded(), string(b))
		}
	}
	for _, img := range images {
		index.Manifests = append(index.Manifests, v1.Descriptor{MediaType: img.MediaType, Digest: img.Digest, Size: int64(len(img.Manifest))})
		add(img.Digest, img.Manifest)
		add(img.ConfigDigest, img.Config)
		for _, l := range img.Layers {
			r, err := l.Open()
			must(t, err)
			b, err := io.ReadAll(r)
			must(t, err)
			add(l.Digest, b)
		}
	}
	if edit != nil {
		edit(&index)
	}
	b, err := json.Marshal(index)
	must(t, err)
	a, _ := raw(t, tarOf(append(files, "index.json", string(b))...))
	return a
}

func TestOCIIndex(t *testing.T) {
	one, two := imageOf(t, text(t, "one")), imageOf(t, text(t, "two"))
	names := func(one, two string) func(*v1.Index) {
		return func(i *v1.Index) {
			i.Manifests[0].Annotations = map[string]string{v1.AnnotationRefName: one}
			i.Manifests[1].Annotations = map[string]string{v1.AnnotationRefName: two}
		}
	}
	both := []*fixture.Image{one, two}
	for _, tt := range []struct {
		name   string
		ref    string
		images []*fixture.Image
		edit   func(*v1.Index)
		want   *fixture.Image
		error  Reason
	}{
		{name: "by digest", ref: repo + "@" + two.Digest.String(), images: both, want: two},
		{name: "by digest, whatever its name", ref: repo + ":v1@" + two.Digest.String(), images: both, edit: names("v1", "v2"), want: two},
		{name: "by tag", ref: repo + ":v2", images: both, edit: names("v1", "v2"), want: two},
		{name: "by whole reference", ref: repo + ":v2", images: both, edit: names("v2.0", repo+":v2"), want: two},
		{name: "by default tag", ref: repo, images: both, edit: names("latest", "v2"), want: one},
		{name: "the only one, without a name", ref: repo + ":v1", images: both[:1], want: one},
		{name: "the only one, under another name", ref: repo + ":v1", images: both[:1], edit: func(i *v1.Index) { i.Manifests[0].Annotations = map[string]string{v1.AnnotationRefName: "other"} }, want: one},
		{name: "none of that name", ref: repo + ":v3", images: both, edit: names("v1", "v2"), error: Unsupported},
		{name: "none has a name", ref: repo + ":v1", images: both, error: Unsupported},
		{name: "two of that name", ref: repo + ":v1", images: both, edit: names("v1", "v1"), error: Unsupported},
		{name: "none of that digest", ref: repo + "@" + digest.FromString("x").String(), images: both, error: DigestMismatch},
		{name: "no image", ref: repo + ":v1", error: Unsupported},
		{name: "no digest", ref: repo + ":v1", images: both[:1], edit: func(i *v1.Index) { i.Manifests[0].Digest = "" }, error: CorruptArchive},
		{name: "digest that leaves", ref: repo + ":v1", images: both[:1], edit: func(i *v1.Index) { i.Manifests[0].Digest = "sha256:../../etc" }, error: CorruptArchive},
		{name: "sha512 digest", ref: repo + ":v1", images: both[:1], edit: func(i *v1.Index) { i.Manifests[0].Digest = digest.SHA512.FromString("x") }, error: Unsupported},
		{name: "another size", ref: repo + ":v1", images: both[:1], edit: func(i *v1.Index) { i.Manifests[0].Size-- }, error: DigestMismatch},
		{name: "manifest is not there", ref: repo + ":v1", images: both[:1], edit: func(i *v1.Index) { i.Manifests[0].Digest = digest.FromString("x") }, error: CorruptArchive},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := ociIndex(t, tt.ref, tt.edit, tt.images...)
			of := set(t, tt.ref)
			got, err := take(t, a, of)
			errs := a.Verify(t.Context(), of)
			if tt.error != "" {
				wantReason(t, err, tt.error)
				if len(errs) != 1 || ReasonOf(errs[0]) != tt.error {
					t.Errorf("verify: %v, want %q", errs, tt.error)
				}
				return
			}
			must(t, err)
			wantImage(t, got, tt.want)
			if len(errs) != 0 {
				t.Errorf("verify: %v", errs)
			}
		})
	}
}

// A dockerTar is a docker-archive written by hand: manifest.json first, then the files.
func dockerTar(t *testing.T, items any, files ...header) []byte {
	t.Helper()
	b, err := json.Marshal(items)
	must(t, err)
	return rawTar(true, append([]header{{name: "manifest.json", data: b}}, files...)...)
}

func plainOf(t *testing.T, l *fixture.Layer) []byte {
	t.Helper()
	r, err := l.OpenTar()
	must(t, err)
	b, err := io.ReadAll(r)
	must(t, err)
	return b
}

func pack(t testing.TB, c fixture.Compression, window int, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	var err error
	switch c {
	case fixture.Gzip:
		w = gzip.NewWriter(&b)
	case fixture.Zstd:
		if window == 0 {
			window = 1 << 20
		}
		w, err = zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window))
	case fixture.XZ:
		w, err = xz.WriterConfig{DictCap: window}.NewWriter(&b)
	default:
		return data
	}
	must(t, err)
	half := len(data) / 2
	_, err = w.Write(data[:half])
	must(t, err)
	if f, ok := w.(*zstd.Encoder); ok && half > 0 {
		must(t, f.Flush()) // or a small content would get a small window
	}
	_, err = w.Write(data[half:])
	must(t, err)
	must(t, w.Close())
	return b.Bytes()
}

// Layers of a docker-archive may be called anything, and be compressed.
func TestDockerLayers(t *testing.T) {
	x, y := text(t, "x"), text(t, "y")
	img := imageOf(t, x, y)
	for _, tt := range []struct {
		name   string
		layers [2]string
	}{
		{"podman save", [2]string{x.DiffID.Encoded() + ".tar", y.DiffID.Encoded() + ".tar"}},
		{"docker save", [2]string{"1/layer.tar", "2/layer.tar"}},
		{"crane", [2]string{x.DiffID.Encoded() + ".tar.gz", y.DiffID.Encoded() + ".tar.gz"}},
		{"digests", [2]string{"sha256:" + x.DiffID.Encoded(), "sha256:" + y.DiffID.Encoded()}},
		{"hex", [2]string{x.DiffID.Encoded(), y.DiffID.Encoded()}},
		{"blobs", [2]string{"blobs/sha256/" + x.DiffID.Encoded(), "blobs/sha256/" + y.DiffID.Encoded()}},
	} {
		for _, c := range compressions {
			for _, window := range []int{0, largeWindow} {
				if window > 0 && (c == fixture.None || c == fixture.Gzip || tt.name != "crane") {
					continue
				}
				for _, reverse := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s/%d/window %d/reverse %v", tt.name, c, window, reverse), func(t *testing.T) {
						files := []header{
							{name: "config.json", data: img.Config},
							{name: tt.layers[0], data: pack(t, c, window, plainOf(t, x))},
							{name: tt.layers[1], data: pack(t, c, window, plainOf(t, y))},
						}
						if reverse {
							slices.Reverse(files)
						}
						a, of := raw(t, dockerTar(t, []dockerItem{{Config: "config.json", Layers: tt.layers[:]}}, files...))
						v := &taker{}
						got, err := a.Visit(t.Context(), of, v)
						must(t, err)
						v.wantContent(t, got)
						wantMadeManifest(t, got.Manifest, img)
						if errs := a.Verify(t.Context(), of); len(errs) != 0 {
							t.Errorf("verify: %v", errs)
						}
					})
				}
			}
		}
	}
}

// Layers that are too large to be kept are read again once the made manifest is known; no more often than that.
func TestDockerLargeLayers(t *testing.T) {
	x, y := big(t, 1, maxHeld+1), big(t, 2, maxHeld+2)
	img := imageOf(t, x, y)
	for _, c := range []fixture.Compression{fixture.None, fixture.Gzip} {
		packed := [][]byte{pack(t, c, 0, plainOf(t, x)), pack(t, c, 0, plainOf(t, y))}
		for _, names := range [][]string{{"x.tar", "y.tar"}, {x.DiffID.Encoded(), y.DiffID.Encoded()}} {
			for _, reverse := range []bool{false, true} {
				b, err := json.Marshal([]dockerItem{{Config: "config.json", Layers: names}})
				must(t, err)
				members := []header{
					{name: "manifest.json", data: b}, {name: "config.json", data: img.Config},
					{name: names[0], data: packed[0]}, {name: names[1], data: packed[1]},
				}
				if reverse {
					slices.Reverse(members)
				}
				a, of := raw(t, rawTar(true, members...))
				v := &taker{}
				got, err := a.Visit(t.Context(), of, v)
				must(t, err)
				v.wantContent(t, got)
				wantMadeManifest(t, got.Manifest, img)
				if read := float64(a.BytesRead()) / float64(a.Size); read > 2.1 {
					t.Errorf("%q, compressed %d, reverse %v: read %.2f times the archive", names, c, reverse, read)
				}
				if errs := a.Verify(t.Context(), of); len(errs) != 0 {
					t.Errorf("verify: %v", errs)
				}
			}
		}
	}
}

func TestDockerArchive(t *testing.T) {
	x, y := text(t, "x"), text(t, "y")
	img, other := imageOf(t, x, y, x), imageOf(t, y)
	config, xTar, yTar := header{name: "config.json", data: img.Config}, header{name: "x.tar", data: plainOf(t, x)}, header{name: "y.tar", data: plainOf(t, y)}
	xLink := header{name: "a/again.tar", kind: '2', link: "../x.tar"}
	layers := []string{"x.tar", "y.tar", "a/again.tar"}
	item := []dockerItem{{Config: "config.json", Layers: layers}}
	otherConfig := header{name: "other.json", data: other.Config}
	two := func(one, two []string) []dockerItem {
		return []dockerItem{{"config.json", one, layers}, {"other.json", two, []string{"y.tar"}}}
	}
	library := "docker.io/library/busybox:v1"
	for _, tt := range []struct {
		name  string
		ref   string
		items any
		files []header
		want  *fixture.Image
		error Reason
	}{
		{name: "link", items: item, files: []header{config, xTar, yTar, xLink}, want: img},
		{name: "link first", items: item, files: []header{xLink, config, xTar, yTar}, want: img},
		{name: "link to a link", items: item, files: []header{{name: "a/again.tar", kind: '2', link: "b.tar"}, {name: "a/b.tar", kind: '2', link: "./../x.tar"}, config, xTar, yTar}, want: img},
		{name: "the same name twice", items: []dockerItem{{Config: "config.json", Layers: []string{"x.tar", "y.tar", "x.tar"}}}, files: []header{config, xTar, yTar}, want: img},
		{name: "dots in names", items: []dockerItem{{Config: "./config.json", Layers: []string{"./x.tar", "a/./../y.tar", "x.tar"}}}, files: []header{config, xTar, yTar}, error: CorruptArchive},
		{name: "slashes in names", items: []dockerItem{{Config: ".//config.json", Layers: []string{"./x.tar", "y.tar", "x.tar"}}}, files: []header{{name: "./config.json", data: img.Config}, {name: "./x.tar", data: xTar.data}, yTar}, want: img},
		{name: "link that leaves", items: item, files: []header{config, xTar, yTar, {name: "a/again.tar", kind: '2', link: "../../etc/passwd"}}, error: CorruptArchive},
		{name: "absolute link", items: item, files: []header{config, xTar, yTar, {name: "a/again.tar", kind: '2', link: "/x.tar"}}, error: CorruptArchive},
		{name: "absolute link for the first", items: item, files: []header{config, {name: "x.tar", kind: '2', link: "/etc/passwd"}, yTar, xLink}, error: CorruptArchive},
		{name: "link to itself", items: item, files: []header{config, {name: "x.tar", kind: '2', link: "x.tar"}, yTar, xLink}, error: CorruptArchive},
		{name: "links in a circle", items: item, files: []header{config, {name: "x.tar", kind: '2', link: "a/again.tar"}, yTar, xLink}, error: CorruptArchive},
		{name: "link to nothing", items: item, files: []header{config, {name: "x.tar", kind: '2', link: "none.tar"}, yTar, xLink}, error: CorruptArchive},
		{name: "config is a link", items: []dockerItem{{Config: "c", Layers: layers}}, files: []header{config, {name: "c", kind: '2', link: "config.json"}, xTar, yTar, xLink}, want: img},
		{name: "layer is missing", items: item, files: []header{config, xTar, xLink}, error: CorruptArchive},
		{name: "config is missing", items: item, files: []header{xTar, yTar, xLink}, error: CorruptArchive},
		{name: "no config", items: []dockerItem{{Layers: layers}}, files: []header{config, xTar, yTar, xLink}, error: CorruptArchive},
		{name: "config that leaves", items: []dockerItem{{Config: "../config.json", Layers: layers}}, files: []header{config, xTar, yTar, xLink}, error: CorruptArchive},
		{name: "layer that leaves", items: []dockerItem{{Config: "config.json", Layers: []string{"x.tar", "/y.tar", "x.tar"}}}, files: []header{config, xTar, yTar}, error: CorruptArchive},
		{name: "one layer for two", items: []dockerItem{{Config: "config.json", Layers: []string{"x.tar", "x.tar", "x.tar"}}}, files: []header{config, xTar}, error: CorruptArchive},
		{name: "too few layers", items: []dockerItem{{Config: "config.json", Layers: layers[:2]}}, files: []header{config, xTar, yTar}, error: CorruptArchive},
		{name: "another's layer", items: []dockerItem{{Config: "config.json", Layers: []string{"y.tar", "x.tar", "y.tar"}}}, files: []header{config, xTar, yTar}, error: DigestMismatch},
		{name: "no JSON", items: json.RawMessage(`["x"]`), error: CorruptArchive},
		{name: "no image", items: []dockerItem{}, error: Unsupported},
		{name: "null", items: json.RawMessage(`[null]`), error: CorruptArchive},
		{name: "chosen by tag", ref: repo + ":raw", items: two([]string{repo + ":v1"}, []string{repo + ":v2", repo + ":raw"}), files: []header{config, otherConfig, xTar, yTar, xLink}, want: other},
		{name: "chosen by tag of docker hub", ref: library, items: two([]string{"busybox:v1"}, nil), files: []header{config, otherConfig, xTar, yTar, xLink}, want: img},
		{name: "chosen by tag in docker.io", ref: library, items: two(nil, []string{"library/busybox:v1"}), files: []header{config, otherConfig, xTar, yTar, xLink}, want: other},
		{name: "none of that tag", items: two([]string{repo + ":v1"}, []string{"raw"}), files: []header{config, otherConfig, xTar, yTar, xLink}, error: Unsupported},
		{name: "a digest", ref: repo + "@" + img.Digest.String(), items: item, files: []header{config, xTar, yTar, xLink}, error: Unsupported},
		{name: "a tag and a digest", ref: repo + ":raw@" + img.Digest.String(), items: item, files: []header{config, xTar, yTar, xLink}, error: Unsupported},
		{name: "a sha512 digest", ref: repo + "@" + digest.SHA512.FromString("x").String(), items: item, files: []header{config, xTar, yTar, xLink}, error: Unsupported},
	} {
		for _, last := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/manifest last %v", tt.name, last), func(t *testing.T) {
				b, err := json.Marshal(tt.items)
				must(t, err)
				manifest := header{name: "manifest.json", data: b}
				members := append([]header{manifest}, tt.files...)
				if last {
					members = append(slices.Clone(tt.files), manifest)
				}
				a, of := raw(t, rawTar(true, members...))
				if tt.ref != "" {
					of = set(t, tt.ref)
				}
				v := &taker{}
				got, err := a.Visit(t.Context(), of, v)
				errs := a.Verify(t.Context(), of)
				if tt.error != "" {
					wantReason(t, err, tt.error)
					if len(errs) == 0 || ReasonOf(errs[0]) != tt.error {
						t.Errorf("verify: %v, want %q", errs, tt.error)
					}
					return
				}
				must(t, err)
				wantMadeManifest(t, got.Manifest, tt.want)
				v.wantContent(t, got)
				if len(errs) != 0 {
					t.Errorf("verify: %v", errs)
				}
			})
		}
	}
}

// Docker since 25 saves what is an OCI layout and a docker-archive at once. The layout counts, for it has a manifest.
func TestDockerAndOCI(t *testing.T) {
	img := newImage(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{text(t, "x"), big(t, 1, maxHeld+1)}})
	var names []string
	for _, l := range img.Layers {
		names = append(names, "blobs/sha256/"+l.Digest.Encoded())
	}
	items, err := json.Marshal([]dockerItem{{Config: "blobs/sha256/" + img.ConfigDigest.Encoded(), RepoTags: []string{repo + ":v1"}, Layers: names}})
	must(t, err)
	for seed := range uint64(5) {
		for _, ref := range []string{repo + ":v1", repo} {
			a, of := stage(t, fixture.Stage{Format: fixture.OCILayout, Compression: fixture.None, Edits: []fixture.Edit{
				fixture.Append(fixture.File("manifest.json", items)), fixture.Shuffled(seed),
			}}, ref, img)
			v := &taker{}
			got, err := a.Visit(t.Context(), of, v)
			must(t, err)
			wantImage(t, got, img)
			v.wantContent(t, got)
			if errs := a.Verify(t.Context(), of); len(errs) != 0 {
				t.Errorf("verify: %v", errs)
			}
		}
	}
}

// An archive has one manifest.json and one index.json.
func TestTwoManifests(t *testing.T) {
	img := imageOf(t, text(t, "x"))
	for _, name := range []string{"manifest.json", "index.json"} {
		for _, order := range orders {
			a, of := stage(t, fixture.Stage{Edits: append([]fixture.Edit{
				fixture.Append(fixture.File("one/"+name, img.Manifest)), fixture.Append(fixture.File("two/"+name, img.Manifest)),
			}, order.edits...)}, repo, img)
			got, err := take(t, a, of)
			if err == nil { // all that is wanted was there before the second one
				wantImage(t, got, img)
			} else if r := ReasonOf(err); r != CorruptArchive && r != DigestMismatch {
				t.Errorf("%s, %s: %v", name, order.name, err)
			}
			if errs := a.Verify(t.Context(), of); len(errs) == 0 {
				t.Errorf("%s, %s: verify finds nothing", name, order.name)
			}
		}
	}
}

// A folder in the archive may have any name, and deeper or no folders do as well.
func TestFolderInArchive(t *testing.T) {
	img := imageOf(t, text(t, "x"))
	for _, dir := range []string{"", "./", "other/", "./a/b/", "a//b/"} {
		var members []fixture.Edit
		members = append(members, func(in []fixture.Member) ([]fixture.Member, error) {
			out := slices.Clone(in)
			for i, m := range out {
				_, name, _ := strings.Cut(m.Name, "/")
				out[i].Name = dir + name
			}
			return slices.DeleteFunc(out, func(m fixture.Member) bool { return m.Name == "" }), nil
		})
		a, of := stage(t, fixture.Stage{Edits: members}, repo, img)
		got, err := take(t, a, of)
		if err != nil {
			t.Errorf("%q: %v", dir, err)
			continue
		}
		wantImage(t, got, img)
	}
}
