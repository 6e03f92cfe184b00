package e2e

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
	"github.com/precache/precache-agent/internal/vm"
	"github.com/precache/precache-agent/internal/vm/report"
)

const (
	agentUnit     = "precache-agent.service"
	bootstrapUnit = "precache-agent-bootstrap.service"
	machineConfig = "machine-config-daemon-pull.service"
)

// live makes a boot one of the live ISO's.
var live = vm.Config{Append: []string{"coreos.liveiso=rhcos"}}

func names(images []fixture.Staged) (all []string) {
	for _, i := range images {
		all = append(all, i.Ref)
	}
	return all
}

// agentConsumer is what the live ISO starts.
func (s *shared) agentConsumer() consumer {
	all := s.staged.discovery()
	return consumer{
		name: "agent.service", images: names(all), files: markers,
		unit:   "After=network.target\n",
		before: "ExecStartPre=/usr/local/bin/agent-fix-bz1964591 " + all[0].Ref + "\n",
	}
}

// installConsumers are what an installed node starts: crio-wipe before the agent, and those that need images.
func (s *shared) installConsumers() []consumer {
	return []consumer{
		{name: machineConfig, images: []string{s.staged.operator.Ref}, files: markers, unit: "After=crio-wipe.service\n"},
		{name: "crio.service", images: names(s.staged.install()[1:]), unit: "Wants=crio-wipe.service\nAfter=crio-wipe.service " + machineConfig + "\n"},
	}
}

func crioWipe() unit {
	return enabled("crio-wipe.service", "[Unit]\nBefore=crio.service\n\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart="+vm.Guest+" wipe\n\n[Install]\nWantedBy=multi-user.target\n")
}

// found fails the test unless a consumer found all that it looks for, in order, and the disk unused.
func (n *node) found(name string, disks ...string) report.Report {
	n.t.Helper()
	r := n.report(name)
	for image, there := range r.Images {
		if !there {
			n.t.Errorf("%s: podman does not have %s", name, image)
		}
	}
	ready := n.waitFor("the start of the agent", of(agentUnit, vm.UnitStarted)).At
	if at := vm.Monotonic(r.At); at < ready {
		n.t.Errorf("%s started at %v, before the agent was ready at %v", name, at, ready)
	}
	n.unused(r)
	if len(r.Files) > 0 {
		want := map[string]report.File{
			markers[0]: {Mode: 0o104755, UID: 7, GID: 8, Text: "runs as 7\n"},
			markers[1]: {},
			markers[2]: {Mode: 0o120777},
		}
		for path, f := range want {
			if r.Files[path] != f {
				n.t.Errorf("%s: file %s of the image is %+v, want %+v", name, path, r.Files[path], f)
			}
		}
	}
	return r
}

// unused fails the test if a consumer could not have the partition and its disk for itself.
func (n *node) unused(r report.Report) {
	n.t.Helper()
	for what, why := range r.Exclusive {
		if why != "" {
			n.t.Errorf("%s: cannot open the %s with O_EXCL: %s", r.Name, what, why)
		}
	}
	if len(r.Mounted) > 0 {
		n.t.Errorf("%s: the partition is mounted: %q", r.Name, r.Mounted)
	}
}

// whole fails the test unless the node's store has these images, under their names, whole to the last file, and no others.
func (n *node) whole(images []fixture.Staged, more ...string) {
	n.t.Helper()
	n.look(func(dir string) {
		s := store(dir)
		storetest.Check(n.t, s)
		want := slices.Concat(names(images), more)
		var got []string
		for name := range s.Names(n.t) {
			got = append(got, name)
		}
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			n.t.Errorf("the store has the names %q, want %q", got, want)
		}
	})
}

// metric is a series' value in what was scraped, or -1.
func metric(text, series string) float64 {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, series+" "); ok {
			if f, err := strconv.ParseFloat(strings.TrimSpace(v), 64); err == nil {
				return f
			}
		}
	}
	return -1
}

// scrapes asks for the metrics over and over until the agent is ready, and returns what came while it was loading.
func (n *node) scrapes() (loading []string) {
	n.t.Helper()
	for {
		// Before there is a binary the answer waits for it; before the agent has started, there is none.
		_, serving := n.find(of("precache-agent-metrics.service", vm.UnitStarted))
		began := time.Now()
		text, err := n.scrape(20 * time.Second)
		if took := time.Since(began); serving && (took > 10*time.Second || err != nil && !strings.HasPrefix(err.Error(), "404")) {
			n.t.Errorf("a scrape ended after %v (%v)", took, err)
		}
		if err == nil && metric(text, `precache_images{state="pending"}`) > 0 {
			if metric(text, "precache_success") == 1 {
				n.t.Errorf("success is said while images are pending:\n%s", text)
			}
			loading = append(loading, text)
		}
		if _, done := n.find(of(agentUnit, vm.UnitStarted)); done {
			return loading
		}
		n.wait("the next scrape", func() bool { return time.Since(began) > 300*time.Millisecond })
	}
}

// The live ISO: the override of the discovery stage; a partition whose log is dirty.
func TestDiscovery(t *testing.T) {
	s := setup(t)
	data := newDisk(t, "data", vm.Partition{Label: "data", Fill: s.fill, Dirty: true})
	n := newNode(t, s, spec{
		override: s.override(t, "discovery"), consumers: []consumer{s.agentConsumer()}, disks: []*disk{data},
		units: []unit{enabled("doctor.service", "[Unit]\nAfter=multi-user.target\n\n[Service]\nType=oneshot\nExecStart=/run/precache-agent/bin/precache-agent doctor\n\n[Install]\nWantedBy=multi-user.target\n")},
	})
	n.boot(live)

	loading := n.scrapes()
	if len(loading) == 0 {
		t.Error("no scrape succeeded while the agent was loading")
	}
	n.found("agent.service")
	if !strings.Contains(n.Console(), "precache-agent: 3 images: 3 loaded") {
		t.Error("the console does not say how it ended")
	}
	after, err := n.scrape(20 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	for series, want := range map[string]float64{
		`precache_success`: 1, `precache_images{state="listed"}`: 3, `precache_images{state="loaded"}`: 3, `precache_archives_read_total`: 3,
		`precache_stage_info{stage="discovery"}`: 1,
	} {
		if got := metric(after, series); got != want {
			t.Errorf("after the load %s is %v, want %v", series, got, want)
		}
	}
	n.waitFor("what agent-fix-bz1964591 says", says("agent.service", s.staged.agent.Ref, "in the store"))
	n.waitFor("the end of doctor", says("doctor.service", "Finished"))
	n.waitFor("doctor on the order", says("doctor.service", "agent.service started after it"))
	t.Logf("%d scrapes while loading; ready at %v, booted at %v", len(loading), n.waitFor("ready", of(agentUnit, vm.UnitStarted)).At, n.booted())
	n.off()
	n.whole(s.staged.discovery(), "registry.example.com/e2e/agent:v1", "registry.example.com/e2e/release:4.14.0-x86_64-machine-config-operator")
}

// An installed node, boot after boot: filled; untouched; wiped; wiped and retired.
func TestInstall(t *testing.T) {
	s := setup(t)
	data := newDisk(t, "data", vm.Partition{Label: "data", Fill: s.fill})
	all := s.staged.install()
	n := newNode(t, s, spec{override: s.override(t, "install"), consumers: s.installConsumers(), units: append(listings(), crioWipe()), disks: []*disk{data}})
	consumed := func() {
		t.Helper()
		n.found(machineConfig)
		n.found("crio.service")
		n.booted()
	}
	wiped := func() {
		t.Helper()
		n.edit(func(dir string) error {
			return os.WriteFile(filepath.Join(dir, report.WipeFile), nil, 0o644)
		})
	}
	stats := func(loaded, present, archives, layers float64) {
		t.Helper()
		text, err := n.scrape(20 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for series, want := range map[string]float64{
			`precache_success`: 1, `precache_images{state="loaded"}`: loaded, `precache_images{state="present"}`: present, `precache_archives_read_total`: archives,
			`precache_layers{outcome="written"}`: layers,
		} {
			if got := max(0, metric(text, series)); got != want {
				t.Errorf("%s is %v, want %v", series, got, want)
			}
		}
	}
	lap := func(what string) {
		ready := n.waitFor("ready", of(agentUnit, vm.UnitStarted)).At
		began := n.waitFor("starting", of(agentUnit, vm.UnitStarting)).At
		t.Logf("%s: ready at %v, %v after it was started; booted at %v", what, ready, ready-began, n.booted())
	}

	// The first boot.
	n.boot(vm.Config{})
	consumed()
	stats(4, 0, 4, 7)
	lap("filled")
	n.off()
	n.whole(all)

	// Nothing is missing: no archive is opened, and nothing is written.
	n.boot(vm.Config{})
	if early, err := n.earlyScrape(); err != nil {
		t.Errorf("scrape early after a reboot: %v", err)
	} else if got := metric(early, `precache_success`); got < 0 {
		t.Errorf("early after a reboot the metrics are\n%s", early)
	}
	consumed()
	stats(0, 4, 0, 0)
	n.unread("data")
	lap("untouched")
	n.off()
	n.untouched()

	// The store is wiped, as after a power cut.
	wiped()
	n.boot(vm.Config{})
	consumed()
	n.waitFor("the wipe", says("crio-wipe.service", "wiped the store"))
	stats(4, 0, 4, 7)
	lap("wiped")
	n.off()
	n.whole(all)

	// The cluster has moved on.
	wiped()
	n.edit(func(dir string) error {
		return errors.Join(os.MkdirAll(filepath.Join(dir, "etc/precache-agent"), 0o755), os.WriteFile(filepath.Join(dir, "etc/precache-agent/retired"), nil, 0o644))
	})
	n.boot(vm.Config{})
	r := n.report(machineConfig)
	n.unused(r)
	if r.Images[s.staged.operator.Ref] {
		t.Error("a retired agent loaded an image")
	}
	n.waitFor("the end of the agent", of(agentUnit, vm.UnitStarted))
	n.booted()
	n.retired()
	n.unread("data")
	lap("retired")
	n.off()
	n.look(func(dir string) { storetest.CheckEmpty(t, store(dir)) })
}

// earlyScrape asks for the metrics as early as anything answers.
func (n *node) earlyScrape() (text string, err error) {
	n.t.Helper()
	n.wait("the first answer to a scrape", func() bool {
		text, err = n.scrape(20 * time.Second)
		return err == nil
	})
	return text, err
}

// unread fails the test if archives were read from a disk, or anything was written to it, in this boot.
func (n *node) unread(disk string) {
	n.t.Helper()
	traffic, err := n.Traffic()
	if err != nil {
		n.t.Fatal(err)
	}
	info, err := os.Stat(n.shared.agent)
	if err != nil {
		n.t.Fatal(err)
	}
	// There is the binary, and what a file system reads to be mounted; the archives have 12 MB.
	if got := traffic[disk]; got.Read > info.Size()+4<<20 || got.Written != 0 {
		n.t.Errorf("%d bytes were read from the disk and %d written; the agent has %d", got.Read, got.Written, info.Size())
	}
}

// retired fails the test unless the agent said, in one line, that it is.
func (n *node) retired() {
	n.t.Helper()
	var said []string
	for _, e := range n.Journal() {
		if e.Unit == agentUnit && e.Ident != "systemd" {
			said = append(said, e.Message)
		}
	}
	if len(said) != 1 || !strings.Contains(said[0], "retired") {
		n.t.Errorf("a retired agent says %q, want one line", said)
	}
}

// Whatever is wrong with the partition, consumers start in time, and the log says why there is nothing.
func TestBootGoesOn(t *testing.T) {
	s := setup(t)
	const slack = 25 * time.Second // for an emulated machine on a busy one
	empty := func(string) error { return nil }
	damage := func(image *os.File) error {
		garbage := make([]byte, 64<<10)
		for i := range garbage {
			garbage[i] = byte(i * 7)
		}
		_, err := image.WriteAt(garbage, 64) // of the superblock only the beginning is left
		return err
	}
	for _, tt := range []struct {
		name      string
		partition *vm.Partition
		packaged  bool     // as a package installs it; else the override
		flags     []string // of the override
		wait      time.Duration
		who       string   // says why
		why       []string // it says
	}{
		{"no-partition", nil, true, nil, 30 * time.Second, agentUnit, []string{"no partition", "data"}},
		{"empty-partition", &vm.Partition{Label: "data", Fill: empty}, true, nil, 0, agentUnit, []string{"list"}},
		{"damaged-file-system", &vm.Partition{Label: "data", Fill: s.fill, Damage: damage}, true, nil, 0, agentUnit, []string{"no partition", "mount /dev/vdb2"}},
		{"no-file-system", &vm.Partition{Label: "data"}, false, []string{"--wait", "4s"}, 4 * time.Second, bootstrapUnit, []string{"cannot mount /dev/vdb2", "the boot goes on"}},
		{"wrong-sha256", &vm.Partition{Label: "data", Fill: s.fill}, false, []string{"--sha256", strings.Repeat("0123", 16)}, 0, bootstrapUnit, []string{"has the sha256 " + s.sha256, "the boot goes on"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := s.agentConsumer()
			c.images, c.files = c.images[:1], nil
			what := spec{consumers: []consumer{c}}
			if tt.partition != nil {
				what.disks = []*disk{newDisk(t, "data", *tt.partition)}
			}
			if tt.packaged {
				what.packaged = "discovery"
			} else {
				what.override = s.override(t, "discovery", tt.flags...)
			}
			n := newNode(t, s, what)
			n.boot(live)
			r := n.report(c.name)
			began := n.waitFor("the start of "+tt.who, of(tt.who, vm.UnitStarting)).At
			took := time.Duration(r.At-int64(began)) * time.Microsecond
			if took < tt.wait || took > tt.wait+slack {
				t.Errorf("%s started %v after %s was, want %v to %v", c.name, took, tt.who, tt.wait, tt.wait+slack)
			}
			if r.Images[c.images[0]] {
				t.Errorf("podman has %s", c.images[0])
			}
			if tt.partition != nil {
				n.unused(r)
			}
			n.waitFor("why there is nothing", says(tt.who, tt.why...))
			n.waitFor("the failure of "+tt.who, of(tt.who, vm.UnitFailed))
			if !slices.ContainsFunc(strings.Split(n.Console(), "\n"), func(line string) bool { return strings.Contains(line, "precache-agent") }) {
				t.Error("the console says nothing of the agent")
			}
			t.Logf("%s started %.1f s after %s was; booted at %v", c.name, took.Seconds(), tt.who, n.booted())
			n.off()
			n.look(func(dir string) { storetest.CheckEmpty(t, store(dir)) })
		})
	}
}

// A disk that shows up 20 s late is waited for.
func TestLateDisk(t *testing.T) {
	s := setup(t)
	data := newDisk(t, "data", vm.Partition{Label: "data", Fill: s.fill})
	n := newNode(t, s, spec{override: s.override(t, "discovery"), consumers: []consumer{s.agentConsumer()}})
	n.boot(live)
	began := n.waitFor("the bootstrap", of(bootstrapUnit, vm.UnitStarting)).At
	time.Sleep(20 * time.Second)
	n.disks = append(n.disks, data)
	if err := n.Plug(data.Disk); err != nil {
		t.Fatal(err)
	}
	r := n.found("agent.service")
	if late := vm.Monotonic(r.At) - began; late < 20e6 {
		t.Errorf("the consumer started %v after the bootstrap did, before there was a disk", late)
	}
	n.booted()
	n.off()
	n.whole(s.staged.discovery(), "registry.example.com/e2e/agent:v1", "registry.example.com/e2e/release:4.14.0-x86_64-machine-config-operator")
}

// Of two partitions with the label, the one that has lists is used, and the log says so.
func TestTwoPartitions(t *testing.T) {
	s := setup(t)
	other := newDisk(t, "other", vm.Partition{Label: "data", Fill: func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "somebody-elses"), []byte("data\n"), 0o644)
	}})
	data := newDisk(t, "data", vm.Partition{Label: "data", Fill: s.fill})
	n := newNode(t, s, spec{override: s.override(t, "discovery"), consumers: []consumer{s.agentConsumer()}, disks: []*disk{other, data}})
	n.boot(live)
	n.found("agent.service")
	n.waitFor("the word on several partitions", says(agentUnit, "several partitions", "/dev/vdc2"))
	n.booted()
	n.off()
}

// With --ready-after essential, what the boot waits for comes first, and the rest later.
func TestReadyAfterEssential(t *testing.T) {
	s := setup(t)
	data := newDisk(t, "data", vm.Partition{Label: "data", Fill: s.fill})
	c := s.installConsumers()[0]
	n := newNode(t, s, spec{override: s.override(t, "install", "--ready-after", "essential"), consumers: []consumer{c}, units: []unit{crioWipe()}, disks: []*disk{data}})
	n.boot(vm.Config{})
	r := n.report(c.name)
	if !r.Images[s.staged.operator.Ref] {
		t.Errorf("podman does not have %s", s.staged.operator.Ref)
	}
	// The other tests find the disk unused when a consumer starts. Here it is not, and they would see it.
	if r.Exclusive["partition"] == "" || r.Exclusive["disk"] == "" {
		t.Errorf("while the rest is loaded, a consumer can have the partition for itself: %v", r.Exclusive)
	}
	ready := n.waitFor("the start of the agent", of(agentUnit, vm.UnitStarted)).At
	if at := vm.Monotonic(r.At); at < ready {
		t.Errorf("%s started at %v, before the agent was ready at %v", c.name, at, ready)
	}
	for _, img := range append(slices.Clone(s.staged.rest), s.staged.network) {
		loaded := n.waitFor("the load of "+img.Ref, says(agentUnit, "image is loaded", img.Ref)).At
		if loaded < vm.Monotonic(r.At) {
			t.Errorf("%s, which is not essential, was loaded at %v, before %s started at %v", img.Ref, loaded, c.name, vm.Monotonic(r.At))
		}
	}
	n.waitFor("the end of the run", says(agentUnit, "4 images: 4 loaded"))
	n.booted()
	n.off()
	n.whole(s.staged.install())
}

// A power cut loses what was not flushed: the tool of tests to come.
func TestPowerCut(t *testing.T) {
	s := setup(t)
	scratch := newDisk(t, "scratch", vm.Partition{Label: "scratch"})
	n := newNode(t, s, spec{units: []unit{enabled("write.service", `[Unit]
Wants=dev-disk-by\x2dpartlabel-scratch.device
After=dev-disk-by\x2dpartlabel-scratch.device

[Service]
Type=oneshot
ExecStart=/bin/sh -c "echo kept | dd of=/dev/disk/by-partlabel/scratch oflag=direct conv=sync,fsync bs=4096 seek=0 status=none"
ExecStart=/bin/sh -c "echo lost | dd of=/dev/disk/by-partlabel/scratch oflag=direct conv=sync bs=4096 seek=1 status=none"

[Install]
WantedBy=multi-user.target
`)}, disks: []*disk{scratch}})
	n.boot(vm.Config{Volatile: true})
	n.waitFor("the end of writing", says("write.service", "Finished"))
	n.Cut()
	b, err := os.ReadFile(scratch.Path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b, []byte("kept\n\x00")) {
		t.Error("what was flushed is lost")
	}
	if bytes.Contains(b, []byte("lost\n\x00")) {
		t.Error("what was not flushed is there")
	}
	n.disks = nil // it was written to
}
