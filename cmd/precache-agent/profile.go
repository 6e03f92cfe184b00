//go:build profile

package main

import (
	"os"
	"runtime/pprof"
)

// With the build tag profile, PRECACHE_CPUPROFILE names a file for a CPU profile of the run.
func init() {
	path := os.Getenv("PRECACHE_CPUPROFILE")
	if path == "" {
		return
	}
	f, err := os.Create(path)
	if err != nil {
		panic(err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		panic(err)
	}
	atExit = func() { pprof.StopCPUProfile(); f.Close() }
}
