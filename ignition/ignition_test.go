package ignition

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v31 "github.com/coreos/ignition/v2/config/v3_1"
	v32 "github.com/coreos/ignition/v2/config/v3_2"

	"github.com/precache/precache-agent/units"
)

var hash = strings.Repeat("0123456789abcdef", 4)

// variants are options that exercise everything an override can have, with the largest values.
func variants() []Options {
	var all []Options
	for _, stage := range []string{units.Discovery, units.Install} {
		for _, spec := range []string{"", Spec31, Spec32} {
			for _, url := range []string{"", "https://example.com/releases/precache-agent?arch=amd64&version=1"} {
				o := Options{Stage: stage, Spec: spec, SHA256: hash, URL: url}
				long := o
				long.Label, long.Wait, long.Timeout, long.ReadyAfter = strings.Repeat("x", 36), maxWait, 100*time.Hour, "all"
				if stage == units.Install {
					long.ReadyAfter = "essential"
				}
				all = append(all, o, long)
			}
		}
	}
	return all
}

func override(t *testing.T, o Options) []byte {
	t.Helper()
	b, err := Override(o)
	if err != nil {
		t.Fatalf("%+v: %v", o, err)
	}
	return b
}

func decode(t *testing.T, b []byte) config {
	t.Helper()
	var c config
	if err := json.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// accepted fails the test unless Ignition itself takes the configuration, without a warning.
func accepted(t *testing.T, b []byte) {
	t.Helper()
	switch version := decode(t, b).Ignition.Version; version {
	case Spec31:
		_, report, err := v31.Parse(b)
		if err != nil || len(report.Entries) > 0 {
			t.Errorf("Ignition 3.1.0: %v\n%s", err, report.String())
		}
	case Spec32:
		_, report, err := v32.Parse(b)
		if err != nil || len(report.Entries) > 0 {
			t.Errorf("Ignition 3.2.0: %v\n%s", err, report.String())
		}
	default:
		t.Errorf("version is %q", version)
	}
}

func TestOverride(t *testing.T) {
	for _, o := range variants() {
		t.Run(fmt.Sprintf("%s %s %s %s", o.Stage, o.Spec, o.Label, o.URL), func(t *testing.T) {
			b := override(t, o)
			accepted(t, b)
			want := o.Spec
			if want == "" {
				want = Spec31
			}
			c := decode(t, b)
			if c.Ignition.Version != want {
				t.Errorf("version is %s", c.Ignition.Version)
			}
			if len(b) > MaxSize {
				t.Errorf("has %d bytes", len(b))
			}
			if bytes.ContainsAny(b, "'\n") {
				t.Error("has a single quote or more than one line")
			}
			if again := override(t, o); !bytes.Equal(b, again) {
				t.Error("is another one the second time")
			}
			paths := map[string]bool{}
			for _, f := range c.Storage.Files {
				paths[f.Path] = true
				if f.Mode != 493 || !f.Overwrite {
					t.Errorf("%s: mode %d, overwrite %v", f.Path, f.Mode, f.Overwrite)
				}
			}
			if fix, binary, boot := paths[agentFixPath], paths[localPath], paths[bootstrapPath]; fix != (o.Stage == units.Discovery) || binary != (o.URL != "") || boot == binary {
				t.Errorf("files are %v", paths)
			}
		})
	}
}

// The units are those of the package, to the byte.
func TestUnitsUnchanged(t *testing.T) {
	for _, o := range variants() {
		files, err := units.Files(o.Stage)
		if err != nil {
			t.Fatal(err)
		}
		c := decode(t, override(t, o))
		for _, f := range files {
			i := slices.IndexFunc(c.Systemd.Units, func(u unit) bool { return u.Name == f.Name })
			if i < 0 {
				t.Fatalf("no %s", f.Name)
			}
			u := c.Systemd.Units[i]
			if u.Contents != f.Contents || f.Enabled != (u.Enabled != nil && *u.Enabled) {
				t.Errorf("%s: is not as embedded", f.Name)
			}
		}
	}
}

func TestScriptsUnchanged(t *testing.T) {
	for _, o := range variants() {
		for _, f := range decode(t, override(t, o)).Storage.Files {
			var want string
			switch f.Path {
			case bootstrapPath:
				want = bootstrapScript
			case agentFixPath:
				want = strings.ReplaceAll(agentFixScript, "@BINARY@", bootPath)
				if o.URL != "" {
					want = strings.ReplaceAll(agentFixScript, "@BINARY@", localPath)
				}
			case localPath:
				if f.Contents.Source != o.URL || f.Contents.Verification.Hash != "sha256-"+hash {
					t.Errorf("%s: %+v", f.Path, f.Contents)
				}
				continue
			}
			escaped, ok := strings.CutPrefix(f.Contents.Source, "data:,")
			got, err := url.PathUnescape(escaped)
			if !ok || err != nil || got != want {
				t.Errorf("%s: is not the script: %v", f.Path, err)
			}
			if strings.Contains(got, "@") || strings.Contains(got, "'") {
				t.Errorf("%s: has a placeholder or a single quote", f.Path)
			}
		}
	}
}

// What is delivered is, all together, what systemd takes without a word.
func TestVerify(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("needs systemd-analyze, of Debian's package systemd")
	}
	for _, o := range variants() {
		root := t.TempDir()
		dir := filepath.Join(root, "etc/systemd/system")
		c := decode(t, override(t, o))
		var names []string
		for _, u := range c.Systemd.Units {
			write(t, filepath.Join(dir, u.Name), u.Contents, 0o644)
			names = append(names, u.Name)
			for _, raw := range u.Dropins {
				var d dropin
				if err := json.Unmarshal(raw, &d); err != nil {
					t.Fatal(err)
				}
				write(t, filepath.Join(dir, u.Name+".d", d.Name), d.Contents, 0o644)
			}
		}
		for _, path := range []string{bootPath, localPath, units.Path, bootstrapPath} {
			write(t, filepath.Join(root, path), "#!/bin/sh\n", 0o755)
		}
		for _, name := range []string{"basic.target", "sysinit.target", "sockets.target", "multi-user.target", "shutdown.target"} {
			write(t, filepath.Join(dir, name), "[Unit]\nDescription=stand-in\nDefaultDependencies=no\n", 0o644)
		}
		out, err := exec.Command("systemd-analyze", append([]string{"verify", "--root=" + root, "--man=no"}, names...)...).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%+v: systemd-analyze verify: %v\n%s", o, err, out)
		}
	}
}

func write(t *testing.T, path, contents string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(contents), mode); err != nil {
		t.Fatal(err)
	}
}

func TestCommandLine(t *testing.T) {
	for _, tt := range []struct {
		o    Options
		want []string // lines of the drop-ins
		not  string
	}{
		{Options{Stage: units.Install, SHA256: hash},
			[]string{"ExecStart=", "ExecStart=/run/precache-agent/bin/precache-agent run --stage install",
				"ExecStart=/run/precache-agent/bin/precache-agent metrics", "After=precache-agent-bootstrap.service",
				"ConditionFileIsExecutable=/run/precache-agent/bin/precache-agent",
				"ExecStart=/usr/local/bin/precache-agent-bootstrap data " + hash + " 30", "TimeoutStartSec=90"}, "TimeoutStartSec=60\n"},
		{Options{Stage: units.Discovery, SHA256: strings.ToUpper(hash), Label: "stage.1", Wait: 31 * time.Second, Timeout: 20 * time.Minute},
			[]string{"ExecStart=/run/precache-agent/bin/precache-agent run --stage discovery --label stage.1 --wait 31s --timeout 20m0s",
				"ExecStart=/usr/local/bin/precache-agent-bootstrap stage.1 " + hash + " 31", "TimeoutStartSec=91", "TimeoutStartSec=61"}, "ready-after"},
		{Options{Stage: units.Install, SHA256: hash, ReadyAfter: "essential", URL: "https://example.com/a"},
			[]string{"ExecStart=/usr/local/bin/precache-agent run --stage install --ready-after essential",
				"ExecStart=/usr/local/bin/precache-agent metrics"}, "bootstrap"},
	} {
		var lines []string
		for _, u := range decode(t, override(t, tt.o)).Systemd.Units {
			texts := []string{}
			if u.Name == bootstrapName {
				texts = append(texts, u.Contents)
			}
			for _, raw := range u.Dropins {
				var d dropin
				if err := json.Unmarshal(raw, &d); err != nil {
					t.Fatal(err)
				}
				texts = append(texts, d.Contents)
			}
			for _, text := range texts {
				lines = append(lines, strings.Split(text, "\n")...)
			}
		}
		for _, want := range tt.want {
			if !slices.Contains(lines, want) {
				t.Errorf("%+v: no line %s in\n%s", tt.o, want, strings.Join(lines, "\n"))
			}
		}
		if strings.Contains(strings.Join(lines, "\n")+"\n", tt.not) {
			t.Errorf("%+v: has %s", tt.o, tt.not)
		}
	}
}

func TestOptions(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Options)
		want   string // empty: is taken
	}{
		{"as is", func(o *Options) {}, ""},
		{"no stage", func(o *Options) { o.Stage = "" }, `stage "" is neither discovery nor install`},
		{"auto", func(o *Options) { o.Stage = "auto" }, `stage "auto" is neither discovery nor install`},
		{"label of 36", func(o *Options) { o.Label = strings.Repeat("a", 36) }, ""},
		{"label of 37", func(o *Options) { o.Label = strings.Repeat("a", 37) }, "longer than"},
		{"label with a blank", func(o *Options) { o.Label = "a b" }, "other characters"},
		{"label with a quote", func(o *Options) { o.Label = "a'b" }, "other characters"},
		{"label with a line", func(o *Options) { o.Label = "a\nExecStart=b" }, "other characters"},
		{"label with a percent sign", func(o *Options) { o.Label = "a%i" }, "other characters"},
		{"label with a glob", func(o *Options) { o.Label = "a*" }, "other characters"},
		{"label with a slash", func(o *Options) { o.Label = "a/b" }, "other characters"},
		{"label like a flag", func(o *Options) { o.Label = "-a" }, "begins with a dash or a dot"},
		{"label upwards", func(o *Options) { o.Label = ".." }, "begins with a dash or a dot"},
		{"no hash", func(o *Options) { o.SHA256 = "" }, "64 hexadecimal digits"},
		{"short hash", func(o *Options) { o.SHA256 = hash[:62] }, "64 hexadecimal digits"},
		{"odd hash", func(o *Options) { o.SHA256 = hash[:63] }, "64 hexadecimal digits"},
		{"long hash", func(o *Options) { o.SHA256 = hash + "00" }, "64 hexadecimal digits"},
		{"no hex", func(o *Options) { o.SHA256 = hash[:63] + "g" }, "64 hexadecimal digits"},
		{"https", func(o *Options) { o.URL = "https://example.com/precache-agent" }, ""},
		{"https with a quote", func(o *Options) { o.URL = "https://example.com/it's" }, ""},
		{"http", func(o *Options) { o.URL = "http://example.com/precache-agent" }, "not an https URL"},
		{"path", func(o *Options) { o.URL = "/precache-agent" }, "not an https URL"},
		{"https without a host", func(o *Options) { o.URL = "https:///precache-agent" }, "not an https URL"},
		{"spec 3.0.0", func(o *Options) { o.Spec = "3.0.0" }, "neither 3.1.0 nor 3.2.0"},
		{"spec 3.3.0", func(o *Options) { o.Spec = "3.3.0" }, "neither 3.1.0 nor 3.2.0"},
		{"wait 1s", func(o *Options) { o.Wait = time.Second }, ""},
		{"wait 10m", func(o *Options) { o.Wait = 10 * time.Minute }, ""},
		{"wait 1.5s", func(o *Options) { o.Wait = 1500 * time.Millisecond }, "whole seconds"},
		{"wait 10m1s", func(o *Options) { o.Wait = 10*time.Minute + time.Second }, "whole seconds"},
		{"negative wait", func(o *Options) { o.Wait = -time.Second }, "whole seconds"},
		{"negative timeout", func(o *Options) { o.Timeout = -1 }, "negative"},
		{"ready after some", func(o *Options) { o.ReadyAfter = "some" }, "neither all nor essential"},
		{"essential at discovery", func(o *Options) { o.Stage, o.ReadyAfter = units.Discovery, "essential" }, "install stage"},
		{"all at discovery", func(o *Options) { o.Stage, o.ReadyAfter = units.Discovery, "all" }, ""},
	} {
		o := Options{Stage: units.Install, SHA256: hash}
		tt.change(&o)
		b, err := Override(o)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.want == "":
			accepted(t, b)
			if bytes.ContainsRune(b, '\'') {
				t.Errorf("%s: has a single quote", tt.name)
			}
		case err == nil || !strings.Contains(err.Error(), tt.want):
			t.Errorf("%s: error is %v, want %s", tt.name, err, tt.want)
		}
	}
}

// The script that replaces agent-fix-bz1964591 succeeds whatever the agent does.
func TestAgentFix(t *testing.T) {
	for _, tt := range []struct{ name, agent, want string }{
		{"no binary", "", ""},
		{"there", "#!/bin/sh\necho \"$@\"\n", "exists -- quay.io/a/b@sha256:0\n"},
		{"fails", "#!/bin/sh\necho no\nexit 3\n", "no\n"},
		{"does not run", "#!/nowhere\n", ""},
	} {
		dir := t.TempDir()
		agent := filepath.Join(dir, "precache-agent")
		if tt.agent != "" {
			write(t, agent, tt.agent, 0o755)
		}
		script := filepath.Join(dir, "fix")
		write(t, script, strings.ReplaceAll(agentFixScript, "@BINARY@", agent), 0o755)
		for _, args := range [][]string{{"quay.io/a/b@sha256:0"}, {}} {
			cmd := exec.Command(script, args...)
			out, err := cmd.Output()
			if err != nil || len(args) > 0 && string(out) != tt.want {
				t.Errorf("%s: %q, %v", tt.name, out, err)
			}
		}
	}
}
