// Linux permits AMX tiles only to a process that requests them, because their state is large.

#ifdef USE_AMX_BF16
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Returns 1 where this process may use AMX or the library does not use it, else 0.
extern "C" int request_amx_permission() {
#ifdef USE_AMX_BF16
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 1;
#endif
}
