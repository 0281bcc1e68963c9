// A token through a whole decoder in one launch: what is between linears costs a barrier of all blocks and no launch, and
// while blocks wait for each other, weights of the next linear are on their way.
//
// One block to each multiprocessor, all at once. Per layer: query, key and value; attention; its output into the stream;
// gate and up; down into the stream. Then the head. Beside what streamed.cuh is compiled for:
//   HEADS, KV_HEADS   of attention, whose heads have 128 dimensions

#include "../linear/streamed.cuh"

#define DIM 128
#define SHARED_BY (HEADS / KV_HEADS)  // query heads that read the same keys
#define LANES 16                      // that take a key together, 8 dimensions each
#define AT_ONCE (THREADS / LANES)     // keys of a block at once

struct Layer {
  const float* attention_norm;
  const float* mlp_norm;
  u16* keys;  // bfloat16[KV_HEADS, capacity, DIM]
  u16* values;
};

// What all blocks write before it, all read behind it. `arrived` counts blocks from 0 on, `until` those that must have.
__device__ void barrier(u32* arrived, u32& until) {
  until += gridDim.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    u32 now;
    do {
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
    } while (now < until);
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
  __syncthreads();
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

// Scratch that outlives a launch: what the blocks of a head tell the last of them.
struct Scratch {
  float* largest;  // [KV_HEADS, splits, SHARED_BY]
  float* total;
  float* mixed;    // [KV_HEADS, splits, SHARED_BY, DIM]
  u32* finished;   // [KV_HEADS], zeros
};

// Grouped-query attention of the token at position `past`: its key and value go into the cache, and the keys are split
// among blocks. The block that ends last for a head sums up the others'. qkv: bfloat16[(HEADS + 2 * KV_HEADS) * DIM]; out:
// bfloat16[HEADS * DIM]; `room`: float[WARPS, SHARED_BY, DIM + 2] in shared memory. `ready` waits until qkv is there.
template <class Ready>
__device__ void attend(const u16* qkv, const Layer& layer, int capacity, int past, const float* frequencies, float scale,
                       const Scratch& scratch, u16* out, float* room, Ready ready) {
  __shared__ float query[SHARED_BY][DIM];
  __shared__ int is_last;
  const int splits = gridDim.x / KV_HEADS, head = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS;
  const int length = past + 1, each = max(2 * AT_ONCE, (length + splits - 1) / splits);
  const int used = (length + each - 1) / each, start = split * each, end = min(length, start + each);
  const bool takes_part = split < used && split < splits;
  u16* keys = layer.keys + (long long)head * capacity * DIM;
  u16* values = layer.values + (long long)head * capacity * DIM;
  // the past does not depend on the token: lines of 64 values
  if (takes_part)
    for (int i = threadIdx.x; i < (min(end, past) - start) * (DIM / 64); i += THREADS)
      soon(keys + (long long)start * DIM + i * 64), soon(values + (long long)start * DIM + i * 64);
  ready();
  if (!takes_part) return;

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
      __stcg(scratch.mixed + (long long)at * DIM + d, mixed);
      if (d == 0) __stcg(scratch.largest + at, larger), __stcg(scratch.total + at, total);
    }
  }
  if (used == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(scratch.finished + head) : "memory");
    is_last = before == used - 1;
    if (is_last) scratch.finished[head] = 0;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  for (int i = threadIdx.x; i < SHARED_BY * DIM; i += THREADS) {
    const int h = i / DIM, d = i % DIM;
    float larger = -1e30f, total = 0, mixed = 0;
    for (int s = 0; s < used; ++s) larger = fmaxf(larger, __ldcg(scratch.largest + (head * splits + s) * SHARED_BY + h));
    for (int s = 0; s < used; ++s) {
      const int at = (head * splits + s) * SHARED_BY + h;
      const float shrink = exp2f(__ldcg(scratch.largest + at) - larger);
      total += __ldcg(scratch.total + at) * shrink, mixed += __ldcg(scratch.mixed + (long long)at * DIM + d) * shrink;
    }
    out[(head * SHARED_BY + h) * DIM + d] = (u16)bfloat_pair(mixed / total, 0);
  }
}

// linears: four for each layer and the head. stream: float32[width], the embedding of the token; it is written to.
// past: how many tokens the caches hold; arrived: 0; padded: the most inputs of a linear; tables: where in
// shared memory there is room for linears and layers.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
token(const Linear* linears, const Layer* layers, const float* last_norm, const float* frequencies, float scale,
      const int* past, int capacity, float* stream, u16* qkv, u16* mixed, u16* gated, float* logits, float* largest,
      float* total, float* parts, u32* finished, u32* arrived, int padded, int tables, int count,
      float epsilon) {
  extern __shared__ uint4 shared[];
  // What is where lies in shared memory: a barrier empties the first-level cache.
  Linear* const linear_of = (Linear*)((char*)shared + tables);
  Layer* const layer_of = (Layer*)(linear_of + 4 * count + 1);
  for (int i = threadIdx.x; i < (4 * count + 1) * (int)sizeof(Linear) / 8; i += THREADS)
    ((long long*)linear_of)[i] = ((const long long*)linears)[i];
  for (int i = threadIdx.x; i < count * (int)sizeof(Layer) / 8; i += THREADS)
    ((long long*)layer_of)[i] = ((const long long*)layers)[i];
  __syncthreads();
  const auto table = [&](int i) { return linear_of[i]; };
  Stream<decltype(table)> weights(table, 4 * count + 1, (char*)shared);
  Room room((char*)shared, 1, padded);
  const Scratch scratch{largest, total, parts, finished};
  const int position = *past;
  u32 until = 0;
  const auto all = [&] { barrier(arrived, until); };
  for (int i = 0; i < count; ++i) {
    const Layer layer = layer_of[i];
    const Linear* l = linear_of + 4 * i;
    linear<true, STORE>(l[0], weights, room, stream, layer.attention_norm, epsilon, nullptr, qkv, 1, all);
    attend(qkv, layer, capacity, position, frequencies, scale, scratch, mixed, (float*)room.x, all);
    linear<false, RESIDUAL>(l[1], weights, room, mixed, nullptr, 0, stream, stream, 1, all);
    linear<true, SILU>(l[2], weights, room, stream, layer.mlp_norm, epsilon, nullptr, gated, 1, all);
    linear<false, RESIDUAL>(l[3], weights, room, gated, nullptr, 0, stream, stream, 1, all);
  }
  linear<true, LOGITS>(linear_of[4 * count], weights, room, stream, last_norm, epsilon, nullptr, logits, 1, all);
}
