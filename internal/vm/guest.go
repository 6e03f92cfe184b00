package vm

import (
	"errors"
	"os"
	"path/filepath"
)

// Guest is where the guest's program (internal/vm/guest) is on every machine.
const Guest = "/usr/lib/standin/guest"

// guestUnits serve the test. They are part of the base system, so no preset has a say.
var guestUnits = map[string]string{
	"standin-journal.service": `[Unit]
Description=Journal to the outside
DefaultDependencies=no
After=systemd-journald.socket

[Service]
ExecStart=` + Guest + ` journal
Restart=on-failure
`,
	"standin-forward.service": `[Unit]
Description=Ports from the outside to the loopback interface
DefaultDependencies=no

[Service]
ExecStart=` + Guest + ` forward
`,
}

func installGuest(dir string) error {
	program, err := os.CreateTemp("", "vm-guest-")
	if err != nil {
		return err
	}
	defer os.Remove(program.Name())
	if err := errors.Join(program.Close(), Build("github.com/precache/precache-agent/internal/vm/guest", program.Name())); err != nil {
		return err
	}
	if err := Install(dir, program.Name(), Guest); err != nil {
		return err
	}
	for name, text := range guestUnits {
		system := filepath.Join(dir, "usr/lib/systemd/system")
		if err := errors.Join(
			writeFile(filepath.Join(system, name), text, 0o644),
			writeFile(filepath.Join(system, "sysinit.target.wants", name), "-> ../"+name, 0)); err != nil {
			return err
		}
	}
	return nil
}
