package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// A qmp is a connection to QEMU's control socket (QEMU Machine Protocol: JSON objects, one answer a command, events between).
type qmp struct {
	conn    net.Conn
	answers chan answer

	mu     sync.Mutex // one command at a time
	closed chan struct{}
}

type answer struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// dialQMP connects as soon as the socket is there, unless gone is closed before.
func dialQMP(socket string, gone <-chan struct{}) (*qmp, error) {
	deadline := time.Now().Add(20 * time.Second)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			q := &qmp{conn: conn, answers: make(chan answer, 1), closed: make(chan struct{})}
			go q.read()
			_, err := q.do("qmp_capabilities", nil)
			return q, err
		}
		select {
		case <-gone:
			return nil, errors.New("connect to QEMU: it ended")
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("connect to QEMU: %w", err)
		}
	}
}

func (q *qmp) read() {
	defer close(q.closed)
	for dec := json.NewDecoder(q.conn); ; {
		var message struct {
			answer
			Event string          `json:"event"`
			QMP   json.RawMessage `json:"QMP"` // the greeting
		}
		if dec.Decode(&message) != nil {
			return
		}
		if message.Event == "" && message.QMP == nil {
			q.answers <- message.answer
		}
	}
}

// do gives a command and waits for its answer.
func (q *qmp) do(command string, arguments any) (json.RawMessage, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	b, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	if _, err := q.conn.Write(append(b, '\n')); err != nil {
		return nil, fmt.Errorf("QEMU: %s: %w", command, err)
	}
	select {
	case a := <-q.answers:
		if a.Error != nil {
			return nil, fmt.Errorf("QEMU: %s: %s: %s", command, a.Error.Class, a.Error.Desc)
		}
		return a.Return, nil
	case <-q.closed:
		return nil, fmt.Errorf("QEMU: %s: it ended", command)
	case <-time.After(30 * time.Second):
		return nil, fmt.Errorf("QEMU: %s: no answer", command)
	}
}
