package loader

import (
	"errors"
	"syscall"
	"time"

	"context"

	"github.com/precache/precache-agent/internal/archive"
)

// A State is what happened to an image, or the end of the run.
type State string

// The states, as `--progress json` calls them.
const (
	Started  State = "started"  // its archive is being read
	Loaded   State = "loaded"   // it is in the store, under all its names, and survives a power cut
	Present  State = "present"  // it was in the store already
	Retrying State = "retrying" // it failed, and is tried again
	Failed   State = "failed"   // it is not in the store
	Summed   State = "summary"  // the run has ended
)

// An Event is the one account of what happened, of which log lines, metrics
// and progress are views.
type Event struct {
	State   State
	Ref     string         // as the set names the image
	Bytes   int64          // read from its archive so far
	Took    time.Duration  // since the image was started, or the run
	Err     error          // of Retrying and Failed
	Reason  archive.Reason // of Retrying and Failed
	Summary *Summary       // of Summed
}

// A Summary is what a run came to.
type Summary struct {
	Images        int // in the set; the sum of the next three
	Loaded        int
	Present       int
	Failed        int
	LayersWritten int   // extracted in this run
	LayersShared  int   // layers of loaded images that did not have to be
	BytesRead     int64 // from the partition
	BytesWritten  int64 // of plain layers
	Took          time.Duration
}

// reasonOf returns the one word for err.
func reasonOf(err error) archive.Reason {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return archive.Interrupted
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return archive.NoSpace
	}
	if r := archive.ReasonOf(err); r != "" {
		return r
	}
	return archive.StoreFailed
}

// mayPass reports whether it is worth trying again.
func mayPass(r archive.Reason) bool { return r == archive.ReadFailed || r == archive.StoreFailed }
