package archive

import (
	"context"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
)

// aheadFrom is the size of a blob, in bytes, from which inflating it in a goroutine of its own pays.
const aheadFrom = 512 << 10

// A Blob is one layer at the reader. It is read once, by [Blob.Unpack].
type Blob struct {
	Digest digest.Digest // as the manifest names it
	Size   int64         // in bytes; -1 if nobody said
	r      io.Reader
	plain  bool // Digest is that of the plain content (docker-archive)
	tenant *tenant
}

// Unpack calls f with the plain content of the blob, and returns f's error, or
// an [Error] if the blob is not what its digest and size say. The content ends
// with io.EOF only if it is.
func (b *Blob) Unpack(ctx context.Context, f func(plain io.Reader, c Compression) error) error {
	raw := b.r
	var v *verifier
	if !b.plain {
		v = newVerifier(b.r, b.Digest, b.Size)
		raw = v
	}
	z, c, err := decompress(ctx, raw, b.tenant)
	if err != nil {
		return b.prefer(v, classify(CorruptArchive, noEOF(err)))
	}
	defer z.Close()
	plain := io.Reader(&marked{z})
	if b.plain {
		v = newVerifier(plain, b.Digest, b.Size)
		plain = v
	}
	content := &judged{r: plain, blob: v}
	if b.Size < aheadFrom && b.Size >= 0 {
		err = f(content, c)
	} else {
		var a io.ReadCloser
		if a, err = ahead(content); err != nil {
			return err
		}
		err = f(a, c)
		a.Close() // before anything else reads what it reads from
	}
	if err == nil { // whatever f has left
		_, err = io.Copy(io.Discard, content)
	}
	return b.prefer(v, err)
}

// A judged reader ends with io.EOF only if the whole blob is what it should be:
// what is made of its content need not be unmade then.
type judged struct {
	r    io.Reader
	blob *verifier
}

func (j *judged) Read(p []byte) (int, error) {
	n, err := j.r.Read(p)
	if err == io.EOF {
		if _, verdict := io.Copy(io.Discard, j.blob); verdict != nil {
			err = classify(CorruptArchive, noEOF(verdict))
		}
	}
	return n, err
}

// prefer returns the digest's verdict in place of what a damaged blob did
// further down: "digest is" says more than "invalid code lengths".
func (b *Blob) prefer(v *verifier, err error) error {
	if ReasonOf(err) != CorruptArchive || v == nil || v.failed {
		return err
	}
	if _, verdict := io.Copy(io.Discard, v); ReasonOf(verdict) == DigestMismatch {
		return verdict
	}
	return err
}

// marked gives the errors of a decompressor their reason.
type marked struct{ r io.Reader }

func (m *marked) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	if err != nil && err != io.EOF {
		err = classify(CorruptArchive, err)
	}
	return n, err
}

// NewVerifier returns a reader of r that ends with io.EOF only if the content
// has the digest, and otherwise with an [Error] whose reason is DigestMismatch.
func NewVerifier(r io.Reader, want digest.Digest) io.Reader { return newVerifier(r, want, -1) }

// A verifier gives its verdict in place of io.EOF.
type verifier struct {
	r      io.Reader
	want   digest.Digest
	size   int64 // -1: any
	h      hash.Hash
	n      int64
	failed bool // the input failed, not the verdict
}

func newVerifier(r io.Reader, want digest.Digest, size int64) *verifier {
	return &verifier{r: r, want: want, size: size, h: want.Algorithm().Hash()}
}

func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.h.Write(p[:n])
	v.n += int64(n)
	switch {
	case v.size >= 0 && v.n > v.size:
		return n, fault(DigestMismatch, "%s is longer than %d bytes", v.want, v.size)
	case err == io.EOF:
		if v.size >= 0 && v.n < v.size {
			return n, fault(DigestMismatch, "%s has %d bytes, want %d", v.want, v.n, v.size)
		}
		if got := digest.NewDigest(v.want.Algorithm(), v.h); got != v.want {
			return n, fault(DigestMismatch, "%s has digest %s", v.want, got)
		}
	case err != nil:
		v.failed = true
	}
	return n, err
}
