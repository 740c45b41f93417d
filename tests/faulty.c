/* fsync and fdatasync that fail or take half a second, as the file named by VIDGEN_TEST_FAULT says; loaded with LD_PRELOAD by test_disk.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int troubled(void) {
    const char *path = getenv("VIDGEN_TEST_FAULT");
    char word[8] = {0};
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return 0;
    if (read(fd, word, 7) < 0) word[0] = 0;
    close(fd);
    if (!strncmp(word, "slow", 4)) usleep(500000);
    if (!strncmp(word, "eio", 3)) { errno = EIO; return 1; }
    return 0;
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return troubled() ? -1 : real(fd);
}

int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return troubled() ? -1 : real(fd);
}
