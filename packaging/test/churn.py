# Connects again and again until /run/churn-stop is there; writes down every end
# that came without keepalive, and how many connections there were.
import os
import socket

listener = socket.create_server(("127.0.0.1", 7900))
count = 0
while not os.path.exists("/run/churn-stop"):
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    for end in client, server:
        if not end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            with open("/run/churn-missed", "a") as missed:
                missed.write(f"connection {count}\n")
    client.close()
    server.close()
    count += 1
with open("/run/churn-count", "w") as counted:
    counted.write(str(count))
