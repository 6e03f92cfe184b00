// Package report is what the guest's program and the tests on the host tell each other.
package report

// Where things are on the machine.
const (
	Results  = "/var/lib/standin/results.jsonl"
	WipeFile = "/var/lib/standin/wipe" // crio-wipe's stand-in empties the store if it is there
	Store    = "/var/lib/containers/storage"
	Before   = "/var/lib/standin/before" // what was in the store before the agent ran, a line each, and after
	After    = "/var/lib/standin/after"
)

// Prefix is what a report's line begins with in the journal.
const Prefix = "report: "

// A Report is what a service that consumes images found when it started.
type Report struct {
	Name      string
	Boot      string // the boot's ID
	At        int64  // in microseconds since the machine was started
	Images    map[string]bool
	Exclusive map[string]string // "partition" and "disk": why it could not have it for itself, or nothing
	Mounted   []string          // where the partition is mounted, in whosever namespace
	Files     map[string]File   // of the first image
	Faults    []string
}

// A File is one of a mounted image; its Mode is 0 if it is not there.
type File struct {
	Mode     uint32 // with the type
	UID, GID uint32
	Text     string
}

// Port, with a number behind it, is how the kernel's command line names a port to forward to the loopback interface.
const Port = "standin.port="
