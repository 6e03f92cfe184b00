package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/precache/precache-agent/internal/vm/report"
)

// A Config says what a machine has.
type Config struct {
	Base   *Base
	Root   string // image of its root file system
	Disks  []Disk
	Ports  []int    // of the machine's 10.0.2.15, that can be reached from here
	Append []string // to the kernel's command line
	// Volatile gives the disks a cache that loses what was not flushed, as a real disk does, when [Machine.Cut] comes.
	Volatile bool
}

// A Disk is one of a machine's; it has its name as serial number.
type Disk struct {
	Name string
	Path string
}

// A Machine is one that was started.
type Machine struct {
	dir   string // its sockets and what it says
	qemu  *process
	nbd   []*process
	qmp   *qmp
	ports map[int]int
	conf  Config
	slots []string // where a disk can be plugged in, and is not

	journal []Entry
	read    int64 // bytes of the journal's file that are in journal
}

// Start starts a machine. Whoever starts it must call Kill.
func Start(conf Config) (*Machine, error) {
	dir, err := os.MkdirTemp("", "vm-") // a socket's path has room for 107 bytes
	if err != nil {
		return nil, err
	}
	m := &Machine{dir: dir, conf: conf, ports: map[int]int{}, slots: []string{"slot0", "slot1"}}
	if err := m.start(); err != nil {
		said, _ := os.ReadFile(filepath.Join(dir, "qemu"))
		m.Kill()
		return nil, fmt.Errorf("start machine: %w: %s", err, said)
	}
	return m, nil
}

func (m *Machine) start() error {
	args := []string{"-machine", "q35", "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max", "-smp", "2", "-m", "2048",
		"-display", "none", "-nodefaults", "-no-reboot",
		"-kernel", m.conf.Base.kernel, "-initrd", m.conf.Base.initrd,
		"-chardev", "file,id=console,path=" + m.file("console"), "-serial", "chardev:console",
		"-device", "virtio-serial-pci", "-chardev", "file,id=journal,path=" + m.file("journal"), "-device", "virtserialport,chardev=journal,name=journal",
		"-qmp", "unix:" + m.file("qmp") + ",server=on,wait=off",
		"-device", "virtio-rng-pci"}
	net := "user,id=net0,restrict=on"
	for _, port := range m.conf.Ports {
		free, err := freePort()
		if err != nil {
			return err
		}
		m.ports[port] = free
		m.conf.Append = append(slices.Clip(m.conf.Append), fmt.Sprint(report.Port, port))
		net += fmt.Sprintf(",hostfwd=tcp:127.0.0.1:%d-:%d", free, port)
	}
	args = append(args, "-append", strings.Join(append([]string{"console=ttyS0 rw quiet systemd.show_status=0 systemd.firstboot=no mitigations=off net.ifnames=0",
		// What udev would load because the emulated processor has it, and the kernel then tests at length.
		"modprobe.blacklist=kvm,kvm_amd,kvm_intel,aesni_intel,ghash_clmulni_intel,crct10dif_pclmul,crc32_pclmul,sha512_ssse3,sha256_ssse3,sha1_ssse3,ip_tables,qemu_fw_cfg"}, m.conf.Append...), " "))
	args = append(args, "-netdev", net, "-device", "virtio-net-pci,netdev=net0,romfile=")
	for _, slot := range m.slots {
		args = append(args, "-device", "pcie-root-port,id="+slot+",chassis="+strings.TrimPrefix(slot, "slot"))
	}
	for _, d := range append([]Disk{{Name: "root", Path: m.conf.Root}}, m.conf.Disks...) {
		dev, err := m.blockdev(d)
		if err != nil {
			return err
		}
		b, err := json.Marshal(dev)
		if err != nil {
			return err
		}
		args = append(args, "-blockdev", string(b), "-device", "virtio-blk-pci,drive="+d.Name+",serial="+d.Name)
	}
	said, err := os.Create(m.file("qemu"))
	if err != nil {
		return err
	}
	defer said.Close()
	cmd := exec.Command("qemu-system-x86_64", args...)
	cmd.Stdout, cmd.Stderr = said, said
	if m.qemu, err = start(cmd); err != nil {
		return err
	}
	m.qmp, err = dialQMP(m.file("qmp"), m.qemu.done)
	return err
}

func (m *Machine) file(name string) string { return filepath.Join(m.dir, name) }

// blockdev is QEMU's description of a disk. Without a cache that loses anything, what the machine flushes need not be: the
// host's page cache outlives it.
func (m *Machine) blockdev(d Disk) (map[string]any, error) {
	path, err := filepath.Abs(d.Path)
	if err != nil {
		return nil, err
	}
	if !m.conf.Volatile {
		return map[string]any{"driver": "raw", "node-name": d.Name, "cache": map[string]any{"no-flush": true},
			"file": map[string]any{"driver": "file", "filename": path, "cache": map[string]any{"no-flush": true}}}, nil
	}
	socket := m.file(d.Name + ".nbd")
	said, err := os.Create(m.file(d.Name + ".nbdkit"))
	if err != nil {
		return nil, err
	}
	defer said.Close()
	cmd := exec.Command("nbdkit", "--foreground", "--unix", socket, "--filter=cache", "file", path, "cache=writeback")
	cmd.Stdout, cmd.Stderr = said, said
	cmd.Env = append(os.Environ(), "TMPDIR="+m.dir)
	server, err := start(cmd)
	if err != nil {
		return nil, err
	}
	m.nbd = append(m.nbd, server)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		if !server.running() || time.Now().After(deadline) {
			text, _ := os.ReadFile(said.Name())
			return nil, fmt.Errorf("start nbdkit for %s: %s", d.Name, text)
		}
	}
	return map[string]any{"driver": "raw", "node-name": d.Name,
		"file": map[string]any{"driver": "nbd", "server": map[string]any{"type": "unix", "path": socket}}}, nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// Address is where one of the machine's ports can be reached.
func (m *Machine) Address(port int) string {
	return fmt.Sprintf("127.0.0.1:%d", m.ports[port])
}

// Plug plugs in a disk while the machine runs.
func (m *Machine) Plug(d Disk) error {
	if len(m.slots) == 0 {
		return errors.New("plug in disk: no slot is left")
	}
	dev, err := m.blockdev(d)
	if err != nil {
		return err
	}
	if _, err := m.qmp.do("blockdev-add", dev); err != nil {
		return err
	}
	_, err = m.qmp.do("device_add", map[string]any{"driver": "virtio-blk-pci", "id": d.Name + "-disk", "drive": d.Name, "serial": d.Name, "bus": m.slots[0]})
	m.slots = m.slots[1:]
	return err
}

// A Traffic is what a machine did with a disk, in bytes.
type Traffic struct{ Read, Written int64 }

// Traffic asks what the machine did so far with its disks, by name.
func (m *Machine) Traffic() (map[string]Traffic, error) {
	out, err := m.qmp.do("query-blockstats", nil)
	if err != nil {
		return nil, err
	}
	var disks []struct {
		Node  string `json:"node-name"`
		Stats struct {
			Read    int64 `json:"rd_bytes"`
			Written int64 `json:"wr_bytes"`
		} `json:"stats"`
	}
	if err := json.Unmarshal(out, &disks); err != nil {
		return nil, fmt.Errorf("QEMU: parse statistics: %w", err)
	}
	all := map[string]Traffic{}
	for _, d := range disks {
		all[d.Node] = Traffic{d.Stats.Read, d.Stats.Written}
	}
	return all, nil
}

// Running reports whether the machine has not ended, by itself or otherwise.
func (m *Machine) Running() bool { return m.qemu != nil && m.qemu.running() }

// PowerOff presses the power button, and waits until the machine has shut down.
func (m *Machine) PowerOff(most time.Duration) error {
	if _, err := m.qmp.do("system_powerdown", nil); err != nil && m.Running() {
		return err
	}
	select {
	case <-m.qemu.done:
	case <-time.After(most):
		m.Kill()
		return fmt.Errorf("shut down: still on after %v", most)
	}
	for _, n := range m.nbd { // they write what they hold
		if err := n.os.Signal(os.Interrupt); err != nil {
			return fmt.Errorf("stop nbdkit: %w", err)
		}
		<-n.done
	}
	m.Journal()
	if m.qemu.err != nil {
		return fmt.Errorf("shut down: QEMU: %w", m.qemu.err)
	}
	return nil
}

// Cut cuts the power: with [Config].Volatile, what the machine did not flush is lost.
func (m *Machine) Cut() {
	for _, n := range m.nbd { // first, so that nothing more is flushed
		n.kill()
	}
	if m.qemu != nil {
		m.qemu.kill()
	}
	m.Journal()
}

// Kill ends the machine, if it still runs, and removes what it said.
func (m *Machine) Kill() {
	m.Cut()
	if m.qmp != nil {
		m.qmp.conn.Close()
	}
	os.RemoveAll(m.dir)
}

// Console is all that the machine's console showed.
func (m *Machine) Console() string {
	b, _ := os.ReadFile(m.file("console"))
	return string(b)
}

// Journal is what the machine's journal has so far, of this boot. It comes through a port that the guest's program serves
// (internal/vm/guest); what is said at the very end of a machine does not.
func (m *Machine) Journal() []Entry {
	f, err := os.Open(m.file("journal"))
	if err != nil {
		return m.journal
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() <= m.read {
		return m.journal
	}
	b := make([]byte, info.Size()-m.read)
	n, _ := f.ReadAt(b, m.read)
	text := string(b[:n])
	text = text[:strings.LastIndexByte(text, '\n')+1]
	m.read += int64(len(text))
	m.journal = append(m.journal, parseJournal(text)...)
	return m.journal
}

// Wait waits until what it asks for is so, the machine has ended, or the time is over.
func (m *Machine) Wait(most time.Duration, what string, so func() bool) error {
	for deadline := time.Now().Add(most); ; time.Sleep(50 * time.Millisecond) {
		if so() {
			return nil
		}
		if !m.Running() {
			return fmt.Errorf("wait for %s: the machine ended (%v)", what, m.qemu.err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for %s: not in %v", what, most)
		}
	}
}

// CPU is how long the machine's processors ran, which tells more than the clock where others work too. It is known
// when the machine is off.
func (m *Machine) CPU() time.Duration { return m.qemu.cpu }
