// Connects to ADDRESS PORT, asks for keepalive after SECONDS as people do in node,
// and passes on what it is told and what comes back. An error ends it.
const [address, port, seconds] = process.argv.slice(2);
const socket = require("net").connect(Number(port), address, () => {
  socket.setKeepAlive(true, Number(seconds) * 1000);
  process.stdin.pipe(socket).pipe(process.stdout);
});
