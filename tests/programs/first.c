// Connects to itself in its first millisecond and prints what both ends have:
// keepalive, idle, interval and probes of one end, then of the other. Stays for as
// many seconds as it is told.

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static int option(int socket, int level, int name)
{
	int value = -1;
	socklen_t size = sizeof(value);

	getsockopt(socket, level, name, &value, &size);
	return value;
}

static void print(int socket)
{
	printf("%d %d %d %d\n", option(socket, SOL_SOCKET, SO_KEEPALIVE),
	       option(socket, IPPROTO_TCP, TCP_KEEPIDLE),
	       option(socket, IPPROTO_TCP, TCP_KEEPINTVL),
	       option(socket, IPPROTO_TCP, TCP_KEEPCNT));
}

int main(int count, char **words)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	socklen_t size = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0);
	int client = socket(AF_INET, SOCK_STREAM, 0);
	int server;

	if (bind(listener, (struct sockaddr *)&address, size) ||
	    listen(listener, 1) ||
	    getsockname(listener, (struct sockaddr *)&address, &size) ||
	    connect(client, (struct sockaddr *)&address, size))
		return 1;
	server = accept(listener, NULL, NULL);
	print(client);
	print(server);
	fflush(stdout);
	if (count > 1)
		sleep(atoi(words[1]));
	return 0;
}
