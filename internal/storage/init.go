package storage

import "github.com/containers/storage/pkg/reexec"

// Init must come first in main: with some drivers the library runs the
// program again to extract a layer. It reports whether this is such a run, and
// has then ended it.
func Init() bool { return reexec.Init() }
