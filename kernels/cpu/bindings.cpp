// The limits of the processor as functions, for benchmarks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <atomic>

#include "arrays.h"
#include "table.h"

namespace lensc {

namespace {

using namespace nanobind::literals;
using AnyBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

int64_t multiply(const std::string& product, int64_t rounds, const std::string& isa, int threads) {
    const Table& kernels = table(isa);
    require(product == "int8" || product == "int16" || product == "bfloat16" || product == "float32",
            "product " + product + " is not one of int8, int16, bfloat16, float32");
    const Product kind = product == "int8"       ? Product::int8
                         : product == "int16"    ? Product::int16
                         : product == "bfloat16" ? Product::bfloat16
                                                 : Product::float32;
    std::atomic<int64_t> operations{0};
    run_shares(threads, [&](Share) { operations += kernels.multiply(kind, rounds); });
    return operations;
}

uint64_t read(const AnyBytes& data, int streams, const std::string& isa, int threads) {
    const Table& kernels = table(isa);
    require(streams >= 1, "streams: at least 1");
    std::atomic<uint64_t> all{0};
    run_shares(threads, [&](Share share) { all ^= kernels.read(data.data(), int64_t(data.shape(0)), streams, share); });
    return all;
}

}  // namespace

void bind_peak(nb::module_& module) {
    module.def("multiply", multiply, "product"_a, "rounds"_a, "isa"_a = "", "threads"_a = 1,
               "Multiply and add in registers, in every thread; return how many operations that were.\n\n"
               "product: int8, int16, bfloat16 or float32. Two operations for a multiplication with its addition; 0 where the\n"
               "instruction set has none for such products, or (int16) no kernel uses it. Raises ValueError for another product.");
    module.def("read", read, "data"_a, "streams"_a, "isa"_a = "", "threads"_a = 1,
               "Read `data: uint8[n]` once, a share of it by each thread in `streams` places at once. What is returned\n"
               "depends on all of it and says nothing else.");
}

}  // namespace lensc
