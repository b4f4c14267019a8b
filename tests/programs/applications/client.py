# A client as people write it with asyncio: PORT, then nothing, or "before" or
# "after" connect() and the seconds of idle time that it asks for.
import asyncio
import socket
import sys


def ask(of, idle):
    of.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    of.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(idle))


async def main(port, moment=None, idle=None):
    connecting = socket.socket()
    connecting.setblocking(False)
    if moment == "before":
        ask(connecting, idle)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connecting, ("127.0.0.1", int(port)))
    _, writer = await asyncio.open_connection(sock=connecting)
    if moment == "after":
        ask(writer.get_extra_info("socket"), idle)
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


asyncio.run(main(*sys.argv[1:]))
