package ignition

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"

	"github.com/precache/precache-agent/units"
)

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// decodeAll returns the documents of a stream.
func decodeAll(t *testing.T, b []byte) (docs []map[string]any) {
	t.Helper()
	dec := yaml.NewDecoder(bytes.NewReader(b))
	for {
		var doc map[string]any
		if err := dec.Decode(&doc); err == io.EOF {
			return docs
		} else if err != nil {
			t.Fatalf("%v\n%s", err, b)
		}
		docs = append(docs, doc)
	}
}

// at follows keys and indexes.
func at(v any, path ...any) any {
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[p]
		case int:
			l, _ := v.([]any)
			if p >= len(l) {
				return nil
			}
			v = l[p]
		}
	}
	return v
}

// changed returns the lines of a that b does not have, and the other way round.
func changed(a, b []byte) (gone, come []string) {
	left := strings.Split(string(a), "\n")
	right := strings.Split(string(b), "\n")
	for _, l := range left {
		if i := slices.Index(right, l); i >= 0 {
			right = slices.Delete(right, i, i+1)
		} else {
			gone = append(gone, l)
		}
	}
	return gone, right
}

func mustSite(t *testing.T, in []byte) (out []byte, notes []string) {
	t.Helper()
	out, notes, err := Site(in, Options{SHA256: hash})
	if err != nil {
		t.Fatal(err)
	}
	again, more, err := Site(out, Options{SHA256: hash})
	if err != nil || !bytes.Equal(again, out) || len(more) > 0 {
		t.Errorf("the second time: %v, %q\n%s", err, more, again)
	}
	return out, notes
}

// The SiteConfig of OpenShift's documentation, whose scripts the agent replaces.
func TestSiteFactory(t *testing.T) {
	in := readFile(t, "testdata/site/factory.yaml")
	out, notes := mustSite(t, in)
	const cluster, node = "document 1: spec.clusters[0].ignitionConfigOverride: ", "document 1: spec.clusters[0].nodes[0].ignitionConfigOverride: "
	if want := []string{
		cluster + "removed file /usr/local/bin/extract-ai.sh",
		cluster + "replaced file /usr/local/bin/agent-fix-bz1964591",
		cluster + "removed unit var-mnt.mount",
		cluster + "removed unit precache-images.service",
		node + "removed file /usr/local/bin/extract-ocp.sh",
		node + "removed unit var-mnt.mount",
		node + "removed unit precache-ocp-images.service",
	}; !slices.Equal(notes, want) {
		t.Errorf("notes are %q", notes)
	}
	doc := decodeAll(t, out)[0]
	discovery := []byte(at(doc, "spec", "clusters", 0, "ignitionConfigOverride").(string))
	install := []byte(at(doc, "spec", "clusters", 0, "nodes", 0, "ignitionConfigOverride").(string))
	accepted(t, discovery)
	accepted(t, install)
	if !bytes.Equal(sorted(t, discovery), sorted(t, override(t, options(units.Discovery)))) {
		t.Errorf("discovery: %s", discovery)
	}
	if !bytes.Equal(sorted(t, install), sorted(t, override(t, options(units.Install)))) {
		t.Errorf("install: %s", install)
	}
	// Both keep their shape: one JSON token a line, in quotes and as a literal.
	if gone, come := changed(in, out); len(gone) < 20 || len(come) < 40 {
		t.Errorf("%d lines gone, %d come", len(gone), len(come))
	}
	// Everything but the fields in question is as it was.
	old := decodeAll(t, in)[0]
	for _, d := range []any{doc, old} {
		delete(at(d, "spec", "clusters", 0).(map[string]any), "ignitionConfigOverride")
		delete(at(d, "spec", "clusters", 0, "nodes", 0).(map[string]any), "ignitionConfigOverride")
	}
	if fmt.Sprint(doc) != fmt.Sprint(old) {
		t.Errorf("changed: %v", doc)
	}
	for _, line := range []string{"common-411: true", `      sites : "example-5g-lab"`, "# 2", `        installerArgs: '["--save-partlabel", "data"]'`, "        ignitionConfigOverride: |"} {
		if !bytes.Contains(out, []byte(line+"\n")) {
			t.Errorf("no line %s", line)
		}
	}
}

// Text that is not in the fields in question stays, to the byte.
func TestSiteClusterInstance(t *testing.T) {
	in := readFile(t, "testdata/site/clusterinstance.yaml")
	out, notes := mustSite(t, in)
	if len(notes) > 0 {
		t.Errorf("notes are %q", notes)
	}
	gone, come := changed(in, out)
	for _, l := range gone {
		if !strings.ContainsAny(l, "{}[]") {
			t.Errorf("gone: %s", l)
		}
	}
	if gone, _ := changed(in[:bytes.Index(in, []byte("spec:"))], out); len(gone) > 0 {
		t.Errorf("gone: %q", gone)
	}
	for _, want := range []string{
		`          installerArgs: '["--append-karg", "nameserver=8.8.8.8", "--save-partlabel","other", "--save-partlabel", "data"]'`,
		`          installerArgs: '["--save-partlabel", "data"]'`,
	} {
		if !slices.Contains(come, want) {
			t.Errorf("no line %s in\n%s", want, out)
		}
	}
	for _, want := range []string{"    # what others need at discovery\n", "}}' # theirs\n", "\n              }\n\n          # behind the override\n", "node2.example.com   # its name\n"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("no %q", want)
		}
	}
	doc := decodeAll(t, out)[1]
	discovery := at(doc, "spec", "ignitionConfigOverride").(string)
	node1 := at(doc, "spec", "nodes", 0, "ignitionConfigOverride").(string)
	node2 := at(doc, "spec", "nodes", 1, "ignitionConfigOverride").(string)
	for _, o := range []string{discovery, node1, node2} {
		accepted(t, []byte(o))
		if strings.Contains(o, "'") {
			t.Error("has a single quote")
		}
	}
	if !strings.HasPrefix(discovery, `{"ignition":{"version":"3.2.0"},"passwd":{"users":[{"name":"core","sshAuthorizedKeys":["ssh-ed25519 it\u0027s me"]}]},"storage":`) {
		t.Errorf("discovery: %s", discovery)
	}
	if files, _ := entries(t, []byte(node1)); !slices.Equal(names(files), []string{"/etc/containers/registries.conf", bootstrapPath}) {
		t.Errorf("files of node 1: %q", names(files))
	}
	if node2 != string(override(t, options(units.Install))) {
		t.Errorf("node 2: %s", node2)
	}
}

func TestSiteShapes(t *testing.T) {
	const head = "apiVersion: ran.openshift.io/v1\nkind: SiteConfig\nspec:\n  clusters:\n"
	for _, tt := range []struct {
		name, in string
		torn     bool // the layout cannot be kept
	}{
		{"nothing there", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n", false},
		{"no newline at the end", head + "  - clusterName: a\n    nodes:\n    - hostName: b", false},
		{"comment at the end", head + "  - clusterName: a\n    nodes:\n    - hostName: b # c", false},
		{"begins with ---", "---\n" + head + "  - clusterName: a\n    nodes:\n    - hostName: b\n", false},
		{"ends with ...", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n...\n", false},
		{"directive", "%YAML 1.1\n---\n" + head + "  - clusterName: a\n    nodes:\n    - hostName: b\n", false},
		{"Windows", strings.ReplaceAll(head+"  - clusterName: a\n    nodes:\n    - hostName: b\n      ignitionConfigOverride: |\n        {\n        }\n      role: c\n", "\n", "\r\n"), false},
		{"directives between", "%YAML 1.1\n---\na: 1\n...\n\n# c\n%YAML 1.1\n# d\n---\n" + head + "  - clusterName: a\n    nodes:\n    - hostName: b\n", false},
		{"byte order mark", "\ufeff" + head + "  - clusterName: a\n    nodes:\n    - hostName: b\n", false},
		{"key without value", head + "  - clusterName: a\n    ignitionConfigOverride:\n    nodes:\n    - hostName: b\n      installerArgs: # none\n      ignitionConfigOverride: ~\n", false},
		{"key without value at the end", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      installerArgs:", false},
		{"empty strings", head + "  - clusterName: a\n    ignitionConfigOverride: ''\n    nodes:\n    - hostName: b\n      installerArgs: \"\"\n      ignitionConfigOverride: |\n", false},
		{"double quotes", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      \"installerArgs\": \"[\\\"-n\\\"]\"\n      ignitionConfigOverride: \"{ \\\"a\\\": \\\"\\\\n\\\" }\" # c\n", false},
		{"empty installerArgs", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      installerArgs: '[ ]'\n", false},
		{"literal without newline", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      ignitionConfigOverride: |- # 2 spaces\n       {}\n      installerArgs: |\n       [\n         \"-n\"\n       ]\n", false},
		{"literal with indentation", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      ignitionConfigOverride: |2+\n          {}\n\n\n      role: c\n", false},
		{"literal behind a blank line", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      ignitionConfigOverride: |\n\n            {\n        \n            }\n      role: c\n", false},
		{"folded", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      ignitionConfigOverride: >\n        {\n        }\n      role: c\n", false},
		{"only maps", head + "  - nodes:\n    - bmcCredentialsName:\n        name: b\n", true},
		{"flow", head + "  - clusterName: a\n    nodes: [{hostName: b}] # c\n", true},
		{"flow with values", head + "  - clusterName: a\n    nodes: [{hostName: b, installerArgs: '[]', ignitionConfigOverride: '{}'}]\n", false},
		{"JSON", `{"apiVersion":"ran.openshift.io/v1","kind":"SiteConfig","spec":{"clusters":[{"clusterName":"a","nodes":[{"hostName":"b"}]}]}}`, true},
		{"merged", head + "  - clusterName: a\n    nodes:\n    - &n\n      hostName: b\n      ignitionConfigOverride: '{}'\n    - <<: *n\n      hostName: c\n", false},
		{"merged from elsewhere", "x: &n {installerArgs: '[\"-n\"]'}\n" + head + "  - clusterName: a\n    nodes:\n    - <<: *n\n      hostName: c\n", false},
		{"merged from a list", "x: &n {installerArgs: '[\"-n\"]'}\n" + head + "  - clusterName: a\n    nodes:\n    - <<: [*n]\n      hostName: c\n", false},
		{"anchor", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      installerArgs: &args '[]'\n    - hostName: c\n      installerArgs: *args\n", true},
		{"alias", "x: &args '[]'\n" + head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      installerArgs: *args\n", false},
		{"same node twice", head + "  - clusterName: a\n    nodes:\n    - &n\n      hostName: b\n    - *n\n", false},
		{"tag", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      installerArgs: !!str '[]'\n", true},
		{"lines within a plain scalar", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      role: c\n        d\n", false},
		{"lines within quotes", head + "  - clusterName: a\n    ignitionConfigOverride:\n      '{\n        \"a\": 1\n      }'\n    nodes:\n    - hostName: b\n", false},
		{"quotes over odd lines", head + "  - clusterName: a\n    ignitionConfigOverride: '{\n     \"a\": 1\n\n     }'\n    nodes:\n    - hostName: b\n", false},
		{"other line ends", head + "  - clusterName: \"a\u2028b\" # \u0085\n    # é\n    nodes:\n    - hostName: \"é\"\n", true},
		{"not ASCII before it", head + "  - clusterName: a\n    nodes:\n    - {hostName: é, installerArgs: '[]', ignitionConfigOverride: '{}'}\n", false},
		{"line separators in JSON", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      ignitionConfigOverride: '{\"a\":\"\\u2028\"}'\n", false},
		{"control characters in JSON", head + "  - clusterName: a\n    nodes:\n    - hostName: b\n      ignitionConfigOverride: \"{\\\"a\\\":\\\"\\x7f\\\"}\"\n", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, notes := mustSite(t, []byte(tt.in))
			torn := slices.ContainsFunc(notes, func(n string) bool { return strings.Contains(n, "layout") })
			if torn != tt.torn {
				t.Errorf("notes are %q\n%s", notes, out)
			}
			before, after := decodeAll(t, []byte(tt.in)), decodeAll(t, out)
			if len(after) != len(before) {
				t.Fatalf("%d documents, were %d", len(after), len(before))
			}
			nodes := at(after[len(after)-1], "spec", "clusters", 0, "nodes").([]any)
			check := func(v any, stage string) {
				text, ok := v.(string)
				if !ok {
					t.Errorf("%s: no override in\n%s", stage, out)
					return
				}
				_, list := entries(t, []byte(text))
				if !slices.Contains(names(list), units.Service) || !strings.Contains(text, "--stage "+stage) {
					t.Errorf("%s: %s", stage, text)
				}
			}
			check(at(after[len(after)-1], "spec", "clusters", 0, "ignitionConfigOverride"), units.Discovery)
			for i, n := range nodes {
				check(at(n, "ignitionConfigOverride"), units.Install)
				var args []string
				if err := json.Unmarshal([]byte(at(n, "installerArgs").(string)), &args); err != nil {
					t.Fatal(err)
				}
				if len(args) < 2 || !slices.Equal(args[len(args)-2:], []string{"--save-partlabel", "data"}) || strings.Contains(tt.in, "-n") != (len(args) == 3) {
					t.Errorf("node %d: installerArgs are %q", i, args)
				}
			}
			// Without the fields, nothing has changed.
			for _, docs := range [][]map[string]any{before, after} {
				delete(at(docs[len(docs)-1], "spec", "clusters", 0).(map[string]any), "ignitionConfigOverride")
				for _, n := range at(docs[len(docs)-1], "spec", "clusters", 0, "nodes").([]any) {
					delete(n.(map[string]any), "ignitionConfigOverride")
					delete(n.(map[string]any), "installerArgs")
				}
			}
			if fmt.Sprint(before) != fmt.Sprint(after) {
				t.Errorf("%v\nbecame\n%v", before, after)
			}
			if strings.Contains(tt.in, "\r\n") && bytes.Count(out, []byte("\n")) != bytes.Count(out, []byte("\r\n")) {
				t.Error("mixes line ends")
			}
		})
	}
}

func TestSaveLabel(t *testing.T) {
	for _, tt := range []struct{ old, label, want string }{
		{"", "", `["--save-partlabel", "data"]`},
		{" [ ] ", "data", `["--save-partlabel", "data"]`},
		{`["--save-partlabel", "data"]`, "data", `["--save-partlabel", "data"]`},
		{` ["--save-partlabel=data"] `, "data", ` ["--save-partlabel=data"] `},
		{`["--save-partlabel", "data"]`, "data2", `["--save-partlabel", "data", "--save-partlabel", "data2"]`},
		{`["data", "--save-partlabel"]`, "data", `["data", "--save-partlabel", "--save-partlabel", "data"]`},
		{"[\n \"it's\"\n]\n", "data", "[\n \"it\\u0027s\", \"--save-partlabel\", \"data\"]"},
	} {
		if got, err := saveLabel(tt.old, tt.label); err != nil || got != tt.want {
			t.Errorf("%q, %s: %q, %v", tt.old, tt.label, got, err)
		}
	}
	for _, old := range []string{"null", "{}", "[1]", "[", `"a"`, "[] []"} {
		if got, err := saveLabel(old, ""); err == nil {
			t.Errorf("%s: %s", old, got)
		}
	}
}

func TestSiteErrors(t *testing.T) {
	const head = "apiVersion: ran.openshift.io/v1\nkind: SiteConfig\nspec:\n  clusters:\n"
	const pre = "a: 1\n---\n"
	for _, tt := range []struct{ name, in, want string }{
		{"empty", "", "there is no SiteConfig"},
		{"others only", "kind: SiteConfig\napiVersion: example.com/v1\n---\nkind: Namespace\n", "there is no SiteConfig"},
		{"not YAML", pre + "a: [\n", "document 2, which begins in line 2: line "},
		{"no spec", "apiVersion: ran.openshift.io/v1\nkind: SiteConfig\n", "document 1: spec: is not a mapping"},
		{"no clusters", "apiVersion: ran.openshift.io/v1\nkind: SiteConfig\nspec: {}\n", "document 1: spec.clusters: is not a list"},
		{"no nodes", pre + head + "  - clusterName: a\n", "document 2: spec.clusters[0].nodes: is not a list"},
		{"no node", head + "  - clusterName: a\n    nodes: [b]\n", "document 1: spec.clusters[0].nodes[0]: is not a mapping"},
		{"no cluster", head + "  - \n", "document 1: spec.clusters[0]: is not a mapping"},
		{"override is YAML", head + "  - ignitionConfigOverride: {}\n    nodes: []\n", "document 1: spec.clusters[0].ignitionConfigOverride: is not a string with JSON in it"},
		{"override is a number", head + "  - ignitionConfigOverride: 1\n    nodes: []\n", "is not a string with JSON in it"},
		{"override is not JSON", head + "  - ignitionConfigOverride: '{'\n    nodes: []\n", "document 1: spec.clusters[0].ignitionConfigOverride: is not JSON: it ends in the middle"},
		{"override of another spec", head + "  - nodes:\n    - hostName: a\n    - ignitionConfigOverride: '{\"ignition\":{\"version\":\"3.4.0\"}}'\n",
			`document 1: spec.clusters[0].nodes[1].ignitionConfigOverride: ignition.version is "3.4.0"`},
		{"override too long", head + "  - ignitionConfigOverride: '{\"a\":\"" + strings.Repeat("x", maxOverride) + "\"}'\n    nodes: []\n", "more than 262144"},
		{"arguments are YAML", head + "  - nodes:\n    - installerArgs: [a]\n", "document 1: spec.clusters[0].nodes[0].installerArgs: is not a string"},
		{"arguments are not a list", head + "  - nodes:\n    - installerArgs: '{}'\n", "installerArgs: is not a JSON list of strings"},
		{"no marker between", head + "  - nodes: []\n...\na: 1\n", "document 1: another one follows it without ---"},
		{"ClusterInstance", pre + "apiVersion: siteconfig.open-cluster-management.io/v1alpha1\nkind: ClusterInstance\nspec:\n  nodes:\n  - installerArgs: x\n", "document 2: spec.nodes[0].installerArgs: is not a JSON list"},
	} {
		out, _, err := Site([]byte(tt.in), Options{SHA256: hash})
		if err == nil || !strings.Contains(err.Error(), tt.want) || out != nil {
			t.Errorf("%s: error is %v, want %s", tt.name, err, tt.want)
		}
	}
}

func FuzzSite(f *testing.F) {
	f.Add(string(must(os.ReadFile("testdata/site/clusterinstance.yaml"))))
	f.Fuzz(func(t *testing.T, in string) {
		out, _, err := Site([]byte(in), Options{SHA256: hash})
		if err != nil {
			if out != nil {
				t.Fatal("an error, and a result")
			}
			return
		}
		again, notes, err := Site(out, Options{SHA256: hash})
		if err != nil || !bytes.Equal(again, out) || len(notes) > 0 {
			t.Fatalf("the second time: %v, %q\n%q, before\n%q", err, notes, again, out)
		}
		// Documents of others are there, to the byte.
		before, after := documents([]byte(in)), documents(out)
		if len(before) != len(after) {
			t.Fatalf("%d documents, were %d", len(after), len(before))
		}
		for i, doc := range before {
			if !bytes.Contains(doc, []byte("siteconfig")) && !bytes.Contains(doc, []byte("openshift")) && !bytes.Equal(doc, after[i]) && !bytes.Contains(doc, []byte{'\\'}) {
				t.Fatalf("document %d was\n%q, is\n%q", i+1, doc, after[i])
			}
		}
	})
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}
