// The Python module `lensc.kernels._cpu`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "cpu/arrays.h"
#include "executor/program.h"

namespace lensc {

void bind_attention(nb::module_& module);
void bind_peak(nb::module_& module);
void bind_rope(nb::module_& module);

namespace {

using namespace nanobind::literals;

using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Multiples = nb::ndarray<const int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Any = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Cached = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using CachedScales = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// The keys and values of all layers, each [sequences, kv_heads, capacity, dim].
class Caches {
  public:
    Caches(const std::vector<Cached>& keys, const std::vector<Cached>& values, const std::vector<CachedScales>& key_scales,
           const std::vector<CachedScales>& value_scales) {
        require(keys.size() == values.size(), "keys, values: as many of each");
        for (size_t layer = 0; layer < keys.size(); layer++) {
            const Cached &k = keys[layer], &v = values[layer];
            const CacheType type = cache_type(k.dtype(), v.dtype());
            const bool scaled = type == CacheType::int8;
            require(!scaled || (layer < key_scales.size() && layer < value_scales.size()), "scales: of an int8 cache");
            for (size_t i = 0; i < 4; i++) require(v.shape(i) == k.shape(i), "values: of the shape of the keys");
            for (size_t i = 0; scaled && i < 3; i++)
                require(key_scales[layer].shape(i) == k.shape(i) && value_scales[layer].shape(i) == k.shape(i),
                        "scales: [sequences, kv_heads, capacity]");
            sequences_ = k.shape(0), capacity_ = k.shape(2);
            const size_t bytes = k.shape(1) * k.shape(2) * k.shape(3) * k.itemsize(), scales = k.shape(1) * k.shape(2);
            for (size_t s = 0; s < k.shape(0); s++)
                caches.push_back({type, int(k.shape(1)), int(k.shape(2)), int(k.shape(3)),
                                  static_cast<uint8_t*>(k.data()) + s * bytes, static_cast<uint8_t*>(v.data()) + s * bytes,
                                  scaled ? key_scales[layer].data() + s * scales : nullptr,
                                  scaled ? value_scales[layer].data() + s * scales : nullptr});
        }
    }

    void check(int64_t sequences, int64_t length) const {
        require(size_t(sequences) == sequences_, "the cache has another number of sequences");
        require(size_t(length) <= capacity_, "the cache has no room for the new tokens");
    }

    std::vector<KvCache> caches;

  private:
    size_t sequences_ = 0, capacity_ = 0;
};

const float* floats_of(const std::optional<Row>& row, size_t width) {
    if (!row) return nullptr;
    require(row->shape(0) == width, "a row of constants has another width than the value it belongs to");
    return row->data();
}

GroupWeight group_weight(const Bytes& values, const Matrix& scales, const std::optional<Bytes>& zero_points,
                         const std::optional<Multiples>& multiples, int bits, bool is_signed, int64_t inputs, int64_t group) {
    require(bits == 2 || bits == 4 || bits == 8, "bits: 2, 4 or 8");
    require(inputs > 0 && group > 0 && inputs * bits % 8 == 0, "inputs, group: positive, and rows of whole bytes");
    GroupWeight w{};
    w.values = values.data(), w.scales = scales.data(), w.zero_points = zero_points ? zero_points->data() : nullptr;
    w.multiples = multiples ? multiples->data() : nullptr;
    w.outputs = int64_t(scales.shape(0)), w.inputs = inputs, w.group = std::min(group, inputs), w.bits = bits;
    w.is_signed = is_signed, w.zero_point = is_signed ? 128 : 1 << (bits - 1);
    const int64_t whole = chunk_bytes * w.planes(), bytes = w.unit_bytes();
    require(multiples || w.groups() == 1 || w.group % whole == 0 || (w.group < whole && bytes >= 4 && (bytes & (bytes - 1)) == 0),
            "group: no kernel sums groups of this size");
    require(int64_t(values.shape(0)) == w.outputs * w.row_bytes(), "values: not outputs times inputs of these bits");
    require(int64_t(scales.shape(1)) == (multiples ? 1 : w.groups()), "scales: [outputs, groups], of multiples [outputs, 1]");
    if (multiples) {
        const int64_t of_group = w.group * bits / 8;
        require(bits < 8 && !zero_points, "multiples: of 2 or 4 bits without zero points");
        require(int64_t(multiples->shape(0)) == w.outputs && int64_t(multiples->shape(1)) == w.groups(),
                "multiples: [outputs, groups]");
        require(w.groups() == 1 || (of_group >= 16 && (of_group & (of_group - 1)) == 0),
                "multiples: of groups of 16 bytes, or twice as many again");
    }
    require(!zero_points || int64_t(zero_points->shape(0)) == (w.outputs * w.groups() * bits + 7) / 8,
            "zero_points: not one for each scale");
    require(!(is_signed && zero_points), "zero_points: not of signed values");
    return w;
}

void run(Program& program, std::vector<int64_t> counts, const std::vector<std::pair<int, Any>>& values,
         const std::vector<std::optional<Any>>& arrays, const Caches* caches, int64_t past, int64_t sequences,
         int64_t tokens) {
    Frame frame;
    frame.counts = std::move(counts);
    for (const auto& [value, array] : values) {
        require(value >= 0 && size_t(value) < program.values().size(),
                "values: there is none with the number " + std::to_string(value));
        const auto [row_class, width] = program.values()[size_t(value)];
        const int64_t rows = size_t(row_class) < frame.counts.size() ? frame.counts[size_t(row_class)] : 0;
        require(array.dtype() == nb::dtype<float>() && int64_t(array.size()) == rows * width,
                "value " + std::to_string(value) + ": float32[" + std::to_string(rows) + ", " + std::to_string(width) +
                    "] is needed");
        frame.bound[value] = static_cast<float*>(const_cast<void*>(static_cast<const void*>(array.data())));
    }
    for (const auto& array : arrays) frame.arrays.push_back(array ? array->data() : nullptr);
    frame.past = past;
    for (int64_t i = 0; i < tokens; i++) frame.positions.push_back(past + i);
    if (caches) {
        caches->check(sequences, past + tokens);
        frame.caches = caches->caches;
    }
    const nb::gil_scoped_release unlocked;
    program.run(frame);
}

}  // namespace

NB_MODULE(_cpu, module) {
    module.doc() = "CPU kernels and the executor of programs made of them.";
    module.def("usable_isas", usable_isas, "The instruction sets that this processor has kernels for, the best first.");

    nb::class_<Caches>(module, "Caches", "Keys and values of all layers, which the caller keeps alive.")
        .def(nb::init<const std::vector<Cached>&, const std::vector<Cached>&, const std::vector<CachedScales>&,
                      const std::vector<CachedScales>&>(),
             "keys"_a, "values"_a, "key_scales"_a, "value_scales"_a);

    nb::class_<Program>(module, "Program",
                        "Steps over float32[rows, width], run by threads of its own.\n\n"
                        "Values are numbered in the order in which they are declared, all of them before the first step.\n"
                        "Constants are not copied: whoever makes the program keeps them alive.")
        .def(nb::init<const std::string&, int>(), "isa"_a, "threads"_a)
        .def_prop_ro("isa", [](const Program& p) { return std::string(p.kernels().isa); })
        .def_prop_ro("threads", &Program::threads)
        .def_prop_ro("memory_bytes", &Program::memory_bytes)
        .def("value", &Program::value, "row_class"_a, "width"_a)
        .def("output", &Program::output, "value"_a)
        .def("finish", &Program::finish)
        .def(
            "rms_norm",
            [](Program& p, int x, const Row& weight, float epsilon, int y) {
                require(int64_t(weight.shape(0)) == p.width(y), "weight: of the width of the value");
                p.rows(RowKind::rms_norm, x, -1, weight.data(), nullptr, epsilon, y);
            },
            "x"_a, "weight"_a, "epsilon"_a, "y"_a)
        .def(
            "layer_norm",
            [](Program& p, int x, const Row& weight, const std::optional<Row>& bias, float epsilon, int y) {
                require(int64_t(weight.shape(0)) == p.width(y), "weight: of the width of the value");
                p.rows(RowKind::layer_norm, x, -1, weight.data(), floats_of(bias, size_t(p.width(y))), epsilon, y);
            },
            "x"_a, "weight"_a, "bias"_a.none(), "epsilon"_a, "y"_a)
        .def(
            "silu_mul",
            [](Program& p, int gate, int up, int y) { p.rows(RowKind::silu_mul, gate, up, nullptr, nullptr, 0, y); },
            "gate"_a, "up"_a, "y"_a)
        .def(
            "gelu_tanh", [](Program& p, int x, int y) { p.rows(RowKind::gelu_tanh, x, -1, nullptr, nullptr, 0, y); },
            "x"_a, "y"_a)
        .def(
            "add", [](Program& p, int a, int b, int y) { p.add(a, b, nullptr, 0, y); }, "a"_a, "b"_a, "y"_a)
        .def(
            "add_constant",
            [](Program& p, int a, const Matrix& constant, int y) {
                require(constant.shape(0) > 0 && int64_t(constant.shape(1)) == p.width(y), "constant: [period, width]");
                p.add(a, -1, constant.data(), int64_t(constant.shape(0)), y);
            },
            "a"_a, "constant"_a, "y"_a)
        .def(
            "gather_rows",
            [](Program& p, const Matrix& table, int ids, int y) {
                require(int64_t(table.shape(1)) == p.width(y), "table: of the width of the value");
                p.gather_rows(table.data(), ids, y);
            },
            "table"_a, "ids"_a, "y"_a)
        .def("select_rows", &Program::select_rows, "x"_a, "positions"_a, "apart"_a, "y"_a)
        .def(
            "float_linear",
            [](Program& p, int x, const Matrix& weight, const std::optional<Row>& bias, int residual, int y) {
                GroupWeight shape{};
                shape.outputs = int64_t(weight.shape(0)), shape.inputs = int64_t(weight.shape(1));
                require(shape.inputs == p.width(x) && shape.outputs == p.width(y), "weight: [outputs, inputs]");
                p.float_linear(x, weight.data(), shape, floats_of(bias, weight.shape(0)), residual, y);
            },
            "x"_a, "weight"_a, "bias"_a.none(), "residual"_a, "y"_a)
        .def(
            "group_linear",
            [](Program& p, int x, const Bytes& values, const Matrix& scales, const std::optional<Bytes>& zero_points,
               int bits, bool is_signed, int64_t group, bool int8_inputs, const std::optional<Row>& bias, int residual,
               int y, const std::optional<Multiples>& multiples) {
                const GroupWeight w =
                    group_weight(values, scales, zero_points, multiples, bits, is_signed, p.width(x), group);
                require(int8_inputs || !multiples, "multiples: for inputs in int8");
                require(w.outputs == p.width(y), "scales: [outputs, groups]");
                const float* added = floats_of(bias, size_t(w.outputs));
                int8_inputs ? p.int4_linear(x, w, added, residual, y) : p.float_linear(x, nullptr, w, added, residual, y);
            },
            "x"_a, "values"_a, "scales"_a, "zero_points"_a.none(), "bits"_a, "is_signed"_a, "group"_a, "int8_inputs"_a,
            "bias"_a.none(), "residual"_a, "y"_a, "multiples"_a.none() = nb::none())
        .def(
            "channel_linear",
            [](Program& p, int x, const Bytes& values, const Row& scales, const Integers& sums,
               const std::optional<Row>& bias, int residual, int y) {
                ChannelWeight w{reinterpret_cast<const int8_t*>(values.data()), scales.data(), sums.data(), p.width(y),
                                p.width(x)};
                require(int64_t(scales.shape(0)) == w.outputs && scales.shape(0) == sums.shape(0), "scales, sums: [outputs]");
                require(int64_t(values.shape(0)) == w.padded_outputs() * w.padded_inputs(),
                        "values: [padded outputs, padded inputs]");
                p.int8_linear(x, w, floats_of(bias, scales.shape(0)), residual, y);
            },
            "x"_a, "values"_a, "scales"_a, "sums"_a, "bias"_a.none(), "residual"_a, "y"_a)
        .def(
            "causal_attention",
            [](Program& p, int q, int k, int v, int y, int apart, int layer, int heads, float scale,
               const Row& inverse_frequencies) {
                require(int64_t(inverse_frequencies.shape(0)) * 2 * heads == p.width(q), "inverse_frequencies: [dim / 2]");
                p.causal_attention(q, k, v, y, apart, layer, heads, scale, inverse_frequencies.data());
            },
            "q"_a, "k"_a, "v"_a, "y"_a, "apart"_a, "layer"_a, "heads"_a, "scale"_a, "inverse_frequencies"_a)
        .def(
            "attention",
            [](Program& p, int q, const std::optional<Matrix>& constant_q, int k, int v, int y, int apart, int bias,
               int heads, float scale, bool exact) {
                p.attention(q, constant_q ? constant_q->data() : nullptr, k, v, y, apart, bias, heads, scale, exact);
            },
            "q"_a, "constant_q"_a.none(), "k"_a, "v"_a, "y"_a, "apart"_a, "bias"_a, "heads"_a, "scale"_a, "exact"_a)
        .def("run", run, "counts"_a, "values"_a, "arrays"_a, "caches"_a.none(), "past"_a, "sequences"_a, "tokens"_a,
             "Run once. counts: the rows of each row class; values: (id, float32 array) of all inputs and outputs;\n"
             "arrays: int64 indices and float32 biases by slot; caches: of `sequences` sequences with `past` tokens each,\n"
             "to which `tokens` are appended. Indices are the caller's to get right. Python's lock is released.");

    bind_attention(module);
    bind_peak(module);
    bind_rope(module);
}

}  // namespace lensc
