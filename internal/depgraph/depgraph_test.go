package depgraph

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/precache/precache-agent/"
	tags   = "remote,containers_image_openpgp,exclude_graphdriver_btrfs"
)

// mayImport is who may import whom, inside the module. A package of the agent must stand here: one is made when there is
// a dependency that nobody else may have, a parser worth fuzzing alone, or a second caller.
var mayImport = map[string][]string{
	"internal/manifest": {},
	"internal/archive":  {"internal/manifest"},
	"internal/loader":   {"internal/archive", "internal/manifest"},
	"internal/storage":  {"internal/archive", "internal/manifest"},
	"internal/metrics":  {"internal/loader", "internal/archive", "internal/manifest"},
	"internal/mount":    {},
	"internal/systemd":  {},
	"internal/podman":   {},
	"internal/factory":  {"internal/archive", "internal/manifest"},
	"units":             {},
	"ignition":          {"units"},
	"cmd/precache-agent": {"internal/manifest", "internal/archive", "internal/loader", "internal/storage", "internal/metrics",
		"internal/mount", "internal/systemd", "internal/podman", "units", "ignition"},
	"cmd/precache-factory": {"internal/factory", "internal/archive", "internal/manifest", "units", "ignition"},
}

// helpers serve tests and development. They may import each other and whatever they need; only test files import them.
var helpers = []string{"internal/fixture", "internal/storetest", "internal/integration", "internal/bench", "internal/depgraph", "internal/vm", "internal/e2e", "internal/loader/storecontract", "hack"}

// importAlone is who alone may import what is outside the module. Helpers may as well.
var importAlone = map[string][]string{
	"github.com/klauspost/compress": {"internal/archive", "internal/storage"}, // storage: tar-split's record is kept gzip'd
	"github.com/ulikunitz/xz":       {"internal/archive"},
	"github.com/therootcompany/xz":  {"internal/archive"},
	"github.com/klauspost/pgzip":    {"internal/archive", "internal/storage"},
	"github.com/vbatts/tar-split":   {"internal/storage"},
	"github.com/containers/image":   {"internal/storage", "internal/factory"},
	"github.com/containers/storage": {"internal/storage"},
	"github.com/containers/common":  {"internal/storage"},
	"go.podman.io":                  {"internal/storage", "internal/factory"}, // where the three above moved to
	"github.com/containers/podman":  {"internal/podman"},
	"github.com/prometheus":         {"internal/metrics"},
	"github.com/fsnotify/fsnotify":  {"internal/mount"},
	"github.com/coreos/go-systemd":  {"internal/systemd"},
	"github.com/operator-framework": {"internal/factory"},
	"github.com/spf13/cobra":        {"cmd/precache-agent", "cmd/precache-factory"},
}

// anywhere are the packages that work without root and without containers-storage, so that a partition can be checked on a laptop.
// Neither they nor their tests may reach noStore, through whatever.
var (
	anywhere = []string{"internal/manifest", "internal/archive", "internal/loader", "units", "ignition"}
	noStore  = []string{"github.com/containers/storage", "github.com/containers/image", "go.podman.io", module + "internal/storage"}
)

// A pkg is what `go list -json -test` says of a package; of one built for a test, "p [q.test]", too.
type pkg struct {
	ImportPath, ForTest string
	Imports             []string
}

func TestImports(t *testing.T) {
	for _, fault := range check(load(t)) {
		t.Error(fault)
	}
}

// load lists the module's packages, their tests, and everything that they import.
func load(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-deps", "-test", "-tags", tags, "-json=ImportPath,ForTest,Imports", "./...")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pkgs := map[string]pkg{}
	for dec := json.NewDecoder(out); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs[p.ImportPath] = p
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, ok := pkgs[module+"internal/depgraph"]; !ok {
		t.Fatalf("go list ./... did not find this package among %d", len(pkgs))
	}
	return pkgs
}

// check returns a sentence for every import that the tables do not allow.
func check(pkgs map[string]pkg) []string {
	var faults []string
	for _, name := range slices.Sorted(maps.Keys(pkgs)) {
		p := pkgs[name]
		rel, ours := strings.CutPrefix(name, module)
		if !ours || p.ForTest != "" || strings.HasSuffix(name, ".test") || within(rel, helpers...) {
			continue
		}
		may, known := mayImport[rel]
		if !known {
			faults = append(faults, fmt.Sprintf("%s is not in the table of packages", rel))
			continue
		}
		for _, imported := range p.Imports {
			if to, ours := strings.CutPrefix(imported, module); ours && !slices.Contains(may, to) {
				faults = append(faults, fmt.Sprintf("%s may not import %s", rel, to))
			}
			for what, who := range importAlone {
				if within(imported, what) && !slices.Contains(who, rel) {
					faults = append(faults, fmt.Sprintf("%s may not import %s: only %s may", rel, imported, strings.Join(who, ", ")))
				}
			}
		}
	}
	for _, rel := range anywhere {
		for _, root := range []string{module + rel, module + rel + ".test"} {
			if chain := reach(pkgs, root, noStore); chain != nil {
				faults = append(faults, fmt.Sprintf("%s must do without containers-storage: %s", rel, strings.Join(chain, " → ")))
				break
			}
		}
	}
	slices.Sort(faults)
	return faults
}

// reach returns the shortest chain of imports from root to a package within targets, or nil.
func reach(pkgs map[string]pkg, root string, targets []string) []string {
	chains := [][]string{{root}}
	seen := map[string]bool{root: true}
	for len(chains) > 0 {
		chain := chains[0]
		chains = chains[1:]
		for _, next := range pkgs[chain[len(chain)-1]].Imports {
			if seen[next] {
				continue
			}
			seen[next] = true
			longer := append(slices.Clone(chain), next)
			if within(next, targets...) {
				return longer
			}
			chains = append(chains, longer)
		}
	}
	return nil
}

// within reports whether name is one of roots or below it; a major version's suffix counts as below.
func within(name string, roots ...string) bool {
	name, _, _ = strings.Cut(name, " ") // "p [q.test]"
	return slices.ContainsFunc(roots, func(root string) bool {
		return name == root || strings.HasPrefix(name, root+"/")
	})
}

// The checker finds what it is there for.
func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		name  string
		graph map[string][]string
		want  []string
	}{
		{"nothing", nil, nil},
		{"as drawn", map[string][]string{
			"cmd/precache-agent": {"internal/loader", "internal/storage", "github.com/spf13/cobra"}, "internal/loader": {"internal/archive"},
			"internal/archive": {"internal/manifest", "github.com/klauspost/compress/zstd"}, "internal/manifest": {"strings"},
			"internal/storage":       {"github.com/containers/storage", "github.com/containers/image/v5/storage"},
			"internal/fixture/stage": {"internal/fixture"}, "internal/fixture": {"github.com/klauspost/compress/zstd"},
			"internal/archive.test": {"internal/fixture"},
		}, nil},
		{"upwards", map[string][]string{"internal/manifest": {"internal/archive"}}, []string{"internal/manifest may not import internal/archive"}},
		{"of cmd", map[string][]string{"internal/loader": {"cmd/precache-agent"}}, []string{"internal/loader may not import cmd/precache-agent"}},
		{"of a helper", map[string][]string{"cmd/precache-agent": {"internal/fixture"}}, []string{"cmd/precache-agent may not import internal/fixture"}},
		{"of what another has alone", map[string][]string{"internal/loader": {"github.com/klauspost/compress/zstd"}, "internal/metrics": {"github.com/spf13/cobra"}}, []string{
			"internal/loader may not import github.com/klauspost/compress/zstd: only internal/archive, internal/storage may",
			"internal/metrics may not import github.com/spf13/cobra: only cmd/precache-agent, cmd/precache-factory may"}},
		{"unknown package", map[string][]string{"internal/util": nil}, []string{"internal/util is not in the table of packages"}},
		{"of the store, far away", map[string][]string{"internal/loader": {"example.com/a"}, "example.com/a": {"example.com/b"}, "example.com/b": {"github.com/containers/storage/pkg/archive"}},
			[]string{"internal/loader must do without containers-storage: " + module + "internal/loader → example.com/a → example.com/b → github.com/containers/storage/pkg/archive"}},
		{"of the store in a test", map[string][]string{"internal/archive.test": {"internal/archive_test [q.test]"}, "internal/archive_test [q.test]": {"github.com/containers/image/v5/copy"}},
			[]string{"internal/archive must do without containers-storage: " + module + "internal/archive.test → " + module + "internal/archive_test [q.test] → github.com/containers/image/v5/copy"}},
	} {
		pkgs := map[string]pkg{}
		full := func(name string) string {
			if strings.Contains(name, ".com/") || path.Dir(name) == "." {
				return name
			}
			return module + name
		}
		for name, imports := range tt.graph {
			p := pkg{ImportPath: full(name)}
			if strings.Contains(name, " [") {
				p.ForTest = "q"
			}
			for _, i := range imports {
				p.Imports = append(p.Imports, full(i))
			}
			pkgs[p.ImportPath] = p
		}
		if got := check(pkgs); !slices.Equal(got, tt.want) {
			t.Errorf("%s:\n got %q\nwant %q", tt.name, got, tt.want)
		}
	}
}
