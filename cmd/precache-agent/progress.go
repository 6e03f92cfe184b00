package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/loader"
	"github.com/precache/precache-agent/internal/manifest"
)

// A progress shows a load while it goes on.
type progress interface {
	begin(*archive.Partition, []manifest.Image)
	event(loader.Event)
	end()
}

func newProgress(kind string, out io.Writer) (progress, error) {
	if kind == "auto" {
		kind = "plain"
		if f, ok := out.(*os.File); ok {
			// A serial console may not know its width, and a bar would have none.
			if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
				kind = "bar"
			}
		}
	}
	switch kind {
	case "bar":
		return &bar{lines: lines{out: out}}, nil
	case "plain":
		return &lines{out: out}, nil
	case "json":
		return &objects{enc: json.NewEncoder(out)}, nil
	case "none":
		return &lines{out: io.Discard}, nil
	}
	return nil, errors.New("--progress is auto, bar, plain, json or none")
}

// lines is a line for each end of an image, and a summary.
type lines struct {
	out     io.Writer
	reasons map[archive.Reason]bool
}

func (p *lines) begin(*archive.Partition, []manifest.Image) {}
func (p *lines) end()                                       {}

func (p *lines) event(e loader.Event) {
	switch e.State {
	case loader.Loaded:
		fmt.Fprintf(p.out, "loaded   %s (%s read, %s)\n", e.Ref, size(e.Bytes), took(e.Took))
	case loader.Present:
		fmt.Fprintf(p.out, "present  %s\n", e.Ref)
	case loader.Retrying, loader.Failed:
		fmt.Fprintf(p.out, "%-8s %s: %s: %v\n", e.State, e.Ref, e.Reason, e.Err)
		if e.State == loader.Failed {
			if p.reasons == nil {
				p.reasons = map[archive.Reason]bool{}
			}
			p.reasons[e.Reason] = true
		}
	case loader.Summed:
		s := e.Summary
		fmt.Fprintf(p.out, "%s: %d loaded, %d present, %d failed; layers: %d written, %d shared; %s read, %s written, %s\n",
			plural(s.Images, "image"), s.Loaded, s.Present, s.Failed, s.LayersWritten, s.LayersShared, size(s.BytesRead), size(s.BytesWritten), took(s.Took))
		for _, reason := range slices.Sorted(maps.Keys(p.reasons)) {
			if hint := hints[reason]; hint != "" {
				fmt.Fprintf(p.out, "hint for %s: %s\n", reason, hint)
			}
		}
	}
}

func size(n int64) string {
	if n < 1e6 {
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	if n < 1e9 {
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	}
	return fmt.Sprintf("%.1f GB", float64(n)/1e9)
}

func took(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

// objects is one JSON object a line. The keys are documented in README.md.
type objects struct{ enc *json.Encoder }

type imageObject struct {
	Event   loader.State   `json:"event"`
	Ref     string         `json:"ref"`
	Bytes   int64          `json:"bytes"`
	Seconds float64        `json:"seconds"`
	Error   string         `json:"error,omitempty"`
	Reason  archive.Reason `json:"reason,omitempty"`
}

type summaryObject struct {
	Event         loader.State `json:"event"`
	Images        int          `json:"images"`
	Loaded        int          `json:"loaded"`
	Present       int          `json:"present"`
	Failed        int          `json:"failed"`
	LayersWritten int          `json:"layers_written"`
	LayersShared  int          `json:"layers_shared"`
	BytesRead     int64        `json:"bytes_read"`
	BytesWritten  int64        `json:"bytes_written"`
	Seconds       float64      `json:"seconds"`
}

func (p *objects) begin(*archive.Partition, []manifest.Image) {}
func (p *objects) end()                                       {}

func (p *objects) event(e loader.Event) {
	var object any
	if s := e.Summary; s != nil {
		object = summaryObject{e.State, s.Images, s.Loaded, s.Present, s.Failed, s.LayersWritten, s.LayersShared, s.BytesRead, s.BytesWritten, s.Took.Seconds()}
	} else {
		o := imageObject{Event: e.State, Ref: e.Ref, Bytes: e.Bytes, Seconds: e.Took.Seconds(), Reason: e.Reason}
		if e.Err != nil {
			o.Error = e.Err.Error()
		}
		object = o
	}
	// A reader that went away is not worth stopping a load for.
	_ = p.enc.Encode(object)
}

// bar is a bar on a terminal, above which the failures stand.
type bar struct {
	lines
	part  *archive.Partition
	began time.Time
	sizes map[string]int64
	bars  *mpb.Progress
	bar   *mpb.Bar

	mu     sync.Mutex
	images int // in all
	ended  int
	total  int64 // bytes of archives to be read
	done   int64
	now    []string // what is being loaded
}

func (p *bar) begin(part *archive.Partition, images []manifest.Image) {
	p.part, p.began, p.images, p.sizes = part, time.Now(), len(images), map[string]int64{}
	for _, img := range images {
		if a, err := part.Find(img); err == nil {
			p.sizes[img.Ref] = a.Size
			p.total += a.Size
		}
	}
	p.bars = mpb.New(mpb.WithOutput(p.out), mpb.WithAutoRefresh())
	p.bar = p.bars.AddBar(p.total,
		mpb.PrependDecorators(decor.Any(func(decor.Statistics) string {
			p.mu.Lock()
			defer p.mu.Unlock()
			rate := float64(p.part.BytesRead()) / max(time.Since(p.began).Seconds(), 0.1)
			return fmt.Sprintf("%d/%d images, %s of %s, %s/s ", p.ended, p.images, size(p.done), size(p.total), size(int64(rate)))
		})),
		mpb.AppendDecorators(
			decor.OnComplete(decor.AverageETA(decor.ET_STYLE_GO), ""), decor.OnComplete(decor.Name(" left"), ""),
			decor.Any(func(decor.Statistics) string {
				p.mu.Lock()
				defer p.mu.Unlock()
				if len(p.now) == 0 {
					return ""
				}
				return fmt.Sprintf(" %.40s", p.now[0][max(0, len(p.now[0])-40):])
			})),
	)
	p.lines.out = p.bars // what is written goes above the bar
}

func (p *bar) event(e loader.Event) {
	p.mu.Lock()
	switch e.State {
	case loader.Started:
		p.now = append(p.now, e.Ref)
	case loader.Present:
		p.ended++
		p.total -= p.sizes[e.Ref]
	case loader.Loaded, loader.Failed:
		p.ended++
		p.done += p.sizes[e.Ref]
		p.now = slices.DeleteFunc(p.now, func(ref string) bool { return ref == e.Ref })
	}
	done, total := p.done, p.total
	p.mu.Unlock()
	p.bar.SetTotal(total, e.State == loader.Summed)
	p.bar.SetCurrent(done)
	if e.State != loader.Loaded && e.State != loader.Present {
		p.lines.event(e)
	}
}

func (p *bar) end() {
	p.bar.Abort(false) // where the run could not even start
	p.bars.Wait()
}
