// y = x W^T for one to eight rows of x: one linear of a decoder, a few tokens at a time. NORM and ENDING: see `linear`.
//
// Weights do not depend on the kernel before: with programmatic dependent launch the first ones are on their way while
// that still runs.

#include "streamed.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
few_rows(const void* x, const float* norm, float epsilon, const char* weight, const u16* scale, const float* factor,
         const unsigned char* zero, int groups, const float* residual, void* y, int rows, int inputs, int padded,
         int outputs) {
  extern __shared__ uint4 shared[];
  const Linear only{weight, scale, factor, zero, groups, inputs, padded, outputs, ENDING == SILU};
  const auto table = [&](int) { return only; };
  Stream<decltype(table)> stream(table, 1, (char*)shared);
  asm volatile("griddepcontrol.launch_dependents;");
  Room room((char*)shared, rows, padded);
  linear<NORM, ENDING>(only, stream, room, x, norm, epsilon, residual, y, rows,
                       [] { asm volatile("griddepcontrol.wait;" ::: "memory"); });
}
