// A program with TCP sockets that does what its standard input says, one system
// call a line, and answers each with one line: "ok VALUE" or "err ERRNO". It ends
// with its input. It sets no option that it is not told to set.
//
//     socket DOMAIN TYPE PROTOCOL           ok FD
//     bind FD ADDRESS                       ok 0
//     listen FD BACKLOG                     ok 0
//     name FD                               ok ADDRESS
//     connect FD ADDRESS                    ok 0
//     accept FD                             ok FD
//     set FD LEVEL OPTION VALUE [LENGTH]    ok 0
//     get FD LEVEL OPTION                   ok VALUE
//     send FD FLAGS BYTES [ADDRESS]         ok COUNT
//     recv FD                               ok COUNT
//     poll FD EVENTS MILLISECONDS           ok REVENTS
//     close FD                              ok 0
//     open PATH                             ok FD
//     setns FD                              ok 0
//
// Numbers are decimal, BYTES is hexadecimal and ADDRESS is a struct sockaddr in
// hexadecimal, so that nothing has to be parsed here: the same source is built
// against the C library and, with raw.c in its place, on system calls alone.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <unistd.h>

#define WORDS 8

static char line[1024];
static char *word[WORDS];

static int read_line(void)
{
	unsigned long used = 0;

	while (used < sizeof(line) - 1) {
		if (read(0, line + used, 1) != 1)
			return 0;
		if (line[used] == '\n')
			break;
		used++;
	}
	line[used] = 0;
	return 1;
}

static void split(void)
{
	char *at = line;
	int i;

	for (i = 0; i < WORDS; i++) {
		word[i] = at;
		while (*at && *at != ' ')
			at++;
		if (*at)
			*at++ = 0;
	}
}

static int is(const char *name)
{
	const char *at = word[0];

	while (*at && *at == *name) {
		at++;
		name++;
	}
	return *at == *name;
}

static int number(int i)
{
	unsigned int value = 0;
	const char *at;

	for (at = word[i]; *at >= '0' && *at <= '9'; at++)
		value = value * 10 + (*at - '0');
	return value;
}

static int nibble(char digit)
{
	return digit <= '9' ? digit - '0' : digit - 'a' + 10;
}

static unsigned int bytes(int i, unsigned char *into, unsigned int room)
{
	const char *at = word[i];
	unsigned int n;

	for (n = 0; n < room && at[0] && at[1]; n++, at += 2)
		into[n] = nibble(at[0]) << 4 | nibble(at[1]);
	return n;
}

static void answer(const char *kind, const char *value, unsigned int length)
{
	static char out[512];
	unsigned int used = 0, i;

	while (*kind)
		out[used++] = *kind++;
	for (i = 0; i < length; i++)
		out[used++] = value[i];
	out[used++] = '\n';
	if (write(1, out, used) < 0)
		_exit(1);
}

static void answer_number(const char *kind, unsigned int value)
{
	char digits[12];
	int i = sizeof(digits);

	do {
		digits[--i] = '0' + value % 10;
		value /= 10;
	} while (value);
	answer(kind, digits + i, sizeof(digits) - i);
}

static void answer_bytes(const unsigned char *value, unsigned int length)
{
	static char text[256];
	unsigned int i;

	for (i = 0; i < length && 2 * i < sizeof(text); i++) {
		text[2 * i] = "0123456789abcdef"[value[i] >> 4];
		text[2 * i + 1] = "0123456789abcdef"[value[i] & 15];
	}
	answer("ok ", text, 2 * i);
}

static int run(void)
{
	static unsigned char data[256];
	/* More than a page. */
	static unsigned char option[8192];
	static struct sockaddr_storage address;
	struct sockaddr *to = (struct sockaddr *)&address;
	socklen_t length = sizeof(address);
	struct pollfd wait;
	int fd = number(1), value, result;
	unsigned int size;

	if (is("socket"))
		return socket(number(1), number(2), number(3));
	if (is("bind")) {
		length = bytes(2, (unsigned char *)to, sizeof(address));
		return bind(fd, to, length);
	}
	if (is("listen"))
		return listen(fd, number(2));
	if (is("connect")) {
		length = bytes(2, (unsigned char *)to, sizeof(address));
		return connect(fd, to, length);
	}
	if (is("accept"))
		return accept(fd, 0, 0);
	if (is("set")) {
		value = number(4);
		__builtin_memcpy(option, &value, sizeof(value));
		length = *word[5] ? (socklen_t)number(5) : sizeof(value);
		return setsockopt(fd, number(2), number(3), option, length);
	}
	if (is("get")) {
		length = sizeof(value);
		result = getsockopt(fd, number(2), number(3), &value, &length);
		return result < 0 ? result : value;
	}
	if (is("send")) {
		size = bytes(3, data, sizeof(data));
		length = bytes(4, (unsigned char *)to, sizeof(address));
		return sendto(fd, data, size, number(2) | MSG_NOSIGNAL,
			      length ? to : 0, length);
	}
	if (is("recv"))
		return recvfrom(fd, data, sizeof(data), 0, 0, 0);
	if (is("poll")) {
		wait.fd = fd;
		wait.events = number(2);
		wait.revents = 0;
		result = poll(&wait, 1, number(3));
		return result < 0 ? result : wait.revents;
	}
	if (is("close"))
		return close(fd);
	if (is("open"))
		return open(word[1], O_RDONLY | O_CLOEXEC);
	if (is("setns"))
		return setns(fd, CLONE_NEWNET);
	errno = ENOSYS;
	return -1;
}

int main(void)
{
	static struct sockaddr_storage address;
	socklen_t length;
	int result;

	while (read_line()) {
		split();
		if (is("name")) {
			length = sizeof(address);
			result = getsockname(number(1), (struct sockaddr *)&address, &length);
			if (result == 0) {
				answer_bytes((unsigned char *)&address, length);
				continue;
			}
		} else {
			result = run();
		}
		if (result < 0)
			answer_number("err ", errno);
		else
			answer_number("ok ", result);
	}
	return 0;
}
