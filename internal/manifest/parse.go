package manifest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// What is read from a partition is bounded: a damaged or hostile file must not exhaust a booting node's memory.
const (
	maxLine  = 4096     // bytes, without the line's end
	maxFile  = 16 << 20 // bytes
	maxLines = 1 << 16  // in a file
	maxBad   = 1000     // lines that cannot be used and are named one by one
	maxText  = 120      // bytes of a line that an error repeats
)

var (
	errNotText  = errors.New("is not a text file")
	errTooLarge = fmt.Errorf("is larger than %d MiB", maxFile>>20)
	errLong     = fmt.Errorf("line is longer than %d bytes", maxLine)
	errLines    = fmt.Errorf("has more than %d lines", maxLines)
	errMore     = fmt.Errorf("has more than %d lines that cannot be used", maxBad)
)

// An Entry is one reference of a list.
type Entry struct {
	Ref    string        // normalized
	Digest digest.Digest // that Ref pins, or empty
	Listed string        // as the list wrote it
	Line   int           // from 1
}

// ParseList reads a list: a reference a line; what stands behind it on the line is ignored, as are blank lines,
// # comments, a byte order mark and carriage returns. A reference that comes again is left out.
// Lines that are no reference are returned as errors with file and line, and reading goes on.
// The third result is why the rest could not be read, if so; then the other two are what came before.
func ParseList(r io.Reader, file string) ([]Entry, []*LineError, error) {
	var entries []Entry
	seen := map[string]bool{}
	bad, err := scan(r, file, func(line int, text string) error {
		listed := strings.Fields(text)[0]
		named, err := parse(listed)
		if err != nil {
			return err
		}
		e := Entry{Ref: named.String(), Listed: strings.Clone(listed), Line: line}
		if d, ok := named.(reference.Digested); ok {
			e.Digest = d.Digest()
		}
		if seen[e.Ref] {
			return nil
		}
		seen[e.Ref] = true
		entries = append(entries, e)
		return nil
	})
	return entries, bad, err
}

// A Mapping says under which tag an image is mirrored, by its normalized reference.
type Mapping map[string]Target

// A Target is where a line of mapping.txt sends an image.
type Target struct {
	Tag  string // empty if the line has no usable one
	Line int    // from 1
	Text string // the line
}

// ParseMapping reads mapping.txt: source=destination a line, with the liberties of ParseList. The tag is what follows
// the line's last colon, and the first line of a source counts, even if its tag is unusable. Results as for ParseList.
func ParseMapping(r io.Reader, file string) (Mapping, []*LineError, error) {
	mapping := Mapping{}
	bad, err := scan(r, file, func(line int, text string) error {
		text = strings.Fields(text)[0]
		source, _, ok := strings.Cut(text, "=")
		if !ok {
			return errors.New("is not source=destination")
		}
		named, err := parse(source)
		if err != nil {
			return fmt.Errorf("parse source: %w", err)
		}
		if _, again := mapping[named.String()]; again {
			return nil
		}
		to := Target{Line: line, Text: strings.Clone(text)}
		tag := to.Text[strings.LastIndexByte(to.Text, ':')+1:]
		if _, err = reference.WithTag(reference.TrimNamed(named), tag); err == nil {
			to.Tag = tag
		}
		mapping[named.String()] = to
		return err
	})
	return mapping, bad, err
}

// parse normalizes a reference as containers-storage does: with a registry, and with :latest if it has neither tag nor digest.
func parse(s string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return nil, err
	}
	return reference.TagNameOnly(named), nil
}

// scan calls use for every line with something on it, and collects the lines that use has no use for.
func scan(r io.Reader, file string, use func(line int, text string) error) ([]*LineError, error) {
	left := &io.LimitedReader{R: r, N: maxFile + 1}
	in := bufio.NewReaderSize(left, maxLine+len("\r\n"))
	if bom, _ := in.Peek(3); bytes.Equal(bom, []byte("\xef\xbb\xbf")) {
		in.Discard(len(bom))
	}
	var errs []*LineError
	for line := 1; ; line++ {
		text, long, err := readLine(in)
		if err != nil && err != io.EOF {
			return errs, err
		}
		if left.N == 0 {
			return errs, errTooLarge
		}
		text = strings.TrimSpace(text)
		if line > maxLines && text != "" {
			return errs, errLines
		}
		var bad error
		switch {
		case strings.HasPrefix(text, "#"):
		case long:
			bad = errLong
		case text != "":
			bad = use(line, text)
		}
		switch {
		case bad == nil || len(errs) > maxBad:
		case len(errs) == maxBad:
			errs = append(errs, &LineError{File: file, Err: errMore})
		default:
			errs = append(errs, &LineError{file, line, shorten(text), bad})
		}
		if err == io.EOF {
			return errs, nil
		}
	}
}

// readLine returns the next line without its end, or the beginning of one that is too long.
// A line that could not be read to its end is not returned.
func readLine(in *bufio.Reader) (text string, long bool, err error) {
	b, err := in.ReadSlice('\n')
	if bytes.IndexByte(b, 0) >= 0 {
		return "", false, errNotText
	}
	b = bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	text = string(b)
	long = len(b) > maxLine
	for err == bufio.ErrBufferFull {
		b, err = in.ReadSlice('\n')
		if bytes.IndexByte(b, 0) >= 0 {
			return "", false, errNotText
		}
	}
	if err != nil && err != io.EOF {
		return "", false, err
	}
	return text, long, err
}

// shorten cuts a long line for an error, between two characters.
func shorten(text string) string {
	if len(text) <= maxText {
		return text
	}
	n := maxText
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n] + "…"
}
