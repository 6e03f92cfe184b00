package archive

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/precache/precache-agent/internal/manifest"
)

type kind int

const (
	isOther     kind = iota // may be a blob of a docker-archive
	isBlob                  // named by its digest: HEX, or blobs/sha256/HEX
	isTop                   // manifest.json: of a dir: layout an object, of a docker-archive a list
	isIndex                 // index.json of an OCI layout
	isInstance              // HEX.manifest.json of a dir: layout
	isSignature             // signature-N, HEX.signature-N of a dir: layout
)

var (
	hexName       = regexp.MustCompile(`^[0-9a-f]{64}$`)
	instanceName  = regexp.MustCompile(`^([0-9a-f]{64})\.manifest\.json$`)
	signatureName = regexp.MustCompile(`^(?:([0-9a-f]{64})\.)?signature-([1-9][0-9]{0,2})$`)
)

// kindOf tells a member by its name. The digest is that in the name, if there is one.
func kindOf(name string) (kind, digest.Digest) {
	dir, base := path.Split(name)
	switch {
	case base == "manifest.json":
		return isTop, ""
	case base == "index.json":
		return isIndex, ""
	case hexName.MatchString(base):
		if algorithm := path.Base(dir); algorithm != "sha256" && path.Base(path.Dir(path.Clean(dir))) == "blobs" {
			return isOther, ""
		}
		return isBlob, digest.NewDigestFromEncoded(digest.SHA256, base)
	}
	if m := instanceName.FindStringSubmatch(base); m != nil {
		return isInstance, digest.NewDigestFromEncoded(digest.SHA256, m[1])
	}
	if m := signatureName.FindStringSubmatch(base); m != nil {
		if m[1] == "" {
			return isSignature, ""
		}
		return isSignature, digest.NewDigestFromEncoded(digest.SHA256, m[1])
	}
	return isOther, ""
}

// A layout gathers what an archive says of its image, in whatever order it says it.
type layout struct {
	ref    string        // the image's reference, to choose among several images
	tag    string        // of ref, or empty
	pinned digest.Digest // by the reference; empty: by tag only

	top, index string                   // names of manifest.json and index.json
	docker     bool                     // after resolve: it is a docker-archive
	whole      bool                     // it was read to its end
	plain      map[string]int64         // plain sizes of what may be layers of a docker-archive
	measure    map[string]bool          // members whose plain size is needed
	order      []string                 // after resolve: the names of the layers' members, base first
	kept       int64                    // bytes of metadata
	signed     int                      // signatures
	meta       map[string][]byte        // what was read into memory, by name
	sizes      map[string]int64         // plain sizes of all other members that were met, by name
	links      map[string]string        // symbolic links, by name
	blobs      map[string]digest.Digest // after resolve: the layer a member is, by name
}

func newLayout(img manifest.Image) *layout {
	l := &layout{
		ref: img.Ref, pinned: img.Digest,
		meta: map[string][]byte{}, sizes: map[string]int64{}, links: map[string]string{},
		plain: map[string]int64{}, measure: map[string]bool{},
	}
	if ref, err := reference.ParseNormalizedNamed(img.Ref); err == nil {
		if tagged, ok := ref.(reference.Tagged); ok {
			l.tag = tagged.Tag()
		}
	}
	return l
}

// note takes down where manifest.json and index.json stand: there is one of each.
func (l *layout) note(name string, k kind) error {
	at := map[kind]*string{isTop: &l.top, isIndex: &l.index}[k]
	if at == nil {
		return nil
	}
	if *at != "" && *at != name {
		return fault(CorruptArchive, "it holds both %s and %s", *at, name)
	}
	*at = name
	return nil
}

// count takes a member of the metadata into account before it is read.
func (l *layout) count(m *member, k kind) error {
	if k == isSignature {
		if l.signed++; l.signed > maxSignatures {
			return fault(Unsupported, "more than %d signatures", maxSignatures)
		}
	}
	if l.kept += m.size; m.size > maxMetadata || l.kept > heldInAll {
		return fault(Unsupported, "%s has %d bytes; of manifests and signatures at most %d MiB are read", m.name, m.size, heldInAll>>20)
	}
	return nil
}

// again reports whether another pass can help: the member that err needs was
// met but not kept. It is then added to must.
func (l *layout) again(err error, must map[string]bool) bool {
	need, ok := isNeed(err)
	if !ok || must[need.name] {
		return false
	}
	if need.size { // of all layers at once: each pass costs
		again := len(l.measure) == 0
		for name := range l.sizes {
			l.measure[name] = true
		}
		return again
	}
	if _, met := l.sizes[need.name]; !met {
		return false
	}
	must[need.name] = true
	return true
}

func (l *layout) dir() string {
	if l.index != "" {
		return path.Dir(l.index)
	}
	return path.Dir(l.top)
}

// A needError names the members without which nothing more can be said.
type needError struct {
	name string
	what string
	size bool // its plain size, not its content
}

func (e *needError) Error() string { return fmt.Sprintf("%s (%s) is missing", e.what, e.name) }

func (l *layout) get(name, what string) ([]byte, error) {
	if b, ok := l.meta[name]; ok {
		return b, nil
	}
	return nil, &needError{name: name, what: what}
}

// resolve returns the image, or a needError if a member for it was not read yet.
func (l *layout) resolve() (*Image, error) {
	if l.pinned != "" && l.pinned.Algorithm() != digest.SHA256 {
		return nil, fault(Unsupported, "reference pins %q, which is not sha256", l.pinned)
	}
	if l.index == "" && l.top == "" {
		return nil, &needError{name: "manifest.json", what: "the manifest"}
	}
	if items, ok := l.dockerItems(); ok {
		if !l.whole { // an index.json that still comes counts for more
			return nil, &needError{name: "index.json", what: "the index"}
		}
		return l.resolveDocker(items)
	}
	top, err := l.topManifest()
	if err != nil {
		return nil, err
	}
	return l.resolveManifest(top)
}

// topManifest returns the manifest that the reference names, verified against it.
func (l *layout) topManifest() ([]byte, error) {
	if l.index == "" {
		top, err := l.get(l.top, "the manifest")
		if err == nil && l.pinned != "" && digest.FromBytes(top) != l.pinned {
			err = fault(DigestMismatch, "manifest has digest %s, the reference pins %s", digest.FromBytes(top), l.pinned)
		}
		return top, err
	}
	raw, err := l.get(l.index, "the index")
	if err != nil {
		return nil, err
	}
	var index v1.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, fault(CorruptArchive, "parse index.json: %w", err)
	}
	d, err := l.pick(index.Manifests)
	if err != nil {
		return nil, err
	}
	if err := checkDigest(d.Digest); err != nil {
		return nil, err
	}
	top, err := l.get(l.blobName(d.Digest), "the manifest")
	if err != nil {
		return nil, err
	}
	return top, checkBytes("manifest", top, d)
}

func (l *layout) blobName(d digest.Digest) string {
	if l.index != "" {
		return path.Join(l.dir(), "blobs/sha256", d.Encoded())
	}
	return path.Join(l.dir(), d.Encoded())
}

func (l *layout) instanceName(d digest.Digest) string {
	if l.index != "" {
		return l.blobName(d)
	}
	return l.blobName(d) + ".manifest.json"
}

func (l *layout) signatures() []Signature {
	var all []Signature
	for name, b := range l.meta {
		kind, instance := kindOf(name)
		if kind != isSignature || l.index != "" || path.Dir(name) != l.dir() {
			continue
		}
		n, _ := strconv.Atoi(name[strings.LastIndexByte(name, '-')+1:])
		all = append(all, Signature{Instance: instance, Number: n, Data: b})
	}
	return order(all)
}

// pick returns which image of an OCI layout the reference names (image-spec, image-layout.md and annotations.md).
func (l *layout) pick(all []v1.Descriptor) (v1.Descriptor, error) {
	for _, d := range all {
		if l.pinned != "" && d.Digest == l.pinned {
			return d, nil
		}
	}
	if l.pinned != "" {
		return v1.Descriptor{}, fault(DigestMismatch, "index.json does not name %s, which the reference pins", l.pinned)
	}
	var named []v1.Descriptor
	for _, d := range all {
		if name := d.Annotations[v1.AnnotationRefName]; name != "" && (name == l.ref || name == l.tag) {
			named = append(named, d)
		}
	}
	switch {
	case len(named) == 1:
		return named[0], nil
	case len(all) == 1:
		return all[0], nil
	}
	return v1.Descriptor{}, fault(Unsupported, "index.json names %d images, %d of them %s", len(all), len(named), l.ref)
}

// resolveManifest chooses the instance for this machine and pairs its layers with the config's.
func (l *layout) resolveManifest(top []byte) (*Image, error) {
	img := &Image{Manifest: top, Digest: digest.FromBytes(top), Instance: top}
	m, err := parseManifest(top)
	if err != nil {
		return nil, err
	}
	if m.list {
		d, ok := choose(m.descs)
		if !ok {
			return nil, fault(Unsupported, "no instance for this machine among %d", len(m.descs))
		}
		if img.Instance, m, err = l.instance(d); err != nil {
			return nil, err
		}
	}
	if img.Config, err = l.config(m.config); err != nil {
		return nil, err
	}
	ids, err := diffIDs(img.Config)
	if err != nil {
		return nil, err
	}
	if img.Layers, err = pair(m.descs, ids); err != nil {
		return nil, err
	}
	l.blobs = map[string]digest.Digest{}
	for _, layer := range img.Layers {
		name := l.blobName(layer.Digest)
		l.blobs[name] = layer.Digest
		l.order = append(l.order, name)
	}
	return img, nil
}

func (l *layout) instance(d v1.Descriptor) ([]byte, *parsed, error) {
	b, err := l.get(l.instanceName(d.Digest), "manifest "+string(d.Digest))
	if err != nil {
		return nil, nil, err
	}
	if err := checkBytes("manifest", b, d); err != nil {
		return nil, nil, err
	}
	m, err := parseManifest(b)
	if err == nil && m.list {
		err = fault(Unsupported, "an instance of the list is itself a list")
	}
	return b, m, err
}

func (l *layout) config(d v1.Descriptor) ([]byte, error) {
	if d.Size > maxMetadata {
		return nil, fault(Unsupported, "config %s has %d bytes, at most %d are read", d.Digest, d.Size, maxMetadata)
	}
	b, err := l.get(l.blobName(d.Digest), "config "+string(d.Digest))
	if err != nil {
		return nil, err
	}
	return b, checkBytes("config", b, d)
}

// dockerItem is one image of a docker-archive's manifest.json (docker save; containers/image docker/tarfile).
type dockerItem struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// dockerItems returns the manifest.json of a docker-archive: a list, where a dir: layout has an object.
func (l *layout) dockerItems() (json.RawMessage, bool) {
	b := l.meta[l.top]
	return b, l.index == "" && strings.HasPrefix(strings.TrimSpace(string(b[:min(64, len(b))])), "[")
}

func (l *layout) resolveDocker(top []byte) (*Image, error) {
	if l.pinned != "" {
		return nil, fault(Unsupported, "a docker-archive has no manifest that a digest could pin")
	}
	var items []dockerItem
	if err := json.Unmarshal(top, &items); err != nil {
		return nil, fault(CorruptArchive, "parse manifest.json: %w", err)
	}
	item, err := l.pickDocker(items)
	if err != nil {
		return nil, err
	}
	config, err := l.member(item.Config)
	if err != nil {
		return nil, err
	}
	img := &Image{}
	if img.Config, err = l.get(config, "the config"); err != nil {
		return nil, err
	}
	ids, err := diffIDs(img.Config)
	if err != nil {
		return nil, err
	}
	if len(item.Layers) != len(ids) {
		return nil, fault(CorruptArchive, "manifest.json has %d layers, config has %d", len(item.Layers), len(ids))
	}

	// Field by field what containers/image makes of a docker-archive, so that the digest is the same.
	type descriptor struct {
		MediaType string        `json:"mediaType"`
		Size      int64         `json:"size"`
		Digest    digest.Digest `json:"digest"`
	}
	m := struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}{2, dockerManifest, descriptor{dockerConfig, int64(len(img.Config)), digest.FromBytes(img.Config)}, []descriptor{}}
	l.blobs = map[string]digest.Digest{}
	l.order = nil
	size := map[digest.Digest]int64{}
	for i, id := range ids {
		name, err := l.member(item.Layers[i])
		if err != nil {
			return nil, err
		}
		if _, ok := size[id]; !ok {
			if size[id], ok = l.plain[name]; !ok {
				_, met := l.sizes[name]
				return nil, &needError{name: name, what: "layer " + short(id), size: met}
			}
			if other, ok := l.blobs[name]; ok {
				return nil, fault(CorruptArchive, "%s stands for two layers, %s and %s", name, short(other), short(id))
			}
			l.blobs[name] = id
			l.order = append(l.order, name)
		}
		m.Layers = append(m.Layers, descriptor{dockerLayerGz, size[id], id})
		img.Layers = append(img.Layers, Layer{Digest: id, Size: size[id], DiffID: id})
	}
	if img.Manifest, err = json.Marshal(m); err != nil {
		return nil, fmt.Errorf("make manifest: %w", err)
	}
	img.Instance, img.Digest = img.Manifest, digest.FromBytes(img.Manifest)
	l.docker = true
	return img, nil
}

func (l *layout) pickDocker(items []dockerItem) (dockerItem, error) {
	if len(items) == 1 {
		return items[0], nil
	}
	for _, item := range items {
		for _, tag := range item.RepoTags {
			if tag == l.ref || "docker.io/library/"+tag == l.ref || "docker.io/"+tag == l.ref {
				return item, nil
			}
		}
	}
	return dockerItem{}, fault(Unsupported, "manifest.json has %d images, none of them tagged %s", len(items), l.ref)
}

// member follows symbolic links from a name that manifest.json gives to a member.
func (l *layout) member(name string) (string, error) {
	name, err := memberName(name)
	if err != nil {
		return "", err
	}
	name = path.Join(l.dir(), name)
	for range 8 {
		to, ok := l.links[name]
		if !ok {
			return name, nil
		}
		if path.IsAbs(to) {
			return "", fault(CorruptArchive, "link %q leaves the archive", name)
		}
		if name = path.Join(path.Dir(name), to); name == ".." || strings.HasPrefix(name, "../") {
			return "", fault(CorruptArchive, "link to %q leaves the archive", to)
		}
	}
	return "", fault(CorruptArchive, "links to %q go round in a circle", name)
}

func isNeed(err error) (*needError, bool) {
	var need *needError
	return need, errors.As(err, &need)
}
