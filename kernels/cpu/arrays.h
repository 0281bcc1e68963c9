// What the bindings of kernels on float32 activations share: numpy arrays in and out, threads for the shares.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdlib>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kv_cache.h"
#include "share.h"

namespace lensc {

namespace nb = nanobind;

// Rows of float32, values of a row next to each other.
template <int kDims>
using Floats = nb::ndarray<const float, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

// 64-byte aligned bytes.
class Buffer {
  public:
    explicit Buffer(size_t bytes) : data_(::operator new(bytes, std::align_val_t{64})) {}
    ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void* data() const { return data_; }

  private:
    void* data_;
};

// Calls call(Share) for every share at once, without Python's lock.
template <class Call>
void run_shares(int threads, Call call) {
    if (threads < 1) throw std::invalid_argument("threads: at least 1, got " + std::to_string(threads));
    const nb::gil_scoped_release unlocked;
    std::vector<std::thread> others;
    for (int index = 1; index < threads; ++index) others.emplace_back([=] { call(Share{index, threads}); });
    call(Share{0, threads});
    for (std::thread& other : others) other.join();
}

// A new array of float32 that owns its values.
inline nb::ndarray<nb::numpy, float> new_floats(std::initializer_list<size_t> shape) {
    size_t count = 1;
    for (const size_t size : shape) count *= size;
    float* data = new float[count];
    const nb::capsule owner(data, [](void* at) noexcept { delete[] static_cast<float*>(at); });
    return nb::ndarray<nb::numpy, float>(data, shape, owner);
}

inline void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

// Keys or values of a cache: float32, float16 or int8 [kv_heads, capacity, dim].
using CacheArray = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using ScaleArray = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The type of a cache with such keys and values.
inline CacheType cache_type(nb::dlpack::dtype keys, nb::dlpack::dtype values) {
    require(values == keys, "values: of the type of the keys");
    if (keys == nb::dtype<int8_t>()) return CacheType::int8;
    if (keys.code == uint8_t(nb::dlpack::dtype_code::Float) && keys.bits == 16) return CacheType::float16;
    require(keys == nb::dtype<float>(), "keys: float32, float16 or int8");
    return CacheType::float32;
}

inline KvCache cache_of(const CacheArray& keys, const CacheArray& values, const std::optional<ScaleArray>& key_scales,
                        const std::optional<ScaleArray>& value_scales) {
    const CacheType type = cache_type(keys.dtype(), values.dtype());
    const bool scaled = type == CacheType::int8;
    require(key_scales.has_value() == scaled && value_scales.has_value() == scaled,
            "key_scales, value_scales: of an int8 cache, and only of one");
    for (int i = 0; i < 3; ++i) require(values.shape(i) == keys.shape(i), "values: of the shape of the keys");
    for (int i = 0; scaled && i < 2; ++i) {
        require(key_scales->shape(i) == keys.shape(i) && value_scales->shape(i) == keys.shape(i),
                "key_scales, value_scales: [kv_heads, capacity]");
    }
    return {type,
            int(keys.shape(0)),
            int(keys.shape(1)),
            int(keys.shape(2)),
            keys.data(),
            values.data(),
            scaled ? key_scales->data() : nullptr,
            scaled ? value_scales->data() : nullptr};
}

}  // namespace lensc
