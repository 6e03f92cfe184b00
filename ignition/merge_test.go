package ignition

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/precache/precache-agent/units"
)

func options(stage string) Options { return Options{Stage: stage, SHA256: hash} }

// entries returns files by path and units by name, as they are written, in order.
func entries(t *testing.T, b []byte) (files, unitList []entry) {
	t.Helper()
	root, err := parseObject(b)
	if err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	storage, err := root.object("storage")
	if err != nil {
		t.Fatal(err)
	}
	if files, err = storage.list("files", "storage", "path"); err != nil {
		t.Fatal(err)
	}
	systemd, err := root.object("systemd")
	if err != nil {
		t.Fatal(err)
	}
	if unitList, err = systemd.list("units", "systemd", "name"); err != nil {
		t.Fatal(err)
	}
	return files, unitList
}

func names(entries []entry) (names []string) {
	for _, e := range entries {
		names = append(names, e.name)
	}
	return names
}

func TestMerge(t *testing.T) {
	ours := string(override(t, options(units.Discovery)))
	for _, tt := range []struct {
		name, existing string
		version        string
		files, units   []string // in order
		notes          []string
	}{
		{"nothing", " \n", Spec31, []string{bootstrapPath, agentFixPath}, ourUnits, nil},
		{"itself", ours, Spec31, []string{bootstrapPath, agentFixPath}, ourUnits, nil},
		{"empty", "{}", Spec31, []string{bootstrapPath, agentFixPath}, ourUnits, nil},
		{"nulls", `{"ignition":null,"storage":null,"systemd":{"units":null}}`, Spec31, []string{bootstrapPath, agentFixPath}, ourUnits, nil},
		{"spec 3.2.0", `{"ignition":{"version":"3.2.0"}}`, Spec32, []string{bootstrapPath, agentFixPath}, ourUnits, nil},
		{"others", `{"ignition":{"version":"3.1.0"},"systemd":{"units":[{"name":"a.service","mask":true}]},"storage":{"files":[{"path":"/etc/a","contents":{"source":"data:,it's"}}]}}`,
			Spec31, []string{"/etc/a", bootstrapPath, agentFixPath}, append([]string{"a.service"}, ourUnits...), nil},
		{"an older one of ours, between others",
			`{"ignition":{"version":"3.1.0"},"systemd":{"units":[{"name":"a.service"},{"name":"precache-agent.service","contents":"old"},{"name":"b.service"},{"name":"precache-agent.service","contents":"again"}]},
			"storage":{"files":[{"path":"/usr/local/bin/precache-agent","contents":{"source":"https://example.com/x"}},{"path":"/etc/a"}]}}`,
			Spec31, []string{"/etc/a", bootstrapPath, agentFixPath},
			[]string{"a.service", units.Service, "b.service", bootstrapName, units.MetricsSocket, units.MetricsService},
			[]string{"removed file /usr/local/bin/precache-agent"}},
		{"the scripts before it",
			`{"ignition":{"version":"3.1.0"},"systemd":{"units":[{"name":"var-mnt.mount","contents":"[Unit]\nBefore=precache-images.service"},{"name":"precache-images.service"}]},
			"storage":{"files":[{"path":"/usr/local/bin/extract-ai.sh"},{"path":"/usr/local/bin/agent-fix-bz1964591","mode":755}]}}`,
			Spec31, []string{agentFixPath, bootstrapPath}, ourUnits,
			[]string{"removed file /usr/local/bin/extract-ai.sh", "replaced file /usr/local/bin/agent-fix-bz1964591", "removed unit var-mnt.mount", "removed unit precache-images.service"}},
		{"a mount of the user's own", `{"ignition":{"version":"3.1.0"},"systemd":{"units":[{"name":"var-mnt.mount","contents":"[Mount]\nWhat=/dev/sdb1"}]}}`,
			Spec31, []string{bootstrapPath, agentFixPath}, append([]string{"var-mnt.mount"}, ourUnits...), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, notes, err := Merge([]byte(tt.existing), options(units.Discovery))
			if err != nil {
				t.Fatal(err)
			}
			accepted(t, got)
			if bytes.ContainsRune(got, '\'') {
				t.Error("has a single quote")
			}
			files, list := entries(t, got)
			if v := decode(t, got).Ignition.Version; v != tt.version {
				t.Errorf("version is %s", v)
			}
			if !slices.Equal(names(files), tt.files) || !slices.Equal(names(list), tt.units) || !slices.Equal(notes, tt.notes) {
				t.Errorf("files %q\nunits %q\nnotes %q", names(files), names(list), notes)
			}
			again, notes, err := Merge(got, options(units.Discovery))
			if err != nil || !bytes.Equal(again, got) || len(notes) > 0 {
				t.Errorf("the second time: %v, %q, %s", err, notes, again)
			}
		})
	}
}

// What is not the agent's stays as it was written: order, numbers, escapes.
func TestMergeKeeps(t *testing.T) {
	existing := `{"passwd":{"users":[{"sshAuthorizedKeys":["\ud800 <a> & \u00e9"],"uid":1e3,"name":"core"}]}, "storage":{"disks":[],"files":[{"path":"/a","mode":420.0,"mode2":[ ]}]},
	"ignition":{"timeouts":{"httpTotal":12345678901234567890},"version":"3.2.0"}}`
	got, _, err := Merge([]byte(existing), options(units.Install))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`{"passwd":{"users":[{"sshAuthorizedKeys":["\ud800 <a> & \u00e9"],"uid":1e3,"name":"core"}]},"storage":{"disks":[],"files":[{"path":"/a","mode":420.0,"mode2":[]},`,
		`"ignition":{"timeouts":{"httpTotal":12345678901234567890},"version":"3.2.0"}`,
	} {
		if !bytes.Contains(got, []byte(want)) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
}

func TestMergeKeepsDropins(t *testing.T) {
	existing := `{"ignition":{"version":"3.1.0"},"systemd":{"units":[{"name":"precache-agent.service","dropins":[{"name":"10-binary.conf","contents":"old"},{"name":"20-mine.conf","contents":"[Service]\nCPUWeight=50"}]}]}}`
	got, _, err := Merge([]byte(existing), options(units.Install))
	if err != nil {
		t.Fatal(err)
	}
	accepted(t, got)
	u := decode(t, got).Systemd.Units[0]
	if u.Name != units.Service || len(u.Dropins) != 2 || string(u.Dropins[1]) != `{"name":"20-mine.conf","contents":"[Service]\nCPUWeight=50"}` ||
		!strings.Contains(string(u.Dropins[0]), "ExecStart=") {
		t.Errorf("%s: %s", u.Name, u.Dropins)
	}
}

// From the partition to an URL and back.
func TestMergeOther(t *testing.T) {
	o := options(units.Install)
	o.URL = "https://example.com/precache-agent"
	byURL := override(t, o)
	there, notes, err := Merge(override(t, options(units.Install)), o)
	if err != nil || len(notes) != 2 || !bytes.Equal(sorted(t, there), sorted(t, byURL)) {
		t.Errorf("%v, %q:\n%s", err, notes, there)
	}
	back, notes, err := Merge(there, options(units.Install))
	if err != nil || len(notes) != 1 || !bytes.Equal(sorted(t, back), sorted(t, override(t, options(units.Install)))) {
		t.Errorf("%v, %q:\n%s", err, notes, back)
	}
	// A node's own script is not ours where we bring none.
	existing := `{"ignition":{"version":"3.1.0"},"storage":{"files":[{"path":"/usr/local/bin/agent-fix-bz1964591"}]}}`
	got, notes, err := Merge([]byte(existing), options(units.Install))
	if err != nil || len(notes) > 0 || !bytes.Contains(got, []byte(`{"path":"/usr/local/bin/agent-fix-bz1964591"}`)) {
		t.Errorf("%v, %q", err, notes)
	}
}

func sorted(t *testing.T, b []byte) []byte {
	files, list := entries(t, b)
	all := append(files, list...)
	slices.SortFunc(all, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	var out []byte
	for _, e := range all {
		out = append(append(out, e.raw...), '\n')
	}
	return out
}

func TestMergeErrors(t *testing.T) {
	for existing, want := range map[string]string{
		"{":                                     "is not JSON: it ends in the middle",
		`{"a":1]`:                               "is not JSON: invalid character",
		"[]":                                    "is not a JSON object",
		"null":                                  "is not a JSON object",
		"{} {}":                                 "has something behind the JSON object",
		`{"a":1,"a":2}`:                         `has "a" twice`,
		`{"ignition":{"version":"3.3.0"}}`:      `ignition.version is "3.3.0": overrides may have 3.1.0 or 3.2.0`,
		`{"ignition":{"version":"3.0.0"}}`:      `ignition.version is "3.0.0"`,
		`{"ignition":{"version":3}}`:            "ignition.version is not a string",
		`{"ignition":[]}`:                       "ignition is not a JSON object",
		`{"storage":{"files":{}}}`:              "storage.files is not a list",
		`{"storage":{"files":[1]}}`:             "storage.files[0] is not a JSON object",
		`{"storage":{"files":[{"mode":1}]}}`:    "storage.files[0] has no path",
		`{"systemd":{"units":[{"name":""}]}}`:   "systemd.units[0] has no name",
		`{"systemd":{"units":[{"name":null}]}}`: "systemd.units[0] has no name",
		`{"storage":{"links":[{"path":"/usr/local/bin/precache-agent-bootstrap"}]}}`:       "storage.links has /usr/local/bin/precache-agent-bootstrap, which is a file of the agent",
		`{"systemd":{"units":[{"name":"precache-agent.service","dropins":[{"name":1}]}]}}`: "systemd.units: precache-agent.service.dropins[0] has no name",
	} {
		got, _, err := Merge([]byte(existing), options(units.Install))
		if err == nil || !strings.Contains(err.Error(), want) || got != nil {
			t.Errorf("%s: error is %v, want %s", existing, err, want)
		}
	}
}

func FuzzMerge(f *testing.F) {
	// The corpus is in testdata/fuzz.
	f.Fuzz(func(t *testing.T, existing []byte, discovery, fetched bool) {
		o := options(units.Install)
		if discovery {
			o.Stage = units.Discovery
		}
		if fetched {
			o.URL = "https://example.com/precache-agent"
		}
		got, _, err := Merge(existing, o)
		if err != nil {
			if got != nil {
				t.Fatal("an error, and a result")
			}
			return
		}
		if !json.Valid(got) || bytes.ContainsRune(got, '\'') {
			t.Fatalf("not JSON, or a single quote: %q", got)
		}
		again, notes, err := Merge(got, o)
		if err != nil || !bytes.Equal(again, got) || len(notes) > 0 {
			t.Fatalf("the second time: %v %q\n%q, before\n%q", err, notes, again, got)
		}
		files, list := entries(t, got)
		c := decode(t, override(t, o))
		for _, want := range c.Storage.Files {
			if n := count(files, want.Path); n != 1 {
				t.Fatalf("%s is there %d times", want.Path, n)
			}
		}
		for _, want := range c.Systemd.Units {
			if n := count(list, want.Name); n != 1 {
				t.Fatalf("%s is there %d times", want.Name, n)
			}
		}
		if len(bytes.TrimSpace(existing)) == 0 {
			return
		}
		// What was there is there, in order, but for what is known.
		oldFiles, oldList := entries(t, existing)
		known := func(e entry) bool {
			return slices.Contains(ourFiles, e.name) || slices.Contains(ourUnits, e.name) || strings.HasPrefix(e.name, "/usr/local/bin/extract-") ||
				slices.Contains([]string{"precache-images.service", "precache-ocp-images.service", "var-mnt.mount"}, e.name)
		}
		for _, pair := range [][2][]entry{{oldFiles, files}, {oldList, list}} {
			before := slices.DeleteFunc(pair[0], known)
			after := slices.DeleteFunc(slices.Clone(pair[1]), known)
			if !slices.EqualFunc(before, after, func(a, b entry) bool { return a.name == b.name && bytes.Equal(a.raw, b.raw) }) {
				t.Fatalf("others were %q, are %q", before, after)
			}
		}
		before, _ := parseObject(existing)
		after, _ := parseObject(got)
		for _, m := range before {
			if raw, ok := after.get(m.key); !ok || !slices.Contains([]string{"ignition", "storage", "systemd"}, m.key) && !bytes.Equal(raw, m.raw) {
				t.Fatalf("%q was %q, is %q", m.key, m.raw, raw)
			}
		}
	})
}

func count(entries []entry, name string) (n int) {
	for _, e := range entries {
		if e.name == name {
			n++
		}
	}
	return n
}
