package archive

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/fixture"
)

func TestVerifyGood(t *testing.T) {
	for name, img := range images(t) {
		for _, format := range []fixture.Format{fixture.DirLayout, fixture.OCILayout, fixture.DockerArchive, fixture.DockerLegacy} {
			for _, order := range orders {
				for _, folder := range []bool{false, true} {
					if folder && (order.edits != nil || format == fixture.DockerLegacy) {
						continue
					}
					ref := repo
					if format >= fixture.DockerArchive {
						ref = repo + ":v1"
					}
					a, of := stage(t, fixture.Stage{Format: format, Folder: folder, Edits: order.edits}, ref, img)
					if errs := a.Verify(t.Context(), of); len(errs) != 0 {
						t.Errorf("%s, format %d, %s, folder %v: %v", name, format, order.name, folder, errs)
					}
				}
			}
		}
	}
}

// A fault is one error that verify has to report: its reason, and what names the thing.
type wanted struct {
	reason Reason
	text   string
}

func wantFaults(t *testing.T, errs []error, want []wanted) {
	t.Helper()
	left := slices.Clone(errs)
	for _, w := range want {
		i := slices.IndexFunc(left, func(err error) bool { return ReasonOf(err) == w.reason && strings.Contains(err.Error(), w.text) })
		if i < 0 {
			t.Errorf("no fault %q with %q", w.reason, w.text)
			continue
		}
		left = slices.Delete(left, i, i+1)
	}
	if len(left) > 0 || t.Failed() {
		t.Errorf("of %q, %d were not expected", errs, len(left))
	}
}

// All faults are told, not only the first.
func TestVerifyFaults(t *testing.T) {
	large := func(seed uint64) *fixture.Layer { return big(t, seed, maxHeld+1) } // is not kept in memory
	a, b, c, d := text(t, "a"), large(1), text(t, "c"), text(t, "d")
	img := imageOf(t, a, b, c, d, a)
	hex := func(d digest.Digest) string { return d.Encoded() }
	otherPin := digest.FromString("another")
	for _, tt := range []struct {
		name  string
		ref   string
		edits []fixture.Edit
		want  []wanted
	}{
		{name: "a flipped layer", edits: []fixture.Edit{fixture.Flip(hex(a.Digest), 20)}, want: []wanted{{DigestMismatch, hex(a.Digest)}}},
		{name: "two flipped layers", edits: []fixture.Edit{fixture.Flip(hex(a.Digest), 20), fixture.Flip(hex(b.Digest), -1)},
			want: []wanted{{DigestMismatch, hex(a.Digest)}, {DigestMismatch, hex(b.Digest)}}},
		{name: "a missing layer", edits: []fixture.Edit{fixture.Drop(hex(a.Digest))}, want: []wanted{{CorruptArchive, hex(a.Digest)}}},
		{name: "a missing config", edits: []fixture.Edit{fixture.Drop(hex(img.ConfigDigest))}, want: []wanted{{CorruptArchive, hex(img.ConfigDigest)}}},
		{name: "a flipped config", edits: []fixture.Edit{fixture.Flip(hex(img.ConfigDigest), 5)}, want: []wanted{{DigestMismatch, "config"}}},
		{name: "a missing manifest", edits: []fixture.Edit{fixture.Drop("manifest.json")}, want: []wanted{{CorruptArchive, "manifest"}}},
		{name: "a wrong pin", ref: repo + "@" + otherPin.String(), want: []wanted{{DigestMismatch, hex(otherPin)}}},
		{name: "everything at once", ref: repo + "@" + otherPin.String(),
			edits: []fixture.Edit{fixture.Flip(hex(a.Digest), 20), fixture.Cut(hex(b.Digest), 1<<20), fixture.Drop(hex(c.Digest)), fixture.Replace(hex(d.Digest), nil), fixture.Drop(hex(img.ConfigDigest))},
			want: []wanted{{DigestMismatch, hex(otherPin)}, {DigestMismatch, hex(a.Digest)}, {DigestMismatch, hex(b.Digest)},
				{CorruptArchive, hex(c.Digest)}, {DigestMismatch, hex(d.Digest)}, {CorruptArchive, hex(img.ConfigDigest)}}},
	} {
		for _, order := range orders[:4] {
			for _, format := range []fixture.Format{fixture.DirLayout, fixture.OCILayout} {
				if format == fixture.OCILayout && (strings.Contains(tt.name, "manifest") || tt.ref != "") {
					continue // index.json is in between
				}
				t.Run(fmt.Sprintf("%s/%s/format %d", tt.name, order.name, format), func(t *testing.T) {
					ref := tt.ref
					if ref == "" {
						ref = repo
					}
					a, of := stage(t, fixture.Stage{Format: format, Compression: fixture.None, Edits: append(slices.Clone(tt.edits), order.edits...)}, ref, img)
					wantFaults(t, a.Verify(t.Context(), of), tt.want)
				})
			}
		}
	}
}

// Of a docker-archive, too: what its layers hold is what its config says.
func TestVerifyDockerFaults(t *testing.T) {
	a, b, c := text(t, "a"), text(t, "b"), text(t, "c")
	img := imageOf(t, a, b, c)
	for _, order := range orders {
		x, of := stage(t, fixture.Stage{Format: fixture.DockerArchive, Edits: append([]fixture.Edit{
			fixture.Flip(a.DiffID.Encoded()+".tar", 5), fixture.Flip(c.DiffID.Encoded()+".tar", -1),
		}, order.edits...)}, repo+":v1", img)
		wantFaults(t, x.Verify(t.Context(), of), []wanted{{DigestMismatch, a.DiffID.Encoded()}, {DigestMismatch, c.DiffID.Encoded()}})
	}
}

// Every instance of a list that is staged is verified, for this machine or not; one has to be.
func TestVerifyList(t *testing.T) {
	x, y, base := text(t, "x"), text(t, "y"), text(t, "base")
	host := imageOf(t, base, x)
	other := newImage(t, fixture.ImageSpec{Arch: "mips64", Layers: []*fixture.Layer{base, y}})
	third := newImage(t, fixture.ImageSpec{Arch: "loong64", Layers: []*fixture.Layer{base}})
	list := newList(t, fixture.ListSpec{Instances: []*fixture.Image{other, host, third}})
	instance := func(i *fixture.Image) string { return i.Digest.Encoded() + ".manifest.json" }
	for _, tt := range []struct {
		name  string
		edits []fixture.Edit
		want  []wanted
	}{
		{"good", nil, nil},
		{"one is not staged", []fixture.Edit{fixture.Drop(instance(third)), fixture.Drop(third.ConfigDigest.Encoded())}, nil},
		{"only another machine's is staged", []fixture.Edit{fixture.Drop(instance(third)), fixture.Drop(instance(host))}, nil},
		{"none is staged", []fixture.Edit{fixture.Drop(instance(third)), fixture.Drop(instance(host)), fixture.Drop(instance(other))},
			[]wanted{{CorruptArchive, "none of the list's 3 instances"}}},
		{"another machine's layer", []fixture.Edit{fixture.Flip(y.Digest.Encoded(), 20)}, []wanted{{DigestMismatch, y.Digest.Encoded()}}},
		{"a shared layer, told once", []fixture.Edit{fixture.Flip(base.Digest.Encoded(), 20)}, []wanted{{DigestMismatch, base.Digest.Encoded()}}},
		{"a flipped instance", []fixture.Edit{fixture.Flip(instance(other), 20)}, []wanted{{DigestMismatch, other.Digest.Encoded()}}},
		{"a fault in each", []fixture.Edit{fixture.Drop(y.Digest.Encoded()), fixture.Flip(x.Digest.Encoded(), 20), fixture.Drop(third.ConfigDigest.Encoded())},
			[]wanted{{CorruptArchive, y.Digest.Encoded()}, {DigestMismatch, x.Digest.Encoded()}, {CorruptArchive, third.ConfigDigest.Encoded()}}},
	} {
		for _, order := range orders {
			t.Run(tt.name+"/"+order.name, func(t *testing.T) {
				a, of := stage(t, fixture.Stage{Edits: append(slices.Clone(tt.edits), order.edits...)}, repo, list)
				wantFaults(t, a.Verify(t.Context(), of), tt.want)
			})
		}
	}
}

// Verify reads an archive once, and a plain one as well as a compressed one.
func TestVerifyReadsOnce(t *testing.T) {
	img := imageOf(t, big(t, 1, maxHeld+1), text(t, "x"))
	for _, c := range []fixture.Compression{fixture.None, fixture.Gzip} {
		for _, order := range orders {
			a, of := stage(t, fixture.Stage{Compression: c, Edits: order.edits}, repo, img)
			if errs := a.Verify(t.Context(), of); len(errs) != 0 {
				t.Errorf("%s: %v", order.name, errs)
			}
			if read := float64(a.BytesRead()) / float64(a.Size); read > 1.1 {
				t.Errorf("%s, outer %d: read %.2f times the archive", order.name, c, read)
			}
		}
	}
}
