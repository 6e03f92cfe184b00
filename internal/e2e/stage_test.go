package e2e

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/precache/precache-agent/internal/fixture"
)

// staged is what lies on the partition: about 12 MB, which take an emulated processor several seconds.
type staged struct {
	dir                             string
	agent, steps, operator, network fixture.Staged // ai; ai; ai and ocp, the boot waits for it; ocp
	rest                            []fixture.Staged
}

// In the layer of the first image, what is lost in a bad copy.
var (
	markers = []string{"opt/e2e/setuid", "opt/e2e/gone", "etc/e2e"}
	entries = []fixture.Entry{
		{Name: "opt/e2e/", Mode: 0o711, UID: 5, GID: 6},
		{Name: "opt/e2e/setuid", Mode: 0o4755, UID: 7, GID: 8, Data: "runs as 7\n"},
		{Name: "opt/e2e/.wh.gone"},
		{Name: "etc/e2e", Link: "../opt/e2e/setuid"},
		{Name: "dev/e2e", Type: '3', Major: 1, Minor: 3, Mode: 0o666},
	}
)

func stage(dir string) (staged, error) {
	s := staged{dir: dir}
	tree, err := fixture.Scan()
	if err != nil {
		return s, err
	}
	const mib = 1 << 20
	var errs []error
	files := func(n int, bytes int64) *fixture.Layer {
		l, err := fixture.NewLayer(fixture.LayerSpec{Dir: filepath.Dir(dir), Files: &fixture.Files{
			Tree: tree, Bytes: bytes, Offset: int64(n) * 16 * mib, Marker: fmt.Sprintf("layer-%d", n)}})
		errs = append(errs, err)
		return l
	}
	own := func(entries ...fixture.Entry) *fixture.Layer {
		l, err := fixture.NewLayer(fixture.LayerSpec{Entries: entries})
		errs = append(errs, err)
		return l
	}
	base := []*fixture.Layer{files(0, 6*mib), own(fixture.Entry{Name: "opt/e2e/gone", Data: "x"})}
	image := func(layers ...*fixture.Layer) *fixture.Image {
		if errors.Join(errs...) != nil {
			return nil
		}
		i, err := fixture.NewImage(fixture.ImageSpec{Layers: append(slices.Clone(base), layers...)})
		errs = append(errs, err)
		return i
	}
	const release = "openshift/release:4.14.0-x86_64-"
	p := fixture.Partition{Dir: dir, Items: []fixture.Item{
		{Ref: "registry.example.com/e2e/agent", Image: image(own(entries...)), Groups: []string{"ai"}, Mapping: "e2e/agent:v1"},
		{Ref: "registry.example.com/e2e/steps", Image: image(files(1, 4*mib)), Groups: []string{"ai"}},
		{Ref: "registry.example.com/e2e/release", Image: image(files(2, 2*mib), own(entries...)), Groups: []string{"ai", "ocp"}, Mapping: release + "machine-config-operator"},
		{Ref: "registry.example.com/e2e/release", Image: image(files(3, 4*mib)), Mapping: release + "network-tools"},
		{Ref: "registry.example.com/e2e/release", Image: image(files(4, 4*mib)), Mapping: release + "prometheus"},
		{Ref: "registry.example.com/e2e/release", Image: image(files(5, 4*mib))},
	}}
	if err := errors.Join(errs...); err != nil {
		return s, err
	}
	images, err := p.Write()
	if err != nil {
		return s, err
	}
	s.agent, s.steps, s.operator, s.network, s.rest = images[0], images[1], images[2], images[3], images[4:]
	return s, nil
}

// discovery and install are the images of the stages.
func (s staged) discovery() []fixture.Staged { return []fixture.Staged{s.agent, s.steps, s.operator} }
func (s staged) install() []fixture.Staged {
	return append([]fixture.Staged{s.operator, s.network}, s.rest...)
}

// fill copies what is staged, and the agent, to the partition.
func (s *shared) fill(dir string) error {
	if err := s.fillWithout(dir); err != nil {
		return err
	}
	return copyTo(dir, s.agent)
}

// fillWithout copies what is staged.
func (s *shared) fillWithout(dir string) error { return copyTo(dir, s.staged.dir+"/.") }

func copyTo(dir string, from string) error {
	if out, err := exec.Command("cp", "-a", from, dir).CombinedOutput(); err != nil {
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}
