package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

// A requirement is one of containers-policy.json(5).
type requirement map[string]any

var (
	accept = []requirement{{"type": "insecureAcceptAnything"}}
	reject = []requirement{{"type": "reject"}}
)

func signedBy(key, ref string) []requirement {
	return []requirement{{"type": "signedBy", "keyType": "GPGKeys", "keyPath": key, "signedIdentity": map[string]string{"type": "exactReference", "dockerReference": ref}}}
}

// writePolicy writes a policy.json with a default and scopes of the dir transport.
func writePolicy(t testing.TB, fallback []requirement, scopes map[string][]requirement) string {
	t.Helper()
	if scopes == nil {
		scopes = map[string][]requirement{}
	}
	b, err := json.Marshal(map[string]any{"default": fallback, "transports": map[string]any{"dir": scopes, "docker": map[string]any{"registry.example.com": accept}}})
	check(t, err)
	file := filepath.Join(t.TempDir(), "policy.json")
	check(t, os.WriteFile(file, b, 0o644))
	return file
}

// copyWithPolicy is what users do today, the archive untarred beside where it is: whether skopeo accepts the image.
func copyWithPolicy(t testing.TB, s *storetest.Store, st fixture.Staged, policy string) bool {
	t.Helper()
	dir := strings.TrimSuffix(st.Path, ".tgz")
	storetest.Run(t, "tar", "-C", filepath.Dir(dir), "-xf", st.Path)
	defer os.RemoveAll(dir)
	_, err := s.TrySkopeo(t, "--policy", policy, "copy", "--quiet", "dir:"+dir, "containers-storage:"+st.Ref)
	if err != nil && !strings.Contains(err.Error(), "rejected") && !strings.Contains(err.Error(), "ignature") && !strings.Contains(err.Error(), "gpg") {
		t.Fatalf("skopeo fails for another reason than the policy: %v", err)
	}
	return err == nil
}

// withPolicy loads with a policy, and fails the test unless those images get in that skopeo lets in, and are the same.
func withPolicy(t *testing.T, dir string, staged []fixture.Staged, policy string, want ...bool) {
	t.Helper()
	got, skopeo := pair(t, storetest.Tmpfs, "overlay")
	o := load(t, got, dir, "--policy", policy)
	ends := o.ends()
	for n, st := range staged {
		if accepted := copyWithPolicy(t, skopeo, st, policy); accepted != want[n] {
			t.Errorf("image %d: skopeo accepts it: %v, the test expects %v", n, accepted, want[n])
		}
		switch e := ends[st.Ref]; {
		case want[n] && e.Event != "loaded":
			t.Errorf("image %d is %s for %q (%s), want it loaded", n, e.Event, e.Reason, e.Error)
		case !want[n] && (e.Event != "failed" || e.Reason != "policy"):
			t.Errorf("image %d is %s for reason %q (%s), want failed for policy", n, e.Event, e.Reason, e.Error)
		}
	}
	if (o.sum.Failed == 0) != (o.code == exitOK) || o.sum.Failed > 0 && o.code != exitIncomplete {
		t.Errorf("load ends with %d after %d images failed", o.code, o.sum.Failed)
	}
	same(t, got, skopeo)
	if len(got.Images(t)) == 0 {
		storetest.CheckEmpty(t, got)
	}
}

// Who may be loaded, by where the archive is.
func TestPolicyScopes(t *testing.T) {
	storetest.Need(t, "podman", "skopeo")
	l := makeLayers(t)
	dir, staged := partition(t,
		fixture.Item{Ref: "registry.example.com/policy/one", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base}})},
		fixture.Item{Ref: "registry.example.com/policy/two:v1", Image: image(t, fixture.ImageSpec{Layers: []*fixture.Layer{l.base, l.app}})},
		fixture.Item{Ref: "registry.example.com/policy/list", Image: multi(t, "policy", false, l.other)},
	)
	path := func(n int) string { return strings.TrimSuffix(staged[n].Path, ".tgz") }
	for name, tt := range map[string]struct {
		fallback []requirement
		scopes   map[string][]requirement
		want     [3]bool
	}{
		"reject":                           {reject, nil, [3]bool{}},
		"accept":                           {accept, nil, [3]bool{true, true, true}},
		"accept one archive":               {reject, map[string][]requirement{path(1): accept}, [3]bool{false, true, false}},
		"accept the folder":                {reject, map[string][]requirement{dir: accept}, [3]bool{true, true, true}},
		"accept the folder, but not one":   {reject, map[string][]requirement{filepath.Dir(dir): accept, path(0): reject}, [3]bool{false, true, true}},
		"reject the folder, but not one":   {accept, map[string][]requirement{dir: reject, path(2): accept}, [3]bool{false, false, true}},
		"accept another folder":            {reject, map[string][]requirement{dir + "-other": accept, dir + "/o": accept}, [3]bool{}},
		"accept the transport":             {reject, map[string][]requirement{"": accept}, [3]bool{true, true, true}},
		"reject the transport, not a part": {accept, map[string][]requirement{"": reject, dir: accept}, [3]bool{true, true, true}},
	} {
		t.Run(name, func(t *testing.T) {
			withPolicy(t, dir, staged, writePolicy(t, tt.fallback, tt.scopes), tt.want[:]...)
		})
	}
}

// What was let in before stays, even if the policy would not let it in now; skopeo's loop does not ask again either.
func TestPolicyLater(t *testing.T) {
	storetest.Need(t, "podman")
	s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
	dir, _ := partition(t, shapes(t)[0])
	mustLoad(t, s, dir)
	if o := mustLoad(t, s, dir, "--policy", writePolicy(t, reject, nil)); o.sum.Present != 1 {
		t.Errorf("%d images are present, want 1", o.sum.Present)
	}
}

// Who may be loaded, by who signed it.
func TestPolicySignedBy(t *testing.T) {
	storetest.Need(t, "podman", "skopeo", "gpg", "gpgconf")
	ours, theirs := newKey(t, "ours"), newKey(t, "theirs")
	const name = "registry.example.com/policy/signed:v1"
	b := &badBuilder{t: t, name: "signed"}
	img := func() *fixture.Image { return b.image() }
	signed := func(img *fixture.Image, signatures ...[]byte) fixture.Item {
		return fixture.Item{Ref: "registry.example.com/policy/image", Image: img, Stage: &fixture.Stage{Signatures: signatures}}
	}
	good, wrong, both, none, moved, renamed, damaged := img(), img(), img(), img(), img(), img(), img()
	bad := ours.sign(t, damaged, name)
	bad[len(bad)/2] ^= 1
	inList := multi(t, "signed", false)
	host := inList.Host()
	signature := fixture.File(fixture.Name(inList.Ref("registry.example.com/policy/image"))+"/"+host.Digest.Encoded()+".signature-1", ours.sign(t, host, name))
	dir, staged := partition(t,
		signed(good, ours.sign(t, good, name)),
		signed(wrong, theirs.sign(t, wrong, name)),
		signed(both, theirs.sign(t, both, name), ours.sign(t, both, name)),
		signed(none),
		signed(moved, ours.sign(t, good, name)),
		signed(renamed, ours.sign(t, renamed, "registry.example.com/policy/another:v1")),
		signed(damaged, bad),
		fixture.Item{Ref: "registry.example.com/policy/image", Image: inList, Stage: &fixture.Stage{Edits: []fixture.Edit{fixture.Append(signature)}}},
	)
	t.Run("by us", func(t *testing.T) {
		withPolicy(t, dir, staged, writePolicy(t, reject, map[string][]requirement{dir: signedBy(ours.public, name)}), true, false, true, false, false, false, false, true)
	})
	t.Run("by them", func(t *testing.T) {
		withPolicy(t, dir, staged, writePolicy(t, signedBy(theirs.public, name), nil), false, true, true, false, false, false, false, false)
	})
	t.Run("by anybody", func(t *testing.T) { // signatures are stored, whether or not they are asked for
		withPolicy(t, dir, staged, writePolicy(t, accept, nil), true, true, true, true, true, true, true, true)
	})
}

// A key signs images.
type key struct {
	home, public, id string
}

// newKey makes a GPG key in a home of its own.
func newKey(t testing.TB, name string) *key {
	t.Helper()
	home, err := os.MkdirTemp("", "gpg-") // a short path: sockets are in it
	check(t, err)
	k := &key{home: home, public: filepath.Join(t.TempDir(), name+".gpg"), id: name + "@example.com"}
	t.Cleanup(func() {
		k.run(t, "gpgconf", "--kill", "all")
		check(t, os.RemoveAll(home))
	})
	k.run(t, "gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key", k.id, "rsa2048", "sign", "never")
	k.run(t, "gpg", "--batch", "--quiet", "--output", k.public, "--export", k.id)
	return k
}

func (k *key) run(t testing.TB, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "GNUPGHOME="+k.home)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// sign makes the signature that says that an image is ref.
func (k *key) sign(t testing.TB, img *fixture.Image, ref string) []byte {
	t.Helper()
	dir := t.TempDir()
	manifest, out := filepath.Join(dir, "manifest.json"), filepath.Join(dir, "signature")
	check(t, os.WriteFile(manifest, img.Manifest, 0o644))
	k.run(t, "skopeo", "standalone-sign", manifest, ref, k.id, "--output", out)
	b, err := os.ReadFile(out)
	check(t, err)
	return b
}
