package units

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/unit"
)

var stages = []string{Discovery, Install}

// settings returns the values of every setting of a unit, by "Section.Name", one after the other, as systemd would read them.
func settings(t *testing.T, contents string) map[string][]string {
	t.Helper()
	opts, err := unit.DeserializeOptions(strings.NewReader(contents))
	if err != nil {
		t.Fatal(err)
	}
	m := map[string][]string{}
	for _, o := range opts {
		key := o.Section + "." + o.Name
		m[key] = append(m[key], o.Value)
	}
	return m
}

func service(t *testing.T, stage string) string {
	t.Helper()
	files, err := Files(stage)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Name == Service {
			return f.Contents
		}
	}
	t.Fatalf("no %s", Service)
	return ""
}

// The names are those of OpenShift 4.10 to 4.22.
func TestOrder(t *testing.T) {
	want := map[string]map[string]string{
		Discovery: {
			"Unit.Before": "agent.service ironic-agent.service okd-overlay.service release-image.service node-image-pull.service " +
				"bootkube.service start-local-registry.service crio.service kubelet.service",
		},
		Install: {
			"Unit.Wants":             "crio-wipe.service",
			"Unit.After":             "crio-wipe.service",
			"Unit.RequiresMountsFor": "/var/lib/containers",
			"Unit.Before": "machine-config-daemon-pull.service machine-config-daemon-firstboot.service firstboot-osupdate.target " +
				"nodeip-configuration.service nodeip-configuration-vsphere-upi.service on-prem-resolv-prepender.service " +
				"ovs-configuration.service kubelet-dependencies.target crio.service kubelet.service iri-registry.service",
		},
	}
	free := []string{"Unit.Description", "Unit.Documentation"}
	for _, stage := range stages {
		all := settings(t, service(t, stage))
		got := map[string]string{}
		for key, values := range all {
			if strings.HasPrefix(key, "Unit.") && !slices.Contains(free, key) {
				got[key] = strings.Join(values, " ")
			}
		}
		if !maps.Equal(got, want[stage]) {
			t.Errorf("%s: [Unit] has\n%q, want\n%q", stage, got, want[stage])
		}
		// Consumers must not depend on it, by whatever it installs.
		install := map[string]string{}
		for key, values := range all {
			if strings.HasPrefix(key, "Install.") {
				install[key] = strings.Join(values, " ")
			}
		}
		if !maps.Equal(install, map[string]string{"Install.WantedBy": "multi-user.target"}) {
			t.Errorf("%s: [Install] has %q", stage, install)
		}
	}
}

// Each ordering has its reason.
func TestReasons(t *testing.T) {
	for _, stage := range stages {
		lines := strings.Split(service(t, stage), "\n")
		for i, line := range lines {
			ordering := regexp.MustCompile(`^(Before|After|RequiresMountsFor|WantedBy)=`).MatchString(line)
			before := i - 1
			if ordering && strings.HasPrefix(lines[before], "Wants=") {
				before--
			}
			if ordering && !strings.HasPrefix(lines[before], "#") {
				t.Errorf("%s, line %d: %s has no reason above it", stage, i+1, line)
			}
		}
	}
}

func TestService(t *testing.T) {
	for _, stage := range stages {
		all := settings(t, service(t, stage))
		for key, want := range map[string]string{
			"Type": "notify", "NotifyAccess": "main", "RemainAfterExit": "yes", "TimeoutStartSec": "60",
			"ExecStart":                "/usr/bin/precache-agent run --stage " + stage,
			"RuntimeDirectoryPreserve": "yes", "PrivateMounts": "yes", "NoNewPrivileges": "yes", "UMask": "0022",
		} {
			if got := strings.Join(all["Service."+key], " "); got != want {
				t.Errorf("%s: %s=%s, want %s", stage, key, got, want)
			}
		}
		if all["Service.Restart"] != nil {
			t.Errorf("%s: has Restart=", stage)
		}
	}
	// What follows [Unit] differs in the stage alone.
	_, discovery, _ := strings.Cut(service(t, Discovery), "[Service]")
	_, install, _ := strings.Cut(service(t, Install), "[Service]")
	if strings.ReplaceAll(discovery, "--stage discovery", "--stage install") != install {
		t.Error("the services differ in more than their stage")
	}
}

func TestFiles(t *testing.T) {
	for _, stage := range stages {
		files, err := Files(stage)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			path := f.Name
			if f.Name == Service {
				path = filepath.Join(stage, f.Name)
			}
			want, err := os.ReadFile(path)
			if err != nil || f.Contents != string(want) {
				t.Errorf("%s: is not %s (%v)", f.Name, path, err)
			}
			if _, install := settings(t, f.Contents)["Install.WantedBy"]; install != f.Enabled {
				t.Errorf("%s: Enabled is %v, has WantedBy= is %v", path, f.Enabled, install)
			}
			// Templates that an override passes through put single quotes around it.
			if strings.Contains(f.Contents, "'") {
				t.Errorf("%s: has a single quote", path)
			}
			if !strings.HasSuffix(f.Contents, "\n") {
				t.Errorf("%s: does not end with a newline", path)
			}
		}
	}
	for _, stage := range []string{"", "auto"} {
		if _, err := Files(stage); err == nil {
			t.Errorf("stage %q: no error", stage)
		}
	}
}

func needSystemd(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("needs systemd-analyze, of Debian's package systemd")
	}
}

// systemd takes the units without a word, on a system that has nothing but what they name.
func TestVerify(t *testing.T) {
	needSystemd(t)
	for _, stage := range stages {
		root := t.TempDir()
		files, err := Files(stage)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, f := range files {
			write(t, filepath.Join(root, "etc/systemd/system", f.Name), f.Contents, 0o644)
			names = append(names, f.Name)
		}
		write(t, filepath.Join(root, "usr/bin/precache-agent"), "#!/bin/sh\n", 0o755)
		for _, name := range []string{"basic.target", "sysinit.target", "sockets.target", "multi-user.target", "shutdown.target"} {
			write(t, filepath.Join(root, "etc/systemd/system", name), "[Unit]\nDescription=stand-in\nDefaultDependencies=no\n", 0o644)
		}
		out, err := exec.Command("systemd-analyze", append([]string{"verify", "--root=" + root, "--man=no"}, names...)...).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%s: systemd-analyze verify: %v\n%s", stage, err, out)
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

// open is what systemd-analyze security finds open in the services: what the comments of the units explain, and no more.
var open = map[string][]string{
	Service: {
		"CapabilityBoundingSet_CAP_CHOWN_FSETID_SETFCAP", "CapabilityBoundingSet_CAP_DAC_FOWNER_IPC_OWNER", "CapabilityBoundingSet_CAP_MKNOD",
		"CapabilityBoundingSet_CAP_SYS_ADMIN", "CapabilityBoundingSet_CAP_SYS_CHROOT", "DeviceAllow", "PrivateDevices", "PrivateUsers", "ProcSubset",
		"ProtectProc", "RestrictAddressFamilies_AF_UNIX", "RestrictNamespaces_mnt", "RestrictSUIDSGID", "RootDirectoryOrRootImage",
		"SystemCallFilter_mount", "SystemCallFilter_privileged", "UMask", "UserOrDynamicUser",
	},
	MetricsService: {"DeviceAllow", "IPAddressDeny", "PrivateMounts", "PrivateUsers", "RestrictAddressFamilies_AF_UNIX", "RootDirectoryOrRootImage"},
}

var overall = regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+) `)

func TestSecurity(t *testing.T) {
	needSystemd(t)
	version, _ := exec.Command("systemd-analyze", "--version").Output()
	is252 := bytes.HasPrefix(version, []byte("systemd 252 "))
	for path, limit := range map[string]string{
		"discovery/" + Service: "25",
		"install/" + Service:   "25",
		MetricsService:         "10",
	} {
		out, err := exec.Command("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold="+limit, path).CombinedOutput()
		score := overall.FindSubmatch(out)
		if err != nil || score == nil {
			t.Errorf("%s: systemd-analyze security, limit %s tenths: %v\n%s", path, limit, err, out)
			continue
		}
		t.Logf("%s: %s", path, score[1])
		if !is252 {
			continue // others look at other things, and call them otherwise
		}
		out, err = exec.Command("systemd-analyze", "security", "--no-pager", "--offline=true", "--json=short", path).Output()
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		var checks []struct {
			Field    string `json:"json_field"`
			Exposure string `json:"exposure"`
		}
		if err := json.Unmarshal(out, &checks); err != nil {
			t.Fatal(err)
		}
		var found []string
		for _, c := range checks {
			if c.Exposure != "" {
				found = append(found, c.Field)
			}
		}
		slices.Sort(found)
		if want := open[filepath.Base(path)]; !slices.Equal(found, want) {
			t.Errorf("%s: open is\n%q, want\n%q", path, found, want)
		}
	}
}
