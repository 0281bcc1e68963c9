// y = x W^T for one to eight rows of x, as fast as W streams past: the weights of a decoder, a token at a time.
//
// Compiled at run time, once for each variant that a program has:
//   BITS     16: W is bfloat16[outputs, inputs]; 4: packed by `gpu.pack`, with float16 scales and a float32 for each output
//   GROUP    of 4 bits: inputs that share a scale, a multiple of 32
//   SPAN     of 4 bits: inputs that are summed before they are scaled, 32, 64 or 128, of which GROUP is a multiple
//   ZEROS    of 4 bits: whether groups have zero points; without them 8
//   NORM     x is float32 and RMS-normalized first; else it is bfloat16
//   ENDING   STORE: y is bfloat16; LOGITS: float32; RESIDUAL: float32, residual + x W^T; SILU: bfloat16[rows, outputs / 2],
//            silu(gate) * up, where the first half of W is gate and the second up
//
//   MOST_ROWS  of x: 4 or 8; it matters for 4 bits
//   TILES    how many times 16 outputs a block computes at once: 1 or 2, with SILU 2
//   WARPS, DEPTH   warps of a block, and steps of each that are on their way from memory
//
// A block stays on its processor: it stages x once, and takes every n-th tile of outputs, of which each warp has a part of
// the inputs. Weights go through a ring in shared memory, of which a lane reads what it copied itself, into the tensor
// cores' first operand; x is the second, with up to 8 columns, so that eight rows cost what one does. A product may take
// inputs in any order, as long as both operands take the same: the order is the one in which 16 bytes of a row arrive.
//
//   lane (g, t)      g = lane / 4: rows g and g + 8 of a tile; t = lane % 4
//   16 bits          16 bytes are inputs 8 t .. 8 t + 7 of 32; x is bfloat16, a column for each row
//   4 bits           4 words of 8 inputs: word i has inputs 32 i + 8 t .. + 7 of 128. Every second nibble of a word is a byte
//                    of an integer product, so x lies in the order 0 2 4 6 1 3 5 7. It is an integer of 16 bits, with a
//                    scale for each span: 254 high + low, which are two columns, so that a product of bytes is exact and
//                    takes four rows.
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
#if BITS == 4
#define SETS (MOST_ROWS > 4 ? 2 : 1)  // of four rows
#endif
#define SLOT (TILES * (1024 + SCALE_BYTES + ZERO_BYTES))  // bytes of a step of a warp

__device__ __forceinline__ u32 bfloat_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

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

__device__ __forceinline__ void multiply(int (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 bytes(const int (&v)[8], int first) {
  return (v[first] & 255) | (v[first + 2] & 255) << 8 | (v[first + 4] & 255) << 16 | (u32)v[first + 6] << 24;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
few_rows(const void* __restrict__ x_, const float* __restrict__ norm, float epsilon, const char* __restrict__ weight,
         const u16* __restrict__ scale, const float* __restrict__ factor, const unsigned char* __restrict__ zero,
         int groups, const float* residual, void* y_, int rows, int inputs, int padded, int outputs) {
  extern __shared__ uint4 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int steps = padded / STEP, share = (steps + WARPS - 1) / WARPS;
  const int first = min(warp * share, steps), last = min(first + share, steps);
  const int width = ENDING == SILU ? outputs / 2 : outputs;  // of y
  const int of_tile = ENDING == SILU ? 16 : 16 * TILES;      // columns of y
  const int tiles = (width + of_tile - 1) / of_tile;
  const long long row_bytes = (long long)padded * BITS / 8;

  // shared memory: a ring of steps for each warp; x in the order of the products, of 4 bits with a scale for each row and
  // span, float[rows, spans], and the sums of its integers; twice the sums of each warp, float[WARPS, rows, 16 * TILES]
  char* ring = (char*)shared + warp * (DEPTH * SLOT);
  char* xs = (char*)shared + WARPS * DEPTH * SLOT;
#if BITS == 4
  const int stride = padded + 16, spans = padded / SPAN;  // columns lie in different banks
  float* x_scale = (float*)(xs + 2 * rows * stride);
  float* x_sum = x_scale + rows * spans;
  float* parts = x_sum + rows * spans;
#else
  const int stride = 2 * padded + 16;
  float* parts = (float*)(xs + rows * stride);
#endif
  const u32 ring_address = (u32)__cvta_generic_to_shared(ring);

  // What is fetched next, by addresses that are made anew for a tile and move on from step to step.
  int next_tile = blockIdx.x, next_step = first;
  u32 next_slot = ring_address;
  const char* next_weight[TILES];
  const u16* next_scale[TILES];
  const unsigned char* next_zero[TILES];
  const int span_of_lane = lane / 8;  // a lane copies the scales of two outputs
  auto aim = [&] {
#pragma unroll
    for (int part = 0; part < TILES; ++part) {
      const int row = min(ENDING == SILU ? next_tile * 16 + part * width : (next_tile * TILES + part) * 16, outputs - 16);
      next_weight[part] = weight + (row + g) * row_bytes + first * 64 + t * 16;
#if BITS == 4
      const long long at = ((long long)(row / 16) * groups + first * STEP / GROUP + span_of_lane) * 16;
      next_scale[part] = scale + at + lane % 8 * 2;
      next_zero[part] = zero + at + lane % 8 * 4;
#endif
    }
  };
  auto fetch = [&] {
    if (next_tile < tiles && first < last) {
#pragma unroll
      for (int part = 0; part < TILES; ++part) {
        copy_16(next_slot + part * 1024 + lane * 16, next_weight[part]);
        copy_16(next_slot + part * 1024 + 512 + lane * 16, next_weight[part] + 8 * row_bytes);
        next_weight[part] += 64;
#if BITS == 4
        if (span_of_lane < SPANS) {
          const int at = (GROUP > STEP ? next_step * STEP / GROUP - first * STEP / GROUP : (next_step - first) * SPANS) * 16;
          copy_4(next_slot + TILES * 1024 + part * SCALE_BYTES + lane * 4, next_scale[part] + at);
#if ZEROS
          if (lane % 8 < 4)
            copy_4(next_slot + TILES * (1024 + SCALE_BYTES) + part * ZERO_BYTES + span_of_lane * 16 + lane % 8 * 4,
                   next_zero[part] + at);
#endif
        }
#endif
      }
      next_slot += SLOT;
      if (next_slot == ring_address + DEPTH * SLOT) next_slot = ring_address;
      if (++next_step == last) {
        next_step = first, next_tile += gridDim.x;
        aim();
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  aim();
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
      float v[8] = {};
      if (k < inputs) {
#if NORM
        const float4* from_x = (const float4*)((const float*)x_ + (long long)n * inputs + k);
        const float4* from_norm = (const float4*)(norm + k);
        const float4 a = from_x[0], b = from_x[1], c = from_norm[0], d = from_norm[1];
        square += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
        v[0] = a.x * c.x, v[1] = a.y * c.y, v[2] = a.z * c.z, v[3] = a.w * c.w;
        v[4] = b.x * d.x, v[5] = b.y * d.y, v[6] = b.z * d.z, v[7] = b.w * d.w;
#else
        const uint4 given = *(const uint4*)((const u16*)x_ + (long long)n * inputs + k);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const u32 pair = (&given.x)[i];
          v[2 * i] = __uint_as_float(pair << 16), v[2 * i + 1] = __uint_as_float(pair & 0xFFFF0000u);
        }
#endif
      }
#if BITS == 4
      float most = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(v[i]));
#pragma unroll
      for (int other = SPAN / 16; other; other >>= 1) most = fmaxf(most, __shfl_xor_sync(__activemask(), most, other));
      const float by = most > 0 ? 127 / most : 0;
      int high[8], low[8], sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float scaled = v[i] * by;
        high[i] = __float2int_rn(scaled);
        low[i] = __float2int_rn((scaled - high[i]) * 254);
        sum += 254 * high[i] + low[i];
      }
#pragma unroll
      for (int other = SPAN / 16; other; other >>= 1) sum += __shfl_xor_sync(__activemask(), sum, other);
      if (k % SPAN == 0) {
        x_scale[n * spans + k / SPAN] = most / (127 * 254);
        x_sum[n * spans + k / SPAN] = sum;
      }
      // what a lane multiplies with of 128 inputs lies together
      char* to = xs + 2 * n * stride + k / 128 * 128 + k % 32 * 4 + k % 128 / 32 * 8;
      *(uint2*)to = uint2{bytes(high, 0), bytes(high, 1)};
      *(uint2*)(to + stride) = uint2{bytes(low, 0), bytes(low, 1)};
#else
      *(uint4*)(xs + n * stride + 2 * k) =
          uint4{bfloat_pair(v[0], v[1]), bfloat_pair(v[2], v[3]), bfloat_pair(v[4], v[5]), bfloat_pair(v[6], v[7])};
#endif
    }
#if NORM
#pragma unroll
    for (int other = 16; other; other >>= 1) square += __shfl_xor_sync(~0u, square, other);
    if (lane == 0) squares[warp][n] = square;
#endif
  }
  __syncthreads();

#if BITS == 4
  const char* column = xs + g * stride + t * 32;
#else
  const char* column = xs + g * stride + t * 16;
  const bool is_column = g < rows;
#endif
  const char* slot = ring;
  int buffer = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    // who ends the tile: a thread for each output and row
    const int n = threadIdx.x / of_tile, place = threadIdx.x % of_tile, column_of_y = tile * of_tile + place;
    const bool ends = n < rows && column_of_y < width;
    const long long at = (long long)n * width + column_of_y;
#if ENDING == RESIDUAL
    const float held = ends ? residual[at] : 0;
#endif

#if BITS == 4
    float total[TILES][SETS][2] = {};
#else
    float total[TILES][4] = {};
#endif
    for (int step = first; step < last; ++step) {
      __syncwarp();
      fetch();
      asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
      __syncwarp();
      const char* from = slot;
      slot += SLOT;
      if (slot == ring + DEPTH * SLOT) slot = ring;
      uint4 w[TILES][2];
#pragma unroll
      for (int part = 0; part < TILES; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half) w[part][half] = *(const uint4*)(from + part * 1024 + half * 512 + lane * 16);
#if BITS == 4
#pragma unroll
      for (int set = 0; set < SETS; ++set) {
        uint4 b[2] = {};
        if (set * 8 + g < 2 * rows) {
          const uint4* here = (const uint4*)(column + set * 8 * stride + step * STEP);
          b[0] = here[0], b[1] = here[1];
        }
        const int n = min(set * 4 + t, rows - 1);  // lanes without a row compute, and write nothing
        int sum[TILES][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const u32 b0 = i % 2 ? b[i / 2].z : b[i / 2].x, b1 = i % 2 ? b[i / 2].w : b[i / 2].y;
#pragma unroll
          for (int part = 0; part < TILES; ++part) {
            const u32 p = (&w[part][0].x)[i], q = (&w[part][1].x)[i];
            multiply(sum[part], p & 0x0F0F0F0Fu, q & 0x0F0F0F0Fu, p >> 4 & 0x0F0F0F0Fu, q >> 4 & 0x0F0F0F0Fu, b0, b1);
          }
          if ((i + 1) * 32 % SPAN == 0) {
            const int span = i * 32 / SPAN;
            const float by_x = x_scale[n * spans + step * SPANS + span], of_x = x_sum[n * spans + step * SPANS + span];
#pragma unroll
            for (int part = 0; part < TILES; ++part)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const int output = span * 16 + half * 8 + g;
                const float by = half_float(((const u16*)(from + TILES * 1024 + part * SCALE_BYTES))[output]);
#if ZEROS
                const char* zeros = from + TILES * (1024 + SCALE_BYTES) + part * ZERO_BYTES;
                const float less = ((const unsigned char*)zeros)[output];
#else
                const float less = 8;
#endif
                const float y = 254 * sum[part][2 * half] + sum[part][2 * half + 1];
                total[part][set][half] += by * by_x * (y - less * of_x);
                sum[part][2 * half] = sum[part][2 * half + 1] = 0;
              }
          }
        }
      }
#else
      const uint4 b = is_column ? *(const uint4*)(column + step * STEP * 2) : uint4{0, 0, 0, 0};
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
    for (int part = 0; part < TILES; ++part) {
#if BITS == 4
#pragma unroll
      for (int set = 0; set < SETS; ++set)
        if (set * 4 + t < rows) {
          float* to = mine + (set * 4 + t) * 16 * TILES + part * 16 + g;
          to[0] = total[part][set][0], to[8] = total[part][set][1];
        }
#else
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (2 * t + (c & 1) < rows) mine[(2 * t + (c & 1)) * 16 * TILES + part * 16 + (c >> 1) * 8 + g] = total[part][c];
#endif
    }
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
