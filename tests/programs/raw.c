// What probe.c needs of a C library, as bare system calls: linked in its place
// (-nostdlib) it makes a program that no preloaded library can come between.

#define _GNU_SOURCE
#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void);

static int last_error;

int *__errno_location(void)
{
	return &last_error;
}

#if defined(__x86_64__)
__asm__(".globl _start\n_start: xor %ebp, %ebp\n and $-16, %rsp\n call start\n");

static long call(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}
#elif defined(__aarch64__)
__asm__(".globl _start\n_start: mov x29, #0\n mov x30, #0\n bl start\n");

static long call(long number, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ volatile("svc #0"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
			 : "memory");
	return x0;
}
#else
#error "the system calls of this architecture are not written down here"
#endif

static long done(long result)
{
	if (result >= 0)
		return result;
	last_error = -result;
	return -1;
}

void _exit(int code)
{
	for (;;)
		call(__NR_exit_group, code, 0, 0, 0, 0, 0);
}

void start(void)
{
	_exit(main());
}

ssize_t read(int fd, void *data, size_t size)
{
	return done(call(__NR_read, fd, (long)data, size, 0, 0, 0));
}

ssize_t write(int fd, const void *data, size_t size)
{
	return done(call(__NR_write, fd, (long)data, size, 0, 0, 0));
}

int close(int fd)
{
	return done(call(__NR_close, fd, 0, 0, 0, 0, 0));
}

int open(const char *path, int flags, ...)
{
	return done(call(__NR_openat, AT_FDCWD, (long)path, flags, 0, 0, 0));
}

int setns(int fd, int kind)
{
	return done(call(__NR_setns, fd, kind, 0, 0, 0, 0));
}

int poll(struct pollfd *fds, nfds_t count, int milliseconds)
{
	long limit[2] = { milliseconds / 1000, milliseconds % 1000 * 1000000L };

	return done(call(__NR_ppoll, (long)fds, count, (long)limit, 0, 8, 0));
}

int socket(int domain, int type, int protocol)
{
	return done(call(__NR_socket, domain, type, protocol, 0, 0, 0));
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
	return done(call(__NR_bind, fd, (long)address, length, 0, 0, 0));
}

int listen(int fd, int backlog)
{
	return done(call(__NR_listen, fd, backlog, 0, 0, 0, 0));
}

int connect(int fd, const struct sockaddr *address, socklen_t length)
{
	return done(call(__NR_connect, fd, (long)address, length, 0, 0, 0));
}

int accept(int fd, struct sockaddr *address, socklen_t *length)
{
	return done(call(__NR_accept, fd, (long)address, (long)length, 0, 0, 0));
}

int getsockname(int fd, struct sockaddr *address, socklen_t *length)
{
	return done(call(__NR_getsockname, fd, (long)address, (long)length, 0, 0, 0));
}

int setsockopt(int fd, int level, int option, const void *value, socklen_t length)
{
	return done(call(__NR_setsockopt, fd, level, option, (long)value, length, 0));
}

int getsockopt(int fd, int level, int option, void *value, socklen_t *length)
{
	return done(call(__NR_getsockopt, fd, level, option, (long)value, (long)length, 0));
}

ssize_t sendto(int fd, const void *data, size_t size, int flags,
	       const struct sockaddr *address, socklen_t length)
{
	return done(call(__NR_sendto, fd, (long)data, size, flags, (long)address, length));
}

ssize_t recvfrom(int fd, void *data, size_t size, int flags,
		 struct sockaddr *address, socklen_t *length)
{
	return done(call(__NR_recvfrom, fd, (long)data, size, flags, (long)address,
			 (long)length));
}
