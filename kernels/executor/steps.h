// The steps of a program: each gathers the arguments of one kernel.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "program.h"

namespace lensc {

class Step {
  public:
    virtual ~Step() = default;
    virtual void run(const Frame& frame, Share share) const = 0;
    // For each thread.
    virtual size_t scratch_bytes(const Frame&) const { return 0; }

    std::vector<int> reads, read_slots;  // values and slots
    std::vector<int> makes, made_slots;
    bool begins_phase = false;  // it reads what the steps before it make

  protected:
    static float* at(const Frame& frame, int value) { return value < 0 ? nullptr : frame.values[static_cast<size_t>(value)]; }
    static int64_t rows_of(const Frame& frame, int row_class) { return frame.counts[static_cast<size_t>(row_class)]; }
};

struct RowsStep : Step {
    const Program* program;
    RowKind kind;
    int x, up, y, slot, row_class;
    const float *weight, *bias;
    float epsilon;
    int64_t width;

    struct Arguments {
        RowsArgs rows;
        QuantizeArgs groups;
        ChannelRows channels;
    };

    // `arguments` keeps what its own rows point to.
    void gather(const Frame& frame, Arguments& arguments) const {
        RowsArgs& a = arguments.rows;
        a = {kind, at(frame, x), at(frame, up), weight, bias, epsilon, rows_of(frame, row_class), width,
             slot < 0 ? at(frame, y) : nullptr, nullptr, nullptr, 0, nullptr};
        if (slot < 0) return;
        const Slot& format = program->slot(slot);
        if (format.channels) {
            arguments.channels = program->channel_rows(slot, frame);
            a.channels = &arguments.channels, a.channel_width = format.padded;
        } else {
            arguments.groups = {format.inputs, format.planes, format.unit, format.padded,
                                program->corrected_inputs(format, a.rows), format.factor,
                                program->group_rows(slot, frame)};
            a.groups = &arguments.groups;
        }
    }

    size_t scratch_bytes(const Frame& frame) const override {
        Arguments a;
        gather(frame, a);
        return program->kernels().rows_scratch(a.rows);
    }

    void run(const Frame& frame, Share share) const override {
        Arguments a;
        gather(frame, a);
        a.rows.scratch = frame.scratch[static_cast<size_t>(share.member)];
        program->kernels().rows(a.rows, share);
    }
};

// y = a + b, or a + a constant that is repeated every `period` rows.
struct AddStep : Step {
    int a, b, y, row_class;
    const float* constant;
    int64_t period, width;

    void run(const Frame& frame, Share share) const override {
        const Range rows = range_of(rows_of(frame, row_class), 1, share);
        for (int64_t r = rows.begin; r < rows.end; r++) {
            const float* left = at(frame, a) + r * width;
            const float* right = constant ? constant + r % period * width : at(frame, b) + r * width;
            float* sum = at(frame, y) + r * width;
            for (int64_t i = 0; i < width; i++) sum[i] = left[i] + right[i];
        }
    }
};

// Rows of a table, or of each part of a value, by index.
struct PickStep : Step {
    const float* table;  // null: x
    int x, indices, y, row_class, x_class, apart;
    int64_t width;

    void run(const Frame& frame, Share share) const override {
        const auto* index = static_cast<const int64_t*>(frame.arrays[static_cast<size_t>(indices)]);
        const int64_t parts = table ? 1 : rows_of(frame, apart), all = rows_of(frame, row_class);
        const int64_t per_part = all / parts, of_x = table ? 0 : rows_of(frame, x_class) / parts;
        const Range rows = range_of(all, 1, share);
        for (int64_t r = rows.begin; r < rows.end; r++) {
            const float* from = table ? table + index[r] * width
                                      : at(frame, x) + (r / per_part * of_x + index[r % per_part]) * width;
            std::memcpy(at(frame, y) + r * width, from, static_cast<size_t>(width) * sizeof(float));
        }
    }
};

struct FloatLinearStep : Step {
    const Program* program;
    FloatLinearArgs fixed;
    int x, residual, y, row_class;

    void run(const Frame& frame, Share share) const override {
        FloatLinearArgs a = fixed;
        a.x = at(frame, x), a.rows = rows_of(frame, row_class);
        a.residual = at(frame, residual), a.y = at(frame, y);
        program->kernels().float_linear(a, share);
    }
};

struct Int4LinearStep : Step {
    const Program* program;
    Int4LinearArgs fixed;
    int slot, residual, y;

    void run(const Frame& frame, Share share) const override {
        Int4LinearArgs a = fixed;
        a.x = program->group_rows(slot, frame);
        a.residual = at(frame, residual), a.y = at(frame, y);
        program->kernels().int4_linear(a, share);
    }
};

struct Int8LinearStep : Step {
    const Program* program;
    Int8LinearArgs fixed;
    int slot, residual, y;

    size_t scratch_bytes(const Frame&) const override { return program->kernels().int8_linear_scratch(fixed); }

    void run(const Frame& frame, Share share) const override {
        Int8LinearArgs a = fixed;
        a.scratch = frame.scratch[static_cast<size_t>(share.member)];
        a.x = program->channel_rows(slot, frame);
        a.residual = at(frame, residual), a.y = at(frame, y);
        program->kernels().int8_linear(a, share);
    }
};

// cos and sin of all new positions, once for all layers: y is [cos | sin], each [tokens, dim / 2].
struct RopeTableStep : Step {
    const Program* program;
    const float* inverse_frequencies;
    int y;
    int64_t dim;

    void run(const Frame& frame, Share share) const override {
        const auto tokens = static_cast<int>(frame.positions.size());
        float* cos = at(frame, y);
        program->kernels().rope_table({frame.positions.data(), inverse_frequencies, tokens, static_cast<int>(dim), cos,
                                       cos + tokens * dim / 2},
                                      share);
    }
};

struct RopeAppendStep : Step {
    const Program* program;
    int q, k, v, table, y, apart, layer, heads;
    int64_t q_width, k_width;

    void run(const Frame& frame, Share share) const override {
        const auto tokens = static_cast<int64_t>(frame.positions.size()), sequences = rows_of(frame, apart);
        for (int64_t s = 0; s < sequences; s++) {
            const KvCache& cache = frame.caches[static_cast<size_t>(layer * sequences + s)];
            const float* cos = at(frame, table);
            RopeAppendArgs a;
            a.query = at(frame, q) + s * tokens * q_width, a.query_stride = q_width;
            a.key = at(frame, k) + s * tokens * k_width, a.key_stride = k_width;
            a.value = at(frame, v) + s * tokens * k_width, a.value_stride = k_width;
            a.cos = cos, a.sin = cos + tokens * cache.dim / 2;
            a.tokens = static_cast<int>(tokens), a.heads = heads;
            a.rotated = at(frame, y) + s * tokens * q_width, a.rotated_stride = q_width;
            a.cache = cache, a.past = static_cast<int>(frame.past);
            program->kernels().rope_append(a, share);
        }
    }
};

struct CausalAttentionStep : Step {
    const Program* program;
    int q, y, apart, layer, heads;
    int64_t width;
    float scale;

    CausalAttentionArgs arguments(const Frame& frame, int64_t sequence) const {
        const auto tokens = static_cast<int64_t>(frame.positions.size());
        CausalAttentionArgs a;
        a.query = at(frame, q) + sequence * tokens * width, a.query_stride = width;
        a.cache = frame.caches[static_cast<size_t>(layer * rows_of(frame, apart) + sequence)];
        a.past = static_cast<int>(frame.past), a.tokens = static_cast<int>(tokens), a.heads = heads, a.scale = scale;
        a.output = at(frame, y) + sequence * tokens * width, a.output_stride = width;
        a.scratch = nullptr;
        return a;
    }

    size_t scratch_bytes(const Frame& frame) const override {
        return program->kernels().causal_attention_scratch(arguments(frame, 0));
    }

    void run(const Frame& frame, Share share) const override {
        for (int64_t s = 0; s < rows_of(frame, apart); s++) {
            CausalAttentionArgs a = arguments(frame, s);
            a.scratch = frame.scratch[static_cast<size_t>(share.member)];
            program->kernels().causal_attention(a, share);
        }
    }
};

struct AttentionStep : Step {
    const Program* program;
    const float* constant_q;  // the same for every slice; null: q
    int q, k, v, bias, y, y_class, k_class, apart, heads;
    int64_t width;
    float scale;
    bool exact;

    AttentionArgs arguments(const Frame& frame) const {
        const int64_t slices = rows_of(frame, apart);
        AttentionArgs a;
        a.query = constant_q ? constant_q : at(frame, q);
        a.key = at(frame, k), a.value = at(frame, v);
        a.query_stride = a.key_stride = a.value_stride = a.output_stride = width;
        a.bias = bias < 0 ? nullptr : static_cast<const float*>(frame.arrays[static_cast<size_t>(bias)]);
        a.slices = static_cast<int>(slices), a.queries = static_cast<int>(rows_of(frame, y_class) / slices);
        a.keys = static_cast<int>(rows_of(frame, k_class) / slices);
        a.heads = heads, a.dim = static_cast<int>(width / heads), a.scale = scale, a.exact = exact;
        a.output = at(frame, y), a.scratch = nullptr;
        return a;
    }

    size_t scratch_bytes(const Frame& frame) const override {
        return program->kernels().attention_scratch(arguments(frame));
    }

    void run(const Frame& frame, Share share) const override {
        AttentionArgs a = arguments(frame);
        a.scratch = frame.scratch[static_cast<size_t>(share.member)];
        if (!constant_q) return program->kernels().attention(a, share);
        // one slice at a time, each from the first row of the constant
        const int slices = a.slices;
        a.slices = 1;
        for (int s = 0; s < slices; s++) {
            program->kernels().attention(a, share);
            a.key += a.keys * width, a.value += a.keys * width, a.output += a.queries * width;
            if (a.bias) a.bias += a.keys;
        }
    }
};

}  // namespace lensc
