package storetest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Check fails the test unless all holds that must hold in a whole store: each layer is what its records say, each
// image has its layers and its data, and nothing is left that belongs to neither.
func Check(t testing.TB, s *Store) {
	t.Helper()
	const most = 25
	if faults := Faults(t, s); len(faults) > 0 {
		n := len(faults)
		t.Errorf("store %s is not whole: %d faults\n  %s", s.Root, n, strings.Join(faults[:min(n, most)], "\n  "))
	}
}

// Faults says, a line each, what does not hold in a store.
func Faults(t testing.TB, s *Store) []string {
	t.Helper()
	c := checker{s: s, layers: s.Layers(t), images: s.Images(t)}
	for id, l := range c.layers {
		c.layer(id, l)
	}
	for id, img := range c.images {
		c.image(id, img)
	}
	s.Names(t)
	c.leftovers()
	return c.faults
}

// CheckEmpty fails the test unless a store has neither images nor layers nor what was left of some.
func CheckEmpty(t testing.TB, s *Store) {
	t.Helper()
	if n, m := len(s.Images(t)), len(s.Layers(t)); n > 0 || m > 0 {
		t.Errorf("store %s has %d images and %d layers, want none", s.Root, n, m)
	}
	Check(t, s)
}

type checker struct {
	s      *Store
	layers map[string]Layer
	images map[string]Image
	faults []string
}

func (c *checker) fault(format string, args ...any) {
	c.faults = append(c.faults, fmt.Sprintf(format, args...))
}

// layer checks a layer's record against its files.
func (c *checker) layer(id string, l Layer) {
	if len(l.Flags) > 0 {
		c.fault("layer %s has flags %v", id, l.Flags)
	}
	if _, ok := c.layers[l.Parent]; l.Parent != "" && !ok {
		c.fault("layer %s: its parent %s is not there", id, l.Parent)
	}
	if want := chainID(l.Parent, l.DiffID); id != want {
		c.fault("layer %s: its diffID %s and its parent make %s", id, l.DiffID, want)
	}
	if got, size, err := c.s.rebuild(id, io.Discard); err != nil {
		c.fault("layer %s: rebuild its tar: %v", id, err)
	} else if got != l.DiffID || size != l.Size {
		c.fault("layer %s: its files make a tar of digest %s and %d bytes, layers.json says %s and %d", id, got, size, l.DiffID, l.Size)
	}
	if c.s.Driver == "overlay" {
		c.links(id, l)
	}
}

// chainID is the ID that containers-storage gives a layer.
func chainID(parent, diffID string) string {
	encoded := strings.TrimPrefix(diffID, "sha256:")
	if parent == "" {
		return encoded
	}
	sum := sha256.Sum256([]byte(parent + "+" + encoded))
	return hex.EncodeToString(sum[:])
}

// links checks how the overlay driver finds a layer and those below it.
func (c *checker) links(id string, l Layer) {
	home := filepath.Join(c.s.Root, "overlay")
	link := c.read(id, "link")
	if to, err := os.Readlink(filepath.Join(home, "l", link)); err != nil || to != "../"+id+"/diff" {
		c.fault("layer %s: its link %q points to %q (%v)", id, link, to, err)
	}
	want := ""
	if l.Parent != "" {
		want = "l/" + c.read(l.Parent, "link")
		if c.layers[l.Parent].Parent != "" {
			want += ":" + c.read(l.Parent, "lower")
		}
		if got := c.read(id, "lower"); got != want {
			c.fault("layer %s: lower is %q, want %q", id, got, want)
		}
	} else if _, err := os.Lstat(filepath.Join(home, id, "lower")); err == nil {
		c.fault("layer %s has no parent but a file lower", id)
	}
}

func (c *checker) read(id, file string) string {
	b, err := os.ReadFile(filepath.Join(c.s.Root, "overlay", id, file))
	if err != nil {
		c.fault("layer %s: %v", id, err)
	}
	return string(b)
}

// image checks an image's record against its data and its layers.
func (c *checker) image(id string, img Image) {
	data, err := c.s.data(id)
	if err != nil {
		c.fault("image %s: %v", id, err)
		return
	}
	for key, b := range data {
		if size, ok := img.Sizes[key]; !ok || size != int64(len(b)) {
			c.fault("image %s: data %s has %d bytes, images.json says %d", id, key, len(b), size)
		}
	}
	for _, key := range img.Data {
		if _, ok := data[key]; !ok {
			c.fault("image %s: data %s is not there", id, key)
		}
	}
	for key := range data {
		if digest, ok := strings.CutPrefix(key, "manifest-"); ok || strings.HasPrefix(key, "sha256:") {
			sum := sha256.Sum256([]byte(data[key]))
			if !ok {
				digest = key
			}
			if got := "sha256:" + hex.EncodeToString(sum[:]); got != digest {
				c.fault("image %s: data %s has digest %s", id, key, got)
			}
		}
	}
	if _, ok := data["manifest-"+img.Digest]; !ok {
		c.fault("image %s has digest %s, but no manifest of it", id, img.Digest)
	}
	var config struct {
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal([]byte(data["sha256:"+id]), &config); err != nil {
		c.fault("image %s: parse config: %v", id, err)
		return
	}
	var diffIDs []string
	for at := img.TopLayer; at != ""; at = c.layers[at].Parent {
		l, ok := c.layers[at]
		if !ok {
			c.fault("image %s: its layer %s is not there", id, at)
			return
		}
		diffIDs = append([]string{l.DiffID}, diffIDs...)
	}
	if !slices.Equal(diffIDs, config.RootFS.DiffIDs) {
		c.fault("image %s has layers %q, its config says %q", id, diffIDs, config.RootFS.DiffIDs)
	}
}

// leftovers looks for files that no record names.
func (c *checker) leftovers() {
	layer := func(name string) bool { _, ok := c.layers[name]; return ok }
	c.only(c.s.Driver+"-layers", func(name string) bool {
		id, split := strings.CutSuffix(name, ".tar-split.gz")
		return split && layer(id) || slices.Contains([]string{"layers.json", "layers.lock", "volatile-layers.json", "tmp"}, name)
	})
	c.only(c.s.Driver+"-layers/tmp", func(string) bool { return false })
	c.only(c.s.Driver+"-images", func(name string) bool {
		_, ok := c.images[name]
		return ok || name == "images.json" || name == "images.lock"
	})
	c.only(".precache-agent/staging", func(string) bool { return false })
	c.only(".precache-agent/tmp", func(string) bool { return false })
	if c.s.Driver == "vfs" {
		c.only("vfs/dir", layer)
		return
	}
	c.only("overlay", func(name string) bool {
		return layer(name) || name == "l" || name == "staging" || strings.HasPrefix(name, ".has-") || name == "backingFsBlockDev"
	})
	c.only("overlay/staging", func(string) bool { return false })
	links := map[string]bool{}
	for id := range c.layers {
		links[c.read(id, "link")] = true
	}
	c.only("overlay/l", func(name string) bool { return links[name] })
}

// only reports what a folder, if there is one, should not have.
func (c *checker) only(dir string, allowed func(string) bool) {
	entries, err := os.ReadDir(filepath.Join(c.s.Root, dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.fault("%v", err)
	}
	for _, e := range entries {
		if !allowed(e.Name()) {
			c.fault("%s/%s should not be there", dir, e.Name())
		}
	}
}
