package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/fixture"
)

// What a user runs today, one image after the other: PARTITION POLICY TMPDIR REF...
const loop = `set -euo pipefail
cd "$1"; policy=$2 tmp=$3; shift 3
for ref; do
	if podman image exists "$ref"; then continue; fi
	name=${ref##*/} name=${name/:/_}
	tar xzf "$name.tgz"
	skopeo --policy "$policy" --tmpdir "$tmp" copy -q "dir:$name" "containers-storage:$ref"
	rm -rf "$name"
done`

// Every distinct layer once: BLOBS TARGET JOBS.
const floor = `set -euo pipefail
cd "$1"; export target=$2
printf '%s\n' * | xargs -P "$3" -I{} bash -c 'set -euo pipefail; mkdir "$target/$1"; gunzip <"$1" | tar -x -C "$target/$1"' bash {}`

const exists = `for ref; do podman image exists "$ref" || exit; done`

// load runs the agent, behind the command in before. It must load so many images and find so many.
func (b *bench) load(ctx context.Context, s *store, from corpus, jobs, loaded, present int, before ...string) (sample, error) {
	args := append(before, b.agent, "load", "--from", from.dir, "--jobs", strconv.Itoa(jobs), "--progress", "json", "--policy", b.policy())
	m, err := b.measure(ctx, s, args[0], args[1:]...)
	if err != nil {
		return m, err
	}
	sum, err := summary(m)
	if err == nil && (sum.Loaded != loaded || sum.Present != present) {
		err = fmt.Errorf("%d images loaded and %d present, not %d and %d", sum.Loaded, sum.Present, loaded, present)
	}
	return m, err
}

type sums struct {
	Loaded, Present int
	BytesWritten    int64 `json:"bytes_written"`
}

// summary is the last line that the agent prints.
func summary(m sample) (s sums, err error) {
	lines := bytes.Split(bytes.TrimSpace(m.out), []byte("\n"))
	if err := json.Unmarshal(lines[len(lines)-1], &s); err != nil {
		return s, fmt.Errorf("read summary: %w", err)
	}
	return s, nil
}

// A corpus is a partition that was staged.
type corpus struct {
	dir    string
	blobs  string // folder of its layers' blobs, for the big ones
	staged []fixture.Staged
	refs   []string
}

// stage stages a corpus, once, and reads it, so that it is in the page cache.
func (b *bench) stage(ctx context.Context, name string, write func(dir, blobs string, s fixture.Stage) ([]fixture.Staged, error)) (corpus, error) {
	if c, ok := b.corpora[name]; ok {
		return c, nil
	}
	fmt.Fprintln(os.Stderr, "stage", name)
	c := corpus{dir: filepath.Join(b.dir, name), blobs: filepath.Join(b.dir, name+"-blobs")}
	if err := os.Mkdir(c.blobs, 0o755); err != nil {
		return c, err
	}
	stop := func(m []fixture.Member) ([]fixture.Member, error) { return m, ctx.Err() }
	var err error
	if c.staged, err = write(c.dir, c.blobs, fixture.Stage{Edits: []fixture.Edit{stop}}); err != nil {
		return c, err
	}
	for _, s := range c.staged {
		c.refs = append(c.refs, s.Ref)
	}
	b.corpora[name] = c
	return c, errors.Join(warm(c.dir), warm(c.blobs))
}

func warm(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(io.Discard, f)
		return err
	})
}

func (b *bench) stageImages(ctx context.Context) (corpus, error) {
	return b.stage(ctx, "images", func(dir, blobs string, s fixture.Stage) ([]fixture.Staged, error) {
		s.Edits = append(s.Edits, fixture.ManifestLast)
		return fixture.Bench(dir, fixture.Options{N: b.images, LayerBytes: b.layerBytes, Work: blobs, Stage: s})
	})
}

func (b *bench) nameImages() string {
	return fmt.Sprintf("%d images of %.0f MB", b.images, 4*float64(b.layerBytes)/1e6)
}

func (b *bench) stageTiny(ctx context.Context, n int) (corpus, error) {
	return b.stage(ctx, fmt.Sprintf("tiny-%d", n), func(dir, _ string, s fixture.Stage) ([]fixture.Staged, error) {
		return fixture.Tiny(dir, fixture.Options{N: n, Stage: s})
	})
}

// partImages loads images that share three of their four layers.
func (b *bench) partImages(ctx context.Context) error {
	last, err := b.stageImages(ctx)
	if err != nil {
		return err
	}
	first, err := b.stage(ctx, "images-first", func(dir, _ string, s fixture.Stage) ([]fixture.Staged, error) {
		s.Edits = append(s.Edits, fixture.ManifestFirst)
		p := fixture.Partition{Dir: dir, Stage: s}
		for _, s := range last.staged {
			p.Items = append(p.Items, fixture.Item{Ref: s.Ref, Image: s.Image})
		}
		return p.Write()
	})
	if err != nil {
		return err
	}
	names := []string{"agent, manifests last", "agent, manifests first", "loop of tar and skopeo", "floor: gunzip and tar"}
	for _, place := range b.places {
		runs, err := b.interleave(place, names, func(i int, s *store) (sample, error) {
			switch i {
			case 0:
				return b.load(ctx, s, last, b.jobs, b.images, 0)
			case 1:
				return b.load(ctx, s, first, b.jobs, b.images, 0)
			case 2:
				return b.measure(ctx, s, "bash", append([]string{"-c", loop, "bash", last.dir, b.policy(), b.tmp()}, last.refs...)...)
			default:
				return b.measure(ctx, s, "bash", "-c", floor, "bash", last.blobs, s.root, strconv.Itoa(b.jobs))
			}
		})
		if err != nil {
			return err
		}
		for i, name := range names {
			b.figure(place, b.nameImages()+": "+name, runs[i])
		}
		atLeast, atMost := "≥ 3", "≤ 1.3"
		if place == disk {
			atLeast, atMost = "", ""
		}
		for i, order := range []string{"last", "first"} {
			of := fmt.Sprintf("%s, manifests %s: ", b.nameImages(), order)
			b.target(place, of+"loop / agent", "%.2f", ratios(runs[2], runs[i], sample.seconds), atLeast)
			b.target(place, of+"agent / floor", "%.2f", ratios(runs[i], runs[3], sample.seconds), atMost)
			b.target(place, of+"agent / floor, CPU", "%.2f", ratios(runs[i], runs[3], sample.work), "")
			b.target(place, of+"peak RSS", "%.0f MiB", each(runs[i], sample.memory), "≤ 200 MiB")
		}
	}
	return nil
}

// partPresent looks for images that are all there.
func (b *bench) partPresent(ctx context.Context) error {
	tiny, err := b.stageTiny(ctx, b.tiny)
	if err != nil {
		return err
	}
	n := min(b.exists, b.tiny)
	return b.in(ram, func(s *store) error {
		if _, err := b.load(ctx, s, tiny, b.jobs, b.tiny, 0); err != nil {
			return err
		}
		names := []string{fmt.Sprintf("%d tiny images: agent, all present", b.tiny), fmt.Sprintf("%d tiny images: podman image exists of %d", b.tiny, n)}
		runs, err := b.interleave("", names, func(i int, _ *store) (sample, error) {
			if i == 0 {
				return b.load(ctx, s, tiny, b.jobs, 0, b.tiny)
			}
			return b.measure(ctx, s, "bash", append([]string{"-c", exists, "bash"}, tiny.refs[:n]...)...)
		})
		if err != nil {
			return err
		}
		for i, name := range names {
			b.figure(ram, name, runs[i])
		}
		scaled := ratios(runs[1], runs[0], sample.seconds)
		for i := range scaled {
			scaled[i] *= float64(b.tiny) / float64(n)
		}
		b.target(ram, fmt.Sprintf("%d present: podman image exists of each (%d, scaled) / agent", b.tiny, n), "%.0f", scaled, "≥ 20")
		return nil
	})
}

// partTiny loads many images that cost nothing but their bookkeeping.
func (b *bench) partTiny(ctx context.Context) error {
	var names []string
	var tiny []corpus
	for _, n := range []int{b.tiny / 4, b.tiny} {
		c, err := b.stageTiny(ctx, n)
		if err != nil {
			return err
		}
		tiny, names = append(tiny, c), append(names, fmt.Sprintf("%d tiny images: agent", n))
	}
	for _, place := range b.places {
		runs, err := b.interleave(place, names, func(i int, s *store) (sample, error) {
			return b.load(ctx, s, tiny[i], b.jobs, len(tiny[i].refs), 0)
		})
		if err != nil {
			return err
		}
		for i, name := range names {
			b.figure(place, name, runs[i])
		}
		b.target(place, fmt.Sprintf("%d tiny images / %d", b.tiny, b.tiny/4), "%.2f", ratios(runs[1], runs[0], sample.seconds), "≤ 6")
		b.target(place, fmt.Sprintf("%d tiny images: peak RSS", b.tiny), "%.0f MiB", each(runs[1], sample.memory), "≤ 200 MiB")
	}
	return nil
}

// partMultiArch loads one of four architectures.
func (b *bench) partMultiArch(ctx context.Context) error {
	multi, err := b.stage(ctx, "multiarch", func(dir, blobs string, s fixture.Stage) ([]fixture.Staged, error) {
		return fixture.MultiArch(dir, fixture.Options{N: 4, LayerBytes: 8 << 20, Work: blobs, Stage: s})
	})
	if err != nil {
		return err
	}
	needed := map[digest.Digest]int64{}
	for _, s := range multi.staged {
		for _, l := range s.Image.Host().Layers {
			needed[l.DiffID] = l.UncompressedSize
		}
	}
	var bytes int64
	for _, n := range needed {
		bytes += n
	}
	return b.in(ram, func(s *store) error {
		m, err := b.load(ctx, s, multi, b.jobs, len(multi.refs), 0)
		if err != nil {
			return err
		}
		sum, err := summary(m)
		if err != nil {
			return err
		}
		what := fmt.Sprintf("%d images for four architectures, manifests last: ", len(multi.refs))
		b.figure(ram, what+"agent", []sample{m})
		b.target(ram, what+"bytes staged, as the agent counts / needed", "%.2f", []float64{float64(sum.BytesWritten) / float64(bytes)}, "≤ 1.1")
		b.target(ram, what+"bytes given to write(2) / needed", "%.2f", []float64{float64(m.wrote) / float64(bytes)}, "≤ 1.1")
		return nil
	})
}

// partMemory loads what wants much memory: as many archives at once as the agent ever reads, with zstd windows of 8 MiB
// inside others, and among them windows and a dictionary of 64 MiB.
func (b *bench) partMemory(ctx context.Context) error {
	const small, large, jobs = 8 << 20, 64 << 20, 8
	type kind struct {
		layer fixture.LayerSpec
		stage fixture.Stage
	}
	usual := kind{fixture.LayerSpec{Compression: fixture.Zstd, Window: small}, fixture.Stage{Compression: fixture.Zstd, Window: small}}
	kinds := []kind{
		usual, {fixture.LayerSpec{Compression: fixture.None}, fixture.Stage{Compression: fixture.Zstd, Window: large}},
		usual, usual, {fixture.LayerSpec{Compression: fixture.Zstd, Window: large}, fixture.Stage{}},
		usual, usual, {fixture.LayerSpec{Compression: fixture.None}, fixture.Stage{Compression: fixture.XZ, Window: large}},
		usual, usual, usual,
	}
	windows, err := b.stage(ctx, "windows", func(dir, blobs string, s fixture.Stage) ([]fixture.Staged, error) {
		tree, err := fixture.Scan()
		if err != nil {
			return nil, err
		}
		p := fixture.Partition{Dir: dir}
		for i, k := range kinds {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			k.layer.Dir = blobs
			k.layer.Files = &fixture.Files{Tree: tree, Bytes: b.windowBytes, Offset: b.windowBytes * int64(i), Marker: strconv.Itoa(i)}
			k.stage.Edits = s.Edits
			layer, err := fixture.NewLayer(k.layer)
			if err != nil {
				return nil, err
			}
			img, err := fixture.NewImage(fixture.ImageSpec{OCI: true, Layers: []*fixture.Layer{layer}})
			if err != nil {
				return nil, err
			}
			p.Items = append(p.Items, fixture.Item{Ref: "registry.example.com/windows/image", Image: img, Stage: &k.stage})
		}
		return p.Write()
	})
	if err != nil {
		return err
	}
	name := fmt.Sprintf("%d archives, zstd windows and an xz dictionary of up to 64 MiB, %d jobs: ", len(kinds), jobs)
	runs, err := b.interleave(ram, []string{name + "agent"}, func(_ int, s *store) (sample, error) {
		return b.load(ctx, s, windows, jobs, len(kinds), 0)
	})
	if err != nil {
		return err
	}
	b.figure(ram, name+"agent", runs[0])
	b.target(ram, name+"peak RSS", "%.0f MiB", each(runs[0], sample.memory), "≤ 200 MiB")
	return nil
}

// partSync counts what the sync barriers cost on disk.
func (b *bench) partSync(ctx context.Context) error {
	if _, err := exec.LookPath("strace"); err != nil {
		b.notes = append(b.notes, "What the sync barriers cost is left out: strace is not installed.")
		return nil
	}
	images, err := b.stageImages(ctx)
	if err != nil {
		return err
	}
	tiny, err := b.stageTiny(ctx, b.tiny)
	if err != nil {
		return err
	}
	calls := []string{"syncfs", "fsync", "fdatasync"}
	counts := filepath.Join(b.tmp(), "strace")
	for _, c := range []struct {
		corpus
		name string
	}{{images, b.nameImages()}, {tiny, fmt.Sprintf("%d tiny images", b.tiny)}} {
		var m sample
		err := b.in(disk, func(s *store) (err error) {
			m, err = b.load(ctx, s, c.corpus, b.jobs, len(c.refs), 0, "strace", "-f", "--seccomp-bpf", "-c", "-w", "-e", "trace="+strings.Join(calls, ","), "-o", counts)
			return err
		})
		if err != nil {
			return err
		}
		text, err := os.ReadFile(counts)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line) // % time, seconds, usecs/call, calls, errors if there are any, syscall
			if len(f) >= 5 && slices.Contains(calls, f[len(f)-1]) {
				seconds, _ := strconv.ParseFloat(f[1], 64)
				b.syncs.add(c.name, f[len(f)-1], f[3], fmt.Sprintf("%.2f s", seconds), fmt.Sprintf("%.2f s", m.wall.Seconds()))
			}
		}
	}
	return nil
}
