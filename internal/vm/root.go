package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Edit mounts the file system of a machine that is off, calls f with where it is, and unmounts it. Only f's own goroutine,
// and the commands that it starts, see it there.
func Edit(image string, f func(dir string) error) error {
	return mounted(image, "loop", f)
}

// Look is Edit for one who only reads: nothing is written, not even the log replayed.
func Look(image string, f func(dir string) error) error {
	return mounted(image, "loop,ro,norecovery", f)
}

func mounted(image, options string, f func(dir string) error) error {
	dir, err := os.MkdirTemp("", "vm-mount-")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	err = private(func() (err error) {
		if err := run("mount", "-t", "xfs", "-o", options, image, dir); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, run("umount", dir)) }()
		return f(dir)
	})
	if err != nil {
		return fmt.Errorf("use %s: %w", filepath.Base(image), err)
	}
	return nil
}

// Install copies a program into a mounted root.
func Install(dir, program, to string) error {
	b, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, to), string(b), 0o755)
}

// Ignite applies a config to a mounted root with the real Ignition, as at a first boot: its stages fetch and files.
func Ignite(dir string, config []byte) (err error) {
	work, err := os.MkdirTemp("", "vm-ignition-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	// Ignition is built to label what it writes. A policy without a single label keeps it content.
	policy := filepath.Join(dir, "etc/selinux")
	defer func() { err = errors.Join(err, os.RemoveAll(policy)) }()
	for path, text := range map[string]string{
		filepath.Join(policy, "config"):                            "SELINUXTYPE=stub\n",
		filepath.Join(policy, "stub/contexts/files/file_contexts"): "",
		filepath.Join(work, "bin/setfiles"):                        "#!/bin/sh\ncat >/dev/null\n",
		filepath.Join(work, "config.ign"):                          string(config),
	} {
		if err := writeFile(path, text, 0o755); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(work, "system"), 0o755); err != nil {
		return err
	}
	for _, stage := range []string{"fetch", "files"} {
		cmd := exec.Command(ignition, "--platform=file", "--stage="+stage, "--root="+dir, "--log-to-stdout",
			"--config-cache="+filepath.Join(work, "cache.json"), "--state-file="+filepath.Join(work, "state"), "--neednet="+filepath.Join(work, "neednet"))
		cmd.Env = append(os.Environ(), "PATH="+filepath.Join(work, "bin")+":"+os.Getenv("PATH"),
			"IGNITION_CONFIG_FILE="+filepath.Join(work, "config.ign"), "IGNITION_SYSTEM_CONFIG_DIR="+filepath.Join(work, "system"))
		if _, err := finish(cmd); err != nil {
			return fmt.Errorf("ignition: %w", err)
		}
	}
	return nil
}

// An Entry is one of the journal's.
type Entry struct {
	Boot    string
	At      Monotonic
	Unit    string // that wrote it, or that systemd writes of
	Ident   string // of who wrote it
	Message string
	Fields  map[string]string // all of them
}

// Monotonic is a time of the machine's own, in microseconds since it was started.
type Monotonic int64

func (m Monotonic) String() string { return fmt.Sprintf("%.2f s", float64(m)/1e6) }

func (e Entry) String() string {
	return fmt.Sprintf("%9s %s %s: %s", e.At, e.Unit, e.Ident, e.Message)
}

// MessageID says what kind of message of systemd's own it is (sd-messages.h).
func (e Entry) MessageID() string { return e.Fields["MESSAGE_ID"] }

// What systemd says of a unit.
const (
	UnitStarting = "7d4958e842da4a758f6c1cdc7b36dcc5"
	UnitStarted  = "39f53479d3a045ac8e11786248231fbf"
	UnitFailed   = "be02cf6855d2428ba40df7e9d022f03d"
	BootFinished = "b07a249cd024414a82dd00cd181378ff"
)

func parseJournal(text string) (entries []Entry) {
	for line := range strings.Lines(text) {
		var raw map[string]any
		if json.Unmarshal([]byte(line), &raw) != nil {
			continue // cut off by the end of the machine
		}
		e := Entry{Fields: map[string]string{}}
		for k, v := range raw {
			switch v := v.(type) {
			case string:
				e.Fields[k] = v
			case []any: // bytes that are not all text, or a field that stands there twice
				var b []byte
				for _, x := range v {
					switch x := x.(type) {
					case float64:
						b = append(b, byte(x))
					case string:
						b = append(append(b, x...), '\n')
					}
				}
				e.Fields[k] = strings.TrimSuffix(string(b), "\n")
			}
		}
		e.Boot, e.Ident, e.Message = e.Fields["_BOOT_ID"], e.Fields["SYSLOG_IDENTIFIER"], e.Fields["MESSAGE"]
		if e.Unit = e.Fields["UNIT"]; e.Unit == "" {
			e.Unit = e.Fields["_SYSTEMD_UNIT"]
		}
		fmt.Sscan(e.Fields["__MONOTONIC_TIMESTAMP"], &e.At)
		entries = append(entries, e)
	}
	return entries
}
