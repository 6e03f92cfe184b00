package storetest

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// Compare fails the test if a store is not what another one, made by skopeo, is: images with IDs, digests, names
// and data; layers with IDs, parents and all that layers.json says of them but when they came; and of every layer
// each file in its folder. Only times of folders that the layer itself does not name may differ.
func Compare(t testing.TB, got, want *Store) {
	t.Helper()
	c := compare(t, got, want)
	c.report(t, "store "+got.Root+" is not like "+want.Root)
}

func compare(t testing.TB, got, want *Store) *comparison {
	t.Helper()
	c := &comparison{got: got, want: want}
	c.images(t)
	c.layers(t)
	return c
}

// CompareMounted fails the test if podman, mounting each image of both stores, shows different trees.
func CompareMounted(t testing.TB, got, want *Store) {
	t.Helper()
	layers := want.Layers(t)
	for id, img := range want.Images(t) {
		timed := map[string]bool{} // by path: whether the highest layer that has it names it
		for l := img.TopLayer; l != ""; l = layers[l].Parent {
			tree, named := want.layerTree(t, l)
			for path := range tree {
				if _, higher := timed[path]; !higher {
					timed[path] = named[path]
				}
			}
		}
		c := comparison{got: got, want: want}
		a, b := mounted(t, want, id), mounted(t, got, id)
		c.lines = a.Diff(b, func(path string) bool { return timed[path] })
		c.report(t, fmt.Sprintf("image %s %q, mounted, is not like the one in %s", id, img.Names, want.Root))
	}
}

func mounted(t testing.TB, s *Store, id string) Tree {
	t.Helper()
	at := strings.TrimSpace(s.Podman(t, "image", "mount", id))
	tree, err := ReadTree(at)
	s.Podman(t, "image", "unmount", id)
	if err != nil {
		t.Fatalf("read image %s mounted at %s: %v", id, at, err)
	}
	return tree
}

// A comparison collects differences.
type comparison struct {
	got, want *Store
	lines     []string
}

func (c *comparison) add(format string, args ...any) {
	c.lines = append(c.lines, fmt.Sprintf(format, args...))
}

func (c *comparison) report(t testing.TB, title string) {
	t.Helper()
	const most, longest = 25, 400 // lines, bytes
	if len(c.lines) == 0 {
		return
	}
	n := len(c.lines)
	for i, line := range c.lines {
		if len(line) > longest {
			c.lines[i] = line[:longest] + "..."
		}
	}
	if n > most {
		c.lines = append(c.lines[:most], fmt.Sprintf("and %d more", n-most))
	}
	t.Errorf("%s: %d differences\n  %s", title, n, strings.Join(c.lines, "\n  "))
}

// keys reports what only one of two maps has, and returns what both have.
func keys[V, W any](c *comparison, what string, got map[string]V, want map[string]W) (both []string) {
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if _, ok := got[k]; ok {
			both = append(both, k)
		} else {
			c.add("%s %s is missing", what, k)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[k]; !ok {
			c.add("%s %s should not be there", what, k)
		}
	}
	return both
}

// fields reports which fields of an index's entry differ.
func (c *comparison) fields(what string, got, want map[string]any, but ...string) {
	all := maps.Clone(want)
	maps.Copy(all, got)
	for _, k := range slices.Sorted(maps.Keys(all)) {
		if !slices.Contains(but, k) && !reflect.DeepEqual(got[k], want[k]) {
			c.add("%s: %s is %s, want %s", what, k, text(got[k]), text(want[k]))
		}
	}
}

// sorted are the elements of a list in JSON, none if it is not there.
func sorted(list any) (elements []string) {
	all, _ := list.([]any)
	for _, e := range all {
		elements = append(elements, text(e))
	}
	slices.Sort(elements)
	return elements
}

func text(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func (c *comparison) images(t testing.TB) {
	t.Helper()
	got, want := c.got.Images(t), c.want.Images(t)
	for _, id := range keys(c, "image", got, want) {
		what := fmt.Sprintf("image %.12s (%.80s)", id, strings.Join(want[id].Names, " "))
		a, b := want[id], got[id]
		for _, unordered := range []string{"names", "names-history", "big-data-names"} {
			if got, want := sorted(b.raw[unordered]), sorted(a.raw[unordered]); !slices.Equal(got, want) {
				c.add("%s: %s is %q, want %q", what, unordered, got, want)
			}
		}
		c.fields(what, b.raw, a.raw, "names", "names-history", "big-data-names", "metadata")
		var am, bm any // JSON in JSON
		if json.Unmarshal([]byte(a.Metadata), &am) != nil || json.Unmarshal([]byte(b.Metadata), &bm) != nil || !reflect.DeepEqual(am, bm) {
			c.add("%s: metadata is %s, want %s", what, b.Metadata, a.Metadata)
		}
		ad, err := c.want.data(id)
		if err != nil {
			t.Fatal(err)
		}
		bd, err := c.got.data(id)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range keys(c, what+": data", bd, ad) {
			if bd[k] != ad[k] {
				c.add("%s: data %s is %.200q, want %.200q", what, k, bd[k], ad[k])
			}
		}
	}
}

// layerTree reads a layer's own files, and says which paths among them the layer names.
func (s *Store) layerTree(t testing.TB, id string) (tree Tree, named map[string]bool) {
	t.Helper()
	tree, err := ReadTree(s.tree(id))
	if err != nil {
		t.Fatal(err)
	}
	names, err := s.named(id)
	if err != nil {
		t.Fatalf("read names of layer %s: %v", id, err)
	}
	named = map[string]bool{}
	for path := range names {
		named[tree.resolve(path)] = true
	}
	return tree, named
}

func (c *comparison) layers(t testing.TB) {
	t.Helper()
	got, want := c.got.Layers(t), c.want.Layers(t)
	// Of a copy of a layer that is in the store at another place, skopeo notes a blob that it did not read, and not
	// always with its size. The agent notes none, or the one that it did read.
	places := map[string]int{}
	for _, l := range want {
		places[l.DiffID]++
	}
	for _, id := range keys(c, "layer", got, want) {
		what := fmt.Sprintf("layer %.12s", id)
		but := []string{"created"}
		if places[want[id].DiffID] > 1 {
			but = append(but, "compressed-size", "compression")
			if got[id].CompressedDigest == "" {
				but = append(but, "compressed-diff-digest")
			}
		}
		if c.want.Driver == "vfs" {
			but = append(but, "compression") // the library notes that of what it is fed
		}
		c.fields(what, got[id].raw, want[id].raw, but...)
		tree, named := c.want.layerTree(t, id)
		other, err := ReadTree(c.got.tree(id))
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range tree.Diff(other, func(path string) bool { return named[path] }) {
			c.add("%s: %s", what, line)
		}
		if c.want.Driver == "overlay" {
			c.folder(t, what, id)
		}
	}
}

// folder compares what stands beside a layer's files.
func (c *comparison) folder(t testing.TB, what, id string) {
	t.Helper()
	list := func(s *Store) map[string]os.FileMode {
		dir := filepath.Join(s.Root, "overlay", id)
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		modes := map[string]os.FileMode{}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				t.Fatal(err)
			}
			modes[e.Name()] = info.Mode()
		}
		info, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		modes["."] = info.Mode()
		delete(modes, "diff")   // compared with its content
		delete(modes, "merged") // made when the layer is mounted
		return modes
	}
	got, want := list(c.got), list(c.want)
	for _, name := range keys(c, what+": file", got, want) {
		if got[name] != want[name] {
			c.add("%s: file %s has mode %v, want %v", what, name, got[name], want[name])
		}
	}
}
