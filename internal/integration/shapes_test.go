package integration

import (
	"archive/tar"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/precache/precache-agent/internal/fixture"
)

// The layers that the images of a test partition are made of.
type layers struct {
	base, other, modes, links, whiteouts, empty, app, appZstd, appPlain, rooted, rootless, names *fixture.Layer
}

// capability is the value of security.capability for cap_net_raw=ep, version 2 (linux/capability.h).
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func makeLayers(t testing.TB) layers {
	t.Helper()
	entries := func(e ...fixture.Entry) *fixture.Layer { return layer(t, fixture.LayerSpec{Entries: e}) }
	app := []fixture.Entry{{Name: "app/"}, {Name: "app/run", Mode: 0o755, Data: "#!/bin/sh\n"}, {Name: "app/data", Data: strings.Repeat("data\n", 5000)}}
	old := time.Date(1999, 12, 31, 23, 59, 59, 0, time.UTC)
	long := strings.Repeat("long-name-", 20)
	return layers{
		base: entries(
			fixture.Entry{Name: "usr/"}, fixture.Entry{Name: "usr/bin/", Mode: 0o711, ModTime: old}, fixture.Entry{Name: "usr/lib/"},
			fixture.Entry{Name: "lib", Link: "usr/lib"}, fixture.Entry{Name: "usr/bin/sh", Mode: 0o755, Data: "sh"},
			fixture.Entry{Name: "etc/"}, fixture.Entry{Name: "etc/gone", Data: "gone"}, fixture.Entry{Name: "etc/dir/"}, fixture.Entry{Name: "etc/dir/file", Data: "1"},
			fixture.Entry{Name: "opt/"}, fixture.Entry{Name: "opt/a", Data: "a"}, fixture.Entry{Name: "opt/b/c", Data: "c"},
			fixture.Entry{Name: "tmp/", Mode: 0o1777}, fixture.Entry{Name: "unlisted/parent/file", Data: "its folders stand nowhere"},
		),
		other: entries(fixture.Entry{Name: "other", Data: "another base"}),
		modes: entries(
			fixture.Entry{Name: "bin/su", Mode: 0o4755, Data: "su"}, fixture.Entry{Name: "bin/wall", Mode: 0o2755, GID: 5, Data: "wall"},
			fixture.Entry{Name: "bin/ping", Mode: 0o755, Data: "ping", Xattrs: map[string]string{"security.capability": capability}},
			fixture.Entry{Name: "secret", Mode: fixture.ModeNone, UID: 70000, GID: 4000000, Data: "secret"},
			fixture.Entry{Name: "attributes", Data: "x", Xattrs: map[string]string{"user.one": "1", "user.two": "a\x00b", "trusted.three": "3"}},
			fixture.Entry{Name: "folder/", Mode: 0o2750, UID: 12, GID: 34, Xattrs: map[string]string{"user.folder": "yes"}},
			fixture.Entry{Name: "dev/null", Type: tar.TypeChar, Major: 1, Minor: 3, Mode: 0o666}, fixture.Entry{Name: "dev/disk", Type: tar.TypeBlock, Major: 8, Minor: 1, Mode: 0o660, GID: 6},
			fixture.Entry{Name: "dev/wide", Type: tar.TypeChar, Major: 250, Minor: 70000}, fixture.Entry{Name: "run/fifo", Type: tar.TypeFifo, Mode: 0o600},
			fixture.Entry{Name: "times/old", ModTime: old, Data: "old"}, fixture.Entry{Name: "times/fine", ModTime: old.Add(123456789), Data: "fine"},
			fixture.Entry{Name: "times/", ModTime: old}, fixture.Entry{Name: "nothing"},
		),
		links: entries(
			fixture.Entry{Name: "usr/share/"}, fixture.Entry{Name: "usr/share/file", Data: "linked"}, fixture.Entry{Name: "share", Link: "usr/share"},
			fixture.Entry{Name: "absolute", Link: "/usr/share"}, fixture.Entry{Name: "hard/one", Data: "one file", Mode: 0o4711, UID: 3},
			fixture.Entry{Name: "hard/two", Type: tar.TypeLink, Link: "hard/one"}, fixture.Entry{Name: "hard/three", Type: tar.TypeLink, Link: "hard/two"},
			fixture.Entry{Name: "share/through", Data: "a symlinked parent"}, fixture.Entry{Name: "share/sub/"}, fixture.Entry{Name: "share/sub/x", Data: "x"},
			fixture.Entry{Name: "hard/four", Type: tar.TypeLink, Link: "share/file"},
			fixture.Entry{Name: "dangling", Link: "nowhere/at/all"}, fixture.Entry{Name: "up", Link: "../../../../etc/passwd"}, fixture.Entry{Name: "loop", Link: "loop"},
			fixture.Entry{Name: "owned", Link: "usr", UID: 7, GID: 8},
			fixture.Entry{Name: "lib/in-lower", Data: "lib is a link in the layer below"},
		),
		whiteouts: entries(
			fixture.Entry{Name: "etc/"}, fixture.Entry{Name: "etc/.wh.gone"}, fixture.Entry{Name: "etc/.wh.dir"},
			fixture.Entry{Name: "opt/", Mode: 0o700}, fixture.Entry{Name: "opt/.wh..wh..opq"}, fixture.Entry{Name: "opt/new", Data: "new"},
			fixture.Entry{Name: "usr/.wh.lib"}, fixture.Entry{Name: ".wh.lib"}, fixture.Entry{Name: "nowhere/.wh.never-was"},
		),
		empty:    entries(),
		app:      layer(t, fixture.LayerSpec{Entries: app}),
		appZstd:  layer(t, fixture.LayerSpec{Entries: app, Compression: fixture.Zstd}),
		appPlain: layer(t, fixture.LayerSpec{Entries: app, Compression: fixture.None}),
		rooted:   entries(fixture.Entry{Name: "./", Mode: 0o711, UID: 5, GID: 6, ModTime: old}, fixture.Entry{Name: "./rooted", Data: "r"}),
		rootless: entries(fixture.Entry{Name: "./rootless", Data: "no root of its own"}),
		names: entries(
			fixture.Entry{Name: long + "/" + long + "/" + long, Data: "long"}, fixture.Entry{Name: strings.Repeat("n", 255), Data: "255"},
			fixture.Entry{Name: "ünïcödé/日本語/🐙", Data: "unicode"}, fixture.Entry{Name: "with space and\nnewline", Data: "odd"},
			fixture.Entry{Name: "link", Link: strings.Repeat("target/", 60)}, fixture.Entry{Name: "bytes\xff\xfe", Data: "not UTF-8"},
		),
	}
}

// arches are four architectures, this machine's among them but not first.
func arches() []string {
	all := []string{"s390x", "amd64", "arm64", "ppc64le"}
	if !slices.Contains(all, runtime.GOARCH) {
		all[1] = runtime.GOARCH
	}
	return all
}

// multi is an image for four architectures, with a layer that all share and one of its own for each.
func multi(t testing.TB, name string, oci bool, shared ...*fixture.Layer) *fixture.Image {
	t.Helper()
	var instances []*fixture.Image
	for _, arch := range arches() {
		own := layer(t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "arch", Data: name + " for " + arch}}})
		instances = append(instances, image(t, fixture.ImageSpec{Arch: arch, OCI: oci, Layers: append(slices.Clone(shared), own)}))
	}
	return list(t, fixture.ListSpec{Instances: instances, OCI: oci})
}

// shapes are images of as many kinds as there are.
func shapes(t testing.TB) []fixture.Item {
	t.Helper()
	l := makeLayers(t)
	var items []fixture.Item
	n := 0
	add := func(spec fixture.ImageSpec, layers ...*fixture.Layer) {
		spec.Layers = layers
		spec.Config.Cmd = []string{fmt.Sprint("image ", n)} // each has a config of its own
		n++
		items = append(items, fixture.Item{Ref: "registry.example.com/shapes/image", Image: image(t, spec)})
	}
	docker, oci := fixture.ImageSpec{}, fixture.ImageSpec{OCI: true}
	add(docker, l.base, l.modes, l.links)
	add(docker, l.base, l.whiteouts)
	add(oci, l.base, l.links, l.whiteouts, l.names)
	add(docker, l.base, l.rooted, l.rootless)
	add(docker, l.rooted, l.base)
	add(docker, l.rootless)
	add(oci, l.base, l.empty, l.app, l.empty) // the same blob twice
	add(docker, l.app, l.app, l.app)          // and thrice, on itself
	add(docker, l.base, l.app)                // the same diffID on two parents
	add(docker, l.other, l.app)
	add(oci, l.base, l.appPlain, l.names) // the same diffID, not compressed
	add(docker, l.empty)
	items = append(items,
		fixture.Item{Ref: "registry.example.com/shapes/list", Image: multi(t, "list", false, l.base)},
		fixture.Item{Ref: "registry.example.com/shapes/index", Image: multi(t, "index", true, l.base, l.app)},
		fixture.Item{Ref: "registry.example.com/shapes/tagged:v1.2", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base, l.modes}})},
		fixture.Item{Ref: "busybox:short", Image: multi(t, "tagged list", false, l.other)},
	)
	return items
}
