// Package metrics turns the loader's events into Prometheus series, and writes
// them to text files. It does not decide anything and it has no network code
// but a handler that serves such files.
package metrics

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/precache/precache-agent/internal/loader"
)

// Metrics are the series of one run, in a registry of their own.
type Metrics struct {
	Registry *prometheus.Registry

	images   *prometheus.GaugeVec
	failures *prometheus.GaugeVec
	layers   *prometheus.GaugeVec
	archives prometheus.Counter
	retries  prometheus.Counter
	unseen   prometheus.Gauge
	read     prometheus.Gauge
	written  prometheus.Gauge
	phase    *prometheus.GaugeVec
	at       *prometheus.GaugeVec
	success  prometheus.Gauge
}

// New returns the series of a run of the given stage.
func New(version, stage string) *Metrics {
	m := &Metrics{Registry: prometheus.NewRegistry()}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
		m.Registry.MustRegister(g)
		return g
	}
	vec := func(name, help, label string, values ...string) *prometheus.GaugeVec {
		v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, []string{label})
		m.Registry.MustRegister(v)
		for _, value := range values {
			v.WithLabelValues(value)
		}
		return v
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		m.Registry.MustRegister(c)
		return c
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "precache_build_info", Help: "Version of the agent; the value is always 1.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	build.Set(1)
	m.Registry.MustRegister(build)
	vec("precache_stage_info", "Stage of the node's life in which the agent ran; the value is always 1.", "stage").WithLabelValues(stage).Set(1)
	m.images = vec("precache_images", "Images of the set by state.", "state", "listed", "present", "loaded", "failed", "pending")
	m.failures = vec("precache_image_failures", "Images that are not in the store, by reason.", "reason")
	m.layers = vec("precache_layers", "Layers of loaded images by what they took.", "outcome", "written", "shared")
	m.archives = counter("precache_archives_read_total", "Archives that were opened.")
	m.retries = counter("precache_image_retries_total", "Images that were tried again.")
	m.unseen = gauge("precache_podman_disagreements", "Images in the store that podman does not see.")
	m.read = gauge("precache_read_bytes", "Bytes read from the partition.")
	m.written = gauge("precache_written_bytes", "Bytes of layers written to the store.")
	m.phase = vec("precache_phase_duration_seconds", "How long a phase of the run took.", "phase", "wait", "load")
	m.at = vec("precache_run_timestamp_seconds", "When the run reached a point, in seconds since the epoch.", "point")
	m.success = gauge("precache_success", "1 if every image of the set is in the store.")
	return m
}

// Listed says how many images the set has.
func (m *Metrics) Listed(n int) {
	m.images.WithLabelValues("listed").Set(float64(n))
	m.images.WithLabelValues("pending").Set(float64(n))
}

// Event takes an event of the loader.
func (m *Metrics) Event(e loader.Event) {
	ended := func(state string) {
		m.images.WithLabelValues(state).Inc()
		m.images.WithLabelValues("pending").Dec()
	}
	switch e.State {
	case loader.Started:
		m.archives.Inc()
	case loader.Present, loader.Loaded:
		ended(string(e.State))
	case loader.Retrying:
		m.retries.Inc()
	case loader.Failed:
		ended(string(e.State))
		m.failures.WithLabelValues(string(e.Reason)).Inc()
	case loader.Summed:
		s := e.Summary
		m.layers.WithLabelValues("written").Add(float64(s.LayersWritten))
		m.layers.WithLabelValues("shared").Add(float64(s.LayersShared))
		m.written.Add(float64(s.BytesWritten))
	}
}

// Read says how many bytes have been read from the partition so far.
func (m *Metrics) Read(n int64) { m.read.Set(float64(n)) }

// Unseen says how many images podman does not see.
func (m *Metrics) Unseen(n int) { m.unseen.Set(float64(n)) }

// Phase says how long a phase took.
func (m *Metrics) Phase(name string, took time.Duration) {
	m.phase.WithLabelValues(name).Set(took.Seconds())
}

// Reached says that the run is now at a point: start, ready or end.
func (m *Metrics) Reached(point string) {
	m.at.WithLabelValues(point).Set(float64(time.Now().UnixMilli()) / 1000)
}

// Succeeded says whether every image is in the store.
func (m *Metrics) Succeeded(yes bool) {
	if yes {
		m.success.Set(1)
	} else {
		m.success.Set(0)
	}
}

// Handler serves the series as they are.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.Registry, promhttp.HandlerOpts{})
}

// WriteFile replaces path by the series in the text format, for everybody to read.
func (m *Metrics) WriteFile(path string) error {
	if err := prometheus.WriteToTextfile(path, m.Registry); err != nil {
		return fmt.Errorf("write metrics: %w", err)
	}
	return nil
}

// Files serves the first of the text files that is there: what a run that goes
// on, or the last one, has left. A scrape reads a file and nothing else.
func Files(paths ...string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, path := range paths {
			b, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				http.Error(w, fmt.Sprintf("read %s: %v", filepath.Base(path), err), http.StatusInternalServerError)
				return
			}
			w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
			return
		}
		http.Error(w, "no run has left metrics yet", http.StatusNotFound)
	})
}
