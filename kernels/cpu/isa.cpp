// Which instruction sets this processor has. The one place that chooses.
#include <cstdlib>
#include <stdexcept>

#include "table.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

namespace lensc {

#define LENSC_DECLARE(isa) \
    namespace isa {        \
    extern const Table kernels; \
    }

LENSC_DECLARE(generic)
#if defined(__x86_64__)
LENSC_DECLARE(avx2)
LENSC_DECLARE(avxvnni)
LENSC_DECLARE(avx512)
LENSC_DECLARE(amx)
#elif defined(__aarch64__)
LENSC_DECLARE(neon)
#endif

namespace {

#if defined(__x86_64__)

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
#if defined(LENSC_EMULATED)
    return true;
#endif
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi");
}

bool has_amx() {
#if defined(LENSC_EMULATED)
    return true;
#elif defined(__linux__)
    if (!has_avx512() || !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("amx-int8") ||
        !__builtin_cpu_supports("amx-bf16"))
        return false;
    // tiles are 8 KB of state for each thread, which Linux grants on request only (arch/x86/include/uapi/asm/prctl.h)
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

#endif

struct Choice {
    const Table* kernels;
    bool usable;
};

// The best first.
const std::vector<Choice>& choices() {
    static const std::vector<Choice> found = {
#if defined(__x86_64__)
        {&amx::kernels, has_amx()},
        {&avx512::kernels, has_avx512()},
        {&avxvnni::kernels, has_avx2() && __builtin_cpu_supports("avxvnni")},
        {&avx2::kernels, has_avx2()},
#elif defined(__aarch64__) && defined(__linux__)
        {&neon::kernels, (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0},
#elif defined(__aarch64__)
        {&neon::kernels, true},
#endif
        {&generic::kernels, true},
    };
    return found;
}

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Choice& choice : choices())
        if (choice.usable) names.emplace_back(choice.kernels->isa);
    return names;
}

const Table& table(std::string_view isa) {
    for (const Choice& choice : choices())
        if (choice.usable && (isa.empty() || isa == choice.kernels->isa)) return *choice.kernels;
    std::string known;
    for (const std::string& name : usable_isas()) known += (known.empty() ? "" : ", ") + name;
    throw std::invalid_argument("instruction set " + std::string(isa) + " is not usable here; expected one of " + known);
}

}  // namespace lensc
