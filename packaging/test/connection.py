# A connection to itself on this port, for as long as the program lives. First of
# all it writes what keepalive its ends have, where a file is named.
import socket
import sys
import time

listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
if len(sys.argv) > 2:
    ends = [end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for end in (client, server)]
    with open(sys.argv[2], "w") as file:
        print(*ends, file=file)
time.sleep(600)
