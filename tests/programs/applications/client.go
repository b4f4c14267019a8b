// A client as people write it in Go: PORT, then nothing, or "before" or "after"
// connect() and the seconds of idle time that it asks for.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"
)

func main() {
	// Go sets 15 s after connect() where nobody says anything.
	dialer := net.Dialer{}
	if len(os.Args) == 4 {
		seconds, _ := strconv.Atoi(os.Args[3])
		if os.Args[2] == "after" {
			dialer.KeepAlive = time.Duration(seconds) * time.Second
		} else {
			dialer.KeepAlive = -1
			dialer.Control = func(_, _ string, socket syscall.RawConn) error {
				return socket.Control(func(fd uintptr) {
					syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1)
					syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, seconds)
				})
			}
		}
	}
	connection, err := dialer.Dial("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	defer connection.Close()
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}
