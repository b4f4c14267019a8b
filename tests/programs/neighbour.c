// Somebody else's sock_ops program: it counts how often it is called and sets
// nothing. Written as BPF instructions, so that no BPF compiler is needed.
//
//     neighbour CGROUP link|shared|alone
//
// attaches it as a link, or the older way with or without leave for others
// (BPF_F_ALLOW_MULTI), says "ok 0", and then answers each line of its input with
// "ok COUNT". At the end of its input it detaches and ends.

#include <fcntl.h>
#include <linux/bpf.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

static int bpf(int command, union bpf_attr *attr)
{
	return syscall(__NR_bpf, command, attr, sizeof(*attr));
}

static int fail(const char *what)
{
	perror(what);
	return 1;
}

static int new_counter(void)
{
	union bpf_attr attr = {
		.map_type = BPF_MAP_TYPE_ARRAY,
		.key_size = 4,
		.value_size = 8,
		.max_entries = 1,
	};

	return bpf(BPF_MAP_CREATE, &attr);
}

static int load(int map)
{
	struct bpf_insn program[] = {
		// *(u32 *)(fp - 4) = 0
		{ .code = BPF_ST | BPF_MEM | BPF_W, .dst_reg = 10, .off = -4 },
		// r2 = fp - 4
		{ .code = BPF_ALU64 | BPF_MOV | BPF_X, .dst_reg = 2, .src_reg = 10 },
		{ .code = BPF_ALU64 | BPF_ADD | BPF_K, .dst_reg = 2, .imm = -4 },
		// r1 = the map, in two halves
		{ .code = BPF_LD | BPF_DW | BPF_IMM, .dst_reg = 1,
		  .src_reg = BPF_PSEUDO_MAP_FD, .imm = map },
		{ 0 },
		{ .code = BPF_JMP | BPF_CALL, .imm = BPF_FUNC_map_lookup_elem },
		// if (r0) *(u64 *)r0 += 1, atomically
		{ .code = BPF_JMP | BPF_JEQ | BPF_K, .dst_reg = 0, .off = 2 },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 1, .imm = 1 },
		{ .code = BPF_STX | BPF_ATOMIC | BPF_DW, .dst_reg = 0, .src_reg = 1,
		  .imm = BPF_ADD },
		// return 1
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 1 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	static char log[4096];
	union bpf_attr attr = {
		.prog_type = BPF_PROG_TYPE_SOCK_OPS,
		.insns = (unsigned long)program,
		.insn_cnt = sizeof(program) / sizeof(program[0]),
		.license = (unsigned long)"GPL",
		.log_buf = (unsigned long)log,
		.log_size = sizeof(log),
		.log_level = 1,
	};
	int fd;

	strcpy(attr.prog_name, "neighbour");
	fd = bpf(BPF_PROG_LOAD, &attr);
	if (fd < 0)
		fputs(log, stderr);
	return fd;
}

static int attach(int cgroup, int program, const char *how)
{
	union bpf_attr attr = { 0 };

	if (strcmp(how, "link") == 0) {
		attr.link_create.prog_fd = program;
		attr.link_create.target_fd = cgroup;
		attr.link_create.attach_type = BPF_CGROUP_SOCK_OPS;
		return bpf(BPF_LINK_CREATE, &attr);
	}
	attr.target_fd = cgroup;
	attr.attach_bpf_fd = program;
	attr.attach_type = BPF_CGROUP_SOCK_OPS;
	if (strcmp(how, "shared") == 0)
		attr.attach_flags = BPF_F_ALLOW_MULTI;
	return bpf(BPF_PROG_ATTACH, &attr);
}

static long long count(int map)
{
	unsigned int key = 0;
	unsigned long long value = 0;
	union bpf_attr attr = {
		.map_fd = map,
		.key = (unsigned long)&key,
		.value = (unsigned long)&value,
	};

	return bpf(BPF_MAP_LOOKUP_ELEM, &attr) < 0 ? -1 : (long long)value;
}

int main(int argc, char **argv)
{
	union bpf_attr detach = { 0 };
	int cgroup, map, program;
	char line[16];

	/* Before Linux 5.11 a map counts as locked memory, of which there is little. */
	struct rlimit locked = { RLIM_INFINITY, RLIM_INFINITY };

	if (argc != 3)
		return 2;
	setrlimit(RLIMIT_MEMLOCK, &locked);
	cgroup = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (cgroup < 0)
		return fail(argv[1]);
	map = new_counter();
	if (map < 0)
		return fail("map");
	program = load(map);
	if (program < 0)
		return fail("load");
	if (attach(cgroup, program, argv[2]) < 0)
		return fail("attach");

	setlinebuf(stdout);
	puts("ok 0");
	while (fgets(line, sizeof(line), stdin))
		printf("ok %lld\n", count(map));

	// A link goes with its file descriptor, the other two have to be undone.
	detach.target_fd = cgroup;
	detach.attach_bpf_fd = program;
	detach.attach_type = BPF_CGROUP_SOCK_OPS;
	if (strcmp(argv[2], "link") != 0 && bpf(BPF_PROG_DETACH, &detach) < 0)
		return fail("detach");
	return 0;
}
