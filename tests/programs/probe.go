// A Go program that knows nothing of keepalive but how to leave it alone: it
// listens on loopback, connects to itself through package net, and answers the
// line "get SIDE LEVEL OPTION" (SIDE is connecting or accepting) with "ok VALUE"
// or "err ERRNO". It ends with its input.
//
// Package net turns keepalive on by itself once a connection stands. With the
// argument "plain" it is told not to; with "own" it does as it likes.
package main

import (
	"bufio"
	"fmt"
	"log"
	"net"
	"os"
	"syscall"
	"time"
)

func main() {
	keepalive := time.Duration(-1)
	if len(os.Args) > 1 && os.Args[1] == "own" {
		keepalive = 0
	}
	listen := net.ListenConfig{KeepAlive: keepalive}
	dial := net.Dialer{KeepAlive: keepalive, Timeout: 10 * time.Second}

	listener, err := listen.Listen(nil, "tcp", "127.0.0.1:0")
	check(err)
	connecting, err := dial.Dial("tcp", listener.Addr().String())
	check(err)
	accepting, err := listener.Accept()
	check(err)
	sides := map[string]*net.TCPConn{
		"connecting": connecting.(*net.TCPConn),
		"accepting":  accepting.(*net.TCPConn),
	}

	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var side string
		var level, option int
		_, err := fmt.Sscanf(lines.Text(), "get %s %d %d", &side, &level, &option)
		check(err)
		raw, err := sides[side].SyscallConn()
		check(err)
		var value int
		var failed error
		check(raw.Control(func(fd uintptr) {
			value, failed = syscall.GetsockoptInt(int(fd), level, option)
		}))
		if errno, ok := failed.(syscall.Errno); ok {
			fmt.Println("err", int(errno))
		} else {
			fmt.Println("ok", value)
		}
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
