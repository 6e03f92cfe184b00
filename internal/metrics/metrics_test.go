package metrics

import (
	"errors"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/loader"
)

var update = flag.Bool("update", false, "write the golden file")

// sample is the series of a run in which everything happened.
func sample() *Metrics {
	m := New("1.2.3", "install")
	m.Listed(5)
	m.Reached("start")
	for _, e := range []loader.Event{
		{State: loader.Present, Ref: "a"},
		{State: loader.Started, Ref: "b"},
		{State: loader.Retrying, Ref: "b", Reason: archive.StoreFailed, Err: errors.New("x")},
		{State: loader.Loaded, Ref: "b", Bytes: 100, Took: time.Second},
		{State: loader.Started, Ref: "c"},
		{State: loader.Failed, Ref: "c", Reason: archive.CorruptArchive, Err: errors.New("x")},
		{State: loader.Failed, Ref: "d", Reason: archive.CorruptArchive, Err: errors.New("x")},
		{State: loader.Summed, Summary: &loader.Summary{LayersWritten: 3, LayersShared: 2, BytesWritten: 1000}},
	} {
		m.Event(e)
	}
	m.Read(500)
	m.Unseen(1)
	m.Phase("wait", 250*time.Millisecond)
	m.Succeeded(false)
	return m
}

func TestGolden(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metrics.prom")
	if err := sample().WriteFile(path); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got = regexp.MustCompile(`(?m)^(precache_run_timestamp_seconds\{.*\}) .*$`).ReplaceAll(got, []byte("$1 0"))
	got = regexp.MustCompile(`goversion="[^"]*"`).ReplaceAll(got, []byte(`goversion="go"`))
	golden := filepath.Join("testdata", "metrics.prom")
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("series differ from %s (go test -update writes it):\n%s", golden, got)
	}
}

func TestNames(t *testing.T) {
	problems, err := testutil.GatherAndLint(sample().Registry)
	if err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	running, last := filepath.Join(dir, "running"), filepath.Join(dir, "last")
	server := httptest.NewServer(Files(running, last))
	defer server.Close()
	get := func() (int, string) {
		resp, err := http.Get(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	want := func(code int, body string) {
		t.Helper()
		if c, b := get(); c != code || b != body {
			t.Errorf("got %d %q, want %d %q", c, b, code, body)
		}
	}
	want(http.StatusNotFound, "no run has left metrics yet\n")
	for path, body := range map[string]string{last: "last 1\n"} {
		if err := os.WriteFile(path, []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want(http.StatusOK, "last 1\n")
	if err := os.WriteFile(running, []byte("running 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	want(http.StatusOK, "running 1\n")
}
