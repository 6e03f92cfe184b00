// Command gotest runs `go test` with its arguments and prints what a person wants to read: the line of each package,
// and the output of each test that failed or was skipped. With CI=true in the environment a skipped test is a failure:
// a green run that ran nothing is the worst result.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

func main() {
	if _, err := run(os.Args[1:], os.Getenv("CI") == "true", os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run returns how many tests were skipped, and an error if one failed, or was skipped where all must run.
func run(args []string, mustRun bool, out io.Writer) (skipped int, err error) {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	skipped, readErr := report(pipe, out)
	if readErr != nil {
		cmd.Process.Kill()
	}
	if err := errors.Join(readErr, cmd.Wait()); err != nil {
		return skipped, fmt.Errorf("run tests: %w", err)
	}
	if mustRun && skipped > 0 {
		return skipped, fmt.Errorf("run tests: %d skipped, which CI does not allow", skipped)
	}
	return skipped, nil
}

// An event is what `go test -json` says (go doc test2json).
type event struct {
	Action, Package, Test, Output string
}

// report prints the events that matter, and counts the tests that were skipped.
func report(in io.Reader, out io.Writer) (skipped int, err error) {
	held := map[string]map[string]string{} // package → test → its output so far
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		if line == "" && err == io.EOF {
			return skipped, nil
		} else if err != nil && err != io.EOF {
			return skipped, fmt.Errorf("read test output: %w", err)
		}
		var e event
		if json.Unmarshal([]byte(line), &e) != nil || e.Action == "" {
			fmt.Fprint(out, line)
			continue
		}
		tests := held[e.Package]
		if tests == nil {
			tests = map[string]string{}
			held[e.Package] = tests
		}
		switch {
		case e.Action == "build-output":
			fmt.Fprint(out, e.Output)
		case e.Action == "output" && e.Test != "":
			tests[e.Test] += e.Output
		case e.Action == "output":
			if e.Output != "PASS\n" {
				fmt.Fprint(out, e.Output)
			}
		case e.Test != "" && (e.Action == "fail" || e.Action == "skip"):
			fmt.Fprint(out, without(tests[e.Test], "=== "))
			delete(tests, e.Test)
			if e.Action == "skip" {
				skipped++
			}
		case e.Test != "" && e.Action == "pass":
			delete(tests, e.Test)
		case e.Action == "fail": // the package: what is held belongs to tests that never ended
			for _, output := range tests {
				fmt.Fprint(out, output)
			}
			delete(held, e.Package)
		}
	}
}

// without returns text without the lines that begin with prefix.
func without(text, prefix string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, prefix) {
			b.WriteString(line)
		}
	}
	return b.String()
}
