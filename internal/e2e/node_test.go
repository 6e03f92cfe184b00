package e2e

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/precache/precache-agent/internal/storetest"
	"github.com/precache/precache-agent/internal/vm"
	"github.com/precache/precache-agent/internal/vm/report"
	"github.com/precache/precache-agent/units"
)

// bootTime is how long a machine may take for a boot. It takes 15 s on two idle processors; everything is emulated.
const bootTime = 240 * time.Second

// metricsPort is where the agent's socket listens, on the node's loopback interface.
const metricsPort = 29617

// work is a folder for what the tests share; it is removed when they end.
var work string

func TestMain(m *testing.M) {
	dir, remove, err := vm.Scratch()
	if err != nil {
		panic(err)
	}
	work = dir
	code := m.Run()
	if err := remove(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// shared is what all tests use.
type shared struct {
	base   *vm.Base
	agent  string // the binary
	sha256 string // of it, in hex
	staged staged
	err    error
}

var prepare = sync.OnceValue(func() *shared {
	s := &shared{agent: filepath.Join(work, "precache-agent")}
	s.err = s.make()
	return s
})

func (s *shared) make() (err error) {
	if err := vm.Alone(); err != nil {
		return err
	}
	began := time.Now()
	if s.base, err = vm.NewBase(work); err != nil {
		return err
	}
	if err := vm.Build("github.com/precache/precache-agent/cmd/precache-agent", s.agent); err != nil {
		return err
	}
	b, err := os.ReadFile(s.agent)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(b)
	s.sha256 = hex.EncodeToString(sum[:])
	if s.staged, err = stage(filepath.Join(work, "staged")); err != nil {
		return err
	}
	fmt.Printf("base system, agent and partition: %.1f s\n", time.Since(began).Seconds())
	return nil
}

// setup prepares what the tests share, or skips the test where no machine can be booted; in CI it fails.
func setup(t *testing.T) *shared {
	t.Helper()
	if why := vm.Missing(); why != "" {
		if os.Getenv("CI") == "true" {
			t.Fatalf("would be skipped, which CI does not allow: %s", why)
		}
		t.Skip(why)
	}
	s := prepare()
	if s.err != nil {
		t.Fatal(s.err)
	}
	return s
}

// override runs the agent's command that prints an override.
func (s *shared) override(t *testing.T, stage string, flags ...string) []byte {
	t.Helper()
	args := append([]string{"ignition", "--stage", stage, "--label", "data", "--binary", "partition", "--sha256", s.sha256}, flags...)
	cmd := exec.Command(s.agent, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%q: %v", cmd.Args, err)
	}
	return out
}

// A disk is one with a partition, of which every byte must stay as it is.
type disk struct {
	vm.Disk
	hash string
}

// disk makes a disk like the one that vm.NewDisk would make of p. What several tests use is made once.
func newDisk(t *testing.T, name string, p vm.Partition) *disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), name+".img")
	if err := vm.NewDisk(path, p); err != nil {
		t.Fatal(err)
	}
	d := &disk{Disk: vm.Disk{Name: name, Path: path}}
	d.hash = d.sum(t)
	return d
}

func (d *disk) sum(t *testing.T) string {
	t.Helper()
	sum, err := vm.Hash(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// A node is a machine with its root file system and its disks, booted as often as it is told.
type node struct {
	*vm.Machine // while it is on, and what it said, until it is booted again

	t      *testing.T
	shared *shared
	root   string
	disks  []*disk
	on     time.Time
	boots  int
}

// A spec says what a node is.
type spec struct {
	consumers []consumer
	override  []byte // merged into the node's own config by Ignition; nil: none
	units     []unit // further ones of the node's own config
	packaged  string // the stage whose units are there as a package installs them, with the binary; "": none
	disks     []*disk
}

// newNode makes a node that has not been booted yet.
func newNode(t *testing.T, s *shared, n spec) *node {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root.img")
	if err := s.base.NewRoot(root); err != nil {
		t.Fatal(err)
	}
	node := &node{t: t, shared: s, root: root, disks: n.disks}
	node.edit(func(dir string) error {
		if n.packaged != "" {
			if err := vm.Install(dir, s.agent, units.Path); err != nil {
				return err
			}
		}
		return vm.Ignite(dir, n.config())
	})
	t.Cleanup(node.end)
	return node
}

// A unit is one of an Ignition config.
type unit struct {
	Name     string `json:"name"`
	Enabled  *bool  `json:"enabled,omitempty"`
	Contents string `json:"contents,omitempty"`
}

func enabled(name, contents string) unit {
	yes := true
	return unit{Name: name, Enabled: &yes, Contents: contents}
}

// A consumer is a service that consumes images.
type consumer struct {
	name   string
	unit   string   // further lines of [Unit]
	before string   // further lines of [Service], run before it records
	images []string // in podman's names
	files  []string // of the first image
}

func (c consumer) contents() string {
	return fmt.Sprintf(`[Unit]
Description=Stand-in for %[1]s
%[2]s
[Service]
Type=oneshot
RemainAfterExit=yes
TimeoutStartSec=600
%[3]s
ExecStart=%[4]s record %[1]s --images=%[5]s --files=%[6]s

[Install]
WantedBy=multi-user.target
`, c.name, c.unit, c.before, vm.Guest, strings.Join(c.images, ","), strings.Join(c.files, ","))
}

// config is the node's own Ignition config, as the installer or the machine-config-operator make it, with the override merged in.
func (n spec) config() []byte {
	all := slices.Clone(n.units)
	for _, c := range n.consumers {
		all = append(all, enabled(c.name, c.contents()))
	}
	if n.packaged != "" {
		files, err := units.Files(n.packaged)
		if err != nil {
			panic(err)
		}
		for _, f := range files {
			all = append(all, unit{f.Name, &f.Enabled, f.Contents})
		}
	}
	ignition := map[string]any{"version": "3.2.0"}
	if n.override != nil {
		ignition["config"] = map[string]any{"merge": []map[string]any{{"source": "data:;base64," + base64.StdEncoding.EncodeToString(n.override)}}}
	}
	b, err := json.Marshal(map[string]any{
		"ignition": ignition,
		"systemd":  map[string]any{"units": all},
		"storage": map[string]any{"files": []map[string]any{{
			"path": "/usr/local/bin/agent-fix-bz1964591", "mode": 0o755,
			// The stock one removes images that were loaded by digest.
			"contents": map[string]any{"source": "data:,%23!%2Fbin%2Fsh%0Apodman%20rmi%20--force%20%22%241%22%0A"},
		}}},
	})
	if err != nil {
		panic(err)
	}
	return b
}

// edit changes the root file system of a node that is off.
func (n *node) edit(f func(dir string) error) {
	n.t.Helper()
	if err := vm.Edit(n.root, f); err != nil {
		n.t.Fatal(err)
	}
}

// boot switches the node on.
func (n *node) boot(conf vm.Config) {
	n.t.Helper()
	if n.Machine != nil {
		n.Kill()
	}
	conf.Base, conf.Root, conf.Ports = n.shared.base, n.root, []int{metricsPort}
	for _, d := range n.disks {
		conf.Disks = append(conf.Disks, d.Disk)
	}
	n.boots++
	n.on = time.Now()
	var err error
	if n.Machine, err = vm.Start(conf); err != nil {
		n.t.Fatal(err)
	}
}

// end kills the node when its test ends, shows what it said if the test failed, and compares the disks.
func (n *node) end() {
	if n.Machine != nil {
		if n.t.Failed() {
			n.show()
		}
		n.Kill()
	}
	n.unchanged()
}

// unchanged fails the test if a byte of a disk is not what it was.
func (n *node) unchanged() {
	n.t.Helper()
	for _, d := range n.disks {
		if sum := d.sum(n.t); sum != d.hash {
			n.t.Errorf("disk %s was written to: its SHA-256 is %s, was %s", d.Name, sum, d.hash)
		}
	}
}

// show logs the ends of the console and of the journal, and all that the agent's units said.
func (n *node) show() {
	last := func(lines []string, most int) string {
		return "  " + strings.Join(lines[max(0, len(lines)-most):], "\n  ")
	}
	var ours, all []string
	for _, e := range n.Journal() {
		all = append(all, e.String())
		if strings.Contains(e.Unit, "precache-agent") || strings.HasPrefix(e.Message, report.Prefix) {
			ours = append(ours, e.String())
		}
	}
	n.t.Logf("boot %d, after %.0f s; the console:\n%s\nthe journal ends with:\n%s\nthe agent's units said:\n%s", n.boots, time.Since(n.on).Seconds(),
		last(strings.Split(strings.TrimSpace(n.Console()), "\n"), 40), last(all, 20), last(ours, 200))
}

// wait waits for something within the time of a boot.
func (n *node) wait(what string, so func() bool) {
	n.t.Helper()
	if err := n.Wait(bootTime-time.Since(n.on), what, so); err != nil {
		n.t.Fatal(err)
	}
}

// find returns the first entry of the journal that is asked for.
func (n *node) find(is func(vm.Entry) bool) (vm.Entry, bool) {
	for _, e := range n.Journal() {
		if is(e) {
			return e, true
		}
	}
	return vm.Entry{}, false
}

// waitFor waits for an entry of the journal.
func (n *node) waitFor(what string, is func(vm.Entry) bool) (found vm.Entry) {
	n.t.Helper()
	n.wait(what, func() (ok bool) { found, ok = n.find(is); return ok })
	return found
}

// of asks for what systemd says of a unit, or for what the unit says.
func of(unit, id string) func(vm.Entry) bool {
	return func(e vm.Entry) bool { return e.Unit == unit && e.MessageID() == id }
}

// says asks for an entry of a unit with all of these texts in it.
func says(unit string, texts ...string) func(vm.Entry) bool {
	return func(e vm.Entry) bool {
		return e.Unit == unit && !slices.ContainsFunc(texts, func(s string) bool { return !strings.Contains(e.Message, s) })
	}
}

// booted waits for the end of the boot, and returns when it was.
func (n *node) booted() vm.Monotonic {
	n.t.Helper()
	return n.waitFor("the end of the boot", func(e vm.Entry) bool { return e.MessageID() == vm.BootFinished }).At
}

// off shuts the node down.
func (n *node) off() {
	n.t.Helper()
	if err := n.PowerOff(90 * time.Second); err != nil {
		n.t.Fatal(err)
	}
	n.t.Logf("boot %d: %.0f s, of which both processors worked %.0f s", n.boots, time.Since(n.on).Seconds(), n.CPU().Seconds())
	n.unchanged()
}

// reports are what the consumers recorded in this boot.
func (n *node) reports() map[string]report.Report {
	all := map[string]report.Report{}
	for _, e := range n.Journal() {
		if line, ok := strings.CutPrefix(e.Message, report.Prefix); ok {
			var r report.Report
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				n.t.Errorf("report %q: %v", line, err)
			}
			all[r.Name] = r
		}
	}
	return all
}

// report waits for a consumer's report.
func (n *node) report(name string) (r report.Report) {
	n.t.Helper()
	n.wait("the report of "+name, func() (ok bool) { r, ok = n.reports()[name]; return ok })
	for _, fault := range r.Faults {
		n.t.Errorf("%s: %s", name, fault)
	}
	return r
}

// scrape asks for the metrics once.
func (n *node) scrape(most time.Duration) (string, error) {
	client := http.Client{Timeout: most, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get("http://" + n.Address(metricsPort) + "/metrics")
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", answer.Status, b)
	}
	return string(b), err
}

// look calls f, which may end the test, with where the root file system of a node is mounted that is off.
func (n *node) look(f func(dir string)) {
	n.t.Helper()
	whole := false
	err := vm.Look(n.root, func(dir string) error {
		f(dir)
		whole = true
		return nil
	})
	if err != nil || !whole {
		n.t.Fatal("look into the root file system: ", err)
	}
}

// store is the node's containers-storage, in a mounted root file system.
func store(dir string) *storetest.Store {
	root := filepath.Join(dir, report.Store)
	return &storetest.Store{Root: root, RunRoot: root + "-run", Driver: "overlay", Dir: dir}
}
