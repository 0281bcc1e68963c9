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
//   TILES    how many times 16 outputs a block computes at once: 1 or 2, with SILU 2
//   WARPS, DEPTH   warps of a block, and steps of each that are on their way from memory
//
// A block stays on its processor: it stages x once, and takes every n-th tile of outputs, of which each warp has a part of
// the inputs. Weights go through a ring in shared memory, of which a lane reads what it copied itself, into the tensor
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

#define THREADS (32 * WARPS)

#if BITS == 4
#define STEP 128
#define SPANS (STEP / SPAN)
#define SCALE_BYTES (SPANS * 32)
#define ZERO_BYTES (ZEROS * SPANS * 16)
#else
#define STEP 32
#define SCALE_BYTES 0
#define ZERO_BYTES 0
#endif
#define SLOT (TILES * (1024 + SCALE_BYTES + ZERO_BYTES))  // bytes of a step of a warp
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
__device__ __forceinline__ void copy_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void copy_4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ u32 nibbles(u32 word, int shift) { return ((word >> shift) & 0x000F000Fu) | 0x43004300u; }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
few_rows(const void* __restrict__ x_, const float* __restrict__ norm, float epsilon, const char* __restrict__ weight,
         const u16* __restrict__ scale, const float* __restrict__ factor, const unsigned char* __restrict__ zero,
         int group, int groups, const float* residual, void* y_, int rows, int inputs, int padded, int outputs) {
  extern __shared__ uint4 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int steps = padded / STEP, share = (steps + WARPS - 1) / WARPS;
  const int first = min(warp * share, steps), last = min(first + share, steps);
  const int width = ENDING == SILU ? outputs / 2 : outputs;  // of y
  const int of_tile = ENDING == SILU ? 16 : 16 * TILES;      // columns of y
  const int tiles = (width + of_tile - 1) / of_tile;
  const long long row_bytes = (long long)padded * BITS / 8;

  // shared memory: a ring of steps for each warp; x as bfloat16[rows, padded + PAD] in the order of the products; the
  // sums of its spans, float[rows, padded / SPAN]; twice the sums of each warp, float[WARPS, rows, 16 * TILES]
  char* ring = (char*)shared + warp * (DEPTH * SLOT);
  u16* xs = (u16*)((char*)shared + WARPS * DEPTH * SLOT);
  const int stride = padded + PAD;
  float* sums = (float*)(xs + rows * stride);
#if BITS == 4
  float* parts = sums + rows * (padded / SPAN);
#else
  float* parts = sums;
#endif
  const u32 ring_address = (u32)__cvta_generic_to_shared(ring);

  auto row_of = [&](int tile, int part, int half) {
    const int row = ENDING == SILU ? tile * 16 + part * width : (tile * TILES + part) * 16;
    return min(row, outputs - 16) + half * 8 + g;
  };
  int next_tile = blockIdx.x, next_step = first, next_slot = 0;
  auto fetch = [&] {
    if (next_tile < tiles && first < last) {
      u32 to = ring_address + next_slot * SLOT;
#pragma unroll
      for (int part = 0; part < TILES; ++part) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          copy_16(to + part * 1024 + half * 512 + lane * 16,
                  weight + row_of(next_tile, part, half) * row_bytes + next_step * 64 + t * 16);
#if BITS == 4
        // of 16 outputs, [groups, 16]; lane is a span and a pair of outputs
        const int block = row_of(next_tile, part, 0) / 16, span = lane / 8;
        if (span < SPANS) {
          const long long at = ((long long)block * groups + (next_step * STEP + span * SPAN) / group) * 16;
          copy_4(to + TILES * 1024 + part * SCALE_BYTES + lane * 4, scale + at + lane % 8 * 2);
#if ZEROS
          if (lane % 8 < 4)
            copy_4(to + TILES * (1024 + SCALE_BYTES) + part * ZERO_BYTES + span * 16 + lane % 8 * 4, zero + at + lane % 8 * 4);
#endif
        }
#endif
      }
      if (++next_step == last) next_step = first, next_tile += gridDim.x;
      if (++next_slot == DEPTH) next_slot = 0;
    }
    asm volatile("cp.async.commit_group;");
  };
#pragma unroll
  for (int i = 0; i < DEPTH - 1; ++i) fetch();

  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");

#if NORM
  // y = 1 / rms(x) * (x * norm) W^T: the first factor is known once all of x was seen, and joins at the end
  __shared__ float squares[WARPS][8];
#endif
  for (int n = 0; n < rows; ++n) {
#if NORM
    float square = 0;
#endif
    for (int k = threadIdx.x * 8; k < padded; k += THREADS * 8) {
      u32 pairs[4] = {0, 0, 0, 0};
      if (k < inputs) {
#if NORM
        const float4* from_x = (const float4*)((const float*)x_ + (long long)n * inputs + k);
        const float4* from_norm = (const float4*)(norm + k);
        const float4 a = from_x[0], b = from_x[1], u = from_norm[0], v = from_norm[1];
        square += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
        pairs[0] = bfloat_pair(a.x * u.x, a.y * u.y);
        pairs[1] = bfloat_pair(a.z * u.z, a.w * u.w);
        pairs[2] = bfloat_pair(b.x * v.x, b.y * v.y);
        pairs[3] = bfloat_pair(b.z * v.z, b.w * v.w);
#else
        const uint4 given = *(const uint4*)((const u16*)x_ + (long long)n * inputs + k);
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
      *(uint4*)(xs + n * stride + k) =
          uint4{__byte_perm(pairs[0], pairs[2], 0x5410), __byte_perm(pairs[0], pairs[2], 0x7632),
                __byte_perm(pairs[1], pairs[3], 0x5410), __byte_perm(pairs[1], pairs[3], 0x7632)};
#else
      *(uint4*)(xs + n * stride + k) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
#endif
    }
#if NORM
#pragma unroll
    for (int other = 16; other; other >>= 1) square += __shfl_xor_sync(~0u, square, other);
    if (lane == 0) squares[warp][n] = square;
#endif
  }
  __syncthreads();

  const u16* column = xs + g * stride + t * 8;
  const bool is_column = g < rows;
  int slot = 0, buffer = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    // who ends the tile: a thread for each output and row
    const int n = threadIdx.x / of_tile, place = threadIdx.x % of_tile, column_of_y = tile * of_tile + place;
    const bool ends = n < rows && column_of_y < width;
    const long long at = (long long)n * width + column_of_y;
#if ENDING == RESIDUAL
    const float held = ends ? residual[at] : 0;
#endif

    float total[TILES][4] = {};
    for (int step = first; step < last; ++step) {
      __syncwarp();
      fetch();
      asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
      __syncwarp();
      const char* from = ring + slot * SLOT;
      if (++slot == DEPTH) slot = 0;
      const u16* here = column + step * STEP;
      uint4 w[TILES][2];
#pragma unroll
      for (int part = 0; part < TILES; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half) w[part][half] = *(const uint4*)(from + part * 1024 + half * 512 + lane * 16);
#if BITS == 4
      float sum[TILES][2][4] = {};  // two, so that products wait for each other half as long
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 b = is_column ? *(const uint4*)(here + i * 32) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int part = 0; part < TILES; ++part) {
          const u32 p = (&w[part][0].x)[i], q = (&w[part][1].x)[i];
          multiply(sum[part][0], nibbles(p, 0), nibbles(q, 0), nibbles(p, 4), nibbles(q, 4), b.x, b.y);
          multiply(sum[part][1], nibbles(p, 8), nibbles(q, 8), nibbles(p, 12), nibbles(q, 12), b.z, b.w);
        }
        if ((i + 1) * 32 % SPAN == 0) {
          const int span = i * 32 / SPAN, of_row = padded / SPAN, of_x = step * SPANS + span;
          const float left = 2 * t < rows ? sums[2 * t * of_row + of_x] : 0;
          const float right = 2 * t + 1 < rows ? sums[(2 * t + 1) * of_row + of_x] : 0;
#pragma unroll
          for (int part = 0; part < TILES; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int output = span * 16 + half * 8 + g;
              const float by = half_float(((const u16*)(from + TILES * 1024 + part * SCALE_BYTES))[output]);
#if ZEROS
              const char* zeros = from + TILES * (1024 + SCALE_BYTES) + part * ZERO_BYTES;
              const float less = 128.0f + ((const unsigned char*)zeros)[output];
#else
              const float less = 136.0f;
#endif
#pragma unroll
              for (int side = 0; side < 2; ++side) {
                const int c = 2 * half + side;
                total[part][c] += by * (sum[part][0][c] + sum[part][1][c] - less * (side ? right : left));
                sum[part][0][c] = sum[part][1][c] = 0;
              }
            }
        }
      }
#else
      const uint4 b = is_column ? *(const uint4*)here : uint4{0, 0, 0, 0};
#pragma unroll
      for (int part = 0; part < TILES; ++part) {
        multiply(total[part], w[part][0].x, w[part][1].x, w[part][0].y, w[part][1].y, b.x, b.y);
        multiply(total[part], w[part][0].z, w[part][1].z, w[part][0].w, w[part][1].w, b.z, b.w);
      }
#endif
    }

    // Warps are at most one tile apart, so two buffers are enough for one barrier a tile.
    float* mine = parts + (buffer * WARPS + warp) * rows * 16 * TILES;
#pragma unroll
    for (int part = 0; part < TILES; ++part)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (2 * t + (c & 1) < rows)
          mine[(2 * t + (c & 1)) * 16 * TILES + part * 16 + (c >> 1) * 8 + g] = total[part][c];
    __syncthreads();
    if (ends) {
      const float* all = parts + (buffer * WARPS * rows + n) * 16 * TILES + place;
      float y = 0, up = 0, by = 1;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) {
        y += all[i * rows * 16 * TILES];
        if (ENDING == SILU) up += all[i * rows * 16 * TILES + 16];
      }
#if NORM
      float square = 0;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) square += squares[i][n];
      by = rsqrtf(square / inputs + epsilon);
#endif
#if BITS == 4
      if (ENDING == SILU) up *= by * factor[width + column_of_y];
      y *= by * factor[column_of_y];
#else
      if (ENDING == SILU) up *= by;
      y *= by;
#endif
#if ENDING == SILU
      ((u16*)y_)[at] = (u16)bfloat_pair(y / (1 + __expf(-y)) * up, 0);
#elif ENDING == STORE
      ((u16*)y_)[at] = (u16)bfloat_pair(y, 0);
#elif ENDING == LOGITS
      ((float*)y_)[at] = y;
#else
      ((float*)y_)[at] = held + y;
#endif
    }
    buffer ^= 1;
  }
}
