// y = x W^T for one to eight rows of x, as fast as W streams past: the weights of a decoder, a token at a time.
//
// Compiled at run time, once for each variant that a program has:
//   BITS     16: W is bfloat16[outputs, inputs]; 4: packed by `gpu.pack`, with float16 scales and a float32 for each output
//   SPAN     of 4 bits: inputs that are summed before they are scaled, 32, 64 or 128; a group is a multiple of it
//   ZEROS    of 4 bits: whether groups have zero points; without them 8
//   NORM     x is float32 and RMS-normalized first; else it is bfloat16
//   ENDING   STORE: y is bfloat16; LOGITS: float32; RESIDUAL: float32, residual + x W^T; SILU: bfloat16[rows, outputs / 2],
//            silu(gate) * up, where the first half of W is gate and the second up
//
// A block has 16 * TILES outputs, and its warps split the inputs. Weights go from memory into the registers of the tensor
// cores' first operand; x is the second, with up to 8 columns, so that eight rows cost what one does. A product may take
// inputs in any order, as long as both operands take the same: the order is the one in which 16 bytes of a row arrive.
//
//   lane (g, t)      g = lane / 4: rows g and g + 8 of a tile; t = lane % 4
//   16 bits          16 bytes are inputs 8 t .. 8 t + 7 of 32
//   4 bits           4 words of 8 inputs: word i has inputs 32 i + 8 t .. + 7 of 128. Nibbles 4 apart are taken at once, as
//                    two bfloat16 128 + n: x lies in the order 0 4 1 5 2 6 3 7, and 128 + zero point times the sum of x
//                    is taken away from the sums of a span.
//
// Weights do not depend on the kernel before: with programmatic dependent launch the first ones are on their way while
// that still runs.

typedef unsigned int u32;
typedef unsigned short u16;

#define STORE 0
#define LOGITS 1
#define RESIDUAL 2
#define SILU 3

#define TILES 2
#define WARPS 8
#define THREADS (32 * WARPS)
#define ROWS 8
#define RING 4  // steps whose weights are on their way

#if BITS == 4
#define STEP 128
#define SPANS (STEP / SPAN)
#else
#define STEP 32
#endif
#define PAD 8  // bfloat16 between rows of x, so that their columns lie in different banks

__device__ __forceinline__ u32 bfloat_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float low_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ float half_float(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Weights are read once: they do not take the place of what is read again.
__device__ __forceinline__ uint4 streamed(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

__device__ __forceinline__ u32 nibbles(u32 word, int shift) { return ((word >> shift) & 0x000F000Fu) | 0x43004300u; }

struct Step {
  uint4 weight[TILES][2];
#if BITS == 4
  u16 scale[TILES][2][SPANS];
#if ZEROS
  unsigned char zero[TILES][2][SPANS];
#endif
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
few_rows(const void* __restrict__ x_, const float* __restrict__ norm, float epsilon, const uint4* __restrict__ weight,
         const u16* __restrict__ scale, const float* __restrict__ factor, const unsigned char* __restrict__ zero,
         int group, int groups, const float* residual, void* y_, int rows, int inputs, int padded, int outputs) {
  extern __shared__ uint4 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int steps = padded / STEP, share = (steps + WARPS - 1) / WARPS;
  const int first = warp * share, last = min(first + share, steps);
  const int row_words = padded * BITS / 128;  // uint4 of a row

  const uint4* from[TILES][2];
  int output[TILES][2];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = ENDING == SILU ? blockIdx.x * 16 + tile * (outputs / 2) : (blockIdx.x * TILES + tile) * 16;
      row = min(row + half * 8 + g, outputs - 1);
      output[tile][half] = row;
      from[tile][half] = weight + (long long)row * row_words + t;
    }
  }

  auto fetch = [&](Step& into, int step) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        into.weight[tile][half] = streamed(from[tile][half] + step * 4);
#if BITS == 4
#pragma unroll
        for (int span = 0; span < SPANS; ++span) {
          long long place = (long long)output[tile][half] * groups + (step * STEP + span * SPAN) / group;
          into.scale[tile][half][span] = scale[place];
#if ZEROS
          into.zero[tile][half][span] = zero[place];
#endif
        }
#endif
      }
  };

  Step ring[RING];
#pragma unroll
  for (int i = 0; i < RING; ++i)
    if (first + i < last) fetch(ring[i], first + i);

  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");

  // x as bfloat16[rows, padded + PAD], in the order of the products; behind it the sums of its spans
  u16* xs = (u16*)shared;
  const int stride = padded + PAD;
  float* sums = (float*)(xs + rows * stride);
#if NORM
  __shared__ float squares[WARPS][ROWS];
  const float* x = (const float*)x_;
  for (int n = 0; n < rows; ++n) {
    float square = 0;
    for (int k = threadIdx.x * 4; k < inputs; k += THREADS * 4) {
      float4 v = *(const float4*)(x + (long long)n * inputs + k);
      square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
#pragma unroll
    for (int other = 16; other; other >>= 1) square += __shfl_xor_sync(~0u, square, other);
    if (lane == 0) squares[warp][n] = square;
  }
  __syncthreads();
#else
  const u16* x = (const u16*)x_;
#endif
  for (int n = 0; n < rows; ++n) {
#if NORM
    float square = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) square += squares[i][n];
    const float inverse = rsqrtf(square / inputs + epsilon);
#endif
    for (int k = threadIdx.x * 8; k < padded; k += THREADS * 8) {
      u32 pairs[4] = {0, 0, 0, 0};
      if (k < inputs) {
#if NORM
        const float4* from_x = (const float4*)(x + (long long)n * inputs + k);
        const float4* from_norm = (const float4*)(norm + k);
        float4 a = from_x[0], b = from_x[1], u = from_norm[0], v = from_norm[1];
        pairs[0] = bfloat_pair(a.x * inverse * u.x, a.y * inverse * u.y);
        pairs[1] = bfloat_pair(a.z * inverse * u.z, a.w * inverse * u.w);
        pairs[2] = bfloat_pair(b.x * inverse * v.x, b.y * inverse * v.y);
        pairs[3] = bfloat_pair(b.z * inverse * v.z, b.w * inverse * v.w);
#else
        uint4 given = *(const uint4*)(x + (long long)n * inputs + k);
        pairs[0] = given.x, pairs[1] = given.y, pairs[2] = given.z, pairs[3] = given.w;
#endif
      }
#if BITS == 4
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += low_float(pairs[i]) + high_float(pairs[i]);
#pragma unroll
      for (int other = SPAN / 16; other; other >>= 1) sum += __shfl_xor_sync(__activemask(), sum, other);
      if (k % SPAN == 0) sums[n * (padded / SPAN) + k / SPAN] = sum;
      // 0 4, 1 5, 2 6, 3 7
      uint4 turned = {__byte_perm(pairs[0], pairs[2], 0x5410), __byte_perm(pairs[0], pairs[2], 0x7632),
                      __byte_perm(pairs[1], pairs[3], 0x5410), __byte_perm(pairs[1], pairs[3], 0x7632)};
      *(uint4*)(xs + n * stride + k) = turned;
#else
      *(uint4*)(xs + n * stride + k) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
#endif
    }
  }
  __syncthreads();

  float total[TILES][4] = {};
  const u16* column = xs + g * stride + t * 8;
  auto compute = [&](const Step& at, int step) {
    const u16* here = column + step * STEP;
#if BITS == 4
    float sum[TILES][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4 b = g < rows ? *(const uint4*)(here + i * 32) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        u32 p = (&at.weight[tile][0].x)[i], q = (&at.weight[tile][1].x)[i];
        multiply(sum[tile], nibbles(p, 0), nibbles(q, 0), nibbles(p, 4), nibbles(q, 4), b.x, b.y);
        multiply(sum[tile], nibbles(p, 8), nibbles(q, 8), nibbles(p, 12), nibbles(q, 12), b.z, b.w);
      }
      if ((i + 1) * 32 % SPAN == 0) {
        const int span = i * 32 / SPAN, place = step * SPANS + span, of_row = padded / SPAN;
        const float left = 2 * t < rows ? sums[2 * t * of_row + place] : 0;
        const float right = 2 * t + 1 < rows ? sums[(2 * t + 1) * of_row + place] : 0;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float by = half_float(at.scale[tile][half][span]);
#if ZEROS
            const float less = 128.0f + at.zero[tile][half][span];
#else
            const float less = 136.0f;
#endif
            total[tile][2 * half] += by * (sum[tile][2 * half] - less * left);
            total[tile][2 * half + 1] += by * (sum[tile][2 * half + 1] - less * right);
            sum[tile][2 * half] = sum[tile][2 * half + 1] = 0;
          }
      }
    }
#else
    uint4 b = g < rows ? *(const uint4*)here : uint4{0, 0, 0, 0};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      uint4 p = at.weight[tile][0], q = at.weight[tile][1];
      multiply(total[tile], p.x, q.x, p.y, q.y, b.x, b.y);
      multiply(total[tile], p.z, q.z, p.w, q.w, b.z, b.w);
    }
#endif
  };
  for (int step = first; step < last; step += RING) {
#pragma unroll
    for (int i = 0; i < RING; ++i)
      if (step + i < last) {
        compute(ring[i], step + i);
        if (step + i + RING < last) fetch(ring[i], step + i + RING);
      }
  }

  __syncthreads();  // nobody reads x any more
  float* parts = (float*)shared;  // [WARPS][ROWS][16 * TILES]
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      parts[(warp * ROWS + 2 * t + (i & 1)) * 16 * TILES + tile * 16 + (i >> 1) * 8 + g] = total[tile][i];
  __syncthreads();

  auto whole = [&](int n, int place, int row) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += parts[(i * ROWS + n) * 16 * TILES + place];
#if BITS == 4
    sum *= factor[row];
#endif
    return sum;
  };
#if ENDING == SILU
  const int half_outputs = outputs / 2;
  for (int i = threadIdx.x; i < 16 * rows; i += THREADS) {
    const int n = i / 16, place = i % 16, row = blockIdx.x * 16 + place;
    if (row >= half_outputs) continue;
    const float gate = whole(n, place, row), up = whole(n, 16 + place, half_outputs + row);
    ((u16*)y_)[(long long)n * half_outputs + row] = (u16)bfloat_pair(gate / (1 + __expf(-gate)) * up, 0);
  }
#else
  for (int i = threadIdx.x; i < 16 * TILES * rows; i += THREADS) {
    const int n = i / (16 * TILES), place = i % (16 * TILES), row = blockIdx.x * 16 * TILES + place;
    if (row >= outputs) continue;
    const float sum = whole(n, place, row);
    const long long at = (long long)n * outputs + row;
#if ENDING == STORE
    ((u16*)y_)[at] = (u16)bfloat_pair(sum, 0);
#elif ENDING == LOGITS
    ((float*)y_)[at] = sum;
#else
    ((float*)y_)[at] = residual[at] + sum;
#endif
  }
#endif
}
