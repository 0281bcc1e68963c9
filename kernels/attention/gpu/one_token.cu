// Grouped-query attention of one token at the end of a cache, in one launch: its query and key are rotated, its key and value
// go into the cache, and the keys are split among blocks. The block that ends last for a head sums up the others'.
//
// Compiled at run time for HEADS and KV_HEADS. Heads have 128 dimensions. The past is on its way while the kernel before
// still runs (programmatic dependent launch).

typedef unsigned int u32;
typedef unsigned short u16;

#define DIM 128
#define WARPS 16
#define THREADS (32 * WARPS)
#define SHARED_BY (HEADS / KV_HEADS)  // query heads that read the same keys
#define LANES 16                      // that take a key together, 8 dimensions each
#define AT_ONCE (THREADS / LANES)     // keys of a block at once

__device__ __forceinline__ void soon(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

__device__ __forceinline__ u32 bfloat_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float bfloat(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ void floats(uint4 given, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 pair = (&given.x)[i];
    v[2 * i] = __uint_as_float(pair << 16), v[2 * i + 1] = __uint_as_float(pair & 0xFFFF0000u);
  }
}

// A part of the sums of a softmax: of several parts the sums are those of all keys.
struct Part {
  float largest[SHARED_BY], total[SHARED_BY], mixed[SHARED_BY][8];
};

// qkv: bfloat16[(HEADS + 2 * KV_HEADS) * DIM]; keys, values: bfloat16[KV_HEADS, capacity, DIM]; past: how many tokens they
// hold; frequencies: float32[DIM / 2]; out: bfloat16[HEADS * DIM]. What blocks of a head tell the last of them, by split and
// query head: float32[KV_HEADS, splits, SHARED_BY] and [.., DIM]; finished: uint32[KV_HEADS], zeros, also behind it.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
one_token(const u16* qkv, u16* all_keys, u16* all_values, int capacity, const int* filled, const float* frequencies,
          float scale, float* of_largest, float* of_total, float* of_mixed, u32* finished, u16* out) {
  __shared__ float room[WARPS * SHARED_BY * (DIM + 2)];
  __shared__ float query[SHARED_BY][DIM];
  __shared__ int is_last;
  const int past = *filled, splits = gridDim.x / KV_HEADS, head = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS;
  const int length = past + 1, each = max(2 * AT_ONCE, (length + splits - 1) / splits);
  const int used = (length + each - 1) / each, start = split * each, end = min(length, start + each);
  u16* keys = all_keys + (long long)head * capacity * DIM;
  u16* values = all_values + (long long)head * capacity * DIM;
  // the past does not depend on the token: lines of 64 values
  for (int i = threadIdx.x; i < (min(end, past) - start) * (DIM / 64); i += THREADS)
    soon(keys + (long long)start * DIM + i * 64), soon(values + (long long)start * DIM + i * 64);
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (split >= used) return;

  // rotated: x cos + rotate_half(x) sin; the angle is a product in float32, as in the portable graph
  for (int i = threadIdx.x; i < (SHARED_BY + 1) * (DIM / 2); i += THREADS) {
    const int h = i / (DIM / 2), d = i % (DIM / 2);
    if (h == SHARED_BY && end != length) break;
    const u16* x = qkv + (h < SHARED_BY ? head * SHARED_BY + h : HEADS + head) * DIM;
    const float first = bfloat(__ldcg(x + d)), second = bfloat(__ldcg(x + d + DIM / 2));
    float sine, cosine;
    sincosf((float)past * frequencies[d], &sine, &cosine);
    const float a = first * cosine - second * sine, b = second * cosine + first * sine;
    if (h < SHARED_BY) {
      const float by = scale * 1.4426950408889634f;  // exponents are of 2
      query[h][d] = a * by, query[h][d + DIM / 2] = b * by;
    } else {
      keys[(long long)past * DIM + d] = (u16)bfloat_pair(a, 0);
      keys[(long long)past * DIM + d + DIM / 2] = (u16)bfloat_pair(b, 0);
    }
  }
  if (end == length)
    for (int d = threadIdx.x; d < DIM; d += THREADS)
      values[(long long)past * DIM + d] = __ldcg(qkv + (HEADS + KV_HEADS + head) * DIM + d);
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sub = threadIdx.x % LANES;
  float q[SHARED_BY][8];
#pragma unroll
  for (int h = 0; h < SHARED_BY; ++h)
#pragma unroll
    for (int d = 0; d < 8; ++d) q[h][d] = query[h][sub * 8 + d];
  Part part;
#pragma unroll
  for (int h = 0; h < SHARED_BY; ++h) {
    part.largest[h] = -1e30f, part.total[h] = 0;
#pragma unroll
    for (int d = 0; d < 8; ++d) part.mixed[h][d] = 0;
  }
  // every lane of a warp goes round equally often, since they add up across lanes
  for (int base = start; base < end; base += AT_ONCE) {
    const int i = base + threadIdx.x / LANES;
    const bool is_key = i < end;
    const long long at = (long long)(is_key ? i : start) * DIM + sub * 8;
    const uint4 key_pairs = *(const uint4*)(keys + at), value_pairs = *(const uint4*)(values + at);
    float k[8], v[8];
    floats(key_pairs, k), floats(value_pairs, v);
#pragma unroll
    for (int h = 0; h < SHARED_BY; ++h) {
      float logit = 0;
#pragma unroll
      for (int d = 0; d < 8; ++d) logit += q[h][d] * k[d];
#pragma unroll
      for (int other = LANES / 2; other; other >>= 1) logit += __shfl_xor_sync(~0u, logit, other);
      if (!is_key) logit = -1e30f;
      const float larger = fmaxf(part.largest[h], logit);
      const float shrink = exp2f(part.largest[h] - larger), weight = is_key ? exp2f(logit - larger) : 0;
      part.largest[h] = larger, part.total[h] = part.total[h] * shrink + weight;
#pragma unroll
      for (int d = 0; d < 8; ++d) part.mixed[h][d] = part.mixed[h][d] * shrink + weight * v[d];
    }
  }
  // both keys of a warp, then all warps
  float* sums = room + warp * SHARED_BY * (DIM + 2);
#pragma unroll
  for (int h = 0; h < SHARED_BY; ++h) {
    const float other = __shfl_xor_sync(~0u, part.largest[h], LANES), larger = fmaxf(part.largest[h], other);
    const float shrink = exp2f(part.largest[h] - larger);
    float total = part.total[h] * shrink;
    total += __shfl_xor_sync(~0u, total, LANES);
#pragma unroll
    for (int d = 0; d < 8; ++d) {
      float mixed = part.mixed[h][d] * shrink;
      mixed += __shfl_xor_sync(~0u, mixed, LANES);
      if (lane < LANES) sums[h * (DIM + 2) + sub * 8 + d] = mixed;
    }
    if (lane == 0) sums[h * (DIM + 2) + DIM] = larger, sums[h * (DIM + 2) + DIM + 1] = total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < SHARED_BY * DIM; i += THREADS) {
    const int h = i / DIM, d = i % DIM;
    float larger = -1e30f, total = 0, mixed = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) larger = fmaxf(larger, room[(w * SHARED_BY + h) * (DIM + 2) + DIM]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float* of_warp = room + (w * SHARED_BY + h) * (DIM + 2);
      const float shrink = exp2f(of_warp[DIM] - larger);
      total += of_warp[DIM + 1] * shrink, mixed += of_warp[d] * shrink;
    }
    if (used == 1) {
      out[(head * SHARED_BY + h) * DIM + d] = (u16)bfloat_pair(mixed / total, 0);
    } else {
      const int at = (head * splits + split) * SHARED_BY + h;
      __stcg(of_mixed + (long long)at * DIM + d, mixed);
      if (d == 0) __stcg(of_largest + at, larger), __stcg(of_total + at, total);
    }
  }
  if (used == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(finished + head) : "memory");
    is_last = before == used - 1;
    if (is_last) finished[head] = 0;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  for (int i = threadIdx.x; i < SHARED_BY * DIM; i += THREADS) {
    const int h = i / DIM, d = i % DIM;
    float larger = -1e30f, total = 0, mixed = 0;
    for (int s = 0; s < used; ++s) larger = fmaxf(larger, __ldcg(of_largest + (head * splits + s) * SHARED_BY + h));
    for (int s = 0; s < used; ++s) {
      const int at = (head * splits + s) * SHARED_BY + h;
      const float shrink = exp2f(__ldcg(of_largest + at) - larger);
      total += __ldcg(of_total + at) * shrink, mixed += __ldcg(of_mixed + (long long)at * DIM + d) * shrink;
    }
    out[(head * SHARED_BY + h) * DIM + d] = (u16)bfloat_pair(mixed / total, 0);
  }
}
