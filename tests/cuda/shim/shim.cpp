// Runs a CUDA kernel's own source on one CPU thread, and reports what a GPU would let pass.
//
// Threads of a block are fibers. Barriers and warp collectives are rendezvous: each fiber leaves its operands and stops, the last
// one carries the instruction out for all. Every access of the kernel to memory arrives here through the functions that
// -fsanitize=thread makes g++ call; this file itself is compiled without it. Reported, by kernel line:
//   race           an access to shared memory that no barrier orders after another thread's
//   unwritten      a read of shared memory, an output or a scratch tensor that nothing wrote
//   pending        a use of cp.async's destination, or of a warpgroup product's registers, before the wait
//   unfenced       a warpgroup product of registers, or of shared memory, whose writes no fence of their kind orders before it
//   descriptor     a matrix descriptor that means nothing, or another matrix than its product's
//   bounds         an access outside of the tensors and of the shared memory asked for (the launch is given up)
//   input          a write to an input
//   twice          an output byte written twice
//   missing        an output byte never written
//   same-launch    a read of what another block of the same launch may still have to write, or has in its L1 cache
//   misaligned     an access that is not aligned to its size
//   divergent      lanes of a warp meet at different instructions
//   deadlock       threads wait for others that have left
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <dlfcn.h>

extern "C" void shim_switch(void** save, void* to);
asm(R"(
.text
.globl shim_switch
.type shim_switch,@function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace {

constexpr int kWarp = 32, kWarpgroup = 128, kMaxThreads = 1024;
constexpr size_t kStack = 128 * 1024, kMaxShared = 256 * 1024;
constexpr uint16_t kNobody = 0xffff, kSeveral = 0xfffe;
// What is known of a word on a thread's stack: how many register fences the thread had passed when it wrote it, or read of it what a
// product had written; or that a product is under way that writes or reads it.
constexpr uint32_t kWrittenByProduct = 0, kAccumulating = 1, kMultiplying = 2, kFirstFence = 3;

// One 2-byte cell of shared memory. An epoch is (block barriers passed, barriers this warp passed); both only grow.
struct Cell {
    uint32_t write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;
    uint16_t writer = kNobody, reader = kNobody, reader_warp = 0;
    uint32_t write_fence = 0;  // the writer's proxy fences until then
    uint16_t products = 0;     // warpgroup products under way that read it
    bool pending = false;
};

// Of each byte of an output: 0, or the number of the launch that wrote it, with kReleased if its block has since taken a ticket. Kept byte by byte, or as a table where that is too much.
constexpr uint32_t kReleased = 0x80000000u;
struct Written {
    std::vector<uint32_t> dense;
    std::unordered_map<size_t, uint32_t> sparse;

    explicit Written(size_t bytes) : dense(bytes <= kDense ? bytes : 0) {}
    uint32_t& operator[](size_t byte) { return dense.empty() ? sparse[byte] : dense[byte]; }
    static constexpr size_t kDense = size_t{1} << 28;
};

struct Range {
    const unsigned char* begin;
    const unsigned char* end;
    bool output;
    Written written;
    std::vector<long> read_by;  // where reads are counted: of each two bytes, the last block that read them
    bool tickets = false;       // of which not all need be taken
};

// Bytes of a tensor that a launch moves. `asked`: what warps ask for, each byte once an instruction, as memory serves a warp; the L2
// cache gives no more than that. `once`: each byte once a block; it gives no less.
struct Traffic {
    long asked = 0, once = 0, written = 0;
};

// A lane's read: the instruction, how often the lane has come to it, and the address.
struct Read {
    uintptr_t pc;
    const unsigned char* address;
    uint32_t visit;
    int warp;
    bool operator==(const Read&) const = default;
};
struct ReadHash {
    size_t operator()(const Read& r) const {
        size_t h = r.pc;
        for (const size_t part : {reinterpret_cast<size_t>(r.address), size_t{r.visit}, static_cast<size_t>(r.warp)})
            h = (h ^ part) * 0x9e3779b97f4a7c15u;
        return h ^ h >> 32;
    }
};

struct Copy {
    unsigned char* to;
    const unsigned char* from;  // null: zeros
    int bytes;
    int group;
};

enum class Wait { none, block, warp, shuffle, ldmatrix, mma, wgmma, wgmma_wait, done };

struct Operands {
    float value = 0, result = 0;
    int lanes = 0;
    uint32_t* words = nullptr;
    float* sums = nullptr;
    const uint32_t* a = nullptr;
    uint32_t address = 0, b0 = 0, b1 = 0;
    int flag = 0, columns = 0, accumulate = 0;
    uint64_t a_descriptor = 0, descriptor = 0;
};

// Accumulators of a warpgroup while products on them are under way: what is in them meanwhile is nobody's business.
struct Hidden {
    std::vector<float> sums;  // [64][columns]
    int products = 0;
};

struct Product {
    int group;
    float* sums;  // of the warpgroup's first thread: the key of its Hidden
    std::vector<float*> d;
    std::vector<const uint32_t*> a;  // empty where the first operand is in shared memory
    int columns;
    std::vector<uint32_t> cells;
};

struct Warpgroup {
    std::vector<Product> products;
    std::map<float*, Hidden> hidden;
};

struct Fiber {
    void* stack_pointer = nullptr;
    Wait waiting = Wait::none;
    const char* file = nullptr;
    int line = 0;
    Operands operands;
    std::vector<Copy> copies;
    int groups = 0;
    int products = 0;                    // groups of warpgroup products committed
    uint32_t register_fences = kFirstFence;  // ever: a word of an earlier block is fenced
    std::vector<uint32_t> proxy_fences;  // the block epoch of each
    std::unordered_map<uintptr_t, uint32_t> visits;  // to each instruction that reads a tensor, where that is counted
};

struct State {
    unsigned char* shared = nullptr;
    unsigned char* stacks = nullptr;
    uint32_t* words = nullptr;  // of the stacks
    Warpgroup warpgroups[kMaxThreads / kWarpgroup];
    std::vector<Cell> cells = std::vector<Cell>(kMaxShared / 2);
    Fiber fibers[kMaxThreads];
    uint32_t warp_epoch[kMaxThreads / kWarp] = {};
    uint32_t block_epoch = 1, first_epoch = 1, launches = 0;
    int threads = 0, current = -1, bx = 0, by = 0;
    size_t shared_bytes = 0;
    void* main_stack = nullptr;
    bool running = false, gave_up = false;
    void (*body)(const void*) = nullptr;
    const void* params = nullptr;
    std::vector<Range> ranges;
    size_t last_range = 0;
    int schedule = 0;
    uint64_t seed = 1;
    std::string skipped;
    std::set<std::string> barriers;
    std::map<std::pair<std::string, std::string>, std::pair<long, std::string>> reports;  // (kind, place): how often, first
    const unsigned char* host_stack = nullptr;
    long blocks_run = 0, only_last = 0;
    size_t most_shared = 0;
    bool counting = false;
    std::map<std::pair<uint32_t, const unsigned char*>, Traffic> traffic;  // (launch, where the tensor begins)
    std::unordered_set<Read, ReadHash> reads;                             // of this block
    std::vector<uint32_t*> block_writes;  // this block's since its last ticket: what is known of each byte
    bool took_ticket = false;
} S;

// Where in the kernel: a return address, or a line.
struct Where {
    uintptr_t pc = 0;
    const char* file = nullptr;
    int line = 0;

    std::string text() const {
        if (file) return std::string(file) + ":" + std::to_string(line);
        Dl_info info{};
        if (!pc || !dladdr(reinterpret_cast<void*>(pc), &info)) return "?";
        return "+" + std::to_string(pc - reinterpret_cast<uintptr_t>(info.dli_fbase));
    }
};

// One entry for each kind and place; the first one tells who.
void report(const char* kind, const Where& where, const std::string& what) {
    auto& entry = S.reports[{kind, where.text()}];
    if (entry.first++ == 0)
        entry.second = "thread " + std::to_string(S.current) + " of block (" + std::to_string(S.bx) + ", " + std::to_string(S.by) + "): " + what;
}

void to_main() { shim_switch(&S.fibers[S.current].stack_pointer, S.main_stack); }

[[gnu::noreturn]] void give_up() {
    S.gave_up = true;
    to_main();
    __builtin_unreachable();
}

bool ordered(uint16_t thread, uint32_t block, uint32_t warp, int me) {
    return block < S.block_epoch || thread == me || (thread / kWarp == me / kWarp && warp < S.warp_epoch[me / kWarp]);
}

void write_cell(Cell& cell, const Where& pc, bool landing = false) {
    const int me = S.current, warp = me / kWarp;
    if (cell.pending && !landing) report("pending", pc, "write to where a cp.async is still to land");
    if (cell.writer != kNobody && cell.write_block >= S.first_epoch && !ordered(cell.writer, cell.write_block, cell.write_warp, me))
        report("race", pc, "write after thread " + std::to_string(cell.writer) + "'s write");
    if (cell.reader != kNobody && cell.read_block == S.block_epoch && !landing) {
        const bool mine = cell.reader == me;
        const bool before = cell.reader_warp == warp && cell.reader != kSeveral && cell.read_warp < S.warp_epoch[warp];
        const bool several_here = cell.reader == kSeveral && cell.reader_warp == warp && cell.read_warp < S.warp_epoch[warp];
        if (!mine && !before && !several_here) report("race", pc, "write after another thread's read");
    }
    if (cell.products) report("race", pc, "write to what a warpgroup product under way reads");
    cell.writer = static_cast<uint16_t>(me);
    cell.write_block = S.block_epoch;
    cell.write_warp = S.warp_epoch[warp];
    cell.write_fence = static_cast<uint32_t>(S.fibers[me].proxy_fences.size());
}

constexpr uint16_t kManyWarps = 0xffff;

void read_cell(Cell& cell, const Where& pc) {
    const int me = S.current, warp = me / kWarp;
    if (cell.pending)
        report("pending", pc, "read of where a cp.async is still to land");
    else if (cell.writer == kNobody || cell.write_block < S.first_epoch)
        report("unwritten", pc, "read of shared memory that this block has not written");
    else if (!ordered(cell.writer, cell.write_block, cell.write_warp, me))
        report("race", pc, "read after thread " + std::to_string(cell.writer) + "'s write");
    if (cell.read_block != S.block_epoch || cell.reader == kNobody) {
        cell.reader = static_cast<uint16_t>(me);
        cell.reader_warp = static_cast<uint16_t>(warp);
    } else if (cell.reader_warp != warp) {
        cell.reader = kSeveral;
        cell.reader_warp = kManyWarps;
    } else if (cell.read_warp < S.warp_epoch[warp]) {
        cell.reader = static_cast<uint16_t>(me);
    } else if (cell.reader != me) {
        cell.reader = kSeveral;
    }
    cell.read_block = S.block_epoch;
    cell.read_warp = S.warp_epoch[warp];
}

bool inside(const void* p, const unsigned char* begin, size_t bytes) {
    const auto* at = static_cast<const unsigned char*>(p);
    return at >= begin && at < begin + bytes;
}

Range* find_range(const unsigned char* p, int bytes) {
    auto holds = [&](const Range& r) { return p >= r.begin && p + bytes <= r.end; };
    if (S.last_range < S.ranges.size() && holds(S.ranges[S.last_range])) return &S.ranges[S.last_range];
    for (size_t i = 0; i < S.ranges.size(); i++)
        if (holds(S.ranges[i])) {
            S.last_range = i;
            return &S.ranges[i];
        }
    return nullptr;
}

uint32_t& stack_word(const void* p) { return S.words[(static_cast<const unsigned char*>(p) - S.stacks) / 4]; }

void count(Range& range, const unsigned char* p, int bytes, bool write, uintptr_t pc) {
    Traffic& traffic = S.traffic[{S.launches, range.begin}];
    if (write) {
        traffic.written += bytes;
        return;
    }
    if (S.reads.insert({pc, p, S.fibers[S.current].visits[pc]++, S.current / kWarp}).second) traffic.asked += bytes;
    range.read_by.resize((range.end - range.begin + 1) / 2);
    for (size_t cell = (p - range.begin) / 2; cell <= static_cast<size_t>(p + bytes - 1 - range.begin) / 2; cell++)
        if (std::exchange(range.read_by[cell], S.blocks_run + 1) != S.blocks_run + 1) traffic.once += 2;
}

// `fresh`: past the L1 cache.
void access(const void* address, int bytes, bool write, const Where& pc, bool fresh = false) {
    const auto* p = static_cast<const unsigned char*>(address);
    if (inside(p, S.stacks + S.current * kStack, kStack)) {
        for (const unsigned char* word = p - reinterpret_cast<uintptr_t>(p) % 4; word < p + bytes; word += 4) {
            uint32_t& state = stack_word(word);
            if (state == kAccumulating)
                report("pending", pc, "use of accumulators that a warpgroup product is still to write");
            else if (write && state == kMultiplying)
                report("pending", pc, "write to registers that a warpgroup product under way reads");
            else if (write || state == kWrittenByProduct)
                state = S.fibers[S.current].register_fences;
        }
        return;
    }
    // The launch's parameters lie on the stack of the thread that launches.
    if (!write && p >= S.host_stack && p < S.host_stack + 64 * 1024) return;
    if (reinterpret_cast<uintptr_t>(p) % bytes) report("misaligned", pc, std::to_string(bytes) + " bytes");
    if (inside(p, S.shared, kMaxShared)) {
        const size_t offset = p - S.shared;
        if (offset + bytes > S.shared_bytes) {
            report("bounds", pc, "shared memory at " + std::to_string(offset) + " of " + std::to_string(S.shared_bytes));
            give_up();
        }
        for (size_t cell = offset / 2; cell <= (offset + bytes - 1) / 2; cell++)
            write ? write_cell(S.cells[cell], pc) : read_cell(S.cells[cell], pc);
        return;
    }
    Range* range = find_range(p, bytes);
    if (!range) {
        report("bounds", pc, write ? "write outside of every tensor" : "read outside of every tensor");
        give_up();
    }
    if (S.counting) count(*range, p, bytes, write, pc.pc);
    if (!range->output) {
        if (write) {
            report("input", pc, "write to an input");
            give_up();
        }
        return;
    }
    for (const unsigned char* b = p; b < p + bytes; b++) {
        uint32_t& by = range->written[b - range->begin];
        if (write) {
            if (by) report("twice", pc, "output byte " + std::to_string(b - range->begin));
            by = S.launches;
            S.block_writes.push_back(&by);
        } else if (!by) {
            report("unwritten", pc, "read of an output byte that nothing wrote");
        } else if (by == S.launches) {
            report("same-launch", pc, "read of what this launch wrote, with no ticket after it");
        } else if (by == (S.launches | kReleased) && !(fresh && S.took_ticket)) {
            report("same-launch", pc, S.took_ticket ? "read from the L1 cache of what this launch wrote" : "read before a ticket was taken");
        }
    }
}

void land(Fiber& fiber, int pending) {
    auto keep = fiber.copies.begin();
    for (auto& copy : fiber.copies) {
        if (copy.group >= fiber.groups - pending) {
            *keep++ = copy;
            continue;
        }
        if (copy.from)
            std::memcpy(copy.to, copy.from, copy.bytes);
        else
            std::memset(copy.to, 0, copy.bytes);
        for (int i = 0; i < copy.bytes / 2; i++) {
            Cell& cell = S.cells[(copy.to - S.shared) / 2 + i];
            cell.pending = false;
            write_cell(cell, {}, true);
        }
    }
    fiber.copies.erase(keep, fiber.copies.end());
}

float half_value(uint32_t bits, bool bf16) {
    if (bf16) return __builtin_bit_cast(float, (bits & 0xffffu) << 16);
    return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(bits)));
}

void run_ldmatrix(int warp) {
    Fiber* lanes = S.fibers + warp * kWarp;
    uint16_t matrix[4][8][8];
    const int saved = S.current;
    for (int lane = 0; lane < kWarp; lane++) {
        S.current = warp * kWarp + lane;
        const Fiber& f = lanes[lane];
        const uint32_t at = f.operands.address;
        const Where where{0, f.file, f.line};
        if (at % 16) report("misaligned", where, "ldmatrix row not on 16 bytes");
        if (at + 16 > S.shared_bytes) {
            report("bounds", where, "ldmatrix row outside of the shared memory asked for");
            S.gave_up = true;
            S.current = saved;
            return;
        }
        // Whose read it is does not matter within a warp: ldmatrix orders nothing, and each lane gives a row of its own.
        for (int i = 0; i < 8; i++) read_cell(S.cells[at / 2 + i], where);
        std::memcpy(matrix[lane / 8][lane % 8], S.shared + at, 16);
    }
    for (int lane = 0; lane < kWarp; lane++) {
        const bool transposed = lanes[lane].operands.flag;
        const int row = lane / 4, column = lane % 4 * 2;
        for (int m = 0; m < 4; m++) {
            const uint32_t low = transposed ? matrix[m][column][row] : matrix[m][row][column];
            const uint32_t high = transposed ? matrix[m][column + 1][row] : matrix[m][row][column + 1];
            lanes[lane].operands.words[m] = low | high << 16;
        }
        S.current = warp * kWarp + lane;
        for (int m = 0; m < 4; m++) access(lanes[lane].operands.words + m, 4, true, {0, lanes[lane].file, lanes[lane].line});
    }
    S.current = saved;
}

void run_mma(int warp) {
    Fiber* lanes = S.fibers + warp * kWarp;
    float a[16][16], b[16][8], c[16][8];
    const bool bf16 = lanes[0].operands.flag;
    for (int lane = 0; lane < kWarp; lane++) {
        const Operands& o = lanes[lane].operands;
        const int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                a[row + i % 2 * 8][column + i / 2 * 8 + half] = half_value(o.a[i] >> 16 * half, bf16);
        for (int half = 0; half < 2; half++) {
            b[column + half][row] = half_value(o.b0 >> 16 * half, bf16);
            b[column + 8 + half][row] = half_value(o.b1 >> 16 * half, bf16);
        }
        for (int i = 0; i < 4; i++) c[row + i / 2 * 8][column + i % 2] = o.sums[i];
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < kWarp; lane++)
        for (int i = 0; i < 4; i++) lanes[lane].operands.sums[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

// A K-major matrix of `columns` rows by 16 as its descriptor says, and the cells it takes.
bool read_matrix(uint64_t descriptor, int columns, bool bf16, const Where& where, std::vector<float>& matrix, std::vector<uint32_t>& cells) {
    const uint32_t start = (descriptor & 0x3fff) << 4, units = (descriptor >> 16 & 0x3fff) << 4, rows = (descriptor >> 32 & 0x3fff) << 4;
    const int mode = static_cast<int>(descriptor >> 62);
    // Bytes of a row: 16 without a swizzle, or what its pattern is named after.
    const uint32_t pitch = mode == 0 ? 16 : 256u >> mode, pattern = pitch * 8;
    if (descriptor >> 49 & 7 || descriptor >> 52 & 0x3ff || (mode && rows % pattern)) {
        report("descriptor", where, "base offset, reserved bits or rows across the swizzle's pattern");
        return false;
    }
    matrix.resize(columns * 16);
    for (int n = 0; n < columns; n++) {
        for (int k = 0; k < 16; k++) {
            uint32_t at = start + n / 8 * rows + n % 8 * pitch + k / 8 * (mode ? 16 : units) + k % 8 * 2;
            // Bits 4 and up, as many as number the 16-byte units of a row, with bits 7 and up.
            if (mode) at ^= (at >> 3) & (pitch - 16);
            if (at + 2 > S.shared_bytes) {
                report("bounds", where, "warpgroup product of shared memory at " + std::to_string(at) + " of " + std::to_string(S.shared_bytes));
                S.gave_up = true;
                return false;
            }
            Cell& cell = S.cells[at / 2];
            if (cell.pending) {
                report("pending", where, "warpgroup product of where a cp.async is still to land");
            } else if (cell.writer == kNobody || cell.write_block < S.first_epoch) {
                report("unwritten", where, "warpgroup product of shared memory that this block has not written");
            } else {
                const auto& fences = S.fibers[cell.writer].proxy_fences;
                if (cell.write_block == S.block_epoch)
                    report("race", where, "warpgroup product after thread " + std::to_string(cell.writer) + "'s write");
                else if (cell.write_fence >= fences.size() || fences[cell.write_fence] == S.block_epoch)
                    report("unfenced", where, "no proxy fence between thread " + std::to_string(cell.writer) + "'s write and the barrier");
            }
            cells.push_back(at / 2);
            uint16_t bits;
            std::memcpy(&bits, S.shared + at, 2);
            matrix[n * 16 + k] = half_value(bits, bf16);
        }
    }
    return true;
}

void run_wgmma(int first) {
    Fiber* threads = S.fibers + first;
    Warpgroup& warpgroup = S.warpgroups[first / kWarpgroup];
    const Operands& leader = threads[0].operands;
    const Where where{0, threads[0].file, threads[0].line};
    const bool bf16 = leader.flag;
    const int columns = leader.columns;
    const int saved = S.current;
    for (int t = 0; t < kWarpgroup; t++) {
        const Operands& o = threads[t].operands;
        if (o.descriptor != leader.descriptor || o.a_descriptor != leader.a_descriptor || o.accumulate != leader.accumulate || threads[t].products != threads[0].products)
            report("divergent", where, "the threads of a warpgroup give different descriptors or groups");
    }
    Product product{threads[0].products, leader.sums, {}, {}, columns, {}};
    std::vector<float> b, a(64 * 16);
    if (!read_matrix(leader.descriptor, columns, bf16, where, b, product.cells)) return;
    if (!leader.a && !read_matrix(leader.a_descriptor, 64, bf16, where, a, product.cells)) return;
    Hidden& hidden = warpgroup.hidden[leader.sums];
    const bool begins = hidden.products == 0;
    hidden.sums.resize(64 * columns);
    for (int t = 0; t < kWarpgroup; t++) {
        S.current = first + t;
        const Operands& o = threads[t].operands;
        const uint32_t unfenced = threads[t].register_fences;
        const int row = t / kWarp * 16 + t % kWarp / 4, column = t % 4 * 2;
        for (int i = 0; i < (o.a ? 4 : 0); i++) {
            uint32_t& state = stack_word(o.a + i);
            if (state == kAccumulating) report("pending", where, "product of what another one is still to write");
            if (state == unfenced) report("unfenced", where, "no register fence after the first operand was written");
            state = kMultiplying;
            for (int half = 0; half < 2; half++) a[(row + i % 2 * 8) * 16 + column + i / 2 * 8 + half] = half_value(o.a[i] >> 16 * half, bf16);
        }
        for (int i = 0; i < columns / 2; i++) {
            uint32_t& state = stack_word(o.sums + i);
            if (begins) {
                if (state == unfenced) report("unfenced", where, "no register fence after the accumulators were written or read");
                hidden.sums[(row + i / 2 % 2 * 8) * columns + i / 4 * 8 + column + i % 2] = o.sums[i];
                std::memset(o.sums + i, 0xff, 4);
            }
            state = kAccumulating;
        }
        if (o.a) product.a.push_back(o.a);
        product.d.push_back(o.sums);
    }
    S.current = saved;
    if (!leader.accumulate) std::fill(hidden.sums.begin(), hidden.sums.end(), 0.0f);
    std::vector<float> transposed(16 * columns);
    for (int n = 0; n < columns; n++)
        for (int k = 0; k < 16; k++) transposed[k * columns + n] = b[n * 16 + k];
    for (int i = 0; i < 64; i++) {
        float* sums = hidden.sums.data() + i * columns;
        for (int k = 0; k < 16; k++) {
            const float* by = transposed.data() + k * columns;
            const float factor = a[i * 16 + k];
            for (int j = 0; j < columns; j++) sums[j] += factor * by[j];
        }
    }
    hidden.products++;
    for (uint32_t cell : product.cells) S.cells[cell].products++;
    warpgroup.products.push_back(std::move(product));
}

// What is known of the registers of a product's first operand.
void mark(const Product& product, uint32_t state) {
    for (const uint32_t* a : product.a)
        for (int i = 0; i < 4; i++) stack_word(a + i) = state;
}

// Its registers are ordinary ones again.
void forget(const Product& product) {
    mark(product, kWrittenByProduct);
    for (int t = 0; t < kWarpgroup; t++) {
        for (int i = 0; i < product.columns / 2; i++) stack_word(product.d[t] + i) = kWrittenByProduct;
    }
}

// Finishes the warpgroup's products but those of the latest groups.
void run_wgmma_wait(int first) {
    Warpgroup& warpgroup = S.warpgroups[first / kWarpgroup];
    const int pending = S.fibers[first].operands.lanes;
    std::vector<Product> kept;
    for (Product& product : warpgroup.products) {
        if (product.group >= S.fibers[first].products - pending) {
            kept.push_back(std::move(product));
            continue;
        }
        mark(product, kWrittenByProduct);
        // Whoever writes there next has to meet all threads of the warpgroup in a barrier.
        for (uint32_t at : product.cells) {
            Cell& cell = S.cells[at];
            cell.products--;
            cell.reader = kSeveral, cell.reader_warp = kManyWarps;
            cell.read_block = S.block_epoch, cell.read_warp = 0;
        }
        Hidden& hidden = warpgroup.hidden[product.sums];
        if (--hidden.products) continue;
        for (int t = 0; t < kWarpgroup; t++) {
            const int row = t / kWarp * 16 + t % kWarp / 4, column = t % 4 * 2;
            for (int i = 0; i < product.columns / 2; i++) {
                product.d[t][i] = hidden.sums[(row + i / 2 % 2 * 8) * product.columns + i / 4 * 8 + column + i % 2];
                stack_word(product.d[t] + i) = kWrittenByProduct;
            }
        }
        warpgroup.hidden.erase(product.sums);
    }
    warpgroup.products = std::move(kept);
    // Registers that a product still under way reads too.
    for (const Product& product : warpgroup.products) mark(product, kMultiplying);
}

void run_shuffle(int warp) {
    Fiber* lanes = S.fibers + warp * kWarp;
    for (int lane = 0; lane < kWarp; lane++) lanes[lane].operands.result = lanes[lane ^ lanes[lane].operands.lanes].operands.value;
}

std::string place(const Fiber& f) { return std::string(f.file) + ":" + std::to_string(f.line); }

bool orders(const Fiber& f) {
    const char* slash = std::strrchr(f.file, '/');
    const std::string here = std::string(slash ? slash + 1 : f.file) + ":" + std::to_string(f.line);
    S.barriers.insert(here);
    return here != S.skipped;
}

// Carries out what `count` threads from `first` wait for, if all of them have come to the same instruction.
bool meet(int first, int count) {
    const Fiber& leader = S.fibers[first];
    for (int i = 1; i < count; i++)
        if (S.fibers[first + i].waiting != leader.waiting) return false;
    for (int i = 1; i < count; i++) {
        const Fiber& f = S.fibers[first + i];
        if (f.file != leader.file || f.line != leader.line) {
            report("divergent", {0, leader.file, leader.line}, "meets " + place(f));
            S.gave_up = true;
            return true;
        }
    }
    const int warp = first / kWarp;
    switch (leader.waiting) {
        case Wait::block:
            if (orders(leader)) {
                S.block_epoch++;
                for (auto& epoch : S.warp_epoch) epoch++;
            }
            break;
        case Wait::warp:
            if (orders(leader)) S.warp_epoch[warp]++;
            break;
        case Wait::shuffle: run_shuffle(warp); break;
        case Wait::ldmatrix: run_ldmatrix(warp); break;
        case Wait::mma: run_mma(warp); break;
        case Wait::wgmma: run_wgmma(first); break;
        case Wait::wgmma_wait: run_wgmma_wait(first); break;
        default: return false;
    }
    for (int i = 0; i < count; i++) S.fibers[first + i].waiting = Wait::none;
    return true;
}

void stop(Wait why, const char* file, int line) {
    Fiber& fiber = S.fibers[S.current];
    fiber.waiting = why;
    fiber.file = file;
    fiber.line = line;
    to_main();
}

void fiber_main() {
    S.body(S.params);
    Fiber& fiber = S.fibers[S.current];
    if (!fiber.copies.empty()) report("pending", {}, "the thread ended before its cp.async landed");
    if (!S.warpgroups[S.current / kWarpgroup].products.empty()) report("pending", {}, "the thread ended before its warpgroup products");
    fiber.waiting = Wait::done;
    to_main();
    __builtin_unreachable();
}

uint64_t random_number() {
    S.seed ^= S.seed << 13;
    S.seed ^= S.seed >> 7;
    S.seed ^= S.seed << 17;
    return S.seed;
}

void run_block() {
    for (int t = 0; t < S.threads; t++) {
        Fiber& fiber = S.fibers[t];
        fiber.waiting = Wait::none;
        fiber.copies.clear();
        fiber.groups = fiber.products = 0;
        fiber.proxy_fences.clear();
        fiber.visits.clear();
        auto* top = reinterpret_cast<uint64_t*>(S.stacks + (t + 1) * kStack) - 2;
        *top = reinterpret_cast<uint64_t>(&fiber_main);
        std::memset(top - 6, 0, 48);
        fiber.stack_pointer = top - 6;
    }
    // What an earlier block left in shared memory must not look like this block's.
    std::memset(S.shared, 0xff, S.shared_bytes);
    for (size_t i = 0; i < S.shared_bytes / 2; i++) S.cells[i].pending = false, S.cells[i].products = 0;
    for (Warpgroup& warpgroup : S.warpgroups) {
        for (const Product& product : warpgroup.products) forget(product);
        warpgroup = {};
    }
    S.reads.clear();
    S.block_writes.clear();
    S.took_ticket = false;
    S.first_epoch = ++S.block_epoch;
    for (auto& epoch : S.warp_epoch) epoch++;

    // Schedule 0 runs warps in turn, lanes upwards, and blocks too. Schedule 1 lets warps run ahead in a random order, lanes downwards;
    // blocks come in a random order.
    const int warps = S.threads / kWarp;
    std::vector<int> order(warps);
    for (int i = 0; i < warps; i++) order[i] = i;
    if (S.schedule)
        for (int i = warps - 1; i > 0; i--) std::swap(order[i], order[random_number() % (i + 1)]);
    for (;;) {
        bool moved = false;
        for (int w : order) {
            // A warp runs until it needs another one.
            for (bool again = true; again;) {
                again = false;
                for (int i = 0; i < kWarp; i++) {
                    const int t = w * kWarp + (S.schedule ? kWarp - 1 - i : i);
                    if (S.fibers[t].waiting != Wait::none) continue;
                    S.current = t;
                    shim_switch(&S.main_stack, S.fibers[t].stack_pointer);
                    moved = true;
                    if (S.gave_up) return;
                }
                const Wait why = S.fibers[w * kWarp].waiting;
                if (why == Wait::wgmma || why == Wait::wgmma_wait)
                    again = (w / 4 + 1) * kWarpgroup <= S.threads && meet(w / 4 * kWarpgroup, kWarpgroup);
                else if (why != Wait::block && why != Wait::done)
                    again = meet(w * kWarp, kWarp);
                moved |= again;
                if (S.gave_up) return;
            }
        }
        if (std::all_of(S.fibers, S.fibers + S.threads, [](const Fiber& f) { return f.waiting == Wait::done; })) return;
        if (S.fibers[0].waiting == Wait::block && meet(0, S.threads)) moved = true;
        if (S.gave_up) return;
        if (!moved) {
            for (int t = 0; t < S.threads; t++)
                if (S.fibers[t].waiting != Wait::done) {
                    S.current = t;
                    report("deadlock", {0, S.fibers[t].file, S.fibers[t].line}, "waits for ever");
                    break;
                }
            S.gave_up = true;
            return;
        }
    }
}

}  // namespace

extern "C" {

int shim_thread() { return S.current; }
int shim_block_x() { return S.bx; }
int shim_block_y() { return S.by; }
unsigned char* shim_shared() { return S.shared; }

void shim_sync(int whole_block, const char* file, int line) { stop(whole_block ? Wait::block : Wait::warp, file, line); }

float shim_shuffle_xor(float value, int lanes, const char* file, int line) {
    Operands& o = S.fibers[S.current].operands;
    o.value = value, o.lanes = lanes;
    stop(Wait::shuffle, file, line);
    return o.result;
}

void shim_ldmatrix(uint32_t* r, uint32_t address, int transposed, const char* file, int line) {
    Operands& o = S.fibers[S.current].operands;
    o.words = r, o.address = address, o.flag = transposed;
    stop(Wait::ldmatrix, file, line);
}

void shim_mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, int bf16, const char* file, int line) {
    Operands& o = S.fibers[S.current].operands;
    o.sums = d, o.a = a, o.b0 = b0, o.b1 = b1, o.flag = bf16;
    stop(Wait::mma, file, line);
}

void shim_cp_async(void* to, const void* from, int bytes, int valid) {
    const Where pc{reinterpret_cast<uintptr_t>(__builtin_return_address(0))};
    auto* at = static_cast<unsigned char*>(to);
    if (!inside(at, S.shared, S.shared_bytes) || at + bytes > S.shared + S.shared_bytes) {
        report("bounds", pc, "cp.async to outside of the shared memory asked for");
        give_up();
    }
    if (valid)
        access(from, bytes, false, pc);
    else
        S.fibers[S.current].visits[pc.pc]++;  // the instruction has come and read nothing
    access(to, bytes, true, pc);
    for (int i = 0; i < bytes / 2; i++) S.cells[(at - S.shared) / 2 + i].pending = true;
    std::memset(at, 0xff, bytes);
    Fiber& fiber = S.fibers[S.current];
    fiber.copies.push_back({at, valid ? static_cast<const unsigned char*>(from) : nullptr, bytes, fiber.groups});
}

int shim_ticket(unsigned* next, int count) {
    const Where pc{reinterpret_cast<uintptr_t>(__builtin_return_address(0))};
    Range* range = find_range(reinterpret_cast<unsigned char*>(next), 4);
    if (!range || !range->output || reinterpret_cast<uintptr_t>(next) % 4) {
        report("bounds", pc, "a ticket from outside of every output");
        give_up();
    }
    range->tickets = true;
    for (uint32_t* by : S.block_writes) *by |= kReleased;
    S.block_writes.clear();
    S.took_ticket = true;
    const unsigned mine = *next;
    *next = mine >= static_cast<unsigned>(count) - 1 ? 0 : mine + 1;
    return static_cast<int>(mine);
}

void shim_load4_fresh(float* to, const float* from) {
    access(from, 16, false, {reinterpret_cast<uintptr_t>(__builtin_return_address(0))}, true);
    std::memcpy(to, from, 16);
}

void shim_cp_async_commit() { S.fibers[S.current].groups++; }
void shim_cp_async_wait(int pending) { land(S.fibers[S.current], pending); }

void shim_wgmma(float* d, int columns, const uint32_t* a, unsigned long long a_matrix, unsigned long long b, int bf16, int accumulate,
                const char* file, int line) {
    Operands& o = S.fibers[S.current].operands;
    o.sums = d, o.columns = columns, o.a = a, o.a_descriptor = a_matrix, o.descriptor = b, o.flag = bf16, o.accumulate = accumulate;
    stop(Wait::wgmma, file, line);
}

void shim_wgmma_fence() { S.fibers[S.current].register_fences++; }
void shim_wgmma_commit() { S.fibers[S.current].products++; }

void shim_wgmma_wait(int pending, const char* file, int line) {
    S.fibers[S.current].operands.lanes = pending;
    stop(Wait::wgmma_wait, file, line);
}

void shim_fence_proxy_async() { S.fibers[S.current].proxy_fences.push_back(S.block_epoch); }

int shim_launch(void (*body)(const void*), const void* params, long long grid_x, int grid_y, int threads, size_t shared) {
    if (threads % kWarp || threads > kMaxThreads || shared > kMaxShared) {
        report("bounds", {}, "launch with " + std::to_string(threads) + " threads, " + std::to_string(shared) + " bytes shared");
        return 1;
    }
    if (!S.shared) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        S.shared = static_cast<unsigned char*>(mmap(nullptr, kMaxShared, PROT_READ | PROT_WRITE, flags, -1, 0));
        S.stacks = static_cast<unsigned char*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
        S.words = static_cast<uint32_t*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
    }
    S.body = body, S.params = params, S.threads = threads, S.shared_bytes = shared;
    S.most_shared = std::max(S.most_shared, shared);
    S.launches++;
    S.gave_up = false;
    S.host_stack = static_cast<const unsigned char*>(__builtin_frame_address(0));
    S.running = true;
    const int first = S.only_last ? static_cast<int>(std::max(0LL, grid_x - S.only_last)) : 0;
    std::vector<std::pair<int, int>> blocks;
    for (int y = 0; y < grid_y; y++)
        for (int x = first; x < grid_x; x++) blocks.emplace_back(x, y);
    if (S.schedule)
        for (size_t i = blocks.size(); i > 1; i--) std::swap(blocks[i - 1], blocks[random_number() % i]);
    for (auto block = blocks.begin(); block != blocks.end() && !S.gave_up; block++, S.blocks_run++) {
        std::tie(S.bx, S.by) = *block;
        run_block();
    }
    S.running = false;
    return S.gave_up;
}

// What the tests call.

void shim_begin(int schedule, unsigned long long seed, const char* skipped) {
    S.reports.clear();
    S.ranges.clear();
    S.barriers.clear();
    S.schedule = schedule, S.seed = seed ? seed : 1, S.skipped = skipped;
    S.launches = 0, S.blocks_run = 0, S.most_shared = 0, S.only_last = 0;
    S.counting = false;
    S.traffic.clear();
}

// From now on the bytes of tensors that launches move are counted.
void shim_count() { S.counting = true; }

// From now on each launch runs only its last blocks: those of a tensor too large to run whole.
void shim_only_last(long blocks) { S.only_last = blocks; }

// The tensors of the calls to come. What is announced twice is one range; what overlaps an earlier one has taken its memory over.
void shim_announce(const void* data, size_t bytes, int output) {
    const auto* begin = static_cast<const unsigned char*>(data);
    for (const Range& r : S.ranges)
        if (r.begin == begin && r.end == begin + bytes && r.output == static_cast<bool>(output)) return;
    std::erase_if(S.ranges, [&](const Range& r) { return begin < r.end && r.begin < begin + bytes; });
    S.ranges.push_back({begin, begin + bytes, static_cast<bool>(output), Written(output ? bytes : 0), {}, false});
}

// One report a line: kind, place (file:line, or +offset in the kernels' library), how often, text.
const char* shim_end() {
    static std::string text;
    text.clear();
    S.current = -1;
    for (const Range& r : S.ranges)
        if (r.output && !r.tickets && !S.only_last)
            if (const long missing = std::count(r.written.dense.begin(), r.written.dense.end(), 0u))
                report("missing", {}, std::to_string(missing) + " of " + std::to_string(r.end - r.begin) + " bytes of an output");
    for (const auto& [key, entry] : S.reports)
        text += key.first + "\t" + key.second + "\t" + std::to_string(entry.first) + "\t" + entry.second + "\n";
    S.ranges.clear();
    return text.c_str();
}

const char* shim_barriers() {
    static std::string text;
    text.clear();
    for (const auto& barrier : S.barriers) text += barrier + "\n";
    return text.c_str();
}

// One tensor of one launch a line: the launch's number, where the tensor begins, bytes asked for, read once a block, and written.
const char* shim_traffic() {
    static std::string text;
    text.clear();
    for (const auto& [key, moved] : S.traffic) {
        const long parts[] = {static_cast<long>(key.first), reinterpret_cast<long>(key.second), moved.asked, moved.once, moved.written};
        for (const long part : parts) text += std::to_string(part) + " ";
        text += "\n";
    }
    return text.c_str();
}

long shim_blocks() { return S.blocks_run; }
long shim_launches() { return S.launches; }
size_t shim_most_shared() { return S.most_shared; }

#define ACCESS(name, bytes, write)                                                                          \
    void __tsan_##name(void* p) {                                                                           \
        if (S.running) access(p, bytes, write, {reinterpret_cast<uintptr_t>(__builtin_return_address(0))}); \
    }
ACCESS(read1, 1, false)
ACCESS(read2, 2, false)
ACCESS(read4, 4, false)
ACCESS(read8, 8, false)
ACCESS(read16, 16, false)
ACCESS(write1, 1, true)
ACCESS(write2, 2, true)
ACCESS(write4, 4, true)
ACCESS(write8, 8, true)
ACCESS(write16, 16, true)
ACCESS(unaligned_read2, 2, false)
ACCESS(unaligned_read4, 4, false)
ACCESS(unaligned_read8, 8, false)
ACCESS(unaligned_read16, 16, false)
ACCESS(unaligned_write2, 2, true)
ACCESS(unaligned_write4, 4, true)
ACCESS(unaligned_write8, 8, true)
ACCESS(unaligned_write16, 16, true)
void __tsan_read_range(void* p, long bytes) {
    if (!S.running) return;
    for (long i = 0; i < bytes; i++) access(static_cast<char*>(p) + i, 1, false, {reinterpret_cast<uintptr_t>(__builtin_return_address(0))});
}
void __tsan_write_range(void* p, long bytes) {
    if (!S.running) return;
    for (long i = 0; i < bytes; i++) access(static_cast<char*>(p) + i, 1, true, {reinterpret_cast<uintptr_t>(__builtin_return_address(0))});
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
