package mount

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const maxUsers = 5 // that a message names

// users says who may hold the block device dev, as far as this process may see that: rdev is its number, fsDev that of
// the file system on it (a loop device's perhaps).
func users(dev string, rdev, fsDev uint64) string {
	var found []string
	add := func(format string, args ...any) {
		if s := fmt.Sprintf(format, args...); !slices.Contains(found, s) {
			found = append(found, s)
		}
	}
	for _, fd := range list("/proc/self/fd") {
		var st unix.Stat_t
		if unix.Stat("/proc/self/fd/"+fd, &st) != nil {
			continue
		}
		if st.Dev == fsDev || st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == rdev {
			name, _ := os.Readlink("/proc/self/fd/" + fd)
			add("this process has %s open", name)
		}
	}
	for _, holder := range list("/sys/dev/block/" + number(rdev) + "/holders") {
		add("it is a part of %s", holder)
	}
	for _, pid := range list("/proc") {
		if _, err := strconv.Atoi(pid); err != nil {
			continue
		}
		proc := filepath.Join("/proc", pid)
		comm, _ := os.ReadFile(proc + "/comm")
		who := fmt.Sprintf("process %s (%s)", pid, strings.TrimSpace(string(comm)))
		mounts, _ := mountsOf(proc+"/mountinfo", rdev)
		for _, m := range mounts {
			if at := "it is mounted at " + m.point; !slices.ContainsFunc(found, func(s string) bool { return strings.HasPrefix(s, at+",") }) {
				add("%s, as %s sees it", at, who)
			}
		}
		if pid == strconv.Itoa(os.Getpid()) {
			continue
		}
		for _, fd := range list(proc + "/fd") {
			if name, _ := os.Readlink(proc + "/fd/" + fd); name == dev {
				add("%s has it open", who)
			}
		}
	}
	switch {
	case len(found) == 0:
		return "nothing that can be seen from here uses it"
	case len(found) > maxUsers:
		found = append(found[:maxUsers], "and more")
	}
	return strings.Join(found, "; ")
}

// list returns the names in a folder, or nothing.
func list(dir string) []string {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1)
	slices.Sort(names)
	return names
}
