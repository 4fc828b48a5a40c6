/* Faults of a machine, for LD_PRELOAD: a clock that is R1HPC_TEST_SKEW_S seconds ahead, and, where
 * R1HPC_TEST_NO_LOCKS is set, a file system without locks (what NFS says without lockd). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    const char *skew = getenv("R1HPC_TEST_SKEW_S");
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (skew && id == CLOCK_REALTIME) now->tv_sec += atol(skew);
    return code;
}

int flock(int fd, int operation) {
    static int (*real)(int, int);
    if (getenv("R1HPC_TEST_NO_LOCKS")) { errno = ENOLCK; return -1; }
    if (!real) real = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
    return real(fd, operation);
}
