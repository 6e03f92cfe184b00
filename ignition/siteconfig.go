package ignition

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/precache/precache-agent/units"
)

// maxOverride is what Kubernetes allows all annotations of an object together; the override of a node is one.
const maxOverride = 256 << 10

// Site puts both overrides, and --save-partlabel, into the SiteConfigs and ClusterInstances of a YAML stream: what precache-agent
// siteconfig does. o.Stage is not used, and o.ReadyAfter is for the install stage. Only the fields in question change; the rest of the
// stream stays as it is, to the byte. The notes say what else there is to know of what was done.
func Site(in []byte, o Options) (out []byte, notes []string, err error) {
	found := false
	line := 1
	for i, text := range documents(in) {
		s := site{o: o, path: fmt.Sprintf("document %d", i+1)}
		changed, err := s.document(text, line)
		if err != nil {
			return nil, nil, err
		}
		line += bytes.Count(text, []byte("\n"))
		out = append(out, changed...)
		notes = append(notes, s.notes...)
		found = found || s.found
	}
	if !found {
		return nil, nil, errors.New("there is no SiteConfig (ran.openshift.io) and no ClusterInstance (siteconfig.open-cluster-management.io)")
	}
	return out, notes, nil
}

// documents cuts a stream before each --- that begins a document, or before the directives in front of it.
func documents(in []byte) [][]byte {
	var docs [][]byte
	start := 0
	content, ended := false, false
	for at := 0; at < len(in); {
		end := len(in)
		if i := bytes.IndexByte(in[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		line := in[at:end]
		is := func(marker string) bool {
			rest, ok := bytes.CutPrefix(line, []byte(marker))
			return ok && (len(rest) == 0 || strings.IndexByte(" \t\r\n", rest[0]) >= 0)
		}
		marker := is("---")
		if content && (marker || ended && line[0] == '%') {
			docs = append(docs, in[start:at])
			start, content, ended = at, false, false
		}
		ended = ended || is("...")
		if marker {
			line = line[3:]
			content = true // it may be an empty one
		}
		if trimmed := bytes.TrimSpace(line); len(trimmed) > 0 && trimmed[0] != '#' && line[0] != '%' {
			content = true
		}
		at = end
	}
	return append(docs, in[start:])
}

// A site is one document and what is to change in it.
type site struct {
	o     Options
	path  string // to where the work is, for messages
	found bool
	notes []string

	text  []byte
	lines []int // offsets
	nl    string
	edits []edit
	torn  bool // an edit cannot be made in the text
}

// An edit replaces text[start:end].
type edit struct {
	start, end int
	by         string
}

// document returns text, which begins in line, with what is to be in it.
func (s *site) document(text []byte, line int) ([]byte, error) {
	s.text = text
	var doc, next yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(text))
	if err := dec.Decode(&doc); err == io.EOF {
		return text, nil
	} else if err != nil {
		return nil, fmt.Errorf("%s, which begins in line %d: %s", s.path, line, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := dec.Decode(&next); err != io.EOF {
		return nil, fmt.Errorf("%s: another one follows it without ---", s.path)
	}
	root := deref(doc.Content[0])
	group, _, _ := strings.Cut(scalar(root, "apiVersion"), "/")
	kind := scalar(root, "kind")
	s.lines, s.nl = lineStarts(text)
	var err error
	switch {
	case group == "ran.openshift.io" && kind == "SiteConfig":
		s.found = true
		err = s.within(root, "spec", func(spec *yaml.Node) error {
			return s.each(spec, "clusters", s.cluster)
		})
	case group == "siteconfig.open-cluster-management.io" && kind == "ClusterInstance":
		s.found = true
		err = s.within(root, "spec", s.cluster)
	}
	if err != nil {
		return nil, err
	}
	if len(s.edits) == 0 && !s.torn {
		return text, nil
	}
	if !s.torn {
		out := s.apply()
		var check yaml.Node
		if yaml.Unmarshal(out, &check) == nil && equal(&check, &doc) && slices.Equal(comments(&check), comments(&doc)) {
			return out, nil
		}
	}
	return s.rewrite(&doc)
}

// rewrite is for what the editor does not know: comments and order are kept, the layout is not.
func (s *site) rewrite(doc *yaml.Node) ([]byte, error) {
	var b bytes.Buffer
	if bytes.HasPrefix(s.text, []byte("---")) {
		b.WriteString("---\n")
	}
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(doc); err != nil {
		return nil, fmt.Errorf("%s: %w", s.path, err)
	}
	s.notes = append(s.notes, s.path+": the layout could not be kept")
	return b.Bytes(), nil
}

// within goes on with the mapping key of m.
func (s *site) within(m *yaml.Node, key string, f func(*yaml.Node) error) error {
	outer := s.path
	defer func() { s.path = outer }()
	s.path = join(s.path, key)
	_, v := get(m, key)
	if v = deref(v); v == nil || v.Kind != yaml.MappingNode {
		return fmt.Errorf("%s: is not a mapping", s.path)
	}
	return f(v)
}

// each goes on with the mappings in the list key of m.
func (s *site) each(m *yaml.Node, key string, f func(*yaml.Node) error) error {
	outer := s.path
	defer func() { s.path = outer }()
	list := join(s.path, key)
	_, v := get(m, key)
	if v = deref(v); v == nil || v.Kind != yaml.SequenceNode {
		return fmt.Errorf("%s: is not a list", list)
	}
	for i, element := range v.Content {
		s.path = fmt.Sprintf("%s[%d]", list, i)
		if element = deref(element); element.Kind != yaml.MappingNode {
			return fmt.Errorf("%s: is not a mapping", s.path)
		}
		if err := f(element); err != nil {
			return err
		}
	}
	return nil
}

func join(path, key string) string {
	if strings.HasPrefix(path, "document") && !strings.Contains(path, ": ") {
		return path + ": " + key
	}
	return path + "." + key
}

func (s *site) cluster(m *yaml.Node) error {
	o := s.o
	o.Stage, o.ReadyAfter = units.Discovery, ""
	if err := s.override(m, o); err != nil {
		return err
	}
	return s.each(m, "nodes", func(node *yaml.Node) error {
		o := s.o
		o.Stage = units.Install
		if err := s.field(node, "installerArgs", func(old string) (string, []string, error) {
			args, err := saveLabel(old, o.Label)
			return args, nil, err
		}); err != nil {
			return err
		}
		return s.override(node, o)
	})
}

func (s *site) override(m *yaml.Node, o Options) error {
	return s.field(m, "ignitionConfigOverride", func(old string) (string, []string, error) {
		merged, notes, err := Merge([]byte(old), o)
		if err == nil && len(merged) > maxOverride {
			err = fmt.Errorf("has %d bytes with what the agent needs, more than %d", len(merged), maxOverride)
		}
		return string(merged), notes, err
	})
}

// saveLabel adds --save-partlabel to the installer's arguments, a JSON list, unless it is there.
func saveLabel(old, label string) (string, error) {
	if label == "" {
		label = DefaultLabel
	}
	if err := checkLabel(label); err != nil {
		return "", err
	}
	pair := fmt.Sprintf(`"--save-partlabel", "%s"]`, label)
	text := strings.TrimSpace(old)
	if text == "" {
		return "[" + pair, nil
	}
	var args []string
	if err := json.Unmarshal([]byte(text), &args); err != nil || text == "null" {
		return "", errors.New("is not a JSON list of strings")
	}
	for i, arg := range args {
		if arg == "--save-partlabel="+label || arg == "--save-partlabel" && i+1 < len(args) && args[i+1] == label {
			return old, nil
		}
	}
	if len(args) == 0 {
		return "[" + pair, nil
	}
	text = strings.TrimRight(strings.TrimSuffix(text, "]"), " \t\r\n")
	return string(noQuotes([]byte(text))) + ", " + pair, nil
}

// field changes the string key of m.
func (s *site) field(m *yaml.Node, key string, change func(old string) (string, []string, error)) error {
	path := join(s.path, key)
	k, v := get(m, key)
	old := ""
	if r := deref(v); r != nil {
		if r.Kind != yaml.ScalarNode || r.ShortTag() != "!!str" && r.ShortTag() != "!!null" {
			return fmt.Errorf("%s: is not a string with JSON in it", path)
		}
		if r.ShortTag() == "!!str" {
			old = r.Value
		}
	}
	updated, notes, err := change(old)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if updated == old {
		return nil
	}
	for _, note := range notes {
		s.notes = append(s.notes, path+": "+note)
	}
	if k != nil && !slices.Contains(m.Content, k) {
		k, v = nil, nil // it comes from a merge (<<), whose other users it is not to be changed for
	}
	if k == nil {
		s.insert(m, key, updated)
	} else {
		s.set(k, v, updated)
	}
	return nil
}

// set replaces the value v of k, in its style.
func (s *site) set(k, v *yaml.Node, value string) {
	start, end, ok := s.extent(k, v)
	indent := k.Column - 1
	old := string(s.text[start:end])
	space := ""
	if start == end { // key:
		space = " "
	}
	literal := v.Kind == yaml.ScalarNode && v.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0
	pretty := v.Kind == yaml.ScalarNode && v.Style&yaml.FoldedStyle == 0 && strings.Contains(strings.TrimSpace(old), "\n")
	if literal {
		pretty = pretty && strings.Contains(strings.TrimSpace(v.Value), "\n")
	}
	lines := []string{value}
	if pretty && json.Valid([]byte(value)) {
		var b bytes.Buffer
		if json.Indent(&b, []byte(value), "", "  ") == nil {
			lines = strings.Split(b.String(), "\n")
		}
	}
	text := ""
	if literal {
		header, content, _ := strings.Cut(old, "\n")
		content = strings.TrimLeft(content, "\r\n")
		if n := len(content) - len(strings.TrimLeft(content, " ")); n > indent {
			indent = n
		} else {
			indent += 2
		}
		// Without its digit, if it has one: the indentation is to be detected.
		indicators := len(header) - len(strings.TrimLeft(header, "|>+-0123456789"))
		text = header[:1] + strings.Trim(header[1:indicators], "0123456789") + strings.TrimRight(header[indicators:], "\r")
		for _, l := range lines {
			text += s.nl + strings.Repeat(" ", indent) + l
		}
		v.Value = strings.Join(lines, "\n") + "\n"
	} else {
		if i := strings.LastIndexByte(old, '\n'); i >= 0 && len(lines) > 1 { // as the line that closes it
			last := old[i+1:]
			indent = max(indent+1, len(last)-len(strings.TrimLeft(last, " ")))
		}
		text = space + "'" + strings.Join(lines, s.nl+strings.Repeat(" ", indent)) + "'"
		for i := range lines {
			lines[i] = strings.TrimSpace(lines[i])
		}
		setQuoted(v, strings.Join(lines, " ")) // as YAML folds it
	}
	s.torn = s.torn || !ok || strings.Contains(value, "'")
	s.edits = append(s.edits, edit{start, end, text})
}

func setQuoted(v *yaml.Node, value string) {
	v.Kind, v.Tag, v.Style, v.Value, v.Alias = yaml.ScalarNode, "!!str", yaml.SingleQuotedStyle, value, nil
}

// insert adds key to m, behind the last of its values that is on one line with its key.
func (s *site) insert(m *yaml.Node, key, value string) {
	at, end, indent := len(m.Content), 0, 0
	for i := 0; i+1 < len(m.Content); i += 2 {
		k, v := m.Content[i], m.Content[i+1]
		if e, ok := s.endOfLine(k, v); ok {
			at, end, indent = i+2, e, k.Column-1
		} else if k.Line == 0 && at == i { // inserted before
			at = i + 2
		}
	}
	if end == 0 || m.Style&yaml.FlowStyle != 0 {
		s.torn = true
	}
	var k, v yaml.Node
	k.SetString(key)
	setQuoted(&v, value)
	m.Content = slices.Insert(m.Content, at, &k, &v)
	s.edits = append(s.edits, edit{end, end, s.nl + strings.Repeat(" ", indent) + key + ": '" + value + "'"})
}

// endOfLine returns where the line of k ends, if v ends there too.
func (s *site) endOfLine(k, v *yaml.Node) (int, bool) {
	if v.Kind != yaml.ScalarNode || v.Line != k.Line || v.Line == 0 || v.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0 {
		return 0, false
	}
	start, end, ok := s.extent(k, v)
	if !ok || start == end {
		return 0, false
	}
	eol := len(s.text)
	if v.Line < len(s.lines) {
		eol = s.lines[v.Line]
	}
	if end > eol {
		return 0, false
	}
	rest := s.text[end:eol]
	eol = end + len(bytes.TrimRight(rest, "\r\n"))
	rest = bytes.TrimSpace(rest)
	return eol, len(rest) == 0 || rest[0] == '#'
}

// extent returns where in the text the value v of k stands. Where it cannot tell, ok is false.
func (s *site) extent(k, v *yaml.Node) (start, end int, ok bool) {
	if v.Line == 0 || k.Line == 0 {
		return 0, 0, false // inserted
	}
	start = s.offset(v)
	text := s.text
	if v.Kind == yaml.ScalarNode && v.Style == 0 && v.Value == "" { // key:
		at := s.offset(k)
		n := bytes.IndexByte(text[at:], ':')
		if n < 0 {
			return 0, 0, false
		}
		return at + n + 1, at + n + 1, v.Anchor == ""
	}
	if start >= len(text) {
		return 0, 0, false
	}
	switch c := text[start]; {
	case v.Anchor != "" || v.Kind == yaml.ScalarNode && c == '!': // &anchor or !!tag before it
		return start, start, false
	case v.Kind == yaml.AliasNode:
		return start, start + 1 + len(v.Value), c == '*'
	case v.Kind != yaml.ScalarNode:
		return start, start, false
	case c == '\'':
		for i := start + 1; i < len(text); i++ {
			if text[i] == '\'' {
				if i+1 < len(text) && text[i+1] == '\'' {
					i++
					continue
				}
				return start, i + 1, true
			}
		}
	case c == '"':
		for i := start + 1; i < len(text); i++ {
			switch text[i] {
			case '\\':
				i++
			case '"':
				return start, i + 1, true
			}
		}
	case c == '|' || c == '>':
		end = s.blockEnd(v.Line, k.Column-1)
		return start, end, end > start
	case bytes.HasPrefix(text[start:], []byte(v.Value)): // plain, on one line
		return start, start + len(v.Value), true
	}
	return start, start, false
}

// blockEnd returns where the last line ends that has content of the block scalar whose header is in line, and whose key is indented.
func (s *site) blockEnd(line, indent int) int {
	end := -1
	for n := line; n <= len(s.lines); n++ { // lines count from 1
		stop := len(s.text)
		if n < len(s.lines) {
			stop = s.lines[n]
		}
		text := bytes.TrimRight(s.text[s.lines[n-1]:stop], "\r\n")
		content := bytes.TrimLeft(text, " ")
		blank := len(bytes.TrimSpace(content)) == 0
		if n > line && !blank && len(text)-len(content) <= indent {
			break
		}
		if n == line || !blank {
			end = s.lines[n-1] + len(text)
		}
	}
	return end
}

// offset returns where in the text a node begins.
func (s *site) offset(n *yaml.Node) int {
	if n.Line < 1 || n.Line > len(s.lines) {
		return len(s.text)
	}
	at := s.lines[n.Line-1]
	for range n.Column - 1 {
		if at >= len(s.text) {
			break
		}
		at++
		for at < len(s.text) && s.text[at]&0xc0 == 0x80 {
			at++
		}
	}
	return at
}

// lineStarts returns where lines begin as YAML counts them, and how they end.
func lineStarts(text []byte) (starts []int, nl string) {
	starts = []int{0}
	nl = "\n"
	for i := 0; i < len(text); i++ {
		rest := text[i:]
		switch {
		case bytes.HasPrefix(rest, []byte("\r\n")):
			if len(starts) == 1 {
				nl = "\r\n"
			}
			i++
		case rest[0] == '\n' || rest[0] == '\r':
		case bytes.HasPrefix(rest, []byte("\u0085")):
			i++
		case bytes.HasPrefix(rest, []byte("\u2028")), bytes.HasPrefix(rest, []byte("\u2029")):
			i += 2
		default:
			continue
		}
		starts = append(starts, i+1)
	}
	return starts, nl
}

func (s *site) apply() []byte {
	slices.SortStableFunc(s.edits, func(a, b edit) int { return a.start - b.start })
	var out []byte
	at := 0
	for _, e := range s.edits {
		if e.start < at || e.end < e.start {
			return nil // no YAML document is like that
		}
		out = append(out, s.text[at:e.start]...)
		out = append(out, e.by...)
		at = e.end
	}
	return append(out, s.text[at:]...)
}

func deref(n *yaml.Node) *yaml.Node {
	for n != nil && n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n
}

// get returns the key of a mapping and its value, which may come by a merge (<<).
func get(m *yaml.Node, key string) (k, v *yaml.Node) { return getWithin(m, key, 10) }

func getWithin(m *yaml.Node, key string, depth int) (k, v *yaml.Node) {
	if m == nil || m.Kind != yaml.MappingNode || depth == 0 {
		return nil, nil
	}
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Kind == yaml.ScalarNode && m.Content[i].Value == key {
			return m.Content[i], m.Content[i+1]
		}
	}
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].ShortTag() != "!!merge" {
			continue
		}
		from := deref(m.Content[i+1])
		bases := []*yaml.Node{from}
		if from.Kind == yaml.SequenceNode {
			bases = from.Content
		}
		for _, base := range bases {
			if k, v := getWithin(deref(base), key, depth-1); k != nil {
				return k, v
			}
		}
	}
	return nil, nil
}

func scalar(m *yaml.Node, key string) string {
	if _, v := get(m, key); v != nil && deref(v).Kind == yaml.ScalarNode {
		return deref(v).Value
	}
	return ""
}

// equal reports whether two trees say the same, but for newlines at the end of a scalar.
func equal(a, b *yaml.Node) bool {
	if a.Kind != b.Kind || a.ShortTag() != b.ShortTag() || a.Anchor != b.Anchor ||
		strings.TrimRight(a.Value, "\n") != strings.TrimRight(b.Value, "\n") {
		return false
	}
	return slices.EqualFunc(a.Content, b.Content, equal)
}

// comments returns all comments below n, in the order of the alphabet: which node one belongs to is up to the parser.
func comments(n *yaml.Node) []string {
	var all []string
	var walk func(*yaml.Node)
	walk = func(n *yaml.Node) {
		for _, c := range []string{n.HeadComment, n.LineComment, n.FootComment} {
			for line := range strings.SplitSeq(c, "\n") {
				if line = strings.TrimSpace(line); line != "" {
					all = append(all, line)
				}
			}
		}
		for _, c := range n.Content {
			walk(c)
		}
	}
	walk(n)
	slices.Sort(all)
	return all
}
