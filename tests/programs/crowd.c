// A program with many TCP connections to itself, both ends of each its own. It
// sets no option, and answers each line of its input with one line: "ok VALUES"
// or "err ERRNO". It ends with its input.
//
//     listen ADDRESS
//         ok 0
//     connect COUNT
//         so many more connections                 ok COUNT
//     count KEEPALIVE IDLE INTERVAL PROBES USER-TIMEOUT
//         how many of the sockets have just this, and what the first other one has
//                                                  ok COUNT K I V P U
//     churn MILLISECONDS RATE IDLE IDLE
//         makes and closes so many connections a second and asks each end at once
//         for its idle time; before it closes one, sends a byte each way. Made;
//         ends with keepalive and the first idle time, the second, neither;
//         connections over which nothing went any more
//                                          ok COUNT FIRST SECOND NEITHER BROKEN
//
// Numbers are decimal, ADDRESS is a struct sockaddr in hexadecimal.

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define OPTIONS 5
#define ROOM 20000
// Connections of the churn that are open at a time.
#define RING 64

struct options {
	int value[OPTIONS];
};

static const int names[OPTIONS][2] = {
	{ SOL_SOCKET, SO_KEEPALIVE },
	{ IPPROTO_TCP, TCP_KEEPIDLE },
	{ IPPROTO_TCP, TCP_KEEPINTVL },
	{ IPPROTO_TCP, TCP_KEEPCNT },
	{ IPPROTO_TCP, TCP_USER_TIMEOUT },
};

static struct sockaddr_storage address;
static socklen_t address_length = sizeof(address);
static int listener = -1;
static int held[ROOM];
static int holds;

static int get(int fd, int option, int *value)
{
	socklen_t length = sizeof(*value);

	return getsockopt(fd, names[option][0], names[option][1], value, &length);
}

static int listen_at(const char *text)
{
	unsigned char *bytes = (unsigned char *)&address;
	unsigned int n = 0, byte;

	while (n < sizeof(address) && sscanf(text + 2 * n, "%2x", &byte) == 1)
		bytes[n++] = byte;
	listener = socket(address.ss_family, SOCK_STREAM, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, n) < 0 ||
	    listen(listener, 64) < 0)
		return -1;
	return getsockname(listener, (struct sockaddr *)&address, &address_length);
}

static int make_pair(int pair[2])
{
	pair[0] = socket(address.ss_family, SOCK_STREAM, 0);
	if (pair[0] < 0)
		return -1;
	if (connect(pair[0], (struct sockaddr *)&address, address_length) < 0)
		return -1;
	pair[1] = accept(listener, 0, 0);
	return pair[1] < 0 ? -1 : 0;
}

static int add(int count)
{
	int i;

	for (i = 0; i < count; i++, holds += 2) {
		if (holds + 2 > ROOM) {
			errno = EMFILE;
			return -1;
		}
		if (make_pair(held + holds) < 0)
			return -1;
	}
	return 0;
}

static int count(const struct options *wanted, int *like, struct options *other)
{
	int i, option;

	*like = 0;
	memset(other, 0, sizeof(*other));
	for (i = 0; i < holds; i++) {
		struct options has;

		for (option = 0; option < OPTIONS; option++)
			if (get(held[i], option, &has.value[option]) < 0)
				return -1;
		if (memcmp(&has, wanted, sizeof(has)) == 0)
			++*like;
		else if (i == *like)
			*other = has;
	}
	return 0;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

// Closes without TIME_WAIT, which would use up the ports.
static void abandon(int fd)
{
	struct linger linger = { 1, 0 };

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	close(fd);
}

// Whether a byte goes each way.
static int works(const int pair[2])
{
	char byte = 0;
	int end;

	for (end = 0; end < 2; end++)
		if (send(pair[end], &byte, 1, MSG_NOSIGNAL) != 1 ||
		    recv(pair[1 - end], &byte, 1, 0) != 1)
			return 0;
	return 1;
}

static int churn(int milliseconds, int rate, const int idle[2], int result[5])
{
	static int ring[RING][2];
	double start = now(), passed;
	int i, end;

	memset(result, 0, 5 * sizeof(*result));
	memset(ring, -1, sizeof(ring));
	while ((passed = now() - start) * 1000 < milliseconds) {
		int *pair = ring[result[0] % RING];

		if (result[0] >= passed * rate) {
			usleep(500);
			continue;
		}
		if (pair[0] >= 0 && !works(pair))
			result[4]++;
		for (end = 0; end < 2 && pair[0] >= 0; end++)
			abandon(pair[end]);
		if (make_pair(pair) < 0)
			return -1;
		result[0]++;
		for (end = 0; end < 2; end++) {
			int keepalive, has;

			if (get(pair[end], 0, &keepalive) < 0 || get(pair[end], 1, &has) < 0)
				return -1;
			if (keepalive && has == idle[0])
				result[1]++;
			else if (keepalive && has == idle[1])
				result[2]++;
			else
				result[3]++;
		}
	}
	for (i = 0; i < RING; i++) {
		if (ring[i][0] >= 0 && !works(ring[i]))
			result[4]++;
		for (end = 0; end < 2 && ring[i][0] >= 0; end++)
			abandon(ring[i][end]);
	}
	return 0;
}

int main(void)
{
	static char line[1024];
	struct options wanted, other;
	int *w = wanted.value, *o = other.value;
	int number, rate, idle[2], result[5];
	char text[300];

	setlinebuf(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		errno = EINVAL;
		if (sscanf(line, "listen %299s", text) == 1) {
			if (listen_at(text) == 0) {
				puts("ok 0");
				continue;
			}
		} else if (sscanf(line, "connect %d", &number) == 1) {
			if (add(number) == 0) {
				printf("ok %d\n", number);
				continue;
			}
		} else if (sscanf(line, "count %d %d %d %d %d", w, w + 1, w + 2, w + 3,
				  w + 4) == OPTIONS) {
			if (count(&wanted, &number, &other) == 0) {
				printf("ok %d %d %d %d %d %d\n", number, o[0], o[1], o[2], o[3],
				       o[4]);
				continue;
			}
		} else if (sscanf(line, "churn %d %d %d %d", &number, &rate, idle,
				  idle + 1) == 4) {
			if (churn(number, rate, idle, result) == 0) {
				printf("ok %d %d %d %d %d\n", result[0], result[1], result[2],
				       result[3], result[4]);
				continue;
			}
		}
		printf("err %d\n", errno);
	}
	return 0;
}
