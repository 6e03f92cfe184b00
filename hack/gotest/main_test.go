package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Real packages through the real go test.
func TestRun(t *testing.T) {
	const head = "package p\n\nimport \"testing\"\n\n"
	for _, tt := range []struct {
		name, body        string
		skipped           int
		want, unwanted    []string
		fails, failsUnder bool // always; with mustRun
	}{
		{name: "pass", body: "func TestA(t *testing.T) { t.Log(`noise`) }", want: []string{"ok  \texample.com/p\t"}, unwanted: []string{"noise", "PASS", "==="}},
		{name: "skip", body: "func TestA(t *testing.T) { t.Run(`sub`, func(t *testing.T) { t.Skip(`needs root`) }) }",
			skipped: 1, want: []string{"SKIP: TestA/sub", "needs root", "ok  \texample.com/p\t"}, failsUnder: true},
		{name: "fail", body: "func TestA(t *testing.T) { t.Error(`wrong`) }\nfunc TestB(t *testing.T) { t.Log(`noise`) }",
			want: []string{"FAIL: TestA", "wrong", "FAIL\texample.com/p\t"}, unwanted: []string{"noise"}, fails: true},
		{name: "panic", body: "func TestA(t *testing.T) { panic(`oh no`) }", want: []string{"oh no", "FAIL\texample.com/p\t"}, fails: true},
		{name: "exit", body: "func TestA(t *testing.T) { t.Log(`last words`); os.Exit(3) }", want: []string{"last words", "FAIL\texample.com/p\t"}, fails: true},
		{name: "no build", body: "func TestA(t *testing.T) { undefined() }", want: []string{"undefined: undefined", "[build failed]"}, fails: true},
		{name: "no tests", body: "", want: []string{"no tests to run"}},
	} {
		t.Run(strings.ReplaceAll(tt.name, " ", "-"), func(t *testing.T) {
			dir := t.TempDir()
			source := head + tt.body + "\n"
			if tt.body == "" {
				source = "package p\n"
			} else if strings.Contains(tt.body, "os.") {
				source = strings.Replace(source, "import ", "import \"os\"\nimport ", 1)
			}
			for name, text := range map[string]string{"go.mod": "module example.com/p\n", "p_test.go": source} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			t.Chdir(dir)
			var out strings.Builder
			skipped, err := run([]string{"."}, false, &out)
			if (err != nil) != tt.fails || skipped != tt.skipped {
				t.Errorf("got %d skipped, error %v\n%s", skipped, err, &out)
			}
			if _, err := run([]string{"."}, true, &strings.Builder{}); (err != nil) != (tt.fails || tt.failsUnder) {
				t.Errorf("where nothing may be skipped: error %v", err)
			}
			for _, s := range tt.want {
				if !strings.Contains(out.String(), s) {
					t.Errorf("no %q in\n%s", s, &out)
				}
			}
			for _, s := range tt.unwanted {
				if strings.Contains(out.String(), s) {
					t.Errorf("%q in\n%s", s, &out)
				}
			}
		})
	}
}
