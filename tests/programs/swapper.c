// A program that swaps what its descriptors lead to, as fast as it can, until its
// input ends: network namespaces that nothing else holds, and a FIFO that nobody
// writes to. Whoever opens /proc/PID/fd/N after a look at it may get the other
// one, and is blocked by the FIFO. Nothing of this takes privileges.
//
//     swapper FIFO
//         says "ok COUNT" once it swaps so many descriptors

#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#define COUNT 8
#define FIRST 200

// A namespace of a process that has ended.
static int orphan(void)
{
	char path[64];
	int there[2], over[2], file;
	char byte;
	pid_t child;

	if (pipe(there) || pipe(over))
		return -1;
	child = fork();
	if (child == 0) {
		close(over[1]);
		if (unshare(CLONE_NEWUSER | CLONE_NEWNET) ||
		    write(there[1], "x", 1) != 1)
			_exit(1);
		_exit(read(over[0], &byte, 1) != 0);
	}
	close(there[1]);
	close(over[0]);
	if (child < 0 || read(there[0], &byte, 1) != 1)
		return -1;
	snprintf(path, sizeof(path), "/proc/%d/ns/net", child);
	file = open(path, O_RDONLY | O_CLOEXEC);
	close(over[1]);
	close(there[0]);
	waitpid(child, NULL, 0);
	return file;
}

int main(int argc, char **argv)
{
	struct pollfd input = { .fd = 0, .events = POLLIN };
	int namespaces[COUNT], fifo, i;

	// An O_PATH descriptor does: who follows the link opens it anew.
	if (argc != 2 || (fifo = open(argv[1], O_PATH)) < 0)
		return 1;
	for (i = 0; i < COUNT; i++)
		if ((namespaces[i] = orphan()) < 0)
			return 2;
	printf("ok %d\n", COUNT);
	fflush(stdout);
	while (poll(&input, 1, 0) == 0) {
		for (i = 0; i < COUNT; i++)
			dup2(namespaces[i], FIRST + i);
		for (i = 0; i < COUNT; i++)
			dup2(fifo, FIRST + i);
	}
	return 0;
}
