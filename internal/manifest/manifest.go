// Package manifest reads what a partition says is to be loaded: its lists, mapping.txt, and the names of its archives.
// It reads text only, and never looks into an archive.
package manifest

import (
	"cmp"
	_ "crypto/sha256" // digests may be sha256,
	_ "crypto/sha512" // sha384 or sha512
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

const (
	listSuffix   = "-images.txt"
	mappingFile  = "mapping.txt"
	mappedGroup  = "ai"      // the group whose images get a further name from mapping.txt
	ignoredGroup = "ignored" // ignored-images.txt is the factory's own bookkeeping
)

// Suffixes are what may follow an archive's NAME, in the order they are tried. The empty one stands for the folder NAME/.
var Suffixes = []string{".tgz", ".tar", ".tar.gz", ".tar.zst", ".tar.xz", ""}

// An Image is one image of a set: the reference it is listed under and its further names.
type Image struct {
	Ref    string        // normalized as containers-storage names it: registry/repository:tag, @digest, or both
	Names  []string      // further names the image gets, normalized, without Ref and without duplicates
	Digest digest.Digest // the manifest digest that Ref pins; empty when Ref has only a tag
	Groups []string      // the groups that list it, in the set's order
	Listed string        // the reference as the list wrote it
	File   string        // the list that named it first
	Line   int           // and the line there, from 1
}

// AllNames returns every name the image gets: Ref, then Names.
func (img Image) AllNames() []string {
	return append([]string{img.Ref}, img.Names...)
}

// ArchiveNames returns the names, without suffix, that the image's archive may have, likeliest first: the factory
// replaces the first colon of the reference's last path component, the older script on the node looked for a name without any.
func (img Image) ArchiveNames() []string {
	base := img.Listed[strings.LastIndexByte(img.Listed, '/')+1:]
	if base == "" || base == "." || base == ".." { // no reference ends so; such a name would leave the folder
		return nil
	}
	return slices.Compact([]string{strings.Replace(base, ":", "_", 1), strings.ReplaceAll(base, ":", "_")})
}

// A Set is what a stage needs.
type Set struct {
	Groups   []string     // the groups it was read from, without duplicates
	Images   []Image      // in the order of the lists, duplicates merged
	Bad      []*LineError // lines of lists that are no image reference
	Warnings []*LineError // what mapping.txt says and cannot be used; it costs an image nothing but a further name
}

// A LineError is a line of a file of the partition that cannot be used.
type LineError struct {
	File string
	Line int    // from 1; 0 when the whole file is meant
	Text string // the line, shortened if it is long
	Err  error
}

func (e *LineError) Error() string {
	if e.Line == 0 {
		return e.File + ": " + e.Err.Error()
	}
	return fmt.Sprintf("%s:%d: %q: %v", e.File, e.Line, e.Text, e.Err)
}

// Unwrap returns what is wrong with the line.
func (e *LineError) Unwrap() error { return e.Err }

// A ListError is a list that cannot be read, or has no image.
type ListError struct {
	File string
	Err  error
}

func (e *ListError) Error() string { return "read " + e.File + ": " + e.Err.Error() }

// Unwrap returns why the list cannot be read.
func (e *ListError) Unwrap() error { return e.Err }

var groupName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]*$`)

// CheckGroup reports whether name can be a group's: nil says nothing about whether a list of it exists.
func CheckGroup(name string) error {
	switch {
	case name == ignoredGroup:
		return fmt.Errorf("group %q holds what the factory left out, not what is to be loaded", name)
	case !groupName.MatchString(name):
		return fmt.Errorf("group %q: a name is made of a-z, 0-9, '.', '_' and '-', and starts with a letter or digit", name)
	}
	return nil
}

// Groups returns every group whose list the folder has, sorted; none is no error. Hidden files are passed over,
// any other list that can be no group is a *ListError: nothing that looks like a list is left out silently.
func Groups(fsys fs.FS) ([]string, error) {
	files, err := fs.ReadDir(fsys, ".")
	if err != nil {
		return nil, fmt.Errorf("read folder: %w", err)
	}
	var groups []string
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), listSuffix)
		if !ok || name == "" || name[0] == '.' || name == ignoredGroup {
			continue
		}
		if err := CheckGroup(name); err != nil {
			return nil, &ListError{f.Name(), err}
		}
		groups = append(groups, name)
	}
	slices.Sort(groups)
	return groups, nil
}

// Read reads the lists of groups, and mapping.txt if it concerns one of them. A list that is missing, is not text,
// is too large or has no image is a *ListError; lines that are no reference are in Set.Bad, and cost the other lines nothing.
// What is wrong with mapping.txt, even that it cannot be read, is in Set.Warnings. A missing one is fine.
func Read(fsys fs.FS, groups []string) (*Set, error) {
	if len(groups) == 0 {
		return nil, errors.New("read lists: no group")
	}
	set := &Set{}
	at := map[string]int{} // reference → its place in set.Images
	for _, group := range groups {
		if slices.Contains(set.Groups, group) {
			continue
		}
		if err := CheckGroup(group); err != nil {
			return nil, err
		}
		set.Groups = append(set.Groups, group)
		file := group + listSuffix
		entries, bad, err := readList(fsys, file)
		if err != nil {
			return nil, &ListError{file, err}
		}
		set.Bad = append(set.Bad, bad...)
		for _, e := range entries {
			i, ok := at[e.Ref]
			if !ok {
				i = len(set.Images)
				at[e.Ref] = i
				set.Images = append(set.Images, Image{Ref: e.Ref, Digest: e.Digest, Listed: e.Listed, File: file, Line: e.Line})
			}
			set.Images[i].Groups = append(set.Images[i].Groups, group)
		}
	}
	if slices.Contains(set.Groups, mappedGroup) {
		set.addMapped(fsys)
	}
	return set, nil
}

// addMapped gives the images of the mapped group their further names.
func (s *Set) addMapped(fsys fs.FS) {
	mapping, warnings, err := readMapping(fsys)
	s.Warnings = warnings
	if err != nil {
		s.Warnings = append(s.Warnings, &LineError{File: mappingFile, Err: err})
	}
	owner := map[string]string{} // name → the reference of the image that has it
	for _, img := range s.Images {
		owner[img.Ref] = img.Ref
	}
	for i := range s.Images {
		img := &s.Images[i]
		to, ok := mapping[img.Ref]
		if !ok || to.Tag == "" || !slices.Contains(img.Groups, mappedGroup) {
			continue
		}
		name := withTag(img.Ref, to.Tag)
		// A name can belong to one image only: two that claim it would take it from each other at every load.
		if has, taken := owner[name]; taken && has != img.Ref {
			s.Warnings = append(s.Warnings, &LineError{mappingFile, to.Line, shorten(to.Text), fmt.Errorf("%s is already the name of %s", name, has)})
		} else if !taken {
			owner[name] = img.Ref
			img.Names = []string{name}
		}
	}
	slices.SortStableFunc(s.Warnings, func(a, b *LineError) int { return cmp.Compare(a.Line, b.Line) })
}

// withTag returns repository:tag, the repository being ref's; both have been checked.
func withTag(ref, tag string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		panic(err) // ref is one of our own
	}
	return named.Name() + ":" + tag
}

func readList(fsys fs.FS, file string) ([]Entry, []*LineError, error) {
	f, err := open(fsys, file)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	entries, bad, err := ParseList(f, file)
	if err == nil && len(entries) == 0 && len(bad) == 0 {
		err = errors.New("has no image")
	}
	return entries, bad, err
}

func readMapping(fsys fs.FS) (Mapping, []*LineError, error) {
	f, err := open(fsys, mappingFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	} else if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	return ParseMapping(f, mappingFile)
}

// open opens a regular file. It looks before it opens: a FIFO would block, a device might do anything.
func open(fsys fs.FS, file string) (io.ReadCloser, error) {
	info, err := fs.Stat(fsys, file)
	if err != nil {
		return nil, plain(err)
	}
	if info.IsDir() {
		return nil, errors.New("is a directory")
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("is not a regular file")
	}
	f, err := fsys.Open(file)
	if err != nil {
		return nil, plain(err)
	}
	return f, nil
}

// plain strips the operation and the path, which the caller says already.
func plain(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}
