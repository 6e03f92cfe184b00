package loader

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/archive"
)

// A visitor takes from an archive the layers that no one has and no one else is extracting.
type visitor struct {
	l  *load
	it *item

	own   map[digest.Digest]digest.Digest // diffIDs by blob, as this archive's image has them; nil: not resolved yet
	taken digest.Digest                   // the diffID of the layer that was wanted last
}

func (v *visitor) Resolved(img *archive.Image) error {
	missing, err := v.l.o.Store.Missing(v.l.ctx, img.Layers)
	if err != nil {
		return err
	}
	l := v.l
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop(v.it)
	l.hold(v.it, img)
	v.it.need = missing
	for _, d := range missing {
		if l.layers[d] == nil {
			l.layers[d] = &needed{}
		}
	}
	v.own = map[digest.Digest]digest.Digest{}
	for _, layer := range img.Layers {
		v.own[layer.Digest] = layer.DiffID
		if l.layers[layer.DiffID] != nil {
			l.blobs[layer.Digest] = layer.DiffID
		}
	}
	return nil
}

func (v *visitor) Want(blob digest.Digest) bool {
	v.l.mu.Lock()
	defer v.l.mu.Unlock()
	diffIDs := v.own
	if diffIDs == nil {
		diffIDs = v.l.blobs // what other images say of the blob
	}
	layer := v.l.layers[diffIDs[blob]]
	if layer == nil || layer.state != free {
		return false
	}
	layer.state = busy
	v.taken = diffIDs[blob]
	return true
}

func (v *visitor) Visit(b *archive.Blob) error {
	l, d := v.l, v.taken
	n, err := l.o.Store.Stage(l.ctx, d, b)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.became(d, free)
		if reason := reasonOf(err); v.own == nil && (reason == archive.DigestMismatch || reason == archive.CorruptArchive) {
			// Another image may have lied about the blob, and this one may
			// not have it. If it does, it is read again, and has its verdict.
			delete(l.blobs, b.Digest)
			return nil
		}
		return err
	}
	l.sum.LayersWritten++
	l.sum.BytesWritten += n
	l.became(d, done)
	return nil
}

func (v *visitor) More() bool {
	v.l.mu.Lock()
	defer v.l.mu.Unlock()
	for _, d := range v.it.need {
		if v.l.layers[d].state == free {
			return true
		}
	}
	return false
}

// inOrder puts an image's layers into a store that takes them one after the
// other, reading the archive as often as their order in it demands.
func (l *load) inOrder(it *item) error {
	img, err := it.archive.Image(l.ctx, it.img)
	if err != nil {
		return err
	}
	if err := l.o.Store.Allowed(l.ctx, img); err != nil {
		return err
	}
	for {
		v := &ordered{l: l}
		img, err := it.archive.Visit(l.ctx, it.img, v)
		if err != nil {
			return err
		}
		if v.next == len(img.Layers) {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.drop(it)
			l.hold(it, img)
			return nil
		}
		if v.put == 0 {
			return &archive.Error{Reason: archive.CorruptArchive, Err: fmt.Errorf("read %s: layer %s is missing", it.archive.Name, img.Layers[v.next].Digest)}
		}
	}
}

type ordered struct {
	l      *load
	layers []archive.Layer
	next   int // the first layer that is not placed
	put    int
}

func (v *ordered) Resolved(img *archive.Image) (err error) {
	v.layers = img.Layers
	v.next, err = v.l.o.Store.Placed(v.l.ctx, v.layers)
	return err
}

func (v *ordered) Want(blob digest.Digest) bool {
	return v.More() && v.layers[v.next].Digest == blob
}

func (v *ordered) Visit(b *archive.Blob) error {
	n, err := v.l.o.Store.PutLayer(v.l.ctx, v.layers, v.next, b)
	if err != nil {
		return err
	}
	v.put++
	v.l.mu.Lock()
	v.l.sum.LayersWritten++
	v.l.sum.BytesWritten += n
	v.l.mu.Unlock()
	v.next, err = v.l.o.Store.Placed(context.WithoutCancel(v.l.ctx), v.layers)
	return err
}

func (v *ordered) More() bool { return v.next < len(v.layers) }
