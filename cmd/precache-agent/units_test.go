package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/precache/precache-agent/ignition"
	"github.com/precache/precache-agent/units"
)

// Every command line that a unit starts the agent with is one that the agent takes.
func TestUnitCommandLines(t *testing.T) {
	n := 0
	check := func(where, contents string) {
		for line := range strings.Lines(contents) {
			command, ok := strings.CutPrefix(strings.TrimSpace(line), "ExecStart=")
			path, rest, _ := strings.Cut(command, " ")
			if !ok || !strings.HasSuffix(path, "/precache-agent") {
				continue
			}
			n++
			cmd, args, err := rootCommand().Find(strings.Fields(rest))
			if err != nil || cmd.Name() == "precache-agent" {
				t.Errorf("%s: %s: %v", where, command, err)
				continue
			}
			if err := cmd.ParseFlags(args); err != nil {
				t.Errorf("%s: %s: %v", where, command, err)
				continue
			}
			if err := cmd.ValidateArgs(cmd.Flags().Args()); err != nil {
				t.Errorf("%s: %s: %v", where, command, err)
			}
		}
	}
	for _, stage := range []string{units.Discovery, units.Install} {
		files, err := units.Files(stage)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			check(f.Name, f.Contents)
		}
		o := ignition.Options{
			Stage: stage, Label: "stage1", SHA256: strings.Repeat("0", 64), Wait: 90 * time.Second, Timeout: 2 * time.Hour, ReadyAfter: "all",
		}
		if stage == units.Install {
			o.ReadyAfter = "essential"
		}
		override, err := ignition.Override(o)
		if err != nil {
			t.Fatal(err)
		}
		var config struct {
			Systemd struct {
				Units []struct {
					Name, Contents string
					Dropins        []struct{ Name, Contents string }
				}
			}
		}
		if err := json.Unmarshal(override, &config); err != nil {
			t.Fatal(err)
		}
		for _, u := range config.Systemd.Units {
			check(u.Name, u.Contents)
			for _, d := range u.Dropins {
				check(u.Name+"/"+d.Name, d.Contents)
			}
		}
	}
	// run and metrics; as installed, in the override, and in its drop-in; of both stages
	if n != 2*3*2 {
		t.Errorf("checked %d command lines, want 12", n)
	}
}

// The defaults that an override leaves out are those of run.
func TestOverrideDefaults(t *testing.T) {
	run, _, err := rootCommand().Find([]string{"run"})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"label": ignition.DefaultLabel, "wait": ignition.DefaultWait.String()} {
		if f := run.Flags().Lookup(name); f == nil || f.DefValue != want {
			t.Errorf("run --%s: default is not %s", name, want)
		}
	}
}
