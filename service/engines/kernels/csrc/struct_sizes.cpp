// The sizes of the argument structs, for the check of the binding (`abi.py`).

#include "kernel_args.h"

#define EXPORT_SIZE(Args) \
    extern "C" std::int64_t sizeof_##Args() { return sizeof(Args); }

EXPORT_SIZE(RmsNormArgs)
EXPORT_SIZE(ApplyRopeArgs)
EXPORT_SIZE(ActAndMulArgs)
EXPORT_SIZE(LinearArgs)
EXPORT_SIZE(GatedMlpArgs)
EXPORT_SIZE(NormQkvArgs)
EXPORT_SIZE(AttnOutMlpArgs)
EXPORT_SIZE(AttentionArgs)
