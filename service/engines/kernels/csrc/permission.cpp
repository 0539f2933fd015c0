// AMX tiles are large, so Linux gives them to a process only when it asks.

#ifdef WITH_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern "C" int ask_permission() {
#ifdef WITH_AMX
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 1;
#endif
}
