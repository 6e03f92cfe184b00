// Package ignition writes the Ignition overrides that deliver the agent to a node, and merges them into a SiteConfig or ClusterInstance.
package ignition

import (
	"bytes"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/precache/precache-agent/units"
)

//go:embed bootstrap.sh
var bootstrapScript string

//go:embed bootstrap.service
var bootstrapUnit string

//go:embed agent-fix-bz1964591.sh
var agentFixScript string

// MaxSize is what an override has at most, in bytes.
const MaxSize = 16 << 10

// Where an override puts what it delivers. The binary is in bootPath if it comes from the partition, else in localPath.
const (
	bootstrapName = "precache-agent-bootstrap.service"
	bootstrapPath = "/usr/local/bin/precache-agent-bootstrap"
	agentFixPath  = "/usr/local/bin/agent-fix-bz1964591"
	localPath     = "/usr/local/bin/precache-agent"
	bootPath      = "/run/precache-agent/bin/precache-agent"
	dropinName    = "10-binary.conf"
)

const executable = 0o755 // in JSON 493: Ignition reads decimal

// The specifications of Ignition that overrides may have.
const (
	Spec31 = "3.1.0"
	Spec32 = "3.2.0"
)

// The defaults of the agent's run command; these flags are not written.
const (
	DefaultLabel = "data"
	DefaultWait  = 30 * time.Second
	maxWait      = 10 * time.Minute
)

// Options say what an override delivers. The zero value of all but Stage and SHA256 is a default.
type Options struct {
	Stage      string        // units.Discovery or units.Install
	Label      string        // of the partition; DefaultLabel
	SHA256     string        // of the binary, in hex
	URL        string        // of the binary, https; empty: it is the file precache-agent on the partition
	Spec       string        // Spec31 or Spec32; Spec31
	Wait       time.Duration // for the partition; DefaultWait
	Timeout    time.Duration // of the whole run; the agent's default
	ReadyAfter string        // "all" or "essential"; the agent's default
}

// Check says what is wrong with options for both stages, as Site wants them.
func (o Options) Check() error {
	o.Stage = units.Install
	return o.check()
}

func (o *Options) check() error {
	if o.Stage != units.Discovery && o.Stage != units.Install {
		return fmt.Errorf("stage %q is neither %s nor %s", o.Stage, units.Discovery, units.Install)
	}
	if o.Label == "" {
		o.Label = DefaultLabel
	}
	if err := checkLabel(o.Label); err != nil {
		return err
	}
	if sum, err := hex.DecodeString(o.SHA256); err != nil || len(sum) != 32 {
		return fmt.Errorf("sha256 %q is not 64 hexadecimal digits", o.SHA256)
	}
	o.SHA256 = strings.ToLower(o.SHA256)
	if o.URL != "" {
		u, err := url.Parse(o.URL)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "" {
			return fmt.Errorf("binary %q is not an https URL", o.URL)
		}
		o.URL = u.String()
	}
	switch o.Spec {
	case "":
		o.Spec = Spec31
	case Spec31, Spec32:
	default:
		return fmt.Errorf("spec %q is neither %s nor %s: overrides may have no other", o.Spec, Spec31, Spec32)
	}
	if o.Wait == 0 {
		o.Wait = DefaultWait
	}
	if o.Wait < time.Second || o.Wait > maxWait || o.Wait%time.Second != 0 {
		return fmt.Errorf("wait %v is not whole seconds from 1s to %v", o.Wait, maxWait)
	}
	if o.Timeout < 0 {
		return fmt.Errorf("timeout %v is negative", o.Timeout)
	}
	switch {
	case o.ReadyAfter == "" || o.ReadyAfter == "all":
	case o.ReadyAfter != "essential":
		return fmt.Errorf("ready after %q is neither all nor essential", o.ReadyAfter)
	case o.Stage != units.Install:
		return errors.New("ready after essential is for the install stage: at discovery the partition must be unused when consumers start")
	}
	return nil
}

// checkLabel allows what needs no quoting: in a unit, in a shell, as a name in /dev/disk/by-partlabel, as coreos-installer's glob.
func checkLabel(label string) error {
	if len(label) > 36 {
		return fmt.Errorf("label %q is longer than the 36 characters of a GPT partition", label)
	}
	for _, c := range []byte(label) {
		if !strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.", rune(c)) {
			return fmt.Errorf("label %q has other characters than letters, digits, dashes, underscores and dots", label)
		}
	}
	if label == "" || strings.ContainsRune("-.", rune(label[0])) {
		return fmt.Errorf("label %q is empty, or begins with a dash or a dot", label)
	}
	return nil
}

// A config is an Ignition configuration with what overrides need.
type config struct {
	Ignition struct {
		Version string `json:"version"`
	} `json:"ignition"`
	Storage struct {
		Files []file `json:"files,omitempty"`
	} `json:"storage,omitzero"`
	Systemd struct {
		Units []unit `json:"units"`
	} `json:"systemd"`
}

type file struct {
	Overwrite bool     `json:"overwrite"`
	Path      string   `json:"path"`
	Mode      int      `json:"mode"`
	Contents  contents `json:"contents"`
}

type contents struct {
	Source       string        `json:"source"`
	Verification *verification `json:"verification,omitempty"`
}

type verification struct {
	Hash string `json:"hash"`
}

type unit struct {
	Name     string            `json:"name"`
	Enabled  *bool             `json:"enabled,omitempty"`
	Contents string            `json:"contents"`
	Dropins  []json.RawMessage `json:"dropins,omitempty"`
}

type dropin struct {
	Name     string `json:"name"`
	Contents string `json:"contents"`
}

// Override returns the override of a stage: JSON, on one line, without single quotes. It is the same for the same options.
func Override(o Options) ([]byte, error) {
	c, err := o.config()
	if err != nil {
		return nil, err
	}
	b := marshal(c)
	if len(b) > MaxSize {
		return nil, fmt.Errorf("override has %d bytes, more than %d", len(b), MaxSize)
	}
	return b, nil
}

func (o *Options) config() (*config, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	var c config
	c.Ignition.Version = o.Spec
	binary := bootPath
	if o.URL != "" {
		binary = localPath
		f := executableFile(localPath, "")
		f.Contents = contents{o.URL, &verification{"sha256-" + o.SHA256}}
		c.Storage.Files = append(c.Storage.Files, f)
	} else {
		c.Storage.Files = append(c.Storage.Files, executableFile(bootstrapPath, bootstrapScript))
		seconds := int(o.Wait.Seconds())
		c.Systemd.Units = append(c.Systemd.Units, unit{Name: bootstrapName, Contents: strings.NewReplacer(
			"@LABEL@", o.Label, "@SHA256@", o.SHA256, "@WAIT@", strconv.Itoa(seconds), "@LIMIT@", strconv.Itoa(seconds+60),
		).Replace(bootstrapUnit)})
	}
	if o.Stage == units.Discovery {
		c.Storage.Files = append(c.Storage.Files, executableFile(agentFixPath, strings.ReplaceAll(agentFixScript, "@BINARY@", binary)))
	}
	installed, err := units.Files(o.Stage)
	if err != nil {
		return nil, err
	}
	for _, f := range installed {
		u := unit{Name: f.Name, Contents: f.Contents}
		if f.Enabled {
			u.Enabled = &f.Enabled
		}
		switch f.Name {
		case units.Service:
			u.Dropins = []json.RawMessage{marshal(dropin{dropinName, o.serviceDropin(binary)})}
		case units.MetricsService:
			u.Dropins = []json.RawMessage{marshal(dropin{dropinName, fmt.Sprintf("[Service]\nExecStart=\nExecStart=%s metrics\n", binary)})}
		case units.MetricsSocket:
			if o.URL == "" {
				u.Dropins = []json.RawMessage{marshal(dropin{dropinName, fmt.Sprintf(socketDropin, bootstrapName, binary)})}
			}
		}
		c.Systemd.Units = append(c.Systemd.Units, u)
	}
	return &c, nil
}

func executableFile(path, text string) file {
	return file{Overwrite: true, Path: path, Mode: executable, Contents: contents{Source: dataURL(text)}}
}

func (o *Options) serviceDropin(binary string) string {
	var b strings.Builder
	if o.URL == "" {
		fmt.Fprintf(&b, "[Unit]\nWants=%[1]s\nAfter=%[1]s\n", bootstrapName)
	} else {
		fmt.Fprint(&b, "[Unit]\n")
	}
	fmt.Fprintf(&b, "# Evaluated when its turn has come. Without the binary the boot goes on.\nConditionFileIsExecutable=%s\n\n[Service]\n", binary)
	if limit := o.Wait + 30*time.Second; limit > 60*time.Second {
		fmt.Fprintf(&b, "# It waits for the partition for %d s.\nTimeoutStartSec=%d\n", int(o.Wait.Seconds()), int(limit.Seconds()))
	}
	fmt.Fprintf(&b, "ExecStart=\nExecStart=%s run --stage %s", binary, o.Stage)
	if o.Label != DefaultLabel {
		fmt.Fprintf(&b, " --label %s", o.Label)
	}
	if o.Wait != DefaultWait {
		fmt.Fprintf(&b, " --wait %v", o.Wait)
	}
	if o.Timeout != 0 {
		fmt.Fprintf(&b, " --timeout %v", o.Timeout)
	}
	if o.ReadyAfter != "" {
		fmt.Fprintf(&b, " --ready-after %s", o.ReadyAfter)
	}
	b.WriteString("\n")
	return b.String()
}

// socketDropin keeps the metrics socket closed until there is a binary to
// answer: a scrape is refused then, it never hangs. The bootstrap comes after
// sockets.target, which by default waits for every socket.
const socketDropin = `[Unit]
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
After=%s
ConditionFileIsExecutable=%s
`

// dataURL returns text as the source of a file. What is readable stays so.
func dataURL(text string) string {
	var b strings.Builder
	b.WriteString("data:,")
	for _, c := range []byte(text) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("-_.~/:=,;$@", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// marshal writes v as JSON on one line without single quotes, which the templates that an override passes through put around it.
func marshal(v any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(err) // only types of this package
	}
	return noQuotes(bytes.TrimSuffix(b.Bytes(), []byte("\n")))
}

// noQuotes escapes single quotes, and what YAML takes for the end of a line. In JSON they stand only within strings.
func noQuotes(b []byte) []byte {
	if !bytes.ContainsAny(b, "'\u0085\u2028\u2029") {
		return b
	}
	return []byte(escapes.Replace(string(b)))
}

var escapes = strings.NewReplacer("'", `\u0027`, "\u0085", `\u0085`, "\u2028", `\u2028`, "\u2029", `\u2029`)
