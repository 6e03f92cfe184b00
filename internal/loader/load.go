package loader

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/manifest"
)

const (
	maxHeld    = 16 << 20    // bytes of metadata of images that wait for layers or for the committer
	maxBatch   = 64          // images committed at once
	gather     = time.Second // for which complete images wait for more
	firstPause = 500 * time.Millisecond
	maxNeeds   = 3 // how often what the store lost meanwhile is read again
)

// MaxJobs is how many archives are read at once at most: what fits in the
// memory that the agent allows itself.
const MaxJobs = 8

// Options say what is loaded, from where, to where. Zero fields are defaults.
type Options struct {
	Images    []manifest.Image
	Partition *archive.Partition
	Store     Store
	Jobs      int         // archives read at once, at most MaxJobs; 0: GOMAXPROCS
	Attempts  int         // of an image whose failure may pass; 0: 3
	Report    func(Event) // called by one goroutine at a time
	AllRead   func()      // called when no archive has to be read any more, before Load returns; nil: nobody asks
}

// Load loads the images that are not in the store. It returns when all of them
// are there or have failed, each of which was reported; the error is for what
// kept it from trying. When ctx ends, what is complete is committed, what is
// staged is kept for the next run, and the rest fails as interrupted.
func Load(ctx context.Context, o Options) (Summary, error) {
	if o.Jobs <= 0 {
		o.Jobs = runtime.GOMAXPROCS(0)
	}
	if o.Attempts <= 0 {
		o.Attempts = 3
	}
	if o.Report == nil {
		o.Report = func(Event) {}
	}
	if o.AllRead == nil {
		o.AllRead = func() {}
	}
	l := &load{
		o: o, ctx: ctx, began: time.Now(),
		layers: map[digest.Digest]*needed{},
		blobs:  map[digest.Digest]digest.Digest{},
	}
	l.cond = sync.NewCond(&l.mu)
	l.sum.Images = len(o.Images)

	present, err := o.Store.Present(ctx, o.Images)
	if err != nil {
		return l.sum, fmt.Errorf("look into store: %w", err)
	}
	for i, img := range o.Images {
		if present[i] {
			l.sum.Present++
			l.report(Event{State: Present, Ref: img.Ref})
			continue
		}
		l.queue = append(l.queue, &item{img: img})
	}
	l.open, l.unread = len(l.queue), len(l.queue)
	if l.open == 0 {
		o.AllRead()
	} else {
		if l.parallel, err = o.Store.Prepare(ctx); err != nil {
			return l.sum, fmt.Errorf("prepare store: %w", err)
		}
		l.run(min(o.Jobs, MaxJobs, l.open))
	}
	if ctx.Err() == nil {
		if err := o.Store.Unstage(); err != nil {
			return l.sum, fmt.Errorf("remove what was staged for failed images: %w", err)
		}
	}
	l.sum.BytesRead = o.Partition.BytesRead()
	l.sum.LayersShared = max(0, l.uses-l.sum.LayersWritten)
	l.sum.Took = time.Since(l.began)
	l.report(Event{State: Summed, Bytes: l.sum.BytesRead, Took: l.sum.Took, Summary: &l.sum})
	return l.sum, nil
}

// A load is the state of one Load.
type load struct {
	o     Options
	ctx   context.Context
	began time.Time

	parallel  bool // of the store
	reporting sync.Mutex

	mu     sync.Mutex
	cond   *sync.Cond
	queue  []*item // to be read
	ready  []*item // to be committed
	open   int     // items neither loaded nor failed
	unread int     // those of them whose archive may have to be read
	told   bool    // AllRead was called
	wg     sync.WaitGroup
	held   int64 // bytes of metadata that items hold
	layers map[digest.Digest]*needed
	blobs  map[digest.Digest]digest.Digest // diffIDs of the layers that are known to be needed
	sum    Summary
	uses   int // layers of loaded images
}

// An item is an image on its way.
type item struct {
	img      manifest.Image
	archive  *archive.Archive
	meta     *archive.Image  // nil: not read yet, or given up for its memory
	held     int64           // bytes that meta counts for
	need     []digest.Digest // diffIDs of the layers that have to be staged for it
	started  time.Time
	complete time.Time // when its last layer was staged
	read     bool      // it waits for the committer, or the committer has it
	attempts int
	needs    int // times that Commit wanted layers after all
}

// A needed layer is one that has to be staged.
type needed struct {
	state   layerState
	waiters []*item
}

type layerState int

const (
	free layerState = iota // to be taken by the next archive that has it
	busy                   // some worker is extracting it
	done                   // staged
)

func (l *load) report(e Event) {
	l.reporting.Lock()
	defer l.reporting.Unlock()
	l.o.Report(e)
}

func (l *load) run(jobs int) {
	if !l.parallel {
		jobs = 1
	}
	stop := context.AfterFunc(l.ctx, l.wake)
	defer stop()
	for range jobs {
		l.wg.Go(l.work)
	}
	l.wg.Go(l.commit)
	l.wg.Wait()
}

// wake makes everybody look again.
func (l *load) wake() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cond.Broadcast()
}

// work reads archives until every image has its end.
func (l *load) work() {
	for {
		l.mu.Lock()
		for len(l.queue) == 0 && l.open > 0 {
			l.cond.Wait()
		}
		if l.open == 0 {
			l.mu.Unlock()
			return
		}
		it := l.queue[0]
		l.queue = l.queue[1:]
		l.mu.Unlock()
		l.read(it)
	}
}

// read reads one archive and decides what becomes of its image.
func (l *load) read(it *item) {
	err := l.ctx.Err()
	if err == nil && it.started.IsZero() {
		it.started = time.Now()
		l.report(Event{State: Started, Ref: it.img.Ref})
	}
	if err == nil && it.archive == nil {
		it.archive, err = l.o.Partition.Find(it.img)
	}
	if err == nil {
		if l.parallel {
			var img *archive.Image
			if img, err = it.archive.Visit(l.ctx, it.img, &visitor{l: l, it: it}); err == nil {
				l.mu.Lock()
				l.drop(it) // its signatures may have come since
				l.hold(it, img)
				l.mu.Unlock()
			}
		} else {
			err = l.inOrder(it)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.drop(it)
		l.failed(it, err)
		return
	}
	l.settle(it)
}

// settle decides, with l.mu held, what comes next for an item that was read.
func (l *load) settle(it *item) {
	var busyLayer *needed
	for _, d := range it.need {
		switch layer := l.layers[d]; layer.state {
		case free: // the copy that this one was skipped for was bad, or it is not in this archive
			if it.meta != nil && it.meta.Lacks(d) {
				l.drop(it)
				l.failed(it, &archive.Error{Reason: archive.CorruptArchive, Err: fmt.Errorf("read %s: layer %s is missing", it.archive.Name, d)})
				return
			}
			l.drop(it)
			l.again(it)
			return
		case busy:
			busyLayer = layer
		}
	}
	switch {
	case busyLayer != nil:
		busyLayer.waiters = append(busyLayer.waiters, it)
		if l.held > maxHeld {
			l.drop(it)
		}
	case it.meta == nil:
		l.again(it)
	default:
		l.enqueue(it)
		// The committer makes room, and it waits for nobody.
		for l.held > maxHeld && l.open > 0 && len(l.ready) > 0 {
			l.cond.Wait()
		}
	}
}

// enqueue hands an item that has all it needs to the committer, with l.mu held.
func (l *load) enqueue(it *item) {
	it.complete = time.Now()
	if l.ready = append(l.ready, it); len(l.ready) == 1 {
		time.AfterFunc(gather, l.wake)
	}
	l.cond.Broadcast()
	if !it.read {
		it.read = true
		l.oneRead()
	}
}

// oneRead takes down, with l.mu held, that one archive less may have to be read.
func (l *load) oneRead() {
	if l.unread--; l.unread == 0 && !l.told {
		l.told = true
		l.wg.Go(l.o.AllRead)
	}
}

func (l *load) again(it *item) {
	if it.read { // it was, but the store has lost layers meanwhile
		it.read = false
		l.unread++
	}
	l.queue = append([]*item{it}, l.queue...)
	l.cond.Broadcast()
}

func (l *load) hold(it *item, img *archive.Image) {
	it.meta, it.held = img, img.Bytes()
	l.held += it.held
}

func (l *load) drop(it *item) {
	if it.meta != nil {
		l.held -= it.held
		it.meta, it.held = nil, 0
	}
}

// became tells, with l.mu held, those who wait for a layer that it is done, or free again.
func (l *load) became(d digest.Digest, state layerState) {
	layer := l.layers[d]
	layer.state = state
	waiters := layer.waiters
	layer.waiters = nil
	for _, it := range waiters {
		l.settle(it)
	}
	l.cond.Broadcast()
}

// failed retries an item later or gives it up, with l.mu held. One that has
// its metadata goes to the committer again, any other is read again.
func (l *load) failed(it *item, err error) {
	reason := reasonOf(err)
	if l.ctx.Err() != nil {
		reason = archive.Interrupted
	}
	it.attempts++
	e := Event{State: Failed, Ref: it.img.Ref, Err: err, Reason: reason}
	if it.archive != nil {
		e.Bytes = it.archive.BytesRead()
	}
	if !it.started.IsZero() {
		e.Took = time.Since(it.started)
	}
	if mayPass(reason) && it.attempts < l.o.Attempts {
		e.State = Retrying
		l.report(e)
		go func() {
			select {
			case <-time.After(firstPause << (it.attempts - 1)):
			case <-l.ctx.Done():
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			if it.meta != nil {
				l.enqueue(it)
			} else {
				l.again(it)
			}
		}()
		return
	}
	l.drop(it)
	if !it.read {
		l.oneRead()
	}
	l.sum.Failed++
	l.report(e)
	l.open--
	l.cond.Broadcast()
}

// commit puts what is ready into the store, batch by batch, until every image has its end.
func (l *load) commit() {
	// What is complete is committed even after ctx has ended.
	ctx := context.WithoutCancel(l.ctx)
	for {
		l.mu.Lock()
		for !l.due() && l.open > 0 {
			l.cond.Wait()
		}
		if len(l.ready) == 0 {
			l.mu.Unlock()
			return
		}
		n := min(len(l.ready), maxBatch)
		batch := slices.Clone(l.ready[:n])
		if l.ready = slices.Delete(l.ready, 0, n); len(l.ready) > 0 {
			time.AfterFunc(gather, l.wake)
		}
		l.mu.Unlock()

		errs := l.commitBatch(ctx, batch)
		l.mu.Lock()
		for i, it := range batch {
			l.committed(it, errs[i])
		}
		l.cond.Broadcast()
		l.mu.Unlock()
	}
}

// due reports, with l.mu held, whether a batch should be committed now. Each
// costs two barriers on the disk and two writes of the store's indexes, so it
// may wait a little for more, but not when nothing more can come.
func (l *load) due() bool {
	switch {
	case len(l.ready) == 0:
		return false
	case len(l.ready) >= maxBatch, len(l.ready) == l.open, l.held > maxHeld, l.ctx.Err() != nil:
		return true
	}
	return time.Since(l.ready[0].complete) >= gather
}

func (l *load) commitBatch(ctx context.Context, batch []*item) []error {
	images := make([]*archive.Image, len(batch))
	for i, it := range batch {
		images[i] = it.meta
	}
	all := func(err error) []error {
		errs := make([]error, len(batch))
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	// Whole before it is committed, durable before it is called loaded.
	if err := l.o.Store.Sync(ctx); err != nil {
		return all(err)
	}
	errs := l.o.Store.Commit(ctx, images)
	if err := l.o.Store.Sync(ctx); err != nil {
		return all(err)
	}
	return errs
}

// committed decides, with l.mu held, what comes of an item that was committed or not.
func (l *load) committed(it *item, err error) {
	var needs interface{ Needed() []digest.Digest }
	if errors.As(err, &needs) && it.needs < maxNeeds {
		it.needs++
		for _, d := range needs.Needed() {
			if layer := l.layers[d]; layer != nil && layer.state == done {
				layer.state = free
			}
		}
		l.drop(it)
		l.again(it)
		return
	}
	if err != nil {
		l.failed(it, err)
		return
	}
	l.uses += len(it.meta.Layers)
	l.drop(it)
	l.sum.Loaded++
	l.open--
	l.report(Event{State: Loaded, Ref: it.img.Ref, Bytes: it.archive.BytesRead(), Took: time.Since(it.started)})
}
