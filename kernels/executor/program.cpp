#include "program.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <new>
#include <stdexcept>

#include "steps.h"

namespace lensc {

namespace {

constexpr size_t line_bytes = 64, outside = ~size_t(0);

// From so many rows on a thread's share is taken in parts. Fewer wait for memory, where parts would cut its streams.
constexpr int64_t least_rows_of_parts = 64;

size_t aligned(size_t bytes) { return (bytes + line_bytes - 1) / line_bytes * line_bytes; }

// Rows of a matrix lie pages apart. Where the system has them, huge pages take fewer walks through its tables: the attention
// of a picture takes 0.9 to 0.95 of the time.
void advise_huge_pages([[maybe_unused]] uint8_t* bytes, [[maybe_unused]] size_t size) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = 2 << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(bytes) + huge - 1) / huge * huge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(bytes) + size) / huge * huge;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

uint8_t* new_bytes(size_t bytes) {
    uint8_t* made = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{line_bytes}));
    advise_huge_pages(made, bytes);
    return made;
}

void delete_bytes(uint8_t* bytes) { ::operator delete(bytes, std::align_val_t{line_bytes}); }

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

}  // namespace

Program::Program(const std::string& isa, int threads)
    : kernels_(table(isa)), team_((require(threads >= 1, "threads: at least 1"), threads)) {
    scratch_.resize(static_cast<size_t>(threads));
}

Program::~Program() {
    delete_bytes(arena_);
    for (uint8_t* bytes : scratch_) delete_bytes(bytes);
}

// --- making it -----------------------------------------------------------------------------------------------------

int Program::value(int row_class, int64_t width) {
    require(row_class >= 0 && width > 0, "a value needs a row class and a width");
    values_.push_back({row_class, width});
    makers_.push_back(-1);
    uses_class(row_class);
    return static_cast<int>(values_.size()) - 1;
}

template <class S>
void Program::append(S step) {
    for (const int value : step.reads)
        require(value >= 0 && value < static_cast<int>(values_.size()), "a step reads a value that there is not");
    for (const int value : step.makes) {
        require(value >= 0 && value < static_cast<int>(values_.size()), "a step makes a value that there is not");
        require(makers_[static_cast<size_t>(value)] < 0, "a value is made twice");
        makers_[static_cast<size_t>(value)] = static_cast<int>(steps_.size());
    }
    steps_.push_back(std::make_unique<S>(std::move(step)));
}

void Program::rows(RowKind kind, int x, int up, const float* weight, const float* bias, float epsilon, int y) {
    RowsStep step;
    step.program = this, step.kind = kind, step.x = x, step.up = up, step.y = y, step.slot = -1;
    step.weight = weight, step.bias = bias, step.epsilon = epsilon;
    step.reads = {x}, step.makes = {y};
    if (up >= 0) step.reads.push_back(up);
    step.row_class = at(y).row_class, step.width = at(y).width;
    append(std::move(step));
}

void Program::add(int a, int b, const float* constant, int64_t period, int y) {
    AddStep step;
    step.a = a, step.b = b, step.y = y, step.constant = constant, step.period = period;
    step.reads = {a}, step.makes = {y};
    if (!constant) step.reads.push_back(b);
    step.row_class = at(y).row_class, step.width = at(y).width;
    append(std::move(step));
}

void Program::gather_rows(const float* table, int ids, int y) {
    PickStep step;
    step.table = table, step.x = -1, step.indices = ids, step.y = y, step.x_class = step.apart = 0;
    step.makes = {y};
    step.row_class = at(y).row_class, step.width = at(y).width;
    uses_array(ids);
    append(std::move(step));
}

void Program::select_rows(int x, int positions, int apart, int y) {
    PickStep step;
    step.table = nullptr, step.x = x, step.indices = positions, step.y = y, step.apart = apart;
    step.reads = {x}, step.makes = {y};
    step.x_class = at(x).row_class;
    step.row_class = at(y).row_class, step.width = at(y).width;
    uses_array(positions), uses_class(apart);
    append(std::move(step));
}

void Program::float_linear(int x, const float* floats, const GroupWeight& weight, const float* bias, int residual, int y) {
    FloatLinearStep step;
    step.program = this, step.x = x, step.residual = residual, step.y = y;
    step.fixed = {floats, weight, nullptr, 0, bias, nullptr, nullptr};
    step.reads = {x}, step.makes = {y};
    if (residual >= 0) step.reads.push_back(residual);
    step.row_class = at(y).row_class;
    append(std::move(step));
}

void Program::int4_linear(int x, const GroupWeight& weight, const float* bias, int residual, int y) {
    Slot format;
    format.channels = false, format.inputs = weight.inputs, format.padded = weight.padded_inputs();
    format.planes = weight.planes(), format.unit = weight.unit(), format.group = format.unit;
    if (weight.multiples && kernels_.corrects_multiples) format.group = weight.group;
    format.factor = weight.zero_points ? 1 : static_cast<float>(weight.zero_point);
    format.has_multiples = weight.multiples != nullptr;
    Int4LinearStep step;
    step.program = this, step.slot = slot_of(x, format), step.residual = residual, step.y = y;
    step.fixed = {weight, {}, bias, nullptr, nullptr};
    step.read_slots = {step.slot}, step.makes = {y};
    if (residual >= 0) step.reads.push_back(residual);
    append(std::move(step));
}

void Program::int8_linear(int x, const ChannelWeight& weight, const float* bias, int residual, int y) {
    Slot format;
    format.channels = true, format.inputs = weight.inputs, format.padded = weight.padded_inputs();
    format.planes = format.unit = format.group = 0, format.factor = 0, format.has_multiples = false;
    Int8LinearStep step;
    step.program = this, step.slot = slot_of(x, format), step.residual = residual, step.y = y;
    step.fixed = {weight, {}, bias, nullptr, nullptr, nullptr};
    step.read_slots = {step.slot}, step.makes = {y};
    if (residual >= 0) step.reads.push_back(residual);
    append(std::move(step));
}

int Program::slot_of(int x, Slot format) {
    format.x = x, format.row_class = at(x).row_class;
    require(at(x).width == format.inputs, "a linear reads a value of another width");
    for (size_t i = 0; i < slots_.size(); i++) {
        const Slot& s = slots_[i];
        if (s.x == x && s.channels == format.channels && s.planes == format.planes && s.unit == format.unit &&
            s.group == format.group && s.factor == format.factor && s.has_multiples == format.has_multiples)
            return static_cast<int>(i);
    }
    const int id = static_cast<int>(slots_.size());
    slots_.push_back(format);
    RowsStep step;
    const int maker = makers_[static_cast<size_t>(x)];
    const auto* made = maker < 0 ? nullptr : dynamic_cast<const RowsStep*>(steps_[static_cast<size_t>(maker)].get());
    if (made) {
        step = *made;  // the row is made again and quantized at once; the first is dropped unless somebody reads it
        step.y = -1;
    } else {
        step.program = this, step.kind = RowKind::copy, step.x = x, step.up = step.y = -1;
        step.weight = step.bias = nullptr, step.epsilon = 0;
        step.row_class = format.row_class, step.width = format.inputs;
        step.reads = {x};
    }
    step.slot = id, step.makes = {}, step.made_slots = {id};
    append(std::move(step));
    return id;
}

int Program::rope_table_of(int row_class, const float* inverse_frequencies, int64_t dim) {
    const auto known = rope_tables_.find(inverse_frequencies);
    if (known != rope_tables_.end()) return known->second;
    RopeTableStep step;
    step.program = this, step.inverse_frequencies = inverse_frequencies, step.dim = dim;
    step.y = value(row_class, dim);
    step.makes = {step.y};
    rope_tables_[inverse_frequencies] = step.y;
    const int table = step.y;
    append(std::move(step));
    return table;
}

void Program::causal_attention(int q, int k, int v, int y, int apart, int layer, int heads, float scale,
                               const float* inverse_frequencies) {
    const Value queries = at(q), keys = at(k);
    require(heads > 0 && queries.width % heads == 0, "the width of queries is no multiple of the heads");
    uses_class(apart);
    RopeAppendStep rope;
    rope.program = this, rope.q = q, rope.k = k, rope.v = v, rope.apart = apart, rope.layer = layer, rope.heads = heads;
    rope.q_width = queries.width, rope.k_width = keys.width;
    rope.table = rope_table_of(queries.row_class, inverse_frequencies, queries.width / heads);
    rope.y = value(queries.row_class, queries.width);
    rope.reads = {q, k, v, rope.table}, rope.makes = {rope.y};
    CausalAttentionStep step;
    step.program = this, step.q = rope.y, step.y = y, step.apart = apart, step.layer = layer, step.heads = heads;
    step.width = queries.width, step.scale = scale;
    step.reads = {rope.y}, step.makes = {y};
    append(std::move(rope));
    append(std::move(step));
}

void Program::attention(int q, const float* constant_q, int k, int v, int y, int apart, int bias, int heads, float scale,
                        bool exact) {
    AttentionStep step;
    const Value made = at(y);
    require(heads > 0 && made.width % heads == 0, "the width of queries is no multiple of the heads");
    uses_class(apart);
    if (bias >= 0) uses_array(bias);
    step.program = this, step.constant_q = constant_q, step.q = q, step.k = k, step.v = v, step.bias = bias, step.y = y;
    step.y_class = made.row_class, step.k_class = at(k).row_class, step.apart = apart;
    step.heads = heads, step.width = made.width, step.scale = scale, step.exact = exact;
    step.reads = {k, v}, step.makes = {y};
    if (!constant_q) step.reads.push_back(q);
    append(std::move(step));
}

void Program::output(int value) { outputs_.push_back(value); }

void Program::uses_class(int row_class) {
    require(row_class >= 0, "a row class is at least 0");
    classes_ = std::max(classes_, row_class + 1);
}

void Program::uses_array(int slot) {
    require(slot >= 0, "the slot of an array is at least 0");
    arrays_ = std::max(arrays_, slot + 1);
}

void Program::finish() {
    std::vector<int> readers(values_.size()), slot_readers(slots_.size());
    for (const int value : outputs_) readers.at(static_cast<size_t>(value))++;
    std::vector<std::unique_ptr<Step>> kept;  // those that somebody reads, the last first
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
        bool is_read = false;
        for (const int value : (*step)->makes) is_read |= readers[static_cast<size_t>(value)] > 0;
        for (const int slot : (*step)->made_slots) is_read |= slot_readers[static_cast<size_t>(slot)] > 0;
        if (!is_read) continue;
        for (const int value : (*step)->reads) readers[static_cast<size_t>(value)]++;
        for (const int slot : (*step)->read_slots) slot_readers[static_cast<size_t>(slot)]++;
        kept.push_back(std::move(*step));
    }
    steps_.assign(std::make_move_iterator(kept.rbegin()), std::make_move_iterator(kept.rend()));

    std::vector<bool> fresh(values_.size()), fresh_slots(slots_.size());
    for (size_t i = 0; i < steps_.size(); i++) {
        const auto& step = steps_[i];
        for (const int value : step->reads) step->begins_phase |= fresh[static_cast<size_t>(value)];
        for (const int slot : step->read_slots) step->begins_phase |= fresh_slots[static_cast<size_t>(slot)];
        if (i == 0 || step->begins_phase) phases_.push_back(i);
        if (step->begins_phase) {
            fresh.assign(values_.size(), false);
            fresh_slots.assign(slots_.size(), false);
        }
        for (const int value : step->makes) fresh[static_cast<size_t>(value)] = true;
        for (const int slot : step->made_slots) fresh_slots[static_cast<size_t>(slot)] = true;
    }
}

// --- memory --------------------------------------------------------------------------------------------------------

Program::SlotLayout Program::layout_of(const Slot& slot, int64_t rows) const {
    const int64_t multiple = slot.channels ? channel_rows_multiple : in_panels(rows) ? panel_rows : 1;
    const int64_t held = (rows + multiple - 1) / multiple * multiple;
    const auto bytes_of = [&](int64_t inputs) {
        return aligned(static_cast<size_t>(held * ((slot.inputs + inputs - 1) / inputs)) * sizeof(float));
    };
    const size_t scales = aligned(static_cast<size_t>(held * slot.padded));
    const size_t corrections = scales + bytes_of(slot.channels ? slot.inputs : slot.unit);
    return {scales, corrections, slot.channels ? corrections : corrections + bytes_of(corrected_inputs(slot, rows))};
}

QuantizedRows Program::group_rows(int id, const Frame& frame) const {
    const int64_t rows = frame.counts[static_cast<size_t>(slot(id).row_class)];
    const SlotLayout layout = layout_of(slot(id), rows);
    uint8_t* at = frame.slots[static_cast<size_t>(id)];
    const bool summed = !has_corrections(slot(id), rows);
    uint8_t* behind = at + layout.corrections;
    return {reinterpret_cast<int8_t*>(at),
            reinterpret_cast<float*>(at + layout.scales),
            summed ? nullptr : reinterpret_cast<float*>(behind),
            summed ? reinterpret_cast<int32_t*>(behind) : nullptr,
            rows,
            in_panels(rows),
            block_panels_of(slot(id).padded, slot(id).has_multiples)};
}

ChannelRows Program::channel_rows(int id, const Frame& frame) const {
    const int64_t rows = frame.counts[static_cast<size_t>(slot(id).row_class)];
    uint8_t* at = frame.slots[static_cast<size_t>(id)];
    return {reinterpret_cast<int8_t*>(at), reinterpret_cast<float*>(at + layout_of(slot(id), rows).scales), rows};
}

const Program::Plan& Program::plan_for(const std::vector<int64_t>& counts) {
    const auto known = plans_.find(counts);
    if (known != plans_.end()) return known->second;

    // from the phase that makes it to the last that reads it; what the caller holds has no place here
    struct Life {
        int first = -1, last = -1;
        size_t bytes = 0;
    };
    std::vector<Life> lives(values_.size() + slots_.size());
    int phase = 0;
    for (const auto& step : steps_) {
        phase += step->begins_phase;
        for (const int value : step->makes) lives[static_cast<size_t>(value)].first = phase;
        for (const int slot : step->made_slots) lives[values_.size() + static_cast<size_t>(slot)].first = phase;
        for (const int value : step->reads) lives[static_cast<size_t>(value)].last = phase;
        for (const int slot : step->read_slots) lives[values_.size() + static_cast<size_t>(slot)].last = phase;
    }
    for (const int value : outputs_) lives[static_cast<size_t>(value)].first = -1;
    for (size_t i = 0; i < lives.size(); i++) {
        const int64_t rows = counts[static_cast<size_t>(i < values_.size() ? values_[i].row_class
                                                                           : slots_[i - values_.size()].row_class)];
        lives[i].bytes = i < values_.size() ? aligned(static_cast<size_t>(rows * values_[i].width) * sizeof(float))
                                            : layout_of(slots_[i - values_.size()], rows).bytes;
    }

    // In the order in which they are made, each at the lowest place that is free all its life.
    std::vector<size_t> order, offsets(lives.size(), outside);
    for (size_t i = 0; i < lives.size(); i++)
        if (lives[i].first >= 0) order.push_back(i);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return lives[a].first < lives[b].first; });
    Plan plan;
    std::vector<size_t> placed;  // those still alive, by offset
    for (const size_t i : order) {
        placed.erase(std::remove_if(placed.begin(), placed.end(),
                                    [&](size_t other) { return lives[other].last < lives[i].first; }),
                     placed.end());
        size_t place = 0;
        auto before = placed.begin();
        for (; before != placed.end() && place + lives[i].bytes > offsets[*before]; ++before)
            place = std::max(place, offsets[*before] + lives[*before].bytes);
        offsets[i] = place;
        placed.insert(before, i);
        plan.bytes = std::max(plan.bytes, place + lives[i].bytes);
    }
    plan.values.assign(offsets.begin(), offsets.begin() + static_cast<std::ptrdiff_t>(values_.size()));
    plan.slots.assign(offsets.begin() + static_cast<std::ptrdiff_t>(values_.size()), offsets.end());
    if (plans_.size() >= 16) plans_.clear();  // prompts come in many lengths
    return plans_.emplace(counts, std::move(plan)).first->second;
}

// --- running it ----------------------------------------------------------------------------------------------------

void Program::run(Frame& frame) {
    require(frame.counts.size() >= static_cast<size_t>(classes_), "counts: of every row class");
    for (const int64_t count : frame.counts) require(count > 0, "counts: at least 1 row of every class");
    require(frame.arrays.size() >= static_cast<size_t>(arrays_), "arrays: of every slot");
    for (const int value : outputs_) require(frame.bound.count(value) != 0, "an output of the program was not given");
    const Plan& plan = plan_for(frame.counts);
    if (plan.bytes > arena_bytes_) {
        delete_bytes(arena_);
        arena_ = nullptr, arena_bytes_ = 0;
        arena_ = new_bytes(plan.bytes);
        arena_bytes_ = plan.bytes;
    }
    frame.values.assign(values_.size(), nullptr);
    frame.slots.assign(slots_.size(), nullptr);
    for (size_t i = 0; i < values_.size(); i++)
        if (plan.values[i] != outside) frame.values[i] = reinterpret_cast<float*>(arena_ + plan.values[i]);
    for (size_t i = 0; i < slots_.size(); i++)
        if (plan.slots[i] != outside) frame.slots[i] = arena_ + plan.slots[i];
    for (const auto& [value, data] : frame.bound) frame.values.at(static_cast<size_t>(value)) = data;
    for (const auto& step : steps_)
        for (const int value : step->reads)
            require(frame.values[static_cast<size_t>(value)] != nullptr, "an input of the program was not given");

    size_t scratch_bytes = 0;
    for (const auto& step : steps_) scratch_bytes = std::max(scratch_bytes, step->scratch_bytes(frame));
    if (scratch_bytes > scratch_bytes_) {
        for (uint8_t*& bytes : scratch_) {
            delete_bytes(bytes);
            bytes = nullptr;
        }
        scratch_bytes_ = 0;
        for (uint8_t*& bytes : scratch_) bytes = new_bytes(scratch_bytes);
        scratch_bytes_ = scratch_bytes;
    }
    frame.scratch = scratch_;

    const bool has_many_rows = std::any_of(frame.counts.begin(), frame.counts.end(),
                                           [](int64_t count) { return count >= least_rows_of_parts; });
    const int parts = has_many_rows ? Team::most_parts : 1;
    team_.run(static_cast<int>(phases_.size()), parts, [&](int phase, Share share) {
        const auto next = static_cast<size_t>(phase) + 1;
        const size_t end = next < phases_.size() ? phases_[next] : steps_.size();
        for (size_t i = phases_[next - 1]; i < end; i++) steps_[i]->run(frame, share);
    });
}

}  // namespace lensc
