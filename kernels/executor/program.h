// A list of steps over matrices of float32, run by a team of threads.
//
// A value is float32[rows, width]; how many rows is known when the program runs. Where values lie is planned once for each
// number of rows: two that are never needed at the same time share memory. Inputs of int8 linears are quantized once per
// format, in the pass that makes them.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/table.h"
#include "../cpu/threads.h"

namespace lensc {

// What a run is about. Pointers are the caller's and live as long as the run.
struct Frame {
    std::vector<int64_t> counts;            // rows of each row class
    std::map<int, float*> bound;            // values that lie with the caller: inputs and outputs
    std::vector<const void*> arrays;        // int64 indices and float32 biases, by slot
    std::vector<KvCache> caches;            // [layer][sequence]
    int64_t past = 0;                       // tokens in the caches
    // filled by the program
    std::vector<float*> values;
    std::vector<uint8_t*> slots;
    std::vector<uint8_t*> scratch;          // of each thread
    std::vector<int64_t> positions;         // of the new tokens
};

class Step;

// Rows of a value as int8, in the format that one kind of linear reads.
struct Slot {
    int x, row_class;
    bool channels;           // for int8_linear: a scale per row
    int64_t inputs, padded;  // of a row
    int64_t planes, unit;    // for int4_linear
    int64_t group;           // inputs that share a correction
    float factor;
    bool has_multiples;      // of the weights
};

class Program {
  public:
    Program(const std::string& isa, int threads);
    ~Program();

    const Table& kernels() const { return kernels_; }
    int threads() const { return team_.count(); }
    int64_t width(int value) const { return at(value).width; }

    // --- making it: ids of values are given in order; a step reads values that are inputs or were made before
    int value(int row_class, int64_t width);
    void rows(RowKind kind, int x, int up, const float* weight, const float* bias, float epsilon, int y);
    void add(int a, int b, const float* constant, int64_t period, int y);
    void gather_rows(const float* table, int ids, int y);
    void select_rows(int x, int positions, int apart, int y);
    void float_linear(int x, const float* floats, const GroupWeight& weight, const float* bias, int residual, int y);
    void int4_linear(int x, const GroupWeight& weight, const float* bias, int residual, int y);
    void int8_linear(int x, const ChannelWeight& weight, const float* bias, int residual, int y);
    void causal_attention(int q, int k, int v, int y, int apart, int layer, int heads, float scale,
                          const float* inverse_frequencies);
    void attention(int q, const float* constant_q, int k, int v, int y, int apart, int bias, int heads, float scale,
                   bool exact);
    void output(int value);
    // No steps are added afterwards.
    void finish();

    // --- running it
    void run(Frame& frame);
    size_t memory_bytes() const { return arena_bytes_ + scratch_bytes_ * static_cast<size_t>(team_.count()); }

    struct Value {
        int row_class;
        int64_t width;
    };
    const std::vector<Value>& values() const { return values_; }

    // --- what steps ask for
    // Whether int4_linear takes `rows` rows in panels.
    static bool in_panels(int64_t rows) { return rows > most_streamed_rows; }
    const Slot& slot(int id) const { return slots_[static_cast<size_t>(id)]; }
    QuantizedRows group_rows(int slot, const Frame& frame) const;
    ChannelRows channel_rows(int slot, const Frame& frame) const;
    // Whether rows have corrections, else sums.
    bool has_corrections(const Slot& slot, int64_t rows) const {
        return !slot.has_multiples || (kernels_.corrects_multiples && !in_panels(rows));
    }
    // Inputs that share a correction, or a sum.
    int64_t corrected_inputs(const Slot& slot, int64_t rows) const {
        return has_corrections(slot, rows) ? slot.group : slot.unit;
    }

  private:
    // Where the parts of a slot lie behind its values.
    struct SlotLayout {
        size_t scales, corrections, bytes;
    };

    struct Plan {
        std::vector<size_t> values, slots;  // offsets; `outside` for what lies with the caller
        size_t bytes = 0;
    };

    template <class S>
    void append(S step);
    void uses_class(int row_class);
    void uses_array(int slot);
    int slot_of(int x, Slot format);
    int rope_table_of(int row_class, const float* inverse_frequencies, int64_t dim);
    const Value& at(int value) const { return values_.at(static_cast<size_t>(value)); }
    SlotLayout layout_of(const Slot& slot, int64_t rows) const;
    const Plan& plan_for(const std::vector<int64_t>& counts);

    const Table& kernels_;
    Team team_;
    std::vector<Value> values_;
    std::vector<int> makers_;  // the step that makes each value, -1 for inputs
    std::vector<int> outputs_;
    int classes_ = 0, arrays_ = 0;  // that a run has to give
    std::vector<Slot> slots_;
    std::vector<std::unique_ptr<Step>> steps_;
    std::vector<size_t> phases_;  // the first step of each: no barrier is needed between those of one
    std::map<const float*, int> rope_tables_;
    std::map<std::vector<int64_t>, Plan> plans_;
    uint8_t* arena_ = nullptr;
    size_t arena_bytes_ = 0;
    std::vector<uint8_t*> scratch_;
    size_t scratch_bytes_ = 0;
};

}  // namespace lensc
