// The loads of the benchmark. Each run is bounded, ends by itself, and is killed
// when the program that started it ends. All print one line.
//
//     load churn OPTIONS THREADS COUNT ADDRESS CGROUP NETNS CGROUP NETNS
//         COUNT times in each thread: connect, accept, close both ends. The first
//         cgroup and namespace are the listeners', the others the clients'; "-"
//         stays. OPTIONS: "own" sets keepalive and its timers on both ends, "-"
//         nothing. CPU is that of one connection: the median of bursts, so that
//         what interrupted one of them falls out   CONNECTIONS WALL CPU
//     load stream MEGABYTES TRIPS CGROUP
//         through one connection and back: so much data, so many single bytes
//                                                   WALL CPU WALL CPU
//     load hold COUNT CGROUP
//         so many established sockets until the input ends   COUNT
//     load time CGROUP PROGRAM ARGUMENTS
//         runs a program without output             WALL CPU RSS EXIT
//     load guard CGROUP PROGRAM ARGUMENTS
//         becomes a program that ends with the one that started it
//
// Times are in nanoseconds, RSS is the peak in kB.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// Nothing here takes longer, whatever goes wrong.
#define LIMIT 600
#define WARM_UP 50
#define MAX_THREADS 64
// About a millisecond.
#define BURST 25
#define BLOCK (64 * 1024)

static void fail(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static long long at(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void join_cgroup(const char *path)
{
	int fd;

	if (strcmp(path, "-") == 0)
		return;
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, "0", 1) != 1)
		fail(path);
	close(fd);
}

static void join_netns(const char *path)
{
	int fd;

	if (strcmp(path, "-") == 0)
		return;
	fd = open(path, O_RDONLY);
	if (fd < 0 || setns(fd, CLONE_NEWNET) < 0)
		fail(path);
	close(fd);
}

static void set_options(int fd)
{
	int on = 1, idle = 60, interval = 10, probes = 6;

	if (setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on)) < 0 ||
	    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle)) < 0 ||
	    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval)) < 0 ||
	    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes)) < 0)
		fail("setsockopt");
}

struct worker {
	pthread_t thread;
	struct sockaddr_in address;
	int listener, cpu, count, own;
	long long *bursts;
};

static pthread_barrier_t barrier;

static void listen_at(struct worker *worker, const char *address)
{
	socklen_t length = sizeof(worker->address);

	worker->address.sin_family = AF_INET;
	if (inet_pton(AF_INET, address, &worker->address.sin_addr) != 1)
		fail(address);
	worker->listener = socket(AF_INET, SOCK_STREAM, 0);
	if (worker->listener < 0 ||
	    bind(worker->listener, (struct sockaddr *)&worker->address, length) < 0 ||
	    listen(worker->listener, 128) < 0 ||
	    getsockname(worker->listener, (struct sockaddr *)&worker->address, &length) < 0)
		fail("listen");
}

static void make_pair(const struct worker *worker, int pair[2])
{
	pair[0] = socket(AF_INET, SOCK_STREAM, 0);
	if (pair[0] < 0)
		fail("socket");
	if (worker->own)
		set_options(pair[0]);
	if (connect(pair[0], (struct sockaddr *)&worker->address, sizeof(worker->address)) < 0)
		fail("connect");
	pair[1] = accept(worker->listener, 0, 0);
	if (pair[1] < 0)
		fail("accept");
	if (worker->own)
		set_options(pair[1]);
}

static void turn(const struct worker *worker, int count)
{
	int pair[2];

	while (count-- > 0) {
		make_pair(worker, pair);
		close(pair[0]);
		close(pair[1]);
	}
}

static void *work(void *argument)
{
	const struct worker *worker = argument;
	cpu_set_t cpus;
	long long start;
	int i;

	if (worker->cpu >= 0) {
		CPU_ZERO(&cpus);
		CPU_SET(worker->cpu, &cpus);
		// Where it may not choose, the kernel does.
		sched_setaffinity(0, sizeof(cpus), &cpus);
	}
	turn(worker, WARM_UP);
	pthread_barrier_wait(&barrier);
	for (i = 0; i < worker->count / BURST; i++) {
		start = at(CLOCK_THREAD_CPUTIME_ID);
		turn(worker, BURST);
		worker->bursts[i] = at(CLOCK_THREAD_CPUTIME_ID) - start;
	}
	pthread_barrier_wait(&barrier);
	return 0;
}

static int by_size(const void *a, const void *b)
{
	long long first = *(const long long *)a, second = *(const long long *)b;

	return (first > second) - (first < second);
}

static void churn(char **argument)
{
	static struct worker workers[MAX_THREADS];
	int threads = atoi(argument[1]), count = atoi(argument[2]), bursts, i;
	long long wall, *cpu;

	bursts = count / BURST;
	cpu = calloc(threads * bursts + 1, sizeof(*cpu));
	if (!cpu || bursts < 1)
		fail("memory");
	if (threads < 1 || threads > MAX_THREADS)
		threads = 1;
	join_cgroup(argument[4]);
	join_netns(argument[5]);
	for (i = 0; i < threads; i++) {
		workers[i].count = count;
		workers[i].bursts = cpu + i * bursts;
		workers[i].own = strcmp(argument[0], "own") == 0;
		workers[i].cpu = threads > 1 ? i : -1;
		listen_at(&workers[i], argument[3]);
	}
	join_cgroup(argument[6]);
	join_netns(argument[7]);
	pthread_barrier_init(&barrier, 0, threads + 1);
	for (i = 0; i < threads; i++)
		if (pthread_create(&workers[i].thread, 0, work, &workers[i]) != 0)
			fail("thread");
	pthread_barrier_wait(&barrier);
	wall = at(CLOCK_MONOTONIC);
	pthread_barrier_wait(&barrier);
	wall = at(CLOCK_MONOTONIC) - wall;
	for (i = 0; i < threads; i++)
		pthread_join(workers[i].thread, 0);
	qsort(cpu, threads * bursts, sizeof(*cpu), by_size);
	printf("%d %lld %lld\n", threads * bursts * BURST, wall, cpu[threads * bursts / 2] / BURST);
}

static void carry(int from, int to, size_t length)
{
	static char block[BLOCK];
	size_t got = 0;
	ssize_t n;

	if (write(from, block, length) != (ssize_t)length)
		fail("write");
	while (got < length) {
		n = read(to, block, length - got);
		if (n <= 0)
			fail("read");
		got += n;
	}
}

static void stream(char **argument)
{
	struct worker worker = { 0 };
	int megabytes = atoi(argument[0]), trips = atoi(argument[1]), pair[2], one = 1, i;
	long long wall, cpu;

	join_cgroup(argument[2]);
	listen_at(&worker, "127.0.0.1");
	make_pair(&worker, pair);
	for (i = 0; i < 2; i++)
		setsockopt(pair[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	for (i = 0; i < 200; i++)
		carry(pair[0], pair[1], BLOCK);
	wall = at(CLOCK_MONOTONIC);
	cpu = at(CLOCK_PROCESS_CPUTIME_ID);
	for (i = 0; i < megabytes * (1024 * 1024 / BLOCK); i++)
		carry(pair[i & 1], pair[!(i & 1)], BLOCK);
	printf("%lld ", at(CLOCK_MONOTONIC) - wall);
	printf("%lld ", at(CLOCK_PROCESS_CPUTIME_ID) - cpu);
	wall = at(CLOCK_MONOTONIC);
	cpu = at(CLOCK_PROCESS_CPUTIME_ID);
	for (i = 0; i < trips; i++) {
		carry(pair[0], pair[1], 1);
		carry(pair[1], pair[0], 1);
	}
	printf("%lld ", at(CLOCK_MONOTONIC) - wall);
	printf("%lld\n", at(CLOCK_PROCESS_CPUTIME_ID) - cpu);
}

static void hold(char **argument)
{
	struct worker worker = { 0 };
	int count = atoi(argument[0]), i, pair[2];

	join_cgroup(argument[1]);
	listen_at(&worker, "127.0.0.1");
	for (i = 0; i < count; i += 2)
		make_pair(&worker, pair);
	printf("%d\n", i);
	fflush(stdout);
	while (getchar() != EOF)
		;
}

static void time_program(char **argument)
{
	struct rusage usage;
	long long start = at(CLOCK_MONOTONIC);
	int status, null;
	pid_t child = fork();

	if (child < 0)
		fail("fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		join_cgroup(argument[0]);
		null = open("/dev/null", O_RDWR);
		dup2(null, 0);
		dup2(null, 1);
		execvp(argument[1], argument + 1);
		fail(argument[1]);
	}
	if (wait4(child, &status, 0, &usage) < 0)
		fail("wait");
	printf("%lld %lld %ld %d\n", at(CLOCK_MONOTONIC) - start,
	       (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000LL +
		       (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000LL,
	       usage.ru_maxrss, WIFEXITED(status) ? WEXITSTATUS(status) : 255);
}

static int is(const char *mode, const char *name, int has, int wants)
{
	return strcmp(mode, name) == 0 && has >= wants;
}

int main(int count, char **argument)
{
	const char *mode = count > 1 ? argument[1] : "";

	prctl(PR_SET_PDEATHSIG, strcmp(mode, "guard") == 0 ? SIGTERM : SIGKILL);
	count -= 2;
	argument += 2;
	if (is(mode, "guard", count, 2)) {
		join_cgroup(argument[0]);
		execvp(argument[1], argument + 1);
		fail(argument[1]);
	}
	alarm(LIMIT);
	if (is(mode, "churn", count, 8))
		churn(argument);
	else if (is(mode, "stream", count, 3))
		stream(argument);
	else if (is(mode, "hold", count, 2))
		hold(argument);
	else if (is(mode, "time", count, 2))
		time_program(argument);
	else {
		fputs("load: the head of its source says how to use it\n", stderr);
		return 2;
	}
	return 0;
}
