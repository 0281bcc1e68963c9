// What a processor reaches at best, to measure kernels against: products in registers, and memory that is only read.
#pragma once
#include <cstdint>

#include "share.h"

namespace lensc {

enum class Product { int8, int16, bfloat16, float32 };

}  // namespace lensc
