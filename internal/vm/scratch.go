package vm

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// Scratch makes a folder for all that a test process writes, which becomes its folder for temporary files. It is removed by
// remove, or, if the process ends otherwise, be it killed, by a process that waits for its end.
func Scratch() (dir string, remove func() error, err error) {
	if dir, err = os.MkdirTemp("", "vm-"); err != nil {
		return "", nil, err
	}
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return "", nil, err
	}
	cmd := exec.Command("sh", "-c", `cat; exec rm -rf --one-file-system "$0"`, dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // an interrupt on the terminal is not for it
	alive, err := cmd.StdinPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", nil, fmt.Errorf("start janitor: %w", err)
	}
	return dir, func() error {
		alive.Close()
		return cmd.Wait()
	}, nil
}
