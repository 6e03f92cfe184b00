package archive

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/precache/precache-agent/internal/manifest"
)

// Verify reads the whole archive and returns every fault of the image that img
// refers to: the manifest is the one the reference pins, and config and layers
// are there, with the right digest and size. Of a list, every instance that is
// staged is verified, and one has to be. DiffIDs are not: that takes a load.
func (a *Archive) Verify(ctx context.Context, img manifest.Image) []error {
	c := &check{ctx: ctx, l: newLayout(img), tenant: &tenant{room: a.part.Room}, must: map[string]bool{}, sums: map[string]v1.Descriptor{}, buf: make([]byte, inputBuffer)}
	for {
		c.held = 0
		if _, err := a.each(ctx, c.tenant, c.member); err != nil {
			return []error{err}
		}
		c.l.whole = true
		faults, needs := c.faults()
		again := false
		for _, need := range needs {
			again = c.l.again(need, c.must) || again
		}
		if again {
			continue
		}
		for _, err := range append(needs, faults...) {
			c.errs = append(c.errs, fmt.Errorf("verify %s: %w", a.Name, classify(CorruptArchive, err)))
		}
		return c.errs
	}
}

// A check is the state of one Verify.
type check struct {
	ctx    context.Context
	l      *layout
	tenant *tenant
	held   int64
	must   map[string]bool
	sums   map[string]v1.Descriptor // digest and size of each member
	buf    []byte
	errs   []error
}

func (c *check) member(m *member) error {
	kind, _ := kindOf(m.name)
	if err := c.l.note(m.name, kind); err != nil {
		return err
	}
	if m.link != "" {
		c.l.links[m.name] = m.link
		return nil
	}
	c.l.sizes[m.name] = m.size
	_, done := c.sums[m.name]
	if _, plain := c.l.plain[m.name]; c.l.measure[m.name] && !plain {
		return c.sum(m, isOther)
	}
	switch keep := kind != isOther && kind != isBlob || c.must[m.name]; {
	case keep && m.size > maxMetadata:
		return fault(Unsupported, "%s has %d bytes, at most %d are read", m.name, m.size, maxMetadata)
	case c.l.meta[m.name] != nil:
		return nil
	case keep || m.size <= maxHeld && c.held+m.size <= heldInAll:
		if keep {
			if err := c.l.count(m, kind); err != nil {
				return err
			}
		} else {
			c.held += m.size
		}
		b, err := io.ReadAll(m.r)
		if err != nil {
			return noEOF(err)
		}
		c.l.meta[m.name] = b
		m.r = bytes.NewReader(b)
	case done:
		return nil
	}
	return c.sum(m, kind)
}

// sum takes digest and size of a member; of what may be a layer of a docker-archive, those of its plain content.
func (c *check) sum(m *member, k kind) error {
	r := m.r
	if k == isOther {
		z, _, err := decompress(c.ctx, r, c.tenant)
		if err != nil {
			return err
		}
		defer z.Close()
		r = z
	}
	d := digest.SHA256.Digester()
	n, err := io.CopyBuffer(d.Hash(), struct{ io.Reader }{r}, c.buf)
	if err != nil {
		return noEOF(err)
	}
	if k == isOther {
		c.l.plain[m.name] = n
	}
	c.sums[m.name] = v1.Descriptor{Digest: d.Digest(), Size: n}
	return nil
}

// faults compares what was met with what the image is made of. Needs are the
// members that are missing, or were met but not kept.
func (c *check) faults() (faults, needs []error) {
	report := func(err error) bool {
		if _, ok := isNeed(err); ok {
			needs = append(needs, err)
		} else if err != nil {
			faults = append(faults, err)
		}
		return err == nil
	}
	if _, ok := c.l.dockerItems(); ok || c.l.index == "" && c.l.top == "" || c.l.pinned != "" && c.l.pinned.Algorithm() != digest.SHA256 {
		img, err := c.l.resolve()
		if report(err) {
			of := map[digest.Digest]string{}
			for name, d := range c.l.blobs {
				of[d] = name
			}
			for _, layer := range img.Layers {
				report(c.blob(of[layer.Digest], "layer", v1.Descriptor{Digest: layer.Digest, Size: layer.Size}))
			}
		}
		return faults, needs
	}
	top, err := c.l.topManifest()
	if !report(err) && top == nil {
		return faults, needs
	}
	m, err := parseManifest(top)
	if !report(err) {
		return faults, needs
	}
	images, staged := []*parsed{m}, true
	if m.list {
		images, staged = nil, false
		for _, d := range m.descs {
			if _, met := c.l.sizes[c.l.instanceName(d.Digest)]; !met {
				continue
			}
			staged = true
			if _, instance, err := c.l.instance(d); report(err) {
				images = append(images, instance)
			}
		}
	}
	if !staged {
		report(fault(CorruptArchive, "none of the list's %d instances is there", len(m.descs)))
	}
	seen := map[digest.Digest]bool{}
	for _, m := range images {
		if config, err := c.l.config(m.config); report(err) {
			ids, err := diffIDs(config)
			if report(err) {
				_, err = pair(m.descs, ids)
				report(err)
			}
		}
		for _, d := range m.descs {
			if !seen[d.Digest] {
				seen[d.Digest] = true
				report(c.blob(c.l.blobName(d.Digest), "layer", d))
			}
		}
	}
	return faults, needs
}

func (c *check) blob(name, what string, want v1.Descriptor) error {
	got, met := c.sums[name]
	switch {
	case !met:
		return fault(CorruptArchive, "%s %s is missing", what, want.Digest)
	case got.Digest != want.Digest:
		return fault(DigestMismatch, "%s %s has digest %s", what, want.Digest, got.Digest)
	case got.Size != want.Size:
		return fault(DigestMismatch, "%s %s has %d bytes, want %d", what, want.Digest, got.Size, want.Size)
	}
	return nil
}
