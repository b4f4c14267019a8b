// A client as people write it for node: PORT, then nothing, or "after" connect()
// and the seconds of idle time that it asks for. Node sets nothing before.
const [port, , idle] = process.argv.slice(2);
const socket = require("net").connect(Number(port), "127.0.0.1", () => {
  if (idle) socket.setKeepAlive(true, Number(idle) * 1000);
  console.log("ready");
});
process.stdin.on("end", () => process.exit()).resume();
