/*
 * Registers the guest RAM of the process it is preloaded into for asynchronous write protection, so that
 * migd can read from outside which pages were written (PAGEMAP_SCAN on /proc/PID/pagemap).
 *
 * It interposes mmap and does no more than that: it starts no thread, answers no fault (the kernel resolves
 * them itself, that is what WP_ASYNC means) and changes no argument or result. A mapping that cannot be
 * registered works as it would have without it, is named in one line on stderr, and stays untracked.
 *
 * Which mappings are guest RAM: shared, writable ones of a file that MIGD_RAM names (a list with colons
 * between: what /proc/self/fd/N says, or the last part of that, a memfd without its "memfd:"). Without
 * MIGD_RAM: of any file in memory, from 16 MiB up.
 */

#undef _FILE_OFFSET_BITS /* else the header makes "mmap" another name of mmap64, and both are defined here */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef __LP64__
#error "only 64 bit: elsewhere mmap takes its offset in other units"
#endif

/* Newer than the kernel headers of a distribution may be. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define WP_HUGETLBFS_SHMEM (1ULL << 12)
#define WP_UNPOPULATED (1ULL << 13)
#define WP_ASYNC (1ULL << 15)

#define TMPFS 0x01021994u
#define HUGETLBFS 0x958458f6u
#define LEAST_BYTES ((size_t)16 << 20) /* no firmware, no video memory: those are smaller */

static void complain(const char *path, const char *what, int code, const char *remedy)
{
    char line[512];
    int length = snprintf(line, sizeof line, "migd preload: %.256s stays untracked: %s: %s%s\n", path, what,
                          strerror(code), remedy);
    if (length >= (int)sizeof line)
        length = sizeof line - 1;
    if (write(STDERR_FILENO, line, (size_t)length) < 0)
        return; /* nobody is there to be told */
}

/* What /proc says the file is called; false for one without a name. */
static int name_of(int fd, char *path, size_t size)
{
    static const char deleted[] = " (deleted)";
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, size - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    ssize_t rest = length - (ssize_t)(sizeof deleted - 1);
    if (rest > 0 && strcmp(path + rest, deleted) == 0)
        path[rest] = 0;
    return 1;
}

static int listed(const char *names, const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *last = slash ? slash + 1 : path;
    if (strncmp(last, "memfd:", 6) == 0)
        last += 6;
    while (*names) {
        size_t length = strcspn(names, ":");
        if (length && ((strlen(path) == length && strncmp(names, path, length) == 0) ||
                       (strlen(last) == length && strncmp(names, last, length) == 0)))
            return 1;
        names += length + (names[length] == ':');
    }
    return 0;
}

/*
 * A userfaultfd for each mapping: no state, hence no lock, and nothing that a fork could leave half done. It
 * is never closed: the registration ends with the descriptor.
 */
static void track(void *address, size_t length, const char *path)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (fd < 0) {
        complain(path, "userfaultfd", errno, "");
        return;
    }
    struct uffdio_api api = {.api = UFFD_API, .features = WP_ASYNC | WP_UNPOPULATED | WP_HUGETLBFS_SHMEM};
    struct uffdio_register range = {.range = {(uintptr_t)address, length}, .mode = UFFDIO_REGISTER_MODE_WP};
    if (ioctl(fd, UFFDIO_API, &api) != 0)
        complain(path, "the kernel lacks WP_ASYNC on shared memory", errno, " (it came with Linux 6.7)");
    else if (ioctl(fd, UFFDIO_REGISTER, &range) != 0)
        complain(path, "UFFDIO_REGISTER", errno, "");
    else
        return;
    close(fd);
}

static void track_if_ram(void *address, size_t length, int fd)
{
    char path[4096];
    const char *names = getenv("MIGD_RAM");
    int named = names && *names;
    struct stat file;
    struct statfs system;
    if (!named && length < LEAST_BYTES)
        return;
    if (fstat(fd, &file) != 0 || !S_ISREG(file.st_mode) || fstatfs(fd, &system) != 0)
        return;
    uint32_t kind = (uint32_t)system.f_type;
    if (!name_of(fd, path, sizeof path) || (named && !listed(names, path)))
        return;
    if (kind != TMPFS && kind != HUGETLBFS) {
        if (named)
            complain(path, "not a file in memory (tmpfs, hugetlbfs, memfd)", EOPNOTSUPP, "");
        return;
    }
    /* The kernel has rounded the length up; registering takes whole pages. */
    size_t page = kind == HUGETLBFS ? (size_t)file.st_blksize : (size_t)sysconf(_SC_PAGESIZE);
    track(address, (length + page - 1) / page * page, path);
}

static void *map(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
    /* Not dlsym(RTLD_NEXT): an allocator may map before the dynamic linker is ready to answer that. */
    void *mapped = (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
    int type = flags & MAP_TYPE;
    if (mapped == MAP_FAILED || flags & MAP_ANONYMOUS || !(protection & PROT_WRITE) ||
        (type != MAP_SHARED && type != MAP_SHARED_VALIDATE))
        return mapped;
    int before = errno;
    track_if_ram(mapped, length, fd);
    errno = before;
    return mapped;
}

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    return map(address, length, protection, flags, fd, offset);
}

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
    return map(address, length, protection, flags, fd, offset);
}
