package manifest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"testing/iotest"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

var (
	hexA   = strings.Repeat("a", 64)
	hexB   = strings.Repeat("b", 64)
	sha384 = "sha384:" + strings.Repeat("c", 96)
	sha512 = "sha512:" + strings.Repeat("d", 128)
)

const release = "quay.io/openshift-release-dev/ocp-v4.0-art-dev"

func TestParseListReferences(t *testing.T) {
	for _, tt := range []struct {
		line, ref, digest string
		err               error
	}{
		{line: "quay.io/a/b:v1", ref: "quay.io/a/b:v1"},
		{line: "quay.io/a/b", ref: "quay.io/a/b:latest"},
		{line: "busybox", ref: "docker.io/library/busybox:latest"},
		{line: "index.docker.io/busybox", ref: "docker.io/library/busybox:latest"},
		{line: "localhost:5000/b", ref: "localhost:5000/b:latest"},
		{line: "quay.io/a/b@sha256:" + hexA, ref: "quay.io/a/b@sha256:" + hexA, digest: "sha256:" + hexA},
		{line: "quay.io/a/b@" + sha384, ref: "quay.io/a/b@" + sha384, digest: sha384},
		{line: "quay.io/a/b@" + sha512, ref: "quay.io/a/b@" + sha512, digest: sha512},
		{line: "quay.io/a/b:v1@sha256:" + hexA, ref: "quay.io/a/b:v1@sha256:" + hexA, digest: "sha256:" + hexA},
		{line: "  quay.io/a/b:v1\tsecond column  ", ref: "quay.io/a/b:v1"},
		{line: "quay.io/a/b:v1 # a comment", ref: "quay.io/a/b:v1"},
		{line: "quay.io/a/b:" + strings.Repeat("t", 128), ref: "quay.io/a/b:" + strings.Repeat("t", 128)},
		{line: "quay.io/a/b:" + strings.Repeat("t", 129), err: reference.ErrReferenceInvalidFormat},
		{line: "quay.io/" + strings.Repeat("p", 255), ref: "quay.io/" + strings.Repeat("p", 255) + ":latest"},
		{line: "quay.io/" + strings.Repeat("p", 256), err: reference.ErrNameTooLong},
		{line: "quay.io/a/b:v1#no-comment", err: reference.ErrReferenceInvalidFormat},
		{line: "docker://quay.io/a/b:v1", err: reference.ErrReferenceInvalidFormat},
		{line: "quay.io/../b:v1", err: reference.ErrReferenceInvalidFormat},
		{line: "quay.io/a/..", err: reference.ErrReferenceInvalidFormat},
		{line: "quay.io/a/b@sha256:" + hexA[:63], err: digest.ErrDigestInvalidLength},
		{line: "quay.io/a/b@sha256:" + hexA + "a", err: digest.ErrDigestInvalidLength},
		{line: "quay.io/a/b@sha256:" + strings.ToUpper(hexA), err: digest.ErrDigestInvalidFormat},
		{line: "quay.io/a/b@md5:" + hexA[:32], err: digest.ErrDigestUnsupported},
		{line: "quay.io/a/b@", err: reference.ErrReferenceInvalidFormat},
		{line: hexA, err: errAny},              // an image ID
		{line: "quay.io/A/b", err: errAny},     // upper case
		{line: "quay.io/a/\xffb", err: errAny}, // not UTF-8
	} {
		entries, bad, err := ParseList(strings.NewReader(tt.line), "l")
		switch {
		case err != nil:
			t.Errorf("%q: %v", tt.line, err)
		case tt.err != nil:
			if len(entries) != 0 || len(bad) != 1 || (tt.err != errAny && !errors.Is(bad[0], tt.err)) {
				t.Errorf("%q: got %v, %v, want the error %v", tt.line, entries, bad, tt.err)
			}
		default:
			want := []Entry{{tt.ref, digest.Digest(tt.digest), strings.Fields(tt.line)[0], 1}}
			if !reflect.DeepEqual(entries, want) || bad != nil {
				t.Errorf("%q: got %v, %v, want %v", tt.line, entries, bad, want)
			}
		}
	}
}

var errAny = errors.New("any")

func TestParseListLines(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       string // LINE:REF of entries, LINE! of bad lines
	}{
		{"empty", "", ""},
		{"no newline at the end", "a:1\nb:1", "1:a:1 2:b:1"},
		{"CRLF", "a:1\r\n\r\nb:1\r\n", "1:a:1 3:b:1"},
		{"blank and comments", "# c\n\n \t \na:1\n  # c\nb:1\n", "4:a:1 6:b:1"},
		{"byte order mark", "\xef\xbb\xbfa:1\n", "1:a:1"},
		{"byte order mark alone", "\xef\xbb\xbf", ""},
		{"byte order mark before a comment", "\xef\xbb\xbf# c\na:1\n", "2:a:1"},
		{"byte order mark in the middle", "a:1\n\xef\xbb\xbfb:1\n", "1:a:1 2!"},
		{"duplicates", "a:1\nb:1\ndocker.io/library/a:1\na:1 x\n", "1:a:1 2:b:1"},
		{"latest and none are one", "a\na:latest\n", "1:a:latest"},
		{"bad lines between", "-\na:1\n?? x\nb:1\n", "1! 2:a:1 3! 4:b:1"},
		{"comment that is no UTF-8", "# M\xfcller\na:1\n", "2:a:1"},
		{"line as long as can be", "a:1 " + strings.Repeat("x", maxLine-4) + "\nb:1\n", "1:a:1 2:b:1"},
		{"the same with CRLF", "a:1 " + strings.Repeat("x", maxLine-4) + "\r\nb:1\n", "1:a:1 2:b:1"},
		{"the same at the end", "a:1 " + strings.Repeat("x", maxLine-4), "1:a:1"},
		{"line one too long", "a:1 " + strings.Repeat("x", maxLine-3) + "\nb:1\n", "1! 2:b:1"},
		{"the same with CRLF", "a:1 " + strings.Repeat("x", maxLine-3) + "\r\nb:1\n", "1! 2:b:1"},
		{"the same at the end", "a:1 " + strings.Repeat("x", maxLine-3), "1!"},
		{"far too long", "a:1 " + strings.Repeat("x", 10*maxLine) + "\nb:1\n", "1! 2:b:1"},
		{"far too long at the end", "a:1\n" + strings.Repeat("x", 10*maxLine), "1:a:1 2!"},
		{"reference behind many blanks", strings.Repeat(" ", 2*maxLine) + "a:1\n", "1!"},
		{"comment far too long", "#" + strings.Repeat("x", 10*maxLine) + "\nb:1\n", "2:b:1"},
	} {
		for _, r := range []io.Reader{strings.NewReader(tt.text), iotest.OneByteReader(strings.NewReader(tt.text))} {
			entries, bad, err := ParseList(r, "l")
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
			if got := describe(entries, bad); got != tt.want {
				t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
			}
		}
	}
}

// describe lists entries and bad lines in the order of their lines.
func describe(entries []Entry, bad []*LineError) string {
	var words []string
	for len(entries) > 0 || len(bad) > 0 {
		if len(bad) == 0 || (len(entries) > 0 && entries[0].Line < bad[0].Line) {
			words = append(words, fmt.Sprintf("%d:%s", entries[0].Line, strings.TrimPrefix(entries[0].Ref, "docker.io/library/")))
			entries = entries[1:]
		} else {
			words = append(words, fmt.Sprintf("%d!", bad[0].Line))
			bad = bad[1:]
		}
	}
	return strings.Join(words, " ")
}

// repeat yields text again and again, n bytes in all.
func repeat(text string, n int) io.Reader {
	return io.MultiReader(strings.NewReader(strings.Repeat(text, n/len(text))), strings.NewReader(text[:n%len(text)]))
}

func TestParseListBounds(t *testing.T) {
	long := "a:1 " + strings.Repeat("x", 4091) + "\n" // 4 KiB
	broken := errors.New("I/O error")
	for _, tt := range []struct {
		name    string
		r       io.Reader
		err     error
		entries int
		bad     int
	}{
		{"as large as can be", repeat(long, maxFile), nil, 1, 0},
		{"as large as can be, last line open", io.MultiReader(repeat(long, maxFile-len(long)), strings.NewReader("b:2 "+long[4:len(long)-1]+"x")), nil, 2, 0},
		{"one byte larger", repeat(long, maxFile+1), errTooLarge, 1, 0},
		{"one line too large", repeat("x", maxFile+1), errTooLarge, 0, 0},
		{"endless", endless{}, errTooLarge, 0, 0},
		{"as many as can be", io.MultiReader(repeat("#\n", 2*maxLines-2), strings.NewReader("a:1\n")), nil, 1, 0},
		{"one more", io.MultiReader(repeat("#\n", 2*maxLines), strings.NewReader("a:1\n")), errLines, 0, 0},
		{"many bad", repeat("-\n", 2*maxBad), nil, 0, maxBad},
		{"one more bad", io.MultiReader(repeat("-\n", 2*maxBad+2), strings.NewReader("a:1\n")), nil, 1, maxBad + 1},
		{"NUL", strings.NewReader("a:1\nb\x00:1\n"), errNotText, 1, 0},
		{"NUL far out", strings.NewReader("a:1\n" + strings.Repeat("x", 2*maxLine) + "\x00"), errNotText, 1, 0},
		{"UTF-16", strings.NewReader("\xff\xfea\x00:\x001\x00\n\x00"), errNotText, 0, 0},
		{"broken in a line", io.MultiReader(strings.NewReader("a:1\nb:1"), iotest.ErrReader(broken)), broken, 1, 0},
		{"broken in a long line", io.MultiReader(strings.NewReader("a:1\n"+strings.Repeat("x", 2*maxLine)), iotest.ErrReader(broken)), broken, 1, 0},
		{"broken at once", iotest.ErrReader(broken), broken, 0, 0},
	} {
		entries, bad, err := ParseList(tt.r, "l")
		if err != tt.err || len(entries) != tt.entries || len(bad) != tt.bad {
			t.Errorf("%s: got %d entries, %d bad, %v; want %d, %d, %v", tt.name, len(entries), len(bad), err, tt.entries, tt.bad, tt.err)
		}
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

func TestLineError(t *testing.T) {
	_, bad, _ := ParseList(strings.NewReader("a:1\n\nxx yy  \n"), "ai-images.txt")
	if len(bad) != 0 {
		t.Errorf("a second column counted: %v", bad)
	}
	_, bad, _ = ParseList(strings.NewReader("a:1\n\nXx: yy\x1b[m  \r\n"), "ai-images.txt")
	if got, want := bad[0].Error(), `ai-images.txt:3: "Xx: yy\x1b[m": `; !strings.HasPrefix(got, want) {
		t.Errorf("got %s, want %s…", got, want)
	}
	whole := &LineError{File: "mapping.txt", Err: errNotText}
	if got, want := whole.Error(), "mapping.txt: is not a text file"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for n, want := range map[int]string{
		maxText:     strings.Repeat("?", maxText),
		maxText + 1: strings.Repeat("?", maxText) + "…",
		5 * maxLine: strings.Repeat("?", maxText) + "…",
	} {
		_, bad, _ = ParseList(strings.NewReader(strings.Repeat("?", n)), "l")
		if bad[0].Text != want {
			t.Errorf("%d bytes: got %q, want %q", n, bad[0].Text, want)
		}
	}
	_, bad, _ = ParseList(strings.NewReader("?"+strings.Repeat("é", maxText)), "l")
	if want := "?" + strings.Repeat("é", maxText/2-1) + "…"; bad[0].Text != want {
		t.Errorf("cut inside a character: %q", bad[0].Text)
	}
}

func TestParseMapping(t *testing.T) {
	d := "@sha256:" + hexA
	for _, tt := range []struct {
		name, text string
		want       map[string]string
		bad        []int
	}{
		{name: "empty", want: map[string]string{}},
		{name: "the factory's", text: release + d + "=openshift/release:4.13.0-x86_64-must-gather\n", want: map[string]string{release + d: "4.13.0-x86_64-must-gather"}},
		{name: "source normalized", text: "busybox=x:v1\n", want: map[string]string{"docker.io/library/busybox:latest": "v1"}},
		{name: "destination with a port", text: "q.io/a:1=reg:5000/a:v1\n", want: map[string]string{"q.io/a:1": "v1"}},
		{name: "destination by digest", text: "q.io/a:1=reg/a@sha256:" + hexB, want: map[string]string{"q.io/a:1": hexB}},
		{name: "CRLF, comments, byte order mark, second column", text: "\xef\xbb\xbf# c\r\n\r\nq.io/a:1=x:v1  more\r\n", want: map[string]string{"q.io/a:1": "v1"}},
		{name: "first line counts", text: "q.io/a:1=x:v1\nq.io/a:1=x:v2\n", want: map[string]string{"q.io/a:1": "v1"}},
		{name: "even an unusable one", text: "q.io/a:1=x:-\nq.io/a:1=x:v2\n", want: map[string]string{"q.io/a:1": ""}, bad: []int{1}},
		{name: "no tag", text: "q.io/a:1=x\nq.io/b:1=reg:5000/x\nq.io/c:1=\nq.io/d:1=x:\n", want: map[string]string{"q.io/a:1": "", "q.io/b:1": "", "q.io/c:1": "", "q.io/d:1": ""}, bad: []int{1, 2, 3, 4}},
		{name: "longest tag", text: "q.io/a:1=x:" + strings.Repeat("t", 128), want: map[string]string{"q.io/a:1": strings.Repeat("t", 128)}},
		{name: "tag too long", text: "q.io/a:1=x:" + strings.Repeat("t", 129), want: map[string]string{"q.io/a:1": ""}, bad: []int{1}},
		{name: "a second = belongs to the destination", text: "q.io/a:1=x=y:v1", want: map[string]string{"q.io/a:1": "v1"}},
		{name: "no such line", text: "q.io/a:1\n=x:v1\noci://a=x:v1\nq.io/b:1 = x:v1\nq.io/c:1=x:v1\n", want: map[string]string{"q.io/c:1": "v1"}, bad: []int{1, 2, 3, 4}},
		{name: "line too long", text: "q.io/a:1=x:v1 " + strings.Repeat("x", maxLine) + "\nq.io/b:1=x:v1\n", want: map[string]string{"q.io/b:1": "v1"}, bad: []int{1}},
	} {
		m, bad, err := ParseMapping(strings.NewReader(tt.text), "mapping.txt")
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		got := map[string]string{}
		for ref, to := range m {
			got[ref] = to.Tag
		}
		var lines []int
		for _, e := range bad {
			lines = append(lines, e.Line)
		}
		if !reflect.DeepEqual(got, tt.want) || !reflect.DeepEqual(lines, tt.bad) {
			t.Errorf("%s: got %v, bad lines %v (%v); want %v, %v", tt.name, got, lines, bad, tt.want, tt.bad)
		}
	}
	long := strings.Repeat("#\n", maxLines) + "a=x:v1\n"
	if m, _, err := ParseMapping(strings.NewReader(long), "mapping.txt"); err != errLines || len(m) != 0 {
		t.Errorf("too many lines: got %v and %v", m, err)
	}
}

func TestArchiveNames(t *testing.T) {
	for listed, want := range map[string][]string{
		release + "@sha256:" + hexA:            {"ocp-v4.0-art-dev@sha256_" + hexA},
		"quay.io/edge/repository:v1":           {"repository_v1"},
		"quay.io/edge/repository":              {"repository"},
		"localhost:5000/repository":            {"repository"},
		"localhost:5000/repository:v1":         {"repository_v1"},
		"busybox:1.36":                         {"busybox_1.36"},
		"quay.io/edge/name:tag@sha256:" + hexA: {"name_tag@sha256:" + hexA, "name_tag@sha256_" + hexA},
		"":                                     nil,
		"..":                                   nil,
		"quay.io/..":                           nil,
		"quay.io/":                             nil,
	} {
		if got := (Image{Listed: listed}).ArchiveNames(); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %q, want %q", listed, got, want)
		}
	}
}

func TestAllNames(t *testing.T) {
	img := Image{Ref: "a:1", Names: []string{"b:1"}}
	if got := append(img.AllNames(), "c"); !reflect.DeepEqual(got, []string{"a:1", "b:1", "c"}) || len(img.Names) != 1 {
		t.Error(got, img)
	}
}

func TestGroups(t *testing.T) {
	file := &fstest.MapFile{}
	got, err := Groups(fstest.MapFS{
		"ocp-images.txt": file, "ai-images.txt": file, "my.set_1-x-images.txt": file, "ignored-images.txt": file, "mapping.txt": file,
		"-images.txt": file, ".ai-images.txt": file, "._ai-images.txt": file, "ai-images.txt.bak": file, "sub/b-images.txt": file, "images.txt": file,
	})
	if want := []string{"ai", "my.set_1-x", "ocp"}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if got, err := Groups(fstest.MapFS{"mapping.txt": file}); err != nil || len(got) != 0 {
		t.Errorf("a folder without lists: got %v, %v", got, err)
	}
	var le *ListError
	if got, err := Groups(fstest.MapFS{"AI-images.txt": file}); !errors.As(err, &le) || le.File != "AI-images.txt" {
		t.Errorf("a list that can be no group: got %v, %v", got, err)
	}
	if _, err := Groups(os.DirFS(filepath.Join(t.TempDir(), "none"))); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: got %v", err)
	}
	for _, bad := range []string{"", ".", "..", "-a", ".a", "A", "a/b", "a b", "ä", "a\n", "ignored"} {
		if CheckGroup(bad) == nil {
			t.Errorf("group %q is allowed", bad)
		}
		if _, err := Read(fstest.MapFS{}, []string{bad}); err == nil || errors.As(err, &le) {
			t.Errorf("group %q: got %v", bad, err)
		}
	}
}

func text(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }

func TestRead(t *testing.T) {
	a, b := release+"@sha256:"+hexA, release+"@sha256:"+hexB
	set, err := Read(fstest.MapFS{
		"ai-images.txt":  text("# discovery\n" + a + "\nquay.io/edge/own:v1\n??\nbusybox\n"),
		"ocp-images.txt": text(b + "\r\n" + a + "\r\n!!\r\ndocker.io/library/busybox:latest\r\n"),
		"mapping.txt": text(b + "=openshift/release:4.13.0-b\n" + a + "=openshift/release:4.13.0-a\n" +
			"nonsense\nquay.io/edge/own:v1=edge/own:v1\nbusybox=x:-\n"),
	}, []string{"ai", "ocp", "ai"})
	if err != nil {
		t.Fatal(err)
	}
	want := []Image{
		{Ref: a, Names: []string{release + ":4.13.0-a"}, Digest: digest.Digest("sha256:" + hexA), Groups: []string{"ai", "ocp"}, Listed: a, File: "ai-images.txt", Line: 2},
		{Ref: "quay.io/edge/own:v1", Groups: []string{"ai"}, Listed: "quay.io/edge/own:v1", File: "ai-images.txt", Line: 3},
		{Ref: "docker.io/library/busybox:latest", Groups: []string{"ai", "ocp"}, Listed: "busybox", File: "ai-images.txt", Line: 5},
		{Ref: b, Digest: digest.Digest("sha256:" + hexB), Groups: []string{"ocp"}, Listed: b, File: "ocp-images.txt", Line: 1},
	}
	if !reflect.DeepEqual(set.Images, want) {
		t.Errorf("images\n got %+v\nwant %+v", set.Images, want)
	}
	if want := []string{"ai", "ocp"}; !reflect.DeepEqual(set.Groups, want) {
		t.Errorf("groups: got %v, want %v", set.Groups, want)
	}
	check := func(what string, errs []*LineError, want ...string) {
		t.Helper()
		var got []string
		for _, e := range errs {
			got = append(got, fmt.Sprintf("%s:%d", e.File, e.Line))
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %v, want %v", what, errs, want)
		}
	}
	check("bad", set.Bad, "ai-images.txt:4", "ocp-images.txt:3")
	check("warnings", set.Warnings, "mapping.txt:3", "mapping.txt:5")

	set, err = Read(fstest.MapFS{"ocp-images.txt": text(a), "mapping.txt": text("nonsense\n" + a + "=x:v1\n")}, []string{"ocp"})
	if err != nil || len(set.Images[0].Names) != 0 || len(set.Warnings) != 0 {
		t.Errorf("mapping.txt counted for a group that it does not concern: %+v, %v", set, err)
	}
	set, err = Read(fstest.MapFS{"ai-images.txt": text("???\n")}, []string{"ai"})
	if err != nil || len(set.Images) != 0 || len(set.Bad) != 1 {
		t.Errorf("a list of bad lines: %+v, %v", set, err)
	}
	if set, err := Read(fstest.MapFS{}, nil); err == nil {
		t.Errorf("no group: %+v", set)
	}
}

// A name that two images claim stays with one of them, and a listed reference goes before a further name.
func TestReadNameTwice(t *testing.T) {
	a, b := "q.io/x@sha256:"+hexA, "q.io/x@sha256:"+hexB
	set, err := Read(fstest.MapFS{
		"ai-images.txt": text(a + "\n" + b + "\nq.io/x:listed\nq.io/x:v3@sha256:" + hexA),
		"mapping.txt":   text("q.io/x:v3@sha256:" + hexA + "=y:listed\n" + b + "=y:v1\n" + a + "=y:v1\n"),
	}, []string{"ai"})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{1, 0, 0, 0} {
		if got := set.Images[i]; len(got.Names) != want {
			t.Errorf("%s: got names %v", got.Ref, got.Names)
		}
	}
	if len(set.Warnings) != 2 || set.Warnings[0].Line != 1 || set.Warnings[1].Line != 2 {
		t.Errorf("warnings: %v", set.Warnings)
	}
}

func TestReadUnreadable(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("secret", "a:1\n")
	must(t, os.Mkdir(filepath.Join(dir, "part"), 0o755))
	must(t, os.Mkdir(filepath.Join(dir, "part", "dir-images.txt"), 0o755))
	must(t, os.Symlink("../secret", filepath.Join(dir, "part", "out-images.txt")))
	must(t, os.Symlink(filepath.Join(dir, "secret"), filepath.Join(dir, "part", "abs-images.txt")))
	must(t, os.Symlink("nowhere", filepath.Join(dir, "part", "dangling-images.txt")))
	must(t, os.Symlink("good-images.txt", filepath.Join(dir, "part", "in-images.txt")))
	must(t, syscall.Mkfifo(filepath.Join(dir, "part", "fifo-images.txt"), 0o644))
	must(t, os.Symlink("/dev/zero", filepath.Join(dir, "part", "zero-images.txt")))
	write("part/good-images.txt", "a:1\n")
	write("part/empty-images.txt", "\n# nothing\n")
	write("part/binary-images.txt", "\x1f\x8b\x08\x00\x00")
	write("part/large-images.txt", strings.Repeat("#"+strings.Repeat("x", 1022)+"\n", maxFile>>10)+"b")
	root, err := os.OpenRoot(filepath.Join(dir, "part"))
	must(t, err)
	defer root.Close()

	for group, want := range map[string]string{
		"missing": "no such file", "dangling": "no such file", "dir": "is a directory", "out": "escapes", "abs": "escapes", "zero": "escapes",
		"fifo": "is not a regular file", "empty": "has no image", "binary": "is not a text file", "large": "is larger than 16 MiB",
	} {
		set, err := Read(root.FS(), []string{"good", group})
		var le *ListError
		if !errors.As(err, &le) || le.File != group+"-images.txt" || !strings.Contains(err.Error(), want) || strings.Count(err.Error(), "images.txt") != 1 {
			t.Errorf("%s: got %+v, %v, want an error with %q", group, set, err, want)
		}
	}
	if _, err := Read(root.FS(), []string{"missing"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if set, err := Read(root.FS(), []string{"in"}); err != nil || len(set.Images) != 1 {
		t.Errorf("a symlink inside the folder: %+v, %v", set, err)
	}

	// An unreadable mapping.txt costs names, not images.
	write("part/ai-images.txt", "a:1\n")
	must(t, os.Symlink("../secret", filepath.Join(dir, "part", "mapping.txt")))
	set, err := Read(root.FS(), []string{"ai"})
	if err != nil || len(set.Images) != 1 || len(set.Warnings) != 1 || !strings.HasPrefix(set.Warnings[0].Error(), "mapping.txt: path escapes") {
		t.Errorf("mapping.txt that leads out: %+v, %v", set, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
