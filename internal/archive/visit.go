package archive

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/manifest"
)

const (
	maxHeld   = maxMetadata // a member up to this size may be a config, and is kept until that is known
	heldInAll = 5 << 20     // of one archive, in bytes, and as much again of manifests and signatures
)

// A Visitor is handed the layers of an image as they pass by.
type Visitor interface {
	// Resolved is told the image as soon as it is known, once. An error ends the visit.
	Resolved(*Image) error
	// Want reports whether the layer at the reader is to be visited now. It
	// may be asked before Resolved, of a blob that may not belong to the image.
	Want(blob digest.Digest) bool
	// Visit reads a layer that was wanted. An error ends the visit.
	Visit(*Blob) error
	// More reports whether the rest of the archive may have a layer that is
	// still wanted. It is asked after Resolved only.
	More() bool
}

// Visit reads the archive, hands its layers to v, and returns the image of
// which img is the reference. It reads as little as the format allows: it ends
// when v wants no more, and reads the archive a second time only for layers
// that passed by before it was known that they are needed.
func (a *Archive) Visit(ctx context.Context, img manifest.Image, v Visitor) (*Image, error) {
	s := &visit{a: a, of: img, ctx: ctx, v: v, tenant: &tenant{room: a.part.Room}, l: newLayout(img), must: map[string]bool{}}
	_, s.need = s.l.resolve()
	for {
		s.skipped = false
		whole, err := a.each(ctx, s.tenant, s.member)
		if err != nil {
			return s.img, err
		}
		s.ended = s.ended || whole
		if whole && s.img != nil && s.l.index == "" && !s.l.docker {
			s.img.Signatures = s.l.signatures()
		}
		if whole && s.img == nil && s.failure == nil {
			s.l.whole = true
			err := s.resolve()
			var v *visitorError
			switch {
			case errors.Is(err, errStop):
				return s.img, nil
			case errors.As(err, &v):
				return s.img, v.err
			case err != nil:
				return s.img, err
			}
			if s.img != nil {
				continue
			}
		}
		switch {
		case s.img == nil && s.failure != nil:
			return nil, fmt.Errorf("read %s: %w", a.Name, s.failure)
		case s.img == nil:
			// A member that was met but not kept is kept when it is met again.
			if !s.l.again(s.need, s.must) {
				return nil, fmt.Errorf("read %s: %w", a.Name, classify(CorruptArchive, s.need))
			}
		case !whole:
			return s.img, nil
		case s.skipped && v.More():
		default:
			for name, d := range s.l.blobs {
				if _, met := s.l.sizes[name]; !met && !slices.Contains(s.img.Missing, d) {
					s.img.Missing = append(s.img.Missing, d)
				}
			}
			return s.img, nil
		}
	}
}

// Image returns what the archive says of its image, without its layers.
func (a *Archive) Image(ctx context.Context, img manifest.Image) (*Image, error) {
	return a.Visit(ctx, img, nothing{})
}

type nothing struct{}

func (nothing) Resolved(*Image) error   { return nil }
func (nothing) Want(digest.Digest) bool { return false }
func (nothing) Visit(*Blob) error       { return nil }
func (nothing) More() bool              { return false }

// A visit is the state of one Visit, over all its passes.
type visit struct {
	a      *Archive
	of     manifest.Image
	ctx    context.Context
	v      Visitor
	tenant *tenant
	l      *layout
	img    *Image // nil until resolved

	held    int64           // bytes in l.meta of members that may be nothing
	must    map[string]bool // members to keep whatever their size
	need    error           // the needError without which the image cannot be resolved
	failure error           // why the image cannot be resolved at all
	skipped bool            // a blob passed by in this pass before the image was resolved
	ended   bool            // a pass went to the archive's end
}

func (s *visit) member(m *member) error {
	kind, d := kindOf(m.name)
	if _, met := s.l.sizes[m.name]; !met {
		s.l.sizes[m.name] = m.size
	}
	if s.img != nil {
		if kind == isSignature && !s.ended {
			return s.keep(m)
		}
		if d, ok := s.l.blobs[m.name]; ok {
			return s.offer(m, d)
		}
		return nil
	}
	if b, held := s.l.meta[m.name]; held { // from the pass before
		m.r = bytes.NewReader(b)
		return s.measure(m, kind)
	}
	switch {
	case m.link != "":
		s.l.links[m.name] = m.link
		delete(s.l.sizes, m.name)
		return nil
	case kind == isTop || kind == isIndex || kind == isInstance || kind == isSignature:
		return s.metadata(m, kind)
	case s.must[m.name]:
		return s.hold(m)
	case m.size <= maxHeld && s.held+m.size <= heldInAll:
		s.held += m.size
		return s.hold(m)
	}
	s.skipped = true
	if kind == isBlob && m.size > maxHeld && s.v.Want(d) {
		return s.visit(m.r, d, m.size)
	}
	return s.measure(m, kind)
}

func (s *visit) metadata(m *member, kind kind) error {
	if err := s.l.note(m.name, kind); err != nil {
		return err
	}
	if kind == isIndex {
		s.failure = nil // it may say it better
	}
	if err := s.l.count(m, kind); err != nil {
		return err
	}
	return s.hold(m)
}

// keep keeps a signature that comes after the image was resolved.
func (s *visit) keep(m *member) error {
	if err := s.l.count(m, isSignature); err != nil {
		return err
	}
	b := make([]byte, m.size)
	if _, err := io.ReadFull(m.r, b); err != nil {
		return noEOF(err)
	}
	s.l.meta[m.name] = b
	return nil
}

// hold keeps a small member in memory and looks whether the image is now known.
func (s *visit) hold(m *member) error {
	if m.size > maxMetadata {
		return fault(Unsupported, "%s has %d bytes, at most %d are read", m.name, m.size, maxMetadata)
	}
	b := make([]byte, m.size)
	if _, err := io.ReadFull(m.r, b); err != nil {
		return noEOF(err)
	}
	s.l.meta[m.name] = b
	m.r = bytes.NewReader(b)
	kind, _ := kindOf(m.name)
	if err := s.measure(m, kind); err != nil {
		return err
	}
	if need, ok := isNeed(s.need); ok && need.name != m.name && kind != isTop && kind != isIndex {
		return nil // what was missing still is
	}
	return s.resolve()
}

// measure finds the plain size of what may be a layer of a docker-archive: its
// manifest, which is made, not read, needs it.
func (s *visit) measure(m *member, kind kind) error {
	if kind != isOther && !s.l.measure[m.name] {
		return nil
	}
	br := bufio.NewReader(m.r)
	if head, _ := br.Peek(6); sniff(head) == None {
		s.l.plain[m.name] = m.size
		return nil
	}
	z, _, err := decompress(s.ctx, br, s.tenant)
	if err != nil {
		return err
	}
	defer z.Close()
	s.l.plain[m.name], err = io.Copy(io.Discard, z)
	return err
}

func (s *visit) resolve() error {
	if s.failure != nil {
		return nil
	}
	img, err := s.l.resolve()
	if _, ok := isNeed(err); ok {
		s.need = err
		return nil
	}
	if err != nil {
		s.failure = err
		return nil
	}
	s.img = img
	img.Of, img.Path = s.of, s.a.Path()
	if err := s.v.Resolved(img); err != nil {
		return visitorFailed(err)
	}
	held := s.l.meta
	s.l.meta = map[string][]byte{}
	for name, b := range held {
		if kind, _ := kindOf(name); kind == isSignature {
			s.l.meta[name] = b
		}
	}
	for _, name := range s.l.order {
		if b, ok := held[name]; ok && s.v.Want(s.l.blobs[name]) {
			if err := s.visit(bytes.NewReader(b), s.l.blobs[name], int64(len(b))); err != nil {
				return err
			}
		}
	}
	return s.stop()
}

// stop ends a pass that can bring nothing more. Where there may be signatures,
// the first pass goes to the end: they may stand anywhere.
func (s *visit) stop() error {
	if !s.v.More() && (s.ended || s.l.docker || s.l.index != "") {
		return errStop
	}
	return nil
}

// offer hands a layer to the visitor if it wants it.
func (s *visit) offer(m *member, d digest.Digest) error {
	if s.v.Want(d) {
		if err := s.visit(m.r, d, m.size); err != nil {
			return err
		}
	}
	return s.stop()
}

func (s *visit) visit(r io.Reader, d digest.Digest, size int64) error {
	b := &Blob{Digest: d, Size: size, r: r, tenant: s.tenant}
	if s.img != nil {
		i := slices.IndexFunc(s.img.Layers, func(l Layer) bool { return l.Digest == d })
		b.Size = s.img.Layers[i].Size
		b.plain = s.l.docker
	}
	return visitorFailed(s.v.Visit(b))
}
