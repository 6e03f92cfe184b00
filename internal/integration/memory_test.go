package integration

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

// However many and however large the images are, however many are read at once, and whatever windows their
// compression asks for, memory is bounded.
func TestMemory(t *testing.T) {
	storetest.Need(t, "podman", "xz")
	// Three images, of which a compression makes almost nothing; all are read at once.
	large := func(t *testing.T, size int, stage fixture.Stage, spec fixture.LayerSpec) (string, []fixture.Staged) {
		var items []fixture.Item
		for n := range 3 {
			noise := make([]byte, 1<<20)
			rand.NewChaCha8([32]byte{byte(n)}).Read(noise)
			spec.Entries = []fixture.Entry{{Name: "noise", Data: string(noise)}, {Name: "zeros", Data: strings.Repeat("0", size)}}
			items = append(items, fixture.Item{Ref: "registry.example.com/memory/image", Image: image(t, fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{layer(t, spec)}}), Stage: &stage})
		}
		return partition(t, items...)
	}
	for _, tt := range []struct {
		name string
		make func(t *testing.T) string
	}{
		{"400 tiny images", func(t *testing.T) string {
			dir := t.TempDir()
			_, err := fixture.Tiny(dir, fixture.Options{N: 400})
			check(t, err)
			return dir
		}},
		{"an xz dictionary of 64 MiB", func(t *testing.T) string {
			dir, staged := large(t, 66<<20, fixture.Stage{Compression: fixture.None}, fixture.LayerSpec{Compression: fixture.None})
			for _, st := range staged {
				storetest.Run(t, "xz", "--threads=1", "--lzma2=preset=0,dict=64MiB", st.Path)
			}
			return dir
		}},
		{"zstd windows of 64 MiB", func(t *testing.T) string {
			dir, _ := large(t, 66<<20, fixture.Stage{Compression: fixture.None}, fixture.LayerSpec{Compression: fixture.Zstd, Window: 64 << 20})
			return dir
		}},
		{"zstd windows of 8 MiB in one another", func(t *testing.T) string {
			dir, _ := large(t, 12<<20, fixture.Stage{Compression: fixture.Zstd, Window: 8 << 20}, fixture.LayerSpec{Compression: fixture.Zstd, Window: 8 << 20})
			return dir
		}},
		{"configs of almost 4 MiB", func(t *testing.T) string {
			var items []fixture.Item
			for n := range 16 {
				b := &badBuilder{t: t, name: fmt.Sprint("config", n)}
				spec := fixture.ImageSpec{Layers: []*fixture.Layer{b.layer()}, History: nil}
				spec.Config.Labels = map[string]string{"large": strings.Repeat("x", 4<<20-4096)}
				items = append(items, fixture.Item{Ref: "registry.example.com/memory/config", Image: image(t, spec)})
			}
			dir, _ := partition(t, items...)
			return dir
		}},
		{"30,000 files", func(t *testing.T) string {
			entries := make([]fixture.Entry, 30_000)
			for n := range entries {
				entries[n] = fixture.Entry{Name: fmt.Sprintf("a/folder/of/some/depth/%d/file-%d", n%100, n)}
			}
			l := layer(t, fixture.LayerSpec{Entries: entries})
			dir, _ := partition(t, fixture.Item{Ref: "registry.example.com/memory/files", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l}})})
			return dir
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := tt.make(t)
			s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
			o := mustLoad(t, s, dir, "--jobs", "8")
			if o.peak > mostMemory {
				t.Errorf("%d MiB of memory are used, at most 200 may be", o.peak>>20)
			}
			t.Logf("%d MiB, %v", o.peak>>20, o.took)
			storetest.Check(t, s)
		})
	}
}
