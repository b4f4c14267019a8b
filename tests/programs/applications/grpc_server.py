# A gRPC server with what gRPC sets by itself: an address to listen on, the port of
# which it names, and the milliseconds after which it gives up a peer that does not
# acknowledge (20,000 where none are given). It tells callers who they are.
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

address, *timeout = sys.argv[1:]
options = [("grpc.keepalive_timeout_ms", int(time)) for time in timeout]
server = grpc.server(ThreadPoolExecutor(1), options=options)
peer = grpc.unary_unary_rpc_method_handler(lambda _, context: context.peer().encode())
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"peer": peer}),))
print(server.add_insecure_port(address), flush=True)
server.start()
sys.stdin.read()
server.stop(None)
