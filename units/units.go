// Package units has the systemd units, exactly as they are installed: by packages, by Ignition, and by hand.
package units

import (
	"embed"
	"fmt"
)

//go:embed discovery/precache-agent.service install/precache-agent.service
//go:embed precache-agent-metrics.socket precache-agent-metrics.service
var files embed.FS

// The names under which units are installed.
const (
	Service        = "precache-agent.service" // of either stage
	MetricsSocket  = "precache-agent-metrics.socket"
	MetricsService = "precache-agent-metrics.service"
)

// The stages.
const (
	Discovery = "discovery"
	Install   = "install"
)

// Path is where the units expect the binary.
const Path = "/usr/bin/precache-agent"

// A File is one unit.
type File struct {
	Name     string // as installed
	Enabled  bool   // it is to be started at boot
	Contents string
}

// Files returns the units for a stage.
func Files(stage string) ([]File, error) {
	if stage != Discovery && stage != Install {
		return nil, fmt.Errorf("stage %q is neither %s nor %s", stage, Discovery, Install)
	}
	return []File{
		{Service, true, read(stage + "/" + Service)},
		{MetricsSocket, true, read(MetricsSocket)},
		{MetricsService, false, read(MetricsService)},
	}, nil
}

func read(name string) string {
	b, err := files.ReadFile(name)
	if err != nil {
		panic(err) // it is embedded
	}
	return string(b)
}
