// Runs every kernel of every instruction set of this processor and holds it against the portable ones: a check without
// Python, for processors that are emulated (`make check-aarch64`, `make check-x86`).
//
//     lensc_check [instruction sets that are expected to be usable, the best first]
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../executor/program.h"

namespace {

using lensc::CacheType;
using lensc::Frame;
using lensc::GroupWeight;
using lensc::Program;
using lensc::RowKind;

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 2685821657736338717u + 1) {}
    uint32_t bits() {
        state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
        return static_cast<uint32_t>(state_ * 2685821657736338717u >> 32);
    }
    float uniform() { return static_cast<float>(bits() >> 8) * 0x1p-24f; }
    std::vector<float> floats(int64_t count, float size = 1) {
        std::vector<float> made(static_cast<size_t>(count));
        // a sum of four is normal enough, outliers included
        for (float& x : made) x = size * (uniform() + uniform() + uniform() + uniform() - 2) * 1.7f;
        return made;
    }
    std::vector<uint8_t> bytes(int64_t count) {
        std::vector<uint8_t> made(static_cast<size_t>(count));
        for (uint8_t& x : made) x = static_cast<uint8_t>(bits());
        return made;
    }

  private:
    uint64_t state_;
};

// What a case computes with the kernels of an instruction set.
using Case = std::function<std::vector<float>(const std::string& isa, int threads)>;

int checks = 0, failures = 0;

// Outputs agree within `tolerance` of the largest.
void check(const std::string& name, const std::string& isa, float tolerance, const Case& run) {
    const std::vector<float> expected = run("generic", 1), got = run(isa, 2);
    float largest = 0, off = 0;
    bool finite = true;
    for (size_t i = 0; i < expected.size(); i++) {
        largest = std::fmax(largest, std::fabs(expected[i]));
        off = std::fmax(off, std::fabs(expected[i] - got[i]));
        finite = finite && std::isfinite(got[i]);
    }
    checks++;
    if (finite && got.size() == expected.size() && off <= tolerance * largest) return;
    failures++;
    std::printf("%s: %s is off by %g of %g\n", isa.c_str(), name.c_str(), static_cast<double>(off), static_cast<double>(largest));
}

// One input of `rows` rows through the steps that `add` makes: from value x to value y.
std::vector<float> run_rows(const std::string& isa, int threads, int64_t rows, int64_t inputs, int64_t outputs,
                            const std::function<void(Program&, int x, int y)>& add) {
    Program program(isa, threads);
    const int x = program.value(0, inputs), y = program.value(0, outputs);
    add(program, x, y);
    program.output(y);
    program.finish();
    std::vector<float> from = Random(static_cast<uint64_t>(rows)).floats(rows * inputs), made(static_cast<size_t>(rows * outputs));
    Frame frame;
    frame.counts = {rows};
    frame.bound = {{x, from.data()}, {y, made.data()}};
    program.run(frame);
    return made;
}

void check_linears(const std::string& isa) {
    struct Format {
        int64_t outputs, inputs;
        int bits;
        int64_t group;
        bool zeros, is_signed, has_multiples = false;
    };
    const Format formats[] = {
        {70, 256, 4, 128, false, false}, {33, 320, 4, 32, true, false},  {31, 104, 4, 16, true, false},
        {40, 200, 4, 128, true, false},  {40, 768, 4, 256, true, false}, {45, 176, 8, 176, false, true},
        {37, 200, 8, 32, true, false},   {5, 12, 8, 4, true, false},     {3, 6, 8, 6, false, false},
        {2, 10, 4, 10, false, false},    {39, 776, 2, 32, true, false},  {40, 528, 2, 16, false, false},
        {35, 1288, 2, 256, true, false},
        {70, 256, 4, 128, false, false, true}, {33, 328, 4, 32, false, false, true},
        {65, 2304, 4, 256, false, false, true}, {1, 4304, 4, 4304, false, false, true},
        {39, 776, 2, 64, false, false, true}, {35, 1288, 2, 256, false, false, true},
    };
    for (const Format& f : formats) {
        Random random(static_cast<uint64_t>(f.inputs));
        GroupWeight w{};
        w.outputs = f.outputs, w.inputs = f.inputs, w.group = f.group, w.bits = f.bits, w.is_signed = f.is_signed;
        w.zero_point = 1 << (f.bits - 1);
        const std::vector<uint8_t> values = random.bytes(f.outputs * w.row_bytes());
        const std::vector<uint8_t> zeros = random.bytes((f.outputs * w.groups() * f.bits + 7) / 8);
        std::vector<float> scales = random.floats(f.outputs * w.groups(), 0.01f), bias = random.floats(f.outputs);
        w.values = values.data(), w.scales = scales.data(), w.zero_points = f.zeros ? zeros.data() : nullptr;
        const std::vector<uint8_t> random_bytes = random.bytes(f.outputs * w.groups());
        std::vector<int8_t> multiples;
        for (const uint8_t byte : random_bytes) multiples.push_back(static_cast<int8_t>(byte % 31 - lensc::most_multiple));
        if (f.has_multiples) w.multiples = multiples.data();
        const std::string name = (f.has_multiples ? "multiples, " : "") + std::to_string(f.bits) + " bits, groups of " + std::to_string(f.group);
        for (const int64_t rows : {1, 2, 3, 8, 9, 17, 40}) {
            check("int4_linear, " + name + ", rows " + std::to_string(rows), isa, 1e-5f, [&](const std::string& set, int threads) {
                return run_rows(set, threads, rows, f.inputs, f.outputs,
                                [&](Program& p, int x, int y) { p.int4_linear(x, w, bias.data(), -1, y); });
            });
            check("float_linear, " + name + ", rows " + std::to_string(rows), isa, 1e-5f, [&](const std::string& set, int threads) {
                return run_rows(set, threads, rows, f.inputs, f.outputs,
                                [&](Program& p, int x, int y) { p.float_linear(x, nullptr, w, bias.data(), -1, y); });
            });
        }
    }
    for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{1, 1}, {33, 3}, {32, 64}, {70, 588}}) {
        Random random(static_cast<uint64_t>(outputs));
        lensc::ChannelWeight w{nullptr, nullptr, nullptr, outputs, inputs};
        const int64_t padded = w.padded_inputs();
        std::vector<int8_t> values(static_cast<size_t>(w.padded_outputs() * padded));
        std::vector<int32_t> sums(static_cast<size_t>(outputs));
        for (int64_t o = 0; o < outputs; o++)
            for (int64_t i = 0; i < inputs; i++) {
                const auto value = static_cast<int8_t>(random.bits());
                values[static_cast<size_t>(o / 16 * 16 * padded + i / 4 * 64 + o % 16 * 4 + i % 4)] = value;
                sums[static_cast<size_t>(o)] += value;
            }
        const std::vector<float> scales = random.floats(outputs, 0.01f);
        w.values = values.data(), w.scales = scales.data(), w.sums = sums.data();
        for (const int64_t rows : {1, 7, 40, 300})
            check("int8_linear, rows " + std::to_string(rows), isa, 1e-5f, [&](const std::string& set, int threads) {
                return run_rows(set, threads, rows, w.inputs, w.outputs,
                                [&](Program& p, int x, int y) { p.int8_linear(x, w, nullptr, -1, y); });
            });
        const std::vector<float> floats = random.floats(outputs * inputs);
        check("float_linear on floats", isa, 1e-5f, [&](const std::string& set, int threads) {
            return run_rows(set, threads, 7, w.inputs, w.outputs, [&](Program& p, int x, int y) {
                GroupWeight shape{};
                shape.outputs = w.outputs, shape.inputs = w.inputs;
                p.float_linear(x, floats.data(), shape, nullptr, -1, y);
            });
        });
    }
}

void check_rows(const std::string& isa) {
    for (const int64_t width : {1, 7, 16, 100, 588}) {
        const std::vector<float> weight = Random(3).floats(width), bias = Random(4).floats(width);
        const std::pair<const char*, RowKind> kinds[] = {{"rms_norm", RowKind::rms_norm},
                                                         {"layer_norm", RowKind::layer_norm},
                                                         {"silu_mul", RowKind::silu_mul},
                                                         {"gelu_tanh", RowKind::gelu_tanh}};
        for (const auto& kind : kinds)
            check(std::string(kind.first) + ", width " + std::to_string(width), isa, 1e-5f, [&](const std::string& set, int threads) {
                return run_rows(set, threads, 7, width, width, [&](Program& p, int x, int y) {
                    p.rows(kind.second, x, kind.second == RowKind::silu_mul ? x : -1, weight.data(), bias.data(), 1e-6f, y);
                });
            });
    }
}

// A decoder's attention over two sequences: what it returns, and what it leaves in the cache.
std::vector<float> run_causal(const std::string& isa, int threads, CacheType type, int64_t past, int64_t tokens, int dim) {
    constexpr int heads = 4, kv_heads = 2, sequences = 2;
    const int capacity = static_cast<int>(past + tokens) + 3;
    const int64_t values = int64_t(kv_heads) * capacity * dim, rows = sequences * tokens;
    const size_t item = type == CacheType::float32 ? 4 : type == CacheType::float16 ? 2 : 1;
    std::vector<uint8_t> keys_at(static_cast<size_t>(sequences * values) * item), values_at(keys_at.size());
    std::vector<float> scales(static_cast<size_t>(2 * sequences * kv_heads * capacity), 0.01f);
    Program program(isa, threads);
    const int q = program.value(0, heads * dim), k = program.value(0, kv_heads * dim), v = program.value(0, kv_heads * dim);
    const int y = program.value(0, heads * dim);
    std::vector<float> frequencies(static_cast<size_t>(dim / 2));
    for (size_t i = 0; i < frequencies.size(); i++) frequencies[i] = std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(dim));
    program.causal_attention(q, k, v, y, 1, 0, heads, 1 / std::sqrt(static_cast<float>(dim)), frequencies.data());
    program.output(y);
    program.finish();
    Random random(7);
    std::vector<float> made(static_cast<size_t>(rows * heads * dim)), all;
    for (int64_t before = 0; before <= past; before += std::max<int64_t>(past, 1)) {
        const int64_t count = before < past ? past : tokens;
        std::vector<float> queries = random.floats(sequences * count * heads * dim);
        std::vector<float> new_keys = random.floats(sequences * count * kv_heads * dim), new_values = new_keys;
        made.assign(queries.size(), 0);
        Frame frame;
        frame.counts = {sequences * count, sequences};
        frame.bound = {{q, queries.data()}, {k, new_keys.data()}, {v, new_values.data()}, {y, made.data()}};
        frame.past = before;
        for (int64_t t = 0; t < count; t++) frame.positions.push_back(before + t);
        for (int64_t s = 0; s < sequences; s++)
            frame.caches.push_back({type, kv_heads, capacity, dim, keys_at.data() + static_cast<size_t>(s * values) * item,
                                    values_at.data() + static_cast<size_t>(s * values) * item,
                                    scales.data() + s * kv_heads * capacity,
                                    scales.data() + (sequences + s) * kv_heads * capacity});
        program.run(frame);
        all.insert(all.end(), made.begin(), made.end());
    }
    return all;
}

void check_attention(const std::string& isa) {
    // Tiles multiply bfloat16; where every query sees all keys, AVX2 multiplies int16.
    const float tolerance = isa == "amx" ? 2e-2f : 1e-4f, full_tolerance = isa == "avx2" || isa == "avxvnni" ? 2e-3f : tolerance;
    const std::pair<const char*, CacheType> types[] = {
        {"float32", CacheType::float32}, {"float16", CacheType::float16}, {"int8", CacheType::int8}};
    for (const auto& type : types)
        for (const int dim : {16, 72, 128})
            for (const int64_t past : {0, 1, 70})
                for (const int64_t tokens : {1, 5, 70})
                    check(std::string("causal_attention, ") + type.first + ", dim " + std::to_string(dim) + ", past " +
                              std::to_string(past) + ", tokens " + std::to_string(tokens),
                          isa, type.second == CacheType::int8 ? 2e-2f : tolerance, [&](const std::string& set, int threads) {
                              return run_causal(set, threads, type.second, past, tokens, dim);
                          });
    for (const int64_t width : {16, 144, 256})
        for (const bool exact : {false, true})
            for (const int64_t rows : {1, 7, 100})
                check("attention, width " + std::to_string(width) + ", rows " + std::to_string(rows), isa, exact ? 1e-4f : full_tolerance,
                      [&](const std::string& set, int threads) {
                          Program program(set, threads);
                          const int q = program.value(0, width), y = program.value(0, width);
                          program.attention(q, nullptr, q, q, y, 1, 0, 2, 0.2f, exact);
                          program.output(y);
                          program.finish();
                          Random random(9);
                          std::vector<float> x = random.floats(2 * rows * width), made(x.size()), bias(static_cast<size_t>(2 * rows));
                          for (size_t i = 0; i + 1 < bias.size(); i += 3) bias[i] = -INFINITY;
                          bias[0] = 0;
                          Frame frame;
                          frame.counts = {2 * rows, 2};
                          frame.bound = {{q, x.data()}, {y, made.data()}};
                          frame.arrays = {bias.data()};
                          program.run(frame);
                          return made;
                      });
}

// In every phase each share sums up what all shares of the phase before have made: one that begins too early, is left out or is
// done twice shows in the end, over many short runs.
void check_team() {
    for (const int threads : {1, 2, 3, 5}) {
        lensc::Team team(threads);
        for (int run = 0; run < 2000; run++) {
            const int phases = 1 + run % 7, parts = 1 << run % 3, shares = threads * parts;
            std::vector<int64_t> made(static_cast<size_t>(phases * shares), 0);
            team.run(phases, parts, [&](int phase, lensc::Share share) {
                const int64_t* before = made.data() + (phase - 1) * share.count;
                int64_t sum = phase == 0;
                for (int i = 0; phase > 0 && i < share.count; i++) sum += before[i];
                made[static_cast<size_t>(phase * share.count + share.index)] += sum;
            });
            int64_t expected = 1;
            for (int phase = 1; phase < phases; phase++) expected *= shares;
            bool right = true;
            for (int i = 0; i < shares; i++) right = right && made[static_cast<size_t>((phases - 1) * shares + i)] == expected;
            checks++;
            if (!right && failures++ < 20) std::printf("team of %d, run %d of %d phases: FAILED\n", threads, run, phases);
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    check_team();
    std::printf("team: %d checks, %d failed\n", checks, failures);
    const std::vector<std::string> usable = lensc::usable_isas(), expected(arguments + 1, arguments + count);
    for (const std::string& isa : usable) {
        checks = 0;
        const int before = failures;
        check_linears(isa);
        check_rows(isa);
        check_attention(isa);
        std::printf("%s: %d checks, %d failed\n", isa.c_str(), checks, failures - before);
    }
    if (!expected.empty() && expected != usable) {
        std::printf("other instruction sets are usable than expected\n");
        return 1;
    }
    return failures != 0;
}
