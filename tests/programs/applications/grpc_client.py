# A gRPC client: ADDRESS. For each line it makes a call and says as whom the server
# knows it, which is another one after each new connection.
import sys

import grpc

with grpc.insecure_channel(sys.argv[1]) as channel:
    peer = channel.unary_unary("/test/peer")
    for _ in sys.stdin:
        print(peer(b"", timeout=10, wait_for_ready=True).decode(), flush=True)
