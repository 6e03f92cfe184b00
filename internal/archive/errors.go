package archive

import (
	"context"
	"errors"
	"fmt"
)

// A Reason is the one word that says why an image could not be loaded.
type Reason string

// The reasons. This package gives the first five; they stand together because
// they are one documented set (README, "Reasons").
const (
	MissingArchive Reason = "missing-archive" // no file or folder under any of the image's names
	CorruptArchive Reason = "corrupt-archive" // truncated, damaged, incomplete or not what its layout says
	DigestMismatch Reason = "digest-mismatch" // whole, but its content is not what its digest promises
	Unsupported    Reason = "unsupported"     // well-formed, but not something that can be loaded
	ReadFailed     Reason = "read-failed"     // the partition could not be read; may pass
	BadReference   Reason = "bad-reference"   // the list's line is no image reference
	NoSpace        Reason = "no-space"        // the store's file system is full
	Policy         Reason = "policy"          // policy.json refuses the image
	StoreFailed    Reason = "store"           // containers-storage failed; may pass
	Interrupted    Reason = "interrupted"     // by a signal or a deadline
)

// An Error is an error with its reason. The reason is not part of the text.
type Error struct {
	Reason Reason
	Err    error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

func fault(r Reason, format string, args ...any) error {
	return &Error{Reason: r, Err: fmt.Errorf(format, args...)}
}

// classify gives err the reason r unless it has one, or is an interruption.
func classify(r Reason, err error) error {
	var e *Error
	if err == nil || errors.As(err, &e) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return &Error{Reason: r, Err: err}
}

// ReasonOf returns the reason of err, or "" if it has none.
func ReasonOf(err error) Reason {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}
