// What kernels share that multiply a few rows of x with weights that stream past.
//
// Compiled at run time, for what a program has:
//   BITS     16: W is bfloat16[outputs, inputs]; 4: packed by `gpu.pack`, with float16 scales and a float32 for each output
//   GROUP    of 4 bits: inputs that share a scale, a multiple of 32
//   SPAN     of 4 bits: inputs that are summed before they are scaled, 32, 64 or 128, of which GROUP is a multiple
//   ZEROS    of 4 bits: whether groups have zero points; without them 8
//   MOST_ROWS  of x: 4 or 8; it matters for 4 bits
//   TILES    how many times 16 outputs a block computes at once: 1 or 2, with a gate 2
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

typedef unsigned int u32;
typedef unsigned short u16;

// What becomes of the sums, y = x W^T: bfloat16; float32; float32, residual + y; bfloat16[rows, outputs / 2],
// silu(gate) * up, where the first half of W is gate and the second up.
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

struct Linear {
  const char* weight;
  const u16* scale;
  const float* factor;
  const unsigned char* zero;
  int groups, inputs, padded, outputs;
  int gate;  // whether outputs come in pairs, SILU

  __device__ int width() const { return gate ? outputs / 2 : outputs; }  // of y
  __device__ int of_tile() const { return gate ? 16 : 16 * TILES; }      // columns of y
  __device__ int tiles() const { return (width() + of_tile() - 1) / of_tile(); }
  __device__ int first_step(int warp) const { return min(warp * share(), padded / STEP); }
  __device__ int last_step(int warp) const { return min((warp + 1) * share(), padded / STEP); }

 private:
  __device__ int share() const { return (padded / STEP + WARPS - 1) / WARPS; }
};

// Copies the steps of a warp into its ring, in the order in which they are computed: of one linear after another, as
// `table(i)` names them, without waiting for what is between them.
template <class Table>
struct Stream {
  const Table& table;
  const int count, warp, lane;
  const char* const ring;
  const u32 address;
  const char* reading;  // the step that is computed next
  u32 writing;
  int i = -1, tile = 0, step = 0, first = 0, last = 0, tiles = 0;
  Linear linear;
  const char* weight[TILES];
  const u16* scale[TILES];
  const unsigned char* zero[TILES];

  __device__ Stream(const Table& table, int count, char* shared)
      : table(table), count(count), warp(threadIdx.x / 32), lane(threadIdx.x % 32), ring(shared + warp * (DEPTH * SLOT)),
        address((u32)__cvta_generic_to_shared(ring)), reading(ring), writing(address) {
    open();
#pragma unroll
    for (int n = 0; n < DEPTH - 1; ++n) fetch();
  }

  // The next linear of which this warp has a part.
  __device__ void open() {
    while (++i < count) {
      linear = table(i);
      first = linear.first_step(warp), last = linear.last_step(warp), tiles = linear.tiles();
      tile = blockIdx.x, step = first;
      if (first < last && tile < tiles) return aim();
    }
  }

  // Addresses are made for a tile and move on from step to step.
  __device__ void aim() {
    const long long row_bytes = (long long)linear.padded * BITS / 8;
#pragma unroll
    for (int part = 0; part < TILES; ++part) {
      const int wanted = linear.gate ? tile * 16 + part * (linear.outputs / 2) : (tile * TILES + part) * 16;
      const int row = min(wanted, linear.outputs - 16);
      weight[part] = linear.weight + (row + lane / 4) * row_bytes + first * 64 + lane % 4 * 16;
#if BITS == 4
      // scales of 16 outputs, [groups, 16]: a lane copies those of two
      const long long at = ((long long)(row / 16) * linear.groups + first * STEP / GROUP + lane / 8) * 16;
      scale[part] = linear.scale + at + lane % 8 * 2;
      zero[part] = linear.zero + at + lane % 8 * 4;
#endif
    }
  }

  __device__ void fetch() {
    if (i < count) {
      const long long eight_rows = (long long)linear.padded * BITS;
#pragma unroll
      for (int part = 0; part < TILES; ++part) {
        copy_16(writing + part * 1024 + lane * 16, weight[part]);
        copy_16(writing + part * 1024 + 512 + lane * 16, weight[part] + eight_rows);
        weight[part] += 64;
#if BITS == 4
        if (lane / 8 < SPANS) {
          const int at =
              (GROUP > STEP ? step * STEP / GROUP - first * STEP / GROUP : (step - first) * (STEP / GROUP)) * 16;
          copy_4(writing + TILES * 1024 + part * SCALE_BYTES + lane * 4, scale[part] + at);
#if ZEROS
          if (lane % 8 < 4)
            copy_4(writing + TILES * (1024 + SCALE_BYTES) + part * ZERO_BYTES + lane / 8 * 16 + lane % 8 * 4,
                   zero[part] + at);
#endif
        }
#endif
      }
      writing += SLOT;
      if (writing == address + DEPTH * SLOT) writing = address;
      if (++step == last) {
        step = first, tile += gridDim.x;
        if (tile < tiles)
          aim();
        else
          open();
      }
    }
    asm volatile("cp.async.commit_group;");
  }

  // The oldest step, once it is there; the one before it makes room for another.
  __device__ const char* next() {
    __syncwarp();
    fetch();
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
    __syncwarp();
    const char* found = reading;
    reading += SLOT;
    if (reading == ring + DEPTH * SLOT) reading = ring;
    return found;
  }
};

// Where a block stages x, of 4 bits with a scale for each row and span and the sums of its integers, and where its warps
// leave their sums: float[2, WARPS, rows, 16 * TILES].
struct Room {
  char* x;
  float* scale;
  float* sum;
  float* parts;
  int buffer;

  // Behind the ring in shared memory, for linears of up to `padded` inputs.
  __device__ Room(char* shared, int rows, int padded) : x(shared + WARPS * DEPTH * SLOT), buffer(0) {
#if BITS == 4
    scale = (float*)(x + 2 * rows * (padded + 16));
    sum = scale + rows * (padded / SPAN);
    parts = sum + rows * (padded / SPAN);
#else
    scale = sum = nullptr;
    parts = (float*)(x + rows * (2 * padded + 16));
#endif
  }
};

__device__ __forceinline__ void soon(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// One linear: all threads of all blocks take part. x is bfloat16[rows, inputs], with `normed` float32 that is RMS-normalized
// first; residual may be y. `ready` waits until x and residual are there. What other blocks wrote just before is read past
// the first-level cache.
template <bool normed, int ending, class Weights, class Ready>
__device__ void linear(const Linear& l, Weights& stream, Room& room, const void* x_, const float* norm, float epsilon,
                       const float* residual, void* y_, int rows, Ready ready) {
  __shared__ float squares[WARPS][8];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int inputs = l.inputs, padded = l.padded;
#if BITS == 4
  const int stride = padded + 16, spans = padded / SPAN;  // columns lie in different banks
#else
  const int stride = 2 * padded + 16;
#endif

  // Eight values of a row into shared memory, in the type and order of the products.
  auto put = [&](int n, int k, const float (&v)[8]) {
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
      room.scale[n * spans + k / SPAN] = most / (127 * 254);
      room.sum[n * spans + k / SPAN] = sum;
    }
    // what a lane multiplies with of 128 inputs lies together
    char* to = room.x + 2 * n * stride + k / 128 * 128 + k % 32 * 4 + k % 128 / 32 * 8;
    *(uint2*)to = uint2{bytes(high, 0), bytes(high, 1)};
    *(uint2*)(to + stride) = uint2{bytes(low, 0), bytes(low, 1)};
#else
    *(uint4*)(room.x + n * stride + 2 * k) =
        uint4{bfloat_pair(v[0], v[1]), bfloat_pair(v[2], v[3]), bfloat_pair(v[4], v[5]), bfloat_pair(v[6], v[7])};
#endif
  };
  // What does not depend on x comes from memory while others still make it.
  if constexpr (normed) {
    for (int k = threadIdx.x * 32; k < inputs; k += THREADS * 32) soon(norm + k);
  }
  ready();

  // y = 1 / rms(x) * (x * norm) W^T: the first factor is known once all of x was seen, and joins at the end
  for (int n = 0; n < rows; ++n) {
    float square = 0;
    constexpr int ahead = normed ? 1 : 4;  // loads at once: each takes as long as all that is done with it
    for (int start = threadIdx.x * 8; start < padded; start += ahead * THREADS * 8) {
      uint4 given[ahead] = {};
      if constexpr (!normed) {
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
          const int k = start + i * THREADS * 8;
          if (k < inputs) given[i] = __ldcg((const uint4*)((const u16*)x_ + (long long)n * inputs + k));
        }
      }
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        const int k = start + i * THREADS * 8;
        if (k >= padded) break;
        float v[8] = {};
        if constexpr (normed) {
          if (k < inputs) {
            const float4* from_x = (const float4*)((const float*)x_ + (long long)n * inputs + k);
            const float4* from_norm = (const float4*)(norm + k);
            const float4 a = __ldcg(from_x), b = __ldcg(from_x + 1), c = from_norm[0], d = from_norm[1];
            square += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
            v[0] = a.x * c.x, v[1] = a.y * c.y, v[2] = a.z * c.z, v[3] = a.w * c.w;
            v[4] = b.x * d.x, v[5] = b.y * d.y, v[6] = b.z * d.z, v[7] = b.w * d.w;
          }
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const u32 pair = (&given[i].x)[j];
            v[2 * j] = __uint_as_float(pair << 16), v[2 * j + 1] = __uint_as_float(pair & 0xFFFF0000u);
          }
        }
        put(n, k, v);
      }
    }
    if constexpr (normed) {
#pragma unroll
      for (int other = 16; other; other >>= 1) square += __shfl_xor_sync(~0u, square, other);
      if (lane == 0) squares[warp][n] = square;
    }
  }
  __syncthreads();

#if BITS == 4
  const char* column = room.x + g * stride + t * 32;
#else
  const char* column = room.x + g * stride + t * 16;
  const bool is_column = g < rows;
#endif
  const int first = l.first_step(warp), last = l.last_step(warp), width = l.width(), tiles = l.tiles();
  constexpr int of_tile = ending == SILU ? 16 : 16 * TILES;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    // who ends the tile: a thread for each output and row
    const int n = threadIdx.x / of_tile, place = threadIdx.x % of_tile, column_of_y = tile * of_tile + place;
    const bool ends = n < rows && column_of_y < width;
    const long long at = (long long)n * width + column_of_y;
    // what it takes for that, asked for in time
    const float held = ending == RESIDUAL && ends ? __ldcg(residual + at) : 0;
#if BITS == 4
    const float of_y = ends ? __ldg(l.factor + column_of_y) : 0;
    const float of_up = ending == SILU && ends ? __ldg(l.factor + width + column_of_y) : 0;
#else
    const float of_y = 1, of_up = 1;
#endif

#if BITS == 4
    float total[TILES][SETS][2] = {};
#else
    float total[TILES][4] = {};
#endif
    for (int step = first; step < last; ++step) {
      const char* from = stream.next();
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
            const float by_x = room.scale[n * spans + step * SPANS + span], of_x = room.sum[n * spans + step * SPANS + span];
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
    float* mine = room.parts + (room.buffer * WARPS + warp) * rows * 16 * TILES;
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
      const float* all = room.parts + (room.buffer * WARPS * rows + n) * 16 * TILES + place;
      float y = 0, up = 0, by = 1;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) {
        y += all[i * rows * 16 * TILES];
        if (ending == SILU) up += all[i * rows * 16 * TILES + 16];
      }
      if constexpr (normed) {
        float square = 0;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) square += squares[i][n];
        by = rsqrtf(square / inputs + epsilon);
      }
      y *= by * of_y;
      if (ending == SILU) up *= by * of_up;
      if constexpr (ending == SILU)
        ((u16*)y_)[at] = (u16)bfloat_pair(y / (1 + __expf(-y)) * up, 0);
      else if constexpr (ending == STORE)
        ((u16*)y_)[at] = (u16)bfloat_pair(y, 0);
      else
        ((float*)y_)[at] = held + y;
    }
    room.buffer ^= 1;
  }
}
