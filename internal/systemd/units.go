package systemd

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
)

// Unit is what systemd knows of a unit in this boot (org.freedesktop.systemd1(5)).
// Times are since the machine was started: the clock may be wrong.
type Unit struct {
	Name    string
	Load    string // LoadState: loaded, not-found, masked
	Active  string // ActiveState: active, inactive, failed, activating
	Result  string // of a service
	After   []string
	Started time.Duration // when it left inactive; 0: it did not
	Ready   time.Duration // when it became active; 0: it did not
}

// Units asks systemd for units, in the order of the names.
func Units(ctx context.Context, names ...string) ([]Unit, error) {
	conn, err := dbus.NewSystemConnectionContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to systemd: %w", err)
	}
	defer conn.Close()
	units := make([]Unit, len(names))
	for i, name := range names {
		p, err := conn.GetAllPropertiesContext(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("ask systemd for %s: %w", name, err)
		}
		text := func(key string) string { s, _ := p[key].(string); return s }
		since := func(key string) time.Duration {
			us, _ := p[key].(uint64)
			return time.Duration(us) * time.Microsecond
		}
		after, _ := p["After"].([]string)
		units[i] = Unit{
			Name: name, Load: text("LoadState"), Active: text("ActiveState"), Result: text("Result"), After: after,
			Started: since("InactiveExitTimestampMonotonic"), Ready: since("ActiveEnterTimestampMonotonic"),
		}
	}
	return units, nil
}

// LowerWeight lets the rest of the machine go first: CPU and I/O weight of a
// unit go to their minimum until it ends (systemd.resource-control(5)).
func LowerWeight(ctx context.Context, unit string) error {
	conn, err := dbus.NewSystemConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("connect to systemd: %w", err)
	}
	defer conn.Close()
	if err := conn.SetUnitPropertiesContext(ctx, unit, true, dbus.Property{Name: "CPUWeight", Value: godbus.MakeVariant(uint64(1))}, dbus.Property{Name: "IOWeight", Value: godbus.MakeVariant(uint64(1))}); err != nil {
		return fmt.Errorf("lower weight of %s: %w", unit, err)
	}
	return nil
}
