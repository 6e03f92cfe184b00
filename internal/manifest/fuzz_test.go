package manifest

import (
	"bytes"
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"testing/iotest"
)

// checkLines holds what is true of every line error of a file.
func checkLines(t *testing.T, data []byte, bad []*LineError) {
	t.Helper()
	last := 0
	for i, e := range bad {
		if e.Line == 0 && i == maxBad {
			continue
		}
		if e.Line <= last || e.Line > 1+bytes.Count(data, []byte("\n")) {
			t.Errorf("error %d is on line %d, after line %d, of %d", i, e.Line, last, 1+bytes.Count(data, []byte("\n")))
		}
		if e.Text == "" && e.Err != errLong || len(e.Text) > maxText+len("…") || e.Err == nil || strings.Contains(e.Error(), "\n") {
			t.Errorf("error %d: %#v", i, e)
		}
		last = e.Line
	}
	if len(bad) > maxBad+1 {
		t.Errorf("%d errors", len(bad))
	}
}

func checkRef(t *testing.T, ref string) {
	t.Helper()
	if named, err := parse(ref); err != nil || named.String() != ref {
		t.Errorf("%q parses to %v, %v", ref, named, err)
	}
	if strings.ContainsAny(ref, " \t\r\n\x00=#") {
		t.Errorf("%q has a character that no reference has", ref)
	}
}

func FuzzParseList(f *testing.F) {
	for _, s := range []string{
		"", "# c\r\n\r\nquay.io/a/b:v1 second\r\nbusybox\n", "\xef\xbb\xbf" + release + "@sha256:" + hexA,
		"q.io/a:v1@" + sha512 + "\nq.io/a@" + sha384 + "\nq.io/a@md5:" + hexA, hexA + "\n??\n", "a\nA\na:latest\n", "a:1\n\x00",
		strings.Repeat(" ", maxLine-1) + "a", strings.Repeat(" ", maxLine) + "a", "[::1]:5000/a:1\nX.Y/a\nlocalhost/a\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, bad, err := ParseList(bytes.NewReader(data), "l-images.txt")
		checkLines(t, data, bad)
		lines := bytes.Split(bytes.TrimPrefix(data, []byte("\xef\xbb\xbf")), []byte("\n"))
		badLines := map[int]bool{}
		for _, e := range bad {
			badLines[e.Line] = true
		}
		var refs []string
		last := 0
		for _, e := range entries {
			checkRef(t, e.Ref)
			if named, err := parse(e.Listed); err != nil || named.String() != e.Ref {
				t.Errorf("%q is listed as %q, which parses to %v, %v", e.Ref, e.Listed, named, err)
			}
			if e.Digest != "" && (e.Digest.Validate() != nil || !strings.HasSuffix(e.Ref, "@"+e.Digest.String())) || e.Digest == "" && strings.Contains(e.Ref, "@") {
				t.Errorf("%q pins %q", e.Ref, e.Digest)
			}
			if e.Line <= last || e.Line > len(lines) || badLines[e.Line] {
				t.Fatalf("%q is on line %d of %d, after line %d; bad are %v", e.Ref, e.Line, len(lines), last, bad)
			}
			if got := string(bytes.Fields(lines[e.Line-1])[0]); got != e.Listed {
				t.Errorf("line %d has %q, not %q", e.Line, got, e.Listed)
			}
			if slices.Contains(refs, e.Ref) {
				t.Errorf("%q twice", e.Ref)
			}
			refs = append(refs, e.Ref)
			last = e.Line
		}
		if err != nil {
			return
		}
		again, badAgain, err := ParseList(iotest.OneByteReader(bytes.NewReader(data)), "l-images.txt")
		if err != nil || !reflect.DeepEqual(again, entries) || len(badAgain) != len(bad) {
			t.Errorf("byte by byte: %v, %v, %v; at once: %v, %v", again, badAgain, err, entries, bad)
		}

		// Merging changes nothing: neither the list beside itself, nor the references it came to.
		fsys := fstest.MapFS{"l-images.txt": {Data: data}, "m-images.txt": {Data: []byte(strings.Join(refs, "\r\n"))}}
		set, err := Read(fsys, []string{"l", "m"})
		if len(refs) == 0 {
			if err == nil {
				t.Errorf("no error for an empty list: %+v", set)
			}
			return
		}
		if err != nil || len(set.Bad) != len(bad) || len(set.Images) != len(refs) {
			t.Fatalf("%+v, %v; want %q", set, err, refs)
		}
		for i, img := range set.Images {
			if img.Ref != refs[i] || !slices.Equal(img.Groups, []string{"l", "m"}) || img.Line != entries[i].Line || len(img.ArchiveNames()) == 0 {
				t.Errorf("image %d: %+v, want %+v", i, img, entries[i])
			}
		}
	})
}

func FuzzParseMapping(f *testing.F) {
	d := "@sha256:" + hexA
	for _, s := range []string{
		"", release + d + "=openshift/release:4.13.0-x86_64-must-gather\r\n", "a=b:1\na:latest=b:2\nc=b:-\n", "\xef\xbb\xbf# c\n\na=b:c:d=e:f\n",
		"a=x:v1\na:v2=x:v1\na:v3=x:v2\na:v2" + d + "=reg:5000/x:v2\n", "=\n==\na=\n:=:\n", "a=x@sha256:" + hexB,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		mapping, bad, _ := ParseMapping(bytes.NewReader(data), "mapping.txt")
		checkLines(t, data, bad)
		badLines := map[int]bool{}
		for _, e := range bad {
			badLines[e.Line] = true
		}
		var refs []string
		for ref, to := range mapping {
			checkRef(t, ref)
			if to.Line < 1 || to.Line > 1+bytes.Count(data, []byte("\n")) {
				t.Errorf("%q is on line %d", ref, to.Line)
			}
			source, rest, ok := strings.Cut(to.Text, "=")
			if named, err := parse(source); !ok || err != nil || named.String() != ref {
				t.Errorf("%q comes from %q", ref, to.Text)
			}
			switch {
			case to.Tag == "":
				if !badLines[to.Line] && len(bad) <= maxBad {
					t.Errorf("%q has no tag and line %d is not bad", ref, to.Line)
				}
			case !strings.HasSuffix(rest, ":"+to.Tag) || badLines[to.Line]:
				t.Errorf("%q gets the tag %q from %q; bad: %v", ref, to.Tag, to.Text, badLines[to.Line])
			default:
				checkRef(t, withTag(ref, to.Tag))
			}
			refs = append(refs, ref)
		}
		if len(refs) == 0 {
			return
		}

		// Whatever the file says, no two images share a name, and nothing is left out but a further name.
		slices.Sort(refs)
		set, err := Read(fstest.MapFS{"ai-images.txt": {Data: []byte(strings.Join(refs, "\n"))}, "mapping.txt": {Data: data}}, []string{"ai"})
		if err != nil || len(set.Images) != len(refs) {
			t.Fatalf("%+v, %v; want %q", set, err, refs)
		}
		owner := map[string]string{}
		for _, img := range set.Images {
			for _, name := range img.AllNames() {
				if owner[name] != "" {
					t.Errorf("%s belongs to %s and to %s", name, owner[name], img.Ref)
				}
				owner[name] = img.Ref
			}
			named, _ := parse(img.Ref)
			for _, name := range img.Names {
				if !strings.HasPrefix(name, named.Name()+":") {
					t.Errorf("%s is called %s", img.Ref, name)
				}
			}
		}
	})
}

func FuzzArchiveNames(f *testing.F) {
	for _, s := range []string{
		release + "@sha256:" + hexA, "quay.io/a/repository:v1", "name:tag@sha256:" + hexA, "busybox", "localhost:5000/a",
		"", ".", "..", "/", "a/..", "../..", "a//", ":", "::", "..:", ":..",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, listed string) {
		names := Image{Listed: listed}.ArchiveNames()
		base := listed[strings.LastIndex(listed, "/")+1:]
		for i, name := range names {
			if name == "" || name == "." || name == ".." || strings.Contains(name, "/") || slices.Contains(names[:i], name) {
				t.Errorf("%q: %q", listed, names)
			}
			if len(name) != len(base) || strings.Count(base, ":") > 0 && strings.Count(name, ":") == strings.Count(base, ":") {
				t.Errorf("%q: %q does not come from %q", listed, name, base)
			}
		}
		if _, err := parse(listed); err != nil {
			return
		}
		if len(names) == 0 || strings.Contains(names[len(names)-1], ":") || !fs.ValidPath(names[0]) {
			t.Errorf("%q: %q", listed, names)
		}
		if (strings.Count(base, ":") > 1) != (len(names) == 2) {
			t.Errorf("%q: %q", listed, names)
		}
	})
}
