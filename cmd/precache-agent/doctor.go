package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/precache/precache-agent/internal/storage"
	"github.com/precache/precache-agent/internal/systemd"
)

// consumers are the units that use images, by stage, as the service's Before= names them.
var consumers = map[string][]string{
	discovery: {
		"agent.service", "ironic-agent.service", "okd-overlay.service", "release-image.service", "node-image-pull.service",
		"bootkube.service", "start-local-registry.service", "crio.service", "kubelet.service",
	},
	install: {
		"machine-config-daemon-pull.service", "machine-config-daemon-firstboot.service", "firstboot-osupdate.target",
		"nodeip-configuration.service", "nodeip-configuration-vsphere-upi.service", "on-prem-resolv-prepender.service",
		"ovs-configuration.service", "kubelet-dependencies.target", "crio.service", "kubelet.service", "iri-registry.service",
	},
}

const agentUnit = "precache-agent.service"

func doctorCommand() *cobra.Command {
	var o storage.Options
	var label string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Show what one asks when a site is slow or broken",
		Long: `Show what one asks at 3 a.m.: how the last run ended, whether the units that use
images were really started after it, the partition, the store, versions. Exit code
3 if something is not as it should be.`,
		Example: "  precache-agent doctor",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d := &doctor{out: cmd.OutOrStdout()}
			d.versions()
			d.units(cmd)
			d.partition(label)
			d.store(o)
			if d.faults > 0 {
				return &exitError{code: exitIncomplete, hint: fmt.Sprintf("%s above, marked with !", plural(d.faults, "fault"))}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&label, "label", "data", "GPT label of the partition")
	storeFlags(cmd, &o)
	return cmd
}

type doctor struct {
	out    io.Writer
	faults int
}

func (d *doctor) say(what, format string, args ...any) {
	fmt.Fprintf(d.out, "  %-12s %s\n", what, fmt.Sprintf(format, args...))
}

func (d *doctor) fault(what, format string, args ...any) {
	d.faults++
	fmt.Fprintf(d.out, "! %-12s %s\n", what, fmt.Sprintf(format, args...))
}

func (d *doctor) versions() {
	d.say("version", "%s", version)
	d.say("stage", "%s", stageOf("/"))
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		d.say("kernel", "%s", strings.TrimSpace(string(b)))
	}
	d.say("SELinux", "%s", selinuxContext())
	for _, dir := range []string{"/run/precache-agent", "/var/lib/precache-agent"} {
		if fi, err := os.Stat(filepath.Join(dir, "metrics.prom")); err == nil {
			d.say("last run", "left %s at %s", filepath.Join(dir, "metrics.prom"), fi.ModTime().UTC().Format(time.RFC3339))
			return
		}
	}
	d.fault("last run", "has left nothing: the agent did not run on this node")
}

// selinuxContext is that of this process (selinux(8)).
func selinuxContext() string {
	b, err := os.ReadFile("/proc/self/attr/current")
	if context := strings.Trim(string(b), "\x00\n"); err == nil && context != "" {
		return context
	}
	return "off"
}

// units compares, on the clock that does not jump, when the agent was ready and when the others started.
func (d *doctor) units(cmd *cobra.Command) {
	units, err := systemd.Units(cmd.Context(), append([]string{agentUnit}, consumers[stageOf("/")]...)...)
	if err != nil {
		d.fault("systemd", "%v", err)
		return
	}
	agent := units[0]
	switch {
	case agent.Load != "loaded":
		d.fault("unit", "%s is %s", agentUnit, agent.Load)
		return
	case agent.Started == 0:
		d.fault("unit", "%s was not started in this boot", agentUnit)
	case agent.Active == "failed":
		d.fault("unit", "%s failed (%s), the boot went on without it", agentUnit, agent.Result)
	case agent.Ready == 0:
		d.say("unit", "%s is %s, since %s after the machine was started", agentUnit, agent.Active, agent.Started.Round(time.Millisecond))
	default:
		d.say("unit", "%s was ready %s after the machine was started, in %s", agentUnit, agent.Ready.Round(time.Millisecond), (agent.Ready - agent.Started).Round(time.Millisecond))
	}
	for _, u := range units[1:] {
		if u.Load != "loaded" {
			continue
		}
		switch ordered := slices.Contains(u.After, agentUnit); {
		case !ordered:
			d.fault("order", "%s is not ordered after %s", u.Name, agentUnit)
		case u.Started == 0:
			d.say("order", "%s is ordered after it, and was not started yet", u.Name)
		case agent.Ready != 0 && u.Started < agent.Ready:
			d.fault("order", "%s started %s before the agent was ready", u.Name, (agent.Ready - u.Started).Round(time.Millisecond))
		default:
			d.say("order", "%s started after it", u.Name)
		}
	}
}

func (d *doctor) partition(label string) {
	link := filepath.Join("/dev/disk/by-partlabel", label)
	device, err := filepath.EvalSymlinks(link)
	if err != nil {
		d.fault("partition", "there is no %s", link)
		return
	}
	d.say("partition", "%s is %s", label, device)
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); slices.Contains(fields, device) && len(fields) > 4 {
			d.say("partition", "is mounted on %s, not by the agent", fields[4])
		}
	}
}

func (d *doctor) store(o storage.Options) {
	if os.Geteuid() != 0 {
		d.say("store", "only root can look into it")
		return
	}
	info, err := storage.Look(o)
	if err != nil {
		d.fault("store", "%v", err)
		return
	}
	d.say("store", "%s (%s, SELinux %s): %s, %s, %s free", info.GraphRoot, info.Driver, info.Label, plural(info.Images, "image"), plural(info.Layers, "layer"), size(info.Free))
}
