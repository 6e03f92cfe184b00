package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/precache/precache-agent/ignition"
)

func TestIgnition(t *testing.T) {
	site, err := os.ReadFile("../../ignition/testdata/site/clusterinstance.yaml")
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "precache-agent")
	if err := os.WriteFile(binary, []byte("abc"), 0o644); err != nil {
		t.Fatal(err)
	}
	const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	override, err := ignition.Override(ignition.Options{Stage: "install", SHA256: abc})
	if err != nil {
		t.Fatal(err)
	}
	merged, _, err := ignition.Site(site, ignition.Options{SHA256: abc, ReadyAfter: "essential"})
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	own, err := hashFile(self)
	if err != nil {
		t.Fatal(err)
	}
	bySelf, err := ignition.Override(ignition.Options{Stage: "discovery", SHA256: own})
	if err != nil {
		t.Fatal(err)
	}
	defer func(stdin *os.File) { os.Stdin = stdin }(os.Stdin)
	for _, tt := range []struct {
		args, in, out, errs string // errs: a part of what is on stderr; empty: nothing is
		code                int
	}{
		{"ignition --stage install --sha256 " + abc, "", string(override) + "\n", "", exitOK},
		{"ignition --stage install --binary-file " + binary, "", string(override) + "\n", "", exitOK},
		{"ignition --stage discovery", "", string(bySelf) + "\n", "note: the node will accept no other binary than this one, " + self, exitOK},
		{"ignition", "", "", `required flag(s) "stage" not set`, exitUsage},
		{"ignition --stage auto --sha256 " + abc, "", "", `stage "auto" is neither discovery nor install`, exitUsage},
		{"ignition --stage install --spec 3.4.0 --sha256 " + abc, "", "", `spec "3.4.0"`, exitUsage},
		{"ignition --stage install --binary http://example.com/a --sha256 " + abc, "", "", "is not an https URL", exitUsage},
		{"ignition --stage install --binary-file " + binary + " --sha256 " + abc, "", "", "[binary-file sha256] were all set", exitUsage},
		{"ignition --stage install --binary-file " + binary + "x", "", "", "hash binary: open ", exitUnexpected},
		{"siteconfig --ready-after essential --sha256 " + abc, string(site), string(merged), "", exitOK},
		{"siteconfig --label a/b --sha256 " + abc, string(site), "", `label "a/b"`, exitUsage},
		{"siteconfig --sha256 " + abc, string(site) + "---\napiVersion: ran.openshift.io/v1\nkind: SiteConfig\n", "", "document 4: spec: is not a mapping", exitUnexpected},
		{"siteconfig --sha256 " + abc, "", "", "there is no SiteConfig", exitUnexpected},
	} {
		var out, errw bytes.Buffer
		in := filepath.Join(t.TempDir(), "in")
		if err := os.WriteFile(in, []byte(tt.in), 0o644); err != nil {
			t.Fatal(err)
		}
		if os.Stdin, err = os.Open(in); err != nil {
			t.Fatal(err)
		}
		code := run(context.Background(), strings.Fields(tt.args), &out, &errw)
		os.Stdin.Close()
		if code != tt.code || out.String() != tt.out || !strings.Contains(errw.String(), tt.errs) || tt.errs == "" && errw.Len() > 0 {
			t.Errorf("%s: code %d, want %d; stderr %q, want %q; stdout has %d bytes, want %d", tt.args, code, tt.code, &errw, tt.errs, out.Len(), len(tt.out))
		}
	}
}
