package archive

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/precache/precache-agent/internal/manifest"
)

const (
	maxMetadata   = 4 << 20 // of a manifest, an index, a config or a signature, in bytes, as in containers/image
	maxLayers     = 500     // what the overlay driver can stack
	maxSignatures = 100
)

// Media types of Docker image manifest version 2, schema 2, and of what it
// replaced (distribution, docs/spec/manifest-v2-2.md).
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
	dockerLayerGz  = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// An Image is what an archive says of its image, every digest of it verified.
type Image struct {
	Of         manifest.Image // which image of the set it is
	Path       string         // of the archive, without suffix: its scope in policy.json
	Manifest   []byte         // as the reference names it; a list or index for an image of several architectures
	Digest     digest.Digest  // of Manifest
	Instance   []byte         // the manifest for this machine; Manifest itself unless that is a list
	Config     []byte
	Layers     []Layer // base first
	Signatures []Signature
	Missing    []digest.Digest // layers that a read to the end did not meet
}

// InstanceDigest is the digest of i.Instance.
func (i *Image) InstanceDigest() digest.Digest { return digest.FromBytes(i.Instance) }

// IsList reports whether the reference names a manifest list or an OCI index.
func (i *Image) IsList() bool { return i.Digest != i.InstanceDigest() }

// Bytes is the memory that the metadata takes.
func (i *Image) Bytes() int64 {
	n := len(i.Manifest) + len(i.Instance) + len(i.Config) + 512*len(i.Layers)
	for _, s := range i.Signatures {
		n += len(s.Data)
	}
	return int64(n)
}

// Lacks reports whether a read to the end did not meet the layer with that diffID.
func (i *Image) Lacks(diffID digest.Digest) bool {
	return slices.ContainsFunc(i.Layers, func(l Layer) bool {
		return l.DiffID == diffID && slices.Contains(i.Missing, l.Digest)
	})
}

// A Layer is one layer of an image.
type Layer struct {
	Digest digest.Digest // of the blob, as the manifest names it
	Size   int64         // of the blob, in bytes
	DiffID digest.Digest // of the plain tar, as the config names it
}

// A Signature is one signature file, as skopeo's dir: layout keeps it.
type Signature struct {
	Instance digest.Digest // what it signs; empty: the manifest that the reference names
	Number   int           // from 1, without gaps
	Data     []byte
}

// parsed is a manifest, or a list of manifests.
type parsed struct {
	list   bool
	config v1.Descriptor
	descs  []v1.Descriptor // layers, or instances
}

// parseManifest accepts Docker schema 2 and OCI manifests, lists and indexes
// (image-spec, manifest.md and image-index.md), and nothing that is two of these at once.
func parseManifest(b []byte) (*parsed, error) {
	var m struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Config        *v1.Descriptor  `json:"config"`
		Layers        []v1.Descriptor `json:"layers"`
		Manifests     []v1.Descriptor `json:"manifests"`
		FSLayers      json.RawMessage `json:"fsLayers"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fault(CorruptArchive, "parse manifest: %w", err)
	}
	if m.SchemaVersion == 1 || m.FSLayers != nil {
		return nil, fault(Unsupported, "manifest is of schema 1")
	}
	isList := m.Manifests != nil
	switch m.MediaType {
	case "":
	case dockerManifest, v1.MediaTypeImageManifest:
		isList = false
	case dockerList, v1.MediaTypeImageIndex:
		isList = true
	default:
		return nil, fault(Unsupported, "manifest has media type %q", m.MediaType)
	}
	switch {
	case m.SchemaVersion != 2:
		return nil, fault(CorruptArchive, "manifest has schema version %d", m.SchemaVersion)
	case isList && (m.Config != nil || m.Layers != nil), !isList && m.Manifests != nil:
		return nil, fault(CorruptArchive, "manifest is a list and an image at once")
	case !isList && m.Config == nil:
		return nil, fault(CorruptArchive, "manifest names no config")
	case len(m.Layers) > maxLayers:
		return nil, fault(Unsupported, "manifest has %d layers, at most %d can be stacked", len(m.Layers), maxLayers)
	}
	p := &parsed{list: isList, descs: m.Manifests}
	if !isList {
		p.descs, p.config = m.Layers, *m.Config
	}
	named := p.descs
	if !isList {
		named = append([]v1.Descriptor{p.config}, named...)
	}
	for _, d := range named {
		if err := checkDigest(d.Digest); err != nil {
			return nil, err
		}
		if d.Size < 0 {
			return nil, fault(CorruptArchive, "%s has size %d", d.Digest, d.Size)
		}
	}
	if isList {
		return p, nil
	}
	if t := p.config.MediaType; t != dockerConfig && t != v1.MediaTypeImageConfig {
		return nil, fault(Unsupported, "config has media type %q: not a container image", t)
	}
	for _, d := range p.descs {
		if err := checkLayer(d); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func checkDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fault(CorruptArchive, "digest %q: %w", d, err)
	}
	if d.Algorithm() != digest.SHA256 {
		return fault(Unsupported, "digest %q is not sha256", d)
	}
	return nil
}

func checkLayer(d v1.Descriptor) error {
	switch d.MediaType {
	case dockerLayer, dockerLayerGz,
		v1.MediaTypeImageLayer, v1.MediaTypeImageLayerGzip, v1.MediaTypeImageLayerZstd:
		return nil
	}
	switch {
	case strings.Contains(d.MediaType, "nondistributable"), strings.Contains(d.MediaType, "foreign"):
		return fault(Unsupported, "layer %s is foreign (%s)", d.Digest, d.MediaType)
	case strings.HasSuffix(d.MediaType, "+encrypted"):
		return fault(Unsupported, "layer %s is encrypted (%s)", d.Digest, d.MediaType)
	}
	return fault(Unsupported, "layer %s has media type %q", d.Digest, d.MediaType)
}

// diffIDs returns the layers that a config names (image-spec, config.md).
func diffIDs(config []byte) ([]digest.Digest, error) {
	var c struct {
		RootFS *struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fault(CorruptArchive, "parse config: %w", err)
	}
	if c.RootFS == nil {
		return nil, fault(CorruptArchive, "config names no rootfs")
	}
	if len(c.RootFS.DiffIDs) > maxLayers {
		return nil, fault(Unsupported, "config has %d layers, at most %d can be stacked", len(c.RootFS.DiffIDs), maxLayers)
	}
	for _, d := range c.RootFS.DiffIDs {
		if err := checkDigest(d); err != nil {
			return nil, err
		}
	}
	return c.RootFS.DiffIDs, nil
}

// pair puts the manifest's layers and the config's diffIDs together.
func pair(layers []v1.Descriptor, ids []digest.Digest) ([]Layer, error) {
	if len(layers) != len(ids) {
		return nil, fault(CorruptArchive, "manifest has %d layers, config has %d", len(layers), len(ids))
	}
	out := make([]Layer, len(layers))
	of := map[digest.Digest]digest.Digest{}
	for i, d := range layers {
		if other, ok := of[d.Digest]; ok && other != ids[i] {
			return nil, fault(CorruptArchive, "layer %s has two diffIDs, %s and %s", d.Digest, other, ids[i])
		}
		of[d.Digest] = ids[i]
		out[i] = Layer{Digest: d.Digest, Size: d.Size, DiffID: ids[i]}
	}
	return out, nil
}

// order sorts signatures and drops those after a gap, as skopeo does not see them either.
func order(all []Signature) []Signature {
	slices.SortFunc(all, func(a, b Signature) int {
		if c := strings.Compare(string(a.Instance), string(b.Instance)); c != 0 {
			return c
		}
		return a.Number - b.Number
	})
	next := map[digest.Digest]int{}
	return slices.DeleteFunc(all, func(s Signature) bool {
		if s.Number != next[s.Instance]+1 {
			return true
		}
		next[s.Instance]++
		return false
	})
}

func checkBytes(what string, b []byte, d v1.Descriptor) error {
	if got := digest.FromBytes(b); got != d.Digest {
		return fault(DigestMismatch, "%s has digest %s, want %s", what, got, d.Digest)
	}
	if d.Size != int64(len(b)) {
		return fault(DigestMismatch, "%s %s has %d bytes, want %d", what, d.Digest, len(b), d.Size)
	}
	return nil
}

func short(d digest.Digest) string { return fmt.Sprintf("%.19s", d) }
