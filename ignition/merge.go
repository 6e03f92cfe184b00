package ignition

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/precache/precache-agent/units"
)

// ourUnits and ourFiles are what an override may bring, in either stage and from wherever the binary comes.
var (
	ourUnits = []string{bootstrapName, units.Service, units.MetricsSocket, units.MetricsService}
	ourFiles = []string{bootstrapPath, localPath, agentFixPath}
)

// What the documented overrides of factory-precaching-cli bring. It would load the images a second time.
var (
	oldUnits = []string{"precache-images.service", "precache-ocp-images.service"}
	oldMount = "var-mnt.mount" // only if it is for them
	oldFiles = []string{"/usr/local/bin/extract-ai.sh", "/usr/local/bin/extract-ocp.sh"}
)

// Merge puts the override of a stage into one that is there, or makes one if existing is blank. Files and units of other origin stay as
// and where they are, those of the agent are replaced, and those of the scripts before it are removed; the notes say which. The version
// of the Ignition specification stays the one that is there. The result is like that of Override, but for its size. If there is nothing
// to change, it is existing.
func Merge(existing []byte, o Options) (merged []byte, notes []string, err error) {
	c, err := o.config()
	if err != nil {
		return nil, nil, err
	}
	if len(bytes.TrimSpace(existing)) == 0 {
		return marshal(c), nil, nil
	}
	root, err := parseObject(existing)
	if err != nil {
		return nil, nil, err
	}
	before := root.bytes()

	ign, err := root.object("ignition")
	if err != nil {
		return nil, nil, err
	}
	var version string
	if raw, ok := ign.get("version"); ok {
		if err := json.Unmarshal(raw, &version); err != nil {
			return nil, nil, errors.New("ignition.version is not a string")
		}
	}
	switch version {
	case Spec31, Spec32:
	case "":
		ign.set("version", marshal(c.Ignition.Version))
		root.set("ignition", ign.bytes())
	default:
		return nil, nil, fmt.Errorf("ignition.version is %q: overrides may have %s or %s", version, Spec31, Spec32)
	}

	storage, err := root.object("storage")
	if err != nil {
		return nil, nil, err
	}
	for _, other := range []string{"directories", "links"} {
		entries, err := storage.list(other, "storage", "path")
		if err != nil {
			return nil, nil, err
		}
		for _, e := range entries {
			if slices.ContainsFunc(c.Storage.Files, func(f file) bool { return f.Path == e.name }) {
				return nil, nil, fmt.Errorf("storage.%s has %s, which is a file of the agent", other, e.name)
			}
		}
	}
	files, err := storage.list("files", "storage", "path")
	if err != nil {
		return nil, nil, err
	}
	var ours []entry
	for _, f := range c.Storage.Files {
		ours = append(ours, entry{f.Path, marshal(f)})
	}
	// What agent.service calls is there for other reasons, too: where the agent brings none, it is not the agent's.
	drop := func(e entry) bool {
		return slices.Contains(oldFiles, e.name) || slices.Contains(ourFiles, e.name) && e.name != agentFixPath
	}
	kept, removed := replace(files, ours, drop)
	for _, name := range removed {
		notes = append(notes, "removed file "+name)
	}
	for _, e := range files {
		if e.name == agentFixPath && o.Stage == units.Discovery && !bytes.Contains(e.raw, []byte("precache-agent")) {
			notes = append(notes, "replaced file "+e.name)
		}
	}
	storage.setList("files", kept)
	root.setObject("storage", storage)

	systemd, err := root.object("systemd")
	if err != nil {
		return nil, nil, err
	}
	there, err := systemd.list("units", "systemd", "name")
	if err != nil {
		return nil, nil, err
	}
	ours = nil
	for _, u := range c.Systemd.Units {
		for _, e := range there {
			if e.name != u.Name {
				continue
			}
			if u.Dropins, err = withOthers(u.Dropins, e); err != nil {
				return nil, nil, err
			}
		}
		ours = append(ours, entry{u.Name, marshal(u)})
	}
	kept, removed = replace(there, ours, func(e entry) bool {
		return slices.Contains(oldUnits, e.name) || slices.Contains(ourUnits, e.name) ||
			e.name == oldMount && slices.ContainsFunc(oldUnits, func(u string) bool { return bytes.Contains(e.raw, []byte(u)) })
	})
	for _, name := range removed {
		notes = append(notes, "removed unit "+name)
	}
	systemd.setList("units", kept)
	root.setObject("systemd", systemd)

	after := root.bytes()
	if bytes.Equal(before, after) && !bytes.ContainsRune(existing, '\'') {
		return existing, nil, nil
	}
	return after, notes, nil
}

// replace returns entries with ours in the place of those of the same name, or at the end, and without those to drop. It also returns
// the names of those that are gone.
func replace(entries, ours []entry, drop func(entry) bool) (kept []entry, gone []string) {
	done := map[string]bool{}
	for _, e := range entries {
		i := slices.IndexFunc(ours, func(o entry) bool { return o.name == e.name })
		switch {
		case i >= 0 && !done[e.name]:
			kept = append(kept, ours[i])
			done[e.name] = true
		case i < 0 && drop(e):
			gone = append(gone, e.name)
		case i < 0:
			kept = append(kept, e)
		}
	}
	for _, o := range ours {
		if !done[o.name] {
			kept = append(kept, o)
		}
	}
	return kept, gone
}

// withOthers returns our drop-ins and those of other origin that the unit has.
func withOthers(ours []json.RawMessage, u entry) ([]json.RawMessage, error) {
	at := "systemd.units: " + u.name
	obj, err := parseObject(u.raw)
	if err != nil {
		return nil, fmt.Errorf("%s %w", at, err)
	}
	there, err := obj.list("dropins", at, "name")
	if err != nil {
		return nil, err
	}
	for _, e := range there {
		if e.name != dropinName {
			ours = append(ours, e.raw)
		}
	}
	return ours, nil
}

// An object is a JSON object whose order and values stay as they are.
type object []member

type member struct {
	key string
	raw json.RawMessage
}

// An entry is an element of a list of objects, by the name that makes it unique.
type entry struct {
	name string
	raw  json.RawMessage
}

func parseObject(b []byte) (object, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	if t, err := dec.Token(); err != nil {
		return nil, jsonError(err)
	} else if t != json.Delim('{') {
		return nil, errors.New("is not a JSON object")
	}
	obj := object{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, jsonError(err)
		}
		key := t.(string) // the decoder has seen to that
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return nil, jsonError(err)
		}
		if _, again := obj.get(key); again {
			return nil, fmt.Errorf("has %q twice", key)
		}
		obj = append(obj, member{key, compact(raw)})
	}
	if _, err := dec.Token(); err != nil {
		return nil, jsonError(err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("has something behind the JSON object")
	}
	return obj, nil
}

func jsonError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("is not JSON: it ends in the middle")
	}
	return fmt.Errorf("is not JSON: %w", err)
}

func compact(raw json.RawMessage) json.RawMessage {
	var b bytes.Buffer
	if err := json.Compact(&b, raw); err != nil {
		panic(err) // it was decoded
	}
	return noQuotes(b.Bytes())
}

func (o object) get(key string) (json.RawMessage, bool) {
	for _, m := range o {
		if m.key == key {
			return m.raw, true
		}
	}
	return nil, false
}

func (o *object) set(key string, raw json.RawMessage) {
	for i, m := range *o {
		if m.key == key {
			(*o)[i].raw = raw
			return
		}
	}
	*o = append(*o, member{key, raw})
}

// object returns the object key; an empty one if there is none or null.
func (o object) object(key string) (object, error) {
	raw, ok := o.get(key)
	if !ok || string(raw) == "null" {
		return object{}, nil
	}
	sub, err := parseObject(raw)
	if err != nil {
		return nil, fmt.Errorf("%s %w", key, err)
	}
	return sub, nil
}

// setObject sets key, unless it is not there and value is empty.
func (o *object) setObject(key string, value object) {
	if _, ok := o.get(key); ok || len(value) > 0 {
		o.set(key, value.bytes())
	}
}

// list returns the objects in the list key, which are told apart by the string unique. at is where o is.
func (o object) list(key, at, unique string) ([]entry, error) {
	raw, ok := o.get(key)
	if !ok || string(raw) == "null" {
		return nil, nil
	}
	var elements []json.RawMessage
	if err := json.Unmarshal(raw, &elements); err != nil {
		return nil, fmt.Errorf("%s.%s is not a list", at, key)
	}
	var entries []entry
	for i, e := range elements {
		obj, err := parseObject(e)
		if err != nil {
			return nil, fmt.Errorf("%s.%s[%d] %w", at, key, i, err)
		}
		var name string
		raw, _ := obj.get(unique)
		if err := json.Unmarshal(raw, &name); err != nil || name == "" {
			return nil, fmt.Errorf("%s.%s[%d] has no %s", at, key, i, unique)
		}
		entries = append(entries, entry{name, e})
	}
	return entries, nil
}

func (o *object) setList(key string, entries []entry) {
	raw := []byte{'['}
	for i, e := range entries {
		if i > 0 {
			raw = append(raw, ',')
		}
		raw = append(raw, e.raw...)
	}
	o.set(key, append(raw, ']'))
}

func (o object) bytes() json.RawMessage {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		b.Write(marshal(m.key))
		b.WriteByte(':')
		b.Write(m.raw)
	}
	b.WriteByte('}')
	return b.Bytes()
}
