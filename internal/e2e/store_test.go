package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/precache/precache-agent/internal/vm"
	"github.com/precache/precache-agent/internal/vm/report"
)

// listings list the store before the agent runs and after, before any consumer does: podman writes to it at every command.
func listings() []unit {
	const text = "[Unit]\n%s\n\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=%s list %s\n\n[Install]\nWantedBy=multi-user.target\n"
	return []unit{
		enabled("list-before.service", fmt.Sprintf(text, "After=crio-wipe.service\nBefore="+agentUnit, vm.Guest, report.Before)),
		enabled("list-after.service", fmt.Sprintf(text, "After="+agentUnit+"\nBefore=crio.service "+machineConfig, vm.Guest, report.After)),
	}
}

// untouched fails the test if the agent wrote to the store of a node that is off.
func (n *node) untouched() {
	n.t.Helper()
	n.look(func(dir string) {
		read := func(name string) string {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				n.t.Fatal(err)
			}
			return string(b)
		}
		// The library probes the file system in its folder whenever it is opened.
		probed := func(text string) string {
			return strings.Join(slices.DeleteFunc(strings.SplitAfter(text, "\n"), func(line string) bool { return strings.HasPrefix(line, "overlay: ") }), "")
		}
		before, after := probed(read(report.Before)), probed(read(report.After))
		if strings.Count(before, "\n") < 100 {
			n.t.Errorf("before the agent ran, the store had\n%s", before)
		}
		if before != after {
			n.t.Errorf("the agent wrote to the store:\n%s", difference(before, after))
		}
	})
}

// difference are the lines that only one of two texts has.
func difference(before, after string) string {
	var b strings.Builder
	only := func(sign, some, other string) {
		known := map[string]bool{}
		for l := range strings.Lines(other) {
			known[l] = true
		}
		for l := range strings.Lines(some) {
			if !known[l] && b.Len() < 8000 {
				b.WriteString(sign + l)
			}
		}
	}
	only("- ", before, after)
	only("+ ", after, before)
	return b.String()
}
