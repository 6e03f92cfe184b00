package integration

import (
	"slices"
	"strings"
	"testing"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

// An ordinary user can verify a partition, and is told every fault.
func TestVerify(t *testing.T) {
	storetest.Need(t)
	verify := func(dir string) outcome {
		readable(t, dir)
		p := command("verify", "--from", dir)
		p.cmd.SysProcAttr = nobody()
		return p.start(t).wait(t, time30)
	}
	good := shapes(t)
	dir, staged := partition(t, good...)
	if o := verify(dir); o.code != exitOK || strings.Count(o.out, "whole  ") != len(staged) || o.err != "" {
		t.Errorf("of a whole partition, it ends with %d and says\n%s%s", o.code, o.out, o.err)
	}

	b := &badBuilder{t: t, name: "verify"}
	damaged := b.image()
	items := []fixture.Item{
		{Image: damaged, Stage: &fixture.Stage{Edits: []fixture.Edit{
			fixture.Drop(damaged.Layers[0].Digest.Encoded()), fixture.Flip(damaged.Layers[1].Digest.Encoded(), 100), fixture.Flip(damaged.ConfigDigest.Encoded(), 10)}}},
		{Image: b.image(), Missing: true},
		good[0],
	}
	for _, bad := range bads {
		// What only a load can see, or what depends on the machine, is not verify's; and some take long to make.
		beyond := func(words string) bool { return strings.Contains(bad.name, words) }
		if bad.after == nil && !slices.ContainsFunc([]string{"diffID", "its digest says", "window", "names a file", "hard link", "this machine", "1 GB"}, beyond) {
			items = append(items, bad.item(&badBuilder{t: t, name: bad.name}))
		}
	}
	for n := range items {
		if items[n].Ref == "" {
			items[n].Ref = "registry.example.com/verify/image"
		}
	}
	dir, staged = partition(t, items...)
	o := verify(dir)
	if o.code != exitIncomplete {
		t.Errorf("of a damaged partition, it ends with %d, want 3\n%s", o.code, tail(o.err))
	}
	for n, st := range staged {
		if faulty := strings.Contains(o.out, "faulty "+st.Ref); faulty == (n == 2) {
			t.Errorf("image %d (%s) is called faulty: %v\n%s", n, st.Ref, faulty, tail(o.out))
		}
	}
	for _, what := range []string{
		"layer " + string(damaged.Layers[0].Digest) + " is missing", string(damaged.Layers[1].Digest) + " has digest", "config has digest", "missing-archive",
	} {
		if !strings.Contains(o.out, what) {
			t.Errorf("it does not say %q:\n%s", what, tail(o.out))
		}
	}
	if o.peak > mostMemory {
		t.Errorf("%d MiB of memory are used, at most 200 may be", o.peak>>20)
	}
}
