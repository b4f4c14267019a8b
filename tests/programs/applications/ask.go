// Connects to ADDRESS PORT, with keepalive after SECONDS as Go sets it after
// connect(), and passes on what it is told and what comes back. An error ends it.
package main

import (
	"io"
	"net"
	"os"
	"strconv"
	"time"
)

func main() {
	seconds, _ := strconv.Atoi(os.Args[3])
	dialer := net.Dialer{KeepAlive: time.Duration(seconds) * time.Second}
	connection, err := dialer.Dial("tcp", net.JoinHostPort(os.Args[1], os.Args[2]))
	if err != nil {
		panic(err)
	}
	go io.Copy(connection, os.Stdin)
	if _, err := io.Copy(os.Stdout, connection); err != nil {
		panic(err)
	}
}
